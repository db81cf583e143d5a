"""Whether latents speak where they were specialised: retention with the mask lifted, and profile fidelity."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.activations import Batch
from posmask.errors import DegenerateResult
from posmask.intervals import interval, resample_counts
from posmask.rows import Measure
from posmask.sae import Codes

__all__ = ["PositionMass", "profile_fidelity", "retention"]

N_FOLDS = 16  # Texts are dealt into folds: halves for choosing and measuring, and the units of the bootstrap.
HALVES = (slice(0, None, 2), slice(1, None, 2))
MIN_FIRINGS = 20  # A latent without this many firings in each half has no share worth the name.


class PositionMass:
    """Accumulates each latent's activation mass (sum of codes) by fold of texts and position."""

    def __init__(self, n_positions: int, d_sae: int) -> None:
        self.mass: Float[Tensor, "fold position latent"] = torch.zeros(N_FOLDS, n_positions, d_sae)
        self.firings: Float[Tensor, "fold latent"] = torch.zeros(N_FOLDS, d_sae)
        self.tokens: Float[Tensor, "fold position"] = torch.zeros(N_FOLDS, n_positions)

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes."""
        fold = batch.text.long() % N_FOLDS
        cell = fold * self.tokens.shape[1] + batch.position.long()
        self.tokens.view(-1).index_add_(0, cell, torch.ones(len(cell)))
        self.mass.view(-1).index_add_(
            0, (cell[:, None] * codes.d_sae + codes.latent).reshape(-1), codes.value.reshape(-1)
        )
        fired = (codes.value > 0).float().reshape(-1)
        self.firings.view(-1).index_add_(0, (fold[:, None] * codes.d_sae + codes.latent).reshape(-1), fired)

    def counted(self) -> Bool[Tensor, " latent"]:
        """The latents that fire often enough in each half of the texts.

        Raises:
            DegenerateResult: there are none.
        """
        counted = torch.stack([self.firings[half].sum(0) for half in HALVES]).amin(0) >= MIN_FIRINGS
        if not bool(counted.any()):
            raise DegenerateResult(
                f"no latent fires {MIN_FIRINGS} times in each half of the held-out texts, so neither retention nor "
                "profile fidelity can be measured: raise heldout_tokens"
            )
        return counted


def retention(
    lifted: PositionMass, bound_positions: Bool[Tensor, "position latent"] | None, n_top: int
) -> list[Measure]:
    """`retention` and `retention_chance`: does a latent stay where it was specialised once it may speak anywhere?

    retention = mean over latents of (mass at the latent's positions) / (its mass), mask lifted, in [0, 1].
    The latent's positions are those its mask bound it to; where the mask binds none, the `n_top` positions with the
    most mass on one half of the texts. The share is measured on the other half; both ways round, averaged.

    retention_chance = what that share would be if the latent fired without regard to position: the share of
    kept tokens at its positions.

    Latents without 20 firings in each half are left out; `n` counts those that remain.

    Args:
        lifted: accumulated from codes with the mask lifted.
    """
    counted = lifted.counted()
    shares, chances, resampled, resampled_chance = [], [], [], []
    for chosen_on, measured_on in (HALVES, HALVES[::-1]):
        if bound_positions is None:
            top = lifted.mass[chosen_on].sum(0).topk(n_top, dim=0).indices
            positions = torch.zeros_like(lifted.mass[0]).scatter_(0, top, 1.0)
        else:
            positions = bound_positions.float()
        mass, tokens = lifted.mass[measured_on], lifted.tokens[measured_on]
        inside = torch.einsum("fpl,pl->fl", mass, positions)[:, counted]
        total = mass.sum(1)[:, counted]
        tokens_inside = tokens @ positions[:, counted]
        ones = torch.ones(1, len(tokens))
        counts = resample_counts(len(tokens)).float()
        for weights, share_list, chance_list in (
            (ones, shares, chances),
            (counts, resampled, resampled_chance),
        ):
            share_list.append(((weights @ inside) / (weights @ total)).nanmean(1))
            chance_list.append(((weights @ tokens_inside) / (weights @ tokens.sum(1))[:, None]).mean(1))
    n = int(counted.sum())
    return [
        Measure("retention", float(sum(shares)) / 2, *interval(sum(resampled) / 2), n),  # type: ignore[arg-type]
        Measure("retention_chance", float(sum(chances)) / 2, *interval(sum(resampled_chance) / 2), n),  # type: ignore[arg-type]
    ]


def profile_fidelity(used: PositionMass, openness: Float[Tensor, "position latent"]) -> list[Measure]:
    """`profile_fidelity`: the agreement of where latents speak with where their mask says they should.

    For each latent, the overlap sum over p of min(q[p], o[p]) of two distributions over positions: q, its mean
    activation at p; o, its openness at p; both scaled to sum 1 over the positions that have kept tokens. In [0, 1],
    1 when they are equal. The mean over latents with at least 20 firings in each half of the texts.

    A strict mask raises this number by its construction, and few firings lower it for everyone (a finite sample is
    never as flat as an open mask): read it beside retention, never alone.

    Args:
        used: accumulated from codes as the SAE is used, mask in place.
    """
    counted = used.counted()

    def overlap(mass: Tensor, tokens: Tensor) -> Tensor:
        seen = tokens > 0
        rate = mass[seen][:, counted] / tokens[seen, None]
        expected = openness[seen][:, counted]
        return torch.minimum(rate / rate.sum(0), expected / expected.sum(0)).sum(0).nanmean()

    resampled = torch.stack(
        [
            overlap(torch.einsum("f,fpl->pl", weights, used.mass), weights @ used.tokens)
            for weights in resample_counts(N_FOLDS)[:_N_PROFILE_RESAMPLES].float()
        ]
    )
    value = float(overlap(used.mass.sum(0), used.tokens.sum(0)))
    # Resampling whole folds repeats texts, which makes profiles spikier than they are: the spread is kept, its
    # centre is not.
    low, high = interval(resampled - resampled.mean() + value)
    return [Measure("profile_fidelity", value, low, high, int(counted.sum()))]


_N_PROFILE_RESAMPLES = 50
