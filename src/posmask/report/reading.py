"""Reads study folders for the page. Unreadable files are left out and named in warnings."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from posmask.errors import DamagedFolder
from posmask.results.comparisons import Verdict, read_verdicts
from posmask.results.rows import Row, Units, parse_slice, read_rows, read_rows_of, read_units
from posmask.storage import layout
from posmask.storage.layout import STUDY_FILE
from posmask.storage.manifest import identity, read_manifest
from posmask.storage.record import StudyRecord, read_record

__all__ = ["MODEL_CELL", "SEPARATOR", "CellFolder", "Numbers", "Study", "read_studies"]

MODEL_CELL = "llm"
"""Name of the model itself in the rows."""
SEPARATOR = ": "
"""Between the names of study and cell on a page of several studies."""
Read = TypeVar("Read")


@dataclass(frozen=True, eq=False)
class CellFolder:
    """A finished cell with one seed, whose files match its manifest. `cell` is its name on the page."""

    cell: str
    seed: int
    path: Path
    manifest: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether the cell was finished with this file; others of that name are not read."""
        return name in self.manifest["files"]

    @property
    def label(self) -> str:
        """Cell and seed, for people."""
        return f"{self.cell}, seed {self.seed}"


@dataclass
class Study:
    """The readable parts of a study folder."""

    name: str
    root: Path
    rows: list[Row]
    verdicts: list[Verdict]
    cells: list[CellFolder]
    warnings: list[str]
    baseline: str | None
    """The cell that the others are compared with; None if the folder does not record it."""

    @property
    def seeds(self) -> list[int]:
        """The seeds of trained cells."""
        return sorted({row.seed for row in self.rows if row.mask != "none"})

    @property
    def n_saes(self) -> int:
        """Number of trained SAEs."""
        return len({(row.cell, row.seed) for row in self.rows if row.mask != "none"})

    @property
    def in_order(self) -> list[CellFolder]:
        """All cell folders in the order of the table, then by seed."""
        order = {name: index for index, name in enumerate(dict.fromkeys(row.cell for row in self.rows))}
        return sorted(self.cells, key=lambda cell: (order.get(cell.cell, len(order)), cell.cell, cell.seed))

    @property
    def pictured(self) -> list[CellFolder]:
        """The first seed's folder of each cell."""
        first: dict[str, CellFolder] = {}
        for cell in self.in_order:
            first.setdefault(cell.cell, cell)
        return list(first.values())

    def units(self) -> dict[str, dict[int, dict[str, Units]]]:
        """Return the units of measures by cell and seed, without the cells that have no units."""
        units: dict[str, dict[int, dict[str, Units]]] = {}
        for cell in self.cells:
            if cell.has(layout.UNITS_FILE):
                of_cell = _tolerant(read_units, cell.path / layout.UNITS_FILE, self.warnings)
                if of_cell is not None:
                    units.setdefault(cell.cell, {})[cell.seed] = of_cell
        return units


class Numbers:
    """Rows, indexed by cell and metric."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], list[tuple[dict[str, str], Row]]] = {}
        for row in rows:
            self._rows.setdefault((row.cell, row.metric), []).append((parse_slice(row.slice), row))

    def rows(self, cell: str, metric: str, where: dict[str, str]) -> list[Row]:
        """Return the rows whose slice contains `where` and no class; the rows without a slice if `where` is empty."""
        rows = self._rows.get((cell, metric), [])
        if not where:
            return [row for slice, row in rows if not slice]
        return [row for slice, row in rows if "class" not in slice and where.items() <= slice.items()]

    def mean(self, cell: str, metric: str, where: dict[str, str]) -> float:
        """Return the mean of `rows`; NaN if there are none, or if one of them has no value."""
        values = [row.value for row in self.rows(cell, metric, where)]
        return sum(values) / len(values) if values else math.nan

    def by(self, cell: str, metric: str, key: str) -> dict[str, list[Row]]:
        """Return the rows by the value of `key` in their slice, without rows of single classes."""
        by_value: dict[str, list[Row]] = {}
        for slice, row in self._rows.get((cell, metric), []):
            if key in slice and "class" not in slice:
                by_value.setdefault(slice[key], []).append(row)
        return by_value


def read_studies(roots: Sequence[Path]) -> list[Study]:
    """Read one study per folder; with several folders, cells are renamed to `study: cell`.

    Raises:
        DamagedFolder: a folder is not a study's folder.
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


def _renamed(study: Study, name: str) -> Study:
    def full(cell: str) -> str:
        return f"{name}{SEPARATOR}{cell}"

    return Study(
        name,
        study.root,
        [replace(row, cell=full(row.cell)) for row in study.rows],
        [replace(v, label=full(v.label), against=full(v.against)) for v in study.verdicts],
        [replace(cell, cell=full(cell.cell)) for cell in study.cells],
        [f"{name}: {warning}" for warning in study.warnings],
        None if study.baseline is None else full(study.baseline),
    )


