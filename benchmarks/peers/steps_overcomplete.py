"""overcomplete's training, step by step: `steps_overcomplete.py WORK SHAPE THREADS`, in its environment.

The environment: overcomplete.txt. Its own `train_sae` with its gradient clipping and dead-code tracking, mean squared
error as its losses take it, torch's Adam at its defaults, and a dictionary of unit-norm rows.
"""

import os
import sys
import warnings
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = sys.argv[3]
# Only its image models use torchvision, which comes built for CUDA and cannot be imported beside a CPU build of torch.
sys.modules["torchvision"] = SimpleNamespace(transforms=None)

import torch  # noqa: E402
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE, mse_l1, train_sae  # noqa: E402
from steps_terms import BATCH_TOKENS, K, on_demand, sizes, use_threads  # noqa: E402


def untrained(work: str, d_in: int, d_sae: int):
    unit = {"normalization": "l2"}
    match work:
        case "topk":
            return TopKSAE(d_in, d_sae, top_k=K, dictionary_params=unit)
        case "batchtopk":
            return BatchTopKSAE(d_in, d_sae, top_k=K * BATCH_TOKENS, dictionary_params=unit)
        case "relu-l1":
            return SAE(d_in, d_sae, dictionary_params=unit)
        case "jumprelu":
            return JumpSAE(d_in, d_sae, dictionary_params=unit)
    raise ValueError(work)


def loss(x, x_hat, pre_codes, codes, dictionary):
    return (x - x_hat).square().mean()


def main(work: str, shape: str, n_threads: int) -> None:
    warnings.simplefilter("ignore")
    use_threads(n_threads)
    d_in, d_sae = sizes(shape)
    sae = untrained(work, d_in, d_sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    criterion = mse_l1 if work == "relu-l1" else loss
    train_sae(sae, on_demand(d_in), criterion, optimizer, nb_epochs=1, monitoring=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
