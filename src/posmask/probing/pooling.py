"""Token codes -> one feature vector a text."""

import torch
from jaxtyping import Float
from torch import Tensor

from posmask.activations import Batch
from posmask.sae import Codes

__all__ = ["Pool"]


class Pool:
    """Accumulates the mean code over a text's kept tokens, or over those in each of several position segments.

    Args:
        n_segments: 1 is mean pooling (SAEBench's). More is static slicing after the fact: positions are cut into
            that many equal segments, each with features of its own; a segment without tokens gives 0.
    """

    def __init__(self, n_texts: int, n_features: int, n_positions: int, n_segments: int = 1) -> None:
        self._n_positions = n_positions
        self._n_segments = n_segments
        self._total = torch.zeros(n_texts, n_segments, n_features)
        self._tokens = torch.zeros(n_texts, n_segments)

    def _place(self, batch: Batch) -> Tensor:
        segment = batch.position.long() * self._n_segments // self._n_positions
        place = batch.text.long() * self._n_segments + segment
        self._tokens.view(-1).index_add_(0, place, torch.ones(len(place)))
        return place

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their sparse codes."""
        entry = self._place(batch)[:, None] * codes.d_sae + codes.latent
        self._total.view(-1).index_add_(0, entry.reshape(-1), codes.value.reshape(-1))

    def update_dense(self, batch: Batch) -> None:
        """Add kept tokens with the model's own channels as features."""
        place = self._place(batch)
        self._total.view(-1, batch.vectors.shape[1]).index_add_(0, place, batch.vectors.float())

    def features(self) -> Float[Tensor, "text feature"]:
        return (self._total / self._tokens.clamp(min=1)[..., None]).flatten(1)
