"""What a training step takes and computes on a CUDA GPU, in at most 8 minutes and without network: `make gpu-bench`.

Parts run in this order, and the file is written after each, so an interruption loses only what follows:

    ceilings   rates of copies and of products in bfloat16, TF32 and float32, and of gathers from the L2 cache
    checks     every kernel against float64 with poisoned outputs; the training step against its definition; the loss of
               12 steps against that of torch operations; two trainings that must be equal bit for bit
    steps      time of a training step by shape, mask and precision, what it consists of, its host waits and memory
    waiting    share of the time that the GPU waits for batches from shards on disk

`--rehearse` runs all of it on the CPU in Triton's interpreter, at tiny shapes: its times mean nothing. Peers and the
harvest are not part of it yet.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from posmask.data.activations import Activations, Batch, training_batches
from posmask.errors import DegenerateResult
from posmask.kernels import backend, runtime
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.storage.manifest import write_folder
from posmask.training import fast_loss
from posmask.training.loop import train
from posmask.training.reference_loss import plain_gradients
from posmask.training.settings import TrainingSettings

N_POSITIONS = 128
MASKS = {"open": {"kind": "open"}, "slice-8": {"kind": "slice", "n_slices": 8}}
SHAPES = [  # tokens per batch, d_model, d_sae, k
    (4096, 576, 16384, 32),
    (4096, 2304, 16384, 32),
    (4096, 2304, 65536, 32),
    (4096, 2304, 65536, 64),
    (4096, 4096, 65536, 32),
    (16384, 2304, 65536, 32),
]
TINY = [(8, 16, 64, 4)]
PARTS = {  # of a step, by what the names of its kernels contain
    "selection": ("choose_rows", "cut_rows", "above_rows"),
    "explain": ("_explain_rows", "_dot_rows"),
    "sums": ("_sum_",),
    "adam": ("_adam_rows",),
    "products": ("gemm", "nvjet", "cutlass"),
    "sorting": ("sort", "Sort", "radix"),
}


class Bench:
    """The device, its shapes, and the results so far."""

    def __init__(self, rehearsal: bool, out: Path, minutes: float) -> None:
        self.rehearsal = rehearsal
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self.shapes = TINY if rehearsal else SHAPES
        self.ends = time.monotonic() + 60 * minutes
        self.results: dict = {"rehearsal": rehearsal, "steps": []}
        self._out = out

    def save(self) -> None:
        self._out.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf8")

    def milliseconds(self, work: Callable[[], object], repeats: int = 30) -> float:
        """Median time of a piece of work on the device, after three runs to warm up."""
        times = []
        for number in range(1 if self.rehearsal else repeats + 3):
            with self.timed(times if self.rehearsal or number > 2 else []):
                work()
        return statistics.median(times)

    def timed(self, times: list[float]) -> "_Timed":
        return _Timed(times, self.rehearsal)


class _Timed:
    """Appends the milliseconds that the device takes for the body."""

    def __init__(self, times: list[float], rehearsal: bool) -> None:
        self._times = times
        self._events = None if rehearsal else [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        if self._events:
            self._events[0].record()

    def __exit__(self, *error: object) -> None:
        if self._events:
            self._events[1].record()
            self._events[1].synchronize()
            self._times.append(self._events[0].elapsed_time(self._events[1]))
        else:
            self._times.append(1e3 * (time.perf_counter() - self._started))


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


def sae_of(bench: Bench, d_model: int, d_sae: int, rule: dict, mask: dict, dtype: torch.dtype) -> SparseAutoencoder:
    made = make_mask(mask_settings(mask), N_POSITIONS, d_sae, 0)
    return SparseAutoencoder(d_model, rule_settings(rule), made, 0).to(bench.device, dtype)


def vectors_of(bench: Bench, n_tokens: int, d_model: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n_tokens, d_model, generator=random)
    position = torch.randint(1, N_POSITIONS, (n_tokens,), generator=random).sort().values.int()
    return vectors.to(bench.device), position.to(bench.device)


def repeated(bench: Bench, n_tokens: int, d_model: int, n_batches: int) -> Iterator[Batch]:
    """Batches on the device, so that only the step takes time."""
    batches = []
    for seed in range(min(4, n_batches)):
        vectors, position = vectors_of(bench, n_tokens, d_model, seed)
        keep = torch.ones_like(position, dtype=torch.bool)
        batches.append(Batch(vectors, position, position, position, keep, position, position, position, position))
    return (batches[number % len(batches)] for number in range(n_batches))


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
        losses.append(step.reconstruction)
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
                    if time.monotonic() > bench.ends:
                        bench.results["left out"] = f"from {shape} {mask} {precision} {implementation} on"
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
    marks: list = []

    def mark(done: int) -> None:
        if not bench.rehearsal:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    if not bench.rehearsal:
        torch.cuda.reset_peak_memory_stats()
    batches = repeated(bench, n_tokens, d_model, n_steps)
    with backend.use(implementation), suppress(DegenerateResult):
        train(sae, batches, settings_of(n_steps, n_tokens, precision), "step", mark)
    if bench.rehearsal:
        times = [1e3 * (after - before) for before, after in pairwise(marks)]
    else:
        torch.cuda.synchronize()
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        times = [before.elapsed_time(after) for before, after in pairwise(marks)][-30:]
    row["ms"] = statistics.median(times)
    row["low"], row["high"] = min(times), max(times)
    row["tokens/s"] = 1e3 * n_tokens / statistics.median(times)
    row["limit ms"] = limit(bench, shape, mask, precision)
    row |= profile(bench, sae, shape, precision, implementation)
    return row


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
            fields = {name: index.clone() for name in ("position", "token_id", "text", "sentence", "line", "end")}
            keep = torch.ones(n, dtype=torch.bool)
            save_file(
                {"vectors": vectors.bfloat16().cpu(), "keep": keep, **fields}, draft / f"{number:05d}.safetensors"
            )
    return Activations(folder)


def table(results: dict) -> str:
    lines = [f"{'tokens x d_model x d_sae, k':<32}{'mask':<9}{'precision':<10}{'path':<8}{'ms':>8}{'of limit':>10}"]
    for row in results["steps"]:
        *sizes, k = row["shape"]
        name = f"{' x '.join(f'{size:,}' for size in sizes)}, {k}"
        share = row["limit ms"] / row["ms"]
        lines.append(
            f"{name:<32}{row['mask']:<9}{row['precision']:<10}{row['implementation']:<8}{row['ms']:>8.2f}{share:>10.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU in Triton's interpreter, tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="file of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which no further step is measured")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU: run with --rehearse, or on a machine that has one.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.rehearse, options.out, options.minutes)
    with backend.use("triton") if options.rehearse else nullcontext():
        for part in (describe, ceilings, checks, steps, waiting):
            started = time.perf_counter()
            part(bench)
            print(f"{part.__name__}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            bench.save()
    print(json.dumps({name: value for name, value in bench.results.items() if name != "steps"}, indent=1))
    print(table(bench.results))


if __name__ == "__main__":
    runtime.keep_freed_memory()
    main()
