"""Writes the page: verdicts first, then tables, figures, single latents, and the source of every number."""

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posmask.report import browser as latents
from posmask.report import figures, tables
from posmask.report.forest import forest_table
from posmask.report.kept_latents import read_kept_latents
from posmask.report.reading import CellFolder, Study, read_studies
from posmask.report.rendering import chart_blocks, render, zipped
from posmask.report.settings_tables import settings_tables, shared_settings
from posmask.report.terms import terms, variants
from posmask.results.comparisons import LEVEL
from posmask.results.finding import headline
from posmask.results.rows import Row
from posmask.results.table import COLUMNS, MIN_SEEDS, missing_lines
from posmask.storage.atomic import check_file, replacing
from posmask.storage.json_file import read_json
from posmask.storage.layout import PAGE_MARK, REPORT_FILE, SAE_FILE
from posmask.storage.manifest import check_folder, write_folder

__all__ = ["N_LATENTS", "write_paper_figures", "write_report", "write_report_folder"]

N_LATENTS = 500
"""Default number of latents per cell on a self-contained page."""

_CONCENTRATED = 0.1
"""The page warns if 1 % of the tokens carry a larger share of the variance."""


def write_report(*roots: Path, n_latents: int = N_LATENTS, out: Path | None = None) -> Path:
    """Write one self-contained page and return its path: `report.html` in the first folder, or `out`.

    Damaged files and cells are left out, and the page lists them.

    Args:
        roots: one or several study folders.
        n_latents: number of latents to keep per cell, the most informative ones.
        out: the file to write.

    Raises:
        DamagedFolder: a folder has neither results nor cells.
        BadSetting: the file to write exists and is not a page that posmask wrote.
        OutOfMemory: see `call_vl_convert`.
    """
    path = out or roots[0] / REPORT_FILE
    check_file(path, PAGE_MARK)
    page, blocks = _page(read_studies(roots), n_latents)
    html = render("page", page, blocks)
    with replacing(path, PAGE_MARK) as beside:
        beside.write_text(html, encoding="utf8")
    return path


def write_report_folder(*roots: Path, out: Path | None = None) -> Path:
    """Write a folder with a page of all latents and return it: `report` in the first folder, or `out`.

    `page_server` serves the folder. A folder that an earlier call wrote is replaced.

    Args:
        roots: one or several study folders.
        out: the folder to write.

    Raises:
        DamagedFolder: a folder of `roots` has neither results nor cells.
        BadSetting: the folder to write contains something that posmask did not write.
    """
    folder = out or roots[0] / "report"
    check_folder(folder, ("what", "title", "version"))
    page, blocks = _page(read_studies(roots), None)
    with write_folder(folder, {"what": "report", "title": page["title"], "version": page["version"]}) as draft:
        (draft / "data").mkdir()
        for name in [name for name in blocks if name.startswith(("cell-", "texts-"))]:
            (draft / "data" / f"{name}.gz").write_bytes(blocks.pop(name))
        (draft / "index.html").write_text(render("page", page | {"fetches": True}, blocks), encoding="utf8")
    return folder


def write_paper_figures(*roots: Path, folder: Path) -> list[Path]:
    """Write every chart of the page as SVG and PDF; return the paths.

    Args:
        roots: one or several study folders.
        folder: the folder to write to.

    Raises:
        DamagedFolder: a folder of `roots` has neither results nor cells.
        BadSetting: a file to write exists and was not written by posmask.
    """
    charts, _ = _charts(read_studies(roots))
    return figures.write_figures(charts, folder)


def _charts(studies: Sequence[Study]) -> tuple[dict[str, figures.Figure], list[tables.StudyTable]]:
    study_tables = [tables.study_table(study) for study in studies]
    pictured = [cell for study in studies for cell in study.pictured]
    charts = figures.figures(_rows(studies), study_tables, pictured, _baselines(studies), studies[0].warnings)
    return charts, study_tables


