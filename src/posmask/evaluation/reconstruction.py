"""Reconstruction quality: explained variance, L0 and dead latents, overall and by position."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.evaluation.retention import N_FOLDS
from posmask.kernels import operations
from posmask.results.intervals import jackknife_intervals, ratio
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes, SparseAutoencoder

__all__ = ["Reconstruction", "dead_share", "stream_measures"]


class Reconstruction:
    """Accumulates batches and computes `explained_variance` and `l0`.

    explained_variance = 1 - sum |v - v_hat|^2 / sum |v - mean|^2 over kept held-out tokens, in the model's units;
    1 is perfect, 0 is no better than the mean. Overall, `mean` is the mean of all kept tokens; by position it is the
    mean of the kept tokens at that position. It is NaN if no token is kept (position 0) or all vectors are equal.
    `explained_variance_of_all` by position is relative to the mean of all kept tokens, so its mean over positions,
    weighted with their share of the variance, is the overall explained variance. Intervals by position are jackknife
    intervals over 16 folds of texts.

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
        self._by_fold = {name: zeros(N_FOLDS, n_positions) for name in ("error", "squares", "active", "n")}
        self._sum_by_fold = zeros(N_FOLDS, n_positions, len(mean))
        self._of_sinks = {name: zeros(n_positions) for name in ("error", "squares", "n")}
        self._sum_of_sinks = zeros(n_positions, len(mean))

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
        cell = text % N_FOLDS * self._sum_by_fold.shape[1] + position
        for name, values in (("error", error), ("squares", squares), ("active", active), ("n", ones)):
            operations.add_at_(self._by_fold[name].view(-1), cell, values)
        operations.add_at_(self._sum_by_fold.view(-1, centered.shape[1]), cell, centered)

    def update_sinks(self, sinks: Batch, reconstruction: Float[Tensor, "token d_model"]) -> None:
        """Add attention sinks (`Activations.sinks`) and their reconstructions."""
        centered, position = sinks.vectors.double() - self._mean, sinks.position.long()
        error = (sinks.vectors.double() - reconstruction).square().sum(1)
        for name, values in (("error", error), ("squares", centered.square().sum(1)), ("n", torch.ones_like(error))):
            operations.add_at_(self._of_sinks[name], position, values)
        operations.add_at_(self._sum_of_sinks, position, centered)

    def _sink_measures(self) -> list[Measure]:
        n_sinks = int(self._of_sinks["n"].sum())
        n = int(self._by_text["n"].sum()) + n_sinks
        # With the sinks the mean moves by their share of the sum, which lowers the squares about it.
        squares = float(self._by_text["total"].sum()) + float(self._of_sinks["squares"].sum())
        total = squares - float(self._sum_of_sinks.sum(0).square().sum()) / n
        error = float(self._by_text["error"].sum()) + float(self._of_sinks["error"].sum())
        return [
            Measure("explained_variance_with_sinks", 1 - error / total, n=n),
            Measure("sink_tokens", n_sinks, n=n),
            *(
                Measure("sink_tokens", int(self._of_sinks["n"][position]), n=n, slice={"position": position})
                for position in self._of_sinks["n"].nonzero()[:, 0].tolist()
            ),
        ]

    def _at_positions(self) -> dict[str, tuple[Float[Tensor, " position"], Float[Tensor, "fold position"]]]:
        """Each metric by position, and the same without each fold of texts; NaN where it is undefined."""
        folds = {name: values.cpu() for name, values in self._by_fold.items()}
        sums = self._sum_by_fold.cpu()

        def metrics(at: dict[str, Tensor], sum_at: Tensor) -> dict[str, Tensor]:
            of_all = torch.where(at["squares"] > 0, 1 - at["error"] / at["squares"], torch.nan)
            l0 = torch.where(at["n"] > 0, at["active"] / at["n"], torch.nan)
            return {"explained_variance": _explained(at, sum_at), "explained_variance_of_all": of_all, "l0": l0}

        at, sum_at = {name: values.sum(0) for name, values in folds.items()}, sums.sum(0)
        has_texts = folds["n"].sum(1) > 0
        without = [
            metrics({name: at[name] - values[fold] for name, values in folds.items()}, sum_at - sums[fold])
            for fold in has_texts.nonzero()[:, 0].tolist()
        ]
        return {
            name: (value, torch.stack([one[name] for one in without])) for name, value in metrics(at, sum_at).items()
        }

    def by_position(self) -> dict[str, Float[Tensor, " position"]]:
        """Each metric by position, with `_low` and `_high`; `explained_variance_with_sinks` and `sink_tokens`."""
        columns: dict[str, Tensor] = {}
        for name, (value, without) in self._at_positions().items():
            low, high = jackknife_intervals(value, without)
            columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
        at = {name: (self._by_fold[name].sum(0) + sinks).cpu() for name, sinks in self._of_sinks.items()}
        sums = (self._sum_by_fold.sum(0) + self._sum_of_sinks).cpu()
        columns["explained_variance_with_sinks"] = _explained(at, sums)
        return columns | {"sink_tokens": self._of_sinks["n"].cpu()}

    def within(self, first: int, last: int) -> dict[str, float]:
        """`explained_variance` and `l0` of the kept tokens at a range of positions, relative to the mean of all tokens.

        The mean of few vectors would explain a part of their variance.
        """
        error, squares, active, n = (
            float(self._by_fold[name][:, first : last + 1].sum()) for name in ("error", "squares", "active", "n")
        )
        return {"explained_variance": 1 - error / squares, "l0": active / n}

    def overall(self, where: Mapping[str, object] | None = None) -> list[Measure]:
        """`explained_variance` and `l0` of all kept tokens, with confidence intervals over texts.

        Args:
            where: their slice.
        """
        has_tokens = self._by_text["n"] > 0  # These texts are the units of the bootstrap.
        text = {name: values[has_tokens].cpu() for name, values in self._by_text.items()}
        n = int(text["n"].sum())
        return [
            ratio("explained_variance", text["total"] - text["error"], text["total"], n=n, slice=where),
            ratio("l0", text["active"], text["n"], n=n, slice=where),
        ]

    def measures(self) -> list[Measure]:
        """`overall`, the same by position and its mean and median over positions, and the sinks.

        `explained_variance_position_mean` and `_median` count every position alike, whatever its share of the variance.

        Raises:
            DegenerateResult: no code is ever active, or the codes explain no variance.
        """
        explained, l0 = overall = self.overall()
        if l0.value == 0 or not explained.value > 0:
            raise DegenerateResult(
                f"the SAE has {l0.value:.3g} active latents per token and explains {explained.value:.3g} of the "
                "variance on held-out tokens, so its metrics would be meaningless: train it first, or check that it "
                "is of this model and site"
            )
        measures = [*overall, *self._sink_measures()]
        n_at = self._by_fold["n"].sum(0).long().tolist()
        metrics = self._at_positions()
        for name, summarize in (("mean", Tensor.nanmean), ("median", Tensor.nanmedian)):
            value, without = metrics["explained_variance"]
            folds = torch.stack([summarize(one) for one in without])
            low, high = jackknife_intervals(summarize(value), folds)
            metric = f"explained_variance_position_{name}"
            measures.append(Measure(metric, float(summarize(value)), float(low), float(high), int(sum(n_at))))
        intervals = {name: jackknife_intervals(*pair) for name, pair in metrics.items()}
        for position, n_tokens in enumerate(n_at):
            for name, (value, _) in metrics.items():
                low, high = (float(end[position]) for end in intervals[name])
                where = {"position": position}
                measures.append(Measure(name, float(value[position]), low, high, n_tokens, where))
        return measures


