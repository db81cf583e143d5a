"""posmask's activation rules beside the peers' on the same vectors, batches, width, steps and optimizer.

    quality.py export STUDY_FOLDER VECTORS.safetensors      vectors of a study's harvest, as all take them
    quality.py train VECTORS.safetensors RESULTS.jsonl      posmask's own runs; the peers' are in peers/
    quality.py table RESULTS.jsonl ...                      the table of docs/quality.md

The terms are those of peers/quality_terms.py.
"""

import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from quality_terms import (
    D_SAE,
    DEAD_AFTER_TOKENS,
    PREFIXES,
    SEEDS,
    STEPS,
    WITH_COEFFICIENT,
    WITH_K,
    K,
    Run,
    Trained,
    Vectors,
    decay_steps,
    perform_all,
    read_lines,
    warm_up_steps,
)

from posmask.data.activations import Activations, Batch, evaluation_batches
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.training.loop import train as train_sae
from posmask.training.settings import TrainingSettings

BATCH_TOKENS = 2048
# Of the L1 or L0 loss, so that the held-out L0 lies below and above 32.
COEFFICIENTS = {
    "standard": {3e-3: (2.0, 2.2)},
    "jumprelu": {3e-3: (0.6, 0.75)},
    "gated": {3e-3: (3.0, 3.8)},
}
RULES = {
    "standard": ("relu", "l1_coefficient"),
    "jumprelu": ("jumprelu", "l0_coefficient"),
    "gated": ("gated", "l1_coefficient"),
}


def export(root: Path, path: Path) -> None:
    """Kept vectors of the study's training and held-out texts, centered and scaled, and 600 batches of their rows."""
    train, heldout = (
        Activations(next((root / "activations").glob(f"{name}-*"))) for name in ("training", "evaluation")
    )
    center, scale = train.center_and_scale
    train, heldout = (
        torch.cat([(batch.kept().vectors.float() - center) / scale for batch in evaluation_batches(some)])
        for some in (train, heldout)
    )
    random, rows = torch.Generator().manual_seed(0), []
    while len(rows) < STEPS:
        epoch = torch.randperm(len(train), generator=random).to(torch.int32)
        rows += epoch.split(BATCH_TOKENS)[: len(train) // BATCH_TOKENS]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"train": train, "heldout": heldout, "batches": torch.stack(rows[:STEPS])}, path)


def rule_of(run: Run) -> dict:
    if run.architecture == "matryoshka_batchtopk":
        return {"kind": "matryoshka", "k": run.k, "parts": tuple(width / D_SAE for width in PREFIXES)}
    if run.architecture in WITH_K:
        return {"kind": run.architecture, "k": run.k}
    kind, coefficient = RULES[run.architecture]
    return {"kind": kind, coefficient: run.coefficient}


def train(run: Run, vectors: Vectors) -> Trained:
    mask = make_mask(mask_settings({"kind": "open"}), 2, D_SAE)
    sae = SparseAutoencoder(vectors.d_in, rule_settings(rule_of(run)), mask, run.seed)
    settings = TrainingSettings(
        n_steps=run.steps,
        batch_tokens=vectors.batch_tokens,
        learning_rate=run.learning_rate,
        warmup_fraction=warm_up_steps(run.steps) / run.steps,
        decay_fraction=decay_steps(run.steps) / run.steps,
        dead_after_eligible_tokens=DEAD_AFTER_TOKENS,
    )

    def batches():
        place = torch.ones(vectors.batch_tokens, dtype=torch.int32)
        for x in vectors.batches(run.steps):
            yield Batch(x, place, place, place, place > 0, place, place, place, place)

    trained = train_sae(sae, batches(), settings, run.architecture)
    one = torch.ones((), dtype=torch.int32)
    return Trained(lambda x: sae.sparse_encode(x, one.expand(len(x))).dense(), sae.decode, trained.seconds)


def at_k(lines: list[dict]) -> tuple[float, float]:
    """(explained variance, L0) where L0 is K, between the two coefficients around it; the nearest if none are."""
    points = sorted((line["l0"], line["explained_variance"]) for line in lines)
    if lines[0]["k"] is None and points[0][0] <= K <= points[-1][0]:
        return float(np.interp(K, *zip(*points, strict=True))), K
    l0, explained = min(points, key=lambda point: abs(point[0] - K))
    return explained, l0


def table(paths: list[Path]) -> None:
    """A line an architecture, seed 0 at each one's better learning rate: explained variance at L0 = K."""
    runs = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for line in read_lines(path):
            if line["seed"] == SEEDS[0] and line["steps"] == STEPS:
                runs[line["peer"], line["architecture"]][line["learning_rate"]].append(line)
    peers = list(dict.fromkeys(peer for peer, _ in runs))
    print("| rule | " + " | ".join(peers) + " |")
    print("|---" * (1 + len(peers)) + "|")
    for architecture in (*WITH_K, *WITH_COEFFICIENT):
        cells = []
        for peer in peers:
            explained, l0 = max(at_k(lines) for lines in runs[peer, architecture].values())
            cells.append(f"{explained:.4f}" + ("" if abs(l0 - K) < 0.5 else f" at L0 {l0:.1f}"))
        print(f"| {architecture} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["export", root, path]:
            export(Path(root), Path(path))
        case ["train", *rest]:
            sys.argv[1:] = rest
            perform_all("posmask", version("posmask"), train, COEFFICIENTS)
        case ["table", *paths]:
            table([Path(path) for path in paths])
        case _:
            sys.exit(__doc__)
