"""Results as rows of one long table; `slice` says what a number is about (position, task, k), not the column names."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from posmask.errors import DamagedFolder, DegenerateResult, first_line
from posmask.storage.compressed import unpacked

__all__ = [
    "CONTROLS",
    "Measure",
    "Row",
    "Units",
    "header_of",
    "measured",
    "missing",
    "parse_slice",
    "read_records",
    "read_rows",
    "read_rows_of",
    "read_units",
    "slice_text",
    "variant_of",
    "write_records",
    "write_rows",
    "write_units",
]


CONTROLS = {
    "zero-step": "its mask on the unmasked SAE, without training",
    "matched": "the unmasked SAE's codes, pooled by its mask",
    "re-tied": "trained copies of a latent replaced by their mean",
}
"""The controls of a masked cell and what they are."""


@dataclass(frozen=True, eq=False)
class Units:
    """Numerator and denominator of a measure for each unit [unit]; the measure is sum(top) / sum(bottom).

    Units are the independently drawn texts or groups of texts. The same measure of another cell has the same units in
    the same order, so that the two can be paired.
    """

    top: np.ndarray
    bottom: np.ndarray


@dataclass(frozen=True)
class Measure:
    """One number of a metric, not yet assigned to a cell.

    Attributes:
        ci_low: lower bound of the 95 % interval; NaN if none was computed.
        ci_high: upper bound of the 95 % interval.
        n: number of kept tokens, test texts or latents behind the number, depending on the metric.
        slice: what the number is about, for example a position or a task; None: the metric as a whole.
        units: numerator and denominator per unit, for paired comparisons.
        reason: why the metric could not be computed; empty if it was.
    """

    metric: str
    value: float
    ci_low: float = math.nan
    ci_high: float = math.nan
    n: int = 0
    slice: Mapping[str, object] | None = None
    units: Units | None = None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A measure of one cell; the fields are the columns of `rows.csv` and `results.csv`, in order."""

    cell: str
    mask: str
    budget: str
    gating: str
    seed: int
    metric: str
    slice: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    reason: str = ""

    @classmethod
    def of(cls, measure: Measure, *, cell: str, mask: str, budget: str, gating: str, seed: int) -> "Row":
        """Return the row of a cell's measure."""
        return cls(
            cell=cell,
            mask=mask,
            budget=budget,
            gating=gating,
            seed=seed,
            metric=measure.metric,
            slice=slice_text(measure.slice or {}),
            value=float(measure.value),
            ci_low=float(measure.ci_low),
            ci_high=float(measure.ci_high),
            n=int(measure.n),
            reason=measure.reason,
        )

    def measure(self, units: Mapping[str, Units]) -> Measure:
        """Return the measure of this row; the values of its slice are text.

        Args:
            units: of the cell, as `read_units` returns them.
        """
        return Measure(
            self.metric,
            self.value,
            self.ci_low,
            self.ci_high,
            self.n,
            parse_slice(self.slice) or None,
            units.get(f"{self.metric}|{self.slice}"),
            self.reason,
        )


def measured(
    metrics: Iterable[str],
    compute: Callable[..., list[Measure]],
    *arguments: Any,
    slices: Iterable[Mapping[str, object] | None] = (None,),
) -> list[Measure]:
    """Return `compute(*arguments)`; if it raises DegenerateResult, measures without a value.

    Args:
        metrics: the metrics that are missing then.
        slices: the slices in which each of them is missing.
    """
    try:
        return compute(*arguments)
    except DegenerateResult as error:
        return missing(str(error), metrics, slices)


def missing(
    reason: str, metrics: Iterable[str], slices: Iterable[Mapping[str, object] | None] = (None,)
) -> list[Measure]:
    """Return measures without a value: each metric in each slice, with the reason."""
    names = list(metrics)
    return [Measure(metric, math.nan, slice=where, reason=reason) for where in slices for metric in names]


def slice_text(slice: Mapping[str, object]) -> str:
    """Return a slice as text: key=value pairs joined by semicolons."""
    return ";".join(f"{key}={value}" for key, value in slice.items())


def parse_slice(text: str) -> dict[str, str]:
    """Return the key=value pairs of a row's slice.

    >>> parse_slice("task=chronology;k=5")
    {'task': 'chronology', 'k': '5'}
    """
    return dict(part.split("=", 1) for part in text.split(";")) if text else {}


