"""Charts of audited SAEs: classes of latents, curves by position, order, and removal of latents.

Each SAE has a color. With the mask lifted, lines are dashed and bars are pale.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import altair as alt

from posmask.report.audits import Audit
from posmask.report.figures.positions import is_steady, position_axis, position_bin, stacked, with_targets, zero_line
from posmask.report.figures.style import COLORS, STEP, Figure, inline_data

__all__ = ["audit_figures", "l0_is_steady", "smoothed"]

_GRAY = "#888"
_SHORT = 28  # characters of names of which two fit beside each other
_FEW_TICKS = alt.Axis(tickCount=6)
_CURVES = {
    "explained_variance": ("explained variance", ".2f"),
    "cross_entropy_increase": ("increase of the cross-entropy, nats", "~g"),
    "l0": ("L0, active latents per token", "~g"),
    "stream_norm": ("mean norm of the stream, in the model's units", "~s"),
    "silent_share": ("silent latents, share of those that fire anywhere", ".0%"),
    "dense_share": ("dense latents, share of all", ".1%"),
}
"""Title and number format of each column of the table of positions that is drawn."""
_BESIDE = {
    "explained_variance": ("explained_variance_with_sinks", "with sinks"),
    "silent_share": ("silent_share_null", "null"),
}
"""Columns drawn beside others, and what legends call them."""
_DASHES = {(False, False): [1, 0], (False, True): [6, 3], (True, False): [2, 2], (True, True): [1, 4]}
_Values = list[dict[str, Any]]


def audit_figures(audits: Sequence[Audit]) -> dict[str, Figure]:
    """Return every chart for which the audits have numbers, by its name on the page."""
    audits = _shortened(audits)
    charts: dict[str, Figure | None] = {
        "classes": _classes(audits),
        "positions": _by_position(audits),
        "order": _order(audits),
        "removal": _removal(audits),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def _shortened(audits: Sequence[Audit]) -> list[Audit]:
    """Audits whose names fit in a legend: long ones without the words with which all of them begin."""
    names = [audit.name for audit in audits]
    if len(names) == 1 or max(map(len, names)) <= _SHORT:
        return list(audits)
    n_same = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))
    length = max(names[0].rfind(mark, 0, n_same) for mark in "-/.") + 1
    return [replace(audit, name=f"…{audit.name[length:]}" if length else audit.name) for audit in audits]


def smoothed(audit: Audit, column: str) -> _Values:
    """A column of the table of positions as means over bins of positions: single ones up to 8, then 8 bins per octave.

    `low` and `high` are the means of the ends of the positions' intervals, so the interval of a bin is too wide rather
    than too narrow; they are missing unless all of the bin's positions have them. Positions without a value are left
    out, and bins do not reach across the end of the context.
    """
    bins: dict[tuple[str, bool, int], _Values] = {}
    for row in audit.positions.to_dict("records"):
        if math.isfinite(row[column]):
            key = row["mask"], row["is_beyond"], position_bin(row["position"])
            bins.setdefault(key, []).append(row)
    values = []
    for (mask, is_beyond, _), rows in bins.items():
        ends = {
            end: sum(row[f"{column}_{end}"] for row in rows) / len(rows)
            for end in ("low", "high")
            if f"{column}_{end}" in rows[0] and all(math.isfinite(row[f"{column}_{end}"]) for row in rows)
        }
        values.append(
            {
                "sae": audit.name,
                "mask": f"mask {mask}",
                "beyond": bool(is_beyond),
                "first position": rows[0]["position"],
                "last position": rows[-1]["position"],
                "position": sum(row["position"] for row in rows) / len(rows),
                "value": sum(row[column] for row in rows) / len(rows),
                **ends,
            }
        )
    return values


def _color(audits: Sequence[Audit], **symbols: Any) -> alt.Color:
    """The color channel of the field `sae`, without a legend for a single SAE."""
    return alt.Color("sae:N", title=None, **_colors(audits, **symbols))


def _fill(audits: Sequence[Audit]) -> alt.Fill:
    """The same inside of marks."""
    return alt.Fill("sae:N", title=None, **_colors(audits))


def _colors(audits: Sequence[Audit], **symbols: Any) -> dict[str, Any]:
    names = [audit.name for audit in audits]
    columns = 2 if max(map(len, names)) <= _SHORT else 1
    legend = alt.Legend(orient="top", columns=columns, symbolLimit=0, labelLimit=500, symbolOpacity=1, **symbols)
    scale = alt.Scale(domain=names, range=COLORS)
    return {"scale": scale, "legend": legend if len(names) > 1 else None}


def _by_position(audits: Sequence[Audit]) -> Figure | None:
    """Columns of the table of positions with their intervals and the columns drawn beside them, a panel each."""
    every = {column: _lines(audits, column) for column in _CURVES}
    every = {column: lines for column, lines in every.items() if lines}
    if l0_is_steady(audits):
        every.pop("l0", None)
    if not every:
        return None
    last = max(value["last position"] for lines in every.values() for value in lines)
    dash = _dash([value for lines in every.values() for value in lines])
    panels: dict[str, alt.LayerChart | alt.FacetChart] = {}
    for column, lines in every.items():
        title, number = _CURVES[column]
        layers = _curve_layers(audits, column, lines, number, position_axis(last, column == list(every)[-1]), dash)
        panels[title] = alt.layer(*layers, *_ends_of_contexts(audits, last, is_labeled=not panels))
    return stacked(panels)


def l0_is_steady(audits: Sequence[Audit]) -> bool:
    """Return whether L0 does not depend on position in any SAE, as with top-k selection; then it is not drawn."""
    return is_steady(_lines(audits, "l0"), "sae", "mask")


def _curve_layers(
    audits: Sequence[Audit], column: str, lines: _Values, number: str, x: alt.X, dash: alt.StrokeDash
) -> list[alt.Chart]:
    domain = _domain(lines, highest=1 if column == "explained_variance" else math.inf)
    axis = alt.Axis(format=number, tickCount=4, minExtent=34)
    y = alt.Y("value:Q", title=None, axis=axis, scale=alt.Scale(domain=domain, nice=False))
    # The norm of the stream is the same for all SAEs of a site, so it is drawn once, in the color of text.
    of_saes = any("sae" in line for line in lines)
    color = _color(audits, symbolType="stroke", symbolStrokeWidth=3) if of_saes else alt.Undefined
    base = alt.Chart(inline_data(lines))
    line = base.mark_line(strokeWidth=1.8, clip=True).encode(x=x, y=y, strokeDash=dash, detail="beyond:N", color=color)
    layers = with_targets(line, _curve_tooltip(audits))
    if any("low" in value for value in lines):
        band = base.mark_area(opacity=0.18, clip=True)
        layers.append(
            band.encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q", detail=["beyond:N", "line:N"], color=color)
        )
    if column == "stream_norm":
        layers += _sinks(audits)
    return [*layers, zero_line()] if domain[0] < 0 < domain[1] else layers


def _lines(audits: Sequence[Audit], column: str) -> _Values:
    """The values of a column and of the one beside it, where that differs; `line` is what the legend calls them."""
    is_lifted = any("lifted" in audit.masks for audit in audits)
    other, about = _BESIDE.get(column, (None, None))
    lines, beside = [], []
    for audit in audits:
        values = smoothed(audit, column)
        lines += [value | {"line": value["mask"] if is_lifted else "measured", "dotted": False} for value in values]
        others = smoothed(audit, other) if other else []
        if [value["value"] for value in others] != [value["value"] for value in values]:
            names = (f"{value['mask']}, {about}" if is_lifted else about for value in others)
            beside += [value | {"line": name, "dotted": True} for value, name in zip(others, names, strict=True)]
    return _of_the_stream(lines) if column == "stream_norm" else lines + beside


def _dash(lines: _Values) -> alt.StrokeDash:
    """Dashed with the mask lifted, dotted for the column beside."""
    dashes = {line["line"]: _DASHES[line["dotted"], line["mask"] == "mask lifted"] for line in lines}
    legend = alt.Legend(orient="top", columns=2, symbolType="stroke", symbolStrokeColor=_GRAY, symbolStrokeWidth=2)
    scale = alt.Scale(domain=list(dashes), range=list(dashes.values()))
    return alt.StrokeDash("line:N", title=None, scale=scale, legend=legend if len(dashes) > 1 else None)


def _curve_tooltip(audits: Sequence[Audit]) -> list[Any]:
    names = ["sae:N"] if len(audits) > 1 else []
    numbers = [alt.Tooltip(f"{name}:Q", format=".4f") for name in ("value", "low", "high")]
    return [*names, "line:N", "first position:Q", "last position:Q", *numbers]


def _of_the_stream(lines: _Values) -> _Values:
    """The lines without what belongs to an SAE if all audits have the same vectors; those of the first audit."""
    by_sae: dict[str, _Values] = {}
    for line in lines:
        if line["mask"] == "mask on":
            by_sae.setdefault(line["sae"], []).append(line)
    bare = [[{key: value for key, value in line.items() if key != "sae"} for line in each] for each in by_sae.values()]
    return bare[0] if all(each == bare[0] for each in bare) else [line for each in by_sae.values() for line in each]


def _domain(lines: _Values, highest: float) -> list[float]:
    """Ends of an axis: all values, and nine of ten ends of intervals; wider ones would flatten the lines."""
    low = min(value["value"] for value in lines)
    high = max(value["value"] for value in lines)
    lows, highs = (sorted(value[end] for value in lines if end in value) for end in ("low", "high"))
    if lows:
        low, high = min(low, lows[len(lows) // 10]), max(high, highs[-1 - len(highs) // 10])
    margin = 0.04 * (high - low) or 0.5
    return [low - margin if low < 0 else max(0.0, low - margin), min(highest, high + margin)]


def _ends_of_contexts(audits: Sequence[Audit], last: int, *, is_labeled: bool) -> list[alt.Chart]:
    """A line at the end of each context, where there are positions beyond it."""
    ends = sorted({audit.summary["n_positions"] for audit in audits if audit.summary["n_positions"] <= last})
    if not ends:
        return []
    base = alt.Chart(inline_data([{"end": end - 0.5, "label": f"end of context ({end})"} for end in ends]))
    at = alt.X("end:Q")
    label = base.mark_text(align="right", baseline="top", dx=-4, fontSize=10)
    label = label.encode(x=at, y=alt.value(2), text="label:N")
    rule = base.mark_rule(strokeDash=[4, 3], color=_GRAY).encode(x=at)
    return [rule, label] if is_labeled else [rule]


def _sinks(audits: Sequence[Audit]) -> list[alt.Chart]:
    """A mark at each position that has attention sinks."""
    sinks = {
        row["position"]: {
            "position": row["position"],
            "value": row["stream_norm"],
            "attention sinks": row["sink_tokens"],
        }
        for audit in audits
        for row in audit.positions.to_dict("records")
        if row["mask"] == "on" and row["sink_tokens"] > 0 and math.isfinite(row["stream_norm"])
    }
    if not sinks:
        return []
    mark = alt.Chart(inline_data(list(sinks.values()))).mark_point(
        shape="triangle-down", filled=True, size=60, color=COLORS[5], opacity=1, yOffset=-7
    )
    return [mark.encode(x="position:Q", y="value:Q", tooltip=["position:Q", "attention sinks:Q"])]


def _classes(audits: Sequence[Audit]) -> Figure:
    """The share of each class of latents with its interval and count; one bar per SAE and mask."""
    values = [
        {"sae": audit.name, "mask": f"mask {mask}", "bar": f"{audit.name}, {mask}", "class": name, **numbers}
        for audit in audits
        for mask, shares in audit.summary["classes"].items()
        for name, numbers in shares.items()
    ]
    bars = list(dict.fromkeys(value["bar"] for value in values))
    names = list(dict.fromkeys(value["class"] for value in values))
    masks = list(dict.fromkeys(value["mask"] for value in values))
    base = alt.Chart(inline_data(values)).encode(
        y=alt.Y("class:N", sort=names, title=None, axis=alt.Axis(labelFontSize=12, ticks=False, domain=False)),
        yOffset=alt.YOffset("bar:N", sort=bars),
    )
    bar = base.mark_bar().encode(
        x=alt.X(
            "share:Q", title="share of latents", axis=alt.Axis(format="%", tickCount=6), scale=alt.Scale(domain=[0, 1])
        ),
        color=_color(audits),
        fillOpacity=alt.FillOpacity(
            "mask:O",
            title=None,
            scale=alt.Scale(domain=masks, range=[1, 0.4][: len(masks)]),
            legend=alt.Legend(orient="top", symbolType="square", symbolFillColor=_GRAY) if len(masks) > 1 else None,
        ),
        tooltip=[
            "sae:N",
            "mask:N",
            "class:N",
            alt.Tooltip("count:Q", format=","),
            *(alt.Tooltip(f"{name}:Q", format=".2%") for name in ("share", "low", "high")),
        ],
    )
    whisker = base.mark_rule(strokeWidth=1.5, color=_GRAY).encode(x="low:Q", x2="high:Q")
    text = base.mark_text(align="left", dx=4, fontSize=11).encode(x="high:Q", text=alt.Text("count:Q", format=","))
    height = (STEP * len(bars) + 8) * len(names)
    return alt.layer(bar, whisker, text).properties(width="container", height=height)


def _order(audits: Sequence[Audit]) -> Figure | None:
    """Accuracy of probes for order on codes and on the stream, and the difference with its interval."""
    values = [
        {"sae": audit.name, "row": f"{line['about']}, k = {line['k']}", **line}
        for audit in audits
        for line in audit.summary["order"]
    ]
    if not values:
        return None
    rows = list(dict.fromkeys(value["row"] for value in sorted(values, key=lambda value: (value["about"], value["k"]))))
    data = inline_data(values)
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(labelLimit=200, grid=True))
    offset = alt.YOffset("sae:N", sort=[audit.name for audit in audits])
    points = inline_data(
        [
            {key: value[key] for key in ("sae", "row", "about", "k")} | {"on": on, "accuracy": value[on]}
            for value in values
            for on in ("codes", "stream")
        ]
    )
    accuracy = alt.X(
        "accuracy:Q", title="accuracy of probes; 0.5 is chance", scale=alt.Scale(zero=False), axis=_FEW_TICKS
    )
    dots = (
        alt.Chart(points)
        .mark_point(size=70, opacity=1)
        .encode(
            y=y,
            yOffset=offset,
            x=accuracy,
            color=_color(audits),
            shape=alt.Shape(
                "on:N",
                title=None,
                scale=alt.Scale(domain=["codes", "stream"], range=["circle", "diamond"]),
                legend=alt.Legend(orient="top", columns=2, symbolStrokeColor=_GRAY),
            ),
            fillOpacity=alt.FillOpacity("on:O", scale=alt.Scale(domain=["codes", "stream"], range=[1, 0]), legend=None),
            tooltip=["sae:N", "row:N", "on:N", alt.Tooltip("accuracy:Q", format=".3f")],
        )
        .encode(fill=_fill(audits))
    )
    links = alt.Chart(data).mark_rule(color=_GRAY).encode(y=y, yOffset=offset, x="stream:Q", x2="codes:Q")
    difference = (
        alt.Chart(data)
        .mark_point(size=60, filled=True, opacity=1)
        .encode(
            y=y,
            yOffset=offset,
            x=alt.X("difference:Q", title="codes minus stream, 95 % interval", axis=_FEW_TICKS),
            color=_color(audits),
            tooltip=[
                "sae:N",
                "row:N",
                *(
                    alt.Tooltip(f"{name}:Q", format="+.3f")
                    for name in ("difference", "difference_low", "difference_high")
                ),
            ],
        )
    )
    ranges = (
        alt.Chart(data)
        .mark_rule(strokeWidth=1.5)
        .encode(y=y, yOffset=offset, x="difference_low:Q", x2="difference_high:Q", color=_color(audits))
    )
    height = max(24, STEP * len(audits) + 6) * len(rows)
    parts = [
        alt.layer(dots, links, _rule_at(0.5)).properties(width=270, height=height),
        alt.layer(difference, ranges, _rule_at(0)).properties(width=270, height=height),
    ]
    return alt.concat(*parts, columns=2)


def _rule_at(value: float) -> alt.Chart:
    rule = alt.Chart(inline_data([{"at": value}])).mark_rule(strokeDash=[2, 3], color=_GRAY)
    return rule.encode(x="at:Q")


def _removal(audits: Sequence[Audit]) -> Figure | None:
    """The increase of the cross-entropy by window without each group of latents, with its interval."""
    values = [
        {
            "sae": audit.name,
            "window": _window(line, audit),
            "dot": f"{audit.name}, {line['removed']}",
            **{key: value for key, value in line.items() if value is not None},
        }
        for audit in audits
        for line in audit.summary["removal"]
    ]
    if not values:
        return None
    groups = sorted({value["removed"] for value in values}, reverse=True)
    windows = list(dict.fromkeys(value["window"] for value in values))
    dots = list(dict.fromkeys(value["dot"] for value in values))
    base = alt.Chart(inline_data(values)).encode(
        y=alt.Y("window:N", sort=windows, title="positions", axis=alt.Axis(grid=True)),
        yOffset=alt.YOffset("dot:N", sort=dots),
        color=_color(audits),
    )
    point = base.mark_point(size=70, opacity=1).encode(
        x=alt.X("cross_entropy_increase:Q", title="increase of the cross-entropy without them, nats", axis=_FEW_TICKS),
        fill=_fill(audits),
        shape=alt.Shape(
            "removed:N",
            title=None,
            scale=alt.Scale(domain=groups, range=["circle", "diamond"]),
            legend=alt.Legend(orient="top", columns=2, symbolStrokeColor=_GRAY, labelLimit=220),
        ),
        fillOpacity=alt.FillOpacity("removed:O", scale=alt.Scale(domain=groups, range=[1, 0]), legend=None),
        tooltip=[
            "sae:N",
            "removed:N",
            "latents:Q",
            "window:N",
            *(alt.Tooltip(f"cross_entropy_increase{end}:Q", format=".4f") for end in ("", "_low", "_high")),
        ],
    )
    whisker = base.mark_rule(strokeWidth=1.5).encode(
        x="cross_entropy_increase_low:Q", x2="cross_entropy_increase_high:Q"
    )
    height = (STEP * len(dots) + 8) * len(windows)
    return alt.layer(point, whisker, _rule_at(0)).properties(width="container", height=height)


def _window(line: dict[str, Any], audit: Audit) -> str:
    text = f"{line['first_position']}–{line['last_position']}"
    return f"all, {text}" if _is_longest(line, audit.summary["removal"]) else text


def _is_longest(line: dict[str, Any], lines: Iterable[dict[str, Any]]) -> bool:
    return line["last_position"] - line["first_position"] == max(
        other["last_position"] - other["first_position"] for other in lines
    )
