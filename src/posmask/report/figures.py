"""The page's pictures, as Vega-Lite charts over the study's own rows."""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import numpy as np
from safetensors.numpy import load_file

from posmask.rows import Row, parse_slice
from posmask.summary import Line

__all__ = ["as_spec", "by_position", "curves", "decay", "mask_pictures", "shift_split", "strictness", "trade_off"]

# Okabe and Ito's colours: distinct for colour-blind readers, on light and dark grounds.
_COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C6BB1",
    "#999933",
    "#666666",
    "#A05A2C",
    "#00B3A4",
    "#B5485D",
    "#4B5FC1",
    "#7FA23A",
    "#D99AC5",
    "#3E6E6B",
]
_N_LATENT_BINS = 48
_N_POSITION_BINS = 32


def _cell_colour(names: Sequence[str]) -> alt.Color:
    return alt.Color("cell:N", scale=alt.Scale(domain=list(names), range=_COLOURS), title="cell")


def trade_off(lines: Sequence[Line], k: int) -> alt.TopLevelMixin:
    """Reconstruction against order accuracy, one mark a cell."""
    values = [
        {
            "cell": line.label,
            "explained variance": line.overall["explained_variance"],
            "order accuracy": line.order[k],
            "budget": line.budget,
        }
        for line in lines
        if not math.isnan(line.overall["explained_variance"]) and not math.isnan(line.order[k])
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("explained variance:Q", scale=alt.Scale(zero=False, padding=20), axis=alt.Axis(tickCount=8)),
        y=alt.Y("order accuracy:Q", scale=alt.Scale(zero=False, padding=20), title=f"order accuracy, k = {k}"),
        tooltip=["cell:N", "budget:N", "explained variance:Q", "order accuracy:Q"],
    )
    marks = base.mark_point(size=110, filled=True).encode(
        shape=alt.Shape("budget:N", title="budget"), color=_cell_colour([value["cell"] for value in values])
    )
    labels = base.mark_text(align="left", dx=9, dy=-7, fontSize=11).encode(text="cell:N")
    return (marks + labels).properties(width="container", height=320)


def by_position(rows: Sequence[Row], metric: str, title: str) -> alt.TopLevelMixin:
    """A metric at each position after BOS, one line a cell; means over seeds."""
    values = [
        {"cell": row.cell, "position": int(where["position"]), "value": row.value}
        for row in rows
        if row.metric == metric
        and (where := parse_slice(row.slice)).keys() == {"position"}
        and math.isfinite(row.value)
    ]
    names = list(dict.fromkeys(value["cell"] for value in values))
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("position:Q", title="position in the context"),
            y=alt.Y("mean(value):Q", scale=alt.Scale(zero=False), title=title),
            color=_cell_colour(names),
            tooltip=["cell:N", "position:Q", "mean(value):Q"],
        )
        .properties(width="container", height=260)
    )


def decay(rows: Sequence[Row]) -> alt.TopLevelMixin | None:
    """Retention against how long training went on without the mask, with its chance; None where no cell has it."""
    values = []
    for row in rows:
        where = parse_slice(row.slice)
        if row.metric in ("retention", "retention_chance") and "after" in where:
            values.append(
                {
                    "cell": row.cell,
                    "share": float(where["after"]),
                    "value": row.value,
                    "what": "retention" if row.metric == "retention" else "chance",
                }
            )
    if not values:
        return None
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "share:Q", title="training without the mask, share of the original steps", axis=alt.Axis(format="%")
            ),
            y=alt.Y("mean(value):Q", title="retention", scale=alt.Scale(zero=False)),
            color=_cell_colour(list(dict.fromkeys(value["cell"] for value in values))),
            strokeDash=alt.StrokeDash("what:N", sort=["retention", "chance"], title=None),
            tooltip=["cell:N", "what:N", "share:Q", "mean(value):Q"],
        )
        .properties(width="container", height=240)
    )


def shift_split(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Each cell's variance split of the shift design, with its mask and with the mask lifted."""
    parts = ["position", "interaction", "content"]
    values = [
        {
            "cell": row.cell if where["mask"] == "on" else f"{row.cell}, mask lifted",
            "part": row.metric.removeprefix("shift_"),
            "order": parts.index(row.metric.removeprefix("shift_")),
            "share": row.value,
        }
        for row in rows
        if row.metric.startswith("shift_") and (where := parse_slice(row.slice))
    ]
    names = list(dict.fromkeys(value["cell"] for value in values))
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            y=alt.Y("cell:N", sort=names, title=None),
            x=alt.X("mean(share):Q", stack="zero", title="share of a latent's variance, mean over latents"),
            color=alt.Color("part:N", scale=alt.Scale(domain=parts, range=[_COLOURS[5], _COLOURS[1], _COLOURS[4]])),
            order="order:Q",
            tooltip=["cell:N", "part:N", "mean(share):Q"],
        )
        .properties(width="container", height=alt.Step(20))
    )


