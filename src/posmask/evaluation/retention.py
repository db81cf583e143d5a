"""Whether latents speak where they were specialized: retention with the mask lifted, and profile fidelity."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.masks.base import PositionMask, PositionOrigin
from posmask.results.intervals import jackknife_interval
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes

__all__ = [
    "PositionMass",
    "SpecialPositions",
    "mask_measures",
    "profile_fidelity",
    "retention",
    "retention_by_latent",
    "special_positions",
]

N_FOLDS = 16  # Texts are dealt into folds: halves for choosing and measuring, and the units of the jackknife.
HALVES = (slice(0, None, 2), slice(1, None, 2))
MIN_FIRINGS = 20  # A latent without this many firings in each half has no share worth the name.


class PositionMass:
    """Accumulates each latent's activation mass (sum of codes) and firings by fold of texts and position."""

    def __init__(self, n_positions: int, d_sae: int) -> None:
        self.mass: Float[Tensor, "fold position latent"] = torch.zeros(N_FOLDS, n_positions, d_sae)
        self.firings: Float[Tensor, "fold position latent"] = torch.zeros(N_FOLDS, n_positions, d_sae)
        self.tokens: Float[Tensor, "fold position"] = torch.zeros(N_FOLDS, n_positions)

    def update(self, batch: Batch, codes: Codes, position_origin: PositionOrigin = "context") -> None:
        """Add kept tokens (`batch.kept()`) and their codes, at positions counted in that way."""
        cell = batch.text.long() % N_FOLDS * self.tokens.shape[1] + batch.positions(position_origin).long()
        self.tokens.view(-1).index_add_(0, cell, torch.ones(len(cell)))
        entry = cell[codes.token] * codes.d_sae + codes.latent
        self.mass.view(-1).index_add_(0, entry, codes.value)
        self.firings.view(-1).index_add_(0, entry, torch.ones(len(entry)))

    def counted(self) -> Bool[Tensor, " latent"]:
        """The latents that fire often enough in each half of the texts.

        Raises:
            DegenerateResult: there are none.
        """
        by_fold = self.firings.sum(1)
        counted = torch.stack([by_fold[half].sum(0) for half in HALVES]).amin(0) >= MIN_FIRINGS
        if not bool(counted.any()):
            raise DegenerateResult(
                f"no latent fires {MIN_FIRINGS} times in each half of the held-out texts, so neither retention nor "
                "profile fidelity can be measured: raise heldout_tokens"
            )
        return counted


@dataclass(frozen=True)
class SpecialPositions:
    """The positions that each latent is said to have specialized in, for measuring on either half of the texts."""

    for_half: tuple[Float[Tensor, "position latent"], Float[Tensor, "position latent"]]


def special_positions(
    lifted: PositionMass, bound_positions: Bool[Tensor, "position latent"], n_top: int
) -> SpecialPositions:
    """Those its mask bound a latent to; where it bound it to none, the `n_top` with most mass on the *other* half."""
    unbound = bound_positions.all(0) | ~bound_positions.any(0)
    bound, other = bound_positions.float(), []
    for half in HALVES[::-1]:
        top = lifted.mass[half].sum(0).topk(n_top, dim=0).indices
        other.append(torch.where(unbound, torch.zeros_like(bound).scatter_(0, top, 1.0), bound))
    return SpecialPositions((other[0], other[1]))


def retention(lifted: PositionMass, special: SpecialPositions, *, after: float | None = None) -> list[Measure]:
    """`retention` and `retention_chance`: does a latent stay where it was specialized once it may speak anywhere?

    retention = mean over latents of (mass at the latent's positions) / (its mass), mask lifted, in [0, 1], measured
    on one half of the texts and on the other, averaged. retention_chance = what that share would be if the latent
    fired without regard to position: the share of kept tokens at its positions.

    Latents without 20 firings in each half are left out; `n` counts those that remain. Intervals by jackknife over
    folds of texts, the latents' positions held fixed.

    Args:
        lifted: accumulated from codes with the mask lifted.
        after: share of the original training steps that went on without the mask; stands in the slice.
    """
    counted = lifted.counted()
    values: dict[str, list[Tensor]] = {"retention": [], "retention_chance": []}
    without: dict[str, list[Tensor]] = {"retention": [], "retention_chance": []}
    for half, positions in zip(HALVES, special.for_half, strict=True):
        mass, tokens = lifted.mass[half], lifted.tokens[half]
        chosen = positions[:, counted]
        inside = torch.einsum("fpl,pl->fl", mass[..., counted], chosen).double()
        total = mass.sum(1)[:, counted].double()
        tokens_inside, n_tokens = (tokens @ chosen).double(), tokens.sum(1, keepdim=True).double()
        for name, top, bottom in (("retention", inside, total), ("retention_chance", tokens_inside, n_tokens)):
            values[name].append((top.sum(0) / bottom.sum(0)).nanmean())
            without[name].append(((top.sum(0) - top) / (bottom.sum(0) - bottom)).nanmean(1))
    found = []
    for name, (one, other) in values.items():
        value = float(one + other) / 2
        # A fold left out of one half leaves the other half's value as it is.
        folds = (without[name][0] + other) / 2, (one + without[name][1]) / 2
        where = None if after is None else {"after": f"{after:g}"}
        found.append(Measure(name, value, *jackknife_interval(value, *folds), int(counted.sum()), where))
    return found


def retention_by_latent(
    lifted: PositionMass, special: SpecialPositions
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """Each latent's own `retention` and `retention_chance`; NaN where it fires too seldom."""
    counted = lifted.counted()
    shares, chances = [], []
    for half, positions in zip(HALVES, special.for_half, strict=True):
        mass, tokens = lifted.mass[half].sum(0), lifted.tokens[half].sum(0)
        shares.append((mass * positions).sum(0) / mass.sum(0))
        chances.append(tokens @ positions / tokens.sum())
    nowhere = torch.full((len(counted),), torch.nan)
    share, chance = (torch.where(counted, torch.stack(both).nanmean(0), nowhere) for both in (shares, chances))
    return share, chance


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
    by_fold = used.mass[..., counted]
    mass, tokens = by_fold.sum(0), used.tokens.sum(0)

    def overlap(mass: Tensor, tokens: Tensor) -> Tensor:
        seen = tokens > 0
        rate = mass[seen] / tokens[seen, None]
        expected = openness[seen][:, counted]
        return torch.minimum(rate / rate.sum(0), expected / expected.sum(0)).sum(0).nanmean()

    without = torch.stack([overlap(mass - by_fold[fold], tokens - used.tokens[fold]) for fold in range(N_FOLDS)])
    value = float(overlap(mass, tokens))
    return [Measure("profile_fidelity", value, *jackknife_interval(value, without), int(counted.sum()))]


def mask_measures(mask: PositionMask) -> list[Measure]:
    """`mean_openness` and `strictness` of what the mask ended as, over the positions after BOS.

    strictness = mean over latents of 1 - (least openness) / (largest): 0 where latents are equally open everywhere,
    1 where they are closed somewhere. Latents that are closed everywhere count as strict.
    """
    openness = mask.openness().detach()[1:]
    contrast = 1 - openness.amin(0) / openness.amax(0).clamp(min=1e-30)
    return [
        Measure("mean_openness", float(openness.mean()), n=mask.d_sae),
        Measure("strictness", float(contrast.mean()), n=mask.d_sae),
    ]
