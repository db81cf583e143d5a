"""How all timed scripts are asked for work and answer, and which vectors everyone trains on.

Each script is a process that does one thing through its own package's code, once for each line on standard input, and
answers with the CPU time it took. Training takes its batches from `on_demand`, and a step is the time from one batch
handed over until the next is asked for: one whole step, and nothing else. Between requests a process waits and costs
nothing, so several packages can be timed in turn in one run.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BATCH_TOKENS = 4096
N_POSITIONS = 128
K = 32
N_BATCHES = 4
HARVEST_CONTEXTS = 32
HARVEST_LAYER = 15


def sizes(shape: str) -> tuple[int, int]:
    """(d_model, d_sae) of "576x4608"."""
    d_model, d_sae = shape.split("x")
    return int(d_model), int(d_sae)


def use_threads(n_threads: int) -> None:
    torch.set_num_threads(n_threads)


def make_batches(d_model: int, n_tokens: int) -> list[Tensor]:
    """Sums of some 32 of 2 d_model directions, at a mean squared norm of d_model."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2 * d_model, d_model, generator=random))
    batches = []
    for _ in range(N_BATCHES):
        parts = []
        for _ in range(16):
            active = torch.rand(n_tokens // 16, 2 * d_model, generator=random) < 32 / (2 * d_model)
            parts.append((active * torch.rand(active.shape, generator=random)) @ directions)
        vectors = torch.cat(parts)
        batches.append(vectors * (d_model / vectors.square().sum(1).mean()).sqrt())
    return batches


def harvest_ids() -> Tensor:
    """Token ids to harvest from, [context position]; what they say does not change the time."""
    return torch.randint(0, 40_000, (HARVEST_CONTEXTS, N_POSITIONS), generator=torch.Generator().manual_seed(0))


def on_demand(d_model: int, n_tokens: int = BATCH_TOKENS) -> Iterator[Tensor]:
    """Batches, one for each line on standard input; ends the process when that ends."""
    vectors = make_batches(d_model, n_tokens)
    for number, _ in enumerate(requests()):
        yield vectors[number % N_BATCHES]
    os._exit(0)  # Training is not done, and nobody wants what it made.


def serve(work: Callable[[], dict | None]) -> None:
    """Do some work for each line on standard input; what it returns is added to the answer."""
    for more in requests():
        more.update(work() or {})


def requests() -> Iterator[dict]:
    """Yields for each line on standard input, and answers with the time until the next is asked for.

    What is put into the yielded dict is added to the answer.
    """
    _answer({"ready": True})
    for _ in sys.stdin:
        more: dict = {}
        started, wall = time.process_time(), time.perf_counter()
        yield more
        cpu, wall = time.process_time() - started, time.perf_counter() - wall
        times = {"cpu_ms": 1000 * cpu, "wall_ms": 1000 * wall}
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        _answer({**times, "peak_mb": peak_mb, **more})


def _answer(line: dict) -> None:
    print(json.dumps(line), file=sys.__stdout__, flush=True)
