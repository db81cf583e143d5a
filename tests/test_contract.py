"""Properties of every activation rule with every mask, with forward and gradient gating, in every precision."""

import pytest
import torch

from conftest import (
    D_MODEL,
    D_SAE,
    FORWARD_ONLY,
    KINDS,
    MASKS,
    N_POSITIONS,
    RULES,
    interpret_triton,
    make_sae,
    make_vectors,
)
from posmask import masks
from posmask.errors import BadSetting
from posmask.kernels import backend
from posmask.kernels.runtime import float32_stays_float32
from posmask.masks.base import Routing
from posmask.sae import rules
from posmask.sae.files import read_sae, write_sae
from posmask.sae.warm_start import without_mask
from posmask.training.fast_loss import fast_gradients
from posmask.training.reference_loss import plain_gradients

every_rule = pytest.mark.parametrize("rule", RULES)
every_mask = pytest.mark.parametrize(("kind", "gating"), KINDS)
# The other masks run in `make test-all`.
every_mask_in_time = pytest.mark.parametrize(
    ("kind", "gating"),
    [
        pytest.param(kind, gating, marks=[] if kind in ("open", "slice", "hard", "soft") else [pytest.mark.slow])
        for kind, gating in KINDS
    ],
)
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
CHANGES = {"plain": {}, "free and leaky": {"free_fraction": 0.125, "leak": 0.3}}


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def n_tokens(request):
    """The number of tokens, with the compiled loops of the CPU and in `make test-all` also with Triton kernels."""
    if request.param == "cpu":
        yield 60
        return
    interpret_triton()
    with backend.use("triton"):
        yield 12  # Triton's interpreter takes 0.1 s per token.


def changed(kind, changes):
    """Return the changes that a kind supports: switch has no leak, and unborn latents of a split must be silent."""
    return {name: value for name, value in CHANGES[changes].items() if name != "leak" or kind not in FORWARD_ONLY}


def gradients_of(sae):
    return {name: p.grad.clone() for name, p in sae.named_parameters() if not name.startswith("mask.theta")}


def test_the_contract_covers_every_rule_and_mask():
    assert set(RULES) == set(rules.RULES)
    assert set(MASKS) == {kind for kind in masks.MASKS if ":" not in kind}  # Other tests import kinds of their own.


@every_rule
@every_mask
@pytest.mark.parametrize(("dtype", "use_mask"), [(torch.float64, True), (torch.float64, False), (torch.float32, True)])
def test_sparse_encode_equals_the_definition(rule, kind, gating, dtype, use_mask, n_tokens):
    sae = make_sae(kind, gating, rule=rule, dtype=dtype)
    vectors, position = make_vectors(n_tokens, dtype=dtype)
    shuffled = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
    vectors, position = vectors[shuffled], position[shuffled]  # rows may be in any order
    dense = sae.encode(vectors, position, use_mask=use_mask).detach()
    codes = sae.sparse_encode(vectors, position, use_mask=use_mask)
    torch.testing.assert_close(codes.dense(), dense)
    torch.testing.assert_close(sae.sparse_decode(codes), sae.decode(dense).detach())
    assert bool((codes.value > 0).all())
    assert bool((codes.token.diff() >= 0).all())


@every_rule
@every_mask
@pytest.mark.parametrize("changes", CHANGES)
def test_fast_gradients_equal_the_definition(rule, kind, gating, changes, n_tokens):
    sae = make_sae(kind, gating, rule=rule, dtype=torch.float64, **changed(kind, changes))
    vectors, position = make_vectors(n_tokens, dtype=torch.float64)
    dead = torch.arange(D_SAE) % 3 == 0
    plain = plain_gradients(sae, vectors, position, dead=dead, aux_k=3)
    expected = gradients_of(sae)
    sae.zero_grad()
    fast = fast_gradients(sae, vectors, position, dead=dead, aux_k=3)
    assert fast.numbers.reconstruction == pytest.approx(plain.numbers.reconstruction, rel=1e-12)
    assert fast.numbers.auxiliary == pytest.approx(plain.numbers.auxiliary, rel=1e-12)
    assert (fast.numbers.auxiliary > 0) == sae.rule.revives
    for name, gradient in gradients_of(sae).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    torch.testing.assert_close(fast.codes.dense(), plain.codes.dense())
    torch.testing.assert_close(fast.residual, plain.residual)
    assert torch.equal(fast.fired, plain.fired)
    assert fast.numbers.n_active == plain.numbers.n_active
    assert fast.numbers.least == pytest.approx(
        0 if sae.rule.training_choice() is None else plain.numbers.least, rel=1e-12
    )
    assert (fast.strength is None) == (plain.strength is None)
    if fast.strength is not None:
        torch.testing.assert_close(fast.strength, plain.strength)
    assert (fast.openness_gradient is None) == (plain.openness_gradient is None) == (not sae.mask.learns)
    if fast.openness_gradient is not None:
        torch.testing.assert_close(fast.openness_gradient, plain.openness_gradient)


