"""Masks that training does not change: open, slice, band, windows, hard, cohort."""

from fractions import Fraction
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from torch import Tensor

from posmask.errors import BadSetting
from posmask.masks.base import MaskSettings, PositionMask


def _blocks(n_items: int, n_blocks: int) -> Int[Tensor, " item"]:
    """The block of each item, all of equal size or one apart."""
    return torch.arange(n_items) * n_blocks // n_items


class Open(PositionMask):
    """Every latent open everywhere: the baseline, equal to no mask bit for bit."""

    class Settings(MaskSettings):
        kind: Literal["open"] = "open"

    def _start(self, random: torch.Generator) -> None:
        self._fix(torch.ones(self.n_positions, self.n_bound))

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        return Fraction(1)


class Slice(PositionMask):
    """Static slicing: contiguous latent block b is open exactly on contiguous position block b."""

    class Settings(MaskSettings):
        kind: Literal["slice"] = "slice"
        n_slices: int = Field(gt=0)
        """Number of blocks; block b covers positions b*T/n .. (b+1)*T/n, rounded down, and latents likewise."""

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        n_slices = self.settings.n_slices
        if n_slices > self.n_positions or 0 < self.n_bound < n_slices:
            raise BadSetting(
                f"n_slices = {n_slices} is more than the {self.n_positions} positions or {self.n_bound} latents it "
                "divides: choose fewer slices"
            )
        slices = _blocks(self.n_positions, n_slices)[:, None] == _blocks(self.n_bound, n_slices)
        self._fix(slices.float())

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        assert isinstance(settings, cls.Settings)
        return settings.n_slices

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        return Fraction(cls.n_blocks(settings, n_positions))


class Band(PositionMask):
    """Windows that grow with position: 1 (with BOS), 2 and 3 have one each, later ones share, `growth` times as many
    from one window to the next.

    Contiguous latent block b is open on window b. Published SAEs have latents of their own for the first positions and
    ranges for later ones. With `smoothness` the openness falls in a straight line to 0 on both sides of the window,
    over that many times its width.
    """

    class Settings(MaskSettings):
        kind: Literal["band"] = "band"
        growth: float = Field(default=1.5, ge=1)
        smoothness: float = Field(default=0.0, ge=0)

    settings: Settings

    @classmethod
    def windows(cls, settings: "Band.Settings", n_positions: int) -> Int[Tensor, " position"]:
        """The window of each position; a last one of less than half its width joins the one before."""
        starts, width, first = [], 1.0, 2
        while first < n_positions:
            size = int(width)
            if n_positions - first >= size / 2:
                starts.append(first)
            width = width * settings.growth if first >= 3 else 1.0
            first += size
        return torch.searchsorted(torch.tensor(starts, dtype=torch.int64), torch.arange(n_positions), right=True)

    def _start(self, random: torch.Generator) -> None:
        window = self.windows(self.settings, self.n_positions)
        n_windows = int(window[-1]) + 1
        if n_windows > (self.n_bound or self.d_sae):
            raise BadSetting(
                f"growth = {self.settings.growth} makes {n_windows} windows of {self.n_positions} positions, more than "
                f"the {self.n_bound or self.d_sae} latents they divide: raise it"
            )
        inside = window[:, None] == torch.arange(n_windows)
        mask_row = torch.arange(self.n_positions)[:, None]
        first = inside.int().argmax(0)
        last = first + inside.sum(0) - 1
        away = torch.maximum(first - mask_row, mask_row - last).clamp(min=0)
        falls_over = self.settings.smoothness * inside.sum(0)
        by_window = inside.float() if not self.settings.smoothness else (1 - away / (1 + falls_over)).clamp(min=0)
        self._fix(by_window[:, _blocks(self.n_bound, n_windows)])

    def bound_positions(self) -> Bool[Tensor, "position latent"]:
        bound = self.fixed_openness == 1
        return torch.cat([bound.new_ones(len(bound), self.n_free), bound], 1)

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        assert isinstance(settings, cls.Settings)
        return int(cls.windows(settings, n_positions)[-1]) + 1

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction | None:
        assert isinstance(settings, cls.Settings)
        return None if settings.smoothness else Fraction(cls.n_blocks(settings, n_positions))


