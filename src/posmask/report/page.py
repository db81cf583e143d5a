"""The page itself: the table first, then pictures, then where every number came from."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from posmask.errors import DamagedFolder
from posmask.folders import read_manifest, replacing
from posmask.report import figures
from posmask.rows import parse_slice, read_rows
from posmask.summary import ORDER_KS, PROBE_KS, summarise
from posmask.verdicts import Verdict, read_verdicts

__all__ = ["write_report"]


def write_report(root: Path) -> Path:
    """Write `report.html` for a study's folder and return its path.

    Raises:
        DamagedFolder: the folder holds no results, or a cell is not what was written.
    """
    for name in ("results.csv", "verdicts.csv"):
        if not (root / name).is_file():
            raise DamagedFolder(f"{root} holds no {name}: give the folder of a study that `posmask run` finished")
    rows = read_rows(root / "results.csv")
    cells = dict.fromkeys((row.cell, row.seed) for row in rows if row.mask != "none")
    folders = [root / "cells" / f"{name}-seed{seed}" for name, seed in cells]
    manifests = [read_manifest(folder, verify=True) for folder in folders]
    first_seed = min((row.seed for row in rows if row.mask != "none"), default=0)
    pictured = [folder for folder in folders if folder.name.endswith(f"-seed{first_seed}")]
    lines = summarise(rows)
    charts = {
        "trade-off": figures.trade_off(lines, 5),
        "position": figures.by_position(rows, "explained_variance", "explained variance"),
        "loss": figures.by_position(rows, "ce_recovered", "cross-entropy recovered"),
        "shift": figures.shift_split(rows),
        "decay": figures.decay(rows),
        "strictness": figures.strictness(lines),
        "masks": figures.mask_pictures(pictured),
        "curves": figures.curves(pictured),
    }
    page = _TEMPLATES.get_template("page.html").render(
        study=root.name,
        lines=lines,
        ks={"order": ORDER_KS, "probe": PROBE_KS},
        intervals=_intervals(rows),
        tasks=_by(rows, "order_accuracy", "task"),
        datasets=_by(rows, "probe_accuracy", "dataset"),
        controls=_controls(rows),
        verdicts=_verdict_table(read_verdicts(root / "verdicts.csv")),
        specialisation=_specialisation(rows),
        n_heldout=next((row.n for row in rows if row.metric == "explained_variance" and not row.slice), 0),
        seeds=sorted({row.seed for row in rows if row.mask != "none"}),
        settings=json.dumps(manifests[0]["made_from"], indent=1) if manifests else "",
        cells=[(folder.name, manifest["identity"]) for folder, manifest in zip(folders, manifests, strict=True)],
        seconds={f"{row.cell}-seed{row.seed}": row.value for row in rows if row.metric == "train_seconds"},
        charts={name: figures.as_spec(chart) for name, chart in charts.items() if chart is not None},
        vega=_vega_bundle(),
    )
    with replacing(root / "report.html") as beside:
        beside.write_text(page, encoding="utf8")
    return root / "report.html"


def _intervals(rows: list) -> dict[tuple[str, str], str]:
    """For hovering: about each cell's overall numbers, by (cell, metric)."""
    found: dict[tuple[str, str], list] = {}
    for row in rows:
        if not row.slice and math.isfinite(row.low):
            found.setdefault((row.cell, row.metric), []).append(row)
    return {key: _about(same) for key, same in found.items()}


def _about(same: list) -> str:
    """The interval of one seed's number; of several seeds' mean, the range of their intervals."""
    low, high = min(row.low for row in same), max(row.high for row in same)
    what = "95 % interval" if len(same) == 1 else f"{len(same)} seeds, whose 95 % intervals reach from"
    return f"{what} {low:.4f} to {high:.4f}, n = {same[0].n:,}"