@every_rule
def test_gradients_of_contiguous_hard_masks_equal_the_definition(rule, n_tokens):
    sae = make_sae("hard", rule=rule, dtype=torch.float64, contiguous=True)
    vectors, position = make_vectors(n_tokens, dtype=torch.float64)
    plain_gradients(sae, vectors, position)
    expected = gradients_of(sae)
    fast_gradients(sae, vectors, position)
    for name, gradient in gradients_of(sae).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@every_rule
@every_mask_in_time
def test_torch_operations_equal_compiled_loops(rule, kind, gating):
    vectors, position = make_vectors(60, dtype=torch.float64)
    results = []
    for implementation in ("numba", "torch"):
        with backend.use(implementation):
            sae = make_sae(kind, gating, rule=rule, dtype=torch.float64)
            dead = torch.arange(D_SAE) % 3 == 0
            step = fast_gradients(sae, vectors, position, dead=dead, aux_k=3)
            gradients = [sae.encoder.grad, sae.decoder.grad, sae.encoder_bias.grad, sae.decoder_bias.grad]
            codes = sae.sparse_encode(vectors, position)
            results.append([step.codes.dense(), step.residual, *gradients, codes.dense(), sae.sparse_decode(codes)])
    for compiled_result, torch_result in zip(*results, strict=True):
        torch.testing.assert_close(compiled_result, torch_result)


@every_rule
@every_mask
def test_closed_latents_are_exactly_zero_and_get_zero_gradient(rule, kind, gating, n_tokens):
    sae = make_sae(kind, gating, rule=rule)
    if kind == "switch":  # closed latents depend on the token; route all tokens to one expert
        sae.mask.route = lambda x, position: Routing(torch.full(x.shape[:-1], 1))
    closed_anywhere = False
    for token_position in (1, 15):
        vectors, position = make_vectors(n_tokens)[0], torch.full((n_tokens,), token_position, dtype=torch.int32)
        row = 1 if kind == "switch" else token_position
        closed = sae.mask.table().detach()[row] == 0
        closed_anywhere |= bool(closed.any())
        if gating == "forward":
            assert bool((sae.encode(vectors, position)[:, closed] == 0).all())
            assert not bool(closed[sae.sparse_encode(vectors, position).latent].any())
        for method in (plain_gradients, fast_gradients):
            for dead in (None, torch.arange(D_SAE) % 2 == 0)[: 1 + sae.rule.revives]:
                sae.zero_grad()
                method(sae, vectors, position, dead=dead, aux_k=3)
                for parameter in sae.latent_parameters():
                    assert bool((parameter.grad[closed] == 0).all())
                    if rule != "jumprelu" or parameter is not sae.rule.threshold:
                        assert bool((parameter.grad[~closed] != 0).any())
    assert closed_anywhere == (kind not in ("open", "soft"))


