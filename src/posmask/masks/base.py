"""Base class of position masks: how open each latent is at each position of the context.

Openness `M[p, j]` is in [0, 1]: 1 leaves latent j unrestricted at position p, 0 closes it. With `gating = "forward"`
the mask multiplies the code, and therefore its gradient. With `gating = "gradient"` the code is unchanged and the mask
multiplies only the gradient that a token at p sends into latent j's own parameters: training is specialized, inference
is unrestricted.
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

PositionOrigin = Literal["context", "text", "sentence", "line", "end"]


class MaskSettings(BaseModel):
    """Settings that all kinds of mask share; the `Settings` of each kind adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str
    gating: Literal["forward", "gradient"] = "forward"
    """Whether the mask multiplies the code (and so its gradient), or only the gradient of the latent's parameters."""
    free_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the latents, the first ones, that stay open everywhere; the rest follow the kind. Rounded to the nearest
    number of latents that leaves blocks of equal size."""
    leak: float = Field(default=0.0, ge=0, le=1)
    """Minimum openness: M becomes M + leak * (1 - M). 0 does not change the mask, 1 opens it everywhere."""
    gradient_sharing: float = Field(default=0.0, ge=0, le=1)
    """How much the copies of one latent learn together: the gradient of each becomes (1 - gradient_sharing) times its
    gradient plus gradient_sharing times the mean over the copies. 0: independent, 1: the copies stay equal."""
    position_origin: PositionOrigin = "context"
    """Where positions are counted from: the start of the context (BOS is 0), the start of the token's text, sentence or
    line, or the end of its text in the context (the last token is 1). Larger positions count as the last position of
    the context."""


@dataclass(frozen=True)
class Routing:
    """The row of the mask's table for each token.

    Attributes:
        mask_row: row of the table, per token.
        strength: multiplies the token's codes after the activation rule; None for 1.
        penalty: a term of the training loss; None for 0.
    """

    mask_row: Int[Tensor, "*token"]
    strength: Float[Tensor, "*token"] | None = None
    penalty: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Observed:
    """The active codes and the residual of a training step, for masks that watch.

    Attributes:
        mask_row: row of the mask's table, per token.
        token, latent, value: the entries of the step's `Codes`.
        residual: x - x_hat in the SAE's units.
    """

    mask_row: Int[Tensor, " token"]
    token: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    residual: Float[Tensor, "token d_model"]


@dataclass(frozen=True)
class Copies:
    """Latents `target` that become copies of the latents `source`, optimizer state included."""

    source: Int[Tensor, " copy"]
    target: Int[Tensor, " copy"]


class PositionMask(nn.Module):
    """How open each latent is at each position. Abstract; `MASKS` lists the kinds.

    A kind defines the openness of the bound latents, those after the first `n_free`, in `_start` and `_bound_openness`.
    State that training changes is a buffer, so that checkpoints contain it; it is persistent if the trained SAE needs
    it. State that follows from the number of finished steps is set in `before_step`.

    Args:
        settings: an instance of the kind's `Settings`.
        n_positions: length of the context, including position 0 (BOS).
        d_sae: number of latents.
        seed: seed of all random choices of the kind.

    Raises:
        BadSetting: the settings do not fit the context length or the number of latents.
    """

    Settings: ClassVar[type[MaskSettings]]
    fixed_openness: Tensor
    copied_from: Int[Tensor, " latent"]
    """Latents with equal values are copies of one latent, see `gradient_sharing`."""
    learns: bool = False
    """Whether training calls `learn` with the gradient of the loss with respect to the table."""
    reads_vectors: ClassVar[bool] = False
    """Whether `route` reads the vectors (a router), not only positions."""
    watches: bool = False
    """Whether training calls `observe` with the step's codes and residual."""
    copies_latents: ClassVar[bool] = False
    """Whether `after_step` may return copies."""

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
        self.register_buffer("copied_from", torch.arange(d_sae))
        self._start(generator(seed, f"mask {settings.kind}"))

    def _start(self, random: torch.Generator) -> None:
        """Set the openness of the bound latents before training."""
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
        """Whether latents are or may become copies of each other; otherwise `gradient_sharing` has no effect."""
        return self.copies_latents or len(self.copied_from.unique()) < self.d_sae

    def part(self, latents: Int[Tensor, " selected"]) -> "PositionMask":
        """The mask of a subset of the latents, for masks with fixed openness and no free latents."""
        part = copy.deepcopy(self)
        part.d_sae = part.n_bound = len(latents)
        part.fixed_openness = self.fixed_openness[:, latents].clone()
        part.copied_from = torch.arange(len(latents))
        part._changed()
        return part

    def meet(self, d_model: int, seed: int) -> None:
        """Create what depends on the size of the vectors; the SAE calls it once, before training or loading."""

    def _fix(self, openness: Float[Tensor, "row bound"]) -> None:
        self.register_buffer("fixed_openness", openness.to(torch.get_default_dtype()))

    def _bound_openness(self) -> Float[Tensor, "row bound"]:
        """M of the bound latents before the leak, differentiable where the kind has parameters."""
        return self.fixed_openness

    def table(self) -> Float[Tensor, "row latent"]:
        """What codes are multiplied by, one row per value of `Routing.mask_row`."""
        bound = self._bound_openness()
        if self.settings.leak:
            bound = bound + self.settings.leak * (1 - bound)  # keeps an M of 1 at exactly 1
        if not self.n_free:
            return bound
        return torch.cat([bound.new_ones(len(bound), self.n_free), bound], 1)

    def openness(self) -> Float[Tensor, "position latent"]:
        """M: how open each latent is at each position."""
        return self.table()

    def route(self, x: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]) -> Routing:
        """The row of the table for each token: its position.

        Args:
            x: vectors in the SAE's units; ignored unless `reads_vectors`.
            position: position of each token, counted from the mask's `position_origin`.
        """
        return Routing(position.long())

    def learn(self, gradient: Float[Tensor, "row latent"]) -> None:
        """Process dL/dM of one batch: the gradient that the gate receives, or would receive if it were applied.

        Called only if `learns`.
        """
        self._learn(gradient[:, self.n_free :] * (1 - self.settings.leak))

    def _learn(self, gradient: Float[Tensor, "row bound"]) -> None:
        raise NotImplementedError

    def observe(self, seen: Observed) -> None:
        """Process the codes and the residual of one batch. Called only if `watches`."""
        raise NotImplementedError

    def before_step(self, done: int, n_steps: int) -> None:
        """Prepare a training step; called before each of `n_steps` steps, after `done` finished steps."""

    def after_step(self, done: int, n_steps: int) -> Copies | None:
        """Update the mask; called after each of `n_steps` steps, when `done` are finished."""

    def support(self) -> Bool[Tensor, "row latent"]:
        """Where latents are open, without the leak."""
        bound = self._bound_openness().detach() > 0
        return torch.cat([bound.new_ones(len(bound), self.n_free), bound], 1)

    def bound_positions(self) -> Bool[Tensor, "position latent"]:
        """The positions that the mask binds each latent to; all True for latents bound to no set of positions."""
        bound = self._bound_openness().detach()
        strict = bool(((bound == 0) | (bound == 1)).all())
        return self.support() if strict else torch.ones_like(self.support())

    def flaw(self) -> str | None:
        """Why tensors that were read cannot be those of this mask in training; None if they can."""
        return None

    def openness_parameters(self) -> list[nn.Parameter]:
        """Parameters that train with `mask_learning_rate`."""
        return []

    def gates_code(self) -> bool:
        """Whether the mask multiplies codes, not only gradients."""
        return self.settings.gating == "forward"

    def groups(self) -> list[LiveGroup]:
        """The live groups of the codes; all latents everywhere if the mask gates only gradients.

        Cached until the openness changes.
        """
        if self._groups is None:
            table = self.table().detach()
            self._groups = live_groups(table if self.gates_code() else torch.ones_like(table))
        return self._groups

    def is_strict(self) -> bool:
        """Whether M is 0 or 1 everywhere. Cached like `groups`."""
        if self._strict is None:
            table = self.table().detach()
            self._strict = bool(((table == 0) | (table == 1)).all())
        return self._strict

    def live(self) -> Float[Tensor, "row latent"]:
        """1 where the code of a latent may be above 0, else 0. Cached like `groups`."""
        if self._live is None:
            table = self.table().detach()
            self._live = (table > 0).to(table.dtype) if self.gates_code() else torch.ones_like(table)
        return self._live

    def _changed(self) -> None:
        self._groups = None
        self._live = None
        self._strict = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}copied_from", self.copied_from)  # Files of earlier versions lack it.
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._changed()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._changed()
        return super()._apply(*args, **kwargs)

    @classmethod
    def n_blocks(cls, settings: MaskSettings, n_positions: int) -> int:
        """Number of blocks of equal size that the kind divides its bound latents into."""
        return 1

    @classmethod
    def growth(cls, settings: MaskSettings, n_positions: int) -> Fraction | None:
        """Number of bound latents per bound latent open at a position; None if that differs between positions."""
        return None

    @classmethod
    def free_latents(cls, settings: MaskSettings, n_positions: int, d_sae: int) -> int:
        """`free_fraction` of `d_sae`, rounded to the nearest number that leaves blocks of equal size."""
        if settings.free_fraction in (0, 1):
            return d_sae * int(settings.free_fraction)
        wanted, n_blocks = settings.free_fraction * d_sae, cls.n_blocks(settings, n_positions)
        below = math.floor(wanted) - (math.floor(wanted) - d_sae) % n_blocks
        return min((n for n in (below, below + n_blocks) if 0 <= n <= d_sae), key=lambda n: abs(n - wanted))

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        """The number of latents of which exactly `d_live` are open at each position.

        With free latents: n_free + growth * (d_live - n_free), where n_free is `free_fraction` of that.

        Raises:
            BadSetting: no such number exists.
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
    """`count` training steps, evenly spaced between two shares of the training, clamped to 1 .. n_steps."""
    for share in torch.linspace(first, last, count).tolist():
        yield min(n_steps, max(1, round(share * n_steps)))
