"""Writes the page of audited SAEs: what was found, charts by position, order, removal, and single latents."""

import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from posmask.report import browser as latents
from posmask.report import figures
from posmask.report.audits import Audit, read_audits
from posmask.report.browser import shown_text
from posmask.report.figures.audit import audit_figures, l0_is_steady
from posmask.report.reading import CellFolder
from posmask.report.rendering import chart_blocks, render, zipped
from posmask.storage.atomic import check_file, replacing
from posmask.storage.layout import AUDIT_FILE, PAGE_MARK, evaluated_folder
from posmask.storage.manifest import read_manifest

__all__ = ["write_audit_figures", "write_audit_page"]

_N_LATENTS = 500
"""Latents per SAE."""


def write_audit_page(root: Path, names: Sequence[str]) -> Path:
    """Write one self-contained page of audited SAEs and return its path, `audit.html` in `root`.

    Args:
        root: of the audit.
        names: of the SAEs' folders in `root/evaluated`; several are compared.

    Raises:
        DamagedFolder: a folder is missing, holds no audit, or its files differ from what was written.
        BadSetting: `audit.html` exists and is not a page that posmask wrote.
    """
    path = root / AUDIT_FILE
    check_file(path, PAGE_MARK)
    audits = read_audits(root, names)
    charts, warnings = audit_figures(audits), []
    folders = [evaluated_folder(root, name) for name in names]
    cells = [CellFolder(name, 0, folder, read_manifest(folder)) for name, folder in zip(names, folders, strict=True)]
    browsed = latents.browser(cells, cells, _N_LATENTS, warnings)
    colors = dict(zip(names, itertools.cycle(figures.COLORS), strict=False))
    facts = {"latents": [cell | {"label": cell["cell"]} for cell in browsed.cells], "colors": colors}
    variables = _page(audits) | {"charts": list(charts), "browsed": browsed.cells, "warnings": warnings}
    blocks = {"page": zipped(json.dumps(facts))} | chart_blocks(charts) | browsed.blocks
    html = render("audit", variables, blocks)
    with replacing(path, PAGE_MARK) as beside:
        beside.write_text(html, encoding="utf8")
    return path


def write_audit_figures(root: Path, names: Sequence[str], folder: Path) -> list[Path]:
    """Write every chart of the page as SVG and PDF; return the paths.

    Args:
        root: of the audit.
        names: of the SAEs' folders in `root/evaluated`.
        folder: the folder to write to.

    Raises:
        DamagedFolder: as `write_audit_page`.
        BadSetting: a file to write exists and was not written by posmask.
    """
    return figures.write_figures(audit_figures(read_audits(root, names)), folder)


def _page(audits: Sequence[Audit]) -> dict[str, Any]:
    """The template's variables."""
    title = audits[0].name if len(audits) == 1 else f"{len(audits)} SAEs"
    return {
        "title": f"audit of {title}",
        "heading": title,
        "several": len(audits) > 1,
        "audits": [_view(audit) for audit in audits],
        "shared": _shared(audits),
        "classes": list(audits[0].summary["classes"]["on"]),
        "rules": audits[0].summary["rules"],
        "n_latents": _N_LATENTS,
        "steady_l0": l0_is_steady(audits),
        "is_lifted": any("lifted" in audit.masks for audit in audits),
        "version": importlib.metadata.version("posmask"),
    }


def _shared(audits: Sequence[Audit]) -> list[tuple[str, str]]:
    """What was audited, by the names of the facts; facts in which the SAEs differ have several values."""

    def values(key: str) -> str:
        return ", ".join(dict.fromkeys(_shown(audit.summary[key]) for audit in audits))

    names = {"model": "model", "site": "site", "n_positions": "context", "tokens": "held-out tokens", "texts": "texts"}
    facts = [(name, values(key)) for key, name in names.items()]
    facts.insert(4, ("from", f"{values('n_texts')} texts"))
    return [*facts, ("attention sinks", values("sink_tokens"))]


def _shown(value: str | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    path = PurePath(value)  # Pages are shared, so they have no paths of this machine.
    return shown_text(path.name if path.is_absolute() else value)


def _view(audit: Audit) -> dict[str, Any]:
    summary = audit.summary
    orders = summary["order"]
    largest = max((line["k"] for line in orders), default=0)
    l0 = audit.positions["l0"].dropna()
    return {
        "audit": audit,
        "summary": summary,
        "order": {"block": None, "local": None} | {line["about"]: line for line in orders if line["k"] == largest},
        "order_k": largest,
        "order_tasks": audit.order.to_dict("records"),
        "l0_range": (l0.min(), l0.max()) if len(l0) else None,
        "beyond_from": audit.positions["position"][audit.positions["is_beyond"]].min(),
        "beyond_to": audit.positions["position"][audit.positions["is_beyond"]].max(),
    }
