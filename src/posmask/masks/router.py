"""A learned router instead of positions: a mixture of experts, as a baseline."""

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
    """A baseline without positions: a learned router sends each token to one of `n_experts` blocks of latents.

    Switch SAE (arXiv 2410.08201): p(x) = softmax(W (x - b)), the expert is the argmax, and its codes are multiplied by
    its p. The load is balanced by `balance` * N * sum over experts of (share of tokens) * (mean p), a term of the loss
    that equals `balance` when all experts are used equally. At equal compute it has as many latents as `slice`, so the
    difference between the two is due to position. In the metrics its latents count as open everywhere.
    """

    class Settings(MaskSettings):
        """Settings of a learned router."""

        kind: Literal["switch"] = "switch"
        n_experts: int = Field(gt=0)
        balance: float = Field(default=3.0, ge=0)
        """Coefficient of the balancing term."""

        @model_validator(mode="after")
        def _sensible(self) -> "Switch.Settings":
            if self.gating == "gradient" or self.leak or self.position_origin != "context":
                raise ValueError('switch has no positions: leave out leak, position_origin and gating = "gradient"')
            return self

    settings: Settings
    reads_vectors = True

    def _start(self, random: torch.Generator) -> None:
        n_experts = self.settings.n_experts
        if n_experts > (self.n_bound or self.d_sae):
            raise BadSetting(
                f"n_experts = {n_experts} is more than the {self.n_bound or self.d_sae} latents that they divide: "
                "lower it"
            )
        self._fix((torch.arange(n_experts)[:, None] == _blocks(self.n_bound, n_experts)).float())

    def meet(self, d_model: int, seed: int) -> None:
        """Create the router."""
        weights = torch.randn(self.settings.n_experts, d_model, generator=generator(seed, "router"))
        self.router = nn.Parameter(weights / d_model**0.5)
        self.router_bias = nn.Parameter(torch.zeros(d_model))

    def route(self, x: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]) -> Routing:
        """The expert of each token as its row of the table, with its probability and the balancing term."""
        p = ((x - self.router_bias) @ self.router.T).softmax(-1)
        strength, expert = p.max(-1)
        mean_p = p.reshape(-1, p.shape[-1]).mean(0)  # a single token has no dimension to average over
        chosen = expert.flatten()[:, None] == torch.arange(p.shape[-1], device=p.device)
        load = chosen.sum(0) / expert.numel()
        return Routing(expert, strength, self.settings.balance * p.shape[-1] * (load * mean_p).sum())

    def openness(self) -> Float[Tensor, "position latent"]:
        """1 everywhere: the router does not depend on positions."""
        return torch.ones(self.n_positions, self.d_sae, dtype=self.fixed_openness.dtype)

    def bound_positions(self) -> Bool[Tensor, "position latent"]:
        """All True: no latent is bound to positions."""
        return torch.ones(self.n_positions, self.d_sae, dtype=torch.bool)

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """`n_experts`."""
        assert isinstance(settings, cls.Settings)
        return settings.n_experts

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction:
        """`n_experts`, because each token uses one expert's latents."""
        return Fraction(cls.n_blocks(settings, n_positions))
