"""Statistics of an SAE's latents, accumulated for one block of latents at a time, so that memory stays bounded."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from posmask.evaluation.position import PositionInformation, ShiftDesign
from posmask.evaluation.retention import PositionMass
from posmask.evaluation.stored_codes import StoredCodes
from posmask.masks.base import PositionOrigin

__all__ = ["LatentBlock", "latent_blocks"]


@dataclass(frozen=True)
class LatentBlock:
    """Statistics of some latents.

    Attributes:
        latents: which of the SAE's latents.
        in_context: mass and firings by position in the context.
        at_origin: the same by the position that the mask counts; `in_context` if that is the context's.
        information: firings by position with their null.
        design: the shift design.
    """

    latents: slice
    in_context: PositionMass
    at_origin: PositionMass
    information: PositionInformation
    design: ShiftDesign


def latent_blocks(
    heldout: StoredCodes,
    shift: StoredCodes,
    *,
    n_positions: int,
    n_windows: int,
    shift_length: int,
    position_origin: PositionOrigin = "context",
    device: torch.device | None = None,
) -> Iterator[LatentBlock]:
    """Iterate over the blocks of latents of stored codes.

    Args:
        heldout: codes of the kept held-out tokens.
        shift: codes of the shift design.
        n_positions: positions per context.
        n_windows: windows of the shift design.
        shift_length: its tokens per window.
        position_origin: of the mask.
        device: of the statistics.
    """
    batch, shift_batch = (stored.batch.to(device or torch.device("cpu")) for stored in (heldout, shift))
    kept_positions = batch.position.unique().long()
    n_texts, n_shift_texts = (int(one.text.max()) + 1 for one in (batch, shift_batch))
    for (latents, codes), (_, shift_codes) in zip(heldout.blocks(), shift.blocks(), strict=True):
        n_latents = latents.stop - latents.start
        if device is not None:
            codes, shift_codes = codes.to(device), shift_codes.to(device)
        in_context = at_origin = PositionMass(n_positions, n_latents, device)
        in_context.update(batch, codes)
        if position_origin != "context":
            at_origin = PositionMass(n_positions, n_latents, device)
            at_origin.update(batch, codes, position_origin)
        information = PositionInformation(n_positions, n_latents, n_texts, kept_positions, device)
        information.update(batch, codes)
        design = ShiftDesign(n_shift_texts, shift_length, n_windows, n_latents, device)
        design.update(shift_batch, shift_codes)
        yield LatentBlock(latents, in_context, at_origin, information, design)
