"""Products of 16-bit integers: their error bound, and selections and gradients by them."""

import pytest
import torch

from posmask.kernels import backend, cpu_integers
from posmask.kernels.integers import IntegerProducts
from posmask.masks import make_mask, mask_settings
from posmask.masks.groups import LiveGroup
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.sae.selection import GatedEncoder, GroupedInputs, LargestOfToken, choose
from posmask.training.fast_loss import fast_gradients


def rows(n, d, seed):
    """Rows of very different norms and shapes, some of zeros, of one number, or of tiny numbers."""
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(n, d, generator=random) * 10.0 ** torch.randint(-6, 7, (n, 1), generator=random)
    table[0], table[1], table[2] = 0, 3, torch.eye(d)[d // 2] * 7
    table[3] = 1e-33
    table[4, 0] = 1e4  # one large number among small ones
    return table


@pytest.mark.parametrize("d", [1, 7, 64, 900])  # 900: sums in two parts
def test_products_of_integers_differ_by_less_than_their_bound(d):
    x, weight = rows(23, d, 0), rows(45, d, 1)
    products = IntegerProducts(x, weight, torch.zeros(45), 1.0)
    assert products.finite
    which = torch.tensor([3, 1, 44, 0, 2, 4, *range(5, 40)])
    exact = x.double() @ weight.double().T
    for tokens in (slice(0, 23), slice(5, 6), slice(20, 23)):
        product = products.of(tokens, which)[: tokens.stop - tokens.start, : len(which)]
        error = (product.double() - exact[tokens][:, which]).abs().amax(1)
        assert bool((error <= products.error[tokens]).all())


def test_the_bound_is_tight_enough_to_select_by():
    """Pre-activations of a typical SAE vary by 1; few others lie within the bound of the smallest selected one."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 576, generator=random), torch.randn(300, 576, generator=random)
    weight /= weight.norm(dim=1, keepdim=True)
    error = IntegerProducts(x, weight, torch.zeros(300), 1.0).error
    assert float(error.max()) < 0.01


def test_sums_of_the_largest_integers_do_not_overflow():
    ones = torch.ones(3, 4096)
    product = IntegerProducts(ones, ones, torch.zeros(3), 1.0).of(slice(0, 3), torch.arange(3))[:3, :3]
    torch.testing.assert_close(product, torch.full((3, 3), 4096.0), rtol=1e-3, atol=0)
    one = torch.eye(4096)[:3] * 5
    product = IntegerProducts(one, one, torch.zeros(3), 1.0).of(slice(0, 3), torch.arange(3))[:3, :3]
    torch.testing.assert_close(product, 25 * torch.eye(3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("columns", [3, slice(None)])
def test_vectors_that_are_not_finite_have_no_products_of_integers(bad, columns):
    x = torch.ones(4, 8)
    x[2, columns] = bad
    assert not IntegerProducts(x, torch.ones(5, 8), torch.zeros(5), 1.0).finite
    assert not IntegerProducts(torch.ones(5, 8), x, torch.zeros(4), 1.0).finite
    assert not IntegerProducts(torch.ones(5, 8), torch.ones(4, 8), x[:, 3], 1.0).finite


def test_selection_computes_undecided_numbers_exactly():
    """Latents that differ by less than the rounding to integers are told apart."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=random)
    row = torch.randn(64, generator=random)
    weight = row + 1e-5 * torch.randn(200, 64, generator=random)
    x[:, 0] = 10 - (x[:, 1:] @ row[1:]) / row[0]  # every token has positive numbers
    x *= row[0].sign()
    everywhere = torch.ones(1, 200)
    encoder = GatedEncoder(weight, torch.zeros(200), [LiveGroup(torch.tensor([0]), slice(0, 200), False)], everywhere)
    inputs = GroupedInputs(x, torch.zeros(40, dtype=torch.int64), [40])
    with backend.use("numba", integers=True):
        entries = choose(inputs, encoder, LargestOfToken(8))
        error = IntegerProducts(x, weight, torch.zeros(200), 1.0).error
    exact = x.double() @ weight.double().T
    spread = exact.topk(9, dim=1).values.diff(dim=1).abs().min(1).values
    assert bool((spread < error).all())  # the integers alone cannot decide
    expected = exact.topk(8, dim=1).indices.sort(1).values
    assert torch.equal(entries.latent.view(40, 8).sort(1).values, expected)


MASKS = {
    "open": {"kind": "open"},
    "slice": {"kind": "slice", "n_slices": 4},
    "hard": {"kind": "hard", "positions_per_latent": 4},
    "soft": {"kind": "soft", "low": 0.2, "high": 0.9},
    "gradient": {"kind": "slice", "n_slices": 4, "gating": "gradient"},
}


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "matryoshka"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_equal_those_of_float32_products(rule, mask):
    random = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(24, rule_settings({"kind": rule, "k": 4}), make_mask(mask_settings(MASKS[mask]), 16, 96))
    vectors = torch.randn(200, 24, generator=random)
    position = torch.randint(16, (200,), generator=random)
    dead = torch.arange(96) % 3 == 0
    results = []
    for integers in (False, True):
        with backend.use("numba", integers=integers):
            step = fast_gradients(sae, vectors, position, dead=dead, aux_k=8)
        codes = step.codes
        assert codes is not None
        gradients = [parameter.grad.clone() for parameter in sae.parameters() if parameter.grad is not None]
        results.append([torch.tensor(step.numbers.reconstruction), codes.dense(), *gradients])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_ordinary_products_are_used_where_integers_do_not_pay():
    x = torch.ones(2, 3)
    assert not backend.multiplies_integers(x.double(), 1e9)
    assert not backend.multiplies_integers(x, 2.0)
    with backend.use("torch", integers=True):
        assert not backend.multiplies_integers(x, 1e9)
    assert cpu_integers.ROWS * cpu_integers.COLUMNS == 96
