"""SAELens's training, step by step: `steps_sae_lens.py WORK SHAPE THREADS [tuned]`, in its environment (sae_lens.txt).

Its own SAETrainer on its own training classes, all at their defaults. `tuned` adds what a user can: bfloat16 autocast.
"""

import os
import sys
import warnings
from collections.abc import Iterator

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = sys.argv[3]
os.environ["TQDM_DISABLE"] = "1"

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from steps_terms import BATCH_TOKENS, K, on_demand, sizes, use_threads
from torch import Tensor


def untrained(work: str, d_in: int, d_sae: int, k: int = K):
    shape = {"d_in": d_in, "d_sae": d_sae}
    widths = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    match work:
        case "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=k))
        case "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=k))
        case "matryoshka":
            config = MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=k, matryoshka_widths=widths)
            return MatryoshkaBatchTopKTrainingSAE(config)
        case "relu-l1":
            return StandardTrainingSAE(StandardTrainingSAEConfig(**shape))
        case "jumprelu":
            return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape))
        case "gated":
            return GatedTrainingSAE(GatedTrainingSAEConfig(**shape))
    raise ValueError(work)


def fit(
    sae, batches: Iterator[Tensor], n_tokens: int = BATCH_TOKENS, *, tuned: bool, device: torch.device | str = "cpu"
) -> None:
    """Train on batches of `n_tokens` vectors."""
    config = SAETrainerConfig(
        total_training_samples=10_000 * n_tokens,
        train_batch_size_samples=n_tokens,
        lr=1e-3,
        lr_end=1e-4,
        autocast=tuned,
        device=str(device),
    )
    SAETrainer(config, sae, batches).fit()


def main(work: str, shape: str, n_threads: int, tuned: bool) -> None:
    warnings.simplefilter("ignore")
    use_threads(n_threads)
    d_in, d_sae = sizes(shape)
    fit(untrained(work, d_in, d_sae), on_demand(d_in), tuned=tuned)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), "tuned" in sys.argv[4:])
