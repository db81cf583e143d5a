"""The reported columns, and the table of a study: one line per cell with means over seeds, tasks and datasets.

`COLUMNS` is the only definition of what is reported and in which order. The table of the command line, the tables of
the page, the comparisons of cells and `docs/results` are derived from it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from posmask.results.rows import Row, parse_slice, variant_of

__all__ = [
    "COLUMNS",
    "COMPARED",
    "MIN_SEEDS",
    "MODEL_LABEL",
    "PRINTED",
    "SHOWN",
    "Column",
    "Line",
    "format_number",
    "format_signed",
    "missing_lines",
    "summarize",
]


MODEL_LABEL = "the model itself"
"""Label of the results that need no SAE."""


@dataclass(frozen=True)
class Column:
    """A reported number: the mean of a metric's rows whose slice contains `where`, minus that of the metric `minus`."""

    name: str
    """Unique; the column's name in `verdicts.csv`."""
    title: str
    """Heading on the page, unique within `group`."""
    group: str
    """Heading above the titles of neighboring columns."""
    metric: str
    where: Mapping[str, str] = field(default_factory=dict)
    """Required pairs of the slice; empty means the rows without a slice."""
    minus: str = ""
    """Metric that is subtracted, for example a chance level."""
    digits: int = 3
    """Decimals."""
    compared: bool = False
    """Whether cells are compared by it (`verdicts.csv`); more is better."""
    margin: float = 0.01
    """The smallest difference between cells that matters: smaller ones are equivalent."""
    heading: str = ""
    """Heading in narrow tables, two lines; empty leaves the column out of `PRINTED`."""

    @property
    def full_title(self) -> str:
        """The title, with the group where the title alone is ambiguous."""
        return f"{self.group}, {self.title}" if self.is_probing else self.title

    @property
    def is_probing(self) -> bool:
        """Whether it is the accuracy of probes, which also depends on the pooling."""
        return bool(self.where)


def _probing(name: str, group: str, metric: str, heading: str, **where: str) -> list[Column]:
    """Accuracies for probes on 1 and 5 latents, by which cells are compared. The page has other numbers by task."""
    return [
        Column(
            f"{name} k={k}",
            f"k = {k}",
            group,
            metric,
            {"k": str(k), **where},
            compared=True,
            heading=f"{heading}\nk={k}",
        )
        for k in (1, 5)
    ]


COLUMNS = [
    Column("latents", "latents", "", "d_sae", digits=0),
    Column(
        "explained_variance",
        "explained variance",
        "reconstruction",
        "explained_variance",
        compared=True,
        margin=0.005,
        heading="expl.\nvar.",
    ),
    Column(
        "explained_variance_median",
        "its median over positions",
        "reconstruction",
        "explained_variance_position_median",
        margin=0.005,
    ),
    Column(
        "explained_variance_sinks",
        "with attention sinks",
        "reconstruction",
        "explained_variance_with_sinks",
        margin=0.005,
    ),
    Column(
        "ce_recovered",
        "loss recovered",
        "reconstruction",
        "ce_recovered",
        compared=True,
        margin=0.005,
        heading="CE\nrec.",
    ),
    Column("dead", "dead", "reconstruction", "dead_share"),
    Column("retention_gain", "retention − chance", "ties to positions", "retention", minus="retention_chance"),
    Column("fidelity", "fidelity", "ties to positions", "profile_fidelity"),
    *_probing("block", "block order", "order_accuracy", "block", about="block"),
    *_probing("local", "local order", "order_accuracy", "local", about="local"),
    *_probing("probing", "standard probing", "probe_accuracy", "probe"),
]
"""Every reported column, in order."""

COMPARED = {column.name: column for column in COLUMNS if column.compared}
"""The columns that cells are compared by, by name."""

MIN_SEEDS = 3
"""Cells are compared on at least this many seeds."""

PRINTED = [column for column in COLUMNS if column.heading]
"""The columns of the tables in `docs/results` and on the cards of pushed SAEs."""

SHOWN = [
    COMPARED[name]
    for name in ("explained_variance", "ce_recovered", "block k=1", "block k=5", "local k=5", "probing k=5")
]
"""The numbers of the command line's table, which has eight columns: `cell`, `budget` and these. Cells are compared by
each of them."""


