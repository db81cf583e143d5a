"""A learned router instead of positions: a mixture of experts, as a comparison."""

from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.masks.base import MaskSettings, PositionMask, Routing
from posmask.masks.fixed import _blocks
from posmask.seeds import generator


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
            if self.gating == "gradient" or self.leak or self.position_origin != "context":
                raise ValueError('switch has no positions: leave out leak and position_origin, and gating = "forward"')
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
