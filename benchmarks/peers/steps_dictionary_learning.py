"""dictionary-learning's training, step by step: `steps_dictionary_learning.py WORK SHAPE THREADS`.

In its environment (dictionary_learning.txt). Each step is its trainers' own `update`, what is not given its default.
"""

import os
import sys
import warnings

os.environ["OMP_NUM_THREADS"] = sys.argv[3]

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from steps_terms import K, on_demand, sizes, use_threads


def untrained(work: str, d_in: int, d_sae: int):
    common = {
        "steps": 10_000,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": 0,
        "lm_name": "none",
        "lr": 1e-3,
        "seed": 0,
        "device": "cpu",
    }
    match work:
        case "topk":
            return TopKTrainer(**common, k=K)
        case "batchtopk":
            return BatchTopKTrainer(**common, k=K)
        case "matryoshka":
            fractions = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
            return MatryoshkaBatchTopKTrainer(**common, k=K, group_fractions=fractions)
        case "relu-l1":
            return StandardTrainer(**common)
        case "jumprelu":
            return JumpReluTrainer(**common)
        case "gated":
            return GatedSAETrainer(**common)
    raise ValueError(work)


def main(work: str, shape: str, n_threads: int) -> None:
    warnings.simplefilter("ignore")
    use_threads(n_threads)
    d_in, d_sae = sizes(shape)
    trainer = untrained(work, d_in, d_sae)
    for step, vectors in enumerate(on_demand(d_in)):
        trainer.update(step, vectors)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