def _read_study(root: Path) -> Study:
    results, folder = root / layout.RESULTS_FILE, layout.cells_folder(root)
    if not results.is_file() and (root / "results.csv.zst").is_file():
        results = root / "results.csv.zst"
    has_run = results.is_file() or folder.is_dir()
    if not has_run and not layout.evaluated_folders(root).is_dir():
        raise DamagedFolder(
            f"{root} has neither results.csv nor cells nor evaluated SAEs: give the folder of a study that `posmask "
            "run` started or that `posmask evaluate` wrote to"
        )
    warnings: list[str] = []
    record = _record(root, warnings) if has_run else None
    finished = _finished(root, record, warnings) if has_run else _Finished([], {}, set())
    cells = finished.cells
    if has_run:
        rows, is_current = _joined(results, finished, record, warnings)
    else:
        rows, is_current = _baseline_rows(root, None, warnings) or [], False
    readable = {(cell.cell, cell.seed) for cell in cells}
    missing = {(row.cell, row.seed) for row in rows if row.mask != "none"} - readable
    evaluated, rows_of_evaluated = _evaluated(root, record, {row.cell for row in rows}, warnings)
    cells, rows = [*cells, *evaluated], [*rows, *rows_of_evaluated]
    if missing and cells:
        names = _first_few([layout.cell_label(cell, seed) for cell, seed in sorted(missing)])
        warnings.append(f"In the tables only, because the folder is missing or unreadable: {names}.")
    known = {row.cell for row in rows}
    found = _tolerant(read_verdicts, root / layout.VERDICTS_FILE, warnings) if is_current else None
    verdicts = [
        verdict
        for verdict in found or []
        if {label.partition(" + ")[0] for label in (verdict.label, verdict.against)} <= known
    ]
    n_nan = sum(math.isnan(row.value) for row in rows if "position" not in parse_slice(row.slice) and not row.reason)
    if n_nan:
        warnings.append(f"{n_nan} numbers of {results.name} are NaN; they and means that need them are shown as –.")
    changed = [cell for cell in cells if cell.manifest["identity"] != identity(cell.manifest.get("made_from", {}))]
    if changed:
        warnings.append(
            f"{len(changed)} cells were written by another version of posmask, which may define metrics differently "
            f"(the first is {changed[0].path.name})."
        )
    baseline = None if record is None else record.baseline
    return Study(root.resolve().name, root, rows, verdicts, cells, warnings, baseline)


def _record(root: Path, warnings: list[str]) -> StudyRecord | None:
    try:
        record = read_record(root)
    except DamagedFolder as error:
        warnings.append(f"{str(error).replace(f'{root}/', '')}.")
        return None
    if record is None:
        warnings.append(
            f"{STUDY_FILE} is missing, so folders cannot be compared with the study's settings and no cell is the "
            "baseline; `posmask run` writes it."
        )
    return record


@dataclass(frozen=True)
class _Finished:
    """The finished folders that belong to a study.

    Attributes:
        cells: the cells.
        rows: of the cells and the baselines, by label.
        excluded: labels of folders that were made from other settings.
    """

    cells: list[CellFolder]
    rows: dict[str, list[Row]]
    excluded: set[str]


def _joined(
    results: Path, finished: _Finished, record: StudyRecord | None, warnings: list[str]
) -> tuple[list[Row], bool]:
    """The rows of a study, and whether its joined tables are those of its folders.

    The rows are those of results.csv if it agrees with every finished folder, else those of the folders.
    """
    table = _tolerant(read_rows, results, warnings)
    of_folders = [row for rows in finished.rows.values() for row in rows]
    if table is None:
        n_cells = len(finished.cells)
        warnings.append(f"The numbers are those of the {n_cells} finished cells; `posmask run` writes results.csv.")
        return of_folders, True
    by_label: dict[str, list[Row]] = {}
    for row in table:
        by_label.setdefault(_label_of(row), []).append(row)
    if other := [label for label, rows in finished.rows.items() if not _are_equal(rows, by_label.get(label, []))]:
        warnings.append(
            f"{results.name} has other numbers than the folders of {_first_few(other)}: all numbers are those of the "
            "folders, and verdicts are left out; `posmask run` writes both tables again."
        )
        return of_folders, False
    listed = by_label.keys() if record is None else {layout.BASELINES, *record.folders}
    left_out = finished.excluded | (by_label.keys() - listed)
    return [row for label, rows in by_label.items() if label not in left_out for row in rows], True


def _label_of(row: Row) -> str:
    return layout.BASELINES if row.mask == "none" else layout.cell_label(row.cell, row.seed)


def _are_equal(rows: Sequence[Row], others: Sequence[Row]) -> bool:
    """Whether two tables have the same rows, NaN being equal to NaN."""
    return len(rows) == len(others) and all(
        row == other or repr(row) == repr(other) for row, other in zip(rows, others, strict=True)
    )


