"""Charts of metrics: after training without the mask, under shifts, against openness, and cost."""

import math
import re
from collections.abc import Mapping, Sequence

import altair as alt

from posmask.report.figures.style import (
    COLORS,
    STEP,
    Figure,
    cell_color,
    inline_data,
)
from posmask.report.reading import Numbers
from posmask.results.table import COLUMNS, Column, Line

__all__ = ["cost", "forgetting", "shift_split", "strictness"]

_FAMILY_COLUMNS = ("explained_variance", "retention_gain", "block k=5", "probing k=5")


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
