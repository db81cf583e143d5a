import os
import subprocess
import sys

import pytest
import torch

from conftest import D_SAE, KINDS, RULES, make_sae, make_vectors
from posmask.kernels import runtime
from posmask.training.fast_loss import fast_gradients
from posmask.training.reference_loss import plain_gradients

PARAMETERS = ("encoder", "encoder_bias", "decoder", "decoder_bias")
# Rules with exact gradients; the threshold of jumprelu uses a straight-through estimate.
SMOOTH = ("relu", "topk", "batchtopk", "matryoshka", "gated")


def largest(value, n):
    """Keep the n largest positive values of a tensor and set the others to 0."""
    cut = value.flatten().sort(descending=True).values[n - 1]
    return value * (value >= cut.clamp(min=1e-30))


def loss_by_token(sae, vectors, position, frozen):
    """Return the loss per token, directly from the documented formulas of the SAE, the rules and the losses.

    Args:
        frozen: (decoder, decoder_bias) before the step, for the term that uses a constant decoder.
    """
    rule, settings = sae.rule, sae.rule.settings
    x = (vectors - sae.center) / sae.scale
    preactivation = (x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias
    openness, strength = torch.ones_like(preactivation), torch.ones(len(x), 1).double()
    if sae.mask.settings.kind == "switch":
        p = ((x - sae.mask.router_bias) @ sae.mask.router.T).softmax(1)
        openness, strength = sae.mask.table()[p.argmax(1)], p.amax(1, keepdim=True)
    elif sae.mask.settings.gating == "forward":
        openness = sae.mask.openness()[position.long()]
    value, extra = preactivation.clamp(min=0) * openness, 0.0
    if settings.kind == "topk":
        codes = torch.stack([largest(row, settings.k) for row in value])
    elif settings.kind in ("batchtopk", "matryoshka"):
        codes = largest(value, settings.k * len(x))
    elif settings.kind == "relu":
        codes, extra = value, settings.l1_coefficient * value.sum(1)
    else:
        loudness = rule.magnitude.exp() * preactivation + rule.magnitude_bias
        codes = loudness.clamp(min=0) * openness * (preactivation > 0)
        through_gate = value @ frozen[0] + frozen[1] - x
        extra = settings.l1_coefficient * value.sum(1) + through_gate.square().sum(1)
    parts = settings.parts if settings.kind == "matryoshka" else (1.0,)
    losses = []
    for number in range(len(parts)):
        inside = codes * (rule.level <= number) if settings.kind == "matryoshka" else codes
        losses.append((strength * inside @ sae.decoder + sae.decoder_bias - x).square().sum(1))
    return torch.stack(losses).mean(0) + extra


@pytest.mark.parametrize("rule", SMOOTH)
@pytest.mark.parametrize(("kind", "gating"), KINDS)
def test_gradients_agree_with_finite_differences(kind, gating, rule):
    sae = make_sae(kind, gating, rule=rule, dtype=torch.float64)
    vectors, position = make_vectors(60, dtype=torch.float64)
    fast_gradients(sae, vectors, position)
    frozen = sae.decoder.detach().clone(), sae.decoder_bias.detach().clone()
    share = sae.mask.openness().detach()[position.long()] if gating == "gradient" else torch.ones(60, D_SAE).double()
    step = 1e-6
    random = torch.Generator().manual_seed(0)
    for parameter in [*sae.latent_parameters(), sae.decoder_bias]:
        for flat in torch.randint(parameter.numel(), (6,), generator=random).tolist():
            with torch.no_grad():
                value = parameter.view(-1)[flat].item()
                parameter.view(-1)[flat] = value + step
                above = loss_by_token(sae, vectors, position, frozen)
                parameter.view(-1)[flat] = value - step
                below = loss_by_token(sae, vectors, position, frozen)
                parameter.view(-1)[flat] = value
            belongs_to_no_latent = parameter is sae.decoder_bias
            weight = torch.ones(60).double() if belongs_to_no_latent else share[:, flat * D_SAE // parameter.numel()]
            expected = float((weight * (above - below) / (2 * step)).mean())
            assert parameter.grad.view(-1)[flat].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_learned_openness_agrees_with_finite_differences():
    sae = make_sae("soft", dtype=torch.float64)
    vectors, position = make_vectors(60, dtype=torch.float64)
    sae.mask.learn(fast_gradients(sae, vectors, position).openness_gradient)
    step = 1e-6
    compared = 0
    for flat in range(0, sae.mask.theta.numel(), 5):
        with torch.no_grad():
            value = sae.mask.theta.view(-1)[flat].item()
            sae.mask.theta.view(-1)[flat] = value + step
            above = loss_by_token(sae, vectors, position, None).mean()
            sae.mask.theta.view(-1)[flat] = value - step
            below = loss_by_token(sae, vectors, position, None).mean()
            sae.mask.theta.view(-1)[flat] = value
        expected = float((above - below) / (2 * step))
        assert sae.mask.theta.grad.view(-1)[flat].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        compared += expected != 0
    assert compared > 10


@pytest.mark.parametrize("gradients", [fast_gradients, plain_gradients])
def test_a_learned_openness_has_the_same_gradient_in_every_run(gradients):
    sae = make_sae("soft", rule="relu", d_sae=256)
    vectors, position = make_vectors(2000)
    position = position[torch.randperm(2000)]  # so that threads add to the same rows
    with runtime.threads(2):
        first, *others = (gradients(sae, vectors, position).openness_gradient for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_a_jumprelu_threshold_learns_from_the_values_near_it():
    """The straight-through estimate, eq. 11 and 12 of the JumpReLU paper, as explicit sums."""
    sae = make_sae("slice", rule="jumprelu", dtype=torch.float64)
    vectors, position = make_vectors(80, dtype=torch.float64)
    step = fast_gradients(sae, vectors, position)
    x = sae.normalize(vectors)
    value = ((x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).clamp(min=0)
    value = (value * sae.mask.openness()[position.long()]).detach()
    threshold, settings = sae.rule.threshold.detach(), sae.rule.settings
    code_gradient = -2 * step.residual @ sae.decoder.detach().T
    near = ((value - threshold).abs() < settings.bandwidth / 2) & (value > 0)
    expected = -(near * (threshold * code_gradient + settings.l0_coefficient)).sum(0) / settings.bandwidth / len(x)
    torch.testing.assert_close(sae.rule.threshold.grad, expected)
    assert int((expected != 0).sum()) > 10


def test_penalties_rise_during_warm_up():
    rule = make_sae("open", rule={**RULES["relu"], "penalty_warmup_fraction": 0.5}).rule
    penalties = []
    for done in range(10):
        rule.before_step(done, 10)
        penalties.append(float(rule.training_codes(torch.ones(2, 3), None, lambda parameter: parameter).penalty))
    assert penalties == pytest.approx([0.3 * 6 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1)])


LAYOUTS = ("shuffled", "single position", "not contiguous", "bfloat16", "half", "long positions")


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("kind", ["open", "slice", "hard", "cohort"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_in_any_order_and_layout_equal_the_definition(layout, kind, rule):
    """Rows in any order, groups without tokens, and other memory layouts and precisions."""
    sae = make_sae(kind, rule=rule, dtype=torch.float64)
    vectors, position = make_vectors(60, dtype=torch.float64)
    match layout:
        case "shuffled":
            order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
            vectors, position = vectors[order], position[order]
        case "single position":
            position = torch.full_like(position, 3)
        case "not contiguous":
            vectors = vectors.T.contiguous().T
        case "bfloat16" | "half":
            vectors = vectors.to(getattr(torch, layout))
        case "long positions":
            position = position.long()
    plain = plain_gradients(sae, vectors, position)
    expected = [parameter.grad.clone() for parameter in sae.latent_parameters()]
    fast = fast_gradients(sae, vectors, position)
    assert fast.numbers.reconstruction == pytest.approx(plain.numbers.reconstruction, rel=1e-12)
    torch.testing.assert_close(fast.codes.dense(), plain.codes.dense())
    torch.testing.assert_close(fast.residual, plain.residual)
    assert torch.equal(fast.mask_row, plain.mask_row)
    for parameter, gradient in zip(sae.latent_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "matryoshka"])
def test_k_above_the_number_of_live_latents_selects_all_of_them(rule):
    sae = make_sae("slice", rule={**RULES[rule], "k": 12})  # 8 latents are live at each position
    vectors, position = make_vectors(60)
    expected = plain_gradients(sae, vectors, position).codes.dense()
    step = fast_gradients(sae, vectors, position)
    torch.testing.assert_close(step.codes.dense(), expected)
    assert 0 < int(step.codes.n_active().max()) <= 8


AVX2_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "znver3",
}
PLAIN_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "",
}


@pytest.mark.slow
def test_a_cpu_without_avx512_and_bfloat16_gives_the_same_gradients(tmp_path):
    """Compare two threads and all instructions with one thread and AVX2 or generic 64-bit code, compiled by numba."""
    code = (
        "import sys, torch\n"
        "sys.path.insert(0, 'tests')\n"
        "from conftest import make_sae, make_vectors\n"
        "from posmask.training.fast_loss import fast_gradients\n"
        "vectors, position = make_vectors(300)\n"
        "for precision in ('float32', 'bfloat16'):\n"
        "    sae = make_sae('hard', d_sae=600)\n"
        "    step = fast_gradients(sae, vectors, position, precision=precision)\n"
        "    norms = [float(parameter.grad.norm()) for parameter in (sae.encoder, sae.decoder)]\n"
        "    print(step.numbers.n_active, step.numbers.reconstruction, *norms)\n"
    )
    results = []
    for number, changes in enumerate(({"NUMBA_NUM_THREADS": "2"}, AVX2_PROCESSOR, PLAIN_PROCESSOR)):
        environment = {**os.environ, **changes, "NUMBA_CACHE_DIR": str(tmp_path / str(number))}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        results.append([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    for result in results[1:]:
        assert result[0] == pytest.approx(results[0][0], rel=1e-5)
        # bfloat16 sums in another order may select other latents.
        assert result[1] == pytest.approx(results[0][1], rel=1e-3)
