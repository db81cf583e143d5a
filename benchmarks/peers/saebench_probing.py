"""What sae-bench's own probing costs: `saebench_probing.py ACTIVATIONS.npz D_SAE`, in its environment (saebench.txt).

Synthetic pooled activations of 5 classes, 2000 training and 500 test texts each, about 8 % non-zero; written to the
file if it is not there, so that others can be timed on the same: arrays `train` and `test`, [class text latent].
One thread, process CPU seconds. The file takes 0.2 GB at 4608 latents, 0.8 GB at 16384.
"""

import contextlib
import io
import json
import os
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["JAXTYPING_DISABLE"] = "1"  # sae-bench's annotations fail the checks of newer jaxtyping.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

KS = (1, 2, 5, 10, 20, 50)
N_CLASSES, N_TRAIN, N_TEST = 5, 2000, 500


def make_activations(path: Path, d_sae: int) -> None:
    """One latent in a hundred fires more often and stronger in one class, each up to four times."""
    random = np.random.default_rng(0)
    rate = (0.16 * random.random(d_sae)).astype(np.float32)
    degree = np.where(random.random(d_sae) < 0.01, 3 * random.random(d_sae), 0).astype(np.float32)
    favourite = random.integers(N_CLASSES, size=d_sae)
    sides = {}
    for side, n_texts in (("train", N_TRAIN), ("test", N_TEST)):
        sides[side] = np.zeros((N_CLASSES, n_texts, d_sae), np.float32)
        for number in range(N_CLASSES):
            more = 1 + degree * (favourite == number)
            fires = random.random((n_texts, d_sae), dtype=np.float32) < rate * more
            value = random.random((n_texts, d_sae), dtype=np.float32)
            sides[side][number] = fires * value * value * more
    np.savez(path, **sides)


def timed(train, test, **options):
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        _, accuracies = train_probe_on_activations(train, test, **options)
    return time.process_time() - started, float(np.mean(list(accuracies.values())))


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
    share = float(np.mean([(part > 0).float().mean() for part in train.values()]))
    torch.manual_seed(42)
    by_k = {k: timed(train, test, select_top_k=k) for k in KS}
    # The options with which its evaluation calls it.
    whole = timed(train, test, select_top_k=None, use_sklearn=False, batch_size=250, epochs=100, lr=1e-2)
    print(
        json.dumps(
            {
                "d_sae": d_sae,
                "non_zero_share": round(share, 4),
                "cpu_seconds": {k: round(seconds, 3) for k, (seconds, _) in by_k.items()},
                "cpu_seconds_all_k": round(sum(seconds for seconds, _ in by_k.values()), 2),
                "cpu_seconds_all_latents": round(whole[0], 2),
                "accuracy": {k: round(accuracy, 4) for k, (_, accuracy) in by_k.items()},
                "accuracy_mean_over_k": round(float(np.mean([accuracy for _, accuracy in by_k.values()])), 4),
                "accuracy_all_latents": round(whole[1], 4),
                "versions": {name: version(name) for name in ("sae-bench", "torch", "scikit-learn", "numpy")},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
