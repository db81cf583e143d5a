"""Records of a training: points of its curve, and snapshots of its mask."""

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
    """A point of a training curve.

    Attributes:
        step: the number of steps done.
        tokens: the number of tokens seen.
        learning_rate: of the last step.
        loss: squared error per token (mean over the last batch, sum over d_model, of normalized vectors).
        auxiliary_loss: squared error per token of the dead latents' reconstruction of the error.
        explained_variance: on the last batch, relative to the mean of the training vectors.
        l0: mean number of active latents per token of the last batch.
        dead_latents: the number of dead latents.
        mean_openness: mean over positions and latents.
    """

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
    """Openness of a mask that changes in training, at eight evenly spaced steps from the first to the last.

    Attributes:
        latents: the indices of the recorded latents, at most 256 and evenly spaced.
        by_step: openness by step [position latent]; 255 is fully open. Empty for a mask that does not change.

    Args:
        mask: the mask to record.
        n_steps: the number of steps of the training.
    """

    def __init__(self, mask: PositionMask, n_steps: int) -> None:
        self._steps = set(moments(0.0, 1.0, _N_SNAPSHOTS, n_steps)) if mask.changes_in_training else set()
        self.latents = torch.linspace(0, mask.d_sae - 1, min(mask.d_sae, _SNAPSHOT_LATENTS)).round().long()
        self.by_step: dict[int, UInt8[Tensor, "position latent"]] = {}

    def after_step(self, mask: PositionMask, done: int) -> None:
        """Record the mask after `done` steps if a snapshot is due."""
        if done in self._steps:
            with torch.no_grad():
                openness = mask.openness()[:, self.latents.to(mask.copied_from.device)]
            self.by_step[done] = (255 * openness).round().to(torch.uint8).cpu()

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; empty before the first snapshot."""
        if not self.by_step:
            return {}
        return {
            _SNAPSHOT_STEPS: torch.tensor(list(self.by_step)),
            _SNAPSHOTS: torch.stack(list(self.by_step.values())),
        }

    def restore_(self, state: dict[str, Tensor]) -> None:
        """Restore the snapshots from a checkpoint that includes `state()`."""
        if _SNAPSHOTS in state:
            self.by_step = dict(zip(state[_SNAPSHOT_STEPS].tolist(), state[_SNAPSHOTS], strict=True))

    def write(self, path: Path, batch_tokens: int) -> None:
        """Write a safetensors file, unless there are no snapshots.

        It holds `openness` [snapshot position latent], `tokens` [snapshot] and `latent` [latent].

        Args:
            path: the file.
            batch_tokens: tokens per step.
        """
        if self.by_step:
            tensors = {
                "openness": torch.stack(list(self.by_step.values())),
                "tokens": torch.tensor(list(self.by_step)) * batch_tokens,
                "latent": self.latents,
            }
            save_file(tensors, path)


_SNAPSHOTS, _SNAPSHOT_STEPS = "mask_snapshots", "mask_snapshot_steps"


def write_curve(path: Path, curve: list[CurvePoint]) -> None:
    """Write a training curve as a CSV file with a row per point."""
    write_records(path, CurvePoint, curve)
