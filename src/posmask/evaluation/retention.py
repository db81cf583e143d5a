"""Whether latents fire where they are specialized: retention with the mask lifted, and profile fidelity."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.kernels import operations
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

N_FOLDS = 16  # Folds of texts: halves for choosing and measuring, and the units of the jackknife.
HALVES = (slice(0, None, 2), slice(1, None, 2))
MIN_FIRINGS = 20  # Below this many firings in a half, a latent's share is too noisy.


class PositionMass:
    """Accumulates each latent's activation mass (sum of codes) and firings by fold of texts and position.

    Args:
        n_positions: positions per context.
        d_sae: number of latents.
        device: of the batches and codes.
    """

    def __init__(self, n_positions: int, d_sae: int, device: torch.device | None = None) -> None:
        self.mass: Float[Tensor, "fold position latent"] = torch.zeros(N_FOLDS, n_positions, d_sae, device=device)
        self.firings: Float[Tensor, "fold position latent"] = torch.zeros_like(self.mass)
        self.tokens: Float[Tensor, "fold position"] = torch.zeros(N_FOLDS, n_positions, device=device)

    def update(self, batch: Batch, codes: Codes, position_origin: PositionOrigin = "context") -> None:
        """Add kept tokens (`batch.kept()`) and their codes, at positions counted from `position_origin`."""
        cell = batch.text.long() % N_FOLDS * self.tokens.shape[1] + batch.positions(position_origin).long()
        operations.count_at_(self.tokens.view(-1), cell)
        entry = cell[codes.token] * codes.d_sae + codes.latent
        operations.add_at_(self.mass.view(-1), entry, codes.value)
        operations.count_at_(self.firings.view(-1), entry)

    def counted(self) -> Bool[Tensor, " latent"]:
        """The latents that fire at least 20 times in each half of the texts."""
        by_fold = self.firings.sum(1)
        return torch.stack([by_fold[half].sum(0) for half in HALVES]).amin(0) >= MIN_FIRINGS

    def counted_or_raise(self) -> Bool[Tensor, " latent"]:
        """The latents that fire at least 20 times in each half of the texts.

        Raises:
            DegenerateResult: there are no such latents.
        """
        counted = self.counted()
        if not bool(counted.any()):
            first, second = (int(self.tokens[half].sum()) for half in HALVES)
            raise DegenerateResult(
                f"no latent fires {MIN_FIRINGS} times in each half of the held-out texts ({first:,} and {second:,} "
                "tokens): evaluate on more tokens of more texts"
            )
        return counted


@dataclass(frozen=True)
class SpecialPositions:
    """The positions (1, else 0) that each latent is specialized in, for measuring on each half of the texts."""

    for_half: tuple[Float[Tensor, "position latent"], Float[Tensor, "position latent"]]


def special_positions(
    lifted: PositionMass, bound_positions: Bool[Tensor, "position latent"], n_top: int
) -> SpecialPositions:
    """The positions that the mask binds a latent to; for unbound latents the `n_top` with most mass on the other half.

    Args:
        lifted: accumulated from codes with the mask lifted.
        bound_positions: positions that the mask binds each latent to.
        n_top: positions per unbound latent.
    """
    bound_positions = bound_positions.to(lifted.mass.device)
    unbound = bound_positions.all(0) | ~bound_positions.any(0)
    bound, by_half = bound_positions.float(), []
    for half in HALVES[::-1]:
        top = lifted.mass[half].sum(0).topk(n_top, dim=0).indices
        by_half.append(torch.where(unbound, torch.zeros_like(bound).scatter_(0, top, 1.0), bound))
    return SpecialPositions((by_half[0], by_half[1]))


def retention(lifted: PositionMass, special: SpecialPositions, *, after: float | None = None) -> list[Measure]:
    """`retention` and `retention_chance`: whether latents still fire at their positions with the mask lifted.

    retention = mean over latents of (mass at the latent's positions) / (its total mass) with the mask lifted, in
    [0, 1], averaged over the two halves of the texts. retention_chance = the value for latents that fire independently
    of position: the share of kept tokens at a latent's positions.

    Latents with fewer than 20 firings in a half are left out; `n` counts the remaining ones. Intervals by jackknife
    over folds of texts, with the latents' positions held fixed.

    Args:
        lifted: accumulated from codes with the mask lifted.
        special: positions of each latent.
        after: training without the mask, as a fraction of the original steps; reported in the slice.

    Raises:
        DegenerateResult: no latent fires often enough.
    """
    counted = lifted.counted_or_raise()
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
    measures = []
    for name, (first, second) in values.items():
        value = float(first + second) / 2
        # A fold left out of one half does not change the value of the other half.
        folds = (without[name][0] + second) / 2, (first + without[name][1]) / 2
        where = None if after is None else {"after": f"{after:g}"}
        measures.append(Measure(name, value, *jackknife_interval(value, *folds), int(counted.sum()), where))
    return measures


def retention_by_latent(
    lifted: PositionMass, special: SpecialPositions
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """`retention` and `retention_chance` of each latent; NaN for latents with too few firings.

    Args:
        lifted: accumulated from codes with the mask lifted.
        special: positions of each latent.
    """
    counted = lifted.counted()
    shares, chances = [], []
    for half, positions in zip(HALVES, special.for_half, strict=True):
        mass, tokens = lifted.mass[half].sum(0), lifted.tokens[half].sum(0)
        shares.append((mass * positions).sum(0) / mass.sum(0))
        chances.append(tokens @ positions / tokens.sum())
    missing = torch.full_like(shares[0], torch.nan)
    share, chance = (torch.where(counted, torch.stack(halves).nanmean(0), missing) for halves in (shares, chances))
    return share, chance


def profile_fidelity(used: PositionMass, openness: Float[Tensor, "position latent"]) -> list[Measure]:
    """`profile_fidelity`: the agreement of latents' activation profiles with their openness.

    For each latent, sum over p of min(q[p], o[p]) for two distributions over positions: its mean activation q and its
    openness o, both scaled to sum 1 over the positions that have kept tokens. In [0, 1]; 1 if they are equal. Mean over
    latents with at least 20 firings in each half of the texts.

    A strict mask raises this number by construction, and few firings lower it for all masks (a finite sample is never
    as flat as an open mask). Interpret it together with retention.

    Args:
        used: accumulated from codes with the mask.
        openness: of the mask.

    Raises:
        DegenerateResult: no latent fires often enough.
    """
    counted, openness = used.counted_or_raise(), openness.to(used.mass.device)
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
    """`mean_openness` and `strictness` of the mask over the positions after BOS.

    strictness = mean over latents of 1 - (smallest openness) / (largest openness): 0 if every latent is equally open
    everywhere, 1 if every latent is closed somewhere. Latents that are closed everywhere count as strict.
    """
    openness = mask.openness().detach()[1:]
    contrast = 1 - openness.amin(0) / openness.amax(0).clamp(min=1e-30)
    return [
        Measure("mean_openness", float(openness.mean()), n=mask.d_sae),
        Measure("strictness", float(contrast.mean()), n=mask.d_sae),
    ]
