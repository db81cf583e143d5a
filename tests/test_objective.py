import pytest
import torch

from conftest import D_SAE, MASKS, make_sae, make_vectors
from posmask.objective import fast_gradients, plain_gradients

KINDS = [(kind, apply) for kind in MASKS for apply in ("forward", "gradient")]
PARAMETERS = ("encoder", "encoder_bias", "decoder", "decoder_bias")


def gradients_of(sae):
    return {name: getattr(sae, name).grad.clone() for name in PARAMETERS}


def loss_by_token(sae, vectors, position):
    """|x_hat - x|^2 of each token, straight from the formulas of sae.py."""
    x = (vectors - sae.center) / sae.scale
    preactivation = ((x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).clamp(min=0)
    if sae.mask.settings.apply == "forward":
        preactivation = preactivation * sae.mask.openness()[position.long()]
    top = preactivation.topk(sae.rule.k, dim=1)
    codes = torch.zeros_like(preactivation).scatter(1, top.indices, top.values)
    return (codes @ sae.decoder + sae.decoder_bias - x).square().sum(1)


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize(("kind", "apply"), KINDS)
def test_fast_gradients_equal_the_definition(kind, apply, aux):
    sae = make_sae(kind, apply, dtype=torch.float64)
    vectors, position = make_vectors(150, dtype=torch.float64)
    dead = torch.arange(D_SAE) % 3 == 0 if aux else None
    plain = plain_gradients(sae, vectors, position, dead=dead, aux_k=3)
    expected = gradients_of(sae)
    sae.zero_grad()
    fast = fast_gradients(sae, vectors, position, dead=dead, aux_k=3)
    assert fast.reconstruction == pytest.approx(plain.reconstruction, rel=1e-12)
    assert fast.auxiliary == pytest.approx(plain.auxiliary, rel=1e-12)
    assert (fast.auxiliary > 0) == aux
    for name, gradient in gradients_of(sae).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    torch.testing.assert_close(fast.codes.dense(), plain.codes.dense())
    assert (fast.openness_gradient is None) == (plain.openness_gradient is None) == (not sae.mask.learns)
    if fast.openness_gradient is not None:
        torch.testing.assert_close(fast.openness_gradient, plain.openness_gradient)


@pytest.mark.parametrize(("kind", "apply"), KINDS)
def test_gradients_agree_with_finite_differences(kind, apply):
    sae = make_sae(kind, apply, dtype=torch.float64)
    vectors, position = make_vectors(60, dtype=torch.float64)
    fast_gradients(sae, vectors, position)
    share = sae.mask.openness().detach()[position.long()] if apply == "gradient" else torch.ones(60, D_SAE).double()
    step = 1e-6
    random = torch.Generator().manual_seed(0)
    for name in PARAMETERS:
        parameter = getattr(sae, name)
        for flat in torch.randint(parameter.numel(), (12,), generator=random).tolist():
            with torch.no_grad():
                value = parameter.view(-1)[flat].item()
                parameter.view(-1)[flat] = value + step
                above = loss_by_token(sae, vectors, position)
                parameter.view(-1)[flat] = value - step
                below = loss_by_token(sae, vectors, position)
                parameter.view(-1)[flat] = value
            belongs_to_no_latent = name == "decoder_bias"
            weight = torch.ones(60).double() if belongs_to_no_latent else share[:, flat * D_SAE // parameter.numel()]
            expected = float((weight * (above - below) / (2 * step)).mean())
            assert parameter.grad.view(-1)[flat].item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name


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
            above = loss_by_token(sae, vectors, position).mean()
            sae.mask.theta.view(-1)[flat] = value - step
            below = loss_by_token(sae, vectors, position).mean()
            sae.mask.theta.view(-1)[flat] = value
        expected = float((above - below) / (2 * step))
        assert sae.mask.theta.grad.view(-1)[flat].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        compared += expected != 0
    assert compared > 10


@pytest.mark.parametrize("method", [plain_gradients, fast_gradients])
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("apply", ["forward", "gradient"])
@pytest.mark.parametrize("kind", ["slice", "hard", "cohort", "importance"])
def test_gradients_outside_the_mask_are_exactly_zero(kind, apply, aux, method):
    sae = make_sae(kind, apply)
    vectors, _ = make_vectors(80)
    dead = torch.arange(D_SAE) % 2 == 0 if aux else None
    for place in (1, 7, 15):
        sae.zero_grad()
        method(sae, vectors, torch.full((80,), place, dtype=torch.int32), dead=dead, aux_k=3)
        closed = sae.mask.openness()[place] == 0
        assert bool(closed.any())
        for name in ("encoder", "encoder_bias", "decoder"):
            gradient = getattr(sae, name).grad
            assert bool((gradient[closed] == 0).all()), name
            assert bool((gradient[~closed] != 0).any()), name


def test_bfloat16_selection_gives_float32_values_of_the_latents_it_chose():
    sae = make_sae("open")
    vectors, position = make_vectors(300)
    exact = fast_gradients(sae, vectors, position).codes.dense()
    chosen = fast_gradients(sae, vectors, position, precision="bfloat16").codes.dense()
    both = (exact > 0) & (chosen > 0)
    torch.testing.assert_close(chosen[both], exact[both])
    assert int(both.sum()) > 0.98 * int((exact > 0).sum())
