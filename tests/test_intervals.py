"""Coverage of confidence intervals for known true values, in 1,000 samples."""

import numpy as np
import pytest
import torch

from posmask.results import bootstrap, intervals


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    draws = {n: bootstrap.resample_counts(n) for n in (12, 50, 200)}
    monkeypatch.setattr(intervals, "resample_counts", lambda n: draws[n])


@pytest.mark.parametrize(("n_units", "rate"), [(50, 0.55), (50, 0.8), (200, 0.65)])
def test_intervals_of_accuracies_cover_the_truth(n_units, rate):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        low, high = intervals.ratio_interval(
            torch.from_numpy((random.random(n_units) < rate).astype(float)), torch.ones(n_units)
        )
        covered += low <= rate <= high
    assert 930 <= covered <= 970


@pytest.mark.parametrize("n_units", [12, 200])
def test_intervals_of_ratios_over_texts_of_different_length_cover_the_truth(n_units):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        length = random.lognormal(0, 0.7, n_units)
        rate = random.normal(0.7, 0.2, n_units)
        low, high = intervals.ratio_interval(torch.from_numpy(length * rate), torch.from_numpy(length))
        covered += low <= 0.7 <= high
    assert 930 <= covered <= 970


def test_jackknife_intervals_cover_the_truth():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        folds = torch.from_numpy(random.normal(0.3, 0.1, 16))
        low, high = intervals.jackknife_interval(float(folds.mean()), (folds.sum() - folds) / 15)
        covered += low <= 0.3 <= high
    assert 930 <= covered <= 970
