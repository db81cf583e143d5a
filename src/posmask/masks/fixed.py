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
    """The block of each item; block sizes differ by at most 1."""
    return torch.arange(n_items) * n_blocks // n_items


class Open(PositionMask):
    """Every latent is open everywhere: the baseline, bit for bit equal to no mask."""

    class Settings(MaskSettings):
        """Settings of an open mask: only the shared ones."""

        kind: Literal["open"] = "open"

    def _start(self, random: torch.Generator) -> None:
        self._fix(torch.ones(self.n_positions, self.n_bound))

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        """1, because every latent is open everywhere."""
        return Fraction(1)


class Slice(PositionMask):
    """Static slicing: the contiguous latent block b is open on the contiguous position block b only."""

    class Settings(MaskSettings):
        """Settings of static slicing."""

        kind: Literal["slice"] = "slice"
        n_slices: int = Field(gt=0)
        """Number of blocks. Block b covers positions b*T/n to (b+1)*T/n, rounded down, and latents likewise."""

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        n_slices = self.settings.n_slices
        if n_slices > self.n_positions or 0 < self.n_bound < n_slices:
            raise BadSetting(
                f"n_slices = {n_slices} is more than the {self.n_positions} positions or {self.n_bound} latents that "
                "they divide: choose fewer slices"
            )
        slices = _blocks(self.n_positions, n_slices)[:, None] == _blocks(self.n_bound, n_slices)
        self._fix(slices.float())

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """`n_slices`."""
        assert isinstance(settings, cls.Settings)
        return settings.n_slices

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        """`n_slices`, because each bound latent is open in one of that many slices."""
        return Fraction(cls.n_blocks(settings, n_positions))


class Band(PositionMask):
    """Windows of positions that grow with position: contiguous latent block b is open on window b.

    Positions 1 (with BOS), 2 and 3 have one window each; each later window is `growth` times as wide as the one before.
    In published SAEs, too, there are latents for single early positions and for ranges of later ones.
    """

    class Settings(MaskSettings):
        """Settings of growing windows."""

        kind: Literal["band"] = "band"
        growth: float = Field(default=1.5, ge=1)
        """Ratio of the widths of consecutive windows after position 3."""
        smoothness: float = Field(default=0.0, ge=0)
        """On both sides of a window the openness falls linearly to 0 over this many times its width. 0: strict."""

    settings: Settings

    @classmethod
    def windows(cls, settings: "Band.Settings", n_positions: int) -> Int[Tensor, " position"]:
        """The window of each position; a last window cut to less than half its width joins the one before."""
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
                f"the {self.n_bound or self.d_sae} latents that they divide: raise it"
            )
        inside = window[:, None] == torch.arange(n_windows)
        mask_row = torch.arange(self.n_positions)[:, None]
        first = inside.int().argmax(0)
        last = first + inside.sum(0) - 1
        distance = torch.maximum(first - mask_row, mask_row - last).clamp(min=0)
        width_of_fall = self.settings.smoothness * inside.sum(0)
        by_window = (
            inside.float() if not self.settings.smoothness else (1 - distance / (1 + width_of_fall)).clamp(min=0)
        )
        self._fix(by_window[:, _blocks(self.n_bound, n_windows)])

    def bound_positions(self) -> Bool[Tensor, "position latent"]:
        """The window of each latent, without its smooth sides."""
        bound = self.fixed_openness == 1
        return torch.cat([bound.new_ones(len(bound), self.n_free), bound], 1)

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """The number of windows."""
        assert isinstance(settings, cls.Settings)
        return int(cls.windows(settings, n_positions)[-1]) + 1

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction | None:
        """The number of windows; None for smooth windows, which overlap."""
        assert isinstance(settings, cls.Settings)
        return None if settings.smoothness else Fraction(cls.n_blocks(settings, n_positions))


