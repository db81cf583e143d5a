"""Means over latents with jackknife intervals over folds of texts, collected from blocks of latents."""

import torch
from jaxtyping import Float
from torch import Tensor

from posmask.results.intervals import jackknife_interval

__all__ = ["MeanOverLatents"]


class MeanOverLatents:
    """The mean of a number per latent, and the means without each fold; latents where it is NaN do not count."""

    def __init__(self) -> None:
        self._sum, self._n = torch.zeros((), dtype=torch.float64), 0
        self._sums = self._counts = torch.zeros((), dtype=torch.float64)

    def add(self, values: Float[Tensor, " latent"], without: Float[Tensor, "fold latent"] | None = None) -> None:
        """Add latents: their numbers, and their numbers without each fold of texts; None: no interval is needed."""
        self._sum = self._sum + values.double().nansum().cpu()
        self._n += int(values.isfinite().sum())
        if without is not None:
            self._sums = self._sums + without.double().nansum(1).cpu()
            self._counts = self._counts + without.isfinite().sum(1).double().cpu()

    @property
    def value(self) -> float:
        """The mean; NaN if no latent counts."""
        return float(self._sum / self._n)

    @property
    def without(self) -> Float[Tensor, " fold"]:
        """The mean without each fold of texts."""
        return self._sums / self._counts

    def interval(self) -> tuple[float, float]:
        """The 95 % jackknife interval of the mean."""
        return jackknife_interval(self.value, self.without)
