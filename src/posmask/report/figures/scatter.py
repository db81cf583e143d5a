"""The scatter plot of reconstruction against order accuracy, with as many names of marks as fit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from posmask.report.figures.style import Figure, inline_data
from posmask.report.tables import Number
from posmask.results.table import COLUMNS, Line

__all__ = ["trade_off"]

_X, _Y = "explained variance", "block order accuracy"
_SHOWN = f"{_X} shown"
_OFF = "off the scale"
_MARKS = {
    "equal width": "circle",
    "equal compute": "square",
    "another pooling": "triangle-up",
    "control": "cross",
    _OFF: "triangle-left",
}
_LEAST_SPAN = 0.02  # of explained variance
_NARROW = 270  # width of the plot on a phone, in pixels
_HEIGHT = 330
_LETTER, _LINE = 6.5, 12  # size of a letter in pixels
_Box = tuple[float, float, float, float]  # left, right, bottom, top


def trade_off(
    lines: Sequence[tuple[Line, str]],
    numbers: Mapping[str, Sequence[Number | None]],
    k: int,
    baselines: Sequence[str],
    colors: Mapping[str, str],
    width: int = 850,
) -> Figure | None:
    """Return the chart with one mark per cell; None if no cell has both numbers.

    A cell with another pooling has the reconstruction of the cell. Names are placed where they fit: those of
    `baselines` first, then of cells that no other cell beats in both numbers, then of the others.

    Args:
        lines: lines of the tables with their labels.
        numbers: the tables' numbers by label, for the intervals.
        k: number of latents of the probes.
        baselines: the baseline cells.
        colors: of the cells.
        width: approximate width in pixels, which decides which names fit.
    """
    values = _values(lines, numbers, k)
    for value in values:
        value["color"] = colors[value.pop("of")]
    if not values:
        return None
    _set_shown(values)
    _set_name_sides(values, baselines, width)
    _set_name_sides(values, baselines, _NARROW, " narrow")
    kinds = {value["what"] for value in values}
    shown = [kind for kind in _MARKS if kind in kinds]
    color = alt.Color("color:N", scale=None)
    shape = alt.Shape(
        "what:N",
        title=None,
        scale=alt.Scale(domain=shown, range=[_MARKS[kind] for kind in shown]),
        legend=alt.Legend(symbolFillColor="#888", symbolStrokeColor="#888"),
    )
    y_title = f"{_Y}, k = {k}"
    base = alt.Chart(inline_data(values)).encode(
        x=alt.X(f"{_SHOWN}:Q", scale=alt.Scale(zero=False, padding=26), axis=alt.Axis(tickCount=8), title=_X),
        y=alt.Y(f"{_Y}:Q", scale=alt.Scale(zero=False, padding=22), title=y_title),
        tooltip=[
            "cell:N",
            "what:N",
            alt.Tooltip(f"{_X}:Q", format=".3f"),
            f"range of {_X}:N",
            alt.Tooltip(f"{_Y}:Q", format=".3f"),
            f"range of {_Y}:N",
        ],
    )
    rule = base.mark_rule(strokeWidth=1, strokeOpacity=0.6).encode(color=color)
    horizontal = rule.encode(x=alt.X(f"{_X} low:Q", title=_X), x2=f"{_X} high:Q")
    vertical = rule.encode(y=alt.Y(f"{_Y} low:Q", title=y_title), y2=f"{_Y} high:Q")
    intervals = [
        rule.transform_filter(f"isValid(datum['{axis} low'])")
        for axis, rule in ((_X, horizontal), (_Y, vertical))
        if any(f"{axis} low" in value for value in values)
    ]
    return alt.layer(
        *intervals,
        base.mark_point(size=80, filled=True, opacity=1).encode(shape=shape, color=color),
        base.mark_text(align="right", dx=-9, dy=-7, fontSize=11).encode(text="left:N"),
        base.mark_text(align="left", dx=9, dy=-7, fontSize=11).encode(text="right:N"),
    ).properties(width="container", height=380)


def _values(
    lines: Sequence[tuple[Line, str]], numbers: Mapping[str, Sequence[Number | None]], k: int
) -> list[dict[str, Any]]:
    """A value per mark, with the bounds of its intervals where there are any."""
    columns = {_X: "explained_variance", _Y: f"block k={k}"}
    index = {column.name: i for i, column in enumerate(COLUMNS)}
    values = []
    for line, label in lines:
        coordinates = {axis: line.numbers[name] for axis, name in columns.items()}
        if line.pooling == "fair" or any(map(math.isnan, coordinates.values())):
            continue
        kind = "control" if line.is_control else f"equal {line.budget}"
        if not line.is_control and line.pooling != "mean":
            kind = "another pooling"
        cell = label if line.pooling == "mean" else label.removesuffix(f" + {line.pooling}")
        value: dict[str, Any] = {"cell": label, "of": cell, **coordinates, "what": kind}
        # Reconstruction is the cell's, whatever its codes are pooled by.
        labels = {_X: label if line.is_control else label.removesuffix(f" + {line.pooling}"), _Y: label}
        for axis, name in columns.items():
            number = numbers[labels[axis]][index[name]]
            value[f"range of {axis}"] = "none"
            if number is not None and math.isfinite(number.ci_low):
                value |= {
                    f"{axis} low": number.ci_low,
                    f"{axis} high": number.ci_high,
                    f"range of {axis}": number.interval,
                }
        values.append(value)
    return values


def _set_shown(values: list[dict[str, Any]]) -> None:
    """Set where each value is drawn: at the edge if it is a control far from all SAEs, so that these stay apart."""
    ends = [
        [value.get(f"{_X} {end}", value[_X]) for value in values if value["what"] != "control"]
        for end in ("low", "high")
    ]
    low, high = (min(ends[0]), max(ends[1])) if ends[0] else (-math.inf, math.inf)
    span = max(high - low, _LEAST_SPAN)
    for value in values:
        nearest = min(max(value[_X], low - span / 4), high + span / 4)
        is_off = value["what"] == "control" and abs(nearest - value[_X]) > span
        value[_SHOWN] = nearest if is_off else value[_X]
        if is_off:
            value["what"] = _OFF
            for end in ("low", "high"):
                value.pop(f"{_X} {end}", None)


def _set_name_sides(values: list[dict[str, Any]], baselines: Sequence[str], width: int, suffix: str = "") -> None:
    """Set `left` or `right` of each value to its name where the name hits no other mark or name."""
    marks = list(zip(_pixels(values, _SHOWN, width), _pixels(values, _Y, _HEIGHT), strict=True))
    taken: list[_Box] = [(x - 6, x + 6, y - 6, y + 6) for x, y in marks]

    def rank(index: int) -> tuple[bool, bool, float]:
        value = values[index]
        beaten = any(other[_X] >= value[_X] and other[_Y] > value[_Y] for other in values)
        return value["cell"] not in baselines, beaten, 0 if beaten else -value[_Y]

    for index in sorted(range(len(values)), key=rank):
        value, (x, y) = values[index], marks[index]
        value |= {f"left{suffix}": "", f"right{suffix}": ""}
        name = f"{value['cell']}: {value[_X]:.3f}" if value["what"] == _OFF else value["cell"]
        length = _LETTER * len(name)
        boxes: dict[str, _Box] = {
            side: (start, start + length, y + 7 - _LINE / 2, y + 7 + _LINE / 2)
            for side, start in (("left", x - 9 - length), ("right", x + 9))
        }
        free = [
            side
            for side, box in boxes.items()
            if box[0] > -60 and box[1] < width + 60 and not any(_overlap(box, other) for other in taken)
        ]
        if not free and (value["cell"] in baselines or value["what"] == _OFF):
            free = ["left" if value["cell"] in baselines else "right"]
        if free:
            value[free[0] + suffix] = name
            taken.append(boxes[free[0]])


def _pixels(values: list[dict[str, Any]], axis: str, n_pixels: int) -> list[float]:
    """The values' coordinates in pixels; the plot extends to the bounds of the intervals."""
    bounds = axis.removesuffix(" shown")
    low = min(value.get(f"{bounds} low", value[axis]) for value in values)
    high = max(value.get(f"{bounds} high", value[axis]) for value in values)
    return [n_pixels * ((value[axis] - low) / (high - low) if high > low else 0.5) for value in values]


def _overlap(box: _Box, other: _Box) -> bool:
    return box[0] <= other[1] and box[1] >= other[0] and box[2] <= other[3] and box[3] >= other[2]
