"""How well an exported SAE reconstructs if it is not given positions, measured on the held-out vectors of its run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posmask.data.activations import Activations, Batch, evaluation_batches
from posmask.errors import DamagedFolder
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.storage.json_file import read_json
from posmask.storage.layout import SETTINGS_FILE, activations_folder
from posmask.storage.manifest import read_manifest

__all__ = ["Fidelity", "measured_fidelity"]

_MOST_TOKENS = 65_536


@dataclass(frozen=True)
class Fidelity:
    """Explained variance on held-out tokens, by the positions that the SAE is given; defined as in `Reconstruction`."""

    right_positions: float
    """With each token's own position."""
    one_position: float
    """With `position` for all tokens."""
    lifted: float
    """Without the mask."""
    position: int
    n_tokens: int

    def sentence(self) -> str:
        """Describe the numbers in one sentence."""
        return (
            f"Explained variance on {self.n_tokens:,} held-out tokens: {self.right_positions:.3f} with the right "
            f"positions, {self.one_position:.3f} with position {self.position} for all, {self.lifted:.3f} with the "
            "mask lifted."
        )

    def as_metadata(self) -> dict[str, Any]:
        """The numbers for cfg.json, rounded to 4 decimals."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measured_fidelity(cell: Path, sae: SparseAutoencoder, position: int) -> Fidelity | None:
    """Measure an SAE on the first 65,536 held-out tokens of its run.

    Args:
        cell: folder of the cell in its run folder.
        sae: the SAE in it.
        position: for all tokens.

    Returns:
        None if the run folder does not hold the vectors: the cell was copied, or they are elsewhere or were deleted.
    """
    heldout = _heldout_of(cell)
    if heldout is None:
        return None
    n_tokens, total, square = 0, torch.zeros(sae.d_model, dtype=torch.float64), 0.0
    errors = [0.0, 0.0, 0.0]
    for batch in _kept_batches(heldout):
        vectors = batch.vectors.double()
        n_tokens, total, square = n_tokens + len(batch), total + vectors.sum(0), square + float(vectors.square().sum())
        for number, reconstruction in enumerate(_reconstructions(sae, batch, position)):
            errors[number] += float((vectors - reconstruction).square().sum())
    variance = square - float(total.square().sum()) / n_tokens
    right, one, lifted = (1 - error / variance for error in errors)
    return Fidelity(right, one, lifted, position, n_tokens)


def _reconstructions(sae: SparseAutoencoder, batch: Batch, position: int) -> Iterator[Tensor]:
    right = batch.positions(sae.mask.settings.position_origin)
    yield sae.sparse_decode(sae.sparse_encode(batch.vectors, right))
    yield sae.sparse_decode(sae.sparse_encode(batch.vectors, torch.full_like(right, position)))
    yield sae.sparse_decode(sae.sparse_encode(batch.vectors, right, use_mask=False))


def _kept_batches(heldout: Activations) -> Iterator[Batch]:
    n_tokens = 0
    for batch in evaluation_batches(heldout):
        kept = batch.kept()
        if len(kept):
            yield kept
        n_tokens += len(kept)
        if n_tokens >= _MOST_TOKENS:
            return


def _heldout_of(cell: Path) -> Activations | None:
    """The held-out vectors that a cell was evaluated on, if they are in its run folder and intact."""
    try:
        made_from = read_json(cell / SETTINGS_FILE)
        corpus = made_from["corpus"]
        wanted = {"model": made_from["model"], "texts": made_from["texts"], "n_positions": corpus["n_positions"]}
        wanted |= {"split": corpus["eval_split"], "tokens": corpus["heldout_tokens"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for folder in sorted(activations_folder(cell.resolve().parent.parent).glob(f"{wanted['split']}-*")):
        try:
            if wanted.items() <= read_manifest(folder)["made_from"].items():
                return Activations(folder)
        except (DamagedFolder, OSError):
            continue
    return None
