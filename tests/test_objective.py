import pytest
import torch

from conftest import D_SAE, KINDS, RULES, make_sae, make_vectors
from posmask.objective import fast_gradients

PARAMETERS = ("encoder", "encoder_bias", "decoder", "decoder_bias")
# By the slope of the loss itself; jumprelu's threshold learns from an estimate of it instead.
SMOOTH = ("relu", "topk", "batchtopk", "matryoshka", "gated")


def largest(value, n):
    """The n largest positive numbers of a table, the others 0."""
    cut = value.flatten().sort(descending=True).values[n - 1]
    return value * (value >= cut.clamp(min=1e-30))


def loss_by_token(sae, vectors, position, frozen):
    """Each token's part of the loss, straight from the formulas at the heads of sae.py, rules.py and objective.py.

    Args:
        frozen: (decoder, decoder_bias) as they were, for what must reconstruct through a constant decoder.
    """
    rule, ask = sae.rule, sae.rule.settings
    x = (vectors - sae.center) / sae.scale
    preactivation = (x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias
    openness, strength = torch.ones_like(preactivation), torch.ones(len(x), 1).double()
    if sae.mask.settings.kind == "switch":
        p = ((x - sae.mask.router_bias) @ sae.mask.router.T).softmax(1)
        openness, strength = sae.mask.table()[p.argmax(1)], p.amax(1, keepdim=True)
    elif sae.mask.settings.apply == "forward":
        openness = sae.mask.openness()[position.long()]
    value, extra = preactivation.clamp(min=0) * openness, 0.0
    if ask.kind == "topk":
        codes = torch.stack([largest(row, ask.k) for row in value])
    elif ask.kind in ("batchtopk", "matryoshka"):
        codes = largest(value, ask.k * len(x))
    elif ask.kind == "relu":
        codes, extra = value, ask.l1_coefficient * value.sum(1)
    else:
        loudness = rule.magnitude.exp() * preactivation + rule.magnitude_bias
        codes = loudness.clamp(min=0) * openness * (preactivation > 0)
        through_gate = value @ frozen[0] + frozen[1] - x
        extra = ask.l1_coefficient * value.sum(1) + through_gate.square().sum(1)
    parts = ask.parts if ask.kind == "matryoshka" else (1.0,)
    losses = []
    for number in range(len(parts)):
        inside = codes * (rule.level <= number) if ask.kind == "matryoshka" else codes
        losses.append((strength * inside @ sae.decoder + sae.decoder_bias - x).square().sum(1))
    return torch.stack(losses).mean(0) + extra


@pytest.mark.parametrize("rule", SMOOTH)
@pytest.mark.parametrize(("kind", "apply"), KINDS)
def test_gradients_agree_with_finite_differences(kind, apply, rule):
    sae = make_sae(kind, apply, rule=rule, dtype=torch.float64)
    vectors, position = make_vectors(60, dtype=torch.float64)
    fast_gradients(sae, vectors, position)
    frozen = sae.decoder.detach().clone(), sae.decoder_bias.detach().clone()
    share = sae.mask.openness().detach()[position.long()] if apply == "gradient" else torch.ones(60, D_SAE).double()
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


def test_a_jumprelu_threshold_learns_from_the_values_near_it():
    """The straight-through estimate of the paper, eq. 11 and 12, from its sums."""
    sae = make_sae("slice", rule="jumprelu", dtype=torch.float64)
    vectors, position = make_vectors(80, dtype=torch.float64)
    step = fast_gradients(sae, vectors, position)
    x = sae.normalise(vectors)
    value = ((x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).clamp(min=0)
    value = (value * sae.mask.openness()[position.long()]).detach()
    threshold, ask = sae.rule.threshold.detach(), sae.rule.settings
    code_gradient = -2 * step.residual @ sae.decoder.detach().T
    near = ((value - threshold).abs() < ask.bandwidth / 2) & (value > 0)
    expected = -(near * (threshold * code_gradient + ask.l0_coefficient)).sum(0) / ask.bandwidth / len(x)
    torch.testing.assert_close(sae.rule.threshold.grad, expected)
    assert int((expected != 0).sum()) > 10


def test_penalties_rise_over_their_warm_up():
    rule = make_sae("open", rule={**RULES["relu"], "penalty_warmup_share": 0.5}).rule
    penalties = []
    for done in range(10):
        rule.before_step(done, 10)
        penalties.append(float(rule.training_codes(torch.ones(2, 3), None, lambda one: one).penalty))
    assert penalties == pytest.approx([0.3 * 6 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1)])
