"""Study folders as the page needs them. What cannot be read is left out, and said in a warning."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from posmask.errors import DamagedFolder
from posmask.folders import identity, read_manifest
from posmask.rows import Row, Units, parse_slice, read_rows, read_units
from posmask.verdicts import Verdict, read_verdicts

__all__ = ["MODEL_CELL", "CellFolder", "Numbers", "Study", "read_studies", "without_study"]

MODEL_CELL = "llm"
_BETWEEN = ": "  # between a study's name and a cell's, where a page holds two studies
Read = TypeVar("Read")


@dataclass(frozen=True, eq=False)
class CellFolder:
    """A finished cell whose files are what was written. `cell` is its name on the page."""

    cell: str
    seed: int
    path: Path
    manifest: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@dataclass
class Study:
    name: str
    root: Path
    rows: list[Row]
    verdicts: list[Verdict]
    cells: list[CellFolder]
    warnings: list[str]

    @property
    def seeds(self) -> list[int]:
        return sorted({row.seed for row in self.rows if row.mask != "none"})

    @property
    def n_saes(self) -> int:
        return len({(row.cell, row.seed) for row in self.rows if row.mask != "none"})

    @property
    def baseline(self) -> str | None:
        """The first cell whose mask is open, which the others are compared with."""
        return next((row.cell for row in self.rows if row.mask == "open"), None)

    @property
    def in_order(self) -> list[CellFolder]:
        """All cells as the table has them, each one's seeds in their order."""
        order = {name: number for number, name in enumerate(dict.fromkeys(row.cell for row in self.rows))}
        return sorted(self.cells, key=lambda cell: (order.get(cell.cell, len(order)), cell.cell, cell.seed))

    @property
    def pictured(self) -> list[CellFolder]:
        """Each cell's first seed."""
        first: dict[str, CellFolder] = {}
        for cell in self.in_order:
            first.setdefault(cell.cell, cell)
        return list(first.values())

    def units(self) -> dict[str, dict[int, dict[str, Units]]]:
        """What measures were drawn from, by cell and seed; without the cells that have none."""
        found: dict[str, dict[int, dict[str, Units]]] = {}
        for cell in self.cells:
            path = cell.path / "units.safetensors"
            if path.is_file():
                found.setdefault(cell.cell, {})[cell.seed] = read_units(path)
        return found


