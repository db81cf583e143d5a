"""What a training step takes and computes on a CUDA GPU, in at most 8 minutes and without network: `make gpu-bench`.

Parts run in this order, and the file is written after each, so an interruption loses only what follows:

    ceilings   rates of copies and of products in bfloat16, TF32 and float32, and of gathers from the L2 cache
    checks     every kernel against float64 with poisoned outputs; the training step against its definition; the loss of
               12 steps against that of torch operations; two trainings that must be equal bit for bit
    steps      time of a training step by shape, mask and precision, what it consists of, its host waits and memory
    peers      time of a training step of other packages on the same vectors (gpu_peers.py)
    harvests   a model's passes alone, and with their vectors written to disk (gpu_harvest.py)
    waiting    share of the time that the GPU waits for batches from shards on disk

`--rehearse` runs all of it on the CPU in Triton's interpreter, at tiny shapes: its times mean nothing. A part that
fails, or that there is no time for, is reported and the others run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu_harvest import harvests
from gpu_peers import PEERS, peers
from gpu_terms import MASKS, Bench, Marks, repeated, sae_of, vectors_of

from posmask.data.activations import _FIELDS, Activations, training_batches
from posmask.errors import DegenerateResult
from posmask.kernels import backend, runtime
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.storage.manifest import write_folder
from posmask.study import estimate
from posmask.training import fast_loss
from posmask.training.loop import train
from posmask.training.reference_loss import plain_gradients
from posmask.training.settings import TrainingSettings

PARTS = {  # of a step, by what the names of its kernels contain
    "selection": ("choose_rows", "cut_rows", "above_rows"),
    "explain": ("_explain_rows", "_dot_rows"),
    "sums": ("_sum_",),
    "adam": ("_adam_rows",),
    "products": ("gemm", "nvjet", "cutlass"),
    "sorting": ("sort", "Sort", "radix"),
}


def describe(bench: Bench) -> None:
    import triton

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    if not bench.rehearsal:
        found["card"] = torch.cuda.get_device_name()
        found["implementation"] = backend.implementation(torch.empty(1, device=bench.device))
    bench.results["machine"] = found


def ceilings(bench: Bench) -> None:
    """Rates of the device: GB/s and TFLOP/s."""
    n = 64 if bench.rehearsal else 8192
    numbers, target = (torch.zeros(n, n, device=bench.device) for _ in range(2))
    rates = {"copy": 2e-6 * numbers.nbytes / bench.milliseconds(lambda: target.copy_(numbers))}
    low = numbers.bfloat16()
    for name, setting, matrix in (
        ("bfloat16", "highest", low),
        ("TF32", "high", numbers),
        ("float32", "highest", numbers),
    ):
        torch.set_float32_matmul_precision(setting)
        rates[name] = 2e-9 * n**3 / bench.milliseconds(lambda matrix=matrix: matrix @ matrix, 10)
    torch.set_float32_matmul_precision("highest")
    table = numbers[: max(1, 2**22 // n)]  # 16 MB, which stay in the L2 cache
    rows = torch.randint(len(table), (n,), device=bench.device)
    rates["gather"] = 2e-6 * table.nbytes / len(table) * n / bench.milliseconds(lambda: table[rows])
    bench.results["ceilings"] = rates


def settings_of(n_steps: int, n_tokens: int, precision: str) -> TrainingSettings:
    return TrainingSettings(n_steps=n_steps, batch_tokens=n_tokens, learning_rate=1e-3, precision=precision)


def checks(bench: Bench) -> None:
    """Errors against the definition, relative to the largest number, and whether two trainings are equal."""
    sizes = (6, 16, 64, 4) if bench.rehearsal else (512, 256, 4096, 32)
    found = bench.results["checks"] = {}
    cases = [("topk", "open"), ("topk", "slice"), ("topk", "hard"), ("batchtopk", "slice"), ("relu", "slice")]
    for rule, mask in cases:
        found[f"{rule} {mask}"] = step_error(bench, sizes, rule, mask)
    losses = {name: losses_of(bench, sizes, name) for name in ("triton", "torch")}
    pairs = zip(losses["triton"][0], losses["torch"][0], strict=True)
    found["loss of 12 steps, triton and torch"] = max(abs(one - other) / other for one, other in pairs)
    again, parameters = losses_of(bench, sizes, "triton"), losses["triton"][1]
    found["equal bytes"] = all(torch.equal(*pair) for pair in zip(again[1], parameters, strict=True))


def step_error(bench: Bench, sizes: tuple[int, int, int, int], rule: str, mask: str) -> float:
    """The largest error of a gradient of float64 inputs, after the memory of the outputs was filled with NaN."""
    n_tokens, d_model, d_sae, k = sizes
    rules = {"relu": {"kind": "relu", "l1_coefficient": 0.3}}
    masks = {
        "open": {"kind": "open"},
        "slice": MASKS["slice-8"],
        "hard": {"kind": "hard", "positions_per_latent": 16},
    }
    sae = sae_of(bench, d_model, d_sae, rules.get(rule, {"kind": rule, "k": k}), masks[mask], torch.float64)
    vectors, position = vectors_of(bench, n_tokens, d_model)
    dead = torch.arange(d_sae, device=bench.device) % 3 == 0
    plain_gradients(sae, vectors.double(), position, dead=dead, aux_k=3)
    expected = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    poison = torch.full((2**16 if bench.rehearsal else 2**28,), torch.nan, device=bench.device)
    del poison  # The next allocations get its memory.
    fast_loss.fast_gradients(sae, vectors.double(), position, dead=dead, aux_k=3)
    errors = [(sae.get_parameter(name).grad - g).abs().max() / g.abs().max() for name, g in expected.items()]
    return float(torch.stack(errors).max())


def losses_of(
    bench: Bench, sizes: tuple[int, int, int, int], implementation: str
) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of a short training, and its parameters at the end."""
    n_tokens, d_model, d_sae, k = sizes
    n_steps = 2 if bench.rehearsal else 12
    sae = sae_of(bench, d_model, d_sae, {"kind": "topk", "k": k}, MASKS["slice-8"], torch.float32)
    losses: list[float] = []
    fast = fast_loss.fast_gradients

    def noted(*given, **options):
        step = fast(*given, **options)
        losses.append(step.numbers.reconstruction)
        return step

    fast_loss.fast_gradients = noted
    try:
        with backend.use(implementation), suppress(DegenerateResult):
            batches = repeated(bench, n_tokens, d_model, n_steps)
            train(sae, batches, settings_of(n_steps, n_tokens, "float32"), "check")
    finally:
        fast_loss.fast_gradients = fast
    return losses, [parameter.detach() for parameter in sae.parameters()]


