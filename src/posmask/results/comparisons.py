"""Paired comparisons of cells, and their verdicts: better, worse or no evidence.

Two cells of a study are compared on the same seeds and the same units (texts, or groups of texts). d[s] is the
difference of the metric for seed s (a mean over tasks or datasets, if there are several). The mean of d over S seeds
has two sources of variance, which are estimated separately and added:

    seeds    var(d) / S
    units    variance over draws of the units with replacement (the same draw for both cells and all seeds; groups are
             drawn as a unit), minus the part that is noise of single seeds, which the first line already contains

The interval is a t interval. Its degrees of freedom are the square of the mean of the roots of S - 1 and of
Satterthwaite's number for two crossed random effects (1946, Biometrics 2:110): alone, the former covers too much and
the latter too little (docs/log.md has the coverage in simulated studies). The p values of all comparisons of a study
are corrected together (Holm 1979). A verdict other than "no evidence" needs a corrected p below 0.04, which keeps
studies with any false verdict below 5 % although the variances are estimates, and at least three seeds, because fewer
do not show the spread over seeds.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from posmask.errors import DegenerateResult
from posmask.results.bootstrap import resample_counts
from posmask.results.rows import Units, parse_slice, read_records, write_records
from posmask.results.table import COMPARED, Column

__all__ = [
    "MIN_SEEDS",
    "Comparison",
    "Difference",
    "Verdict",
    "holm",
    "judge",
    "paired_difference",
    "read_verdicts",
    "sample",
    "write_verdicts",
]

MIN_SEEDS = 3
"""Verdicts need at least this many seeds."""
LEVEL = 0.04
"""Verdicts need a corrected p value below this."""

Sample = Mapping[str, Units]
"""One seed of one cell: the units of each task or dataset that a metric is the mean over."""


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds with its 95 % interval and two-sided, uncorrected p value."""

    effect: float
    ci_low: float
    ci_high: float
    p: float
    n_seeds: int


