"""The page's pictures, as Vega-Lite charts over the study's own rows.

Where a chart shows many cells, it shows those that the page's reader picked: such a chart carries `usermeta.cells`, its
values have a field `cell`, and the page replaces the domain of the color scale.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
from altair.utils import schemapi
from safetensors import SafetensorError
from safetensors.numpy import load_file

from posmask.report.reading import CellFolder, Numbers
from posmask.report.tables import COLUMNS, Number, StudyTable
from posmask.results.rows import Row
from posmask.results.table import Line
from posmask.storage.manifest import check_file, replacing

__all__ = ["COLORS", "Figure", "as_spec", "figures", "trade_off", "write_figures"]

# Okabe and Ito's colors: distinct for color-blind readers, on light and dark grounds.
COLORS = [
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
_MARKS = {
    "equal width": ("circle", COLORS[0]),
    "equal compute": ("square", COLORS[5]),
    "pooled by segments": ("triangle-up", COLORS[2]),
}
_MARK = b"written by posmask"  # a comment in each file, by which it is recognized
_N_LATENT_BINS = 40
_N_POSITION_BINS = 32
_SNAPSHOT_BINS = (24, 16)  # latents, positions
_SNAPSHOTS_FILE = "snapshots.safetensors"
_STEP = 17  # pixels a bar
_NARROW = 270  # pixels that a phone leaves for marks
Figure = alt.TopLevelMixin


def figures(
    rows: Sequence[Row],
    study_tables: Sequence[StudyTable],
    pictured: Sequence[CellFolder],
    baselines: Sequence[str],
    warnings: list[str],
) -> dict[str, Figure]:
    """Every chart for which the study has the numbers, by its name on the page."""
    numbers = Numbers(rows)
    lines = [line for table in study_tables for line in table.lines]
    in_tables = {label: found for table in study_tables for label, found in table.numbers.items()}
    cells = list(dict.fromkeys(row.cell for row in rows if row.mask != "none"))
    named = [(line, label) for line, label in lines if line.mask != "none"]
    masks = {}
    for cell in pictured:
        openness = _openness(cell, warnings)
        if openness is not None:
            masks[cell.cell] = openness
    learned = {cell.cell for cell in pictured if (cell.path / _SNAPSHOTS_FILE).is_file()}
    told = _curves(pictured, warnings)
    made: dict[str, Figure | None] = {
        "trade-off": trade_off(named, in_tables, 5, baselines),
        "masks": _mask_pictures({cell: openness for cell, openness in masks.items() if not (openness == 1).all()}),
        "snapshots": _snapshots([cell for cell in pictured if cell.cell in learned], warnings),
        "learned": _learned(told, {cell: openness for cell, openness in masks.items() if cell in learned}),
        "position": _by_position(numbers, cells, "explained_variance", "explained variance"),
        "l0": _by_position(numbers, cells, "l0", "L0: active latents a token"),
        "loss": _by_position(numbers, cells, "ce_recovered", "cross-entropy recovered"),
        "strictness": _strictness([line for line, _ in named], baselines),
        "decay": _decay(numbers, cells),
        "shift": _shift_split(numbers, cells),
        "curves": _training(told),
        "cost": _cost(numbers, cells),
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def _color(names: Sequence[str], title: str | None = None) -> alt.Color:
    scale = alt.Scale(domain=list(names), range=COLORS)
    return alt.Color("cell:N", scale=scale, title=title, legend=alt.Legend(symbolLimit=0, columns=1, labelLimit=150))


def _data(values: list[dict[str, Any]]) -> alt.Data:
    with schemapi.debug_mode(False):  # Checking ten thousand plain values against a schema takes seconds.
        return alt.Data(values=values)


def as_spec(chart: Figure) -> dict[str, Any]:
    """The chart as Vega-Lite."""
    return chart.to_dict(validate=False)


def _by_cells(chart: alt.TopLevelMixin, height: int) -> Figure:
    return chart.properties(width="container", height=height, usermeta={"cells": True})  # pyright: ignore


def trade_off(
    lines: Sequence[tuple[Line, str]],
    numbers: Mapping[str, Sequence[Number | None]],
    k: int,
    baselines: Sequence[str],
    width: int = 850,
) -> Figure | None:
    """Reconstruction against order accuracy, one mark a cell, both budgets; segment pooling lies where its cell does.

    Named are as many as find room: `baselines` first, then those that nothing beats in both, then the others. Thin
    lines are the intervals of `numbers`, those of the study's table.

    Args:
        width: of the picture, about, in pixels: it decides which names find room.
    """
    names = {"explained variance": "explained variance", "order accuracy": f"order probing, k = {k}"}
    place = {axis: [column.name for column in COLUMNS].index(name) for axis, name in names.items()}
    values = []
    for line, label in lines:
        known = {"explained variance": line.overall["explained_variance"], "order accuracy": line.order[k]}
        if line.pooling == "fair" or any(map(math.isnan, known.values())):
            continue
        value = {"cell": label, **known}
        value["what"] = f"equal {line.budget}" if line.pooling == "mean" else "pooled by segments"
        # Reconstruction is the cell's, whatever its codes are pooled by.
        of_cell = numbers[label.removesuffix(f" + {line.pooling}")], numbers[label]
        for own, axis in zip(of_cell, known, strict=True):
            found = own[place[axis]]
            value[f"range of {axis}"] = "none"
            if found is not None and math.isfinite(found.ci_low):
                value |= {
                    f"{axis} low": found.ci_low,
                    f"{axis} high": found.ci_high,
                    f"range of {axis}": found.interval,
                }
        values.append(value)
    if not values:
        return None
    _name(values, baselines, width)
    _name(values, baselines, _NARROW, " narrow")
    drawn = {value["what"] for value in values}
    shapes = [what for what in _MARKS if what in drawn]
    forms, colors = zip(*(_MARKS[what] for what in shapes), strict=True)
    scale_x, scale_y = alt.Scale(zero=False, padding=26), alt.Scale(zero=False, padding=22)
    color = alt.Color("what:N", title=None, scale=alt.Scale(domain=shapes, range=list(colors)))
    across, up = "explained variance", "order accuracy"
    base = alt.Chart(_data(values)).encode(
        x=alt.X(f"{across}:Q", scale=scale_x, axis=alt.Axis(tickCount=8), title=across),
        y=alt.Y(f"{up}:Q", scale=scale_y, title=f"{up}, k = {k}"),
        tooltip=[
            "cell:N",
            "what:N",
            alt.Tooltip(f"{across}:Q", format=".3f"),
            f"range of {across}:N",
            alt.Tooltip(f"{up}:Q", format=".3f"),
            f"range of {up}:N",
        ],
    )
    rule = base.mark_rule(strokeWidth=1, strokeOpacity=0.6).encode(color=color)
    sideways = rule.encode(x=alt.X(f"{across} low:Q", title=across), x2=f"{across} high:Q")
    upright = rule.encode(y=alt.Y(f"{up} low:Q", title=f"{up}, k = {k}"), y2=f"{up} high:Q")
    marks = base.mark_point(size=80, filled=True, opacity=1).encode(
        shape=alt.Shape("what:N", title=None, scale=alt.Scale(domain=shapes, range=list(forms))),
        color=color,
    )
    left = base.mark_text(align="right", dx=-9, dy=-7, fontSize=11).encode(text="left:N")
    right = base.mark_text(align="left", dx=9, dy=-7, fontSize=11).encode(text="right:N")
    return alt.layer(
        sideways.transform_filter(f"isValid(datum['{across} low'])"),
        upright.transform_filter(f"isValid(datum['{up} low'])"),
        marks,
        left,
        right,
    ).properties(width="container", height=380)


def _name(values: list[dict[str, Any]], baselines: Sequence[str], width: int, when: str = "") -> None:
    """Put marks' names to their `left` or `right` where they hit no other mark and name: baselines, then the best."""
    axes = ("explained variance", "order accuracy")
    xs, ys = ([value[axis] for value in values] for axis in axes)
    height, letter, line = 330, 6.5, 12  # pixels

    def across(axis: str, pixels: int) -> list[float]:
        """In pixels; the picture reaches as far as the thin lines."""
        low, high = (
            pick(value.get(f"{axis} {end}", value[axis]) for value in values)
            for pick, end in ((min, "low"), (max, "high"))
        )
        return [pixels * ((value[axis] - low) / (high - low) if high > low else 0.5) for value in values]

    places = list(zip(*(across(axis, pixels) for axis, pixels in zip(axes, (width, height), strict=True)), strict=True))
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y in places]

    def beaten(number: int) -> bool:
        return any(x >= xs[number] and y > ys[number] for x, y in zip(xs, ys, strict=True))

    def worth(number: int) -> tuple[bool, bool, float]:
        worse = beaten(number)
        return values[number]["cell"] not in baselines, worse, 0 if worse else -ys[number]

    order = sorted(range(len(values)), key=worth)
    for number in order:
        values[number] |= {f"left{when}": "", f"right{when}": ""}
        x, y = places[number]
        reach = letter * len(values[number]["cell"])
        boxes = {
            side: (start, start + reach, y + 7 - line / 2, y + 7 + line / 2)
            for side, start in (("left", x - 9 - reach), ("right", x + 9))
        }
        free = [
            side
            for side, box in boxes.items()
            if all(box[0] > b or box[1] < a or box[2] > d or box[3] < c for a, b, c, d in taken)
            and box[0] > -60
            and box[1] < width + 60
        ]
        if not free and values[number]["cell"] in baselines:
            free = ["left"]
        if free:
            values[number][free[0] + when] = values[number]["cell"]
            taken.append(boxes[free[0]])


