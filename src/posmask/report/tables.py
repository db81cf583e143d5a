"""The page's tables: every number with where it comes from, its interval, and its paired difference to the baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posmask.errors import DegenerateResult
from posmask.report.reading import MODEL_CELL, Numbers, Study
from posmask.results.comparisons import Difference, paired_difference, sample_of
from posmask.results.rows import Row, Units, parse_slice
from posmask.results.table import Line, summarize

__all__ = ["COLUMNS", "Number", "StudyTable", "capped", "missing", "number", "signed", "study_table", "verdict_lines"]


_MOST_DECIDED = 14  # as sentences; the table has all


@dataclass(frozen=True)
class Column:
    """A number of the study's table: the mean of a metric's rows whose slice says `where`, less that of `less`."""

    title: str
    group: str
    metric: str
    where: tuple[tuple[str, str], ...] = ()
    less: str = ""
    digits: int = 3

    @property
    def name(self) -> str:
        """The title, which tells probing's columns apart only with their group."""
        return f"{self.group}, {self.title}" if self.is_probing else self.title

    @property
    def is_probing(self) -> bool:
        return bool(self.where)


def _probes(title: str, metric: str, ks: Sequence[int]) -> list[Column]:
    return [Column(f"k = {k}", title, metric, (("k", str(k)),)) for k in ks]


COLUMNS = [
    Column("latents", "", "d_sae", digits=0),
    Column("explained variance", "reconstruction", "explained_variance"),
    Column("CE recovered", "reconstruction", "ce_recovered"),
    Column("dead", "reconstruction", "dead_share"),
    Column("retention − chance", "ties to positions", "retention", less="retention_chance"),
    Column("fidelity", "ties to positions", "profile_fidelity"),
    *_probes("order probing", "order_accuracy", (1, 5, 20)),
    *_probes("standard probing", "probe_accuracy", (1, 5, 20)),
]


@dataclass(frozen=True)
class Number:
    """`of`: cell|metric|slice, the rows of results.csv whose mean it is, * for all cells."""

    value: float
    of: str
    ci_low: float = math.nan
    ci_high: float = math.nan
    about: str = ""
    difference: str = ""
    digits: int = 3

    @property
    def text(self) -> str:
        return number(self.value, self.digits)

    @property
    def interval(self) -> str:
        return "" if math.isnan(self.ci_low) else f"{number(self.ci_low)} to {number(self.ci_high)}"


@dataclass(frozen=True)
class StudyTable:
    """A line a cell and pooling. `numbers` by label and column, in the order of `COLUMNS`; None: no such number."""

    lines: list[tuple[Line, str]]
    numbers: dict[str, list[Number | None]]


def number(value: float, digits: int = 3) -> str:
    """As text: no zero before the point, a dash where there is none.

    >>> number(0.8264), number(1.5), number(2304, 0)
    ('.826', '1.500', '2,304')
    """
    if math.isnan(value):
        return "–"
    text = f"{value:,.{digits}f}"
    return text.replace("0.", ".", 1).replace("-", "−") if text.lstrip("-").startswith("0.") else text.replace("-", "−")


def signed(value: float) -> str:
    """A difference, with a digit more where it would read as none.

    >>> signed(0.0374), signed(0.00044)
    ('+.037', '+.0004')
    """
    text = number(value, 4 if 0 < abs(value) < 0.0005 else 3)
    return text if value < 0 or math.isnan(value) else f"+{text}"


def study_table(study: Study) -> StudyTable:
    """The study's table, with intervals over texts and seeds where the cells' units are there."""
    numbers, units = Numbers(study.rows), study.units()
    baseline = study.baseline
    found: dict[str, list[Number | None]] = {}
    lines = []
    for line in summarize(study.rows):
        cell = _cell_of(line, study)
        label = line.label
        if line.mask == "none" and cell != MODEL_CELL:  # of one of two studies
            label = cell.replace(MODEL_CELL, line.label)
        lines.append((line, label))
        found[label] = [_number(column, cell, line.pooling, baseline, numbers, units) for column in COLUMNS]
    return StudyTable(lines, found)


def _cell_of(line: Line, study: Study) -> str:
    if line.mask == "none":
        return next(row.cell for row in study.rows if row.mask == "none")
    return line.label.removesuffix(f" + {line.pooling}")


