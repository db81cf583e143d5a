"""The summary of an audit: counts, main numbers, and sentences that state them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from posmask.auditing.measures import Beyond
from posmask.evaluation.latent_table import CLASS_RULES, CLASSES, KIND_RULES, KINDS, LIFTED
from posmask.results.rows import Row, parse_slice

__all__ = ["summarized"]

_REMOVED = "position-tracking latents"


def summarized(
    about: Mapping[str, Any],
    rows: Sequence[Row],
    latents: pd.DataFrame,
    beyond: Beyond | None,
    order: pd.DataFrame,
    removal: pd.DataFrame,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        about: the SAE, model, site and texts.
        rows: of the evaluation.
        beyond: what differs beyond the SAE's context; None if it was not measured.
    """
    classes = {mask: _classes(rows, mask) for mask in ("on", "lifted")}
    classes = {mask: shares for mask, shares in classes.items() if shares}
    summary = {
        **about,
        "classes": classes,
        "kinds": {
            mask: {kind: latents[f"{prefix}kind"].tolist().count(kind) for kind in KINDS}
            for mask, prefix in (("on", ""), ("lifted", LIFTED))
            if mask in classes
        },
        "explained_variance": _overall(rows, "explained_variance"),
        "explained_variance_with_sinks": _overall(rows, "explained_variance_with_sinks"),
        "l0": _overall(rows, "l0"),
        "ce_recovered": _overall(rows, "ce_recovered"),
        "beyond": None if beyond is None else beyond | {"latents": _counts(latents["beyond_context"].tolist())},
        "order": [line for line in order.to_dict("records") if line["task"] == "all"],
        "removal": removal.to_dict("records"),
        "rules": {"classes": CLASS_RULES, "kinds": KIND_RULES},
    }
    return _plain({**summary, "sentences": list(_sentences(summary))})


def _classes(rows: Sequence[Row], mask: str) -> dict[str, dict[str, float]]:
    shares = {}
    for row in rows:
        where = parse_slice(row.slice)
        if row.metric == "latent_share" and where["mask"] == mask:
            count = round(row.value * row.n)
            shares[where["latents"]] = {"count": count, "share": row.value, "low": row.ci_low, "high": row.ci_high}
    return shares


def _overall(rows: Sequence[Row], metric: str) -> dict[str, Any] | None:
    row = next((row for row in rows if row.metric == metric and not row.slice), None)
    if row is None:
        return None
    return {
        "value": row.value,
        "low": row.ci_low,
        "high": row.ci_high,
        **({"reason": row.reason} if row.reason else {}),
    }


def _counts(verdicts: list[str]) -> dict[str, int]:
    """How many latents fire as often beyond the context as within it, and how many do not."""
    return {name: verdicts.count(name) for name in ("holds", "fails", "undecided")}


def _sentences(summary: Mapping[str, Any]) -> Any:
    """What was found, in sentences with their uncertainty."""
    for mask, shares in summary["classes"].items():
        parts = [
            f"{shares[name]['count']:,} {name} ({shares[name]['low']:.1%} to {shares[name]['high']:.1%})"
            for name in CLASSES
            if shares[name]["count"]
        ]
        lifted = " with the mask lifted" if mask == "lifted" else ""
        yield f"Of {summary['d_sae']:,} latents{lifted}: {', '.join(parts)}."
    variance = summary["explained_variance"]
    yield f"Explained variance {_with_interval(variance)}; {_number(summary['l0'])} active latents per token."
    if (beyond := summary["beyond"]) is not None:
        values = beyond["explained_variance"]
        counts = beyond["latents"]
        yield (
            f"Beyond its {summary['n_positions']} positions it explains {values['beyond']:.3f} of the variance, after "
            f"{values['last quarter of the context']:.3f} in the last quarter of them, on the same contexts; "
            f"latents that fire at similar rates there: {counts['holds']:,}, at other rates: {counts['fails']:,}."
        )
    largest = max((line["k"] for line in summary["order"]), default=0)
    for line in summary["order"]:
        if line["k"] == largest:
            yield (
                f"{line['about'].capitalize()} order: probes on {largest} features are right in {line['codes']:.3f} of "
                f"cases on codes and {line['stream']:.3f} on the stream, a difference of {line['difference']:+.3f} "
                f"({line['difference_low']:+.3f} to {line['difference_high']:+.3f}); chance is 0.5."
            )
    last = max((line["last_position"] for line in summary["removal"]), default=0)
    everywhere = {"first_position": 1, "last_position": last}
    whole = {line["removed"]: line for line in summary["removal"] if everywhere.items() <= line.items()}
    if _REMOVED in whole:
        of_tracking, of_matched = whole[_REMOVED], whole["matched latents"]
        yield (
            f"Cross-entropy without the {of_tracking['latents']} position-tracking latents: {_increase(of_tracking)} "
            f"nats higher; without as many matched latents: {_increase(of_matched)} nats higher."
        )
    else:
        yield "No position-tracking latent fires often enough for the causal test."


def _with_interval(number: Mapping[str, float]) -> str:
    return f"{number['value']:.3f} ({number['low']:.3f} to {number['high']:.3f})"


def _number(number: Mapping[str, float] | None) -> str:
    return "an unknown number of" if number is None else f"{number['value']:.3g}"


def _increase(line: Mapping[str, float]) -> str:
    low, high = line["cross_entropy_increase_low"], line["cross_entropy_increase_high"]
    return f"{line['cross_entropy_increase']:.4f} ({low:.4f} to {high:.4f})"


def _plain(value: Any) -> Any:
    """The same value for JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
