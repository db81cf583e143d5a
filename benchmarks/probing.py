"""What posmask's k-sparse probing costs, on the activations of peers/saebench_probing.py: `probing.py ACTIVATIONS.npz`.

One thread, process CPU seconds, kernels compiled beforehand. The pooled rows are made before the clock starts, as they
are there in memory for sae-bench too.
"""

import json
import sys
import time

import numpy as np
import torch

from posmask.probing import topics
from posmask.probing.pooling import PooledTexts
from posmask.probing.sparse import k_sparse_correct
from posmask.seeds import generator

KS = (1, 2, 5, 10, 20, 50)


def read(path: str) -> tuple[PooledTexts, topics.ProbeDataset]:
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
    dataset = topics.ProbeDataset("toy", names, ("",) * len(labels), torch.tensor(labels), torch.tensor(train))
    return features, dataset


def main(path: str) -> None:
    torch.set_num_threads(1)
    features, dataset = read(path)
    kept = torch.ones(features.n_texts).bool()
    seconds = []
    for _ in range(4):
        started = time.process_time()
        tasks = [topics._task(dataset, kept, number, generator(number, "probe")) for number in range(5)]
        right = k_sparse_correct(features, tasks, KS)
        seconds.append(time.process_time() - started)
    accuracy = {k: float(np.mean([part.double().mean() for part in parts])) for k, parts in right.items()}
    print(
        json.dumps(
            {
                "d_sae": features.n_features,
                "cpu_seconds_all_k": round(min(seconds[1:]), 3),
                "accuracy": {k: round(value, 4) for k, value in accuracy.items()},
                "accuracy_mean_over_k": round(float(np.mean(list(accuracy.values()))), 4),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
