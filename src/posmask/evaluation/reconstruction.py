"""How well codes give back the vectors: explained variance, L0, dead latents; overall and by position."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.results.intervals import ratio
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes, SparseAutoencoder

__all__ = ["Reconstruction", "dead_share"]


class Reconstruction:
    """Accumulates batches, then gives `explained_variance` and `l0`.

    explained_variance = 1 - sum |v - v_hat|^2 / sum |v - mean|^2 over kept held-out tokens, in the model's units;
    1 is perfect, 0 is no better than the mean. Overall, `mean` is the mean of all those tokens; at a position it is
    the mean of the tokens there. Where no token is kept (position 0) or all vectors are equal it is NaN, never 0/0.

    l0 = mean number of non-zero codes a kept token.

    Args:
        mean: of the kept held-out vectors.
    """

    def __init__(self, n_positions: int, n_texts: int, mean: Float[Tensor, " d_model"]) -> None:
        self._mean = mean
        self._by_text = {name: torch.zeros(n_texts, dtype=torch.float64) for name in ("error", "total", "active", "n")}
        self._by_position = {name: torch.zeros(n_positions, dtype=torch.float64) for name in ("error", "squares", "n")}
        self._active_at = torch.zeros(n_positions, dtype=torch.float64)
        self._sum_at = torch.zeros(n_positions, len(mean), dtype=torch.float64)

    def update(self, batch: Batch, codes: Codes, reconstruction: Float[Tensor, "token d_model"]) -> None:
        """Add kept tokens (`batch.kept()`), their codes and what those reconstruct."""
        centered = batch.vectors.double() - self._mean
        squares = centered.square().sum(1)
        error = (batch.vectors.double() - reconstruction).square().sum(1)
        active = codes.n_active().double()
        text, position = batch.text.long(), batch.position.long()
        ones = torch.ones_like(error)
        for name, values in (("error", error), ("total", squares), ("active", active), ("n", ones)):
            self._by_text[name].index_add_(0, text, values)
        for name, values in (("error", error), ("squares", squares), ("n", ones)):
            self._by_position[name].index_add_(0, position, values)
        self._active_at.index_add_(0, position, active)
        self._sum_at.index_add_(0, position, centered)

    def measures(self) -> list[Measure]:
        """
        Raises:
            DegenerateResult: no code is ever active, or the codes explain nothing.
        """
        spoken = self._by_text["n"] > 0  # texts that have tokens here: the units of the bootstrap
        text = {name: values[spoken] for name, values in self._by_text.items()}
        n = int(text["n"].sum())
        explained = 1 - float(text["error"].sum() / text["total"].sum())
        l0 = float(text["active"].sum() / n)
        if l0 == 0 or not explained > 0:
            raise DegenerateResult(
                f"the SAE codes {l0:.3g} latents a token and explains {explained:.3g} of the variance on held-out "
                "tokens: numbers made with it would mean nothing, so none are written; train it first"
            )
        found = [
            ratio("explained_variance", text["total"] - text["error"], text["total"], n=n),
            ratio("l0", text["active"], text["n"], n=n),
        ]
        at = self._by_position
        variance = at["squares"] - self._sum_at.square().sum(1) / at["n"].clamp(min=1)
        by_position = torch.where(variance > 1e-6 * at["squares"], 1 - at["error"] / variance, torch.nan)
        for position, value in enumerate(by_position.tolist()):
            where = {"position": position}
            n_at = int(at["n"][position])
            found.append(Measure("explained_variance", value, n=n_at, slice=where))
            found.append(
                Measure("l0", float(self._active_at[position] / n_at) if n_at else torch.nan, n=n_at, slice=where)
            )
        return found


def dead_share(sae: SparseAutoencoder, dead: Bool[Tensor, " latent"]) -> list[Measure]:
    """The share of dead latents, overall and among the latents open at each position (`n` counts latents).

    Dead: not active on the last `dead_after_eligible_tokens` training tokens at which the latent was open. So a
    latent open at few positions is judged on as many chances to fire as one open everywhere.
    """
    found = [Measure("dead_share", float(dead.float().mean()), n=len(dead))]
    for position, row in enumerate(sae.mask.openness().detach()):
        open_here = row > 0 if sae.mask.gates_code() else row >= 0
        value = float(dead[open_here].float().mean()) if bool(open_here.any()) else torch.nan
        found.append(Measure("dead_share", value, n=int(open_here.sum()), slice={"position": position}))
    return found