def _by_position(numbers: Numbers, cells: Sequence[str], metric: str, title: str) -> Figure | None:
    """A metric at each position after BOS, one line a cell; means over seeds."""
    values = []
    for cell in cells:
        for position, rows in numbers.by(cell, metric, "position").items():
            finite = [row.value for row in rows if math.isfinite(row.value)]
            if finite:
                values.append({"cell": cell, "position": int(position), "value": sum(finite) / len(finite)})
    if not values:
        return None
    chart = (
        alt.Chart(_data(values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("position:Q", title="position in the context", scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", scale=alt.Scale(zero=False), title=title),
            color=_color(cells),
            tooltip=["cell:N", "position:Q", alt.Tooltip("value:Q", format=".3f")],
        )
    )
    return _by_cells(chart, 240)


def _decay(numbers: Numbers, cells: Sequence[str]) -> Figure | None:
    """Retention against how long training went on without the mask, with its chance; None where no cell has it."""
    values = [
        {"cell": cell, "share": float(after), "value": sum(row.value for row in rows) / len(rows), "what": what}
        for cell in cells
        for metric, what in (("retention", "retention"), ("retention_chance", "chance"))
        for after, rows in numbers.by(cell, metric, "after").items()
        if all(math.isfinite(row.value) for row in rows)
    ]
    if not values:
        return None
    return (
        alt.Chart(_data(values))
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "share:Q",
                title="training without the mask, share of the original steps",
                axis=alt.Axis(format="%", tickCount=5),
            ),
            y=alt.Y("value:Q", title="retention", scale=alt.Scale(zero=False)),
            color=_color(list(dict.fromkeys(value["cell"] for value in values))),
            strokeDash=alt.StrokeDash(
                "what:N",
                sort=["retention", "chance"],
                title=None,
                legend=alt.Legend(symbolType="stroke", symbolStrokeColor="#888", symbolStrokeWidth=2),
            ),
            tooltip=["cell:N", "what:N", "share:Q", alt.Tooltip("value:Q", format=".3f")],
        )
        .properties(width="container", height=240)
    )


