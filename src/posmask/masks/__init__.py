"""The registry of position masks by kind.

To add a kind, write one subclass of `PositionMask` with its `Settings` and `_start`, and add it to `MASKS`.
"""

from typing import Any

from posmask.errors import unknown_kind
from posmask.masks.base import MaskSettings, PositionMask
from posmask.masks.fixed import Band, Cohort, Hard, Open, Slice, Windows
from posmask.masks.learned import Importance, Soft
from posmask.masks.router import Switch
from posmask.masks.splitting import Split

__all__ = ["MASKS", "make_mask", "mask_settings"]

MASKS: dict[str, type[PositionMask]] = {
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


def mask_settings(values: dict[str, Any]) -> MaskSettings:
    """Validated settings of the kind `values["kind"]`.

    >>> mask_settings({"kind": "slice", "n_slices": 8}).gating
    'forward'

    Raises:
        BadSetting: the kind is unknown.
        ValidationError: a setting is invalid.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in MASKS:
        raise unknown_kind("mask kind", kind, MASKS)
    return MASKS[kind].Settings(**values)


def make_mask(settings: MaskSettings, n_positions: int, d_sae: int, seed: int = 0) -> PositionMask:
    """A mask of the kind `settings.kind`.

    Raises:
        BadSetting: the settings do not fit the context length or the number of latents.
    """
    return MASKS[settings.kind](settings, n_positions, d_sae, seed)
