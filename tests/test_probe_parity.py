"""Probes of posmask compared with sae-bench 0.6.0 on the same activations, as recorded by tests/interop."""

import json
from pathlib import Path

import pytest
import torch

from interop.synthetic import CLASSES, N_TEST, N_TRAIN, channels, latents, sha256
from posmask.probing import datasets
from posmask.probing.pooling import PooledTexts
from posmask.probing.probes import all_feature_correct, chosen_features, k_sparse_correct

RECORDED = json.loads((Path(__file__).parent / "data" / "saebench_probing.json").read_text(encoding="utf8"))


def pooled(sides):
    """Return (features, dataset): the training texts class by class, then the test texts."""
    rows = torch.cat([torch.from_numpy(side[name]) for side in sides for name in CLASSES])
    features = PooledTexts(len(rows), rows.shape[1])
    features.add(torch.arange(len(rows)), rows)
    features.n_tokens += 1
    label = torch.cat([torch.arange(len(CLASSES)).repeat_interleave(n) for n in (N_TRAIN, N_TEST)])
    train = torch.arange(len(rows)) < N_TRAIN * len(CLASSES)
    return features, datasets.ProbeDataset("toy", CLASSES, tuple(map(str, range(len(rows)))), label, train)


def accuracy(correct):
    return float(correct.double().mean())


def test_probes_select_the_same_features_and_have_the_same_accuracy():
    recorded = RECORDED["each_k"]
    features, dataset = pooled(latents(recorded["latents_seed"]))
    random = torch.Generator().manual_seed(recorded["seed"])
    kept = torch.ones(features.n_texts).bool()
    differences = []
    for probe in recorded["probes"]:
        task = datasets._task(dataset, kept, int(probe["class"]), random)
        assert task.train.tolist() == probe["train_rows"]
        assert (task.test - N_TRAIN * len(CLASSES)).tolist() == probe["test_rows"]
        if probe["k"] is None:
            assert accuracy(all_feature_correct(features, task, random, choose_on_test=True)) == pytest.approx(
                probe["accuracy"], abs=0.01
            )
        else:
            k = probe["k"]
            assert sorted(chosen_features(features, [task], k)[0].tolist()) == sorted(probe["features"])
            differences.append(accuracy(k_sparse_correct(features, [task], (k,))[k][0]) - probe["accuracy"])
    assert len(differences) == 30
    assert max(map(abs, differences)) <= 0.002


def test_the_saebench_protocol_draws_the_same_texts():
    recorded = RECORDED["stream"]
    random = torch.Generator().manual_seed(recorded["seed"])
    kept = torch.ones((N_TRAIN + N_TEST) * len(CLASSES)).bool()
    dataset = pooled(latents(1))[1]
    for probe in recorded["probes"]:
        task = datasets._task(dataset, kept, int(probe["class"]), random)
        rows = task.train.numpy(), (task.test - N_TRAIN * len(CLASSES)).numpy()
        assert sha256(*rows) == probe["rows_sha256"]
        if probe["k"] is None:  # The fit on all features draws initial weights and an order per epoch.
            torch.empty(probe["n_features"]).uniform_(generator=random)
            torch.empty(1).uniform_(generator=random)
            for _ in range(probe["n_epochs"]):
                torch.randperm(len(task.train), generator=random)


def test_evaluations_have_the_same_mean_accuracies():
    recorded = RECORDED["stream"]
    means = recorded["means"]
    random = torch.Generator().manual_seed(recorded["seed"])
    for name, seed in recorded["latents_seeds"].items():
        for source, sides in (("llm", channels(seed + 100)), ("sae", latents(seed))):
            features, dataset = pooled(sides)
            measures = datasets.probe_accuracy(
                dataset, features, (1, 2, 5), source=source, protocol="saebench", random=random
            )
            for measure in measures:
                if "class" not in measure.slice:
                    k = measure.slice["k"]
                    key = f"{source}_test_accuracy" if k == "all" else f"{source}_top_{k}_test_accuracy"
                    assert measure.value == pytest.approx(means[f"{name}_results"][key], abs=0.002), (name, key)
