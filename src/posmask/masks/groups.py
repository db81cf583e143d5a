"""Groups of positions with the same live latents, which make strict masks fast to compute."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LiveGroup", "live_groups"]


@dataclass(frozen=True)
class LiveGroup:
    """Positions with the same live latents, whose tokens share one dense product."""

    positions: Int[Tensor, " position"]
    latents: slice | Int[Tensor, " live"]
    gated: bool
    """Whether some openness among these latents at these positions differs from 1."""

    @property
    def n_latents(self) -> int:
        """The number of live latents."""
        return self.latents.stop - self.latents.start if isinstance(self.latents, slice) else len(self.latents)


def live_groups(openness: Float[Tensor, "position latent"]) -> list[LiveGroup]:
    """Group positions by their set of live (openness > 0) latents; each position is in exactly one group.

    Some closed latents are computed and gated to 0 where that is faster. There is a single group if gathering the
    weights of scattered live latents would cost more than products with the closed ones. Neighbors whose live blocks
    overlap so much that their union is little larger than each of them form one group.
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
    if scattered * _GATHER_COST > _BATCH_TOKENS * n_closed:
        return [LiveGroup(torch.arange(n_positions, device=openness.device), slice(0, d_sae), gated=True)]
    groups = sorted(groups, key=lambda group: int(group.positions[0]))
    return _merged(groups) if all(isinstance(group.latents, slice) for group in groups) else groups


_GATHER_COST = 40  # Gathering the weights of a latent takes about as long as their products with this many tokens.
_BATCH_TOKENS = 4096  # a typical batch
_LARGEST_UNION = 1.25  # of merged groups, relative to the smallest of them


def _merged(groups: list[LiveGroup]) -> list[LiveGroup]:
    """Groups of contiguous latents in which consecutive groups with a large overlap are merged."""
    merged: list[LiveGroup] = []
    least = 0
    for group in groups:
        block = group.latents
        assert isinstance(block, slice)
        if merged:
            previous = merged[-1].latents
            assert isinstance(previous, slice)
            start, stop = min(previous.start, block.start), max(previous.stop, block.stop)
            smaller = min(least, block.stop - block.start)
            if stop - start <= _LARGEST_UNION * smaller:
                positions = torch.cat([merged[-1].positions, group.positions])
                merged[-1], least = LiveGroup(positions, slice(start, stop), gated=True), smaller
                continue
        merged.append(group)
        least = block.stop - block.start
    return merged