@dataclass(frozen=True)
class Line:
    """One line of the table: a cell at one pooling, or the model itself.

    Attributes:
        label: the cell, with ` + pooling` for a pooling other than the mean, or ` + control`.
        pooling: the pooling or control.
        is_control: whether it is a control of a masked cell.
        overall: means over seeds of every metric without a slice, by metric; NaN for a metric without rows.
        numbers: the reported numbers, by column name; NaN where the rows have no such number.
    """

    label: str
    pooling: str
    mask: str
    budget: str
    gating: str
    is_control: bool
    n_seeds: int
    overall: Mapping[str, float]
    numbers: Mapping[str, float]

    def printed(self, column: Column) -> bool:
        """Whether the column's number is on this line: a cell's other poolings have the same reconstruction."""
        return column.is_probing or self.pooling == "mean" or self.is_control


def summarize(rows: Sequence[Row]) -> list[Line]:
    """Return the lines of the table: cells in order of their rows, then their other poolings, then the model itself."""
    lines: dict[str, list[Line]] = {"cell": [], "pooled": [], "model": []}
    for cell in dict.fromkeys(row.cell for row in rows):
        cell_rows = [(row, parse_slice(row.slice)) for row in rows if row.cell == cell]
        poolings = list(dict.fromkeys(["mean", *(variant_of(slice) for _, slice in cell_rows)]))
        for pooling in poolings:
            line = _line(cell_rows, pooling)
            kind = "model" if line.mask == "none" else "cell" if pooling == "mean" else "pooled"
            lines[kind].append(line)
    return lines["cell"] + lines["pooled"] + lines["model"]


def _line(cell_rows: Sequence[tuple[Row, Mapping[str, str]]], pooling: str) -> Line:
    first = cell_rows[0][0]
    is_control = any(slice.get("control") == pooling for _, slice in cell_rows)
    without_slice = {"control": pooling} if is_control else {}
    by_metric: dict[str, list[float]] = {}
    for row, slice in cell_rows:
        if slice == without_slice:
            by_metric.setdefault(row.metric, []).append(row.value)
    means = {metric: _mean(values) for metric, values in by_metric.items()}
    numbers = {}
    for column in COLUMNS:
        if column.is_probing:
            wanted = {**column.where, "pooling": pooling}.items()
            numbers[column.name] = _mean(
                row.value
                for row, slice in cell_rows
                if row.metric == column.metric and wanted <= slice.items() and "class" not in slice
            )
        else:
            minus = means.get(column.minus, math.nan) if column.minus else 0
            numbers[column.name] = means.get(column.metric, math.nan) - minus
    name = MODEL_LABEL if first.mask == "none" else first.cell
    return Line(
        label=name if pooling == "mean" else f"{name} + {pooling}",
        pooling=pooling,
        mask=first.mask,
        budget=first.budget,
        gating=first.gating,
        is_control=is_control,
        n_seeds=len({row.seed for row, _ in cell_rows}),
        overall=defaultdict(lambda: math.nan, means),
        numbers=numbers,
    )


def missing_lines(rows: Iterable[Row]) -> list[str]:
    """Return a line per reason why metrics could not be computed, with the metrics and cells.

    >>> row = Row("open", "open", "width", "forward", 0, "retention", "", math.nan, math.nan, math.nan, 0, "too few")
    >>> missing_lines([row])
    ['Missing: retention of open (seed 0): too few.']
    """
    by_reason: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.reason:
            where = f"{row.metric} ({row.slice})" if row.slice else row.metric
            by_reason.setdefault(row.reason, {}).setdefault(f"{row.cell} (seed {row.seed})", []).append(where)
    lines = []
    for reason, by_cell in by_reason.items():
        metrics = list(dict.fromkeys(where for of_cell in by_cell.values() for where in of_cell))
        lines.append(f"Missing: {_few(metrics)} of {_few(list(by_cell))}: {reason}.")
    return lines


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def format_number(value: float, digits: int = 3) -> str:
    """Format a number for a table: a real minus sign, none for what reads as zero, a dash for NaN.

    >>> format_number(0.8264), format_number(2304, 0), format_number(-0.0002)
    ('0.826', '2,304', '0.000')
    """
    if math.isnan(value):
        return "–"
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def format_signed(value: float) -> str:
    """Format a difference with its sign, with a fourth decimal where three would read as zero.

    >>> format_signed(0.0374), format_signed(0.00044), format_signed(-0.00001)
    ('+0.037', '+0.0004', '0.000')
    """
    text = format_number(value, 4 if 0.00005 <= abs(value) < 0.0005 else 3)
    return f"+{text}" if value > 0 and float(text) else text
