"""The page itself: the answer first, then pictures, then latents one by one, then where every number came from."""

import base64
import gzip
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from posmask.report import browser as latents
from posmask.report import figures, tables
from posmask.report.reading import MODEL_CELL, Study, read_studies
from posmask.storage.manifest import PAGE_MARKS, check_file, check_folder, replacing, write_folder

__all__ = ["N_LATENTS", "write_paper_figures", "write_report", "write_report_folder"]

N_LATENTS = 500
_HERE = Path(__file__).parent


def write_report(*roots: Path, n_latents: int = N_LATENTS, out: Path | None = None) -> Path:
    """Write one self-contained page and return its path: `report.html` in the first folder, or `out`.

    What cannot be read (a cell that is not what was written, a damaged file) is left out, and the page says so.

    Args:
        roots: a study's folder, or several to stand in one page.
        n_latents: how many latents of each cell to keep, the most telling ones.

    Raises:
        DamagedFolder: a folder holds neither results nor cells.
        BadSetting: the file to write is there, and is no page that posmask wrote.
    """
    path = out or roots[0] / "report.html"
    check_file(path, *PAGE_MARKS)
    page, blocks = _page(read_studies(roots), n_latents)
    html = _render(page, {name: base64.b64encode(block).decode() for name, block in blocks.items()})
    with replacing(path, *PAGE_MARKS) as beside:
        beside.write_text(html, encoding="utf8")
    return path


def write_report_folder(*roots: Path, out: Path | None = None) -> Path:
    """Write a folder with a page for all latents, `report` in the first study's, and return it; for `page_server`.

    A folder that an earlier call wrote is replaced.

    Raises:
        DamagedFolder: a folder of `roots` holds neither results nor cells.
        BadSetting: the folder to write holds something that posmask did not write.
    """
    folder = out or roots[0] / "report"
    check_folder(folder, ("what", "title", "version"))
    page, blocks = _page(read_studies(roots), None)
    with write_folder(folder, {"what": "report", "title": page["title"], "version": page["version"]}) as draft:
        (draft / "data").mkdir()
        for name in [name for name in blocks if name.startswith(("cell-", "texts-"))]:
            (draft / "data" / f"{name}.gz").write_bytes(blocks.pop(name))
        html = _render(page, {name: base64.b64encode(block).decode() for name, block in blocks.items()})
        (draft / "index.html").write_text(html, encoding="utf8")
    return folder


def write_paper_figures(*roots: Path, folder: Path) -> list[Path]:
    """Every chart of the page as SVG and PDF.

    Raises:
        BadSetting: a file of that name is there, and posmask did not write it.
    """
    charts, _ = _charts(read_studies(roots))
    return figures.write_figures(charts, folder)


def _charts(studies: Sequence[Study]) -> tuple[dict[str, figures.Figure], list[tables.StudyTable]]:
    own = [tables.study_table(study) for study in studies]
    rows = [row for study in studies for row in study.rows]
    pictured = [cell for study in studies for cell in study.pictured]
    return figures.figures(rows, own, pictured, _baselines(studies), studies[0].warnings), own


