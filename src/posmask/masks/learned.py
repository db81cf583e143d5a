"""Masks that learn from the gradient of the loss with respect to the openness: soft, importance."""

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
    """Geometric interpolation from `first` to `last` between two shares of the training."""
    fraction = min(1.0, max(0.0, (done / n_steps - start) / (end - start)))
    return first * (last / first) ** fraction


def _check_order(names: str, *shares: float) -> None:
    if list(shares) != sorted(shares) or shares[0] == shares[1]:
        raise ValueError(f"{names} = {', '.join(map(str, shares))} are not in order: give growing shares of training")


class Soft(PositionMask):
    """Learned openness sigma(theta / temperature), with initial values uniform in [low, high].

    Openness within 1e-6 of 0 or 1 is 0 or 1. With `gating = "gradient"` the loss does not depend on theta, so only
    `pressure` changes it.
    """

    class Settings(MaskSettings):
        """Settings of learned openness."""

        kind: Literal["soft"] = "soft"
        low: float = Field(gt=0, lt=1)
        high: float = Field(gt=0, lt=1)
        pressure: float = Field(default=0.0, ge=0)
        """Coefficient of the mean openness in the training loss, in which the mean of |x|^2 is d_model."""
        last_temperature: float = Field(default=1.0, gt=0, le=1)
        """The temperature falls geometrically from 1 to this between `sharpen_from` and `sharpen_to`."""
        sharpen_from: float = Field(default=0.2, ge=0, lt=1)
        """Share of the training steps."""
        sharpen_to: float = Field(default=0.8, gt=0, le=1)
        """Share of the training steps."""
        freeze_at: float = Field(default=1.0, gt=0, le=1)
        """Share of the training steps after which the openness is not learned."""

        @model_validator(mode="after")
        def _in_order(self) -> "Soft.Settings":
            _check_order("sharpen_from, sharpen_to", self.sharpen_from, self.sharpen_to)
            return self

    settings: Settings
    temperature: Tensor

    def _start(self, random: torch.Generator) -> None:
        low, high = self.settings.low, self.settings.high
        if low > high:
            raise BadSetting(
                f"low = {low} is above high = {high}: initial openness is uniform between them, so swap them"
            )
        drawn = low + (high - low) * torch.rand(self.n_positions, self.n_bound, generator=random)
        self.theta = nn.Parameter(torch.logit(drawn))
        self.register_buffer("temperature", torch.ones(()))
        self.learns = True

    def _bound_openness(self) -> Float[Tensor, "position bound"]:
        openness = torch.sigmoid(self.theta / self.temperature)
        openness = torch.where(openness < 1e-6, 0.0, openness)
        return torch.where(openness > 1 - 1e-6, 1.0, openness)

    def before_step(self, done: int, n_steps: int) -> None:
        """Set the temperature, and stop learning at `freeze_at`."""
        settings = self.settings
        temperature = _temperature(
            done, n_steps, 1.0, settings.last_temperature, settings.sharpen_from, settings.sharpen_to
        )
        self.temperature.fill_(temperature)
        self.learns = done < settings.freeze_at * n_steps
        self._changed()

    def after_step(self, done: int, n_steps: int) -> None:
        """Drop what is cached, because the optimizer has changed theta."""
        self._changed()

    def openness_parameters(self) -> list[nn.Parameter]:
        """theta, the logits of the openness before the temperature divides them."""
        return [self.theta]

    def _learn(self, gradient: Float[Tensor, "position bound"]) -> None:
        gradient = gradient if self.gates_code() else torch.zeros_like(gradient)
        self._bound_openness().backward(gradient + self.settings.pressure / max(1, gradient.numel()))


class Importance(PositionMask):
    """Learned from gradients: starts open and ends strict at the most important positions of each latent.

    Saliency |M * dL/dM| is summed over batches and halved at each pruning. At a pruning each latent keeps its most
    salient positions; their number falls geometrically from all positions to `positions_per_latent`.
    """

    class Settings(MaskSettings):
        """Settings of pruning by saliency."""

        kind: Literal["importance"] = "importance"
        positions_per_latent: int = Field(gt=0)
        n_prunings: int = Field(default=8, gt=0)
        """Number of prunings, evenly spaced from `first_pruning` to `last_pruning`."""
        first_pruning: float = Field(default=0.15, gt=0, lt=1)
        """Share of the training steps."""
        last_pruning: float = Field(default=0.6, gt=0, le=1)
        """Share of the training steps."""
        regrow: float = Field(default=0.0, ge=0, lt=1)
        """At all prunings but the last, this share of the kept positions, the least salient, is replaced by random
        closed positions."""

    settings: Settings
    saliency: Tensor
    tie: Tensor

    def _start(self, random: torch.Generator) -> None:
        _check_positions_per_latent(self.settings.positions_per_latent, self.n_positions)
        if self.settings.first_pruning > self.settings.last_pruning:
            raise BadSetting(
                f"first_pruning = {self.settings.first_pruning} comes after last_pruning = "
                f"{self.settings.last_pruning}: swap them"
            )
        self._fix(torch.ones(self.n_positions, self.n_bound))
        self.register_buffer("saliency", torch.zeros(self.n_positions, self.n_bound), persistent=False)
        # Breaks ties in saliency, which all latents would otherwise break alike, and draws what regrows.
        self.register_buffer("tie", torch.rand(self.n_positions, self.n_bound, generator=random), persistent=False)
        self.learns = True

    def _learn(self, gradient: Float[Tensor, "position bound"]) -> None:
        self.saliency += (self.fixed_openness * gradient).abs()

    def pruning_steps(self, n_steps: int) -> list[int]:
        """The steps after which the mask is pruned."""
        settings = self.settings
        return list(moments(settings.first_pruning, settings.last_pruning, settings.n_prunings, n_steps))

    def before_step(self, done: int, n_steps: int) -> None:
        """Stop learning after the last pruning."""
        self.learns = done < self.pruning_steps(n_steps)[-1]

    def after_step(self, done: int, n_steps: int) -> None:
        """Prune if it is time."""
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
        openness = torch.zeros_like(self.fixed_openness).scatter_(0, kept, 1.0)
        closed = self.tie.masked_fill(openness > 0, -1.0)
        self.fixed_openness.copy_(openness.scatter_(0, closed.topk(n_new, dim=0).indices, 1.0))
        self.saliency *= 0.5
        self.tie.copy_(self.tie.roll(1, dims=0))  # so that other positions regrow next time
        self._changed()
