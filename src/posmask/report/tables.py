"""The page's tables: each number with the rows it comes from, its interval and its difference to the baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posmask.errors import DegenerateResult
from posmask.report.reading import MODEL_CELL, Numbers, Study
from posmask.results.comparisons import Difference, Sample, paired_difference, sample
from posmask.results.rows import CONTROLS, Row, Units, parse_slice, slice_text
from posmask.results.table import COLUMNS, Column, Line, format_number, format_signed, summarize

__all__ = [
    "TIES",
    "Change",
    "Number",
    "StudyTable",
    "accuracies",
    "capped",
    "controls",
    "controls_of",
    "missing",
    "study_table",
    "ties",
]

TIES = (
    ("mean_openness", {}, "mean openness"),
    ("strictness", {}, "strictness"),
    ("retention", {}, "retention"),
    ("retention_chance", {}, "chance level of retention"),
    ("profile_fidelity", {}, "profile fidelity"),
    ("position_information", {}, "position information"),
    ("position_bound_share", {}, "position-bound latents"),
    ("shift_position", {"mask": "on"}, "shift design: position"),
    ("shift_interaction", {"mask": "on"}, "shift design: interaction"),
    ("causal_specificity", {}, "causal specificity, nats"),
)
"""Columns of the table of ties to positions: metric, required pairs of the slice, heading."""
_ORDER_CONTROLS = {
    "order_bag_accuracy": "bag of words (exactly 1/K)",
    "order_edges": "first and last 3 tokens",
    "order_shuffled": "tokens shuffled at test time: mean and range over cells, poolings, k",
    "order_permuted": "labels permuted: mean and range over cells, poolings, k",
}
"""Controls of order probing: heading by metric."""

_SHORT_CONTROLS = {"order_edges": "first and last tokens", "order_shuffled": "shuffled"}
"""Controls in the headings of order tasks."""


@dataclass(frozen=True)
class Change:
    """A paired difference of a number to the baseline's.

    Attributes:
        low: end of the interval, or the smallest difference of a seed; NaN with one seed.
        basis: what `low` and `high` are, in words.
    """

    effect: float
    low: float
    high: float
    basis: str

    @property
    def text(self) -> str:
        """The difference as the page shows it, and the interval in parentheses."""
        if math.isnan(self.low):
            return f"{format_signed(self.effect)} (1 seed)"
        seeds = "seeds " if self.basis == _OVER_SEEDS else ""
        return f"{format_signed(self.effect)} ({seeds}{format_signed(self.low)} to {format_signed(self.high)})"


_OVER_SEEDS = "range over seeds"


@dataclass(frozen=True)
class Number:
    """A number of a table.

    Attributes:
        of: `cell|metric|slice`, the rows of results.csv whose mean it is; the cell is * for all cells.
        about: kind of interval, seeds and n, in words.
        difference: paired difference to the baseline; None if there is none.
    """

    value: float
    of: str
    ci_low: float = math.nan
    ci_high: float = math.nan
    about: str = ""
    difference: Change | None = None
    digits: int = 3

    @property
    def text(self) -> str:
        """The value as the page shows it."""
        return format_number(self.value, self.digits)

    @property
    def interval(self) -> str:
        """The interval as the page shows it; empty if there is none."""
        return "" if math.isnan(self.ci_low) else f"{format_number(self.ci_low)} to {format_number(self.ci_high)}"


@dataclass(frozen=True)
class StudyTable:
    """A study's table.

    Attributes:
        lines: each line with its label on the page, which is unique among several studies.
        numbers: by label, one entry per column of `COLUMNS`; None where there is no such number.
    """

    lines: list[tuple[Line, str]]
    numbers: dict[str, list[Number | None]]


def study_table(study: Study) -> StudyTable:
    """Return the study's table; intervals cover texts and seeds if the cell folders have their units."""
    table = _TableNumbers(study)
    lines, numbers = [], {}
    for line in summarize(study.rows):
        cell, label = _cell_of(line, study), line.label
        if line.mask == "none" and cell != MODEL_CELL:  # The page has several studies, each with its model.
            label = cell.replace(MODEL_CELL, line.label)
        lines.append((line, label))
        numbers[label] = [
            table.number(column, cell, line.pooling) if line.printed(column) else None for column in COLUMNS
        ]
    return StudyTable(lines, numbers)


def _cell_of(line: Line, study: Study) -> str:
    if line.mask == "none":
        return next(row.cell for row in study.rows if row.mask == "none")
    return line.label.removesuffix(f" + {line.pooling}")


