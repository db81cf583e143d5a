"""posmask's k-sparse probing on the activations of peers/saebench_probing.py: `probing_posmask.py ACTIVATIONS.npz`.

For each request one pass over all k, on one thread; see peers/steps_terms.py. The pooled rows are made beforehand, as
they are there in memory for sae-bench too.
"""

import os
import sys

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

import numpy as np
import torch
from steps_terms import serve

from posmask.probing import datasets
from posmask.probing.pooling import PooledTexts
from posmask.probing.probes import k_sparse_correct
from posmask.seeds import generator

KS = (1, 2, 5, 10, 20, 50)


def read(path: str) -> tuple[PooledTexts, datasets.ProbeDataset]:
    with np.load(path) as sides:
        parts = [(side, torch.from_numpy(rows)) for side in ("train", "test") for rows in sides[side]]
    n_classes = len(parts) // 2
    features = PooledTexts(sum(len(rows) for _, rows in parts), parts[0][1].shape[1])
    labels, train, first = [], [], 0
    for number, (side, rows) in enumerate(parts):
        for chunk in range(0, len(rows), 100):
            some = rows[chunk : chunk + 100]
            features.add(torch.arange(first, first + len(some)), some)
            first += len(some)
        labels += [number % n_classes] * len(rows)
        train += [side == "train"] * len(rows)
    features.n_tokens += 1
    names = tuple(map(str, range(n_classes)))
    dataset = datasets.ProbeDataset("toy", names, ("",) * len(labels), torch.tensor(labels), torch.tensor(train))
    return features, dataset


def main(path: str) -> None:
    torch.set_num_threads(1)
    features, dataset = read(path)
    kept = torch.ones(features.n_texts).bool()

    def probe() -> dict:
        tasks = [datasets._task(dataset, kept, number, generator(number, "probe")) for number in range(5)]
        right = k_sparse_correct(features, tasks, KS)
        accuracy = [np.mean([part.double().mean() for part in parts]) for parts in right.values()]
        return {"accuracy": float(np.mean(accuracy))}

    serve(probe)


if __name__ == "__main__":
    main(sys.argv[1])
