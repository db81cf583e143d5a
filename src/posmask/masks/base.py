"""PositionMask: how open each latent is at each position of the context. The kinds are in `mask_kinds.py`.

Openness `M[p, j]` lies in [0, 1]: 1 lets latent j speak freely at position p, 0 closes it. With `gating = "forward"`
the mask multiplies the code, and so the gradient. With `gating = "gradient"` the code is left alone and only the
gradient that a token at p sends into latent j's own parameters is multiplied: specialized training, unrestricted
inference.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.masks.groups import LiveGroup, live_groups
from posmask.seeds import generator

__all__ = ["Copies", "MaskSettings", "Observed", "PositionMask", "PositionOrigin", "Routing", "moments"]

PositionOrigin = Literal["context", "sentence", "line", "end"]


class MaskSettings(BaseModel):
    """What every kind of mask has in common; each kind's own `Settings` adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str
    gating: Literal["forward", "gradient"] = "forward"
    """Whether the mask multiplies the code (and so its gradient), or only the gradient of the latent's parameters."""
    free_fraction: float = Field(default=0.0, ge=0, le=1)
    """The share of all latents, the first ones, that stay open everywhere; the rest follow the kind. Taken to the
    nearest number that leaves the kind equal blocks."""
    leak: float = Field(default=0.0, ge=0, le=1)
    """The least openness: M becomes M + leak * (1 - M). 0 leaves a mask as strict as it is, 1 opens it everywhere."""
    gradient_sharing: float = Field(default=0.0, ge=0, le=1)
    """How much a latent learns together with the other copies of the latent that it was copied from: its gradient
    becomes (1 - tie) times its own plus tie times the mean over the copies. 0: each by itself, 1: they stay equal."""
    position_origin: PositionOrigin = "context"
    """From where positions are counted: the context's start (BOS is 0), the start of the token's sentence or line, or
    the end of its text (the last token is 1). Beyond the context's length the last position stands for all."""


@dataclass(frozen=True)
class Routing:
    """Which row of the mask's table each token takes.

    `strength` multiplies the token's codes after the activation rule; `penalty` is a term of the training loss.
    """

    mask_row: Int[Tensor, "*token"]
    strength: Float[Tensor, "*token"] | None = None
    penalty: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Observed:
    """What a step of training shows to masks that watch: the active codes and what was left to explain.

    `residual` is x - x_hat in the SAE's units; entries are those of `Codes`.
    """

    mask_row: Int[Tensor, " token"]
    token: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    residual: Float[Tensor, "token d_model"]


@dataclass(frozen=True)
class Copies:
    """Latents that a mask wants to become copies of others, with all that training knows of them."""

    source: Int[Tensor, " copy"]
    target: Int[Tensor, " copy"]