def steps(bench: Bench) -> None:
    """Time of a step for each shape, mask and precision; with torch operations for three shapes."""
    for number, shape in enumerate(bench.shapes):
        for mask in MASKS:
            for precision in ("bfloat16", "float32"):
                for implementation in ("triton", "torch")[: 1 + (number % 2 == 0 and precision == "bfloat16")]:
                    if bench.is_late(0.5):
                        bench.leave_out(f"steps from {shape} {mask} {precision} {implementation} on: no time")
                        return
                    bench.results["steps"].append(step_row(bench, shape, mask, precision, implementation))
                    bench.save()


def step_row(
    bench: Bench, shape: tuple[int, int, int, int], mask: str, precision: str, implementation: str
) -> dict[str, object]:
    n_tokens, d_model, d_sae, k = shape
    row: dict[str, object] = {"shape": shape, "mask": mask, "precision": precision, "implementation": implementation}
    sae = sae_of(bench, d_model, d_sae, {"kind": "topk", "k": k}, MASKS[mask], torch.float32)
    n_steps = 2 if bench.rehearsal else 45
    marks = Marks(bench)
    batches = repeated(bench, n_tokens, d_model, n_steps)
    with backend.use(implementation), suppress(DegenerateResult):
        train(sae, batches, settings_of(n_steps, n_tokens, precision), "step", marks)
    row |= marks.row(30)
    row["tokens/s"] = 1e3 * n_tokens / row["ms"]
    row["limit ms"] = limit(bench, shape, mask, precision)
    row["estimate ms"] = estimated(bench, shape, mask, precision)
    row |= profile(bench, sae, shape, precision, implementation)
    return row