class _TableNumbers:
    """Numbers of a study's table."""

    def __init__(self, study: Study) -> None:
        self._numbers = Numbers(study.rows)
        self._units: Mapping[str, Mapping[int, Mapping[str, Units]]] = study.units()
        self._baseline = study.baseline

    def number(self, column: Column, cell: str, pooling: str) -> Number | None:
        """Return a column's number of a cell at a pooling; None if the rows lack it."""
        where = _where(column, pooling)
        rows = self._numbers.rows(cell, column.metric, where)
        value = self._numbers.mean(cell, column.metric, where)
        if column.minus:
            value -= self._numbers.mean(cell, column.minus, where)
        if not rows or math.isnan(value):
            return None
        seeds = sorted({row.seed for row in rows})
        n = max(row.n for row in rows)
        counts = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}" + (f", n = {n:,}" if n > 1 else "")
        low, high, kind = self._interval(column, cell, pooling, value, rows)
        about = f"{kind} {format_number(low)} to {format_number(high)}" if kind else "no interval"
        difference = None
        if self._baseline is not None and (cell, pooling) != (self._baseline, "mean") and column.metric != "d_sae":
            difference = self._difference(column, cell, pooling, seeds)
        of = f"{cell}|{column.metric}{'-' + column.minus if column.minus else ''}|{slice_text(where)}"
        return Number(value, of, low, high, f"{about}; {counts}", difference, column.digits)

    def _samples(self, column: Column, cell: str, pooling: str, seeds: Sequence[int]) -> list[Sample]:
        """A sample per seed, empty for a seed without units."""
        by_seed = self._units.get(cell, {})
        return [sample(by_seed.get(seed, {}), pooling, column) for seed in seeds]

    def _interval(
        self, column: Column, cell: str, pooling: str, value: float, rows: Sequence[Row]
    ) -> tuple[float, float, str]:
        """The best available interval and its kind; NaN and an empty kind if there is none."""
        seeds = sorted({row.seed for row in rows})
        samples = self._samples(column, cell, pooling, seeds)
        if all(samples):
            zeros = [
                {name: Units(0 * units.top, 0 * units.bottom + 1) for name, units in of_seed.items()}
                for of_seed in samples
            ]
            difference = _paired(samples, zeros)
            if difference is not None and abs(difference.effect - value) < 1e-6:
                return difference.ci_low, difference.ci_high, "95 % interval over texts and seeds"
        if len(rows) == 1 and math.isfinite(rows[0].ci_low) and not column.minus:
            return rows[0].ci_low, rows[0].ci_high, "95 % interval over texts"
        if len(seeds) > 1 and column.metric != "d_sae":
            values = self._by_seed(column, cell, _where(column, pooling)).values()
            return min(values), max(values), _OVER_SEEDS
        return math.nan, math.nan, ""

    def _by_seed(self, column: Column, cell: str, where: dict[str, str]) -> dict[int, float]:
        def means(metric: str) -> dict[int, float]:
            rows = self._numbers.rows(cell, metric, where)
            return {
                seed: float(np.mean([row.value for row in rows if row.seed == seed]))
                for seed in {row.seed for row in rows}
            }

        values, minus = means(column.metric), means(column.minus) if column.minus else {}
        return {seed: value - minus.get(seed, 0.0) for seed, value in values.items()}

    def _difference(self, column: Column, cell: str, pooling: str, seeds: Sequence[int]) -> Change | None:
        """The difference to the baseline on the same seeds and texts; without units, seed by seed."""
        assert self._baseline is not None
        shared = [seed for seed in seeds if seed in self._units.get(self._baseline, {})]
        samples = self._samples(column, cell, pooling, shared)
        base_samples = self._samples(column, self._baseline, "mean", shared)
        if shared and all(a and a.keys() == b.keys() for a, b in zip(samples, base_samples, strict=True)):
            paired = _paired(samples, base_samples)
            if paired is not None:
                return Change(paired.effect, paired.ci_low, paired.ci_high, "95 % interval over texts and seeds")
        values = self._by_seed(column, cell, _where(column, pooling))
        base_values = self._by_seed(column, self._baseline, _where(column, "mean"))
        differences = [values[seed] - base_values[seed] for seed in sorted(values.keys() & base_values.keys())]
        if not differences or not all(map(math.isfinite, differences)):
            return None
        mean = sum(differences) / len(differences)
        if len(differences) == 1:
            return Change(mean, math.nan, math.nan, "1 seed")
        return Change(mean, min(differences), max(differences), _OVER_SEEDS)


def _where(column: Column, pooling: str) -> dict[str, str]:
    if column.is_probing:
        return {**column.where, "pooling": pooling}
    return {"control": pooling} if pooling in CONTROLS else {}


def _paired(samples: Sequence[Sample], others: Sequence[Sample]) -> Difference | None:
    try:
        return paired_difference(samples, others)
    except DegenerateResult:
        return None


def capped(study: Study) -> list[tuple[str, str, int, int]]:
    """Return sizes below those that the settings request: (task or dataset, unit, requested, available)."""
    requested = next((cell.manifest.get("made_from", {}).get("evaluation", {}) for cell in study.cells), {})
    sizes: dict[tuple[str, str], tuple[int, int]] = {}

    def note(name: str, unit: str, n_requested: Any, n_available: int) -> None:
        if isinstance(n_requested, int) and n_available < n_requested:
            sizes[name, unit] = (n_requested, n_available)

    for row in study.rows:
        where = parse_slice(row.slice)
        if row.metric == "order_accuracy":
            note(where.get("task", ""), "test groups", requested.get("order_test_groups"), row.n)
        if row.metric == "probe_accuracy" and "class" not in where and where.get("train", "").isdigit():
            note(
                where.get("dataset", ""), "training texts per probe", requested.get("probe_train"), int(where["train"])
            )
    return [(name, unit, *size) for (name, unit), size in sorted(sizes.items())]


