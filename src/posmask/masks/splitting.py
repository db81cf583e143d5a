"""Adaptive splitting: windows of latents are halved where separate decoders gain most."""

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
    """Adaptive splitting: latents that would gain from decoders of their own on two stretches of positions split.

    Starts with `start_latents` open latents, as many as are live at each position from start to end; the others are
    closed until they are born. Positions are cut into `n_windows` equal windows. Before each of `n_splittings` moments,
    spread evenly from `first_splitting` to `last_splitting` (shares of the steps), `watch_steps` steps gather for each
    latent and window G = sum of z (r + z d) and C = sum of z^2 (code z, residual r, decoder row d). A latent whose
    windows are cut in two parts would lower the squared error by

        |G1|^2 / C1 + |G2|^2 / C2 - |G1 + G2|^2 / (C1 + C2)

    with the least-squares decoder on each part, the rest held fixed: the rule by which regression trees grow. The best
    cut of each latent counts. Those with the largest gains split: a newborn copies the latent with all that training
    knows of it, and takes the later part; the latent keeps the earlier. So one copy is live at any position, the cost
    of a token stays the same, and the function does not change at that moment.
    """

    copies_latents = True

    class Settings(MaskSettings):
        kind: Literal["split"] = "split"
        start_latents: int = Field(gt=0)
        max_latents: int = Field(gt=0)
        """Latents at the end: the SAE's d_sae."""
        n_windows: int = Field(default=16, gt=1)
        n_splittings: int = Field(default=4, gt=0, le=64)
        first_splitting: float = Field(default=0.2, gt=0, le=1)
        last_splitting: float = Field(default=0.6, gt=0, le=1)
        watch_steps: int = Field(default=40, gt=0)

        @model_validator(mode="after")
        def _fits(self) -> "Split.Settings":
            if self.start_latents > self.max_latents:
                raise ValueError(f"start_latents = {self.start_latents} is above max_latents = {self.max_latents}")
            if self.first_splitting > self.last_splitting:
                raise ValueError(
                    f"first_splitting = {self.first_splitting} comes after last_splitting = {self.last_splitting}: "
                    "give shares of the training in order"
                )
            if self.gating == "gradient" or self.leak:
                raise ValueError('split needs gating = "forward" and no leak: unborn latents must be silent')
            return self

    settings: Settings
    _window: Tensor
    towards: Float[Tensor, "pair d_model"] | None
    """The sum of z * r for each pair of a window and a latent that is live there; None until there is any."""
    squares: Float[Tensor, " pair"] | None
    """The sum of z^2."""

    def _start(self, random: torch.Generator) -> None:
        ask = self.settings
        if ask.max_latents != self.d_sae:
            raise BadSetting(
                f"max_latents = {ask.max_latents} is not the {self.d_sae} latents of the SAE: make them equal"
            )
        if ask.n_windows > self.n_positions:
            raise BadSetting(
                f"n_windows = {ask.n_windows} is more than the {self.n_positions} positions it divides: lower it"
            )
        if self.n_bound and ask.start_latents <= self.n_free:
            raise BadSetting(
                f"start_latents = {ask.start_latents} are all among the {self.n_free} free latents, so none could "
                "split: lower free_fraction or raise start_latents"
            )
        self._n_live = max(0, ask.start_latents - self.n_free)
        if self._n_live * 2**ask.n_splittings < self.n_bound:
            raise BadSetting(
                f"n_splittings = {ask.n_splittings} cannot make {ask.max_latents} latents of {ask.start_latents}, as "
                "each splits in two at most once a time: raise it"
            )
        openness = torch.zeros(self.n_positions, self.n_bound)
        openness[:, : self._n_live] = 1
        self._fix(openness)
        self.register_buffer("_window", _blocks(self.n_positions, ask.n_windows), persistent=False)
        for name in ("towards", "squares"):
            self.register_buffer(name, None, persistent=False)
        self.watches = False

    def _splitting_steps(self, n_steps: int) -> list[int]:
        ask = self.settings
        return list(moments(ask.first_splitting, ask.last_splitting, ask.n_splittings, n_steps))

    def before_step(self, done: int, n_steps: int) -> None:
        first = self.settings.watch_steps
        self.watches = bool(self.n_bound) and any(
            step - first <= done < step for step in self._splitting_steps(n_steps)
        )

    def _by_window(self) -> Float[Tensor, "window bound"]:
        first = torch.searchsorted(self._window, torch.arange(self.settings.n_windows, device=self._window.device))
        return self.fixed_openness[first]

    def observe(self, seen: Observed) -> None:
        """Gather the sums, in the order of windows and, in each, of latents."""
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
        steps = self._splitting_steps(n_steps)
        if done not in steps or self.towards is None:
            return None
        n_moments = max(number for number, step in enumerate(steps, start=1) if step == done)
        n_now = int((self.fixed_openness.amax(0) > 0).sum())
        n_then = self._n_live + (self.n_bound - self._n_live) * n_moments // len(steps)
        return self._split(n_then - n_now)

    def gains(self) -> tuple[Float[Tensor, "cut bound"], Float[Tensor, "window bound"]]:
        """What each latent would gain from a cut before windows 1, 2, ..; -inf where it is not open on both sides."""
        assert self.towards is not None
        assert self.squares is not None
        by_window = self._by_window().cpu()
        alive = (by_window.amax(0) > 0).nonzero()[:, 0]
        window, slot = by_window[:, alive].nonzero(as_tuple=True)  # in the order of the pairs
        # G = towards + squares * decoder row, whose second part is the same for all of a latent's windows and cancels.
        pulled, squares = (part.cpu().double() for part in (self.towards, self.squares))  # not every device has float64
        total = pulled.new_zeros(len(alive), pulled.shape[1]).index_add_(0, slot, pulled)
        weight = pulled.new_zeros(len(alive)).index_add_(0, slot, squares)
        before, before_weight = torch.zeros_like(total), torch.zeros_like(weight)
        gains = pulled.new_full((len(by_window) - 1, self.n_bound), -torch.inf)
        ends = torch.bincount(window, minlength=len(by_window)).cumsum(0).tolist()
        for cut in range(len(gains)):
            here = slice(ends[cut - 1] if cut else 0, ends[cut])
            before[slot[here]] += pulled[here]
            before_weight[slot[here]] += squares[here]
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
        assert isinstance(settings, cls.Settings)
        return Fraction(settings.max_latents, settings.start_latents)

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        assert isinstance(settings, cls.Settings)
        if settings.start_latents != d_live:
            raise BadSetting(
                f"start_latents = {settings.start_latents} is not the {d_live} latents that are live at each position "
                "at equal compute: make it so"
            )
        return settings.max_latents


def _explained(pulled: Float[Tensor, "latent d_model"], weight: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """|G|^2 / C: what the least-squares decoder row explains; 0 for a latent that never spoke."""
    return pulled.square().sum(1) / weight.clamp(min=1e-30) * (weight > 0)
