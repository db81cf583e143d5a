import pytest
import torch

from posmask import kernels


def plain_top_k(product, gate, gate_row, k):
    """{latent: preactivation} for each row, by sorting in Python."""
    rows = []
    for row, position in zip(product.double(), gate_row.tolist(), strict=True):
        relu = row.clamp(min=0)
        value = relu if gate is None else relu * gate[position].double()
        best = sorted(range(len(value)), key=lambda j: -float(value[j]))[:k]
        rows.append({j: float(relu[j]) for j in best if value[j] > 0})
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n_latents", "k"), [(7, 10), (40, 4), (300, 32), (1000, 200)])
def test_top_k_rows_are_the_k_largest(dtype, gated, n_latents, k):
    random = torch.Generator().manual_seed(n_latents)
    full = torch.float32 if dtype == torch.bfloat16 else dtype
    product = torch.randn(20, n_latents, generator=random).to(dtype)
    product[3] = -1.0  # a row in which nothing is positive
    gate = (torch.rand(5, n_latents, generator=random) * (torch.rand(5, n_latents, generator=random) > 0.3)).to(full)
    gate_row = torch.randint(5, (20,), generator=random)
    chosen = kernels.top_k_rows(product, gate if gated else None, gate_row, k, full)
    expected = plain_top_k(product, gate if gated else None, gate_row, k)
    for token, row in enumerate(expected):
        found = {}
        for j, p in zip(chosen.latent[token].tolist(), chosen.preactivation[token].tolist(), strict=True):
            if p > 0:
                found[j] = p
                assert p == float(product[token, j])
        weight = torch.ones(n_latents).double() if not gated else gate[gate_row[token]].double()
        # By value, since of equal entries (common in bfloat16) any may be taken.
        values = [sorted(float(weight[j]) * p for j, p in some.items()) for some in (found, row)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_top_k_rows_takes_exactly_k_of_equal_entries():
    chosen = kernels.top_k_rows(torch.ones(2, 300), None, torch.zeros(2, dtype=torch.int64), 32, torch.float32)
    for latent in chosen.latent:
        assert len(set(latent.tolist())) == 32


def test_dictionary_products_equal_plain_loops():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5, generator=random, dtype=torch.float64)
    table = torch.randn(9, 5, generator=random, dtype=torch.float64)
    latent = torch.randint(9, (6, 3), generator=random)
    weight = torch.randn(6, 3, generator=random, dtype=torch.float64)
    by_latent = kernels.ByLatent(latent, 9)
    dots, decoded = torch.zeros(6, 3).double(), torch.zeros(6, 5).double()
    summed, total = torch.zeros(9, 5).double(), torch.zeros(9).double()
    for token in range(6):
        for entry in range(3):
            j = latent[token, entry]
            dots[token, entry] = rows[token] @ table[j]
            decoded[token] += weight[token, entry] * table[j]
            summed[j] += weight[token, entry] * rows[token]
            total[j] += weight[token, entry]
    torch.testing.assert_close(kernels.dot_rows(rows, table, latent), dots)
    torch.testing.assert_close(kernels.weighted_rows(latent, weight, table), decoded)
    torch.testing.assert_close(by_latent.sum_rows(weight, rows), summed)
    torch.testing.assert_close(by_latent.sum(weight), total)


def test_fast_float32_restores_the_setting():
    before = torch.get_float32_matmul_precision()
    with kernels.fast_float32():
        pass
    assert torch.get_float32_matmul_precision() == before