def _page(studies: Sequence[Study], n_latents: int | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the template shows, and the blocks of data that scripts decode when they are looked at."""
    charts, own = _charts(studies)
    every = [cell for study in studies for cell in study.in_order]
    shown = [cell for study in studies for cell in study.pictured] if n_latents else every
    browsed = latents.browser(shown, every, n_latents, studies[0].warnings)
    rows = [row for study in studies for row in study.rows]
    cells = list(dict.fromkeys(row.cell for row in rows if row.mask != "none"))
    numbers = {label: found for table in own for label, found in table.numbers.items()}
    facts = {
        "columns": [column.name for column in tables.COLUMNS],
        "numbers": {
            label: [None if one is None else [one.value, one.text, one.interval] for one in found]
            for label, found in numbers.items()
        },
        "verdicts": [
            [one.label, one.against, one.column, one.effect, one.ci_low, one.ci_high, one.verdict]
            for study in studies
            for one in study.verdicts
            if all(map(math.isfinite, (one.effect, one.ci_low, one.ci_high)))
        ],
        "compared": {
            "explained_variance": 1,
            "ce_recovered": 2,
            **{f"order k={k}": 6 + place for place, k in enumerate((1, 5))},
            **{f"probing k={k}": 9 + place for place, k in enumerate((1, 5))},
        },
        "cells": cells,
        "baselines": _baselines(studies),
        "picked": _picked(studies, cells),
        "latents": browsed.cells,
        "colors": figures.COLORS,
    }
    blocks = {"page": _zipped(json.dumps(facts, allow_nan=False))}
    for name, chart in charts.items():
        blocks[f"chart-{name}"] = _zipped(json.dumps(figures.as_spec(chart), allow_nan=False))
    if charts:
        blocks["vega"] = _zipped(_vega_bundle())
    blocks |= browsed.blocks
    page = {
        "title": " and ".join(study.name for study in studies),
        "studies": [
            {
                "study": study,
                "table": table,
                "verdicts": tables.verdict_lines(study),
                "capped": tables.capped(study),
                "missing": tables.missing(study, table),
                "n_heldout": next(
                    (row.n for row in study.rows if row.metric == "explained_variance" and not row.slice), 0
                ),
                "settings": json.dumps(_settings(study), indent=1, ensure_ascii=False),
                "made": [_made(cell, study) for cell in study.cells],
            }
            for study, table in zip(studies, own, strict=True)
        ],
        "several": len(studies) > 1,
        "columns": tables.COLUMNS,
        "tie_columns": [title for _, _, title in tables.TIES],
        "ties": tables.ties(rows),
        "tasks": tables.by_name(rows, "order_accuracy", "task"),
        "datasets": tables.by_name(rows, "probe_accuracy", "dataset"),
        "controls": tables.controls(rows),
        "charts": list(charts),
        "cells": cells,
        "browsed": browsed.cells,
        "n_latents": n_latents,
        "warnings": list(dict.fromkeys(warning for study in studies for warning in study.warnings)),
        "version": importlib.metadata.version("posmask"),
        "model_cell": MODEL_CELL,
    }
    return page, blocks


def _baselines(studies: Sequence[Study]) -> list[str]:
    return [study.baseline for study in studies if study.baseline is not None]


def _zipped(text: str) -> bytes:
    return gzip.compress(text.encode(), 9, mtime=0)


def _picked(studies: Sequence[Study], cells: list[str]) -> list[str]:
    """The cells that charts show at first: the baselines and the first seven others."""
    baselines = _baselines(studies)
    others = [cell for cell in cells if cell not in baselines][:7]
    return [cell for cell in cells if cell in baselines or cell in others]


def _settings(study: Study) -> dict[str, Any]:
    """What all cells were made from; what differs between them is left out and stands in each cell's settings.json."""
    made = [cell.manifest.get("made_from", {}) for cell in study.cells]
    return {key: value for key, value in made[0].items() if all(one.get(key) == value for one in made)} if made else {}


def _made(cell: Any, study: Study) -> dict[str, Any]:
    def of(metric: str) -> float:
        rows = (row for row in study.rows if (row.cell, row.seed, row.metric) == (cell.cell, cell.seed, metric))
        return next((row.value for row in rows), math.nan)

    return {
        "label": cell.path.name,
        "cell": cell.cell,
        "seed": cell.seed,
        "identity": cell.manifest["identity"],
        "seconds": of("train_seconds"),
        "evaluated": of("evaluate_seconds"),
        "tokens": of("train_tokens"),
        "megabytes": sum(entry["bytes"] for entry in cell.manifest["files"].values()) / 1e6,
        "versions": ", ".join(f"{name} {number}" for name, number in cell.manifest.get("versions", {}).items()),
    }


def _render(page: dict[str, Any], blocks: dict[str, str]) -> str:
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf8") for kind in ("css", "js"))
    return _TEMPLATES.get_template("page.html").render(**page, blocks=blocks, style=style, script=script)


def _vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`."""
    return vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters |= {"number": tables.number, "signed": tables.signed}