def _finished(root: Path, record: StudyRecord | None, warnings: list[str]) -> _Finished:
    """Read the finished folders of the study; other folders in `root/cells` are named in warnings."""
    folder = layout.cells_folder(root)
    cells: list[CellFolder] = []
    rows: dict[str, list[Row]] = {}
    not_listed, other_settings = [], []
    of_baselines = _baseline_rows(root, record, warnings)
    if of_baselines:
        rows[layout.BASELINES] = of_baselines
    for path in sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        if record is not None and path.name not in record.folders:
            not_listed.append(path.name)
            continue
        try:
            name, seed = layout.parse_cell_label(path.name)
            manifest = read_manifest(path, verify=True)
            if record is not None and manifest["identity"] != record.folders[path.name]:
                other_settings.append(path.name)
                continue
            if layout.ROWS_FILE in manifest["files"]:
                rows[path.name] = read_rows_of(path / layout.ROWS_FILE, name, seed)
            cells.append(CellFolder(name, seed, path, manifest))
        except (DamagedFolder, ValueError, OSError) as error:
            reason = str(error).replace(f"{root}/", "")  # Pages are shared, so they have no paths of this machine.
            warnings.append(f"Cell {path.name} is left out of figures and latents: {reason}.")
    if not_listed:
        warnings.append(f"Excluded, no longer cells of this study: {_first_few(not_listed)}.")
    if other_settings:
        warnings.append(
            f"Excluded, made from other settings than the study has now: {_first_few(other_settings)}; `posmask run` "
            "recomputes them."
        )
    n_drafts = len(list(folder.glob(".*.draft-*"))) if folder.is_dir() else 0
    if n_drafts:
        warnings.append(
            f"Unfinished cells: {n_drafts}. They are running or were interrupted; `posmask run` recomputes the latter."
        )
    if not cells:
        what = "" if layout.kept_latents_folder(root).is_dir() else " and no latents"
        warnings.append(f"The folder has no finished cell, so there are no figures of masks or training{what}.")
    excluded = {*other_settings, *([layout.BASELINES] if of_baselines is None else [])}
    return _Finished(cells, rows, excluded)


def _evaluated(
    root: Path, record: StudyRecord | None, taken: set[str], warnings: list[str]
) -> tuple[list[CellFolder], list[Row]]:
    """The SAEs that `posmask evaluate` measured with the study's settings, and their rows.

    Args:
        taken: names of cells; an SAE of such a name is called "NAME (evaluated)".
    """
    cells, rows, other_settings = [], [], []
    parent, baselines = layout.evaluated_folders(root), _identity_of_baselines(root, record)
    for path in sorted(parent.glob("[!.]*")) if parent.is_dir() else []:
        try:
            manifest = read_manifest(path, verify=True)
            made_from = manifest.get("made_from", {})
            if identity({key: value for key, value in made_from.items() if key != "sae"}) != baselines:
                other_settings.append(path.name)
                continue
            if layout.OPENNESS_FILE not in manifest["files"]:
                raise DamagedFolder("it was written by an earlier version; remove it and evaluate the SAE again")
            of_sae = read_rows_of(path / layout.ROWS_FILE, path.name, 0)
        except (DamagedFolder, ValueError, OSError) as error:
            warnings.append(f"Evaluated SAE {path.name} is left out: {str(error).replace(f'{root}/', '')}.")
            continue
        name = f"{path.name} (evaluated)" if path.name in taken else path.name
        cells.append(CellFolder(name, 0, path, manifest))
        rows += [replace(row, cell=name) for row in of_sae]
    if other_settings:
        warnings.append(
            f"Excluded, evaluated with other settings than the study has now: {_first_few(other_settings)}; `posmask "
            "evaluate` measures them again."
        )
    return cells, rows


def _identity_of_baselines(root: Path, record: StudyRecord | None) -> str | None:
    """The identity of the settings that all results of a study share."""
    if record is not None:
        return record.folders.get(layout.BASELINES)
    try:
        return read_manifest(layout.cell_folder(root, layout.BASELINES))["identity"]
    except DamagedFolder:
        return None


def _first_few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{', '.join(names[:6])}{more}"


def _baseline_rows(root: Path, record: StudyRecord | None, warnings: list[str]) -> list[Row] | None:
    """Rows of the model itself; None if they were made from other settings."""
    folder = layout.cell_folder(root, layout.BASELINES)
    if not folder.is_dir():
        return []
    try:
        manifest = read_manifest(folder, verify=True)
    except DamagedFolder as error:
        warnings.append(f"The baselines are left out: {str(error).replace(f'{root}/', '')}.")
        return []
    if record is not None and manifest["identity"] != record.folders.get(layout.BASELINES):
        warnings.append("Excluded, made from other settings than the study has now: baselines.")
        return None
    return _tolerant(lambda path: read_rows_of(path, MODEL_CELL, 0), folder / layout.ROWS_FILE, warnings) or []


def _tolerant(read: Callable[[Path], Read], path: Path, warnings: list[str]) -> Read | None:
    """The file's content; None and a warning if it is missing or unreadable."""
    try:
        return read(path)
    except FileNotFoundError:
        warnings.append(f"{path.name} is missing.")
    except (DamagedFolder, KeyError, TypeError, ValueError, OSError) as error:
        reason = str(error).replace(str(path), path.name)[:120]
        warnings.append(f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__}: {reason}).")
    return None
