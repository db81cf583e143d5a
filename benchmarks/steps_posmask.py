"""posmask's training, step by step: `steps_posmask.py WORK SHAPE THREADS`; see peers/steps_terms.py.

The loop of `posmask.training` as a study runs it: clipping, dead-latent counting and revival, unit-norm decoder rows.
"""

import os
import sys

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = sys.argv[3]

import torch
from steps_terms import BATCH_TOKENS, N_POSITIONS, K, on_demand, sizes, use_threads

from posmask.data.activations import Batch
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

OPEN = {"kind": "open"}
TOPK = {"kind": "topk", "k": K}
# What each work trains: (rule, mask, precision of the products).
WORKS = {
    "topk-float32": (TOPK, OPEN, "float32"),
    "topk-bf16-select": (TOPK, OPEN, "bfloat16"),
    "mask-slice": (TOPK, {"kind": "slice", "n_slices": 8}, "float32"),
    "mask-cohort": (TOPK, {"kind": "cohort", "n_cohorts": 8, "positions_per_latent": 16}, "float32"),
    "mask-contiguous": (TOPK, {"kind": "hard", "positions_per_latent": 16, "contiguous": True}, "float32"),
    "mask-hard": (TOPK, {"kind": "hard", "positions_per_latent": 16}, "float32"),
    "batchtopk": ({"kind": "batchtopk", "k": K}, OPEN, "float32"),
    "matryoshka": ({"kind": "matryoshka", "k": K}, OPEN, "float32"),
    "jumprelu": ({"kind": "jumprelu", "l0_coefficient": 1.0}, OPEN, "float32"),
    "gated": ({"kind": "gated", "l1_coefficient": 1.0}, OPEN, "float32"),
    "relu-l1-float32": ({"kind": "relu", "l1_coefficient": 1.0}, OPEN, "float32"),
    "relu-l1-bf16": ({"kind": "relu", "l1_coefficient": 1.0}, OPEN, "bfloat16"),
}


def terms_of(work: str) -> tuple[dict, dict, str, int]:
    """(rule, mask, precision, tokens a batch); "topk-float32@1024" has other batches, "mask-hard-8" other masks."""
    name, _, n_tokens = work.partition("@")
    if name not in WORKS:
        name, _, positions = name.rpartition("-")
        rule, mask, precision = WORKS[name]
        return rule, {**mask, "positions_per_latent": int(positions)}, precision, BATCH_TOKENS
    return *WORKS[name], int(n_tokens or BATCH_TOKENS)


def batches(d_model: int, n_tokens: int):
    """Tokens at random positions but that of BOS, ordered by position as `training_batches` does."""
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, N_POSITIONS, (n_tokens,), generator=random).sort().values.int() for _ in range(16)]
    keep = torch.ones(n_tokens, dtype=torch.bool)
    for number, vectors in enumerate(on_demand(d_model, n_tokens)):
        position = drawn[number % len(drawn)]
        fields = (position, position, position, keep, position, position, position, position)
        yield Batch(vectors, *fields)


def main(work: str, shape: str, n_threads: int) -> None:
    use_threads(n_threads)
    rule, mask, precision, n_tokens = terms_of(work)
    d_model, d_sae = sizes(shape)
    sae = SparseAutoencoder(d_model, rule_settings(rule), make_mask(mask_settings(mask), N_POSITIONS, d_sae))
    settings = TrainingSettings(n_steps=10_000, batch_tokens=n_tokens, learning_rate=1e-3, precision=precision)
    train(sae, batches(d_model, n_tokens), settings, work)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
