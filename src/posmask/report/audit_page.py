"""Writes the page of audited SAEs: what was found, charts by position, order, removal, and single latents."""

import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from posmask.report import figures
from posmask.report.audits import Audit, read_audits
from posmask.report.browser import shown_text, shown_word
from posmask.report.figures.audit import audit_figures
from posmask.report.rendering import chart_blocks, render
from posmask.storage.atomic import check_file, replacing
from posmask.storage.layout import AUDIT_FILE, LIFTED, PAGE_MARK

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["write_audit_figures", "write_audit_page"]

_N_LATENTS = 200
_LONGEST_CONTEXT = 90
"""Characters of an example before and after its strongest token."""
_DEPENDENT = ("position-tracking", "mixed")
_SPARK = (120, 30)
"""Width and height of a small profile."""


def write_audit_page(root: Path, names: Sequence[str]) -> Path:
    """Write one self-contained page of audited SAEs and return its path, `audit.html` in `root`.

    Args:
        root: of the audit.
        names: of the SAEs' folders in `root/evaluated`; several are compared.

    Raises:
        DamagedFolder: a folder is missing, holds no audit, or its files differ from what was written.
        BadSetting: `audit.html` exists and is not a page that posmask wrote.
    """
    path = root / AUDIT_FILE
    check_file(path, PAGE_MARK)
    audits = read_audits(root, names)
    charts = audit_figures(audits)
    html = render("audit", _page(audits) | {"charts": list(charts)}, chart_blocks(charts))
    with replacing(path, PAGE_MARK) as beside:
        beside.write_text(html, encoding="utf8")
    return path


def write_audit_figures(root: Path, names: Sequence[str], folder: Path) -> list[Path]:
    """Write every chart of the page as SVG and PDF; return the paths.

    Args:
        root: of the audit.
        names: of the SAEs' folders in `root/evaluated`.
        folder: the folder to write to.

    Raises:
        DamagedFolder: as `write_audit_page`.
        BadSetting: a file to write exists and was not written by posmask.
    """
    return figures.write_figures(audit_figures(read_audits(root, names)), folder)


def _page(audits: Sequence[Audit]) -> dict[str, Any]:
    """The template's variables."""
    title = audits[0].name if len(audits) == 1 else f"{len(audits)} SAEs"
    return {
        "title": f"audit of {title}",
        "heading": title,
        "several": len(audits) > 1,
        "audits": [_view(audit) for audit in audits],
        "shared": _shared(audits),
        "classes": list(audits[0].summary["classes"]["on"]),
        "rules": audits[0].summary["rules"],
        "n_latents": _N_LATENTS,
        "is_lifted": any("lifted" in audit.masks for audit in audits),
        "version": importlib.metadata.version("posmask"),
    }


def _shared(audits: Sequence[Audit]) -> list[tuple[str, str]]:
    """What was audited, by the names of the facts; facts in which the SAEs differ have several values."""

    def values(key: str) -> str:
        return ", ".join(dict.fromkeys(_shown(audit.summary[key]) for audit in audits))

    names = {"model": "model", "site": "site", "n_positions": "context", "tokens": "held-out tokens", "texts": "texts"}
    facts = [(name, values(key)) for key, name in names.items()]
    facts.insert(4, ("from", f"{values('n_texts')} texts"))
    return [*facts, ("attention sinks", values("sink_tokens"))]


