"""The terms of `quality_sae_lens.py` and `quality_dictionary_learning.py`, and what both do alike.

Everyone trains on the same vectors in the same batches and is measured on the same held-out vectors. The file of
vectors holds `train` [row, d_in] and `heldout` [row, d_in] float32, centered and scaled to a mean squared norm of d_in,
and `batches` [step, row number] int32: the rows of `train` of each batch in order.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

D_SAE = 1152
STEPS = 600
K = 32
PREFIXES = (D_SAE // 16, D_SAE // 8, D_SAE // 4, D_SAE // 2, D_SAE)  # Matryoshka: widths that must stand alone.
BETAS = (0.9, 0.999)
# Both peers' windows are made for runs of 10^8 tokens and more (10^7 tokens, 1000 steps): here no latent would ever
# count as dead. A sixth of the run leaves the auxiliary losses time to act.
DEAD_AFTER_TOKENS = 200_000

LEARNING_RATES = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
WITH_K = ("topk", "batchtopk", "matryoshka_batchtopk")
WITH_COEFFICIENT = ("standard", "jumprelu", "gated")


def warm_up_steps(steps: int) -> int:
    """The first 5 %: of the learning rate from 0."""
    return steps // 20


def decay_steps(steps: int) -> int:
    """The last 30 %: of the learning rate to 0."""
    return 3 * steps // 10


@dataclass(frozen=True)
class Run:
    """One training. `coefficient` weighs the sparsity loss; None where k sets the sparsity."""

    architecture: str
    learning_rate: float
    coefficient: float | None
    k: int | None
    seed: int
    steps: int = STEPS


@dataclass(frozen=True)
class Vectors:
    train: Tensor
    heldout: Tensor
    rows: Tensor

    @property
    def d_in(self) -> int:
        return self.train.shape[1]

    @property
    def batch_tokens(self) -> int:
        return self.rows.shape[1]

    def batches(self, steps: int) -> Iterator[Tensor]:
        for rows in self.rows[:steps]:
            yield self.train[rows]


@dataclass(frozen=True)
class Trained:
    """What a peer's training gave: its own inference, and the seconds it took."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    seconds: float


def read_vectors(path: Path) -> Vectors:
    tensors = load_file(path)
    return Vectors(tensors["train"], tensors["heldout"], tensors["batches"])


@torch.no_grad()
def measure(trained: Trained, heldout: Tensor) -> dict[str, float]:
    """Explained variance, mean active latents and the share of latents never active, over all held-out vectors."""
    mean = heldout.mean(0)
    error = variance = active = 0.0
    ever = torch.zeros(D_SAE, dtype=torch.bool)
    for x in heldout.split(4096):
        latents = trained.encode(x)
        error += float((trained.decode(latents) - x).double().square().sum())
        variance += float((x - mean).double().square().sum())
        on = latents != 0
        active += float(on.sum())
        ever |= on.any(0)
    return {
        "explained_variance": round(1 - error / variance, 5),
        "l0": round(active / len(heldout), 3),
        "never_active": round(1 - float(ever.double().mean()), 5),
    }


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def perform(
    run: Run, peer: str, version: str, train: Callable[[Run, Vectors], Trained], vectors: Vectors, results: Path
) -> dict:
    """Train, measure and append the line; the line already there, if there is one."""
    head = {"peer": peer, "version": version, "batch_tokens": vectors.batch_tokens, "d_sae": D_SAE, **asdict(run)}
    for line in read_lines(results):
        if head.items() <= line.items():
            return line
    trained = train(run, vectors)
    line = {**head, **measure(trained, vectors.heldout), "seconds": round(trained.seconds, 2)}
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return line


def best(lines: list[dict], architecture: str, steps: int) -> Run:
    """The run to repeat with further seeds: the better learning rate, each at the coefficient with L0 nearest to K."""
    nearest: dict[float, dict] = {}
    for line in lines:
        if (line["architecture"], line["steps"], line["seed"]) == (architecture, steps, SEEDS[0]):
            other = nearest.setdefault(line["learning_rate"], line)
            if abs(line["l0"] - K) < abs(other["l0"] - K):
                nearest[line["learning_rate"]] = line
    chosen = max(nearest.values(), key=lambda line: line["explained_variance"])
    return Run(**{name: chosen[name] for name in Run.__dataclass_fields__})


def perform_all(
    peer: str, version: str, train: Callable[[Run, Vectors], Trained], coefficients: dict[str, dict[float, tuple]]
) -> None:
    """The command line of both peers: VECTORS.safetensors RESULTS.jsonl [STEPS].

    Args:
        coefficients: those to train with, of each architecture without k and each learning rate.
    """
    torch.set_num_threads(1)
    vectors, results = read_vectors(Path(sys.argv[1])), Path(sys.argv[2])
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else STEPS
    for learning_rate in LEARNING_RATES:
        for architecture in WITH_K:
            run = Run(architecture, learning_rate, None, K, SEEDS[0], steps)
            perform(run, peer, version, train, vectors, results)
        for architecture in WITH_COEFFICIENT:
            for coefficient in coefficients[architecture].get(learning_rate, ()):
                run = Run(architecture, learning_rate, coefficient, None, SEEDS[0], steps)
                perform(run, peer, version, train, vectors, results)
    for seed in SEEDS[1:]:
        for architecture in (*WITH_K, *WITH_COEFFICIENT):
            chosen = asdict(best(read_lines(results), architecture, steps))
            perform(Run(**{**chosen, "seed": seed}), peer, version, train, vectors, results)