def _explained(
    at: Mapping[str, Float[Tensor, " position"]], sum_at: Float[Tensor, "position d_model"]
) -> Float[Tensor, " position"]:
    """Explained variance by position, relative to the mean at the position."""
    variance = at["squares"] - sum_at.square().sum(-1) / at["n"].clamp(min=1)
    return torch.where(variance > 1e-6 * at["squares"], 1 - at["error"] / variance, torch.nan)


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


def stream_measures(batches: Iterable[Batch], mean: Float[Tensor, " d_model"], n_positions: int) -> list[Measure]:
    """`stream_norm` by position and `top_variance_share` of the model's vectors.

    stream_norm = mean norm of the kept held-out vectors at a position, in the model's units.
    top_variance_share = share of sum |v - mean|^2 that the 1 % of these vectors farthest from the mean carry. If it is
    large, explained variance is mostly about few tokens.

    Args:
        batches: of kept tokens.
        mean: of their vectors.
        n_positions: positions per context.
    """
    norms, n_at = torch.zeros(2, n_positions, dtype=torch.float64)
    squares = []
    for batch in batches:
        vectors, position = batch.vectors.double(), batch.position.long().cpu()
        norms.index_add_(0, position, vectors.norm(dim=1).cpu())
        n_at.index_add_(0, position, torch.ones(len(position), dtype=torch.float64))
        squares.append((vectors - mean).square().sum(1).cpu())
    every = torch.cat(squares)
    top = every.topk(max(1, len(every) // 100)).values
    return [
        Measure("top_variance_share", float(top.sum() / every.sum()), n=len(every)),
        *(
            Measure("stream_norm", float(norms[p] / n_at[p]), n=int(n_at[p]), slice={"position": p})
            for p in n_at.nonzero()[:, 0].tolist()
        ),
    ]