def paired_difference(cell: Sequence[Sample], against: Sequence[Sample]) -> Difference:
    """Return the difference of two cells, positive if `cell` is higher.

    With one seed the interval covers the sampling of units only.

    Args:
        cell: one sample per seed.
        against: samples of the other cell for the same seeds in the same order.

    Raises:
        DegenerateResult: the metric is NaN or infinite for the units or for a draw of them.
    """
    by_name, inflation, degrees = [], 1.0, 0
    for name in sorted(cell[0]):
        n_units = len(cell[0][name].top)
        # Row 0 has every unit once: the point estimate. The other rows are the draws.
        counts = np.concatenate([np.ones((1, n_units)), resample_counts(n_units, name)])
        by_name.append(_ratios(cell, name, counts) - _ratios(against, name, counts))
        degrees += n_units - 1
        inflation = max(inflation, n_units / max(n_units - 1, 1))
    difference = np.mean(by_name, axis=0)
    point, draw = difference[:, 0], difference[:, 1:]
    n_seeds, effect = len(point), float(point.mean())
    over_units = float(draw.mean(0).var()) * inflation
    over_seeds = 0.0
    if n_seeds > 1:
        noise = float(draw.var(1).mean()) * inflation / n_seeds
        over_units = max(0.0, (over_units - noise) / (1 - 1 / n_seeds))
        over_seeds = float(point.var(ddof=1)) / n_seeds
    variance = over_units + over_seeds
    if variance == 0:
        return Difference(effect, effect, effect, 1.0 if effect == 0 else 0.0, n_seeds)
    spread = over_units**2 / max(degrees, 1) + (over_seeds**2 / (n_seeds - 1) if n_seeds > 1 else 0)
    freedom = variance**2 / spread
    if n_seeds > 1:  # Satterthwaite's number alone is too large if few seeds happen to be close together.
        freedom = ((math.sqrt(freedom) + math.sqrt(n_seeds - 1)) / 2) ** 2
    error = math.sqrt(variance)
    half_width = float(scipy.stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(scipy.stats.t.sf(abs(effect) / error, freedom))
    return Difference(effect, effect - half_width, effect + half_width, p, n_seeds)


def _ratios(cell: Sequence[Sample], name: str, counts: np.ndarray) -> np.ndarray:
    """The metric's value for each seed and draw [seed draw]."""
    top, bottom = (np.stack([getattr(seed[name], part) for seed in cell]) @ counts.T for part in ("top", "bottom"))
    if (bottom == 0).any() or not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise DegenerateResult(
            f"{name or 'a metric'} has no finite value in a draw of its {counts.shape[1]} units: evaluate on more units"
        )
    return top / bottom


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p values, which bound the chance of any false verdict.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Comparison:
    """Two cells to compare, each written `cell`, or `cell + pooling` for a pooling other than the mean."""

    label: str
    against: str


@dataclass(frozen=True)
class Verdict:
    """A line of `verdicts.csv`: whether `label` is better than `against` in `column`, a name in `COMPARED`."""

    label: str
    against: str
    column: str
    effect: float
    ci_low: float
    ci_high: float
    p_corrected: float
    n_seeds: int
    n_comparisons: int
    verdict: str


def sample(units: Mapping[str, Units], pooling: str, column: Column) -> Sample:
    """Return the units of a column's metric by task or dataset; empty if the cell lacks the metric.

    Args:
        units: units of one cell folder by `metric|slice`, as `read_units` returns them.
    """
    selected = {}
    for key, values in units.items():
        metric, _, text = key.partition("|")
        slice = parse_slice(text)
        if (
            metric == column.metric
            and "class" not in slice
            and slice.get("pooling", "mean") == pooling
            and column.where.items() <= slice.items()
        ):
            selected[slice.get("task") or slice.get("dataset") or metric] = values
    return selected


def judge(units: Mapping[str, Mapping[int, Mapping[str, Units]]], comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Return the verdicts of a study, with p values corrected over all of them together.

    A column that one of the cells lacks, or that has no value for a draw of its units, has no verdict.

    Args:
        units: units by cell and seed; two cells are compared on the seeds that both have.
    """
    differences: list[tuple[Comparison, str, Difference]] = []
    for comparison in comparisons:
        for name, pair in _paired_samples(units, comparison).items():
            with contextlib.suppress(DegenerateResult):
                differences.append((comparison, name, paired_difference(*pair)))
    corrected = holm([difference.p for _, _, difference in differences])
    return [
        Verdict(
            comparison.label,
            comparison.against,
            name,
            difference.effect,
            difference.ci_low,
            difference.ci_high,
            p,
            difference.n_seeds,
            len(differences),
            _verdict(difference, p),
        )
        for (comparison, name, difference), p in zip(differences, corrected, strict=True)
    ]


def _paired_samples(
    units: Mapping[str, Mapping[int, Mapping[str, Units]]], comparison: Comparison
) -> dict[str, tuple[list[Sample], list[Sample]]]:
    """The samples of both cells on their common seeds, by column name; without columns that a seed lacks."""
    labels = [label.partition(" + ") for label in (comparison.label, comparison.against)]
    (cell, _, _), (against, _, _) = labels
    seeds = sorted(units[cell].keys() & units[against].keys())
    pairs = {}
    for column in COMPARED.values():
        left, right = (
            [sample(units[name][seed], pooling or "mean", column) for seed in seeds] for name, _, pooling in labels
        )
        if seeds and all(a and a.keys() == b.keys() for a, b in zip(left, right, strict=True)):
            pairs[column.name] = left, right
    return pairs


def _verdict(difference: Difference, p_corrected: float) -> str:
    if difference.n_seeds < MIN_SEEDS or not p_corrected < LEVEL:
        return "no evidence"
    return "better" if difference.effect > 0 else "worse"


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write `verdicts.csv`."""
    write_records(path, Verdict, verdicts)


def read_verdicts(path: Path) -> list[Verdict]:
    """Read `verdicts.csv`.

    Raises:
        DamagedFolder: the file is not a table of verdicts.
    """
    return read_records(path, Verdict)
