"""95 % intervals over independently drawn units (texts or groups of texts), and over folds of texts."""

import math
from collections.abc import Mapping

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from posmask.results.bootstrap import resample_counts
from posmask.results.rows import Measure, Units

__all__ = ["interval", "jackknife_interval", "jackknife_intervals", "ratio", "ratio_interval"]


def interval(values: Float[Tensor, " resample"]) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the finite values; NaN if there are none."""
    finite = values[values.isfinite()].double()
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def ratio_interval(top: Float[Tensor, " unit"], bottom: Float[Tensor, " unit"]) -> tuple[float, float]:
    """Return the interval of sum(top) / sum(bottom) by bootstrap over units.

    Bootstrap draws from few units vary too little. The percentiles are therefore stretched about the value by the ratio
    of the t quantile with n - 1 degrees of freedom to the normal quantile, times sqrt(n / (n - 1)): by 17 % for 12
    units, by 1 % for 200.

    >>> low, high = ratio_interval(torch.tensor([0.0, 1.0] * 50), torch.ones(100))
    >>> low < 0.5 < high
    True
    """
    counts = torch.from_numpy(resample_counts(len(top)))
    low, high = interval((counts @ top.double()) / (counts @ bottom.double()))
    n = len(top)
    if n < 2:
        return low, high
    value = float(top.sum() / bottom.sum())
    stretch = float(scipy.stats.t.ppf(0.975, n - 1) / scipy.stats.norm.ppf(0.975)) * math.sqrt(n / (n - 1))
    return value - stretch * (value - low), value + stretch * (high - value)


def ratio(
    metric: str,
    top: Float[Tensor, " unit"],
    bottom: Float[Tensor, " unit"] | None = None,
    *,
    slice: Mapping[str, object] | None = None,
    n: int | None = None,
) -> Measure:
    """Return the measure sum(top) / sum(bottom) with its interval over units, and the units for paired comparisons.

    Args:
        metric: the measure's name.
        top: numerators.
        bottom: denominators; None means 1 per unit, so that the measure is a mean.
        slice: what the number is about; None: the metric as a whole.
        n: number of observations behind the measure; None means the number of units.
    """
    top = top.double()
    bottom = torch.ones_like(top) if bottom is None else bottom.double()
    total = float(bottom.sum())
    value = float(top.sum()) / total if total else math.nan
    low, high = ratio_interval(top, bottom)
    return Measure(metric, value, low, high, len(top) if n is None else n, slice, Units(top.numpy(), bottom.numpy()))


def jackknife_interval(value: float, *without_each: Float[Tensor, " fold"]) -> tuple[float, float]:
    """Return the jackknife interval value ± t * standard error (Efron 1982, chapter 3).

    Args:
        value: the estimate from all folds of texts.
        without_each: the estimates that leave out one fold each, one tensor per stratum of folds.
    """
    variance = sum(
        (len(values) - 1) / len(values) * float((values - values.mean()).square().sum()) for values in without_each
    )
    freedom = sum(len(values) - 1 for values in without_each)
    half_width = float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return value - half_width, value + half_width


def jackknife_intervals(
    values: Float[Tensor, "..."], without_each: Float[Tensor, "fold ..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return the ends of the jackknife interval of each value, as `jackknife_interval`; NaN with fewer than two folds.

    Args:
        values: the estimates from all folds of texts.
        without_each: the estimates that leave out one fold each.
    """
    n = len(without_each)
    if n < 2:
        return torch.full_like(values, math.nan), torch.full_like(values, math.nan)
    error = ((n - 1) / n * (without_each - without_each.mean(0)).square().sum(0)).sqrt()
    half_width = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    return values - half_width, values + half_width
