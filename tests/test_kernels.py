from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posmask.kernels import backend, operations, runtime


def test_dictionary_products_equal_plain_loops(either_way):
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
    torch.testing.assert_close(operations.dot_rows(rows, token, dictionary, latent), dots)
    by_token, by_latent = operations.Grouped(token, 6), operations.Grouped(latent, 9)
    torch.testing.assert_close(by_token.sum_rows(weight, dictionary, latent), decoded)
    torch.testing.assert_close(by_latent.sum_rows(weight, rows, token), summed)
    torch.testing.assert_close(by_latent.sum(weight), total)
    twice = by_latent.sum_rows(weight, rows, token, out=summed.clone(), add=True)
    torch.testing.assert_close(twice, 2 * summed)


def test_sums_and_parts_of_a_sparse_table_equal_those_of_the_dense_one(either_way):
    random = torch.Generator().manual_seed(0)
    table = torch.rand(7, 5, generator=random) * (torch.rand(7, 5, generator=random) < 0.6)
    row, column = table.nonzero(as_tuple=True)
    stored = np.empty(len(row), [("row", np.int32), ("column", np.int32), ("value", np.float32)])
    stored["row"], stored["column"], stored["value"] = row, column, table[row, column]
    stored.flags.writeable = False  # as blocks that are read from a file
    blocks = [(part["row"], part["column"], part["value"]) for part in np.split(stored, [4, 11])]
    weight = torch.randn(7, 3, generator=random, dtype=torch.float64) * (torch.arange(21).view(7, 3) % 2)
    sums = operations.weighted_sums(blocks, weight, 5)
    torch.testing.assert_close(sums, weight.T @ table.double())
    row_slot, column_slot = torch.tensor([-1, 2, -1, 0, 1, -1, -1]), torch.tensor([1, -1, 0, 2, -1])
    part = operations.dense_part(blocks, row_slot.int(), column_slot.int())
    assert torch.equal(part, table[[3, 4, 1]][:, [2, 0, 3]])


@pytest.mark.parametrize("n_parts", [1, 3])
def test_explain_equals_plain_loops(n_parts, either_way):
    random = torch.Generator().manual_seed(0)
    target = torch.randn(6, 5, generator=random, dtype=torch.float64)
    dictionary = torch.randn(9, 5, generator=random, dtype=torch.float64)
    token = torch.randint(6, (31,), generator=random).sort().values
    latent, value = torch.randint(9, (31,), generator=random), torch.rand(31, generator=random, dtype=torch.float64)
    level = torch.randint(n_parts, (9,), generator=random)
    level[0] = n_parts - 1
    remainders = []
    for part in range(n_parts):
        rest = target.clone()
        for entry in range(31):
            if level[latent[entry]] <= part:
                rest[token[entry]] -= value[entry] * dictionary[latent[entry]]
        remainders.append(rest)
    left, along = operations.explain(target, token, latent, value, dictionary, None if n_parts == 1 else level)
    for part in range(n_parts):
        torch.testing.assert_close(left[part], sum(remainders[part:]))
    for entry in range(31):
        expected = left[level[latent[entry]], token[entry]] @ dictionary[latent[entry]]
        torch.testing.assert_close(along[entry], expected)


def test_vectors_of_any_precision_and_memory_order_are_centered(either_way):
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 3, generator=random)
    center, bias = torch.randn(3, generator=random), torch.randn(3, generator=random)
    order = torch.tensor([3, 1, 1, 0])
    for source in (vectors, vectors.T.contiguous().T, vectors.bfloat16(), vectors.double(), vectors.half()):
        expected = (source.float() - center) / 2.5 - bias
        centered = operations.centered(source, None, center, torch.tensor(2.5), bias)
        torch.testing.assert_close(centered, expected)
        torch.testing.assert_close(operations.centered(source, order, center, torch.tensor(2.5), bias), expected[order])


def test_rows_get_unit_norm(either_way):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = rows / rows.norm(dim=1, keepdim=True)
    operations.unit_rows_(rows)
    torch.testing.assert_close(rows, expected)


def test_rows_of_zeros_stay_zero(either_way):
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    operations.unit_rows_(rows)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_a_fast_product_below_float32_precision_is_not_used(monkeypatch):
    monkeypatch.setattr(runtime, "float32_stays_float32", lambda: False)  # as on a CPU with AMX
    with runtime.fast_float32():
        assert torch.get_float32_matmul_precision() == "highest"


def test_fast_float32_restores_the_setting():
    before = torch.get_float32_matmul_precision()
    with runtime.fast_float32():
        pass
    assert torch.get_float32_matmul_precision() == before


def test_tf32_is_not_used_on_cuda(monkeypatch):
    monkeypatch.setattr(runtime, "float32_stays_float32", lambda: True)  # of the CPU
    with runtime.fast_float32("cuda:0"):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("capability", "triton", "chosen", "reason"),
    [
        ((9, 0), True, "triton", ""),
        ((8, 0), True, "triton", ""),
        ((7, 5), True, "torch", "need CUDA capability 8.0, and cuda:0 has 7.5."),
        ((9, 0), False, "torch", "Triton is not installed: pip install 'posmask[gpu]'."),
    ],
)
def test_a_gpu_uses_triton_if_it_can_and_says_once_why_not(capability, triton, chosen, reason, monkeypatch, capsys):
    backend._triton_runs_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: triton or None)
    tensor = SimpleNamespace(device=torch.device("cuda:0"), get_device=lambda: 0)
    assert [backend.implementation(tensor) for _ in range(2)] == [chosen, chosen]
    said = capsys.readouterr().err
    assert said.count("\n") == bool(reason)
    assert said.endswith(f"{reason}\n" if reason else "")
    backend._triton_runs_on.cache_clear()


def test_the_choice_depends_on_the_device():
    assert backend.implementation(torch.ones(1)) == "numba"
    assert backend.implementation(torch.ones(1, device="meta")) == "torch"
    with backend.use("torch"):
        assert backend.implementation(torch.ones(1)) == "torch"
