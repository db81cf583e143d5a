"""Read a study file: TOML, checked as far as possible before anything is loaded or computed."""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posmask.data.models import is_path
from posmask.data.texts import HUB_PREFIX
from posmask.errors import BadSetting, PosmaskError, first_line
from posmask.study.problems import TABLES, closest, problems_of
from posmask.study.saes import check_buildable
from posmask.study.settings import StudySettings

__all__ = ["read_study"]

_MOST_PROBLEMS = 50  # of a study file that are printed


def read_study(path: Path, changes: Sequence[str] = ()) -> StudySettings:
    """The settings in a study file, checked as far as can be without loading anything.

    Paths in the file are relative to its folder, as are modules of mask kinds (`kind = "MODULE:CLASS"`).

    Args:
        changes: settings to replace, such as `model.layer=5`; the part after = is a TOML value, or bare text. Paths are
            relative to the current folder.

    Raises:
        BadSetting: one line per problem.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise BadSetting(
            f"there is no study file {path}: give the path of a TOML file, such as studies/quick.toml"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadSetting(f"{path} is not a readable TOML file ({first_line(error)}): correct it") from None
    _resolve_paths(values, path.parent)
    for change in changes:
        _apply_change(values, change)
    if (name := _beyond_64_bits(values)) is not None:
        raise BadSetting(f"{path}: {name} is a whole number beyond 64 bits: choose a smaller one")
    _find_modules(values, path.parent)
    try:
        study = StudySettings.model_validate(values)
    except ValidationError as error:
        raise _refusal(path, problems_of(error, values)) from None
    problems = []
    built: set[str] = set()  # Cells that differ in nothing else but these are built once.
    for cell in study.cells:
        shape = cell.model_dump_json(exclude={"name", "seeds", "step_fraction", "measure_forgetting"})
        if shape in built:
            continue
        try:
            check_buildable(study, cell)
            built.add(shape)
        except PosmaskError as error:
            problems.append(f'cell "{cell.name}": {error}')
    if problems:
        raise _refusal(path, problems)
    return study


def _beyond_64_bits(value: Any, name: str = "") -> str | None:
    """The name of the first whole number in a study's values that no tensor could count to; None if there is none."""
    if isinstance(value, dict):
        inside = ((f"{name}.{key}" if name else str(key), entry) for key, entry in value.items())
    elif isinstance(value, list):
        inside = ((name, entry) for entry in value)
    else:
        return name if isinstance(value, int) and not -(2**63) <= value < 2**63 else None
    return next((found for key, entry in inside if (found := _beyond_64_bits(entry, key)) is not None), None)


def _refusal(path: Path, problems: Sequence[str]) -> BadSetting:
    if len(problems) == 1:
        return BadSetting(f"{path}: {problems[0]}")
    shown = [*problems[:_MOST_PROBLEMS], *(["and others"] if len(problems) > _MOST_PROBLEMS else [])]
    remedy = "; `posmask init` writes a complete file" if any(line.endswith(" is missing") for line in problems) else ""
    return BadSetting("\n  ".join((f"{path} has {len(problems):,} problems{remedy}:", *shown)))


def _find_modules(values: dict[str, Any], folder: Path) -> None:
    """Make modules beside the study file importable if a mask kind names one; worker processes inherit the path."""
    cells = values.get("cells")
    masks = [cell.get("mask") for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
    if any(isinstance(mask, dict) and ":" in str(mask.get("kind")) for mask in masks):
        where = str(folder.resolve())
        if where not in sys.path:
            sys.path.append(where)


def _apply_change(values: dict[str, Any], change: str) -> None:
    """Put `table.key=value` into a study's values."""
    name, equals, text = change.partition("=")
    *tables, key = name.strip().split(".")
    if tables and tables[0] not in {*TABLES, *values}:
        close = closest(tables[0], list(TABLES))
        hint = f"did you mean {close}?" if close else f"choose from {', '.join(TABLES)}"
        raise BadSetting(f"{change!r} changes no setting: {tables[0]!r} is not a table of a study; {hint}")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            break
    if not equals or not isinstance(values, dict) or not key:
        raise BadSetting(f"{change!r} changes no setting: write TABLE.KEY=VALUE, such as model.layer=5")
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        values[key] = text.strip()


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Replace relative paths, which are relative to the study file, by paths that can be opened from here."""
    corpus, model, cells = (values.get(key) for key in ("corpus", "model", "cells"))
    texts = corpus.get("texts") if isinstance(corpus, dict) else None
    if isinstance(corpus, dict) and isinstance(texts, str) and not texts.startswith(HUB_PREFIX):
        corpus["texts"] = _resolved(texts, folder)
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        resolved = _resolved(model["name"], folder)
        if Path(resolved).exists() or is_path(model["name"], Path(resolved)):
            model["name"] = resolved
    for cell in cells if isinstance(cells, list) else ():
        if isinstance(cell, dict) and isinstance(cell.get("init_from"), str) and "/" in cell["init_from"]:
            cell["init_from"] = _resolved(cell["init_from"], folder)


def _resolved(path: str, folder: Path) -> str:
    resolved = str(folder / Path(path).expanduser())
    return resolved if "/" in resolved else f"./{resolved}"  # A slash tells a folder from the name of a cell.
