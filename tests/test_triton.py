"""Triton kernels in Triton's interpreter against plain loops and the dense definition, and compiled for GPUs."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import D_SAE, make_sae, make_vectors
from posmask.data.activations import training_batches
from posmask.errors import DegenerateResult
from posmask.kernels import backend, operations
from posmask.sae.selection import Above, _take
from posmask.training.fast_loss import fast_gradients
from posmask.training.loop import train
from posmask.training.optimizer import UnitRowAdam
from posmask.training.reference_loss import plain_gradients
from posmask.training.settings import TrainingSettings

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[gpu]'")
pytestmark = pytest.mark.usefixtures("on_triton")

from posmask.kernels import triton_rows, triton_selection

every_type = pytest.mark.parametrize(
    ("product_type", "number_type"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=["bfloat16", "float32", "float64"],
)


def random_numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def largest(product, bias, latents, gate, k):
    """The slots that `largest_of_rows` fills, by a plain sort of each row."""
    preactivation = product.to(bias.dtype) + bias
    value = preactivation if gate is None else preactivation * gate[0][gate[1]][:, latents]
    latent, chosen = torch.full((len(product), k), -1), bias.new_zeros(len(product), k)
    for row in range(len(product)):
        columns = sorted((c for c in range(len(bias)) if value[row, c] > 0), key=lambda c: -float(value[row, c]))
        columns = torch.tensor(sorted(columns[:k]), dtype=torch.int64)
        latent[row, : len(columns)], chosen[row, : len(columns)] = latents[columns], preactivation[row, columns]
    return latent, chosen


def assert_chosen(product, bias, latents, gate, k):
    expected = largest(product, bias, latents, gate, k)
    latent, preactivation = torch.full((len(product), k), -1), bias.new_zeros(len(product), k)
    triton_selection.largest_of_rows(product, bias, latents, gate, latent, preactivation)
    assert torch.equal(latent, expected[0])
    assert torch.equal(preactivation, expected[1])


@every_type
@pytest.mark.parametrize("gated", [False, True])
def test_the_largest_numbers_of_a_row_are_chosen(product_type, number_type, gated):
    n, scattered = 75, torch.arange(75) * 2 + 1
    product, bias = random_numbers(3, n, dtype=product_type), random_numbers(n, seed=1, dtype=number_type) / 10
    table = torch.rand(4, 160, generator=torch.Generator().manual_seed(2)).to(number_type) * (torch.arange(160) % 3 > 0)
    gate = (table, torch.tensor([3, 0, 3])) if gated else None
    assert_chosen(product, bias, scattered, gate, 6)


def test_padding_and_neighbouring_rows_of_the_product_are_not_read():
    product = torch.full((3, 40), 1e9)
    product[:, :33] = random_numbers(3, 33)
    assert_chosen(product[1:, :33], random_numbers(33, seed=1), torch.arange(33), None, 5)


@pytest.mark.parametrize("lanes", [16, 2048])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_rows_that_are_hard_to_choose_from(k, lanes, monkeypatch):
    monkeypatch.setattr(triton_selection, "_LANES", lanes)
    n, nan, inf = 100, float("nan"), float("inf")
    rows = random_numbers(9, n)
    rows[0] = 1.5  # ties, more than there is room for
    rows[1] = -1  # nothing to choose
    rows[2, 3:] = -inf  # less than k
    rows[3, ::2] = nan
    rows[4, 5:9] = inf
    rows[5] = nan
    rows[6, ::16] = torch.arange(7.0) + 9  # the largest share a lane
    rows[7] = (rows[7] * 2).round() / 2  # ties around the cut
    rows[8] = rows[8].abs() + 1  # all positive
    assert_chosen(rows, torch.zeros(n), torch.arange(n), None, k)


@pytest.mark.parametrize("equal", [False, True])
def test_more_candidates_than_room_are_cut_exactly(equal, monkeypatch):
    monkeypatch.setattr(triton_selection, "_LANES", 8)
    monkeypatch.setattr(triton_selection, "_LEAST_ROOM", 16)
    rows = random_numbers(2, 120).abs()
    rows = (rows * 4).ceil() / 4 if equal else rows
    rows[:, 90:] *= -1
    rows[:, ::9] = float("nan")
    assert int((rows > 0).sum(1).min()) > 64  # the room for k = 9, for which there are too few lanes
    for k in (8, 9):
        assert_chosen(rows, torch.zeros(120), torch.arange(120), None, k)


def test_masked_rows_have_no_entries():
    gate = torch.zeros(1, 20), torch.zeros(3, dtype=torch.int64)
    assert_chosen(random_numbers(3, 20).abs(), torch.zeros(20), torch.arange(20), gate, 4)
    found = triton_selection.above_floor(random_numbers(3, 20).abs(), torch.zeros(20), torch.arange(20), gate, 0.0)
    assert [len(part) for part in found] == [0, 0, 0, 0]


@every_type
@pytest.mark.parametrize("floor", [0.0, 0.7, 9.0])
def test_all_numbers_above_a_floor_are_taken(product_type, number_type, floor, monkeypatch):
    monkeypatch.setattr(triton_selection, "_LANES", 16)
    product, bias = random_numbers(4, 50, dtype=product_type), random_numbers(50, seed=1, dtype=number_type) / 10
    product[1, ::5] = float("nan")
    latents = torch.arange(50) + 3
    gate = torch.rand(2, 53, generator=torch.Generator().manual_seed(2)).to(number_type), torch.tensor([1, 0, 1, 1])
    for openness in (None, gate):
        expected = _take(product, bias, latents, openness, Above(floor), floor)
        found = triton_selection.above_floor(product, bias, latents, openness, floor)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("k", [1, 3, 32])
def test_each_token_is_explained_by_its_entries(k):
    target, table = random_numbers(3, 70, dtype=torch.float64), random_numbers(9, 70, seed=1, dtype=torch.float64)
    latent = torch.randint(-1, 9, (3, k), generator=torch.Generator().manual_seed(2))
    latent[1] = -1
    value = torch.rand(3, k, dtype=torch.float64) * (latent >= 0)
    rows = table[latent] * (latent >= 0)[..., None]
    residual, along = triton_rows.explain_rows(target, latent, value, table)
    torch.testing.assert_close(residual, target - torch.einsum("tk,tkd->td", value, rows))
    torch.testing.assert_close(along, torch.einsum("td,tkd->tk", residual, rows))
    assert torch.equal(residual[1], target[1])


def test_empty_entries_have_no_product():
    rows, table = random_numbers(3, 40), random_numbers(5, 40, seed=1)
    row, latent = torch.arange(20) % 3, torch.arange(20) % 6 - 1
    expected = (rows[row] * table[latent]).sum(1) * (latent >= 0)
    torch.testing.assert_close(triton_rows.dot_rows(rows, row, table, latent), expected)


KEYS = {
    "short": torch.arange(90) % 7,
    "one long": torch.full((200,), 2),
    "neighbouring long": torch.tensor([0] * 70 + [1] * 3 + [2] * 130 + [5] * 64 + [6] * 65),
    "some empty": torch.arange(150) % 3 - 1,
    "all empty": torch.full((70,), -1),
    "no entries": torch.zeros(0, dtype=torch.int64),
}


@pytest.mark.parametrize("keys", KEYS)
def test_sums_of_short_and_long_keys_equal_plain_loops(keys):
    random = torch.Generator().manual_seed(0)
    key = KEYS[keys][torch.randperm(len(KEYS[keys]), generator=random)]
    table, weight = random_numbers(11, 5, dtype=torch.float64), torch.rand(len(key), generator=random).double()
    index = torch.randint(11, (len(key),), generator=random)
    expected, total = torch.ones(7, 5, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for entry, j in enumerate(key.tolist()):
        if j >= 0:
            expected[j] += weight[entry] * table[index[entry]]
            total[j] += weight[entry]
    grouped = operations.Grouped(key, 7)
    found = grouped.sum_rows(weight, table, index, out=torch.ones(7, 5, dtype=torch.float64), add=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grouped.sum_rows(weight, table, index), expected - 1)
    torch.testing.assert_close(grouped.sum(weight), total)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_adam_equals_that_of_torch(unit_rows, clipped):
    start = random_numbers(5, 12)
    start[3] = 0
    reference = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([reference], lr=0.01)
    parameter, mean, square = start.clone(), torch.zeros(5, 12), torch.zeros(5, 12)
    low = torch.empty(5, 12, dtype=torch.bfloat16)
    for n in range(1, 4):
        gradient = random_numbers(5, 12, seed=n) * (torch.arange(5) != 3)[:, None]
        reference.grad = gradient * (0.3 if clipped else 1)
        optimizer.step()
        if unit_rows:
            operations.unit_rows_(reference.detach())
        step = triton_rows.AdamStep(0.01, (0.9, 0.999), 1e-8, n)
        clip = torch.tensor(0.3) if clipped else None
        triton_rows.adam_rows(parameter, gradient, mean, square, step, clip, unit_rows=unit_rows, low=low)
        torch.testing.assert_close(parameter, reference.detach())
    state = optimizer.state[reference]
    torch.testing.assert_close(mean, state["exp_avg"])
    torch.testing.assert_close(square, state["exp_avg_sq"])
    torch.testing.assert_close(low.float(), parameter, rtol=2**-7, atol=0)  # the interpreter rounds toward 0
    assert bool((parameter[3] == 0).all())


def test_long_parameters_are_updated_to_their_end(monkeypatch):
    monkeypatch.setattr(triton_rows, "_LONGEST_BLOCK", 8)
    parameter = torch.ones(21)
    step = triton_rows.AdamStep(0.5, (0.9, 0.999), 1e-8, 1)
    triton_rows.adam_rows(parameter, torch.ones(21), torch.zeros(21), torch.zeros(21), step)
    torch.testing.assert_close(parameter, torch.full((21,), 0.5))


def test_equal_inputs_give_equal_bytes():
    table, weight = random_numbers(40, 20), random_numbers(300, seed=1)
    key, index = torch.arange(300) % 4, torch.arange(300) % 40
    sums = [operations.Grouped(key, 4).sum_rows(weight, table, index) for _ in range(2)]
    assert torch.equal(*sums)


SETTINGS = TrainingSettings(
    n_steps=2, batch_tokens=6, learning_rate=5e-3, warmup_fraction=0, dead_after_eligible_tokens=2, aux_k=2,
    precision="float32",
)  # fmt: skip


def trained(activations, implementation, **settings):
    """An SAE with its losses after two steps, the last of which revives dead latents."""
    sae, losses = make_sae("slice"), []
    sae.center, sae.scale = activations.center_and_scale
    batches = training_batches(activations, 6, 2, 0)
    with backend.use(implementation), contextlib.suppress(DegenerateResult):  # 2 steps need not explain anything
        train(sae, batches, SETTINGS.model_copy(update=settings), "test", on_point=losses.append)
    return sae, [(point.loss, point.auxiliary_loss, point.l0, point.dead_latents) for point in losses]


def test_training_equals_that_of_the_cpu_and_repeats_bit_for_bit(activations):
    (sae, curve), (again, _), (numba, expected) = (trained(activations, n) for n in ("triton", "triton", "numba"))
    for point, other in zip(curve, expected, strict=True):
        assert point == pytest.approx(other, rel=1e-5)
    assert curve[-1][1] > 0
    for one, other, reference in zip(sae.parameters(), again.parameters(), numba.parameters(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, reference, rtol=1e-3, atol=1e-4)


def test_the_encoder_has_a_bfloat16_copy_until_it_changes():
    parameters = [torch.nn.Parameter(random_numbers(4, 6, seed=seed)) for seed in range(2)]
    optimizer = UnitRowAdam([{"params": parameters, "lr": 0.1}], parameters[1], copied=parameters[0])
    assert optimizer.low_copy() is None
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(4, 6)
        optimizer.clipped_step(None, None)
        torch.testing.assert_close(optimizer.low_copy().float(), parameters[0].detach(), rtol=2**-7, atol=0)
    with torch.no_grad():
        parameters[0][2] = parameters[0][1]
    assert optimizer.low_copy() is None


def test_an_optimizer_resumes_on_either_implementation():
    parameters = [torch.nn.Parameter(random_numbers(4, 6)) for _ in range(2)]
    optimizers = [UnitRowAdam([{"params": [parameter], "lr": 0.1}], parameter) for parameter in parameters]
    for n, implementation in enumerate(("numba", "triton", "numba")):
        for parameter, optimizer, name in zip(parameters, optimizers, ("numba", implementation), strict=True):
            parameter.grad = random_numbers(4, 6, seed=n)
            with backend.use(name):
                optimizer.clipped_step(parameter.grad.norm(), 0.5)
    torch.testing.assert_close(*(parameter.detach() for parameter in parameters))
    assert int(optimizers[1].state[parameters[1]]["step"]) == 3


def assert_gradients_of_the_definition(rule, kind, gating, n_tokens, **changes):
    sae = make_sae(kind, gating, rule=rule, dtype=torch.float64, **changes)
    vectors, position = make_vectors(n_tokens, dtype=torch.float64)
    dead = torch.arange(D_SAE) % 3 == 0
    plain = plain_gradients(sae, vectors, position, dead=dead, aux_k=3)
    expected = {name: p.grad.clone() for name, p in sae.named_parameters() if not name.startswith("mask.theta")}
    sae.zero_grad()
    fast = fast_gradients(sae, vectors, position, dead=dead, aux_k=3)
    for name, gradient in expected.items():
        torch.testing.assert_close(sae.get_parameter(name).grad, gradient, msg=name)
    torch.testing.assert_close(fast.codes.dense(), plain.codes.dense())
    torch.testing.assert_close(fast.residual, plain.residual)
    assert torch.equal(fast.fired, plain.fired)
    assert fast.numbers.n_active == plain.numbers.n_active
    for name in ("reconstruction", "auxiliary"):
        assert getattr(fast.numbers, name) == pytest.approx(getattr(plain.numbers, name), rel=1e-12)
    assert fast.numbers.least == pytest.approx(
        0 if sae.rule.training_choice() is None else plain.numbers.least, rel=1e-12
    )
    if sae.mask.learns:
        torch.testing.assert_close(fast.openness_gradient, plain.openness_gradient)
    codes = sae.sparse_encode(vectors, position)
    dense = sae.encode(vectors, position).detach()
    torch.testing.assert_close(codes.dense(), dense)
    torch.testing.assert_close(sae.sparse_decode(codes), sae.decode(dense).detach())


@pytest.mark.parametrize(
    ("rule", "kind", "gating"),
    [
        ("topk", "open", "forward"),
        ("topk", "slice", "forward"),
        ("topk", "hard", "forward"),
        ("topk", "soft", "gradient"),
        ("batchtopk", "slice", "forward"),
        ("matryoshka", "slice", "forward"),
        ("relu", "slice", "forward"),
    ],
)
def test_gradients_equal_the_definition(rule, kind, gating):
    assert_gradients_of_the_definition(rule, kind, gating, 8)


@pytest.mark.parametrize("kind", ["open", "slice"])
def test_the_host_waits_once_for_the_groups_of_tokens_and_once_for_the_numbers(kind, monkeypatch):
    sae = make_sae(kind)
    vectors, position = make_vectors(6)
    fast_gradients(sae, vectors, position, details=False)  # the mask's groups are cached from now on
    waits = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def counted(*given, name=name, method=method, **options):
            waits.append(name)
            return method(*given, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with monkeypatch.context() as kernels:  # whose arguments the interpreter copies
        for module in (triton_rows, triton_selection):
            for name, function in vars(module).items():
                if name in module.__all__ and name.endswith(("rows", "entries")):
                    kernels.setattr(module, name, uncounted(function, waits))
        step = fast_gradients(sae, vectors, position, details=False)
    assert waits == ([] if kind == "open" else ["tolist"])
    assert step.numbers == step.numbers
    assert waits[-1:] == ["tolist"]
    assert len(waits) == (1 if kind == "open" else 2)


def uncounted(function, waits):
    def call(*given, **options):
        before = len(waits)
        result = function(*given, **options)
        del waits[before:]
        return result

    return call


def test_matryoshka_of_tokens_and_many_slots():
    rule = {"kind": "matryoshka", "k": 4, "parts": (0.25, 1.0), "select": "token"}
    assert_gradients_of_the_definition(rule, "open", "forward", 8)


def test_more_slots_than_registers(monkeypatch):
    monkeypatch.setattr(triton_rows, "MOST_SLOTS", 2)
    assert_gradients_of_the_definition("topk", "slice", "forward", 8)


def test_bfloat16_only_selects_also_where_slots_stay_empty():
    sae = make_sae("slice", rule={"kind": "topk", "k": 20})  # more than are live, so rounding selects the same
    vectors, position = make_vectors(8)
    plain = plain_gradients(sae, vectors, position)
    expected = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    fast = fast_gradients(sae, vectors, position, precision="bfloat16")
    assert fast.numbers.n_active == plain.numbers.n_active < 20 * 8
    torch.testing.assert_close(fast.codes.dense(), plain.codes.dense())
    for name, gradient in expected.items():
        torch.testing.assert_close(sae.get_parameter(name).grad, gradient, msg=name)


def test_k_above_the_live_latents():
    assert_gradients_of_the_definition({"kind": "topk", "k": 20}, "slice", "forward", 8)


@pytest.mark.slow
def test_the_benchmark_for_gpus_can_be_rehearsed(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, script, "--rehearse", "--out", out], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    results = json.loads(out.read_text(encoding="utf8"))
    assert results["checks"].pop("equal bytes")
    assert max(results["checks"].values()) < 1e-5
    assert len(results["steps"]) == 6
    assert all(row["estimate ms"] > 0 for row in results["steps"])
    peers = {row["peer"] for row in results["peers"]}
    missing = {line.partition(":")[0] for line in results["left out"]}
    assert peers | missing == {"sparsify", "SAELens", "SAELens-bf16"}
    assert all("is not installed" in line for line in results["left out"])
    assert results["harvest"]["tokens/s"].keys() == {"bare forward", "model", "int8"}
    assert results["waiting"]["ms per step with batches from disk"] > 0
    header, *lines = done.stdout[done.stdout.index("tokens x d_model") :].splitlines()
    for column in ("of limit", "estimate/ms", "open/ms", "sparsify", "SAELens", "SAELens-bf16"):
        assert column in header
    assert len(lines) == 7


@pytest.mark.parametrize("types", [[], pytest.param(["every-type"], marks=pytest.mark.slow)])
def test_the_kernels_compile_for_gpus(types):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "80", "90", *types], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    expected = {
        name
        for module in (triton_rows, triton_selection)
        for name, kernel in vars(module).items()
        if name.endswith(("_rows", "_keys", "_chunks", "_entries")) and hasattr(kernel, "__getitem__")
    }
    assert kernels == expected
    assert len(done.stdout.splitlines()) % 2 == 0  # each for both