class PositionMask(nn.Module):
    """How open each latent is at each position. Abstract: the kinds are in `mask_kinds.py`.

    A kind decides over the bound latents, those after the first `n_free`, in `_start` and `_bound_openness`. Whatever
    its training changes from step to step is a buffer, so that checkpoints hold it: persistent where the trained SAE
    needs it too, else not. What follows from the number of steps done is set in `before_step`.

    Args:
        n_positions: length of the context, position 0 (BOS) included.
        d_sae: number of latents.
        seed: decides whatever the kind draws at random.
    """

    Settings: ClassVar[type[MaskSettings]]
    fixed_openness: Tensor
    copied_from: Int[Tensor, " latent"]
    """Latents with the same number here are copies of one latent, see `gradient_sharing`."""
    learns: bool = False
    """Whether training should hand `learn` the gradient of the loss with respect to the table."""
    reads_vectors: ClassVar[bool] = False
    """Whether `route` looks at the vectors, and not at positions alone."""
    watches: bool = False
    """Whether training should show `observe` the step's codes and residual."""
    copies_latents: ClassVar[bool] = False
    """Whether `after_step` may ask for latents to become copies of others."""

    def __init__(self, settings: MaskSettings, n_positions: int, d_sae: int, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.n_positions = n_positions
        self.d_sae = d_sae
        self.n_free = self.free_latents(settings, n_positions, d_sae)
        self.n_bound = d_sae - self.n_free
        self._groups: list[LiveGroup] | None = None
        self._live: Tensor | None = None
        self._strict: bool | None = None
        self.register_buffer("copied_from", torch.arange(d_sae), persistent=False)
        self._start(generator(seed, f"mask {settings.kind}"))

    def _start(self, random: torch.Generator) -> None:
        """Set the bound latents' openness at step 0."""
        raise NotImplementedError

    @property
    def changes_in_training(self) -> bool:
        """Whether further training steps may change the openness."""
        return self.learns or self.watches or self.copies_latents

    def is_open(self) -> bool:
        """Whether every latent is fully open everywhere."""
        return bool((self.table() == 1).all())

    def lifting_matters(self) -> bool:
        """Whether codes without the mask may differ from those with it."""
        return self.gates_code() and not self.is_open()

    def may_have_copies(self) -> bool:
        """Whether latents are copies of each other, or may become so; else `gradient_sharing` has no effect."""
        return self.copies_latents or len(self.copied_from.unique()) < self.d_sae

    def part(self, latents: Int[Tensor, " some"]) -> "PositionMask":
        """The same mask for some of its latents. Of a mask whose openness is fixed, without free latents."""
        part = copy.deepcopy(self)
        part.d_sae = part.n_bound = len(latents)
        part.fixed_openness = self.fixed_openness[:, latents].clone()
        part.copied_from = torch.arange(len(latents))
        part._changed()
        return part

    def meet(self, d_model: int, seed: int) -> None:
        """Called once by the SAE that the mask belongs to, before training or loading."""

    def _fix(self, openness: Float[Tensor, "place bound"]) -> None:
        self.register_buffer("fixed_openness", openness.to(torch.get_default_dtype()))

    def _bound_openness(self) -> Float[Tensor, "place bound"]:
        """M of the bound latents before the leak, differentiable where the kind has parameters."""
        return self.fixed_openness

    def table(self) -> Float[Tensor, "place latent"]:
        """What codes are multiplied by, a row for each place that `route` may send a token to."""
        bound = self._bound_openness()
        if self.settings.leak:
            bound = bound + self.settings.leak * (1 - bound)  # Where M is 1 it stays exactly 1.
        if not self.n_free:
            return bound
        return torch.cat([bound.new_ones(len(bound), self.n_free), bound], 1)

    def openness(self) -> Float[Tensor, "position latent"]:
        """M: how open each latent is at each position."""
        return self.table()

    def route(self, x: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]) -> Routing:
        """Each token's row of the table: its position.

        Args:
            x: in the SAE's units; anything where `reads_vectors` is False.
        """
        return Routing(position.long())

    def learn(self, gradient: Float[Tensor, "place latent"]) -> None:
        """Take in dL/dM of one batch (what the gate receives, or would receive if it were applied)."""
        self._learn(gradient[:, self.n_free :] * (1 - self.settings.leak))

    def _learn(self, gradient: Float[Tensor, "place bound"]) -> None:
        raise NotImplementedError

    def observe(self, seen: Observed) -> None:
        """Take in one batch's codes and residual."""
        raise NotImplementedError

    def before_step(self, done: int, n_steps: int) -> None:
        """Called before each of `n_steps` training steps, `done` of which are behind us."""

    def after_step(self, done: int, n_steps: int) -> Copies | None:
        """Called after each of `n_steps` training steps, `done` of which are behind us."""

    def support(self) -> Bool[Tensor, "place latent"]:
        """Where latents may speak, leaks aside."""
        own = self._bound_openness().detach() > 0
        return torch.cat([own.new_ones(len(own), self.n_free), own], 1)

    def bound_positions(self) -> Bool[Tensor, "position latent"]:
        """Where each latent was allowed to specialize; all True for latents that the mask binds to no set."""
        own = self._bound_openness().detach()
        strict = bool(((own == 0) | (own == 1)).all())
        return self.support() if strict else torch.ones_like(self.support())

    def openness_parameters(self) -> list[nn.Parameter]:
        """Parameters that training gives a learning rate of their own."""
        return []

    def gates_code(self) -> bool:
        return self.settings.gating == "forward"

    def groups(self) -> list[LiveGroup]:
        """The live groups of the code as it is computed: all latents everywhere where the mask gates only gradients.

        Cached until the openness changes.
        """
        if self._groups is None:
            table = self.table().detach()
            self._groups = live_groups(table if self.gates_code() else torch.ones_like(table))
        return self._groups

    def is_strict(self) -> bool:
        """Whether M is 0 or 1 everywhere, so that a latent that may speak is not softened. Cached like `groups`."""
        if self._strict is None:
            table = self.table().detach()
            self._strict = bool(((table == 0) | (table == 1)).all())
        return self._strict

    def live(self) -> Float[Tensor, "place latent"]:
        """1 where the latent's code may be above 0, else 0. Cached like `groups`."""
        if self._live is None:
            table = self.table().detach()
            self._live = (table > 0).to(table.dtype) if self.gates_code() else torch.ones_like(table)
        return self._live

    def _changed(self) -> None:
        self._groups = None
        self._live = None
        self._strict = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._changed()
        return super()._apply(*args, **kwargs)

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """How many blocks of equal size the kind makes of its bound latents."""
        return 1

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction | None:
        """Bound latents for each one that is open at any position; None where that differs between positions."""
        return None

    @classmethod
    def free_latents(cls, settings: MaskSettings, n_positions: int, d_sae: int) -> int:
        """`free_fraction` of `d_sae`, to the nearest number that leaves blocks of equal size."""
        if settings.free_fraction in (0, 1):
            return d_sae * int(settings.free_fraction)
        wanted, n_blocks = settings.free_fraction * d_sae, cls.n_blocks(settings, n_positions)
        below = math.floor(wanted) - (math.floor(wanted) - d_sae) % n_blocks
        return min((n for n in (below, below + n_blocks) if 0 <= n <= d_sae), key=lambda n: abs(n - wanted))

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        """How many latents leave exactly `d_live` of them open at each position.

        With free latents: n_free + growth * (d_live - n_free), n_free being `free_fraction` of that.

        Raises:
            BadSetting: there is no such number.
        """
        growth = cls.growth(settings, n_positions)
        if growth is None:
            raise BadSetting(
                f"mask kind {settings.kind!r} has no equal-compute form (the number of latents open at a position is "
                'not the same everywhere): use budget = "width"'
            )
        fraction = Fraction(settings.free_fraction)
        exact = fraction * growth * d_live / (1 + fraction * (growth - 1))
        for n_free in sorted(range(d_live + 1), key=lambda n: abs(n - exact)) if fraction else [0]:
            width = n_free + growth * (d_live - n_free)
            if width.denominator == 1 and cls.free_latents(settings, n_positions, int(width)) == n_free:
                return int(width)
        raise BadSetting(
            f"no number of latents leaves exactly {d_live} open at each position under {settings.model_dump()}: "
            f"{d_live} latents times {growth} must be a whole number"
        )


def moments(first: float, last: float, count: int, n_steps: int) -> Iterator[int]:
    """`count` steps of a training, evenly spaced between two shares of it; at least 1, at most the last."""
    for share in torch.linspace(first, last, count).tolist():
        yield min(n_steps, max(1, round(share * n_steps)))