def _number(
    column: Column,
    cell: str,
    pooling: str,
    baseline: str | None,
    numbers: Numbers,
    units: Mapping[str, Mapping[int, Mapping[str, Units]]],
) -> Number | None:
    where = {**dict(column.where), "pooling": pooling} if column.is_probing else {}
    if not column.is_probing and pooling != "mean":
        return None  # A cell's own numbers stand once, on its first line.
    rows = numbers.rows(cell, column.metric, where)
    value = numbers.mean(cell, column.metric, where)
    if column.less:
        value -= numbers.mean(cell, column.less, where)
    if not rows or math.isnan(value):
        return None
    slice = ";".join(f"{key}={said}" for key, said in where.items())
    of = f"{cell}|{column.metric}{'-' + column.less if column.less else ''}|{slice}"
    seeds = sorted({row.seed for row in rows})
    n = max(row.n for row in rows)
    counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}" + (f", n = {n:,}" if n > 1 else "")
    samples = [
        sample_of(units.get(cell, {}).get(seed, {}), pooling, column.metric, dict(column.where)) for seed in seeds
    ]
    low, high, how = math.nan, math.nan, ""
    if all(samples):
        nothing = [{name: Units(0 * one.top, 0 * one.bottom + 1) for name, one in own.items()} for own in samples]
        interval = _paired(samples, nothing)
        if interval is not None and abs(interval.effect - value) < 1e-6:
            low, high, how = interval.ci_low, interval.ci_high, "95 % interval over texts and seeds"
    if math.isnan(low) and len(rows) == 1 and math.isfinite(rows[0].ci_low) and not column.less:
        low, high, how = rows[0].ci_low, rows[0].ci_high, "95 % interval over texts"
    if math.isnan(low) and len(seeds) > 1 and column.metric != "d_sae":
        by_seed = _by_seed(column, cell, where, numbers)
        low, high, how = min(by_seed.values()), max(by_seed.values()), "from seed to seed"
    about = f"{how} {number(low)} to {number(high)}; {counted}" if how else f"no interval; {counted}"
    difference = ""
    if baseline is not None and (cell, pooling) != (baseline, "mean") and column.metric != "d_sae":
        difference = _difference(column, cell, pooling, baseline, samples, seeds, numbers, units)
    return Number(value, of, low, high, about, difference, column.digits)


def _paired(one: list, other: list) -> Difference | None:
    try:
        return paired_difference(one, other)
    except DegenerateResult:
        return None


def _by_seed(column: Column, cell: str, where: dict[str, str], numbers: Numbers) -> dict[int, float]:
    def of(metric: str) -> dict[int, float]:
        rows = numbers.rows(cell, metric, where)
        return {
            seed: float(np.mean([row.value for row in rows if row.seed == seed])) for seed in {row.seed for row in rows}
        }

    values, less = of(column.metric), of(column.less) if column.less else {}
    return {seed: value - less.get(seed, 0.0) for seed, value in values.items()}


def _difference(
    column: Column,
    cell: str,
    pooling: str,
    baseline: str,
    samples: list,
    seeds: list[int],
    numbers: Numbers,
    units: Mapping[str, Mapping[int, Mapping[str, Units]]],
) -> str:
    """To the baseline on the same seeds and texts; without units, seed by seed."""
    theirs = units.get(baseline, {})
    shared = [number for number, seed in enumerate(seeds) if seed in theirs]
    own = [samples[number] for number in shared]
    other = [sample_of(theirs[seeds[number]], "mean", column.metric, dict(column.where)) for number in shared]
    if shared and all(one and one.keys() == two.keys() for one, two in zip(own, other, strict=True)):
        found = _paired(own, other)
        if found is not None:
            return f"{signed(found.effect)} ({signed(found.ci_low)} to {signed(found.ci_high)})"
    where = {**dict(column.where), "pooling": pooling} if column.is_probing else {}
    base_where = {**where, "pooling": "mean"} if where else {}
    one, two = _by_seed(column, cell, where, numbers), _by_seed(column, baseline, base_where, numbers)
    each = [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]
    if not each or not all(map(math.isfinite, each)):
        return ""
    mean = sum(each) / len(each)
    return signed(mean) + (f" (seeds {signed(min(each))} to {signed(max(each))})" if len(each) > 1 else " (1 seed)")