@every_rule
@every_precision
def test_a_fully_open_mask_equals_no_mask_bit_for_bit(rule, dtype, n_tokens):
    sae = make_sae("open", rule=rule, dtype=dtype)
    vectors, position = make_vectors(n_tokens, dtype=dtype)
    preactivation = (sae.normalize(vectors) - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias
    unmasked = sae.rule.codes(preactivation, None, lambda parameter: parameter)
    assert torch.equal(sae.encode(vectors, position), unmasked)
    for changes in ({"leak": 1.0}, {"free_fraction": 1.0}):
        opened = make_sae("hard", rule=rule, dtype=dtype, **changes)
        assert torch.equal(opened.encode(vectors, position), unmasked)
        codes = opened.sparse_encode(vectors, position), sae.sparse_encode(vectors, position)
        assert torch.equal(codes[0].dense(), codes[1].dense())


@every_rule
@pytest.mark.parametrize("kind", [kind for kind, gating in KINDS if gating == "gradient"])
def test_gradient_masks_do_not_change_codes(rule, kind):
    free, bound = make_sae("open", rule=rule), make_sae(kind, "gradient", rule=rule)
    vectors, position = make_vectors(100)
    assert torch.equal(free.encode(vectors, position), bound.encode(vectors, position))


@every_rule
@every_mask
@every_precision
def test_batched_texts_equal_single_tokens(rule, kind, gating, dtype):
    sae = make_sae(kind, gating, rule=rule, dtype=dtype)
    vectors = make_vectors(3 * N_POSITIONS, dtype=dtype)[0].reshape(3, N_POSITIONS, -1)
    position = torch.arange(N_POSITIONS).expand(3, -1)
    codes = sae.encode(vectors, position)
    torch.testing.assert_close(codes.flatten(0, 1), sae.encode(vectors.flatten(0, 1), position.flatten()))
    assert sae(vectors, position).shape == vectors.shape


@every_rule
@every_mask
def test_a_written_sae_gives_the_same_codes_when_read(rule, kind, gating, tmp_path, n_tokens):
    sae = make_sae(kind, gating, rule=rule, **changed(kind, "free and leaky"))
    sae.center += 1.5
    sae.scale *= 2
    write_sae(sae, tmp_path)
    vectors, position = make_vectors(n_tokens)
    read = read_sae(tmp_path)
    assert torch.equal(read(vectors, position), sae(vectors, position))
    assert torch.equal(read.sparse_encode(vectors, position).value, sae.sparse_encode(vectors, position).value)
    assert read.mask.settings == sae.mask.settings
    assert read.rule.settings == sae.rule.settings


@pytest.mark.parametrize("rule", ["topk", "gated"])  # a rule that selects codes and one that computes them in blocks
@every_mask
def test_positions_outside_the_context_raise_an_error(rule, kind, gating):
    sae = make_sae(kind, gating, rule=rule)
    vectors, position = torch.ones(17, D_MODEL), torch.arange(17)
    for encode in (sae.encode, lambda *given, **options: sae.sparse_encode(*given, **options).dense()):
        with pytest.raises(BadSetting, match="positions 0 to 16 are not all within the 16 positions"):
            encode(vectors, position)
        with pytest.raises(BadSetting, match="positions -1 to 14"):
            encode(vectors[:16], position[:16] - 1)


@every_rule
@every_mask
def test_without_mask_equals_lifting_the_mask(rule, kind, gating):
    if kind == "switch":
        pytest.skip("its router is part of the mask")
    sae = make_sae(kind, gating, rule=rule)
    vectors, position = make_vectors(50)
    bare = without_mask(sae)
    assert torch.equal(bare.encode(vectors, position), sae.encode(vectors, position, use_mask=False))
    assert bool((bare.mask.openness() == 1).all())
    with torch.no_grad():
        bare.encoder.zero_()
    assert not bool((sae.encoder == 0).any())  # a copy


@every_rule
@every_mask_in_time
def test_bfloat16_rounds_only_codes_of_rules_without_selection(rule, kind, gating, n_tokens):
    sae = make_sae(kind, gating, rule=rule)
    vectors, position = make_vectors(5 * n_tokens // 2)
    exact = fast_gradients(sae, vectors, position).codes.dense()
    gradient = sae.encoder.grad.clone()
    rounded = fast_gradients(sae, vectors, position, precision="bfloat16").codes.dense()
    both = (exact > 0) & (rounded > 0)
    assert int(both.sum()) > 0.97 * int((exact > 0).sum())
    if sae.rule.training_choice() is not None:
        torch.testing.assert_close(rounded[both], exact[both])
    else:
        largest = float(exact.max())
        assert 0 < float((rounded - exact)[both].abs().max()) < 2**-6 * largest
        assert float((sae.encoder.grad - gradient).norm()) < 0.05 * float(gradient.norm())


@every_rule
@every_mask_in_time
def test_float32_agrees_with_float64(rule, kind, gating, n_tokens):
    assert float32_stays_float32()
    results = {}
    for dtype in (torch.float32, torch.float64):
        sae = make_sae(kind, gating, rule=rule, dtype=dtype)
        vectors, position = make_vectors(n_tokens)
        step = fast_gradients(sae, vectors.to(dtype), position)
        results[dtype] = step, sae.decoder.grad
    (low, gradient), (high, exact) = results.values()
    same_selection = bool((low.codes.dense() > 0).eq(high.codes.dense() > 0).all())
    assert low.numbers.reconstruction == pytest.approx(high.numbers.reconstruction, rel=1e-5)
    if same_selection:  # Candidates closer than float32 resolution may be selected differently.
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-5)
