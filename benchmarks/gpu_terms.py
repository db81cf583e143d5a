"""The device of the GPU benchmark, its shapes, vectors and clocks; see gpu.py."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch

from posmask.data.activations import Batch
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings

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


class Bench:
    """The device, its shapes, and the results so far."""

    def __init__(self, rehearsal: bool, out: Path, minutes: float) -> None:
        self.rehearsal = rehearsal
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self.shapes = TINY if rehearsal else SHAPES
        self.results: dict = {"rehearsal": rehearsal, "steps": [], "peers": [], "left out": []}
        self._out, self._started, self._seconds = out, time.monotonic(), 60 * minutes

    def save(self) -> None:
        self._out.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf8")

    def is_late(self, share: float) -> bool:
        """Whether this share of the allowed time is over."""
        return time.monotonic() > self._started + share * self._seconds

    def leave_out(self, what: str) -> None:
        """Report something that is not measured."""
        self.results["left out"].append(what)
        print(f"left out: {what}", file=sys.stderr, flush=True)

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


class Marks:
    """Notes the time at each call, on the device."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._marks: list = []
        if not bench.rehearsal:
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, *_: object) -> None:
        if self._bench.rehearsal:
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()

    def milliseconds(self, most: int) -> list[float]:
        """The times between the last calls, at most `most`."""
        if self._bench.rehearsal:
            times = [1e3 * (after - before) for before, after in pairwise(self._marks)]
        else:
            torch.cuda.synchronize()
            times = [before.elapsed_time(after) for before, after in pairwise(self._marks)]
        return times[-most:]

    def row(self, most: int) -> dict[str, float]:
        """Median, least and largest of these times, and the peak of the device's memory since the beginning."""
        times = self.milliseconds(most)
        row = {"ms": statistics.median(times), "low": min(times), "high": max(times)}
        return row if self._bench.rehearsal else row | {"peak GB": torch.cuda.max_memory_allocated() / 1e9}


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
