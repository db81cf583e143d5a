"""sae-bench's own probing: `saebench_probing.py ACTIVATIONS.npz D_SAE`, in its environment (saebench.txt).

For each request one pass over all k, on one thread; see steps_terms.py. Synthetic pooled activations of 5 classes, 2000
training and 500 test texts each, about 8 % non-zero; written to the file if it is not there, so that others can be
timed on the same: arrays `train` and `test`, [class text latent]. It takes 0.2 GB at 4608 latents, 0.8 GB at 16384.
"""

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

os.environ["JAXTYPING_DISABLE"] = "1"  # sae-bench's annotations fail the checks of newer jaxtyping.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
from steps_terms import serve

KS = (1, 2, 5, 10, 20, 50)
N_CLASSES, N_TRAIN, N_TEST = 5, 2000, 500


def make_activations(path: Path, d_sae: int) -> None:
    """One latent in a hundred fires more often and stronger in one class, each up to four times."""
    random = np.random.default_rng(0)
    rate = (0.16 * random.random(d_sae)).astype(np.float32)
    degree = np.where(random.random(d_sae) < 0.01, 3 * random.random(d_sae), 0).astype(np.float32)
    favorite = random.integers(N_CLASSES, size=d_sae)
    sides = {}
    for side, n_texts in (("train", N_TRAIN), ("test", N_TEST)):
        sides[side] = np.zeros((N_CLASSES, n_texts, d_sae), np.float32)
        for number in range(N_CLASSES):
            more = 1 + degree * (favorite == number)
            fires = random.random((n_texts, d_sae), dtype=np.float32) < rate * more
            value = random.random((n_texts, d_sae), dtype=np.float32)
            sides[side][number] = fires * value * value * more
    np.savez(path, **sides)


def main(path: Path, d_sae: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not path.exists():
        make_activations(path, d_sae)
    with np.load(path) as sides:
        train, test = (
            {str(number): torch.from_numpy(part) for number, part in enumerate(sides[side])}
            for side in ("train", "test")
        )
    assert train["0"].shape == (N_TRAIN, d_sae), f"{path} holds {tuple(train['0'].shape)}"

    def probe() -> dict:
        torch.manual_seed(42)
        by_k = []
        for k in KS:
            with contextlib.redirect_stdout(io.StringIO()):
                _, accuracies = train_probe_on_activations(train, test, select_top_k=k)
            by_k.append(float(np.mean(list(accuracies.values()))))
        return {"accuracy": float(np.mean(by_k))}

    serve(probe)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
