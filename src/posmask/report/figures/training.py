"""The chart of training curves, and the curves as `curve.csv` has them."""

import csv
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from posmask.errors import first_line
from posmask.report.figures.style import Figure, cell_color, for_picked_cells, inline_data
from posmask.report.reading import CellFolder
from posmask.storage.layout import CURVE_FILE

__all__ = ["read_curves", "training"]


def read_curves(pictured: Sequence[CellFolder], warnings: list[str]) -> list[dict[str, Any]]:
    """Return explained variance and mean openness by cell and number of training tokens; NaN where not recorded."""
    values = []
    for cell in pictured:
        try:
            with (cell.path / CURVE_FILE).open(encoding="utf8") as file:
                for line in csv.DictReader(file):
                    values.append(
                        {
                            "cell": cell.cell,
                            "tokens": int(line["tokens"]),
                            "explained variance": max(0.0, _finite(line["explained_variance"])),
                            "openness": float(line.get("mean_openness") or "nan"),
                        }
                    )
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            warnings.append(f"The training curve of {cell.label} cannot be read ({first_line(error)}).")
    return values


def _finite(text: str) -> float:
    """
    Raises:
        ValueError: it is not a finite number.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def training(curves: list[dict[str, Any]], colors: Mapping[str, str]) -> Figure | None:
    """Return explained variance of training batches, one line per cell; None without curves."""
    values = [{key: value for key, value in point.items() if key != "openness"} for point in curves]
    if not values:
        return None
    chart = (
        alt.Chart(inline_data(values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("explained variance:Q"),
            color=cell_color((value["cell"] for value in values), colors),
            tooltip=["cell:N", "tokens:Q", alt.Tooltip("explained variance:Q", format=".3f")],
        )
    )
    return for_picked_cells(chart, 240)
