"""The study's table: one line a cell, means over seeds, tasks and datasets of the rows it stands on."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posmask.results.rows import Row, parse_slice

__all__ = ["ORDER_KS", "PROBE_KS", "Line", "summarize"]

ORDER_KS = (1, 5, 20)
PROBE_KS = (1, 5)


@dataclass(frozen=True)
class Line:
    """One line of the table: a cell at one pooling. NaN where a line has no such number.

    `order` and `probing` hold one mean accuracy for each k, over order tasks and over datasets; `overall` the cell's
    other numbers by metric, and `retention_gain`, retention less its chance, which differs between masks.
    """

    label: str
    pooling: str
    mask: str
    budget: str
    gating: str
    n_seeds: int
    overall: dict[str, float]
    order: dict[int, float]
    probing: dict[int, float]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def summarize(rows: Sequence[Row]) -> list[Line]:
    """Cells in their order, then their other poolings, then the model's own channels."""
    names = list(dict.fromkeys(row.cell for row in rows))
    lines, pooled_lines, model_lines = [], [], []
    for name in names:
        own = [row for row in rows if row.cell == name]
        slices = [parse_slice(row.slice) for row in own]
        poolings = list(dict.fromkeys(slice["pooling"] for slice in slices if "pooling" in slice)) or ["mean"]
        by_metric: dict[str, list[float]] = {}
        for row in own:
            if not row.slice:
                by_metric.setdefault(row.metric, []).append(row.value)

        def accuracy(metric: str, k: int, pooling: str, own: list[Row] = own, slices=slices) -> float:
            return _mean(
                row.value
                for row, where in zip(own, slices, strict=True)
                if row.metric == metric
                and where["k"] == str(k)
                and where["pooling"] == pooling
                and "class" not in where
            )

        for pooling in poolings:
            overall = {metric: _mean(found) for metric, found in by_metric.items()}
            if "retention" in overall and "retention_chance" in overall:
                overall["retention_gain"] = overall["retention"] - overall["retention_chance"]
            is_model, is_mean = own[0].mask == "none", pooling == "mean"
            who = "the model itself" if is_model else name
            line = Line(
                label=who if is_mean else f"{who} + {pooling}",
                pooling=pooling,
                mask=own[0].mask,
                budget=own[0].budget,
                gating=own[0].gating,
                n_seeds=len({row.seed for row in own}),
                overall=defaultdict(lambda: math.nan, overall),
                order={k: accuracy("order_accuracy", k, pooling) for k in ORDER_KS},
                probing={k: accuracy("probe_accuracy", k, pooling) for k in PROBE_KS},
            )
            (model_lines if is_model else lines if is_mean else pooled_lines).append(line)
    return lines + pooled_lines + model_lines