def _shift_split(numbers: Numbers, cells: Sequence[str]) -> Figure | None:
    """Each cell's variance split of the shift design, with its mask and with the mask lifted."""
    parts = ["position", "interaction", "content"]
    values = [
        {"cell": cell, "line": line, "part": part, "order": number, "share": share}
        for cell in cells
        for mask, line in (("on", cell), ("lifted", f"{cell}, mask lifted"))
        for number, part in enumerate(parts)
        if math.isfinite(share := numbers.mean(cell, f"shift_{part}", {"mask": mask}))
    ]
    if not values:
        return None
    names = list(dict.fromkeys(value["line"] for value in values))
    return (
        alt.Chart(_data(values))
        .mark_bar()
        .encode(
            y=alt.Y("line:N", sort=names, title=None, axis=alt.Axis(labelLimit=190)),
            x=alt.X(
                "share:Q",
                stack="zero",
                scale=alt.Scale(nice=False),
                title="share of a latent's variance, mean over latents",
            ),
            color=alt.Color(
                "part:N",
                title=None,
                legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=parts, range=[COLORS[5], COLORS[1], COLORS[4]]),
            ),
            order="order:Q",
            tooltip=["line:N", "part:N", alt.Tooltip("share:Q", format=".4f")],
        )
        .properties(
            width="container",
            height=_STEP * len(names),
            usermeta={"cells": True, "step": _STEP},
        )
    )


