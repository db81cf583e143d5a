"""Whether latents fire where they are specialized: retention with the mask lifted, and profile fidelity."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.evaluation.means import MeanOverLatents
from posmask.kernels import operations
from posmask.masks.base import PositionMask, PositionOrigin
from posmask.results.intervals import jackknife_interval
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes

__all__ = [
    "PositionMass",
    "ProfileFidelity",
    "Retention",
    "SpecialPositions",
    "mask_measures",
    "profile_fidelity",
    "raise_if_none",
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


def raise_if_none(n_counted: int, of_latents: PositionMass | None) -> None:
    """Raise an error if no latent fires 20 times in each half of the texts.

    Args:
        n_counted: how many do.
        of_latents: accumulated from the codes of some latents.

    Raises:
        DegenerateResult: none does.
    """
    if n_counted == 0 and of_latents is not None:
        first, second = (int(of_latents.tokens[half].sum()) for half in HALVES)
        raise DegenerateResult(
            f"no latent fires {MIN_FIRINGS} times in each half of the held-out texts ({first:,} and {second:,} "
            "tokens): evaluate on more tokens of more texts"
        )


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


class Retention:
    """`retention` and `retention_chance`: whether latents still fire at their positions with the mask lifted.

    retention = mean over latents of (mass at the latent's positions) / (its total mass) with the mask lifted, in
    [0, 1], averaged over the two halves of the texts. retention_chance = the value for latents that fire independently
    of position: the share of kept tokens at a latent's positions.

    Latents with fewer than 20 firings in a half are left out; `n` counts the remaining ones. Intervals by jackknife
    over folds of texts, with the latents' positions held fixed.
    """

    def __init__(self) -> None:
        self._means = {name: (MeanOverLatents(), MeanOverLatents()) for name in ("retention", "retention_chance")}
        self._n = 0
        self._lifted: PositionMass | None = None

    def add(self, lifted: PositionMass, special: SpecialPositions) -> None:
        """Add latents.

        Args:
            lifted: accumulated from their codes with the mask lifted.
            special: positions of each latent.
        """
        self._lifted, counted = lifted, lifted.counted()
        self._n += int(counted.sum())
        for number, (half, positions) in enumerate(zip(HALVES, special.for_half, strict=True)):
            mass, tokens = lifted.mass[half], lifted.tokens[half]
            chosen = positions[:, counted]
            inside = torch.einsum("fpl,pl->fl", mass[..., counted], chosen).double()
            total = mass.sum(1)[:, counted].double()
            tokens_inside = (tokens @ chosen).double()
            n_tokens = tokens.sum(1, keepdim=True).double().expand_as(tokens_inside)
            parts = {"retention": (inside, total), "retention_chance": (tokens_inside, n_tokens)}
            for name, (top, bottom) in parts.items():
                without = (top.sum(0) - top) / (bottom.sum(0) - bottom)
                self._means[name][number].add(top.sum(0) / bottom.sum(0), without)

    def measures(self, *, after: float | None = None) -> list[Measure]:
        """The two measures.

        Args:
            after: training without the mask, as a fraction of the original steps; reported in the slice.

        Raises:
            DegenerateResult: no latent fires often enough.
        """
        raise_if_none(self._n, self._lifted)
        measures, where = [], None if after is None else {"after": f"{after:g}"}
        for name, (first, second) in self._means.items():
            value = (first.value + second.value) / 2
            # A fold left out of one half does not change the value of the other half.
            folds = (first.without + second.value) / 2, (first.value + second.without) / 2
            measures.append(Measure(name, value, *jackknife_interval(value, *folds), self._n, where))
        return measures


def retention(lifted: PositionMass, special: SpecialPositions, *, after: float | None = None) -> list[Measure]:
    """The measures of `Retention` of all latents together.

    Raises:
        DegenerateResult: no latent fires often enough.
    """
    of_all = Retention()
    of_all.add(lifted, special)
    return of_all.measures(after=after)


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


class ProfileFidelity:
    """`profile_fidelity`: the agreement of latents' activation profiles with their openness.

    For each latent, sum over p of min(q[p], o[p]) for two distributions over positions: its mean activation q and its
    openness o, both scaled to sum 1 over the positions that have kept tokens. In [0, 1]; 1 if they are equal. Mean over
    latents with at least 20 firings in each half of the texts.

    A strict mask raises this number by construction, and few firings lower it for all masks (a finite sample is never
    as flat as an open mask). Interpret it together with retention.
    """

    def __init__(self) -> None:
        self._mean, self._n = MeanOverLatents(), 0
        self._used: PositionMass | None = None

    def add(self, used: PositionMass, openness: Float[Tensor, "position latent"]) -> None:
        """Add latents.

        Args:
            used: accumulated from their codes with the mask.
            openness: of the mask.
        """
        self._used, counted, openness = used, used.counted(), openness.to(used.mass.device)
        self._n += int(counted.sum())
        by_fold = used.mass[..., counted]
        mass, tokens = by_fold.sum(0), used.tokens.sum(0)

        def overlap(mass: Tensor, tokens: Tensor) -> Tensor:
            seen = tokens > 0
            rate = mass[seen] / tokens[seen, None]
            expected = openness[seen][:, counted]
            return torch.minimum(rate / rate.sum(0), expected / expected.sum(0)).sum(0)

        without = [overlap(mass - by_fold[fold], tokens - used.tokens[fold]) for fold in range(N_FOLDS)]
        self._mean.add(overlap(mass, tokens), torch.stack(without))

    def measures(self) -> list[Measure]:
        """The measure.

        Raises:
            DegenerateResult: no latent fires often enough.
        """
        raise_if_none(self._n, self._used)
        return [Measure("profile_fidelity", self._mean.value, *self._mean.interval(), self._n)]


def profile_fidelity(used: PositionMass, openness: Float[Tensor, "position latent"]) -> list[Measure]:
    """The measure of `ProfileFidelity` of all latents together.

    Raises:
        DegenerateResult: no latent fires often enough.
    """
    of_all = ProfileFidelity()
    of_all.add(used, openness)
    return of_all.measures()


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
