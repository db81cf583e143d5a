"""The study's table: one line a cell, means over seeds, tasks and datasets of the rows it stands on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posmask.rows import Row, parse_slice

__all__ = ["ORDER_KS", "PROBE_KS", "Line", "summarise"]

ORDER_KS = (1, 5, 20)
PROBE_KS = (1, 5)


@dataclass(frozen=True)
class Line:
    """One line of the table. NaN where a line has no such number.

    `order` and `probing` hold one mean accuracy for each k, over order tasks and over datasets.
    """

    label: str
    mask: str
    budget: str
    apply: str
    n_seeds: int
    d_sae: float
    explained_variance: float
    dead_share: float
    retention: float
    retention_chance: float
    profile_fidelity: float
    order: dict[int, float]
    probing: dict[int, float]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def summarise(rows: Sequence[Row]) -> list[Line]:
    """Cells in their order, then segment pooling of the cells that have it, then the model's own channels."""
    names = list(dict.fromkeys(row.cell for row in rows))
    lines, pooled_lines, model_lines = [], [], []
    for name in names:
        own = [row for row in rows if row.cell == name]
        slices = [parse_slice(row.slice) for row in own]
        poolings = list(dict.fromkeys(slice["pooling"] for slice in slices if "pooling" in slice))

        def overall(metric: str, own: list[Row] = own) -> float:
            return _mean(row.value for row in own if row.metric == metric and not row.slice)

        def accuracy(metric: str, k: int, pooling: str | None = None, own: list[Row] = own, slices=slices) -> float:
            return _mean(
                row.value
                for row, where in zip(own, slices, strict=True)
                if row.metric == metric and where["k"] == str(k) and where.get("pooling") == pooling
            )

        for pooling in poolings or ["mean"]:
            is_model, is_mean = own[0].mask == "none", pooling == "mean"
            line = Line(
                label="the model itself" if is_model else name if is_mean else f"{name} + {pooling}",
                mask=own[0].mask,
                budget=own[0].budget,
                apply=own[0].apply,
                n_seeds=len({row.seed for row in own}),
                d_sae=overall("d_sae"),
                explained_variance=overall("explained_variance"),
                dead_share=overall("dead_share"),
                retention=overall("retention"),
                retention_chance=overall("retention_chance"),
                profile_fidelity=overall("profile_fidelity"),
                order={k: accuracy("order_accuracy", k, pooling) for k in ORDER_KS},
                probing={k: accuracy("probe_accuracy", k) if is_mean else math.nan for k in PROBE_KS},
            )
            (model_lines if is_model else lines if is_mean else pooled_lines).append(line)
    return lines + pooled_lines + model_lines
