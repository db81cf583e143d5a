"""Groups of positions with the same live latents: what makes strict masks cheap."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LiveGroup", "live_groups"]


@dataclass(frozen=True)
class LiveGroup:
    """Positions at which the same latents are live, so that one dense product serves all their tokens."""

    positions: Int[Tensor, " position"]
    latents: slice | Int[Tensor, " live"]
    gated: bool
    """Whether openness differs from 1 among these latents at these positions, so that codes must be multiplied."""


def live_groups(openness: Float[Tensor, "position latent"]) -> list[LiveGroup]:
    """Positions grouped by their set of live (openness > 0) latents, every position in exactly one group.

    Some closed latents are computed, and gated to 0, where that is faster: one group of everything where gathering the
    weights of scattered live latents would cost more than products with the closed ones; and one group for neighbors
    whose live blocks overlap so much that together they are little more than each.
    """
    live = openness > 0
    n_positions, d_sae = openness.shape
    if bool(live.all()):
        everywhere = torch.arange(n_positions, device=openness.device)
        return [LiveGroup(everywhere, slice(0, d_sae), gated=bool((openness != 1).any()))]
    sets, group_of_position = torch.unique(live, dim=0, return_inverse=True)
    groups, n_live, scattered = [], [], 0
    for number, members in enumerate(sets):
        positions = (group_of_position == number).nonzero()[:, 0]
        latents = members.nonzero()[:, 0]
        contiguous = len(latents) > 0 and int(latents[-1] - latents[0]) + 1 == len(latents)
        block = slice(int(latents[0]), int(latents[-1]) + 1) if contiguous else latents
        scattered += 0 if contiguous else len(latents)
        gated = bool((openness[positions][:, latents] != 1).any())
        groups.append(LiveGroup(positions, block, gated))
        n_live.append(len(latents))
    n_closed = d_sae - sum(len(group.positions) * n for group, n in zip(groups, n_live, strict=True)) / n_positions
    if scattered * _TOKENS_A_GATHERED_ROW > _TOKENS_A_BATCH * n_closed:
        return [LiveGroup(torch.arange(n_positions, device=openness.device), slice(0, d_sae), gated=True)]
    groups = sorted(groups, key=lambda group: int(group.positions[0]))
    return _merged(groups) if all(isinstance(group.latents, slice) for group in groups) else groups


_TOKENS_A_GATHERED_ROW = 40  # Gathering a latent's weights takes about as long as their products with so many tokens,
_TOKENS_A_BATCH = 4096  # of which a batch has so many, more or less.
_MOST_IN_COMMON = 1.25  # Times as many latents as the least of the merged groups has.


def _merged(groups: list[LiveGroup]) -> list[LiveGroup]:
    """Groups of neighboring latents, those that overlap widely made one."""
    found: list[LiveGroup] = []
    least = 0
    for group in groups:
        here = group.latents
        assert isinstance(here, slice)
        if found:
            before = found[-1].latents
            assert isinstance(before, slice)
            start, stop = min(before.start, here.start), max(before.stop, here.stop)
            smaller = min(least, here.stop - here.start)
            if stop - start <= _MOST_IN_COMMON * smaller:
                positions = torch.cat([found[-1].positions, group.positions])
                found[-1], least = LiveGroup(positions, slice(start, stop), gated=True), smaller
                continue
        found.append(group)
        least = here.stop - here.start
    return found
