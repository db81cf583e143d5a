"""Read a study file: TOML, checked as far as possible before anything is loaded or computed."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posmask import masks
from posmask.errors import BadSetting, PosmaskError
from posmask.evaluation.settings import EvaluationSettings
from posmask.sae import rules
from posmask.study.saes import check_buildable
from posmask.study.settings import (
    CellSettings,
    ComparisonSettings,
    CorpusSettings,
    ModelSettings,
    SaeSettings,
    StudySettings,
)
from posmask.training.settings import TrainingSettings

__all__ = ["read_study"]


def read_study(path: Path, changes: Sequence[str] = ()) -> StudySettings:
    """The settings in a study file, checked as far as can be without loading anything.

    Args:
        changes: settings to replace, such as `model.layer=5`; the part after = is a TOML value, or bare text.

    Raises:
        BadSetting: one sentence on the first thing that is wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise BadSetting(
            f"there is no study file {path}: give the path of a TOML file, such as studies/quick.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"{path} is not a readable TOML file ({error}): correct it") from None
    for change in changes:
        _apply_change(values, change)
    try:
        study = StudySettings.model_validate(values)
        for cell in study.cells:
            check_buildable(study, cell)
    except ValidationError as error:
        raise BadSetting(f"{path}: {_first_mistake(error)}") from None
    except PosmaskError as error:
        raise BadSetting(f"{path}: {error}") from None
    return study


def _apply_change(values: dict[str, Any], change: str) -> None:
    """Put `table.key=value` into a study's values."""
    name, equals, text = change.partition("=")
    *tables, key = name.strip().split(".")
    for table in tables:
        values = values.get(table, {})
        if not isinstance(values, dict):
            break
    if not equals or not isinstance(values, dict) or not values:
        raise BadSetting(f"{change!r} changes no setting: write TABLE.KEY=VALUE, such as model.layer=5")
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[key] = text.strip()


def _first_mistake(error: ValidationError) -> str:
    # A misspelled setting is also a missing one; the misspelling is the more useful message.
    mistakes = error.errors(include_url=False)
    mistake = next((other for other in mistakes if other["type"] == "extra_forbidden"), mistakes[0])
    setting = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(mistake["loc"][-1]), _all_fields(), n=1)
        return f"{setting} is not a setting: {f'did you mean {close[0]}?' if close else 'remove it'}"
    if mistake["type"] == "missing":
        return f"{setting} is missing: give it a value"
    if mistake["type"] == "value_error":
        message = mistake["msg"].removeprefix("Value error, ")
        return f"{setting}: {message}" if setting else message
    return f"{setting} = {mistake['input']!r} is not valid ({mistake['msg'].lower()}): correct it"


def _all_fields() -> list[str]:
    names = set(StudySettings.model_fields)
    for part in (
        ModelSettings,
        CorpusSettings,
        SaeSettings,
        EvaluationSettings,
        CellSettings,
        ComparisonSettings,
        TrainingSettings,
    ):
        names |= set(part.model_fields)
    for part in (*masks.MASKS.values(), *rules.RULES.values()):
        names |= set(part.Settings.model_fields)
    return sorted(names)