def _shown(value: str | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    path = PurePath(value)  # Pages are shared, so they have no paths of this machine.
    return shown_text(path.name if path.is_absolute() else value)


def _view(audit: Audit) -> dict[str, Any]:
    summary = audit.summary
    orders = summary["order"]
    largest = max((line["k"] for line in orders), default=0)
    latents = _chosen(audit)
    l0 = audit.positions["l0"].dropna()
    return {
        "audit": audit,
        "summary": summary,
        "order": {"block": None, "local": None} | {line["about"]: line for line in orders if line["k"] == largest},
        "order_k": largest,
        "order_tasks": audit.order.to_dict("records"),
        "latents": latents,
        "shown_classes": [name for name in summary["classes"]["on"] if name in {line["class"] for line in latents}],
        "has_lifted": f"{LIFTED}class" in audit.latents,
        "has_periods": any(math.isfinite(line["period"]) for line in latents),
        "l0_range": (l0.min(), l0.max()) if len(l0) else None,
        "beyond_from": audit.positions["position"][audit.positions["is_beyond"]].min(),
        "beyond_to": audit.positions["position"][audit.positions["is_beyond"]].max(),
    }


def _chosen(audit: Audit) -> list[dict[str, Any]]:
    """The latents of the table: those that depend on position, the largest share first, then others by q-value."""
    latents = audit.latents.reset_index(drop=True)
    share = latents[["position_share", "shift_position"]].max(axis=1)
    depends = latents["class"].isin(_DEPENDENT)
    rank = latents.assign(first=-depends.astype(int), second=latents["q_value"].where(~depends, -share))
    chosen = rank.sort_values(["first", "second", "latent"], na_position="last").head(_N_LATENTS)
    numbers = chosen["latent"].tolist()
    profiles = _profiles(audit, numbers)
    lines = latents.iloc[chosen.index].to_dict("records")
    return [
        line
        | {"profile": _spark(profiles.get(line["latent"], {})), "example": _example(line["example"])}
        | {"promoted": shown_text(line["promoted"][: 2 * _LONGEST_CONTEXT])}
        for line in lines
    ]


_Profile = list[Mapping[str, Any]]


def _profiles(audit: Audit, latents: Sequence[int]) -> dict[int, dict[str, _Profile]]:
    """The bins of each latent's profile, by mask."""
    profiles: dict[int, dict[str, _Profile]] = {}
    table: pd.DataFrame = audit.profiles.loc[audit.profiles["latent"].isin(latents)]
    for bin in table.to_dict("records"):
        profiles.setdefault(bin["latent"], {}).setdefault(bin["mask"], []).append(bin)
    return profiles


def _spark(profile: Mapping[str, _Profile]) -> dict[str, Any] | None:
    """Paths of a small chart of firing rate by bin of positions, with its interval, by mask; None if it never fires."""
    bins = [bin for of_mask in profile.values() for bin in of_mask]
    highest = max((bin["firing_rate"] for bin in bins), default=0)
    if not highest:
        return None
    # Bins with few tokens have wide intervals, which would flatten the line.
    top = min(2 * highest, max([highest, *(bin["firing_rate_high"] for bin in bins)]))
    width, height = _SPARK

    def path(of_mask: _Profile, column: str) -> list[str]:
        rates = [bin[column] if math.isfinite(bin[column]) else bin["firing_rate"] for bin in of_mask]
        return [
            f"{width * (number + 0.5) / len(rates):.1f} {height - 1 - (height - 3) * min(1, max(0, rate) / top):.1f}"
            for number, rate in enumerate(rates)
        ]

    paths = {}
    for mask, of_mask in profile.items():
        low, rate, high = (path(of_mask, f"firing_rate{end}") for end in ("_low", "", "_high"))
        paths[mask] = {"band": f"M{'L'.join([*high, *reversed(low)])}Z", "line": f"M{'L'.join(rate)}"}
    first_mask = next(iter(profile.values()))
    most, least = (choose(first_mask, key=lambda bin: bin["firing_rate"]) for choose in (max, min))
    label = f"Fires most at {_bin(most)} and least at {_bin(least)}"
    return {"width": width, "height": height, "paths": paths, "label": label}


def _bin(bin: Mapping[str, Any]) -> str:
    first, last = bin["first_position"], bin["last_position"]
    return f"{first if first == last else f'{first}–{last}'} ({bin['firing_rate']:.2%} of tokens)"


def _example(text: str) -> tuple[str, str, str]:
    """The parts of an example before, at and after its strongest token; all before if its mark is ambiguous."""
    parts = re.fullmatch(r"([^«»]*)«([^«»]*)»([^«»]*)", text)
    if parts is None:
        return shown_text(text[: 2 * _LONGEST_CONTEXT]), "", ""
    before, peak, after = parts.groups()
    begin = "…" if len(before) > _LONGEST_CONTEXT else ""
    end = "…" if len(after) > _LONGEST_CONTEXT else ""
    return (
        begin + shown_text(before[-_LONGEST_CONTEXT:]),
        shown_word(peak),
        shown_text(after[:_LONGEST_CONTEXT]) + end,
    )
