"""Adaptive splitting: latents split in two where separate decoder rows reduce the error most."""

from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from posmask.errors import BadSetting
from posmask.kernels import operations
from posmask.masks.base import Copies, MaskSettings, Observed, PositionMask, moments
from posmask.masks.fixed import _blocks


class Split(PositionMask):
    """Adaptive splitting: a latent splits in two where two decoder rows explain its positions better than one.

    Training starts with `start_latents` open latents, the number that is live at each position throughout; the others
    are unborn and closed. Positions are divided into `n_windows` equal windows. For each latent and window, the
    `watch_steps` steps before a splitting sum G = z (r + z d) and C = z^2 (code z, residual r, decoder row d). Cutting
    the windows of a latent in two parts lowers the squared error by

        |G1|^2 / C1 + |G2|^2 / C2 - |G1 + G2|^2 / (C1 + C2)

    with the least-squares decoder row on each part and everything else fixed, as when a regression tree grows. The gain
    of a latent is that of its best cut. The latents with the largest gains split: an unborn latent becomes a copy,
    optimizer state included, and takes the later part; the latent keeps the earlier part. One copy is therefore live at
    any position, the cost per token stays the same, and a splitting does not change the function.
    """

    copies_latents = True

    class Settings(MaskSettings):
        """Settings of adaptive splitting."""

        kind: Literal["split"] = "split"
        start_latents: int = Field(gt=0)
        """Number of open latents at the start."""
        max_latents: int = Field(gt=0)
        """Number of latents at the end; equals the SAE's d_sae."""
        n_windows: int = Field(default=16, gt=1)
        n_splittings: int = Field(default=4, gt=0, le=64)
        """Number of splittings, evenly spaced from `first_splitting` to `last_splitting`."""
        first_splitting: float = Field(default=0.2, gt=0, le=1)
        """Share of the training steps."""
        last_splitting: float = Field(default=0.6, gt=0, le=1)
        """Share of the training steps."""
        watch_steps: int = Field(default=40, gt=0)
        """Number of steps before each splitting that its sums are taken over."""

        @model_validator(mode="after")
        def _fits(self) -> "Split.Settings":
            if self.start_latents > self.max_latents:
                raise ValueError(
                    f"start_latents = {self.start_latents} is above max_latents = {self.max_latents}: lower it"
                )
            if self.first_splitting > self.last_splitting:
                raise ValueError(
                    f"first_splitting = {self.first_splitting} comes after last_splitting = {self.last_splitting}: "
                    "swap them"
                )
            if self.gating == "gradient" or self.leak:
                raise ValueError('split needs gating = "forward" and leak = 0: unborn latents must be silent')
            return self

    settings: Settings
    _window: Tensor
    towards: Float[Tensor, "pair d_model"] | None
    """Sum of z * r for each pair of a window and a latent that is live in it; None before the first step observed."""
    squares: Float[Tensor, " pair"] | None
    """Sum of z^2 for each pair; None before the first step observed."""

    def _start(self, random: torch.Generator) -> None:
        settings = self.settings
        if settings.max_latents != self.d_sae:
            raise BadSetting(
                f"max_latents = {settings.max_latents} is not the {self.d_sae} latents of the SAE: make them equal"
            )
        if settings.n_windows > self.n_positions:
            raise BadSetting(
                f"n_windows = {settings.n_windows} is more than the {self.n_positions} positions that they divide: "
                "lower it"
            )
        if self.n_bound and settings.start_latents <= self.n_free:
            raise BadSetting(
                f"start_latents = {settings.start_latents} are all among the {self.n_free} free latents, which do not "
                "split: lower free_fraction or raise start_latents"
            )
        self._n_live = max(0, settings.start_latents - self.n_free)
        if self._n_live * 2**settings.n_splittings < self.n_bound:
            raise BadSetting(
                f"n_splittings = {settings.n_splittings} cannot make {settings.max_latents} latents of "
                f"{settings.start_latents}, because a splitting at most doubles their number: raise it"
            )
        openness = torch.zeros(self.n_positions, self.n_bound)
        openness[:, : self._n_live] = 1
        self._fix(openness)
        self.register_buffer("_window", _blocks(self.n_positions, settings.n_windows), persistent=False)
        for name in ("towards", "squares"):
            self.register_buffer(name, None, persistent=False)
        self.watches = False

    def flaw(self) -> str | None:
        """Sums must have an entry per open pair of window and latent."""
        if not torch.equal(self._window.cpu(), _blocks(self.n_positions, self.settings.n_windows)):
            return "the windows are not those of the mask"
        if self.towards is None and self.squares is None:
            return None
        n_pairs = int(self._by_window().sum())
        shapes = [None if sums is None else (sums.dim(), len(sums)) for sums in (self.towards, self.squares)]
        return None if shapes == [(2, n_pairs), (1, n_pairs)] else "the sums do not fit the mask"

    def _splitting_steps(self, n_steps: int) -> list[int]:
        settings = self.settings
        return list(moments(settings.first_splitting, settings.last_splitting, settings.n_splittings, n_steps))

    def before_step(self, done: int, n_steps: int) -> None:
        """Watch the steps before each splitting."""
        n_watched = self.settings.watch_steps
        self.watches = bool(self.n_bound) and any(
            step - n_watched <= done < step for step in self._splitting_steps(n_steps)
        )

    def _by_window(self) -> Float[Tensor, "window bound"]:
        first = torch.searchsorted(self._window, torch.arange(self.settings.n_windows, device=self._window.device))
        return self.fixed_openness[first]

    def observe(self, seen: Observed) -> None:
        """Add to the sums; pairs are sorted by window, then by latent."""
        by_window = self._by_window()
        pair_of = (by_window > 0).view(-1).cumsum(0).view_as(by_window) - 1
        if self.towards is None or self.squares is None:
            n_pairs = int(by_window.sum())
            self.towards = seen.residual.new_zeros(n_pairs, seen.residual.shape[1])
            self.squares = seen.residual.new_zeros(n_pairs)
        bound = seen.latent >= self.n_free
        token, latent, value = seen.token[bound], seen.latent[bound] - self.n_free, seen.value[bound]
        pairs = operations.Grouped(pair_of[self._window[seen.mask_row[token]], latent], len(self.squares))
        self.towards += pairs.sum_rows(value, seen.residual, token)
        self.squares += pairs.sum(value.square())

    def after_step(self, done: int, n_steps: int) -> Copies | None:
        """Split the latents with the largest gains if it is time."""
        steps = self._splitting_steps(n_steps)
        if done not in steps or self.towards is None:
            return None
        n_moments = max(number for number, step in enumerate(steps, start=1) if step == done)
        n_open = int((self.fixed_openness.amax(0) > 0).sum())
        n_wanted = self._n_live + (self.n_bound - self._n_live) * n_moments // len(steps)
        return self._split(n_wanted - n_open)

    def gains(self) -> tuple[Float[Tensor, "cut bound"], Float[Tensor, "window bound"]]:
        """The gain of each latent from a cut before window 1, 2, ..; -inf where it is not open on both sides.

        The second result is the openness by window.
        """
        assert self.towards is not None
        assert self.squares is not None
        by_window = self._by_window().cpu()
        alive = (by_window.amax(0) > 0).nonzero()[:, 0]
        window, slot = by_window[:, alive].nonzero(as_tuple=True)  # in the order of the pairs
        # G = towards + squares * decoder row. The decoder row is the same in all windows of a latent, so it cancels.
        pulled, squares = (part.cpu().double() for part in (self.towards, self.squares))  # not every device has float64
        total = pulled.new_zeros(len(alive), pulled.shape[1]).index_add_(0, slot, pulled)
        weight = pulled.new_zeros(len(alive)).index_add_(0, slot, squares)
        before, before_weight = torch.zeros_like(total), torch.zeros_like(weight)
        gains = pulled.new_full((len(by_window) - 1, self.n_bound), -torch.inf)
        ends = torch.bincount(window, minlength=len(by_window)).cumsum(0).tolist()
        for cut in range(len(gains)):
            pairs = slice(ends[cut - 1] if cut else 0, ends[cut])
            before[slot[pairs]] += pulled[pairs]
            before_weight[slot[pairs]] += squares[pairs]
            after, after_weight = total - before, weight - before_weight
            gain = _explained(before, before_weight) + _explained(after, after_weight) - _explained(total, weight)
            both = (by_window[: cut + 1, alive].amax(0) > 0) & (by_window[cut + 1 :, alive].amax(0) > 0)
            gains[cut, alive[both]] = gain[both]
        return gains, by_window

    def _split(self, n_births: int) -> Copies:
        gains, by_window = self.gains()
        best = gains.max(0)
        n_births = min(n_births, int((best.values > 0).sum()))
        parent = best.values.topk(n_births).indices
        child = (by_window.amax(0) == 0).nonzero()[:n_births, 0]
        later = torch.arange(len(by_window))[:, None] > best.indices[parent]
        by_window[:, child] = by_window[:, parent] * later
        by_window[:, parent] *= ~later
        self.fixed_openness.copy_(by_window[self._window.cpu()])
        self.towards = self.squares = None
        self._changed()
        copies = Copies(parent + self.n_free, child + self.n_free)
        self.copied_from[copies.target] = self.copied_from[copies.source]
        return copies

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        """`max_latents` / `start_latents`; splitting keeps the number of live latents per position."""
        assert isinstance(settings, cls.Settings)
        return Fraction(settings.max_latents, settings.start_latents)

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        """`max_latents`.

        Raises:
            BadSetting: `start_latents` is not `d_live`.
        """
        assert isinstance(settings, cls.Settings)
        if settings.start_latents != d_live:
            raise BadSetting(
                f"start_latents = {settings.start_latents} is not the {d_live} latents that are live at each position "
                f"at equal compute: set start_latents = {d_live}"
            )
        return settings.max_latents


def _explained(pulled: Float[Tensor, "latent d_model"], weight: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """|G|^2 / C, the squared error that the least-squares decoder row explains; 0 for a latent that never fired."""
    return pulled.square().sum(1) / weight.clamp(min=1e-30) * (weight > 0)
