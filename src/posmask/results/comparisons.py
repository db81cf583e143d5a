"""Paired comparisons of cells, and what may be said of them: better, worse, or no evidence.

Two cells of one study are compared on the same seeds and the same units (texts, or groups of them). For seed s let
d[s] be the difference of the metric (mean over tasks or datasets, where there are several). Its mean over seeds has
two sources of error, which are estimated apart and added:

    seeds    var(d) / S
    units    the variance over draws of the units with replacement (the same draw for both cells and all seeds, groups
             whole), less what of it is noise of single seeds, which the first line holds already

The interval is t with degrees of freedom between S - 1 and Satterthwaite's for two crossed random effects (1946,
Biometrics 2:110), the square of the mean of their roots: the former cover too much, the latter too little (docs/log.md
has the coverage in simulated studies). p values of all comparisons of a study are corrected together (Holm 1979). A
verdict other than "no evidence" needs a corrected p below 0.04, so that with what the variances themselves are unsure
of fewer than 5 in 100 null studies hold a false one, and at least three seeds: with fewer, the spread over seeds is
unknown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from posmask.errors import BadSetting, DegenerateResult
from posmask.results.bootstrap import resample_counts
from posmask.results.rows import Units, parse_slice, read_records, write_records

__all__ = [
    "COLUMNS",
    "MIN_SEEDS",
    "Comparison",
    "Difference",
    "Verdict",
    "holm",
    "judge",
    "paired_difference",
    "read_verdicts",
    "sample",
    "sample_of",
    "write_verdicts",
]

MIN_SEEDS = 3
LEVEL = 0.04

Sample = Mapping[str, Units]
"""One seed of one cell: the units of each task or dataset that a metric is the mean over."""


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds with its 95 % interval and two-sided p value, not corrected."""

    effect: float
    ci_low: float
    ci_high: float
    p: float
    n_seeds: int


def paired_difference(cell: Sequence[Sample], against: Sequence[Sample]) -> Difference:
    """Of two cells, seed by seed in the same order; positive when `cell` is higher.

    With one seed the interval covers the drawing of units only.
    """
    by_name, inflation, degrees = [], 1.0, 0
    for name in sorted(cell[0]):
        n_units = len(cell[0][name].top)
        # First every unit once, then the draws.
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
    if n_seeds > 1:  # Satterthwaite's alone is too many where few seeds happen to lie close.
        freedom = ((math.sqrt(freedom) + math.sqrt(n_seeds - 1)) / 2) ** 2
    error = math.sqrt(variance)
    reach = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(stats.t.sf(abs(effect) / error, freedom))
    return Difference(effect, effect - reach, effect + reach, p, n_seeds)


def _ratios(cell: Sequence[Sample], name: str, counts: np.ndarray) -> np.ndarray:
    """[seed draw]"""
    top, bottom = (np.stack([getattr(seed[name], part) for seed in cell]) @ counts.T for part in ("top", "bottom"))
    if (bottom == 0).any() or not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise DegenerateResult(f"{name or 'a metric'} has no value on some draw of its units: measure more of them")
    return top / bottom


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p values: the chance of one false verdict among all stays below the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = largest
    return corrected


COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    "explained_variance": ("explained_variance", {}),
    "ce_recovered": ("ce_recovered", {}),
    "order k=1": ("order_accuracy", {"k": "1"}),
    "order k=5": ("order_accuracy", {"k": "5"}),
    "probing k=1": ("probe_accuracy", {"k": "1"}),
    "probing k=5": ("probe_accuracy", {"k": "5"}),
}
"""What cells are compared by: a metric and what its slice must say. In all of them more is better."""


@dataclass(frozen=True)
class Comparison:
    """Who is compared with whom: cells, or `cell + pooling` for a pooling other than the mean."""

    label: str
    against: str


@dataclass(frozen=True)
class Verdict:
    """One line of `verdicts.csv`: is `label` better than `against` in `column`?"""

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


def sample(units: Mapping[str, Units], pooling: str, column: str) -> Sample:
    """The units of one column in one cell, by task or dataset; empty where the cell has no such number.

    Args:
        units: by `metric|slice`, as a cell's folder holds them.
    """
    return sample_of(units, pooling, *COLUMNS[column])


def sample_of(units: Mapping[str, Units], pooling: str, metric: str, wanted: Mapping[str, str]) -> dict[str, Units]:
    """As `sample`, for any metric and what its slice must say."""
    found = {}
    for key, values in units.items():
        name, _, text = key.partition("|")
        where = parse_slice(text)
        if (
            name == metric
            and "class" not in where
            and where.get("pooling", "mean") == pooling
            and all(where.get(part) == value for part, value in wanted.items())
        ):
            found[where.get("task") or where.get("dataset") or metric] = values
    return found


def judge(units: Mapping[str, Mapping[int, Mapping[str, Units]]], comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The verdict lines of a study, p values corrected over all of them together.

    Args:
        units: for each cell its units by seed; two cells are compared on the seeds that both have.
    """
    differences = []
    for comparison in comparisons:
        before = len(differences)
        cells = [label.partition(" + ")[0] for label in (comparison.label, comparison.against)]
        seeds = sorted(units[cells[0]].keys() & units[cells[1]].keys())
        for column in COLUMNS:
            pair = []
            for label in (comparison.label, comparison.against):
                cell, _, pooling = label.partition(" + ")
                pair.append([sample(units[cell][seed], pooling or "mean", column) for seed in seeds])
            if seeds and all(one and one.keys() == other.keys() for one, other in zip(*pair, strict=True)):
                differences.append((comparison, column, paired_difference(*pair)))
        if len(differences) == before:
            raise BadSetting(
                f"{comparison.label!r} and {comparison.against!r} have no number in common: ask about cells that have"
            )
    corrected = holm([found.p for _, _, found in differences])
    return [
        Verdict(
            comparison.label,
            comparison.against,
            column,
            found.effect,
            found.ci_low,
            found.ci_high,
            p,
            found.n_seeds,
            len(differences),
            _words(found, p),
        )
        for (comparison, column, found), p in zip(differences, corrected, strict=True)
    ]


def _words(found: Difference, p_corrected: float) -> str:
    if found.n_seeds < MIN_SEEDS or not p_corrected < LEVEL:
        return "no evidence"
    return "better" if found.effect > 0 else "worse"


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    write_records(path, Verdict, verdicts)


def read_verdicts(path: Path) -> list[Verdict]:
    return read_records(path, Verdict)
