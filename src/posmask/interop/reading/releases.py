"""SAELens's list of published SAEs: where each is, in which format, and facts that its files lack."""

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, MissingExtra

__all__ = ["Listed", "listed_at", "listed_sae"]


@dataclass(frozen=True)
class Listed:
    """An entry of the list.

    Attributes:
        repo: USER/NAME on the hub.
        path: the SAE's folder or file in the repository.
        conversion: SAELens's name of its loader; None for its own format.
        overrides: settings that replace those of the files.
        norm_scaling_factor: the factor of the vectors' norm, if it is listed.
    """

    repo: str
    path: str
    conversion: str | None
    overrides: Mapping[str, Any]
    norm_scaling_factor: float | None


def listed_sae(release: str, sae_id: str) -> Listed:
    """
    Raises:
        BadSetting: SAELens lists no such release or SAE.
        MissingExtra: SAELens is not installed.
    """
    releases = _releases()
    if release not in releases:
        raise BadSetting(f"SAELens lists no release {release!r}{_closest(release, releases)}: see its page of SAEs")
    entries = {str(sae["id"]): sae for sae in releases[release]["saes"]}
    if sae_id not in entries:
        some = ", ".join(list(entries)[:3])
        what = f"has no SAE {sae_id!r}{_closest(sae_id, entries)}" if sae_id else "holds several SAEs"
        raise BadSetting(f"release {release} {what}: choose one of its {len(entries)}, such as {some}")
    return _listed(releases[release], entries[sae_id])


def listed_at(repo: str, path: str) -> Listed | None:
    """The entry of an SAE on the hub; None if SAELens does not list it or is not installed."""
    try:
        releases = _releases().values()
    except MissingExtra:
        return None
    return next(
        (
            _listed(release, sae)
            for release in releases
            if release["repo_id"] == repo
            for sae in release["saes"]
            if str(sae["path"]) == path
        ),
        None,
    )


def _listed(release: Mapping[str, Any], sae: Mapping[str, Any]) -> Listed:
    return Listed(
        release["repo_id"],
        str(sae["path"]),
        release.get("conversion_func"),
        release.get("config_overrides") or {},
        sae.get("norm_scaling_factor"),
    )


@cache
def _releases() -> dict[str, dict[str, Any]]:
    """The list, read without importing SAELens, which takes seconds."""
    package = importlib.util.find_spec("sae_lens")
    if package is None or not package.submodule_search_locations:
        raise MissingExtra("names of SAELens's list need SAELens: pip install 'posmask[saelens]', or give hf:USER/NAME")
    import yaml

    text = (Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text(encoding="utf8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C loader takes a second


def _closest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
