"""The registry of position masks by kind.

To add a kind, write one subclass of `PositionMask` with its `Settings` and `_start`, and add it to `MASKS`. A kind
named `MODULE:CLASS` needs no entry: its module is imported.
"""

import importlib
import inspect
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, first_line, unknown_kind
from posmask.masks.base import MaskSettings, PositionMask
from posmask.masks.fixed import Band, Cohort, Hard, Open, Slice, Windows
from posmask.masks.learned import Importance, Soft
from posmask.masks.router import Switch
from posmask.masks.splitting import Split
from posmask.storage.manifest import file_sha256

__all__ = ["MASKS", "code_of", "make_mask", "mask_settings"]

_MOST_ENTRIES = 2**31  # of a mask's table: 8 GiB


class _Kinds(dict[str, type[PositionMask]]):
    """Kinds by name; `MODULE:CLASS` is imported when it is first looked up, in worker processes too."""

    def __missing__(self, kind: str) -> type[PositionMask]:
        if not _is_imported(kind):
            raise KeyError(kind)
        self[kind] = _imported(kind)
        return self[kind]


MASKS: dict[str, type[PositionMask]] = _Kinds(
    {
        "open": Open,
        "slice": Slice,
        "hard": Hard,
        "cohort": Cohort,
        "band": Band,
        "soft": Soft,
        "importance": Importance,
        "split": Split,
        "switch": Switch,
        "windows": Windows,
    }
)


def _is_imported(kind: object) -> bool:
    return isinstance(kind, str) and ":" in kind


def _imported(kind: str) -> type[PositionMask]:
    module, _, name = kind.partition(":")
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # The module is the user's; anything may happen in it.
        raise BadSetting(
            f"mask kind {kind!r}: module {module!r} cannot be imported ({type(error).__name__}: {first_line(error)}): "
            f"put {module}.py beside the study file, or install the module"
        ) from error
    kinds = {
        key: value
        for key, value in vars(loaded).items()
        if isinstance(value, type) and issubclass(value, PositionMask) and value.__module__ == loaded.__name__
    }
    if name not in kinds:
        raise unknown_kind(f"mask kind {kind!r}: class", name, kinds)
    if kinds[name].Settings.model_fields["kind"].annotation is not str:
        raise BadSetting(
            f"mask kind {kind!r}: {name}.Settings restricts `kind`, which is {kind!r} here: leave `kind` out of it"
        )
    return kinds[name]


def code_of(settings: MaskSettings) -> str | None:
    """The checksum of the file that defines a kind outside the package; None for the kinds of posmask."""
    if not _is_imported(settings.kind):
        return None
    return file_sha256(Path(inspect.getfile(MASKS[settings.kind])))


def mask_settings(values: dict[str, Any], *, may_import: bool = False) -> MaskSettings:
    """Validated settings of the kind `values["kind"]`.

    Args:
        may_import: whether a kind `MODULE:CLASS` may be imported if it is not in `MASKS` yet; not for values from a
            file that somebody else may have written.

    >>> mask_settings({"kind": "slice", "n_slices": 8}).gating
    'forward'

    Raises:
        BadSetting: the kind is unknown.
        ValidationError: a setting is invalid.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or not (kind in MASKS or _is_imported(kind)):
        raise unknown_kind("mask kind", kind, [name for name in MASKS if not _is_imported(name)])
    if kind not in MASKS and not may_import:
        raise BadSetting(
            f"mask kind {kind!r} is defined outside posmask, and code that a file names is not run: import the kind "
            f"first, as in posmask.masks.MASKS[{kind!r}]"
        )
    return MASKS[kind].Settings(**values)


def make_mask(settings: MaskSettings, n_positions: int, d_sae: int, seed: int = 0) -> PositionMask:
    """A mask of the kind `settings.kind`.

    Raises:
        BadSetting: the settings do not fit the context length or the number of latents, or their table would have more
            than 2^31 entries (8 GiB).
    """
    if n_positions * d_sae > _MOST_ENTRIES:
        raise BadSetting(
            f"a mask of {n_positions:,} positions and {d_sae:,} latents would have more than {_MOST_ENTRIES:,} "
            "entries: choose fewer positions (n_positions) or latents (d_sae)"
        )
    return MASKS[settings.kind](settings, n_positions, d_sae, seed)
