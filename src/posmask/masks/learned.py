"""Masks that training changes: soft, importance, budget."""

import math
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.kernels import operations
from posmask.masks.base import MaskSettings, Observed, PositionMask, moments
from posmask.masks.fixed import _check_positions_per_latent


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
    had it: neither. Openness within 1e-6 of 0 or 1 is 0 or 1. With `gating = "gradient"` the loss does not depend on
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
    """Learned strict gates under a budget: each latent finds out whether and where to specialize.

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
        along = operations.dot_rows(seen.residual, seen.token, seen.decoder, seen.latent)
        cost = seen.value.square() + 2 * seen.value * along
        bound = seen.latent >= self.n_free
        gate = seen.mask_row[seen.token[bound]] * self.n_bound + seen.latent[bound] - self.n_free
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