class Windows(PositionMask):
    """Latents cut into windows of positions at several scales at once.

    Each entry of `cuts` is one way to cut the context, and equal shares of the latents follow each: [] leaves them
    whole, [24] makes two of each, one open before position 24 and one from it on. One of a latent's windows is live at
    any position. They start equal and are copies of each other; `gradient_sharing` makes them learn together.
    """

    class Settings(MaskSettings):
        kind: Literal["windows"] = "windows"
        cuts: tuple[tuple[Annotated[int, Field(gt=0)], ...], ...] = Field(min_length=1)

        @model_validator(mode="after")
        def _in_order(self) -> "Windows.Settings":
            for one in self.cuts:
                if list(one) != sorted(set(one)):
                    raise ValueError(f"cuts = {list(one)} are not in order: give growing positions")
            return self

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        ask = self.settings
        n_windows = self.n_blocks(ask, self.n_positions)
        last = max((one[-1] for one in ask.cuts if one), default=0)
        if last >= self.n_positions or self.n_bound % n_windows:
            raise BadSetting(
                f"cuts = {[list(one) for one in ask.cuts]} make {n_windows} windows, the last from position {last}, "
                f"which do not divide {self.n_positions} positions and {self.n_bound} latents: cuts must lie within "
                f"the context, and latents be a multiple of {n_windows}"
            )
        per_window = self.n_bound // n_windows
        mask_row = torch.arange(self.n_positions)
        openness = []
        for number, one in enumerate(ask.cuts):
            window = torch.searchsorted(torch.tensor(one, dtype=torch.long), mask_row, right=True)
            first = self.n_free + sum(len(other) + 1 for other in ask.cuts[:number]) * per_window
            own = torch.arange(first, first + per_window)
            if self.gates_code():  # else all windows of a latent would speak at once, and alike
                self.copied_from[first : first + (len(one) + 1) * per_window] = own.repeat(len(one) + 1)
            openness.append((window[:, None] == torch.arange(len(one) + 1)).repeat_interleave(per_window, dim=1))
        self._fix(torch.cat(openness, 1).float())

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        assert isinstance(settings, cls.Settings)
        return sum(len(one) + 1 for one in settings.cuts)

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        assert isinstance(settings, cls.Settings)
        return Fraction(cls.n_blocks(settings, n_positions), len(settings.cuts))


def _check_positions_per_latent(positions_per_latent: int, n_positions: int) -> None:
    if positions_per_latent > n_positions:
        raise BadSetting(
            f"positions_per_latent = {positions_per_latent} is more than the {n_positions} positions of the context: "
            "choose at most that many"
        )


class Hard(PositionMask):
    """Each latent open at exactly `positions_per_latent` positions, drawn without replacement (the log's Run 1).

    With `contiguous` they are neighbors: a window whose middle is drawn from all positions, moved inside the context;
    latents stand in the order of their windows.
    """

    class Settings(MaskSettings):
        kind: Literal["hard"] = "hard"
        positions_per_latent: int = Field(gt=0)
        contiguous: bool = False

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        n_open = self.settings.positions_per_latent
        _check_positions_per_latent(n_open, self.n_positions)
        if self.settings.contiguous:
            middle = torch.randint(self.n_positions, (self.n_bound,), generator=random).sort().values
            start = (middle - n_open // 2).clamp(0, self.n_positions - n_open)
            drawn = start + torch.arange(n_open)[:, None]
        else:
            drawn = torch.rand(self.n_positions, self.n_bound, generator=random).topk(n_open, dim=0).indices
        self._fix(torch.zeros(self.n_positions, self.n_bound).scatter_(0, drawn, 1.0))


class Cohort(PositionMask):
    """A structured hard mask: latents of a cohort are neighbors in memory and share one random set of positions.

    Every position is open for the same number of cohorts, so that at each position one block of the weights is live.
    """

    class Settings(MaskSettings):
        kind: Literal["cohort"] = "cohort"
        n_cohorts: int = Field(gt=0)
        positions_per_latent: int = Field(gt=0)

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        n_cohorts, n_open = self.settings.n_cohorts, self.settings.positions_per_latent
        _check_positions_per_latent(n_open, self.n_positions)
        if n_cohorts * n_open % self.n_positions or self.n_bound % n_cohorts or n_cohorts > self.d_sae:
            raise BadSetting(
                f"n_cohorts = {n_cohorts} of {n_open} positions cannot open every one of {self.n_positions} positions "
                f"for the same number of {self.n_bound} latents: n_cohorts * positions_per_latent must be a multiple "
                "of the context length, and the number of latents a multiple of n_cohorts"
            )
        cohorts = torch.zeros(self.n_positions, n_cohorts)
        for cohort in range(n_cohorts):
            # The positions used least so far, ties at random: usage stays level, and no position comes twice.
            order = cohorts.sum(1) + torch.rand(self.n_positions, generator=random)
            cohorts[order.topk(n_open, largest=False).indices, cohort] = 1.0
        self._fix(cohorts.repeat_interleave(self.n_bound // n_cohorts, dim=1))

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        assert isinstance(settings, cls.Settings)
        return settings.n_cohorts

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        assert isinstance(settings, cls.Settings)
        return Fraction(n_positions, settings.positions_per_latent)
