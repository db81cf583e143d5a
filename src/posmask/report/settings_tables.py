"""The settings of a study as two tables: what differs between cells, and what all cells share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posmask.report.reading import Study

__all__ = ["SettingsTables", "settings_tables", "shared_settings"]


_OF_OTHERS = ("seed", "unmasked")
"""The seed, which a folder's name has, and the settings of the baseline whose controls a masked cell has."""


@dataclass(frozen=True)
class SettingsTables:
    """Settings by their path, for example `sae.rule.k`.

    Attributes:
        differing: values by cell and path; a cell lacks the settings of other kinds of masks.
        paths: of the differing settings.
        shared: values by path.
    """

    differing: Mapping[str, Mapping[str, str]]
    paths: list[str]
    shared: Mapping[str, str]


def settings_tables(study: Study) -> SettingsTables:
    """Return the settings of the first seed of each cell; all seeds have the same."""
    by_cell = {
        cell.cell: flattened(
            {key: value for key, value in cell.manifest.get("made_from", {}).items() if key not in _OF_OTHERS}
        )
        for cell in study.pictured
    }
    paths = list(dict.fromkeys(path for of_cell in by_cell.values() for path in of_cell))
    values = {path: {of_cell.get(path) for of_cell in by_cell.values()} for path in paths}
    differing = [path for path in paths if len(values[path]) > 1 and path != "cell.name"]
    return SettingsTables(
        differing={name: {path: of_cell.get(path, "") for path in differing} for name, of_cell in by_cell.items()},
        paths=differing,
        shared={path: next(iter(by_cell.values()))[path] for path in paths if len(values[path]) == 1},
    )


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as text by path.

    >>> flattened({"sae": {"rule": {"k": 32}, "tied": False}, "seeds": [0, 1]})
    {'sae.rule.k': '32', 'sae.tied': 'false', 'seeds': '0, 1'}
    """
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
            flat[f"{prefix}{key}"] = ", ".join(map(_text, value))
        else:
            flat[f"{prefix}{key}"] = _text(value)
    return flat


def shared_settings(study: Study) -> dict[str, Any]:
    """Return the top-level settings that all cells share; each cell's settings.json has the others."""
    settings = [cell.manifest.get("made_from", {}) for cell in study.cells]
    if not settings:
        return {}
    shared = {key: value for key, value in settings[0].items() if all(other.get(key) == value for other in settings)}
    sizes = {json.dumps(of.get("sae", {}).get("d_sae")) for of in settings if isinstance(of.get("sae"), dict)}
    if "sae" not in shared and len(sizes) == 1:  # The cells differ in their rules.
        shared["sae"] = {"d_sae": settings[0]["sae"]["d_sae"]}
    return shared


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
