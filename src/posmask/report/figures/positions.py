"""Charts by position: panels on top of each other that share a logarithmic axis of positions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from posmask.report.figures.style import Figure, cell_color, inline_data
from posmask.report.reading import Numbers
from posmask.results.rows import Row

__all__ = [
    "is_steady",
    "position_axis",
    "position_bin",
    "position_strip",
    "stacked",
    "steady",
    "with_targets",
    "zero_line",
]

_STEADY = 0.005
"""A metric that varies by less over positions, relative to its mean, is not drawn."""
_PER_OCTAVE = 8
_SMOOTHED = 2  # bins per octave of the cross-entropy, which is measured on few contexts
_Values = list[dict[str, Any]]


def position_bin(position: int, per_octave: int = _PER_OCTAVE) -> int:
    """Return a number of the bin of a position: single positions at first, then `per_octave` bins per octave.

    >>> [position_bin(p, 2) == position_bin(p + 1, 2) for p in (1, 2, 3, 4, 5, 6)]
    [False, False, False, True, False, True]
    """
    octave = max(0, math.floor(math.log2(max(position, 1) / per_octave)))
    return (octave << 32) + (position >> octave)


def position_axis(last: int, is_lowest: bool = True) -> alt.X:
    """Return the channel of the field `position` on a logarithmic scale from 1 to `last`.

    Args:
        last: largest position.
        is_lowest: whether it is the axis of the lowest panel, which alone has a title and labels.
    """
    ticks = [2**power for power in range(math.floor(math.log2(max(last, 1))) + 1)]
    return alt.X(
        "position:Q",
        title="position in the context (logarithmic scale)" if is_lowest else None,
        scale=alt.Scale(type="log", base=2, domain=[1, max(last, 2)], nice=False),
        axis=alt.Axis(values=ticks, format="d", grid=True, labels=is_lowest, ticks=is_lowest),
    )


def stacked(panels: Mapping[str, alt.LayerChart | alt.FacetChart], height: int = 120, **top: Any) -> alt.VConcatChart:
    """Return panels on top of each other, as wide as the page.

    Args:
        panels: by title, which names the quantity of the vertical axis and its unit.
        height: of a panel, in pixels.
        top: arguments of the whole chart, for example `data`.
    """
    titled = [panel.properties(height=height, width=520, title=_title(title)) for title, panel in panels.items()]
    return alt.vconcat(*titled, spacing=14, **top).resolve_scale(color="shared", strokeDash="shared")


def _title(text: str) -> alt.Title:
    return alt.Title(text, anchor="start", frame="group", fontSize=11, offset=5)


def with_targets(line: alt.Chart, tooltip: Sequence[Any]) -> list[alt.Chart]:
    """Return a chart of lines, and invisible marks on its points that show the tooltip: lines alone are hard to hit."""
    points = line.mark_point(opacity=0, size=120).encode(tooltip=tooltip, strokeDash=alt.Undefined)
    return [line, points]


def zero_line() -> alt.Chart:
    """Return a horizontal line at zero."""
    return alt.Chart(inline_data([{"at": 0}])).mark_rule(color="#888").encode(y="at:Q")


def position_strip(
    numbers: Numbers, colors: Mapping[str, str], models: Sequence[str], minus: Mapping[str, str]
) -> Figure | None:
    """Return explained variance, loss recovered, L0 and the norm of the stream by position after BOS.

    Values are means over seeds and bins of positions. Explained variance is a difference to the baseline where there
    is one; a metric without numbers or that does not depend on position has no panel. None without any panel.

    Args:
        numbers: the rows.
        colors: of the cells.
        models: names of the models themselves in the rows, one per study.
        minus: the baseline of each cell that has one.
    """
    values = {
        "difference": _differences(numbers, colors, minus),
        "explained variance": _of_cells(numbers, colors, "explained_variance"),
        "loss recovered": _of_cells(numbers, colors, "ce_recovered", _SMOOTHED),
        "L0": _of_cells(numbers, colors, "l0"),
        "norm": [
            {"stream": model, **value}
            for model in models
            for value in _binned(_at_positions(numbers, model, "stream_norm"))
        ],
    }
    if values["difference"]:
        del values["explained variance"]
    shown = {
        name: of_panel
        for name, of_panel in values.items()
        if of_panel and (name in ("difference", "norm") or not is_steady(of_panel, "cell"))
    }
    if not shown:
        return None
    baselines = set(minus.values())
    titles = {
        "difference": f"explained variance − {min(baselines) if len(baselines) == 1 else 'baseline'}",
        "loss recovered": "loss recovered, smoothed (1: the unmodified model)",
        "L0": "L0, active latents per token",
        "norm": "mean norm of the stream, in the model's units",
    }
    last = max(value["position"] for of_panel in shown.values() for value in of_panel)
    color = cell_color(colors, colors)
    panels = {
        titles.get(name, name): _panel(name, position_axis(last, name == list(shown)[-1]), color, len(models))
        for name in shown
    }
    every = [{"panel": name, **value} for name, of_panel in shown.items() for value in of_panel]
    return stacked(panels, data=inline_data(every), usermeta={"cells": True})


def _panel(name: str, x: alt.X, color: alt.Color, n_models: int) -> alt.LayerChart | alt.FacetChart:
    y = alt.Y("value:Q", scale=alt.Scale(zero=False), title=None, axis=alt.Axis(tickCount=4, minExtent=34))
    value = alt.Tooltip("value:Q", format=".3f", title=name)
    line = alt.Chart().mark_line(strokeWidth=1.6).encode(x=x, y=y).transform_filter(f"datum.panel === '{name}'")
    if name != "norm":
        levels = [alt.Tooltip("explained variance:Q", format=".3f")] if name == "difference" else []
        layers = with_targets(line.encode(color=color), ["cell:N", "positions:N", value, *levels])
        layers = [zero_line(), *layers] if name == "difference" else layers
        return alt.layer(*layers).properties(description=name)
    if n_models > 1:
        legend = alt.Legend(orient="top", symbolType="stroke")
        line = line.encode(strokeDash=alt.StrokeDash("stream:N", title=None, legend=legend))
    return alt.layer(*with_targets(line, ["positions:N", value])).properties(description=name)


def _of_cells(numbers: Numbers, cells: Mapping[str, str], metric: str, per_octave: int = _PER_OCTAVE) -> _Values:
    return [
        {"cell": cell, **value} for cell in cells for value in _binned(_at_positions(numbers, cell, metric), per_octave)
    ]


def _differences(numbers: Numbers, cells: Mapping[str, str], minus: Mapping[str, str]) -> _Values:
    """Explained variance minus that of the baseline, at positions that both have."""
    values: _Values = []
    for cell in cells:
        if minus.get(cell, cell) == cell:
            continue
        at, base = (_at_positions(numbers, name, "explained_variance") for name in (cell, minus[cell]))
        shared = {position: value for position, value in at.items() if position in base}
        differences = {position: value - base[position] for position, value in shared.items()}
        values += [
            {"cell": cell, **difference, "explained variance": level["value"]}
            for difference, level in zip(_binned(differences), _binned(shared), strict=True)
        ]
    return values


def steady(rows: Sequence[Row], metric: str) -> str:
    """Return the value of a metric that does not depend on position in any cell; empty if it does or is missing."""
    numbers = Numbers(rows)
    cells = {row.cell: "" for row in rows if row.mask != "none"}
    values = _of_cells(numbers, cells, metric)
    if not values or not is_steady(values, "cell"):
        return ""
    ends = {f"{end(value['value'] for value in values):.4g}" for end in (min, max)}
    return " to ".join(sorted(ends, key=float))


def is_steady(values: _Values, *of: str) -> bool:
    """Return whether the values vary little in each line of a chart; the fields `of` identify a line."""
    lines: dict[tuple[Any, ...], list[float]] = {}
    for value in values:
        lines.setdefault(tuple(value[name] for name in of), []).append(value["value"])
    return all(max(each) - min(each) <= _STEADY * abs(sum(each)) / len(each) for each in lines.values())


def _at_positions(numbers: Numbers, cell: str, metric: str) -> dict[int, float]:
    """Means over seeds at each position."""
    values = {}
    for position, rows in numbers.by(cell, metric, "position").items():
        finite = [row.value for row in rows if math.isfinite(row.value)]
        if finite:
            values[int(position)] = sum(finite) / len(finite)
    return values


def _binned(at: Mapping[int, float], per_octave: int = _PER_OCTAVE) -> _Values:
    """Means over bins of positions."""
    bins: dict[int, list[int]] = {}
    for position in sorted(at):
        bins.setdefault(position_bin(position, per_octave), []).append(position)
    return [
        {
            "position": sum(positions) / len(positions),
            "positions": f"{positions[0]}–{positions[-1]}" if len(positions) > 1 else f"{positions[0]}",
            "value": sum(at[position] for position in positions) / len(positions),
        }
        for positions in bins.values()
        if positions[0] > 0
    ]