def estimated(bench: Bench, shape: tuple[int, int, int, int], mask: str, precision: str) -> float | None:
    """The time of a step that `posmask plan --gpu` assumes, in ms; None if it knows no rates of this card."""
    card = "H100" if bench.rehearsal else bench.results["machine"]["card"]
    known = [machine for name, machine in estimate.GPUS.items() if name in card.lower().replace(" ", "")]
    if not known:
        return None
    n_tokens, d_model, d_sae, k = shape
    live = d_sae // (8 if mask == "slice-8" else 1)
    parts = known[0].step_parts(d_model, d_sae, live, k, n_tokens, precision)
    return 1e3 * (sum(parts.values()) - parts["host"])  # The batches are on the device already.


def limit(bench: Bench, shape: tuple[int, int, int, int], mask: str, precision: str) -> float:
    """The time of a step of which each part runs at its ceiling, in ms."""
    n_tokens, d_model, d_sae, k = shape
    live = d_sae // (8 if mask == "slice-8" else 1)
    rates, width = bench.results["ceilings"], 2 if precision == "bfloat16" else 4
    product = 2e-9 * n_tokens * d_model * live / rates[precision]
    selection = 1e-6 * 2 * width * n_tokens * live / rates["copy"]
    rows = 1e-6 * 4 * 4 * n_tokens * k * d_model / rates["gather"]  # x . encoder, decoder, both gradients
    adam = 1e-6 * 2 * d_sae * d_model * 4 * 8 / rates["copy"]  # 4 tables read, 3 written, gradients written before
    return product + selection + rows + adam


def profile(
    bench: Bench, sae: SparseAutoencoder, shape: tuple[int, int, int, int], precision: str, implementation: str
) -> dict[str, object]:
    """Milliseconds of the parts of a step, the number of kernels, and how often the host waits."""
    n_tokens, d_model, *_ = shape
    n_steps = 1 if bench.rehearsal else 3

    def run() -> None:
        with backend.use(implementation), suppress(DegenerateResult):
            batches = repeated(bench, n_tokens, d_model, n_steps)
            train(sae, batches, settings_of(n_steps, n_tokens, precision), "profile")

    if bench.rehearsal:
        run()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    parts, n_kernels = dict.fromkeys([*PARTS, "other"], 0.0), 0
    for event in profiler.key_averages():
        name = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "other")
        parts[name] += event.self_device_time_total / 1e3 / n_steps
        n_kernels += event.count
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return {"parts ms": parts, "kernels": n_kernels / n_steps, "waits": len(waits) / n_steps}


def waiting(bench: Bench) -> None:
    """Share of the time that the GPU waits for batches from 16 shards, at the third shape."""
    n_tokens, d_model, d_sae, k = bench.shapes[min(2, len(bench.shapes) - 1)]
    n_steps = 2 if bench.rehearsal else 24
    with tempfile.TemporaryDirectory() as folder:
        activations = written(bench, Path(folder) / "vectors", n_tokens * n_steps, d_model)
        sae = sae_of(bench, d_model, d_sae, {"kind": "topk", "k": k}, MASKS["slice-8"], torch.float32)
        batches = training_batches(activations, n_tokens, n_steps, 0, device=bench.device)
        marks: list[float] = []
        with backend.use("triton") if bench.rehearsal else nullcontext(), suppress(DegenerateResult):
            train(sae, batches, settings_of(n_steps, n_tokens, "bfloat16"), "waiting", mark_of(marks))
    end_to_end = statistics.median(after - before for before, after in pairwise(marks))
    shape = [n_tokens, d_model, d_sae, k]
    alone = [
        row["ms"]
        for row in bench.results["steps"]
        if list(row["shape"]) == shape
        and (row["mask"], row["precision"], row["implementation"]) == ("slice-8", "bfloat16", "triton")
    ]
    bench.results["waiting"] = {
        "ms per step with batches from disk": 1e3 * end_to_end,
        "share of waiting": max(0.0, 1 - alone[0] / (1e3 * end_to_end)) if alone else None,
    }


