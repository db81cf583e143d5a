"""The kinds of position mask.

To add one: write one subclass of `PositionMask` with its `Settings` and `_start`, and add it to `MASKS`.
"""

import math
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from posmask import kernels
from posmask.errors import BadSetting
from posmask.masks import Copies, MaskSettings, Observed, PositionMask, Routing, moments
from posmask.seeds import generator

__all__ = ["MASKS", "make_mask", "mask_settings"]


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
        place = torch.arange(self.n_positions)[:, None]
        first = inside.int().argmax(0)
        last = first + inside.sum(0) - 1
        away = torch.maximum(first - place, place - last).clamp(min=0)
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
    any position. They start equal and count as copies of each other; with `tie` they learn mostly together.
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
        place = torch.arange(self.n_positions)
        openness = []
        for number, one in enumerate(ask.cuts):
            window = torch.searchsorted(torch.tensor(one, dtype=torch.long), place, right=True)
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

    With `contiguous` they are neighbours: a window whose middle is drawn from all positions, moved inside the context;
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
    """A structured hard mask: latents of a cohort are neighbours in memory and share one random set of positions.

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


def _temperature(done: int, n_steps: int, first: float, last: float, start: float, end: float) -> float:
    """Geometrically from `first` to `last` between two shares of the training."""
    way = min(1.0, max(0.0, (done / n_steps - start) / (end - start)))
    return first * (last / first) ** way


def _check_order(names: str, *shares: float) -> None:
    if list(shares) != sorted(shares) or shares[0] == shares[1]:
        raise ValueError(f"{names} = {', '.join(map(str, shares))} are not in order: give growing shares of training")


class Soft(PositionMask):
    """Learned openness sigma(theta / temperature), initial values uniform in [low, high] (the log's Runs 2 and 3).

    The temperature falls geometrically from 1 to `last_temperature` over a stretch of the training; from `freeze_at`
    on the openness is no longer learned. `pressure` times the mean openness is a term of the training loss. As the log
    had it: neither. Openness within 1e-6 of 0 or 1 is 0 or 1. With `apply = "gradient"` the loss does not depend on
    theta, so that only pressure moves it.
    """

    class Settings(MaskSettings):
        kind: Literal["soft"] = "soft"
        low: float = Field(gt=0, lt=1)
        high: float = Field(gt=0, lt=1)
        pressure: float = Field(default=0.0, ge=0)
        """In units of the loss, |x|^2 of which is d_model in the mean, for openness 1 against 0."""
        last_temperature: float = Field(default=1.0, gt=0, le=1)
        sharpen_from: float = Field(default=0.2, ge=0, lt=1)
        sharpen_to: float = Field(default=0.8, gt=0, le=1)
        freeze_at: float = Field(default=1.0, gt=0, le=1)
        """Shares of the training's steps."""

        @model_validator(mode="after")
        def _in_order(self) -> "Soft.Settings":
            _check_order("sharpen_from, sharpen_to", self.sharpen_from, self.sharpen_to)
            return self

    settings: Settings
    temperature: Tensor

    def _start(self, random: torch.Generator) -> None:
        low, high = self.settings.low, self.settings.high
        if low > high:
            raise BadSetting(f"low = {low} is above high = {high}: openness starts uniform between them")
        drawn = low + (high - low) * torch.rand(self.n_positions, self.n_bound, generator=random)
        self.theta = nn.Parameter(torch.logit(drawn))
        self.register_buffer("temperature", torch.ones(()))
        self.learns = True

    def _bound_openness(self) -> Float[Tensor, "position bound"]:
        openness = torch.sigmoid(self.theta / self.temperature)
        openness = torch.where(openness < 1e-6, 0.0, openness)
        return torch.where(openness > 1 - 1e-6, 1.0, openness)

    def before_step(self, done: int, n_steps: int) -> None:
        ask = self.settings
        self.temperature.fill_(_temperature(done, n_steps, 1.0, ask.last_temperature, ask.sharpen_from, ask.sharpen_to))
        self.learns = done < ask.freeze_at * n_steps
        self._changed()

    def after_step(self, done: int, n_steps: int) -> None:
        self._changed()  # theta has moved

    def openness_parameters(self) -> list[nn.Parameter]:
        return [self.theta]

    def _learn(self, gradient: Float[Tensor, "position bound"]) -> None:
        gradient = gradient if self.gates_code() else torch.zeros_like(gradient)
        self._bound_openness().backward(gradient + self.settings.pressure / max(1, gradient.numel()))


class Importance(PositionMask):
    """Learned from gradients: starts open, ends strict at each latent's most important positions (the log's Run 4).

    Saliency |M * dL/dM| is summed over batches. At `n_prunings` moments, evenly spaced over the training from
    `first_pruning` to `last_pruning` (shares of its steps), each latent keeps its most salient positions; how many
    falls geometrically from all of them to `positions_per_latent`. Saliency is halved at each pruning. At all prunings
    but the last, the share `regrow` of the kept positions, the least salient, is swapped for closed ones at random.
    """

    class Settings(MaskSettings):
        kind: Literal["importance"] = "importance"
        positions_per_latent: int = Field(gt=0)
        n_prunings: int = Field(default=8, gt=0)
        first_pruning: float = Field(default=0.15, gt=0, lt=1)
        last_pruning: float = Field(default=0.6, gt=0, le=1)
        regrow: float = Field(default=0.0, ge=0, lt=1)

    settings: Settings
    saliency: Tensor
    tie: Tensor

    def _start(self, random: torch.Generator) -> None:
        _check_positions_per_latent(self.settings.positions_per_latent, self.n_positions)
        if self.settings.first_pruning > self.settings.last_pruning:
            raise BadSetting(
                f"first_pruning = {self.settings.first_pruning} comes after last_pruning = "
                f"{self.settings.last_pruning}: give shares of the training in order"
            )
        self._fix(torch.ones(self.n_positions, self.n_bound))
        self.register_buffer("saliency", torch.zeros(self.n_positions, self.n_bound), persistent=False)
        # Decides between positions of equal saliency, which otherwise all latents would settle alike, and regrowth.
        self.register_buffer("tie", torch.rand(self.n_positions, self.n_bound, generator=random), persistent=False)
        self.learns = True

    def _learn(self, gradient: Float[Tensor, "position bound"]) -> None:
        self.saliency += (self.fixed_openness * gradient).abs()

    def pruning_steps(self, n_steps: int) -> list[int]:
        ask = self.settings
        return list(moments(ask.first_pruning, ask.last_pruning, ask.n_prunings, n_steps))

    def before_step(self, done: int, n_steps: int) -> None:
        self.learns = done < self.pruning_steps(n_steps)[-1]

    def after_step(self, done: int, n_steps: int) -> None:
        n_prunings = self.settings.n_prunings
        for number, step in enumerate(self.pruning_steps(n_steps), start=1):
            if step == done:
                shrink = self.settings.positions_per_latent / self.n_positions
                n_open = math.ceil(self.n_positions * shrink ** (number / n_prunings) - 1e-9)
                n_new = int(self.settings.regrow * n_open) if number < n_prunings else 0
                self._keep(n_open - n_new, n_new)

    def _keep(self, n_open: int, n_new: int = 0) -> None:
        ranked = (self.saliency + 1e-12 * self.tie).masked_fill(self.fixed_openness == 0, -1.0)
        kept = ranked.topk(n_open, dim=0).indices
        now = torch.zeros_like(self.fixed_openness).scatter_(0, kept, 1.0)
        closed = self.tie.masked_fill(now > 0, -1.0)
        self.fixed_openness.copy_(now.scatter_(0, closed.topk(n_new, dim=0).indices, 1.0))
        self.saliency *= 0.5
        self.tie.copy_(self.tie.roll(1, dims=0))  # other positions regrow next time
        self._changed()


class Budget(PositionMask):
    """Learned strict gates under a budget: each latent finds out whether and where to specialise.

    At each position the same number of bound latents ends open, the share `mean_openness` of them; a latent may be
    open everywhere, at a few positions or at none. The score of a gate is what closing it would cost there: the sum
    over its tokens of |r + z d|^2 - |r|^2 = z^2 |d|^2 + 2 z r.d (residual r, code z, decoder row d), which is the exact
    rise of the error with the rest held fixed, as a running mean over some `memory_steps` steps. Gates are

        M[p, j] = sigma((log score[p, j] - shift[p]) / temperature),

    shift[p] such that their mean at p is the budget of the moment. From `sharpen_from` to `sharpen_to` (shares of the
    steps) that budget falls geometrically from 1 to `mean_openness` and the temperature to `last_temperature`; then
    each position keeps its best gates, at openness 1, and the rest is closed.
    """

    class Settings(MaskSettings):
        kind: Literal["budget"] = "budget"
        mean_openness: float = Field(gt=0, le=1)
        first_temperature: float = Field(default=1.0, gt=0)
        last_temperature: float = Field(default=0.05, gt=0)
        sharpen_from: float = Field(default=0.1, ge=0, lt=1)
        sharpen_to: float = Field(default=0.6, gt=0, le=1)
        memory_steps: int = Field(default=50, gt=0)

        @model_validator(mode="after")
        def _in_order(self) -> "Budget.Settings":
            _check_order("sharpen_from, sharpen_to", self.sharpen_from, self.sharpen_to)
            return self

    settings: Settings
    score: Tensor

    def _start(self, random: torch.Generator) -> None:
        self._n_kept = round(self.settings.mean_openness * self.n_bound)
        if self.n_bound and not self._n_kept:
            raise BadSetting(
                f"mean_openness = {self.settings.mean_openness} of {self.n_bound} latents would leave a position with "
                "no open latent: raise it, or the number of latents"
            )
        self._fix(torch.ones(self.n_positions, self.n_bound))
        # Ties between gates that never acted are broken at random.
        score = 1e-12 * (1 + torch.rand(self.n_positions, self.n_bound, generator=random))
        self.register_buffer("score", score, persistent=False)
        self.watches = True

    def observe(self, seen: Observed) -> None:
        along = kernels.dot_rows(seen.residual, seen.token, seen.decoder, seen.latent)
        cost = seen.value.square() + 2 * seen.value * along
        bound = seen.latent >= self.n_free
        gate = seen.place[seen.token[bound]] * self.n_bound + seen.latent[bound] - self.n_free
        fresh = torch.zeros_like(self.score)
        fresh.view(-1).index_add_(0, gate, cost[bound])
        self.score.lerp_(fresh, 1 / self.settings.memory_steps)

    def before_step(self, done: int, n_steps: int) -> None:
        self.watches = done < self.settings.sharpen_to * n_steps

    def after_step(self, done: int, n_steps: int) -> None:
        ask = self.settings
        if done < ask.sharpen_from * n_steps or not self.watches or not self.n_bound:
            return
        if done >= ask.sharpen_to * n_steps:
            self.watches = False
            kept = self.score.topk(self._n_kept, dim=1).indices
            self.fixed_openness.zero_().scatter_(1, kept, 1.0)
        else:
            when = done, n_steps
            budget = _temperature(*when, 1.0, ask.mean_openness, ask.sharpen_from, ask.sharpen_to)
            warmth = _temperature(*when, ask.first_temperature, ask.last_temperature, ask.sharpen_from, ask.sharpen_to)
            self.fixed_openness.copy_(_with_mean(self.score.clamp(min=1e-12).log() / warmth, min(budget, 0.999)))
        self._changed()

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        assert isinstance(settings, cls.Settings)
        return 1 / Fraction(settings.mean_openness).limit_denominator(10**6)


def _with_mean(logit: Float[Tensor, "row gate"], mean: float) -> Float[Tensor, "row gate"]:
    """sigma(logit - shift), each row's shift such that its mean is `mean`; found by halving the interval."""
    low, high = logit.amin(1, keepdim=True) - 20, logit.amax(1, keepdim=True) + 20
    for _ in range(40):
        middle = (low + high) / 2
        too_open = torch.sigmoid(logit - middle).mean(1, keepdim=True) > mean
        low, high = torch.where(too_open, middle, low), torch.where(too_open, high, middle)
    return torch.sigmoid(logit - (low + high) / 2)


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
            if self.apply == "gradient" or self.leak:
                raise ValueError('split needs apply = "forward" and no leak: unborn latents must be silent')
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
        pairs = kernels.Grouped(pair_of[self._window[seen.place[token]], latent], len(self.squares))
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


class Switch(PositionMask):
    """A rival without positions: a learned router sends each token to one of `n_experts` blocks of latents.

    Switch SAE (arXiv 2410.08201): p(x) = softmax(W (x - b)), the expert is the argmax, and its codes are multiplied by
    its p. The load is balanced by `balance` * N * sum over experts of (share of tokens) * (mean p), a term of the loss
    that is `balance` when all experts are used alike. Under equal compute it has as many latents as `slice`, so what it
    lacks of slice's gain is owed to position. To the metrics its latents are open everywhere.
    """

    class Settings(MaskSettings):
        kind: Literal["switch"] = "switch"
        n_experts: int = Field(gt=0)
        balance: float = Field(default=3.0, ge=0)

        @model_validator(mode="after")
        def _sensible(self) -> "Switch.Settings":
            if self.apply == "gradient" or self.leak or self.coordinate != "context":
                raise ValueError('switch has no positions: leave out leak and coordinate, and apply = "forward"')
            return self

    settings: Settings
    reads_vectors = True

    def _start(self, random: torch.Generator) -> None:
        n_experts = self.settings.n_experts
        if n_experts > (self.n_bound or self.d_sae):
            raise BadSetting(
                f"n_experts = {n_experts} is more than the {self.n_bound or self.d_sae} latents it divides: lower it"
            )
        self._fix((torch.arange(n_experts)[:, None] == _blocks(self.n_bound, n_experts)).float())

    def meet(self, d_model: int, seed: int) -> None:
        random = torch.randn(self.settings.n_experts, d_model, generator=generator(seed, "router"))
        self.router = nn.Parameter(random / d_model**0.5)
        self.router_bias = nn.Parameter(torch.zeros(d_model))

    def route(self, x: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]) -> Routing:
        p = ((x - self.router_bias) @ self.router.T).softmax(-1)
        strength, expert = p.max(-1)
        each = p.reshape(-1, p.shape[-1]).mean(0)  # one token alone, too
        used = torch.bincount(expert.flatten(), minlength=p.shape[-1]) / expert.numel()
        return Routing(expert, strength, self.settings.balance * p.shape[-1] * (used * each).sum())

    def openness(self) -> Float[Tensor, "position latent"]:
        return torch.ones(self.n_positions, self.d_sae, dtype=self.fixed_openness.dtype)

    def bound_positions(self) -> Bool[Tensor, "position latent"]:
        return torch.ones(self.n_positions, self.d_sae, dtype=torch.bool)

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        assert isinstance(settings, cls.Settings)
        return settings.n_experts

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        return Fraction(cls.n_blocks(settings, n_positions))


MASKS: dict[str, type[PositionMask]] = {
    "open": Open,
    "slice": Slice,
    "hard": Hard,
    "cohort": Cohort,
    "band": Band,
    "soft": Soft,
    "importance": Importance,
    "budget": Budget,
    "split": Split,
    "switch": Switch,
    "windows": Windows,
}


def mask_settings(values: dict[str, Any]) -> MaskSettings:
    """Settings of the kind that `values["kind"]` names, checked.

    >>> mask_settings({"kind": "slice", "n_slices": 8}).apply
    'forward'
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in MASKS:
        raise BadSetting(f"mask kind {kind!r} is unknown: choose one of {', '.join(MASKS)}")
    return MASKS[kind].Settings(**values)


def make_mask(settings: MaskSettings, n_positions: int, d_sae: int, seed: int = 0) -> PositionMask:
    """A mask of the kind that its settings name.

    Raises:
        BadSetting: the settings do not fit the context length or the number of latents.
    """
    return MASKS[settings.kind](settings, n_positions, d_sae, seed)
