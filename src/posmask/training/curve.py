"""What a training records: points of its curve and snapshots of its mask."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from safetensors.torch import save_file
from torch import Tensor

from posmask.masks.base import PositionMask, moments
from posmask.results.rows import write_records

__all__ = ["CurvePoint", "MaskSnapshots", "write_curve"]

_N_SNAPSHOTS, _SNAPSHOT_LATENTS = 8, 256


@dataclass(frozen=True)
class CurvePoint:
    """One line of a training curve. `explained_variance` is of the batch just seen, against the training mean."""

    step: int
    tokens: int
    learning_rate: float
    loss: float
    auxiliary_loss: float
    explained_variance: float
    l0: float
    dead_latents: int
    mean_openness: float


class MaskSnapshots:
    """What a mask that changes was like at eight moments, evenly spaced from the first step to the last.

    `by_step` [position latent]: openness, 255 is open, of at most 256 latents, evenly spaced by their number. It stays
    empty for a mask that training leaves as it is.
    """

    def __init__(self, mask: PositionMask, n_steps: int) -> None:
        self._moments = set(moments(0.0, 1.0, _N_SNAPSHOTS, n_steps)) if mask.changes_in_training else set()
        self.latents = torch.linspace(0, mask.d_sae - 1, min(mask.d_sae, _SNAPSHOT_LATENTS)).round().long()
        self.by_step: dict[int, UInt8[Tensor, "position latent"]] = {}

    def after_step(self, mask: PositionMask, done: int) -> None:
        if done in self._moments:
            with torch.no_grad():
                openness = mask.openness()[:, self.latents.to(mask.copied_from.device)]
            self.by_step[done] = (255 * openness).round().to(torch.uint8).cpu()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; nothing before the first snapshot."""
        if not self.by_step:
            return {}
        return {
            _SNAPSHOT_STEPS: torch.tensor(list(self.by_step)),
            _SNAPSHOTS: torch.stack(list(self.by_step.values())),
        }

    def restore_(self, state: dict[str, Tensor]) -> None:
        if _SNAPSHOTS in state:
            self.by_step = dict(zip(state[_SNAPSHOT_STEPS].tolist(), state[_SNAPSHOTS], strict=True))

    def write(self, path: Path, batch_tokens: int) -> None:
        """`openness` [moment position latent], `tokens` [moment] and `latent`; no file where there are no snapshots."""
        if self.by_step:
            tensors = {
                "openness": torch.stack(list(self.by_step.values())),
                "tokens": torch.tensor(list(self.by_step)) * batch_tokens,
                "latent": self.latents,
            }
            save_file(tensors, path)


_SNAPSHOTS, _SNAPSHOT_STEPS = "mask_snapshots", "mask_snapshot_steps"


def write_curve(path: Path, curve: list[CurvePoint]) -> None:
    write_records(path, CurvePoint, curve)
