"""Reconstruction quality: explained variance, L0 and dead latents, overall and by position."""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.kernels import operations
from posmask.results.intervals import ratio
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes, SparseAutoencoder

__all__ = ["Reconstruction", "dead_share"]


class Reconstruction:
    """Accumulates batches and computes `explained_variance` and `l0`.

    explained_variance = 1 - sum |v - v_hat|^2 / sum |v - mean|^2 over kept held-out tokens, in the model's units;
    1 is perfect, 0 is no better than the mean. Overall, `mean` is the mean of all kept tokens; by position it is the
    mean of the kept tokens at that position. It is NaN if no token is kept (position 0) or all vectors are equal.
    `explained_variance_of_all` by position is relative to the mean of all kept tokens, so its mean over positions,
    weighted with their share of the variance, is the overall explained variance.

    l0 = mean number of non-zero codes per kept token.

    `explained_variance_with_sinks` is the same over kept tokens and attention sinks, with the mean of both;
    `sink_tokens` is the number of attention sinks, also by position. Their `n` is the number of kept tokens and sinks.

    Args:
        n_positions: positions per context.
        n_texts: number of held-out texts.
        mean: of the kept held-out vectors, on the device of the batches and codes.
    """

    def __init__(self, n_positions: int, n_texts: int, mean: Float[Tensor, " d_model"]) -> None:
        self._mean = mean
        zeros = partial(torch.zeros, dtype=torch.float64, device=mean.device)
        self._by_text = {name: zeros(n_texts) for name in ("error", "total", "active", "n")}
        self._by_position = {name: zeros(n_positions) for name in ("error", "squares", "n")}
        self._active_at = zeros(n_positions)
        self._sum_at = zeros(n_positions, len(mean))
        self._of_sinks = {"error": 0.0, "squares": 0.0}
        self._sum_of_sinks = zeros(len(mean))
        self._sinks_at = zeros(n_positions)

    def update(self, batch: Batch, codes: Codes, reconstruction: Float[Tensor, "token d_model"]) -> None:
        """Add kept tokens (`batch.kept()`), their codes and their reconstructions."""
        centered = batch.vectors.double() - self._mean
        squares = centered.square().sum(1)
        error = (batch.vectors.double() - reconstruction).square().sum(1)
        active = codes.n_active().double()
        text, position = batch.text.long(), batch.position.long()
        ones = torch.ones_like(error)
        for name, values in (("error", error), ("total", squares), ("active", active), ("n", ones)):
            operations.add_at_(self._by_text[name], text, values)
        for name, values in (("error", error), ("squares", squares), ("n", ones)):
            operations.add_at_(self._by_position[name], position, values)
        operations.add_at_(self._active_at, position, active)
        operations.add_at_(self._sum_at, position, centered)

    def update_sinks(self, sinks: Batch, reconstruction: Float[Tensor, "token d_model"]) -> None:
        """Add attention sinks (`Activations.sinks`) and their reconstructions."""
        centered = sinks.vectors.double() - self._mean
        self._of_sinks["error"] += float((sinks.vectors.double() - reconstruction).square().sum())
        self._of_sinks["squares"] += float(centered.square().sum())
        self._sum_of_sinks += centered.sum(0)
        operations.add_at_(self._sinks_at, sinks.position.long(), torch.ones_like(centered[:, 0]))

    def _sink_measures(self) -> list[Measure]:
        n_sinks = int(self._sinks_at.sum())
        n = int(self._by_text["n"].sum()) + n_sinks
        # With the sinks the mean moves by their share of the sum, which lowers the squares about it.
        squares = float(self._by_text["total"].sum()) + self._of_sinks["squares"]
        total = squares - float(self._sum_of_sinks.square().sum()) / n
        error = float(self._by_text["error"].sum()) + self._of_sinks["error"]
        return [
            Measure("explained_variance_with_sinks", 1 - error / total, n=n),
            Measure("sink_tokens", n_sinks, n=n),
            *(
                Measure("sink_tokens", int(self._sinks_at[position]), n=n, slice={"position": position})
                for position in self._sinks_at.nonzero()[:, 0].tolist()
            ),
        ]

    def measures(self) -> list[Measure]:
        """`explained_variance` and `l0`, overall with confidence intervals over texts, and by position; and the sinks.

        Raises:
            DegenerateResult: no code is ever active, or the codes explain no variance.
        """
        has_tokens = self._by_text["n"] > 0  # These texts are the units of the bootstrap.
        text = {name: values[has_tokens].cpu() for name, values in self._by_text.items()}
        n = int(text["n"].sum())
        explained = 1 - float(text["error"].sum() / text["total"].sum())
        l0 = float(text["active"].sum() / n)
        if l0 == 0 or not explained > 0:
            raise DegenerateResult(
                f"the SAE has {l0:.3g} active latents per token and explains {explained:.3g} of the variance on "
                "held-out tokens, so its metrics would be meaningless: train it first"
            )
        measures = [
            ratio("explained_variance", text["total"] - text["error"], text["total"], n=n),
            ratio("l0", text["active"], text["n"], n=n),
            *self._sink_measures(),
        ]
        at = self._by_position
        variance = at["squares"] - self._sum_at.square().sum(1) / at["n"].clamp(min=1)
        by_position = torch.where(variance > 1e-6 * at["squares"], 1 - at["error"] / variance, torch.nan)
        for position, value in enumerate(by_position.tolist()):
            where = {"position": position}
            n_at = int(at["n"][position])
            measures.append(Measure("explained_variance", value, n=n_at, slice=where))
            squares = float(at["squares"][position])
            of_all = 1 - float(at["error"][position]) / squares if squares > 0 else torch.nan
            measures.append(Measure("explained_variance_of_all", of_all, n=n_at, slice=where))
            measures.append(
                Measure("l0", float(self._active_at[position] / n_at) if n_at else torch.nan, n=n_at, slice=where)
            )
        return measures


def dead_share(sae: SparseAutoencoder, dead: Bool[Tensor, " latent"]) -> list[Measure]:
    """`dead_share`: the share of dead latents, overall and among the latents open at each position.

    A latent is dead if it was not active on the last `dead_after_eligible_tokens` training tokens at which it was open.
    So latents open at few positions are judged on as many tokens as latents open everywhere. `n` counts latents.

    Args:
        dead: latents that were dead at the end of training.
    """
    measures = [Measure("dead_share", float(dead.float().mean()), n=len(dead))]
    for position, row in enumerate(sae.mask.openness().detach()):
        is_open = row > 0 if sae.mask.gates_code() else row >= 0
        value = float(dead[is_open].float().mean()) if bool(is_open.any()) else torch.nan
        measures.append(Measure("dead_share", value, n=int(is_open.sum()), slice={"position": position}))
    return measures
