"""Charts of masks: after training, during training, and the distribution of their openness."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from posmask.errors import DamagedFolder
from posmask.report.arrays import read_arrays, read_openness_of
from posmask.report.figures.style import Figure, cell_color, inline_data
from posmask.report.reading import CellFolder
from posmask.storage.layout import OPENNESS_FILE, SNAPSHOTS_FILE

__all__ = ["learned_masks", "mask_pictures", "read_openness", "snapshots"]

_N_LATENT_BINS = 40
_N_POSITION_BINS = 32
_SNAPSHOT_BINS = (24, 16)  # latents, positions


def read_openness(cell: CellFolder, warnings: list[str]) -> np.ndarray | None:
    """Return the openness [position latent] of a cell's mask; None if it cannot be read."""
    try:
        return read_openness_of(cell.path / OPENNESS_FILE)
    except DamagedFolder as error:
        warnings.append(f"The mask of {cell.label} cannot be read ({str(error)[:120]}).")
        return None


def mask_pictures(masks: dict[str, np.ndarray]) -> Figure | None:
    """Return each mask after training, binned, latents ordered by where they are open; None without masks."""
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
        alt.Chart(inline_data(values))
        .mark_rect()
        .encode(
            x=alt.X("position:O", axis=alt.Axis(values=[0, 32, 64, 96], labelAngle=0, ticks=False), title="position"),
            y=alt.Y("latents:O", axis=alt.Axis(labels=False, ticks=False, domain=False), title="latents"),
            color=alt.Color(
                "openness:Q",
                scale=alt.Scale(scheme="blues", domain=[0, 1]),
                legend=alt.Legend(orient="top", gradientLength=160),
            ),
            tooltip=["cell:N", "position:O", "openness:Q"],
        )
        .properties(width=5 * _N_POSITION_BINS, height=3 * _N_LATENT_BINS)  # whole pixels per bin
        .facet(alt.Facet("cell:N", sort=list(masks), title=None, header=alt.Header(labelLimit=160)), columns=4)
        .resolve_scale(x="shared")
        .properties(usermeta={"columns": 178, "canvas": True})
    )


def snapshots(learned: Sequence[CellFolder], warnings: list[str]) -> Figure | None:
    """Return learned masks at up to eight moments of training, latents ordered by where they are open at the end.

    None if no cell has snapshots.
    """
    values, n_moments = [], 0
    for cell in learned:
        try:
            shapes = {"openness": "moment position latent:u", "tokens": "moment:i"}
            arrays = read_arrays(cell.path / SNAPSHOTS_FILE, shapes)
            openness, tokens = arrays["openness"] / 255, arrays["tokens"].tolist()
        except DamagedFolder as error:
            warnings.append(f"The mask of {cell.label} during training cannot be read ({str(error)[:120]}).")
            continue
        n_moments = max(n_moments, len(tokens))
        values += _snapshot_values(cell.cell, openness, tokens)
    return _snapshot_chart(values, n_moments) if values else None


def _snapshot_values(cell: str, openness: np.ndarray, tokens: list[int]) -> list[dict[str, Any]]:
    """A value per bin of openness [moment position latent]."""
    order = _by_center(openness[-1])
    n_positions = openness.shape[1]
    return [
        {
            "cell": cell,
            "moment": moment,
            "tokens": n_tokens,
            "position": int(position * n_positions / min(_SNAPSHOT_BINS[1], n_positions)),
            "latents": int(latents),
            "openness": round(float(value), 2),
        }
        for moment, (mask, n_tokens) in enumerate(zip(openness, tokens, strict=True), start=1)
        for (latents, position), value in np.ndenumerate(_binned(mask[:, order], *_SNAPSHOT_BINS))
    ]


def _snapshot_chart(values: list[dict[str, Any]], n_moments: int) -> Figure:
    return (
        alt.Chart(inline_data(values))
        .mark_rect()
        .encode(
            x=alt.X("position:O", axis=None),
            y=alt.Y("latents:O", axis=None),
            color=alt.Color(
                "openness:Q",
                scale=alt.Scale(scheme="blues", domain=[0, 1]),
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
                title=f"from the first step (1) to the last ({n_moments})",
                header=alt.Header(titleFontWeight="normal", titleAnchor="start"),
            ),
            spacing=6,
        )
        .properties(usermeta={"canvas": True, "moment": 6 + 5 * _SNAPSHOT_BINS[1]})
    )


def learned_masks(
    curves: list[dict[str, Any]], masks: dict[str, np.ndarray], colors: Mapping[str, str]
) -> Figure | None:
    """Return mean openness during training, and the distribution of openness at its end; None without masks."""
    if not masks:
        return None
    path = [
        {key: point[key] for key in ("cell", "tokens", "openness")}
        for point in curves
        if point["cell"] in masks and math.isfinite(point["openness"])
    ]
    ends = []
    for cell, openness in masks.items():
        counts, edges = np.histogram(openness[1:], bins=20, range=(0, 1))
        ends += [
            {"cell": cell, "openness": round(float(edge) + 0.025, 3), "share": round(float(count / counts.sum()), 5)}
            for edge, count in zip(edges, counts, strict=False)
        ]
    color = cell_color(masks, colors)
    during = (
        alt.Chart(inline_data(path))
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
        alt.Chart(inline_data(ends))
        .mark_line(strokeWidth=1.5, interpolate="step")
        .encode(
            x=alt.X("openness:Q", title="openness of a latent at a position, after training"),
            y=alt.Y("share:Q", title="fraction of latents × positions", axis=alt.Axis(format="%")),
            color=color,
            tooltip=["cell:N", "openness:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=270, height=180)
    )
    return alt.concat(during, final, columns=2) if path else final


def _by_center(openness: np.ndarray) -> np.ndarray:
    """Indices of the latents, sorted by their center of openness."""
    positions = np.arange(openness.shape[0])[:, None]
    center = (openness * positions).sum(0) / np.maximum(openness.sum(0), 1e-9)
    return np.argsort(center, kind="stable")


def _binned(ordered: np.ndarray, n_latent_bins: int, n_position_bins: int) -> np.ndarray:
    """Average openness [position latent] into bins [latent_bin position_bin]."""
    rows = np.array_split(np.arange(ordered.shape[1]), min(n_latent_bins, ordered.shape[1]))
    columns = np.array_split(np.arange(ordered.shape[0]), min(n_position_bins, ordered.shape[0]))
    return np.array([[ordered[np.ix_(column, row)].mean() for column in columns] for row in rows])