class Windows(PositionMask):
    """Latents divided into windows of positions at several scales.

    The windows of a latent are copies of each other and start equal; one of them is live at any position.
    `gradient_sharing` makes them learn together.
    """

    class Settings(MaskSettings):
        """Settings of windows at several scales."""

        kind: Literal["windows"] = "windows"
        cuts: tuple[tuple[Annotated[int, Field(gt=0)], ...], ...] = Field(min_length=1)
        """Ways to cut the context, each followed by an equal share of the latents: [] does not cut, [24] makes two
        copies of a latent, open before position 24 and from it on."""

        @model_validator(mode="after")
        def _in_order(self) -> "Windows.Settings":
            for cut in self.cuts:
                if list(cut) != sorted(set(cut)):
                    raise ValueError(f"cuts = {list(cut)} are not in order: give growing positions")
            return self

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        cuts = self.settings.cuts
        n_windows = self.n_blocks(self.settings, self.n_positions)
        last = max((cut[-1] for cut in cuts if cut), default=0)
        if last >= self.n_positions or self.n_bound % n_windows:
            raise BadSetting(
                f"cuts = {[list(cut) for cut in cuts]} make {n_windows} windows, the last from position {last}, "
                f"which do not divide {self.n_positions} positions and {self.n_bound} latents: choose cuts within "
                f"the context and a multiple of {n_windows} latents"
            )
        per_window = self.n_bound // n_windows
        mask_row = torch.arange(self.n_positions)
        openness = []
        first = self.n_free
        for cut in cuts:
            window = torch.searchsorted(torch.tensor(cut, dtype=torch.long), mask_row, right=True)
            stop = first + (len(cut) + 1) * per_window
            if self.gates_code():  # else all copies would fire at the same tokens with equal codes
                self.copied_from[first:stop] = torch.arange(first, first + per_window).repeat(len(cut) + 1)
            openness.append((window[:, None] == torch.arange(len(cut) + 1)).repeat_interleave(per_window, dim=1))
            first = stop
        self._fix(torch.cat(openness, 1).float())

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """The number of windows of all cuts."""
        assert isinstance(settings, cls.Settings)
        return sum(len(cut) + 1 for cut in settings.cuts)

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        """Windows per cut, because one window of each cut is open at a position."""
        assert isinstance(settings, cls.Settings)
        return Fraction(cls.n_blocks(settings, n_positions), len(settings.cuts))


def _check_positions_per_latent(positions_per_latent: int, n_positions: int) -> None:
    if positions_per_latent > n_positions:
        raise BadSetting(
            f"positions_per_latent = {positions_per_latent} is more than the {n_positions} positions of the context: "
            f"choose at most {n_positions}"
        )


class Hard(PositionMask):
    """Each latent is open at exactly `positions_per_latent` random positions, drawn without replacement."""

    class Settings(MaskSettings):
        """Settings of independent sets of positions per latent."""

        kind: Literal["hard"] = "hard"
        positions_per_latent: int = Field(gt=0)
        contiguous: bool = False
        """Whether the positions of a latent form a window. Its middle is drawn from all positions, then it is moved
        inside the context; latents are sorted by window."""

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
    """A structured hard mask: the latents of a cohort are contiguous and share one random set of positions.

    Every position is open for the same number of cohorts.
    """

    class Settings(MaskSettings):
        """Settings of sets of positions that cohorts of latents share."""

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
            # The least used positions, ties at random: usage stays equal, and no position is drawn twice.
            order = cohorts.sum(1) + torch.rand(self.n_positions, generator=random)
            cohorts[order.topk(n_open, largest=False).indices, cohort] = 1.0
        self._fix(cohorts.repeat_interleave(self.n_bound // n_cohorts, dim=1))

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """`n_cohorts`."""
        assert isinstance(settings, cls.Settings)
        return settings.n_cohorts

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        """`n_positions` / `positions_per_latent`, because every position is open for equally many cohorts."""
        assert isinstance(settings, cls.Settings)
        return Fraction(n_positions, settings.positions_per_latent)