def strictness(lines: Sequence[Line]) -> alt.TopLevelMixin | None:
    """What masks cost and give from strict to open: each family of cells against how open its masks are in the mean.

    Cells named FAMILY-NUMBER make a family, at least three of them; None where there is none. The open cell is a dotted
    line across.
    """
    families: dict[str, list[Line]] = {}
    for line in lines:
        named = re.fullmatch(r"(.+)-[0-9.]+", line.label)
        if named and line.pooling == "mean":
            families.setdefault(named.group(1), []).append(line)
    families = {name: members for name, members in families.items() if len(members) >= 3}
    if not families:
        return None
    baseline = next((line for line in lines if line.label == "open"), None)
    charts = []
    for title, value_of in (
        ("explained variance", lambda line: line.overall["explained_variance"]),
        ("retention less its chance", lambda line: line.overall["retention_gain"]),
        ("order accuracy, k = 5", lambda line: line.order[5]),
        ("probing accuracy, k = 5", lambda line: line.probing[5]),
    ):
        values = [
            {"family": name, "cell": line.label, "openness": line.overall["mean_openness"], "value": value_of(line)}
            for name, members in families.items()
            for line in members
            if math.isfinite(value_of(line))
        ]
        if not values:
            continue
        chart = (
            alt.Chart(alt.Data(values=values))
            .mark_line(point=True)
            .encode(
                x=alt.X("openness:Q", scale=alt.Scale(domain=[0, 1]), title="mean openness: 0 strict, 1 open"),
                y=alt.Y("value:Q", scale=alt.Scale(zero=False), title=title),
                color=alt.Color("family:N", scale=alt.Scale(domain=list(families), range=_COLOURS)),
                tooltip=["cell:N", "openness:Q", "value:Q"],
            )
        )
        if baseline is not None and math.isfinite(value_of(baseline)):
            across = alt.Chart(alt.Data(values=[{"value": value_of(baseline)}]))
            chart += across.mark_rule(strokeDash=[2, 3]).encode(y="value:Q")
        charts.append(chart.properties(width=320, height=200))
    return alt.concat(*charts, columns=2).resolve_scale(color="shared")


def curves(folders: Sequence[Path]) -> alt.TopLevelMixin:
    """Explained variance of the training batches, first seed of each cell."""
    values = []
    for folder in folders:
        with (folder / "curve.csv").open(encoding="utf8") as file:
            for line in csv.DictReader(file):
                values.append(
                    {
                        "cell": _cell_name(folder),
                        "tokens": int(line["tokens"]),
                        "explained variance": max(0.0, float(line["explained_variance"])),
                    }
                )
    names = list(dict.fromkeys(value["cell"] for value in values))
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y("explained variance:Q"),
            color=_cell_colour(names),
            tooltip=["cell:N", "tokens:Q", "explained variance:Q"],
        )
        .properties(width="container", height=260)
    )


def _cell_name(folder: Path) -> str:
    return folder.name.rsplit("-seed", 1)[0]


def mask_pictures(folders: Sequence[Path]) -> alt.TopLevelMixin:
    """How open latents are at each position after training, ordered by where they are open; binned means."""
    values = []
    for folder in folders:
        openness = _openness(folder)
        if openness is None:
            continue
        picture = _binned(openness)
        n_positions = openness.shape[0]
        for (latent_bin, position_bin), value in np.ndenumerate(picture):
            values.append(
                {
                    "cell": _cell_name(folder),
                    "position": int(position_bin * n_positions / picture.shape[1]),
                    "latents": int(latent_bin),
                    "openness": round(float(value), 3),
                }
            )
    names = list(dict.fromkeys(value["cell"] for value in values))
    return (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("position:O", axis=alt.Axis(values=[0, 32, 64, 96], labelAngle=0), title="position"),
            y=alt.Y("latents:O", axis=None),
            color=alt.Color("openness:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1])),
            tooltip=["cell:N", "position:O", "openness:Q"],
        )
        .properties(width=170, height=120)
        .facet(alt.Facet("cell:N", sort=names, title=None), columns=4)
        .resolve_scale(x="shared")
    )


def _openness(folder: Path) -> np.ndarray | None:
    """[position latent], or None for masks that are open everywhere."""
    openness = load_file(folder / "openness.safetensors")["openness"]
    return None if (openness == 1).all() else openness


def _binned(openness: np.ndarray) -> np.ndarray:
    """Latents by their centre of openness, both axes averaged into bins: [latent_bin position_bin]."""
    positions = np.arange(openness.shape[0])[:, None]
    centre = (openness * positions).sum(0) / np.maximum(openness.sum(0), 1e-9)
    ordered = openness[:, np.argsort(centre, kind="stable")]
    rows = np.array_split(np.arange(ordered.shape[1]), min(_N_LATENT_BINS, ordered.shape[1]))
    columns = np.array_split(np.arange(ordered.shape[0]), min(_N_POSITION_BINS, ordered.shape[0]))
    return np.array([[ordered[np.ix_(column, row)].mean() for column in columns] for row in rows])


def as_spec(chart: alt.TopLevelMixin) -> str:
    """The chart as JSON that may stand inside a script element."""
    return json.dumps(chart.to_dict()).replace("<", "\\u003c")
