"""Activation smoothness: how much codes change from token to token, for the change of the vectors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.results.intervals import ratio
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes

__all__ = ["Smoothness"]


class Smoothness:
    """Accumulates contexts and computes `activation_smoothness` (Bhalla et al. 2025, arXiv 2511.05541, section 4.3).

    For a context, with v the vectors in the model's units, and t over its kept tokens whose predecessor in the context
    is a kept token of the same text:

        smoothness = mean over latents active in the context of max over t of |code[t] - code[t-1]| / |v[t] - v[t-1]|

    Codes are in the model's units, too. The measure is the mean over contexts; smaller is smoother.

    Args:
        scale: of the SAE, the factor of its codes in the model's units.
        level: for rules with nested parts, the first part that contains each latent, [latent].
    """

    def __init__(self, scale: float, level: Int[Tensor, " latent"] | None = None) -> None:
        self._scale = scale
        self._where = {None: None} if level is None else {None: None, "first": level == 0, "other": level > 0}
        self._by_context: dict[str | None, list[Tensor]] = {name: [] for name in self._where}

    def update(self, batch: Batch, codes: Codes, context: Int[Tensor, " token"]) -> None:
        """Add kept tokens (`batch.kept()`) of whole contexts and their codes.

        Args:
            context: the number of each token's context, ascending.
        """
        follows = (batch.position.diff() == 1) & (context.diff() == 0) & (batch.text.diff() == 0)
        vectors = batch.vectors.float()
        change = (vectors[1:] - vectors[:-1]).norm(dim=1)
        later = (follows & (change > 0)).nonzero()[:, 0] + 1
        dense = codes.dense()
        slope = (dense[later] - dense[later - 1]).abs() * (self._scale / change[later - 1])[:, None]
        is_active = (dense[later] > 0) | (dense[later - 1] > 0)
        _, n = context[later].unique_consecutive(return_counts=True)
        for largest, active in zip(slope.split(n.tolist()), is_active.split(n.tolist()), strict=True):
            self._add(largest.amax(0), active.any(0))

    def _add(self, largest: Float[Tensor, " latent"], active: Tensor) -> None:
        for name, part in self._where.items():
            of_part = largest[active if part is None else active & part.to(active.device)]
            if len(of_part):
                self._by_context[name].append(of_part.double().mean().cpu())

    def measures(self) -> list[Measure]:
        """`activation_smoothness` of all latents, and for nested parts of the first part and of the others.

        Raises:
            DegenerateResult: no context has two neighboring tokens with active latents.
        """
        if not self._by_context[None]:
            raise DegenerateResult(
                "no held-out context has neighboring tokens with active latents: take longer contexts or other texts"
            )
        measures = []
        for name, values in self._by_context.items():
            if values:
                where = None if name is None else {"part": name}
                measures.append(ratio("activation_smoothness", torch.stack(values), slice=where))
        return measures