class Numbers:
    """The rows by cell and metric."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], list[tuple[dict[str, str], Row]]] = {}
        for row in rows:
            self._rows.setdefault((row.cell, row.metric), []).append((parse_slice(row.slice), row))

    def rows(self, cell: str, metric: str, where: dict[str, str]) -> list[Row]:
        """Those whose slice says this (overall ones, where it is empty), of no single class."""
        found = self._rows.get((cell, metric), [])
        if not where:
            return [row for slice, row in found if not slice]
        return [row for slice, row in found if "class" not in slice and where.items() <= slice.items()]

    def mean(self, cell: str, metric: str, where: dict[str, str]) -> float:
        """NaN where there is none; rows that are NaN themselves are left out."""
        values = [row.value for row in self.rows(cell, metric, where) if not math.isnan(row.value)]
        return sum(values) / len(values) if values else math.nan

    def by(self, cell: str, metric: str, key: str) -> dict[str, list[Row]]:
        """The rows that `key` in their slice tells apart."""
        found: dict[str, list[Row]] = {}
        for slice, row in self._rows.get((cell, metric), []):
            if key in slice and "class" not in slice:
                found.setdefault(slice[key], []).append(row)
        return found


def read_studies(roots: Sequence[Path]) -> list[Study]:
    """One study for each folder; of several, cells are called `study: cell`.

    Raises:
        DamagedFolder: one of them is no study's folder at all.
    """
    studies = [_read_study(root) for root in roots]
    if len(studies) == 1:
        return studies
    names: list[str] = []
    for study in studies:
        name, number = study.name, 2
        while name in names:
            name, number = f"{study.name} ({number})", number + 1
        names.append(name)
    return [_renamed(study, name) for study, name in zip(studies, names, strict=True)]


def without_study(cell: str) -> str:
    return cell.rpartition(_BETWEEN)[2]


def _renamed(study: Study, name: str) -> Study:
    def of(cell: str) -> str:
        return f"{name}{_BETWEEN}{cell}"

    return Study(
        name,
        study.root,
        [replace(row, cell=of(row.cell)) for row in study.rows],
        [replace(one, label=of(one.label), against=of(one.against)) for one in study.verdicts],
        [replace(cell, cell=of(cell.cell)) for cell in study.cells],
        [f"{name}: {warning}" for warning in study.warnings],
    )


def _read_study(root: Path) -> Study:
    results, folder = root / "results.csv", root / "cells"
    if not results.is_file() and not folder.is_dir():
        raise DamagedFolder(
            f"{root} holds neither results.csv nor cells: give the folder of a study that `posmask run` has begun"
        )
    warnings: list[str] = []
    cells: list[CellFolder] = []
    for path in sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        name, _, seed = path.name.rpartition("-seed")
        try:
            manifest = read_manifest(path, verify=True)
            cells.append(CellFolder(name, int(seed), path, manifest))
        except (DamagedFolder, ValueError, OSError) as error:
            said = str(error).replace(f"{root}/", "")  # A page travels; the path of this machine need not.
            warnings.append(f"cell {path.name} is left out of pictures and latents: {said}.")
    n_drafts = len(list(folder.glob(".*.draft-*"))) if folder.is_dir() else 0
    if n_drafts:
        warnings.append(
            f"Unfinished cells: {n_drafts}. They are being made, or died half-way; `posmask run` makes them anew."
        )
    if not cells:
        warnings.append("No finished cell lies in this folder: there are no pictures of masks, no curves, no latents.")
    rows = _tolerant(read_rows, results, warnings)
    if rows is None:
        rows = [row for cell in cells for row in _tolerant(read_rows, cell.path / "rows.csv", warnings) or []]
        baselines = root / "baselines" / "rows.csv"
        if baselines.is_file():
            rows = [*(_tolerant(read_rows, baselines, warnings) or []), *rows]
        warnings.append(f"Numbers are those of the {len(cells)} finished cells; `posmask run` writes results.csv.")
    made = {(cell.cell, cell.seed) for cell in cells}
    missing = {(row.cell, row.seed) for row in rows if row.mask != "none"} - made
    if missing and cells:
        named = ", ".join(f"{cell}-seed{seed}" for cell, seed in sorted(missing)[:6])
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        warnings.append(f"Without a readable folder, so in the tables only: {named}{more}.")
    verdicts = _tolerant(read_verdicts, root / "verdicts.csv", warnings) or []
    n_nan = sum(math.isnan(row.value) for row in rows if "position" not in parse_slice(row.slice))
    if n_nan:
        warnings.append(f"{n_nan} numbers of results.csv are NaN; they show as – and are in no mean.")
    changed = [cell for cell in cells if cell.manifest["identity"] != identity(cell.manifest.get("made_from", {}))]
    if changed:
        warnings.append(
            f"{len(changed)} cells were written by another version of posmask, whose numbers may be defined otherwise "
            f"({changed[0].path.name} first)."
        )
    return Study(root.resolve().name, root, rows, verdicts, cells, warnings)


def _tolerant(read: Callable[[Path], Read], path: Path, warnings: list[str]) -> Read | None:
    """What a file holds; a warning and None where it is missing or cannot be read."""
    try:
        return read(path)
    except FileNotFoundError:
        warnings.append(f"{path.name} is missing.")
    except (DamagedFolder, KeyError, TypeError, ValueError, OSError) as error:
        said = str(error).replace(str(path), path.name)[:120]  # a page tells nobody where it was made
        warnings.append(f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__}: {said}).")
    return None