def _verdict_table(verdicts: list[Verdict]) -> dict[str, Any]:
    """A line for each comparison, a column for each thing compared by."""
    lines: dict[tuple[str, str], dict[str, Verdict]] = {}
    for verdict in verdicts:
        lines.setdefault((verdict.label, verdict.against), {})[verdict.column] = verdict
    return {"columns": list(dict.fromkeys(verdict.column for verdict in verdicts)), "lines": lines}


_SPECIALISATION = (
    ("mean_openness", "", "mean openness"),
    ("strictness", "", "strictness"),
    ("retention", "", "retention"),
    ("retention_chance", "", "its chance"),
    ("profile_fidelity", "", "profile fidelity"),
    ("position_information", "", "position information"),
    ("position_bound_share", "", "position-bound latents"),
    ("shift_position", "mask=on", "shift design: position"),
    ("shift_interaction", "mask=on", "shift design: interaction"),
    ("causal_specificity", "", "causal specificity, nats"),
)


def _specialisation(rows: list) -> dict[str, Any]:
    """What is known of each cell's ties to positions, with intervals; means over seeds."""
    found: dict[str, list] = {}
    for name in dict.fromkeys(row.cell for row in rows if row.mask != "none"):
        for metric, where, _ in _SPECIALISATION:
            same = [row for row in rows if (row.cell, row.metric, row.slice) == (name, metric, where)]
            found.setdefault(name, []).append(_mean_of(same))
    return {"columns": [title for _, _, title in _SPECIALISATION], "cells": found}


def _mean_of(same: list) -> tuple[float, str]:
    if not same:
        return math.nan, "not measured"
    return sum(row.value for row in same) / len(same), _about(same)


def _controls(rows: list) -> dict[str, Any]:
    """What else could have given order accuracies: by task, the controls without an SAE, then the others' extremes."""
    tasks = list(dict.fromkeys(parse_slice(row.slice)["task"] for row in rows if row.metric == "order_bag_accuracy"))
    found: dict[str, list[str]] = {}
    for metric, title in (
        ("order_bag_accuracy", "bag of words (exactly 1/K)"),
        ("order_edges", "first and last 3 tokens"),
    ):
        found[title] = [
            _number(row.value) for task in tasks for row in rows if (row.metric, row.slice) == (metric, f"task={task}")
        ]
    for metric, title in (("order_shuffled", "tokens shuffled at test time"), ("order_permuted", "labels permuted")):
        for task in tasks:
            values = [row.value for row in rows if row.metric == metric and parse_slice(row.slice)["task"] == task]
            text = f"{_number(sum(values) / len(values))} ({_number(min(values), 2)} to {_number(max(values), 2)})"
            found.setdefault(f"{title}: mean (range) over cells, poolings, k", []).append(text)
    return {"tasks": tasks, "lines": found}


def _by(rows: list, metric: str, key: str) -> dict[str, Any]:
    """One table of a metric: columns are (task or dataset, k), a line for each cell and pooling."""
    found: dict[str, dict[tuple[str, str], list]] = {}
    for row in rows:
        if row.metric == metric and "class" not in (where := parse_slice(row.slice)):
            label = "the model itself" if row.mask == "none" else row.cell
            label += "" if where["pooling"] == "mean" else f" + {where['pooling']}"
            found.setdefault(label, {}).setdefault((where[key], where["k"]), []).append(row)
    columns = list(dict.fromkeys(column for line in found.values() for column in line))
    cells = {label: [_mean_of(line.get(column, [])) for column in columns] for label, line in found.items()}
    names = list(dict.fromkeys(column[0] for column in columns))
    return {
        "names": names,
        "ks": [k for name, k in columns if name == names[0]] if names else [],
        "cells": cells,
    }


def _vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`."""
    bundle = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]
    return bundle.replace("</script", "<\\/script")


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


_TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("posmask.report", "."), autoescape=True)
_TEMPLATES.filters["number"] = _number
_TEMPLATES.globals["nan"] = math.nan
