"""A mask of pairs of copies, one open early in the context and one late: the mask that comes nearest to the moment.

Used by candidates.toml as `ramps:Ramps`.
"""

from typing import ClassVar

import torch
from pydantic import Field

from posmask.errors import BadSetting
from posmask.masks.base import MaskSettings, PositionMask


class Ramps(PositionMask):
    """Two copies of each latent, of which one closes and the other opens in equal steps along the context."""

    class Settings(MaskSettings):
        """Settings of ramps."""

        kind: str = "ramps:Ramps"
        gradient_sharing: float = Field(default=0.9, ge=0, le=1)

    settings: Settings
    _N_COPIES: ClassVar[int] = 2

    def _start(self, random: torch.Generator) -> None:
        if self.n_bound % self._N_COPIES:
            raise BadSetting(f"{self.n_bound} latents are not pairs: choose an even number")
        half = self.n_bound // self._N_COPIES
        share = torch.arange(self.n_positions)[:, None] / (self.n_positions - 1)
        if self.gates_code():
            self.copied_from[self.n_free :] = torch.arange(self.n_free, self.n_free + half).repeat(self._N_COPIES)
        self._fix(torch.cat([(1 - share).expand(-1, half), share.expand(-1, half)], 1))