def verdict_lines(study: Study) -> dict[str, Any]:
    """A line for each comparison, a column for each thing compared by; decided ones once more, better first."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for verdict in study.verdicts:
        lines.setdefault((verdict.label, verdict.against), {})[verdict.column] = verdict
    count = {word: sum(one.verdict == word for one in study.verdicts) for word in ("better", "worse", "no evidence")}
    decided = sorted(
        (one for one in study.verdicts if one.verdict != "no evidence"),
        key=lambda one: (
            one.verdict != "better",
            one.column in ("explained_variance", "ce_recovered"),
            one.p_corrected,
        ),
    )
    return {
        "decided": decided[:_MOST_DECIDED],
        "n_decided": len(decided),
        "columns": list(dict.fromkeys(verdict.column for verdict in study.verdicts)),
        "lines": lines,
        "count": count,
        "n_seeds": min((one.n_seeds for one in study.verdicts), default=0),
    }


def capped(study: Study) -> list[tuple[str, str, int, int]]:
    """Sizes that fell short of what the settings asked for: (what, metric's unit, asked, had)."""
    asked = next((cell.manifest.get("made_from", {}).get("evaluation", {}) for cell in study.cells), {})
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def note(what: str, unit: str, wanted: Any, had: int) -> None:
        if isinstance(wanted, int) and had < wanted:
            found[what, unit] = (wanted, had)

    for row in study.rows:
        where = parse_slice(row.slice)
        if row.metric == "order_accuracy":
            note(where.get("task", ""), "test groups", asked.get("order_test_groups"), row.n)
        if row.metric == "probe_accuracy" and "class" not in where and where.get("train", "").isdigit():
            note(where.get("dataset", ""), "training texts a probe", asked.get("probe_train"), int(where["train"]))
    return [(what, unit, *sizes) for (what, unit), sizes in sorted(found.items())]


def missing(study: Study, table: StudyTable) -> list[tuple[str, list[str]]]:
    """Columns of the table that a cell lacks (poolings of one, and the model itself, lack some by nature)."""
    found = []
    for line, label in table.lines:
        if line.mask == "none" or line.pooling != "mean":
            continue
        lacks = [column.name for column, one in zip(COLUMNS, table.numbers[label], strict=True) if one is None]
        if lacks:
            found.append((label, lacks))
    return found


def by_name(rows: Sequence[Row], metric: str, key: str) -> dict[str, Any]:
    """One table of a metric: columns are (task or dataset, k), a line for each cell and pooling."""
    found: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row.metric == metric and "class" not in (where := parse_slice(row.slice)):
            label = row.cell.replace(MODEL_CELL, "the model itself") if row.mask == "none" else row.cell
            label += "" if where["pooling"] == "mean" else f" + {where['pooling']}"
            found.setdefault(label, {}).setdefault((where[key], where["k"]), []).append(row)
    columns = list(dict.fromkeys(column for line in found.values() for column in line))
    names = list(dict.fromkeys(name for name, _ in columns))
    ks = list(dict.fromkeys(k for _, k in columns))
    columns = [(name, k) for name in names for k in ks]
    return {
        "names": names,
        "ks": ks,
        "lines": {
            label: [_of_rows(line.get(column, []), f"{key}={column[0]};k={column[1]}") for column in columns]
            for label, line in found.items()
        },
    }


TIES = (
    ("mean_openness", {}, "mean openness"),
    ("strictness", {}, "strictness"),
    ("retention", {}, "retention"),
    ("retention_chance", {}, "its chance"),
    ("profile_fidelity", {}, "profile fidelity"),
    ("position_information", {}, "position information"),
    ("position_bound_share", {}, "position-bound latents"),
    ("shift_position", {"mask": "on"}, "shift design: position"),
    ("shift_interaction", {"mask": "on"}, "shift design: interaction"),
    ("causal_specificity", {}, "causal specificity, nats"),
)


def ties(rows: Sequence[Row]) -> dict[str, list[Number | None]]:
    """What is known of each cell's ties to positions; means over seeds."""
    numbers = Numbers(rows)
    return {
        cell: [
            _of_rows(numbers.rows(cell, metric, where), ";".join(f"{key}={said}" for key, said in where.items()))
            for metric, where, _ in TIES
        ]
        for cell in dict.fromkeys(row.cell for row in rows if row.mask != "none")
    }


def _of_rows(rows: list[Row], slice: str) -> Number | None:
    values = [row.value for row in rows if not math.isnan(row.value)]
    if not values:
        return None
    low, high = min(row.ci_low for row in rows), max(row.ci_high for row in rows)
    what = "95 % interval" if len(rows) == 1 else f"{len(rows)} seeds, whose 95 % intervals reach from"
    about = f"{what} {number(low)} to {number(high)}, n = {rows[0].n:,}" if math.isfinite(low) else f"n = {rows[0].n:,}"
    pooling = parse_slice(rows[0].slice).get("pooling")
    where = f"{slice};pooling={pooling}" if pooling else slice
    return Number(sum(values) / len(values), f"{rows[0].cell}|{rows[0].metric}|{where}", low, high, about)


def controls(rows: Sequence[Row]) -> dict[str, Any]:
    """What else could have given order accuracies, by task: means over all cells, poolings and k, with their range."""
    tasks = list(dict.fromkeys(parse_slice(row.slice)["task"] for row in rows if row.metric == "order_bag_accuracy"))
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.metric in CONTROLS and math.isfinite(row.value):
            values.setdefault((row.metric, parse_slice(row.slice)["task"]), []).append(row.value)

    def of(metric: str, task: str) -> Number | None:
        found = values.get((metric, task))
        if not found:
            return None
        low, high = (min(found), max(found)) if len(found) > 1 else (math.nan, math.nan)
        return Number(sum(found) / len(found), f"*|{metric}|task={task}", low, high, f"mean and range of {len(found)}")

    return {
        "tasks": tasks,
        "lines": {title: [of(metric, task) for task in tasks] for metric, title in CONTROLS.items()},
    }


CONTROLS = {
    "order_bag_accuracy": "bag of words (exactly 1/K)",
    "order_edges": "first and last 3 tokens",
    "order_shuffled": "tokens shuffled at test time: mean and range over cells, poolings, k",
    "order_permuted": "labels permuted: mean and range over cells, poolings, k",
}
