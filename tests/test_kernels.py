import pytest
import torch

from posmask import kernels
from posmask.kernels import Above, LargestOfBatch, LargestOfToken


def table(n_latents, dtype):
    product = torch.randn(20, n_latents, generator=torch.Generator().manual_seed(n_latents)).to(dtype)
    product[3] = -1.0  # a row in which nothing is positive
    product[5, ::3] = -torch.inf  # as in columns that only fill up
    return product


def chosen_values(value, choice):
    row, column = kernels.choose_in_rows(value, choice)
    pairs = list(zip(row.tolist(), column.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert row.tolist() == sorted(row.tolist())
    return [(r, float(value[r, c])) for r, c in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n_latents", "k"), [(7, 10), (40, 4), (300, 32), (1000, 200)])
def test_the_largest_of_tokens_and_of_the_batch_are_those_that_sorting_finds(dtype, n_latents, k):
    value = table(n_latents, dtype)
    rows = [sorted((v for v in row if v > 0), reverse=True)[:k] for row in value.double().tolist()]
    found = chosen_values(value, LargestOfToken(k))
    # By value, since of equal entries (common in bfloat16) any may be taken.
    for number, row in enumerate(rows):
        assert sorted((v for r, v in found if r == number), reverse=True) == row
    everything = sorted((v for v in value.double().flatten().tolist() if v > 0), reverse=True)
    found = chosen_values(value, LargestOfBatch(k))
    assert sorted((v for _, v in found), reverse=True) == everything[: 20 * k]
    found = chosen_values(value, Above(0.5))
    assert sorted((v for _, v in found), reverse=True) == [v for v in everything if v > 0.5]


def test_exactly_k_of_equal_entries_are_taken():
    ones = torch.ones(2, 300)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        row, column = kernels.choose_in_rows(ones.to(dtype), LargestOfToken(32))
        assert torch.bincount(row).tolist() == [32, 32]
        assert len({*zip(row.tolist(), column.tolist(), strict=True)}) == 64
        row, _ = kernels.choose_in_rows(ones.to(dtype), LargestOfBatch(32))
        assert len(row) == 64


def test_dictionary_products_equal_plain_loops():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5, generator=random, dtype=torch.float64)
    dictionary = torch.randn(9, 5, generator=random, dtype=torch.float64)
    token, latent = torch.randint(6, (18,), generator=random), torch.randint(9, (18,), generator=random)
    weight = torch.randn(18, generator=random, dtype=torch.float64)
    dots, decoded = torch.zeros(18).double(), torch.zeros(6, 5).double()
    summed, total = torch.zeros(9, 5).double(), torch.zeros(9).double()
    for entry in range(18):
        t, j = token[entry], latent[entry]
        dots[entry] = rows[t] @ dictionary[j]
        decoded[t] += weight[entry] * dictionary[j]
        summed[j] += weight[entry] * rows[t]
        total[j] += weight[entry]
    torch.testing.assert_close(kernels.dot_rows(rows, token, dictionary, latent), dots)
    by_token, by_latent = kernels.Grouped(token, 6), kernels.Grouped(latent, 9)
    torch.testing.assert_close(by_token.sum_rows(weight, dictionary, latent), decoded)
    torch.testing.assert_close(by_latent.sum_rows(weight, rows, token), summed)
    torch.testing.assert_close(by_latent.sum(weight), total)


def test_fast_float32_restores_the_setting():
    before = torch.get_float32_matmul_precision()
    with kernels.fast_float32():
        pass
    assert torch.get_float32_matmul_precision() == before