def variant_of(slice: Mapping[str, str]) -> str:
    """Return which codes of a cell a number is about: a pooling or a control; `mean` for the cell's own numbers.

    >>> variant_of({"task": "chronology", "pooling": "segments8"}), variant_of({"control": "re-tied"}), variant_of({})
    ('segments8', 're-tied', 'mean')
    """
    return slice.get("control") or slice.get("pooling", "mean")


Record = TypeVar("Record")


def header_of(kind: type[Record]) -> bytes:
    """Return how a table begins: its required columns, which identify a file as written by posmask."""
    return ",".join(field.name for field in fields(kind) if field.default is MISSING).encode()  # type: ignore[arg-type]


def write_records(path: Path, kind: type[Record], records: Iterable[Record]) -> None:
    """Write dataclass instances as CSV with one column per field. Floats keep every digit."""
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)  # type: ignore[call-overload]


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Read a table that `write_records` wrote; a path that ends in `.zst` is decompressed first.

    Columns with a default may be missing, as in tables of earlier versions.

    Raises:
        DamagedFolder: a line does not have the fields of `kind`, or the `.zst` file is damaged or too large.
    """
    data = _decompressed(path) if path.suffix == ".zst" else path.read_bytes()
    try:
        with io.TextIOWrapper(io.BytesIO(data), newline="", encoding="utf8") as file:
            return [
                kind(
                    **{
                        field.name: field.type(line[field.name])  # type: ignore[operator]
                        for field in fields(kind)  # type: ignore[arg-type]
                        if field.name in line or field.default is MISSING
                    }
                )
                for line in csv.DictReader(file)
            ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DamagedFolder(
            f"{path} is not a table of posmask's ({first_line(error)}): `posmask run` writes it again"
        ) from None


def _decompressed(path: Path) -> bytes:
    try:
        return b"".join(unpacked(path))
    except ValueError as error:
        raise DamagedFolder(
            f"{path} cannot be decompressed ({first_line(error)}): restore the file, or unpack it with `zstd -d`"
        ) from None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows.csv` or `results.csv`."""
    write_records(path, Row, rows)


def read_rows(path: Path) -> list[Row]:
    """Read `rows.csv`, `results.csv` or a compressed `.csv.zst`.

    Raises:
        DamagedFolder: the file is not a table of rows, or the `.zst` file is damaged or too large.
    """
    rows = read_records(path, Row)
    for text in {row.slice for row in rows}:
        try:
            parse_slice(text)
        except ValueError:
            raise DamagedFolder(
                f"{path} holds the slice {first_line(text)!r}, not key=value pairs: `posmask run` writes it again"
            ) from None
    return rows


def read_rows_of(path: Path, cell: str, seed: int) -> list[Row]:
    """Read the `rows.csv` of a cell.

    Raises:
        DamagedFolder: as `read_rows`, or rows are of another cell or seed.
    """
    rows = read_rows(path)
    if others := {(row.cell, row.seed) for row in rows} - {(cell, seed)}:
        other, other_seed = min(others)
        raise DamagedFolder(
            f"{path} holds rows of {other!r} with seed {other_seed}, not only of {cell!r} with seed {seed}: move the "
            "folder away, `posmask run` makes it again"
        )
    return rows


def write_units(path: Path, measures: Iterable[Measure]) -> None:
    """Write the units of the measures that have units, keyed by `metric|slice`, as `units.safetensors`."""
    save_file(
        {
            f"{measure.metric}|{slice_text(measure.slice or {})}": np.stack([measure.units.top, measure.units.bottom])
            for measure in measures
            if measure.units is not None
        },
        path,
    )


def read_units(path: Path) -> dict[str, Units]:
    """Read units by `metric|slice`.

    Raises:
        DamagedFolder: the file is not what `write_units` writes.
    """
    try:
        pairs = load_file(path)
        for name, pair in pairs.items():
            parse_slice(name.partition("|")[2])
            if pair.ndim != 2 or len(pair) != 2 or pair.dtype.kind != "f" or not pair.size:
                raise ValueError(f"{name} has the shape {list(pair.shape)} of {pair.dtype}")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DamagedFolder(
            f"{path} cannot be read ({first_line(error)}): move the folder away, `posmask run` makes it again"
        ) from None
    return {name: Units(top, bottom) for name, (top, bottom) in pairs.items()}
