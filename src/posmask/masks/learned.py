"""Masks that training changes by gradients: soft, importance."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.masks.base import MaskSettings, PositionMask, moments
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
