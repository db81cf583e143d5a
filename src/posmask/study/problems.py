"""Describe what is wrong with a study's values: all problems, with each setting as the user wrote it."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from posmask import masks
from posmask.evaluation.settings import EvaluationSettings
from posmask.sae import rules
from posmask.study.settings import (
    CellSettings,
    ComparisonSettings,
    CorpusSettings,
    HypothesisSettings,
    MarginSettings,
    ModelSettings,
    SaeSettings,
    StudySettings,
)
from posmask.training.settings import TrainingSettings

__all__ = ["TABLES", "closest", "problems_of"]

TABLES: dict[str, type[BaseModel]] = {
    "model": ModelSettings,
    "corpus": CorpusSettings,
    "sae": SaeSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "margins": MarginSettings,
}
"""The tables of a study file."""
_ARRAYS: dict[str, type[BaseModel]] = {
    "cells": CellSettings,
    "comparisons": ComparisonSettings,
    "hypotheses": HypothesisSettings,
}
_SINGULAR = {"hypotheses": "hypothesis"}
_PLAIN = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list in brackets",
    "dict_type": "a table of settings in braces",
    "model_type": "a table of settings in braces",
    "model_attributes_type": "a table of settings in braces",
    "literal_error": "{expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "string_pattern_mismatch": "lower-case letters, digits, and _ . - after the first",
}
"""What a value must be, by pydantic's type of the error."""
Place = tuple[str | int, ...]


def problems_of(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One sentence per problem, unknown settings first, since a misspelled setting is also a missing one.

    Args:
        values: what was validated.
    """
    unknown: list[str] = []
    missing: dict[Place, str] = {}
    other: list[str] = []
    wrong: dict[Place, list[Any]] = {}
    for mistake in error.errors(include_url=False):
        kind, place = mistake["type"], mistake["loc"]
        if kind == "extra_forbidden":
            unknown.append(_unknown(place, values))
        elif kind == "missing":
            missing[place] = f"{_name(place, values)} is missing"
        elif kind == "value_error":
            name = _name(_written(place, values), values)
            lines = mistake["msg"].removeprefix("Value error, ").splitlines()
            other += [f"{name}: {line}" if name else line for line in lines]
        elif kind != "too_short" or len(mistake["input"]) < mistake.get("ctx", {})["min_length"]:
            # A list with wrong entries also counts as too short.
            wrong.setdefault(_written(place, values), []).append(mistake)
    suggested = {line.partition("did you mean ")[2].rstrip("?") for line in unknown}
    absent = [line for place, line in missing.items() if str(place[-1]) not in suggested]
    return [*unknown, *absent, *(_wrong(place, mistakes, values) for place, mistakes in wrong.items()), *other]


def _unknown(place: Place, values: Mapping[str, Any]) -> str:
    key = str(place[-1])
    close = closest(key, _settings_at(place[:-1], values))
    elsewhere = [table for table, model in TABLES.items() if key in model.model_fields]
    hint = f"did you mean {close}?" if close else f"it belongs in [{elsewhere[0]}]" if elsewhere else "remove it"
    return f"{_name(place, values)} is not a setting: {hint}"


def closest(word: str, words: Sequence[str]) -> str | None:
    """The word that is most like a given one; None if none is alike."""
    return next(iter(difflib.get_close_matches(word, words, n=1)), None)


def _settings_at(place: Place, values: Mapping[str, Any]) -> list[str]:
    """The names of the settings of the table at this place."""
    model: type[BaseModel] = StudySettings
    at: Any = values
    for part in place:
        at = at[part]
        if isinstance(part, int):
            continue
        if part in ("mask", "rule"):
            kinds = masks.MASKS if part == "mask" else rules.RULES
            model = kinds[at["kind"]].Settings
        else:
            model = {**TABLES, **_ARRAYS}[part]
    return list(model.model_fields)


def _written(place: Place, values: Mapping[str, Any]) -> Place:
    """The part of a place that the user wrote, without pydantic's names of alternatives."""
    at: Any = values
    for number, part in enumerate(place):
        try:
            at = at[part]
        except (KeyError, IndexError, TypeError):
            return place[:number]
    return place


def _setting_of(place: Place) -> Place:
    """The place of the setting that a value belongs to, such as `cuts` for an entry of `cuts`."""
    end = len(place)
    while end and isinstance(place[end - 1], int) and place[: end - 1] not in [(name,) for name in _ARRAYS]:
        end -= 1
    return place[:end]


def _at(place: Place, values: Any) -> Any:
    for part in place:
        values = values[part]
    return values


def _name(place: Place, values: Mapping[str, Any]) -> str:
    """A setting as a user finds it: `model.layer`, `cell "open": mask.n_slices`."""
    if len(place) > 1 and place[0] in _ARRAYS and isinstance(place[1], int):
        entry = values[place[0]][place[1]]
        name = entry.get("name", entry.get("cell")) if isinstance(entry, Mapping) else None
        kind = _SINGULAR.get(str(place[0]), str(place[0])[:-1])
        label = f"{kind} {json.dumps(name) if name else f'number {place[1] + 1}'}"
        return ": ".join(filter(None, (label, ".".join(str(part) for part in place[2:]))))
    return ".".join(str(part) for part in place)


def _wrong(place: Place, mistakes: Sequence[Any], values: Mapping[str, Any]) -> str:
    setting = _setting_of(place)
    needed = dict.fromkeys(_needed(mistake) for mistake in mistakes)
    if "a number" in needed:  # Of the alternatives of `model.layer`, one includes the other.
        needed.pop("a whole number", None)
    held = "" if setting == place else f" holds {_as_written(_at(place, values))}, which"
    return f"{_name(setting, values)} = {_as_written(_at(setting, values))}{held} must be {' or '.join(needed)}"


def _needed(mistake: Any) -> str:
    plain = _PLAIN.get(mistake["type"])
    if plain is None:
        return f"valid ({mistake['msg'].lower()})"
    return plain.format(**mistake.get("ctx", {}))


def _as_written(value: Any) -> str:
    """A value as in a study file, shortened."""
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