def _page(studies: Sequence[Study], n_latents: int | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The template's variables, and the blocks of data that scripts decode on demand."""
    charts, study_tables = _charts(studies)
    all_cells = [cell for study in studies for cell in study.in_order]
    shown = [cell for study in studies for cell in study.pictured] if n_latents else all_cells
    browsed = latents.browser(shown, all_cells, n_latents, studies[0].warnings)
    if is_kept := not all_cells and len(studies) == 1:
        browsed = read_kept_latents(studies[0].root, studies[0].warnings)
    rows = _rows(studies)
    cells = list(dict.fromkeys(row.cell for row in rows if row.mask != "none"))
    measured = _measured(study_tables)
    facts = _facts(studies, study_tables, measured, cells) | {"latents": browsed.cells}
    page = {
        "title": " and ".join(study.name for study in studies),
        "studies": [_study(study, table) for study, table in zip(studies, study_tables, strict=True)],
        "several": len(studies) > 1,
        "columns": [COLUMNS[index] for index in measured],
        "measured": measured,
        "colors": facts["colors"],
        "variants": variants(label for table in study_tables for label in table.numbers),
        "terms": terms(rows, (COLUMNS[index].name for index in measured)),
        "tie_columns": [title for _, _, title in tables.TIES],
        "ties": tables.ties(rows),
        "tasks": tables.accuracies(rows, "order_accuracy", "task"),
        "datasets": tables.accuracies(rows, "probe_accuracy", "dataset"),
        "controls": tables.controls(rows),
        "controls_of": partial(tables.controls_of, tables.controls(rows)),
        "has_fair": any(line.pooling == "fair" for table in study_tables for line, _ in table.lines),
        "concentrated": [row for row in rows if row.metric == "top_variance_share" and row.value > _CONCENTRATED],
        "steady_l0": figures.steady(rows, "l0"),
        "charts": list(charts),
        "cells": cells,
        "browsed": browsed.cells,
        "n_latents": n_latents and max((cell["kept"] for cell in browsed.cells), default=0),
        "all_latents": "" if is_kept else "posmask report DIR --all",
        "level": LEVEL,
        "min_seeds": MIN_SEEDS,
        "warnings": list(dict.fromkeys(warning for study in studies for warning in study.warnings)),
        "version": importlib.metadata.version("posmask"),
    }
    return page, {"page": zipped(json.dumps(facts, allow_nan=False))} | chart_blocks(charts) | browsed.blocks


def _measured(study_tables: Sequence[tables.StudyTable]) -> list[int]:
    """The indices of the columns of which a study has a number."""
    every = [numbers for table in study_tables for numbers in table.numbers.values()]
    return [index for index in range(len(COLUMNS)) if any(numbers[index] is not None for numbers in every)]


def _facts(
    studies: Sequence[Study], study_tables: Sequence[tables.StudyTable], measured: list[int], cells: list[str]
) -> dict[str, Any]:
    """What the page's script needs of tables, verdicts and cells."""

    def shown(number: tables.Number | None) -> list[Any] | None:
        return None if number is None else [number.value, number.text, number.interval]

    columns = [COLUMNS[index] for index in measured]
    return {
        "columns": [column.full_title for column in columns],
        "digits": [column.digits for column in columns],
        "numbers": {
            label: [shown(numbers[index]) for index in measured]
            for table in study_tables
            for label, numbers in table.numbers.items()
        },
        "verdicts": [
            [v.label, v.against, v.column, v.effect, v.ci_low, v.ci_high, v.verdict]
            for study in studies
            for v in study.verdicts
            if all(map(math.isfinite, (v.effect, v.ci_low, v.ci_high)))
        ],
        "compared": {column.name: index for index, column in enumerate(columns) if column.compared},
        "cells": cells,
        "baselines": _baselines(studies),
        "picked": _picked(studies, cells),
        "colors": figures.cell_colors(_rows(studies)),
    }


def _study(study: Study, table: tables.StudyTable) -> dict[str, Any]:
    heldout = (row.n for row in study.rows if row.metric == "explained_variance" and not row.slice)
    return {
        "study": study,
        "table": table,
        "about": _about(study, next(heldout, 0)),
        "findings": headline(study.verdicts, study.baseline),
        "forest": forest_table(study, table),
        "capped": tables.capped(study),
        "missing": tables.missing(study, table),
        "not_computed": missing_lines(study.rows),
        "settings": settings_tables(study),
        "folders": [_folder(cell, study) for cell in study.cells],
    }


def _about(study: Study, n_heldout: int) -> list[str]:
    """What the study is of: model, site, rule, sizes and seeds, as far as the cell folders say."""
    settings, parts = shared_settings(study), []
    model = settings.get("model")
    if isinstance(model, dict) and "layer" in model:
        parts.append(f"{_model_name(study).removeprefix('embedded:')}, after layer {model['layer']}")
    parts += _rules(study)
    parts += _widths(study)
    tokens = {row.value for row in study.rows if row.metric == "train_tokens"}
    if tokens:
        parts.append(f"{max(tokens):,.0f} training tokens")
    parts.append(f"{n_heldout:,} held-out tokens")
    n_seeds = len(study.seeds)
    parts.append(f"{n_seeds} seed{'s' * (n_seeds != 1)} ({', '.join(map(str, study.seeds))})")
    return [*parts, f"{study.n_saes} trained SAEs"]


def _widths(study: Study) -> list[str]:
    """Number of latents of the baseline, or of the first cell, and those of the cells with another number."""
    by_cell = {row.cell: row.value for row in study.rows if row.metric == "d_sae"}
    if not by_cell:
        return []
    usual = by_cell.get(study.baseline or "", next(iter(by_cell.values())))
    others = [f"{cell} {n_latents:,.0f}" for cell, n_latents in by_cell.items() if n_latents != usual]
    return [f"{usual:,.0f} latents" + (f" ({', '.join(others)})" if others else "")]


def _rules(study: Study) -> list[str]:
    """The rule of the baseline, or of the first cell, and those of the cells with another one or a position bias."""
    by_cell: dict[str, str] = {}
    for cell in study.cells:
        with contextlib.suppress(KeyError, TypeError):
            rule = cell.manifest["made_from"]["sae"]["rule"]
            k = f", k = {rule['k']}" if "k" in rule else ""
            bias = cell.manifest["made_from"]["cell"].get("position_bias")
            by_cell[cell.cell] = f"{rule['kind']}{k}{f', position bias {bias}' if bias else ''}"
    if not by_cell:
        return []
    usual = by_cell.get(study.baseline or "", next(iter(by_cell.values())))
    return [usual, *(f"{cell}: {rule}" for cell, rule in by_cell.items() if rule != usual)]


def _model_name(study: Study) -> str:
    for cell in study.cells:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(read_json(cell.path / SAE_FILE)["origin"]["model"])
    return "a model"


def _rows(studies: Sequence[Study]) -> list[Row]:
    return [row for study in studies for row in study.rows]


def _baselines(studies: Sequence[Study]) -> list[str]:
    return [study.baseline for study in studies if study.baseline is not None]


def _picked(studies: Sequence[Study], cells: list[str]) -> list[str]:
    """The cells that charts show first: the baselines and the first seven others."""
    baselines = _baselines(studies)
    others = [cell for cell in cells if cell not in baselines][:7]
    return [cell for cell in cells if cell in baselines or cell in others]


def _folder(cell: CellFolder, study: Study) -> dict[str, Any]:
    def value_of(metric: str) -> float:
        rows = (row for row in study.rows if (row.cell, row.seed, row.metric) == (cell.cell, cell.seed, metric))
        return next((row.value for row in rows), math.nan)

    return {
        "label": cell.path.name,
        "cell": cell.cell,
        "seed": cell.seed,
        "identity": cell.manifest["identity"],
        "seconds": value_of("train_seconds"),
        "evaluated": value_of("evaluate_seconds"),
        "tokens": value_of("train_tokens"),
        "megabytes": sum(entry["bytes"] for entry in cell.manifest["files"].values()) / 1e6,
        "versions": ", ".join(f"{name} {number}" for name, number in cell.manifest.get("versions", {}).items()),
    }
