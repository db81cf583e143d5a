"""Charts of metrics: by position, after training without the mask, under shifts, against openness, and cost."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from posmask.report.figures.style import (
    COLORS,
    STEP,
    Figure,
    cell_color,
    for_picked_cells,
    inline_data,
    position_axis,
    position_bin,
)
from posmask.report.reading import Numbers
from posmask.results.rows import Row
from posmask.results.table import COLUMNS, Column, Line

__all__ = ["by_position", "cost", "forgetting", "shift_split", "steady", "stream_norm", "strictness"]

_FAMILY_COLUMNS = ("explained_variance", "retention_gain", "block k=5", "probing k=5")


_STEADY = 0.005
"""A metric that varies by less over positions, relative to its mean, is not drawn."""
_Values = list[dict[str, Any]]


def by_position(
    numbers: Numbers,
    colors: Mapping[str, str],
    metric: str,
    title: str,
    minus: Mapping[str, str] | None = None,
) -> Figure | None:
    """Return a metric by position after BOS, one line per cell, means over seeds and bins of positions.

    None without numbers, or if the metric does not depend on position.

    Args:
        numbers: the rows.
        colors: of the cells.
        metric: name of the metric.
        title: of its axis.
        minus: the cell whose values are subtracted, by cell; cells without one are left out.
    """
    values: _Values = []
    for cell in colors:
        at = _at_positions(numbers, cell, metric)
        if minus is not None:
            other = _at_positions(numbers, minus[cell], metric) if minus.get(cell, cell) != cell else {}
            at = {position: value - other[position] for position, value in at.items() if position in other}
        values += [{"cell": cell, **value} for value in _binned(at)]
    if not values or (minus is None and _is_steady(values)):
        return None
    y = alt.Y("value:Q", scale=alt.Scale(zero=False), title=title)
    chart = _curve(values, y, cell_color(colors, colors))
    return for_picked_cells(chart, 200)


def stream_norm(numbers: Numbers, models: Sequence[str]) -> Figure | None:
    """Return the mean norm of the model's vectors by position; None without numbers.

    Args:
        numbers: the rows.
        models: names of the models themselves in the rows, one per study.
    """
    values = [
        {"cell": model, **value} for model in models for value in _binned(_at_positions(numbers, model, "stream_norm"))
    ]
    if not values:
        return None
    color = alt.Color("cell:N", title=None, legend=alt.Legend(orient="top") if len(models) > 1 else None)
    y = alt.Y("value:Q", scale=alt.Scale(zero=False), title="mean norm, model's units")
    return _curve(values, y, color).properties(width="container", height=200)


def steady(rows: Sequence[Row], metric: str) -> str:
    """Return the value of a metric that does not depend on position in any cell; empty if it does or is missing."""
    numbers = Numbers(rows)
    values: _Values = []
    for cell in dict.fromkeys(row.cell for row in rows if row.mask != "none"):
        values += [{"cell": cell, **value} for value in _binned(_at_positions(numbers, cell, metric))]
    if not values or not _is_steady(values):
        return ""
    ends = {f"{end(value['value'] for value in values):.4g}" for end in (min, max)}
    return " to ".join(sorted(ends, key=float))


def _at_positions(numbers: Numbers, cell: str, metric: str) -> dict[int, float]:
    """Means over seeds at each position."""
    values = {}
    for position, rows in numbers.by(cell, metric, "position").items():
        finite = [row.value for row in rows if math.isfinite(row.value)]
        if finite:
            values[int(position)] = sum(finite) / len(finite)
    return values


def _binned(at: Mapping[int, float]) -> _Values:
    """Means over bins of positions."""
    bins: dict[int, list[int]] = {}
    for position in sorted(at):
        bins.setdefault(position_bin(position), []).append(position)
    return [
        {
            "position": sum(positions) / len(positions),
            "positions": f"{positions[0]}–{positions[-1]}" if len(positions) > 1 else f"{positions[0]}",
            "value": sum(at[position] for position in positions) / len(positions),
        }
        for positions in bins.values()
        if positions[0] > 0
    ]


def _is_steady(values: _Values) -> bool:
    """Whether the values of each cell vary little."""
    by_cell: dict[str, list[float]] = {}
    for value in values:
        by_cell.setdefault(value["cell"], []).append(value["value"])
    return all(max(each) - min(each) <= _STEADY * abs(sum(each)) / len(each) for each in by_cell.values())


def _curve(values: _Values, y: alt.Y, color: alt.Color) -> alt.Chart:
    return (
        alt.Chart(inline_data(values))
        .mark_line(strokeWidth=1.6)
        .encode(
            x=position_axis(max(value["position"] for value in values)),
            y=y,
            color=color,
            tooltip=["cell:N", "positions:N", alt.Tooltip("value:Q", format=".3f")],
        )
    )


def forgetting(numbers: Numbers, colors: Mapping[str, str]) -> Figure | None:
    """Return retention and its chance level against the length of training without the mask; None without numbers."""
    values = [
        {"cell": cell, "share": float(after), "value": sum(row.value for row in rows) / len(rows), "what": what}
        for cell in colors
        for metric, what in (("retention", "retention"), ("retention_chance", "chance"))
        for after, rows in numbers.by(cell, metric, "after").items()
        if all(math.isfinite(row.value) for row in rows)
    ]
    if not values:
        return None
    base = alt.Chart(inline_data(values)).encode(
        x=alt.X(
            "share:Q",
            title="training without the mask, fraction of the original steps",
            axis=alt.Axis(format="%", tickCount=5),
        ),
        y=alt.Y("value:Q", title="retention", scale=alt.Scale(zero=False)),
        color=cell_color((value["cell"] for value in values), colors),
        tooltip=["cell:N", "what:N", "share:Q", alt.Tooltip("value:Q", format=".3f")],
    )
    dash = alt.StrokeDash(
        "what:N",
        scale=alt.Scale(domain=["retention", "chance"], range=[[1, 0], [5, 3]]),
        title=None,
        legend=alt.Legend(symbolType="stroke", symbolStrokeColor="#888", symbolStrokeWidth=2),
    )
    lines, points = (
        base.mark_line().encode(strokeDash=dash),
        base.mark_point(filled=True, size=40).encode(detail="what:N"),
    )
    return alt.layer(lines, points).properties(width="container", height=240)


def shift_split(numbers: Numbers, cells: Sequence[str]) -> Figure | None:
    """Return each cell's variance split of the shift design, with and without its mask; None without numbers."""
    parts = ["position", "interaction", "content"]
    values = [
        {"cell": cell, "line": line, "part": part, "order": order, "share": share}
        for cell in cells
        for mask, line in (("on", cell), ("lifted", f"{cell}, without mask"))
        for order, part in enumerate(parts)
        if math.isfinite(share := numbers.mean(cell, f"shift_{part}", {"mask": mask}))
    ]
    if not values:
        return None
    names = list(dict.fromkeys(value["line"] for value in values))
    return (
        alt.Chart(inline_data(values))
        .mark_bar()
        .encode(
            y=alt.Y("line:N", sort=names, title=None, axis=alt.Axis(labelLimit=190)),
            x=alt.X(
                "share:Q",
                stack="zero",
                scale=alt.Scale(nice=False),
                title="fraction of a latent's variance, mean over latents",
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
            height=STEP * len(names),
            usermeta={"cells": True, "step": STEP},
        )
    )


def strictness(lines: Sequence[Line], baselines: Sequence[str]) -> Figure | None:
    """Return reported numbers against mean openness, one line per family of cells; None without a family.

    At least three cells named FAMILY-NUMBER are a family. A dotted line shows the baseline.
    """
    families: dict[str, list[Line]] = {}
    for line in lines:
        match = re.fullmatch(r"(.+)-[0-9.]+", line.label)
        if match and line.pooling == "mean":
            families.setdefault(match.group(1), []).append(line)
    families = {name: members for name, members in families.items() if len(members) >= 3}
    baseline = next((line for line in lines if line.label in baselines), None)
    charts = [_against_openness(column, families, baseline) for column in COLUMNS if column.name in _FAMILY_COLUMNS]
    charts = [chart for chart in charts if chart is not None]
    return alt.concat(*charts, columns=2).resolve_scale(color="shared") if charts else None


def _against_openness(
    column: Column, families: dict[str, list[Line]], baseline: Line | None
) -> alt.Chart | alt.LayerChart | alt.FacetChart | None:
    values = [
        {"family": name, "cell": line.label, "openness": line.overall["mean_openness"], "value": value}
        for name, members in families.items()
        for line in members
        if math.isfinite(value := line.numbers[column.name]) and math.isfinite(line.overall["mean_openness"])
    ]
    if not values:
        return None
    chart = (
        alt.Chart(inline_data(values))
        .mark_line(point=True)
        .encode(
            x=alt.X("openness:Q", scale=alt.Scale(domain=[0, 1]), title="mean openness: 0 strict, 1 open"),
            y=alt.Y("value:Q", scale=alt.Scale(zero=False), title=column.full_title),
            color=alt.Color("family:N", scale=alt.Scale(domain=list(families), range=COLORS)),
            tooltip=["cell:N", alt.Tooltip("openness:Q", format=".3f"), alt.Tooltip("value:Q", format=".3f")],
        )
    )
    if baseline is not None and math.isfinite(baseline.numbers[column.name]):
        rule = alt.Chart(inline_data([{"value": baseline.numbers[column.name]}]))
        chart += rule.mark_rule(strokeDash=[2, 3], color="#888").encode(y="value:Q")
    return chart.properties(width=270, height=180)


def cost(numbers: Numbers, cells: Sequence[str]) -> Figure | None:
    """Return wall time of training and evaluation per cell; None without numbers."""
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
        alt.Chart(inline_data(values))
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
            height=STEP * len(shown),
            usermeta={"cells": True, "step": STEP},
        )
    )
