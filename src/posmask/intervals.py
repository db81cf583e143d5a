"""95 % intervals by bootstrap over texts (or groups of texts), the units that were drawn independently."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posmask.seeds import generator

__all__ = ["interval", "mean_interval", "ratio_interval", "resample_counts"]

N_RESAMPLES = 500


def resample_counts(n_units: int, seed: int = 0) -> Int[Tensor, "resample unit"]:
    """How often each unit was drawn in each of `N_RESAMPLES` draws of n_units with replacement."""
    drawn = torch.randint(n_units, (N_RESAMPLES, n_units), generator=generator(seed, "bootstrap"))
    return torch.zeros(N_RESAMPLES, n_units, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))


def interval(values: Float[Tensor, " resample"]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile, resamples without a value (NaN) left out; NaN if none has one."""
    finite = values[values.isfinite()].double()
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def ratio_interval(top: Float[Tensor, " unit"], bottom: Float[Tensor, " unit"]) -> tuple[float, float]:
    """Of sum(top) / sum(bottom)."""
    counts = resample_counts(len(top)).double()
    return interval((counts @ top.double()) / (counts @ bottom.double()))


def mean_interval(values: Float[Tensor, " unit"]) -> tuple[float, float]:
    """Of the mean over units.

    >>> low, high = mean_interval(torch.tensor([0.0, 1.0] * 50))
    >>> low < 0.5 < high
    True
    """
    return ratio_interval(values, torch.ones_like(values))