def missing(study: Study, table: StudyTable) -> list[tuple[str, list[str]]]:
    """Return the columns that a cell lacks; other poolings and the model itself lack some by definition.

    A study without attention sinks has no number with them.
    """
    has_sinks = any(row.metric == "sink_tokens" and row.value > 0 for row in study.rows)
    cells = []
    for line, label in table.lines:
        if line.mask == "none" or line.pooling != "mean":
            continue
        titles = [
            column.full_title
            for column, number in zip(COLUMNS, table.numbers[label], strict=True)
            if number is None and (has_sinks or column.name != "explained_variance_sinks")
        ]
        if titles:
            cells.append((label, titles))
    return cells


def accuracies(rows: Sequence[Row], metric: str, key: str) -> dict[str, Any]:
    """Return the table of a probing metric: a line per cell and pooling, a column per task or dataset and k.

    Args:
        rows: rows of one or several studies.
        metric: `order_accuracy` or `probe_accuracy`.
        key: pair of the slice that names the task or dataset.
    """
    by_label: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row.metric == metric and "class" not in (where := parse_slice(row.slice)):
            label = row.cell.replace(MODEL_CELL, "the model itself") if row.mask == "none" else row.cell
            label += "" if where["pooling"] == "mean" else f" + {where['pooling']}"
            by_label.setdefault(label, {}).setdefault((where[key], where["k"]), []).append(row)
    measured = list(dict.fromkeys(column for line in by_label.values() for column in line))
    names = list(dict.fromkeys(name for name, _ in measured))
    ks = sorted({k for _, k in measured}, key=lambda k: int(k) if k.isdigit() else math.inf)
    columns = [(name, k) for name in names for k in ks]
    return {
        "names": names,
        "ks": ks,
        "lines": {
            label: [_mean_of(line.get((name, k), []), f"{key}={name};k={k}") for name, k in columns]
            for label, line in by_label.items()
        },
    }


def ties(rows: Sequence[Row]) -> dict[str, list[Number | None]]:
    """Return each cell's metrics of `TIES`, means over seeds."""
    numbers = Numbers(rows)
    return {
        cell: [_mean_of(numbers.rows(cell, metric, where), slice_text(where)) for metric, where, _ in TIES]
        for cell in dict.fromkeys(row.cell for row in rows if row.mask != "none")
    }


def _mean_of(rows: list[Row], slice: str) -> Number | None:
    values = [row.value for row in rows if not math.isnan(row.value)]
    if not values:
        return None
    low, high = min(row.ci_low for row in rows), max(row.ci_high for row in rows)
    kind = "95 % interval" if len(rows) == 1 else f"95 % intervals of {len(rows)} seeds span"
    about = f"n = {rows[0].n:,}"
    if math.isfinite(low):
        about = f"{kind} {format_number(low)} to {format_number(high)}, {about}"
    pooling = parse_slice(rows[0].slice).get("pooling")
    where = f"{slice};pooling={pooling}" if pooling else slice
    return Number(sum(values) / len(values), f"{rows[0].cell}|{rows[0].metric}|{where}", low, high, about)


def controls(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the controls of order probing by task: means over all cells, poolings and k, with their range."""
    tasks = list(dict.fromkeys(parse_slice(row.slice)["task"] for row in rows if row.metric == "order_bag_accuracy"))
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.metric in _ORDER_CONTROLS and math.isfinite(row.value):
            values.setdefault((row.metric, parse_slice(row.slice)["task"]), []).append(row.value)

    def number(metric: str, task: str) -> Number | None:
        measured = values.get((metric, task))
        if not measured:
            return None
        low, high = (min(measured), max(measured)) if len(measured) > 1 else (math.nan, math.nan)
        about = f"mean and range of {len(measured)}"
        return Number(sum(measured) / len(measured), f"*|{metric}|task={task}", low, high, about)

    return {
        "tasks": tasks,
        "lines": {title: [number(metric, task) for task in tasks] for metric, title in _ORDER_CONTROLS.items()},
    }


def controls_of(table: dict[str, Any], task: str) -> list[tuple[str, str]]:
    """Return the controls of a task for its heading: short name and value."""
    if task not in table["tasks"]:
        return []
    names = {_ORDER_CONTROLS[metric]: name for metric, name in _SHORT_CONTROLS.items()}
    numbers = {title: values[table["tasks"].index(task)] for title, values in table["lines"].items()}
    return [(names[title], number.text) for title, number in numbers.items() if title in names and number is not None]
