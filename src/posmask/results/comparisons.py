"""Paired comparisons of cells, and their verdicts: better, worse, equivalent or undecided.

Two cells of a study are compared on the same seeds and the same units (texts, or groups of texts). d[s] is the
difference of the metric for seed s (a mean over tasks or datasets, if there are several). The mean of d over S seeds
has two sources of variance, which are estimated separately and added:

    seeds    var(d) / S
    units    variance over draws of the units with replacement (the same draw for both cells and all seeds; groups are
             drawn as a unit), minus the part that is noise of single seeds, which the first line already contains

The interval is a t interval. Its degrees of freedom are the square of the mean of the roots of S - 1 and of
Satterthwaite's number for two crossed random effects (1946, Biometrics 2:110): alone, the former covers too much and
the latter too little (docs/log.md has the coverage in simulated studies).

A line has two p values: of no difference (two-sided), and of a difference of at least the column's margin (two
one-sided tests, Schuirmann 1987). The hypotheses that a study names are tested in their order, each only if all before
it came out as expected, which needs no correction (Maurer, Hothorn and Lehmacher 1995). All other lines are
exploratory: their p values are adjusted for the false discovery rate (Benjamini and Hochberg 1995), either kind on its
own. A line is

    equivalent       if the p of a difference of at least the margin is below 0.04,
    better, worse    if the p of no difference is below 0.04 and the difference is at least the margin,
    undecided        otherwise, and with fewer than three seeds, which do not show the spread over seeds.

0.04 keeps null studies with any better or worse line below 5 % although the variances are estimates.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import scipy

from posmask.errors import DegenerateResult
from posmask.results.bootstrap import resample_counts
from posmask.results.rows import Units, parse_slice, read_records, variant_of, write_records
from posmask.results.table import COMPARED, MIN_SEEDS, Column

__all__ = [
    "Comparison",
    "Difference",
    "Hypothesis",
    "Outcome",
    "Verdict",
    "equivalence",
    "false_discovery",
    "judge",
    "paired_difference",
    "read_verdicts",
    "sample",
    "write_verdicts",
]

LEVEL = 0.04
"""Verdicts need a corrected p value below this."""
Outcome = Literal["better", "worse", "equivalent", "undecided"]

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
    n_agree: int
    """How many seeds have a difference of the same sign as the mean."""
    error: float
    """Standard error."""
    freedom: float
    """Degrees of freedom."""


def paired_difference(cell: Sequence[Sample], against: Sequence[Sample]) -> Difference:
    """Return the difference of two cells, positive if `cell` is higher.

    With one seed the interval covers the sampling of units only.

    Args:
        cell: one sample per seed.
        against: samples of the other cell for the same seeds in the same order.

    Raises:
        DegenerateResult: the metric is NaN or infinite for the units or for a draw of them, or the units differ.
    """
    by_name, inflation, degrees = [], 1.0, 0
    for name in sorted(cell[0]):
        n_units = len(cell[0][name].top)
        if any(len(seed[name].top) != n_units for seed in (*cell, *against)):
            raise DegenerateResult(f"{name or 'a metric'} has other units in another cell: evaluate both again")
        # Row 0 has every unit once: the point estimate. The other rows are the draws.
        counts = np.concatenate([np.ones((1, n_units)), resample_counts(n_units, name)])
        by_name.append(_ratios(cell, name, counts) - _ratios(against, name, counts))
        degrees += n_units - 1
        inflation = max(inflation, n_units / max(n_units - 1, 1))
    difference = np.mean(by_name, axis=0)
    point, draw = difference[:, 0], difference[:, 1:]
    n_seeds, effect = len(point), float(point.mean())
    n_agree = int((np.sign(point) == np.sign(effect)).sum())
    over_units = float(draw.mean(0).var()) * inflation
    over_seeds = 0.0
    if n_seeds > 1:
        noise = float(draw.var(1).mean()) * inflation / n_seeds
        over_units = max(0.0, (over_units - noise) / (1 - 1 / n_seeds))
        over_seeds = float(point.var(ddof=1)) / n_seeds
    variance = over_units + over_seeds
    if variance == 0:
        return Difference(effect, effect, effect, 1.0 if effect == 0 else 0.0, n_seeds, n_agree, 0.0, math.inf)
    spread = over_units**2 / max(degrees, 1) + (over_seeds**2 / (n_seeds - 1) if n_seeds > 1 else 0)
    freedom = variance**2 / spread
    if n_seeds > 1:  # Satterthwaite's number alone is too large if few seeds happen to be close together.
        freedom = ((math.sqrt(freedom) + math.sqrt(n_seeds - 1)) / 2) ** 2
    error = math.sqrt(variance)
    half_width = float(scipy.stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(scipy.stats.t.sf(abs(effect) / error, freedom))
    return Difference(effect, effect - half_width, effect + half_width, p, n_seeds, n_agree, error, freedom)


def equivalence(difference: Difference, margin: float) -> float:
    """The p value of a difference of at least `margin`: the larger of two one-sided tests."""
    if difference.error == 0:
        return 0.0 if abs(difference.effect) < margin else 1.0
    return float(scipy.stats.t.sf((margin - abs(difference.effect)) / difference.error, difference.freedom))


def _ratios(cell: Sequence[Sample], name: str, counts: np.ndarray) -> np.ndarray:
    """The metric's value for each seed and draw [seed draw]."""
    top, bottom = (np.stack([getattr(seed[name], part) for seed in cell]) @ counts.T for part in ("top", "bottom"))
    if (bottom == 0).any() or not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise DegenerateResult(
            f"{name or 'a metric'} has no finite value in a draw of its {counts.shape[1]} units: evaluate on more units"
        )
    return top / bottom


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for the false discovery rate.

    >>> false_discovery([0.01, 0.04, 0.03])
    [0.03, 0.04, 0.04]
    """
    return scipy.stats.false_discovery_control(p_values).tolist() if p_values else []


@dataclass(frozen=True)
class Comparison:
    """Two cells to compare, each written `cell`, or `cell + pooling` for a pooling other than the mean."""

    label: str
    against: str


@dataclass(frozen=True)
class Hypothesis:
    """What a study expects of a comparison in a column, a name in `COMPARED`."""

    label: str
    against: str
    column: str
    expected: Outcome


@dataclass(frozen=True)
class Verdict:
    """A line of `verdicts.csv`: how `label` compares with `against` in `column`, a name in `COMPARED`.

    Attributes:
        p_corrected: of no difference.
        n_comparisons: how many comparisons it was corrected for.
        p_equivalence: of a difference of at least `margin`, corrected in the same way.
        margin: the smallest difference that matters.
        n_agree: how many seeds have a difference of the same sign as the mean.
        hypothesis: the number of the study's hypothesis, from 1; 0 for exploratory lines.
        expected: by the hypothesis.
    """

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
    p_equivalence: float = math.nan
    margin: float = 0.0
    n_agree: int = 0
    hypothesis: int = 0
    expected: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Outcome):
            raise ValueError(f"{self.verdict!r} is no verdict")


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
            and variant_of(slice) == pooling
            and column.where.items() <= slice.items()
        ):
            selected[slice.get("task") or slice.get("dataset") or metric] = values
    return selected


def judge(
    units: Mapping[str, Mapping[int, Mapping[str, Units]]],
    comparisons: Sequence[Comparison],
    hypotheses: Sequence[Hypothesis] = (),
    margins: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """Return the verdicts of a study: its hypotheses in their order, then the other lines of the comparisons.

    A column that one of the cells lacks, or that has no value for a draw of its units, has no verdict.

    Args:
        units: units by cell and seed; two cells are compared on the seeds that both have.
        margins: the smallest difference that matters, by column, where it is not `Column.margin`.
    """
    margin = {name: column.margin for name, column in COMPARED.items()} | dict(margins or {})
    every: dict[tuple[str, str, str], Difference] = {}
    of_hypotheses = [Comparison(hypothesis.label, hypothesis.against) for hypothesis in hypotheses]
    for comparison in dict.fromkeys([*of_hypotheses, *comparisons]):
        for name, pair in _paired_samples(units, comparison).items():
            with contextlib.suppress(DegenerateResult):
                every[comparison.label, comparison.against, name] = paired_difference(*pair)
    verdicts, all_as_expected = [], True
    for number, hypothesis in enumerate(hypotheses, start=1):
        key = hypothesis.label, hypothesis.against, hypothesis.column
        if key not in every:
            all_as_expected = False
            continue
        difference = every.pop(key)
        p_values = difference.p, equivalence(difference, margin[hypothesis.column])
        if not all_as_expected:
            p_values = 1.0, 1.0
        verdict = _verdict(key, difference, p_values, len(hypotheses), margin)
        all_as_expected &= verdict.verdict == hypothesis.expected
        verdicts.append(replace(verdict, hypothesis=number, expected=hypothesis.expected))
    listed = {(comparison.label, comparison.against) for comparison in comparisons}
    rest = {key: difference for key, difference in every.items() if key[:2] in listed}
    corrected = false_discovery([difference.p for difference in rest.values()])
    equivalent = false_discovery([equivalence(difference, margin[key[2]]) for key, difference in rest.items()])
    verdicts += [
        _verdict(key, difference, p_values, len(rest), margin)
        for (key, difference), p_values in zip(rest.items(), zip(corrected, equivalent, strict=True), strict=True)
    ]
    return verdicts


def _verdict(
    key: tuple[str, str, str],
    difference: Difference,
    p_values: tuple[float, float],
    n_comparisons: int,
    margins: Mapping[str, float],
) -> Verdict:
    (p_corrected, p_equivalence), margin, outcome = p_values, margins[key[2]], "undecided"
    if difference.n_seeds >= MIN_SEEDS:
        if p_equivalence < LEVEL:
            outcome = "equivalent"
        elif p_corrected < LEVEL and abs(difference.effect) >= margin:
            outcome = "better" if difference.effect > 0 else "worse"
    return Verdict(
        *key,
        difference.effect,
        difference.ci_low,
        difference.ci_high,
        p_corrected,
        difference.n_seeds,
        n_comparisons,
        outcome,
        p_equivalence,
        margin,
        difference.n_agree,
    )


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


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write `verdicts.csv`."""
    write_records(path, Verdict, verdicts)


def read_verdicts(path: Path) -> list[Verdict]:
    """Read `verdicts.csv`.

    Raises:
        DamagedFolder: the file is not a table of verdicts.
    """
    return read_records(path, Verdict)
