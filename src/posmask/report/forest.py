"""The forest table: every difference of a study as a mark on the scale of its column, grouped by what is compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posmask.report.reading import Study
from posmask.report.tables import StudyTable
from posmask.results.comparisons import Verdict
from posmask.results.rows import CONTROLS
from posmask.results.table import COLUMNS

__all__ = ["Forest", "ForestEntry", "ForestRow", "Mark", "forest_table"]

TRAINING, MASKS, UNMASKED, UNTRAINED, OTHER = (
    "Does training help? Masked SAEs against their controls",
    "Masked SAEs",
    "Unmasked SAEs: other poolings and sizes",
    "Controls of masks",
    "Other pairs",
)
"""Groups of rows, in the order of the table."""
_UNTESTED = [column.name for column in COLUMNS if column.metric.startswith("explained_variance")]
"""Columns that are also shown where no verdict exists: the other means of explained variance."""
_REACH = 40
"""A mark farther from zero than this many margins does not set the scale of its column,"""
_BEYOND = 3
"""nor does one of a control or pair that is this many times as far as the farthest SAE."""
_EDGE = 4
"""Distance of the ends of the scale from those of the picture, in percent of its width."""
Kind = Literal["better", "worse", "excludes-zero", "equivalent", "undecided", "untested"]


@dataclass(frozen=True)
class Mark:
    """A difference as a picture: places in percent of the column's width.

    Attributes:
        value: None if the value is off the scale.
        is_clipped: whether the interval continues below and above the scale.
    """

    low: float
    value: float | None
    high: float
    zero: float
    margin_low: float
    margin_high: float
    is_clipped: tuple[bool, bool]


@dataclass(frozen=True)
class ForestEntry:
    """A difference of the table.

    Attributes:
        kind: the verdict; an undecided one whose interval excludes zero is `excludes-zero`, and a difference without
            a verdict is `untested`.
        of: the verdict's `label|against|column`, or the rows of the number whose difference to the baseline it is.
        about: what it is based on, in words.
        mark: None if a number is not finite.
    """

    effect: float
    low: float
    high: float
    margin: float
    kind: Kind
    of: str
    about: str
    mark: Mark | None = None


@dataclass(frozen=True)
class ForestRow:
    """A row of the table: a cell against the baseline, or a pair.

    Attributes:
        cell: whose color the row has.
        n_seeds: number of common seeds; 0 if there is no verdict.
        entries: by column name.
    """

    label: str
    cell: str
    n_seeds: int
    entries: Mapping[str, ForestEntry]


@dataclass(frozen=True)
class Forest:
    """The table.

    Attributes:
        groups: rows by group, without empty groups.
        columns: names of the columns, and their headings.
        n_seeds: smallest number of seeds of a verdict.
    """

    baseline: str
    groups: Mapping[str, Sequence[ForestRow]]
    columns: Mapping[str, str]
    n_seeds: int

    @property
    def rows(self) -> list[ForestRow]:
        """The rows of all groups."""
        return [row for rows in self.groups.values() for row in rows]

    @property
    def has_untested(self) -> bool:
        """Whether the table has a difference without a verdict."""
        return any(entry.kind == "untested" for row in self.rows for entry in row.entries.values())

    @property
    def margins(self) -> str:
        """The margins of reconstruction and of accuracies, in words."""
        by_kind: dict[str, set[str]] = {}
        for row in self.rows:
            for name, entry in row.entries.items():
                kind = "accuracies" if "k=" in name else "reconstruction"
                by_kind.setdefault(kind, set()).add(f"{entry.margin:g}")
        return ", ".join(f"{' or '.join(sorted(margins))} for {kind}" for kind, margins in by_kind.items())


def forest_table(study: Study, table: StudyTable) -> Forest:
    """Return the verdicts of a study by group, pair and column, with their marks."""
    pairs: dict[tuple[str, str], dict[str, ForestEntry]] = {}
    n_seeds: dict[tuple[str, str], int] = {}
    for verdict in study.verdicts:
        pair = verdict.label, verdict.against
        pairs.setdefault(pair, {})[verdict.column] = _tested(verdict)
        n_seeds[pair] = verdict.n_seeds
    for (label, against), entries in pairs.items():
        if against == study.baseline and label in table.numbers:
            entries |= {name: entry for name, entry in _untested(table, label).items() if name not in entries}
    groups: dict[str, list[tuple[str, str]]] = {name: [] for name in (TRAINING, MASKS, UNMASKED, UNTRAINED, OTHER)}
    masks = {row.cell: row.mask for row in study.rows}
    for label, against in pairs:
        groups[_group_of(label, against, study.baseline, masks)].append((label, against))
    known = [column.name for column in COLUMNS]
    measured = list(dict.fromkeys(name for entries in pairs.values() for name in entries))
    columns = sorted(measured, key=lambda name: known.index(name) if name in known else len(known))
    for name in columns:
        _set_marks(name, pairs, [pair for group in (MASKS, UNMASKED) for pair in groups[group]])
    return Forest(
        baseline=study.baseline or "",
        groups={
            name: [
                ForestRow(
                    label if against == study.baseline else f"{label} vs. {against}",
                    label.partition(" + ")[0],
                    n_seeds[label, against],
                    pairs[label, against],
                )
                for label, against in group
            ]
            for name, group in groups.items()
            if group
        },
        columns={name: _title(name) for name in columns},
        n_seeds=min(n_seeds.values(), default=0),
    )


def _title(name: str) -> str:
    titles = {column.name: column.full_title for column in COLUMNS}
    return titles.get(name, name)


def _group_of(label: str, against: str, baseline: str | None, masks: Mapping[str, str]) -> str:
    cell, _, variant = label.partition(" + ")
    of_control = against.partition(" + ")
    if against != baseline:
        is_own = not variant and of_control[0] == cell and of_control[2] in CONTROLS
        return TRAINING if is_own else OTHER
    if variant in CONTROLS:
        return UNTRAINED
    return UNMASKED if masks.get(cell) == "open" else MASKS


def _tested(verdict: Verdict) -> ForestEntry:
    kind: Kind = verdict.verdict  # pyright: ignore[reportAssignmentType]  # one of `Outcome`
    if kind == "undecided" and verdict.ci_low * verdict.ci_high > 0:
        kind = "excludes-zero"
    about = (
        f"corrected p {verdict.p_corrected:.3g} of {verdict.n_comparisons} comparisons; {verdict.n_agree} of "
        f"{verdict.n_seeds} seed{'s' * (verdict.n_seeds != 1)} agree in sign"
    )
    if verdict.hypothesis:
        about += f"; hypothesis {verdict.hypothesis}, expected {verdict.expected}"
    of = f"{verdict.label}|{verdict.against}|{verdict.column}"
    return ForestEntry(verdict.effect, verdict.ci_low, verdict.ci_high, verdict.margin, kind, of, about)


def _untested(table: StudyTable, label: str) -> dict[str, ForestEntry]:
    entries = {}
    for column, number in zip(COLUMNS, table.numbers[label], strict=True):
        change = number and number.difference
        if column.name in _UNTESTED and number and change:
            about = f"not tested; {change.basis}; {number.about}"
            entries[column.name] = ForestEntry(
                change.effect, change.low, change.high, column.margin, "untested", number.of, about
            )
    return entries


def _set_marks(
    name: str, pairs: Mapping[tuple[str, str], dict[str, ForestEntry]], of_saes: Sequence[tuple[str, str]]
) -> None:
    """Set the marks of a column, on one scale that includes 0 and the margin.

    SAEs set the scale. A mark that is not on it has an arrow at its end.
    """
    finite = {pair: entries[name] for pair, entries in pairs.items() if name in entries and _is_finite(entries[name])}
    near = [_reach(finite[pair]) for pair in of_saes if pair in finite and _is_near(finite[pair])]
    farthest = _BEYOND * max(near) if near else math.inf
    scaled = [entry for entry in finite.values() if _is_near(entry) and _reach(entry) <= max(farthest, entry.margin)]
    low = min([0.0, *(min(entry.low, -entry.margin) for entry in scaled)])
    high = max([0.0, *(max(entry.high, entry.margin) for entry in scaled)])

    def place(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low or 1)
        return round(_EDGE + (100 - 2 * _EDGE) * share, 1)

    for pair, entry in finite.items():
        mark = Mark(
            low=place(entry.low),
            value=place(entry.effect) if low <= entry.effect <= high else None,
            high=place(entry.high),
            zero=place(0),
            margin_low=place(-entry.margin),
            margin_high=place(entry.margin),
            is_clipped=(entry.low < low, entry.high > high),
        )
        pairs[pair][name] = replace(entry, mark=mark)


def _is_finite(entry: ForestEntry) -> bool:
    return all(map(math.isfinite, (entry.effect, entry.low, entry.high)))


def _reach(entry: ForestEntry) -> float:
    return max(abs(entry.low), abs(entry.high))


def _is_near(entry: ForestEntry) -> bool:
    return not entry.margin or abs(entry.effect) <= _REACH * entry.margin