def mark_of(marks: list[float]) -> Callable[[int], None]:
    return lambda done: marks.append(time.perf_counter())


def written(bench: Bench, folder: Path, n_tokens: int, d_model: int) -> Activations:
    """Random vectors in 16 shards, as `harvest` writes them."""
    from safetensors.torch import save_file

    with write_folder(folder, {"what": "benchmark"}) as draft:
        for number in range(16):
            n = -(-n_tokens // 16)
            vectors, position = vectors_of(bench, n, d_model, number)
            index = position.cpu()
            fields = {name: index.clone() for name in _FIELDS if name != "keep"}
            keep = torch.ones(n, dtype=torch.bool)
            save_file(
                {"vectors": vectors.bfloat16().cpu(), "keep": keep, **fields}, draft / f"{number:05d}.safetensors"
            )
    return Activations(folder)


def table(results: dict) -> str:
    """A line per step: its time, and its ratios to the limit, the estimate, the open mask and other packages."""
    names = ["ms", "low", "high", "of limit", "estimate/ms", "open/ms", *PEERS, "peak GB", "waits"]
    lines = [f"{'tokens x d_model x d_sae, k':<30}{'mask':<9}{'precision':<10}{'path':<8}" + "".join(map(_cell, names))]
    for row in results["steps"]:
        *sizes, k = row["shape"]
        shape = f"{' x '.join(f'{size:,}' for size in sizes)}, {k}"
        same = {name: row[name] for name in ("shape", "precision", "implementation")}
        unmasked = _found(results["steps"], mask="open", **same)
        ratios = {
            "of limit": row["limit ms"] / row["ms"],
            "estimate/ms": row["estimate ms"] and row["estimate ms"] / row["ms"],
            "open/ms": unmasked and unmasked["ms"] / row["ms"],
        }
        for name in PEERS:
            peer = _found(results["peers"], shape=row["shape"], peer=name)
            ratios[name] = peer and peer["ms"] / row["ms"]
        values = {**row, **ratios}
        lines.append(
            f"{shape:<30}{row['mask']:<9}{row['precision']:<10}{row['implementation']:<8}"
            + "".join(_cell(values.get(name)) for name in names)
        )
    return "\n".join([*lines, "A peer's column is its time / ms, of its step without a mask."])


def _found(rows: list[dict], **wanted: object) -> dict | None:
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def _cell(value: object) -> str:
    return f"{value:>13.2f}" if isinstance(value, float) else f"{'' if value is None else value!s:>13}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU in Triton's interpreter, tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="file of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which no further step is measured")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU: run with --rehearse, or on a machine that has one.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench, failed = Bench(options.rehearse, options.out, options.minutes), []
    with backend.use("triton") if options.rehearse else nullcontext():
        for part in (describe, ceilings, checks, steps, peers, harvests, waiting):
            started = time.perf_counter()
            try:
                part(bench)
            except Exception:
                failed.append(part.__name__)
                bench.leave_out(f"{part.__name__}: {traceback.format_exc()}")
            print(f"{part.__name__}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            bench.save()
    print(json.dumps({name: value for name, value in bench.results.items() if name != "steps"}, indent=1))
    print(table(bench.results))
    if failed:
        sys.exit(f"These parts failed: {', '.join(failed)}.")


if __name__ == "__main__":
    runtime.keep_freed_memory()
    main()
