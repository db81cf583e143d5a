"""The kinds of position mask.

To add one: write one subclass of `PositionMask` with its `Settings` and `_start`, and add it to `MASKS`.
"""

from typing import Any

from posmask.errors import BadSetting
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
    """Settings of the kind that `values["kind"]` names, checked.

    >>> mask_settings({"kind": "slice", "n_slices": 8}).gating
    'forward'
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in MASKS:
        raise BadSetting(f"mask kind {kind!r} is unknown: choose one of {', '.join(MASKS)}")
    return MASKS[kind].Settings(**values)


def make_mask(settings: MaskSettings, n_positions: int, d_sae: int, seed: int = 0) -> PositionMask:
    """A mask of the kind that its settings name.

    Raises:
        BadSetting: the settings do not fit the context length or the number of latents.
    """
    return MASKS[settings.kind](settings, n_positions, d_sae, seed)