def _strictness(lines: Sequence[Line], baselines: Sequence[str]) -> Figure | None:
    """What masks cost and give from strict to open: each family of cells against how open its masks are in the mean.

    Cells named FAMILY-NUMBER make a family, at least three of them; None where there is none. The baseline is a dotted
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
    baseline = next((line for line in lines if line.label in baselines), None)
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
            if math.isfinite(value_of(line)) and math.isfinite(line.overall["mean_openness"])
        ]
        if not values:
            continue
        chart = (
            alt.Chart(_data(values))
            .mark_line(point=True)
            .encode(
                x=alt.X("openness:Q", scale=alt.Scale(domain=[0, 1]), title="mean openness: 0 strict, 1 open"),
                y=alt.Y("value:Q", scale=alt.Scale(zero=False), title=title),
                color=alt.Color("family:N", scale=alt.Scale(domain=list(families), range=COLORS)),
                tooltip=["cell:N", alt.Tooltip("openness:Q", format=".3f"), alt.Tooltip("value:Q", format=".3f")],
            )
        )
        if baseline is not None and math.isfinite(value_of(baseline)):
            across = alt.Chart(_data([{"value": value_of(baseline)}]))
            chart += across.mark_rule(strokeDash=[2, 3], color="#888").encode(y="value:Q")
        charts.append(chart.properties(width=270, height=180))
    return alt.concat(*charts, columns=2).resolve_scale(color="shared") if charts else None


def _curves(pictured: Sequence[CellFolder], warnings: list[str]) -> list[dict[str, Any]]:
    """Of the training batches of each cell's first seed: explained variance and the mask's mean openness."""
    values = []
    for cell in pictured:
        try:
            with (cell.path / "curve.csv").open(encoding="utf8") as file:
                for line in csv.DictReader(file):
                    values.append(
                        {
                            "cell": cell.cell,
                            "tokens": int(line["tokens"]),
                            "explained variance": max(0.0, float(line["explained_variance"])),
                            "openness": float(line.get("mean_openness") or "nan"),
                        }
                    )
        except (OSError, KeyError, TypeError, ValueError) as error:
            warnings.append(f"the training curve of {cell.label} cannot be read ({error}).")
    return values


def _training(told: list[dict[str, Any]]) -> Figure | None:
    values = [{key: value for key, value in one.items() if key != "openness"} for one in told]
    if not values:
        return None
    chart = (
        alt.Chart(_data(values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y("explained variance:Q"),
            color=_color(list(dict.fromkeys(value["cell"] for value in values))),
            tooltip=["cell:N", "tokens:Q", alt.Tooltip("explained variance:Q", format=".3f")],
        )
    )
    return _by_cells(chart, 240)


def _learned(told: list[dict[str, Any]], masks: dict[str, np.ndarray]) -> Figure | None:
    """What learned masks became: mean openness as training went on, and how open single places were in the end."""
    if not masks:
        return None
    path = [
        {"cell": one["cell"], "tokens": one["tokens"], "openness": one["openness"]}
        for one in told
        if one["cell"] in masks and math.isfinite(one["openness"])
    ]
    ends = []
    for cell, openness in masks.items():
        counts, edges = np.histogram(openness[1:], bins=20, range=(0, 1))
        ends += [
            {"cell": cell, "openness": round(float(edge) + 0.025, 3), "share": round(float(count / counts.sum()), 5)}
            for edge, count in zip(edges, counts, strict=False)
        ]
    color = _color(list(masks))
    over = (
        alt.Chart(_data(path))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y("openness:Q", title="mean openness", scale=alt.Scale(domain=[0, 1])),
            color=color,
            tooltip=["cell:N", "tokens:Q", alt.Tooltip("openness:Q", format=".3f")],
        )
        .properties(width=270, height=180)
    )
    final = (
        alt.Chart(_data(ends))
        .mark_line(strokeWidth=1.5, interpolate="step")
        .encode(
            x=alt.X("openness:Q", title="openness of a latent at a position, after training"),
            y=alt.Y("share:Q", title="share of latents x positions", axis=alt.Axis(format="%")),
            color=color,
            tooltip=["cell:N", "openness:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=270, height=180)
    )
    return alt.concat(over, final, columns=2) if path else final


def _snapshots(learned: Sequence[CellFolder], warnings: list[str]) -> Figure | None:
    """How open the same latents were at eight moments of training, in the order of where they are open at its end."""
    values, moments = [], 0
    for cell in learned:
        try:
            found = load_file(cell.path / _SNAPSHOTS_FILE)
            openness, tokens = found["openness"] / 255, found["tokens"]
        except (OSError, KeyError, SafetensorError) as error:
            warnings.append(f"the mask of {cell.label} during training cannot be read ({str(error)[:120]}).")
            continue
        moments = max(moments, len(tokens))
        order = _by_center(openness[-1])
        for number, (one, seen) in enumerate(zip(openness, tokens.tolist(), strict=True), start=1):
            for (latents, position), value in np.ndenumerate(_binned(one[:, order], *_SNAPSHOT_BINS)):
                values.append(
                    {
                        "cell": cell.cell,
                        "moment": number,
                        "tokens": seen,
                        "position": int(position * one.shape[0] / min(_SNAPSHOT_BINS[1], one.shape[0])),
                        "latents": int(latents),
                        "openness": round(float(value), 2),
                    }
                )
    if not values:
        return None
    return (
        alt.Chart(_data(values))
        .mark_rect()
        .encode(
            x=alt.X("position:O", axis=None),
            y=alt.Y("latents:O", axis=None),
            color=alt.Color(
                "openness:Q",
                scale=alt.Scale(scheme="viridis", domain=[0, 1]),
                legend=alt.Legend(orient="top", gradientLength=160),
            ),
            tooltip=["cell:N", alt.Tooltip("tokens:Q", format=","), "position:O", "openness:Q"],
        )
        .properties(width=5 * _SNAPSHOT_BINS[1], height=3 * _SNAPSHOT_BINS[0])
        .facet(
            row=alt.Row(
                "cell:N",
                sort=list(dict.fromkeys(value["cell"] for value in values)),
                title=None,
                header=alt.Header(labelAngle=0, labelAlign="left", labelLimit=120),
            ),
            column=alt.Column(
                "moment:O",
                title=f"from the first step (1) to the last ({moments})",
                header=alt.Header(titleFontWeight="normal", titleAnchor="start"),
            ),
            spacing=6,
        )
        .properties(usermeta={"canvas": True, "moment": 6 + 5 * _SNAPSHOT_BINS[1]})
    )


def _mask_pictures(masks: dict[str, np.ndarray]) -> Figure | None:
    """How open latents are at each position after training, ordered by where they are open; binned means."""
    values = []
    for cell, openness in masks.items():
        picture = _binned(openness[:, _by_center(openness)], _N_LATENT_BINS, _N_POSITION_BINS)
        for (latent_bin, position_bin), value in np.ndenumerate(picture):
            values.append(
                {
                    "cell": cell,
                    "position": int(position_bin * openness.shape[0] / picture.shape[1]),
                    "latents": int(latent_bin),
                    "openness": round(float(value), 2),
                }
            )
    if not values:
        return None
    return (
        alt.Chart(_data(values))
        .mark_rect()
        .encode(
            x=alt.X("position:O", axis=alt.Axis(values=[0, 32, 64, 96], labelAngle=0, ticks=False), title=None),
            y=alt.Y("latents:O", axis=None),
            color=alt.Color(
                "openness:Q",
                scale=alt.Scale(scheme="viridis", domain=[0, 1]),
                legend=alt.Legend(orient="top", gradientLength=160),
            ),
            tooltip=["cell:N", "position:O", "openness:Q"],
        )
        .properties(width=5 * _N_POSITION_BINS, height=3 * _N_LATENT_BINS)  # whole pixels a bin
        .facet(alt.Facet("cell:N", sort=list(masks), title=None, header=alt.Header(labelLimit=160)), columns=4)
        .resolve_scale(x="shared")
        .properties(usermeta={"columns": 178, "canvas": True})
    )


def _openness(cell: CellFolder, warnings: list[str]) -> np.ndarray | None:
    """[position latent]; None where it cannot be read."""
    try:
        return load_file(cell.path / "openness.safetensors")["openness"]
    except (OSError, KeyError, SafetensorError) as error:
        warnings.append(f"the mask of {cell.label} cannot be read ({str(error)[:120]}).")
        return None


def _by_center(openness: np.ndarray) -> np.ndarray:
    """The latents in the order of their center of openness."""
    positions = np.arange(openness.shape[0])[:, None]
    center = (openness * positions).sum(0) / np.maximum(openness.sum(0), 1e-9)
    return np.argsort(center, kind="stable")


def _binned(ordered: np.ndarray, n_latent_bins: int, n_position_bins: int) -> np.ndarray:
    """[position latent] averaged into bins: [latent_bin position_bin]."""
    rows = np.array_split(np.arange(ordered.shape[1]), min(n_latent_bins, ordered.shape[1]))
    columns = np.array_split(np.arange(ordered.shape[0]), min(n_position_bins, ordered.shape[0]))
    return np.array([[ordered[np.ix_(column, row)].mean() for column in columns] for row in rows])


def _cost(numbers: Numbers, cells: Sequence[str]) -> Figure | None:
    parts = {"training": "train_seconds", "evaluation": "evaluate_seconds"}
    values = [
        {"cell": cell, "what": what, "seconds": seconds, "latents": numbers.mean(cell, "d_sae", {})}
        for cell in cells
        for what, metric in parts.items()
        if math.isfinite(seconds := numbers.mean(cell, metric, {}))
    ]
    if not values:
        return None
    shown = list(dict.fromkeys(value["cell"] for value in values))
    known = [what for what in parts if any(value["what"] == what for value in values)]
    return (
        alt.Chart(_data(values))
        .mark_bar()
        .encode(
            y=alt.Y("cell:N", sort=shown, title=None, axis=alt.Axis(labelLimit=190)),
            x=alt.X("seconds:Q", title="seconds, mean over seeds"),
            color=alt.Color(
                "what:N",
                title=None,
                legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=known, range=[COLORS[0], COLORS[4]][: len(known)]),
            ),
            order=alt.Order("what:N", sort="descending"),
            tooltip=[
                "cell:N",
                "what:N",
                alt.Tooltip("seconds:Q", format=",.0f"),
                alt.Tooltip("latents:Q", format=","),
            ],
        )
        .properties(
            width="container",
            height=_STEP * len(shown),
            usermeta={"cells": True, "step": _STEP},
        )
    )


def write_figures(charts: dict[str, Figure], folder: Path) -> list[Path]:
    """Every chart as SVG and PDF, as wide as two columns of a paper."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    for name in charts:
        for ending in ("svg", "pdf"):
            check_file(folder / f"{name}.{ending}", _MARK)
    written = []
    for name, chart in charts.items():
        spec = as_spec(chart)
        if spec.get("width") == "container":
            spec["width"] = 520
        config = {"background": "white", "font": "sans-serif", "view": {"stroke": None}}
        spec["config"] = {**spec.get("config", {}), **config}
        svg = vl_convert.vegalite_to_svg(spec)
        contents = {
            folder / f"{name}.svg": svg.encode() + b"\n<!-- " + _MARK + b" -->\n",
            folder / f"{name}.pdf": vl_convert.svg_to_pdf(svg) + b"\n% " + _MARK + b"\n",
        }
        for path, content in contents.items():
            with replacing(path, _MARK) as beside:
                beside.write_bytes(content)
        written += contents
    return written
