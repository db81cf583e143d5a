"""Colors and pieces that the charts share."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt
from altair.utils import schemapi

from posmask.results.rows import Row

__all__ = [
    "COLORS",
    "STEP",
    "Figure",
    "as_spec",
    "cell_color",
    "cell_colors",
    "for_picked_cells",
    "inline_data",
]

# Okabe and Ito's colors and others: distinct for color-blind readers, on light and dark backgrounds.
COLORS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C6BB1",
    "#999933",
    "#A05A2C",
    "#00B3A4",
    "#B5485D",
    "#4B5FC1",
    "#7FA23A",
    "#D99AC5",
    "#3E6E6B",
]
OPEN_COLORS = ["#666666", "#9A9A9A", "#B8B8B8"]
"""Cells without a mask are gray, so that masks stand out."""
STEP = 17
"""Height of a bar in pixels."""
Figure = alt.TopLevelMixin


def cell_colors(rows: Iterable[Row]) -> dict[str, str]:
    """Return the color of each cell, the same in every chart."""
    masks = {row.cell: row.mask for row in rows if row.mask != "none"}
    palettes = {True: itertools.cycle(OPEN_COLORS), False: itertools.cycle(COLORS)}
    return {cell: next(palettes[mask == "open"]) for cell, mask in masks.items()}


def cell_color(cells: Iterable[str], colors: Mapping[str, str]) -> alt.Color:
    """Return the color channel of the field `cell`."""
    cells = list(dict.fromkeys(cells))
    legend = alt.Legend(symbolLimit=0, columns=1, labelLimit=150, symbolType="stroke", symbolStrokeWidth=3)
    scale = alt.Scale(domain=cells, range=[colors[cell] for cell in cells])
    return alt.Color("cell:N", scale=scale, title=None, legend=legend)


def inline_data(values: list[dict[str, Any]]) -> alt.Data:
    """Return values as a chart's data."""
    with schemapi.debug_mode(False):  # Checking ten thousand plain values against a schema takes seconds.
        return alt.Data(values=values)


def for_picked_cells(chart: alt.TopLevelMixin, height: int) -> Figure:
    """Return the chart as wide as the page, marked as one that shows the cells that the reader picks."""
    return chart.properties(width="container", height=height, usermeta={"cells": True})  # pyright: ignore


def as_spec(chart: Figure) -> dict[str, Any]:
    """Return the chart as a Vega-Lite specification."""
    return chart.to_dict(validate=False)
