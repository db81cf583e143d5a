"""PositionMask: how open each latent is at each position of the context.

Openness `M[p, j]` lies in [0, 1]: 1 lets latent j speak freely at position p, 0 closes it. With `apply = "forward"`
the mask multiplies the code, and so the gradient. With `apply = "gradient"` the code is left alone and only the
gradient that a token at p sends into latent j's own parameters is multiplied: specialised training, unrestricted
inference.

To add a kind: write one subclass of `PositionMask` with its `Settings`, and add it to `MASKS`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.seeds import generator

__all__ = ["MASKS", "LiveGroup", "MaskSettings", "PositionMask", "live_groups", "make_mask", "mask_settings"]


class MaskSettings(BaseModel):
    """What every kind of mask has in common; each kind's own `Settings` adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    apply: Literal["forward", "gradient"] = "forward"
    """Whether the mask multiplies the code (and so its gradient), or only the gradient of the latent's parameters."""


@dataclass(frozen=True)
class LiveGroup:
    """Positions at which the same latents are live, so that one dense product serves all their tokens."""

    positions: Int[Tensor, " position"]
    latents: slice | Int[Tensor, " live"]
    gated: bool
    """Whether openness differs from 1 among these latents at these positions, so that codes must be multiplied."""


class PositionMask(nn.Module):
    """How open each latent is at each position. Abstract: see the kinds below.

    Args:
        n_positions: length of the context, position 0 (BOS) included.
        d_sae: number of latents.
        seed: decides whatever the kind draws at random.
    """

    Settings: ClassVar[type[MaskSettings]]
    learns: ClassVar[bool] = False
    """Whether training should hand `learn` the gradient of the loss with respect to the openness."""
    fixed_openness: Tensor

    def __init__(self, settings: MaskSettings, n_positions: int, d_sae: int, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.n_positions = n_positions
        self.d_sae = d_sae
        self._groups: list[LiveGroup] | None = None
        self._live: Tensor | None = None
        self._start(generator(seed, f"mask {settings.kind}"))

    def _start(self, random: torch.Generator) -> None:
        """Set the openness at step 0."""
        raise NotImplementedError

    def _fix(self, openness: Float[Tensor, "position latent"]) -> None:
        self.register_buffer("fixed_openness", openness.to(torch.get_default_dtype()))

    def openness(self) -> Float[Tensor, "position latent"]:
        """M, differentiable where the kind has parameters."""
        return self.fixed_openness

    def learn(self, openness_gradient: Float[Tensor, "position latent"]) -> None:
        """Take in dL/dM of one batch (the gradient that the gate receives, or would receive if it were applied)."""

    def after_step(self, done: int, n_steps: int) -> None:
        """Called after each of `n_steps` training steps, `done` of which are behind us."""

    def bound_positions(self) -> Bool[Tensor, "position latent"] | None:
        """Where each latent was allowed to specialise; None when the mask binds no latent to a set of positions."""
        openness = self.openness().detach()
        strict = bool(((openness == 0) | (openness == 1)).all())
        return openness > 0 if strict and not bool((openness == 1).all()) else None

    def gates_code(self) -> bool:
        return self.settings.apply == "forward"

    def groups(self) -> list[LiveGroup]:
        """The live groups of the code as it is computed: all latents everywhere where the mask gates only gradients.

        Cached until the openness changes; a kind that learns its openness by gradient is dense and gated throughout.
        """
        if self._groups is None:
            openness = self.openness().detach()
            self._groups = live_groups(openness if self.gates_code() else torch.ones_like(openness))
        return self._groups

    def live(self) -> Float[Tensor, "position latent"]:
        """1 where the latent's code may be above 0, else 0. Cached like `groups`."""
        if self._live is None:
            openness = self.openness().detach()
            self._live = (openness > 0).to(openness.dtype) if self.gates_code() else torch.ones_like(openness)
        return self._live

    def _changed(self) -> None:
        self._groups = None
        self._live = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._changed()
        return super()._apply(*args, **kwargs)

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        """How many latents leave exactly `d_live` of them open at each position."""
        raise BadSetting(
            f"mask kind {settings.kind!r} has no equal-compute form (the number of latents open at a position is not "
            'the same everywhere): use budget = "width"'
        )


def live_groups(openness: Float[Tensor, "position latent"]) -> list[LiveGroup]:
    """Positions grouped by their set of live (openness > 0) latents, every position in exactly one group.

    One gated group of everything is returned instead where openness takes values between 0 and 1, and where many
    scattered latents are live, because gathering their weights would cost more than it saves.
    """
    live = openness > 0
    n_positions, d_sae = openness.shape
    everything = LiveGroup(
        torch.arange(n_positions, device=openness.device), slice(0, d_sae), gated=bool((openness != 1).any())
    )
    if bool((openness[live] != 1).any()):
        return [everything]
    sets, group_of_position = torch.unique(live, dim=0, return_inverse=True)
    groups, gathered = [], 0
    for number, members in enumerate(sets):
        latents = members.nonzero()[:, 0]
        contiguous = len(latents) > 0 and int(latents[-1] - latents[0]) + 1 == len(latents)
        block = slice(int(latents[0]), int(latents[-1]) + 1) if contiguous else latents
        gathered += 0 if contiguous else len(latents)
        groups.append(LiveGroup((group_of_position == number).nonzero()[:, 0], block, gated=False))
    if gathered > _MOST_GATHERED * len(groups) * d_sae:
        return [everything]
    return sorted(groups, key=lambda group: int(group.positions[0]))


_MOST_GATHERED = 0.25  # Share of the latents, mean over groups: above it one product of everything was faster.


class Open(PositionMask):
    """Every latent open everywhere: the baseline, equal to no mask bit for bit."""

    class Settings(MaskSettings):
        kind: Literal["open"] = "open"

    def _start(self, random: torch.Generator) -> None:
        self._fix(torch.ones(self.n_positions, self.d_sae))

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        return d_live


class Slice(PositionMask):
    """Static slicing: contiguous latent block b is open exactly on contiguous position block b."""

    class Settings(MaskSettings):
        kind: Literal["slice"] = "slice"
        n_slices: int = Field(gt=0)
        """Number of blocks; block b covers positions b*T/n .. (b+1)*T/n, rounded down, and latents likewise."""

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        n_slices = self.settings.n_slices
        if n_slices > min(self.n_positions, self.d_sae):
            raise BadSetting(
                f"n_slices = {n_slices} is more than the {self.n_positions} positions or {self.d_sae} latents it "
                "divides: choose fewer slices"
            )
        block_of_position = torch.arange(self.n_positions) * n_slices // self.n_positions
        block_of_latent = torch.arange(self.d_sae) * n_slices // self.d_sae
        self._fix((block_of_position[:, None] == block_of_latent).float())

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        assert isinstance(settings, cls.Settings)
        return settings.n_slices * d_live


def _check_positions_per_latent(positions_per_latent: int, n_positions: int) -> None:
    if positions_per_latent > n_positions:
        raise BadSetting(
            f"positions_per_latent = {positions_per_latent} is more than the {n_positions} positions of the context: "
            "choose at most that many"
        )


class Hard(PositionMask):
    """Each latent open at exactly `positions_per_latent` positions, drawn without replacement (the log's Run 1)."""

    class Settings(MaskSettings):
        kind: Literal["hard"] = "hard"
        positions_per_latent: int = Field(gt=0)

    settings: Settings

    def _start(self, random: torch.Generator) -> None:
        n_open = self.settings.positions_per_latent
        _check_positions_per_latent(n_open, self.n_positions)
        drawn = torch.rand(self.n_positions, self.d_sae, generator=random).topk(n_open, dim=0).indices
        self._fix(torch.zeros(self.n_positions, self.d_sae).scatter_(0, drawn, 1.0))


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
        if n_cohorts * n_open % self.n_positions or self.d_sae % n_cohorts:
            raise BadSetting(
                f"n_cohorts = {n_cohorts} of {n_open} positions cannot open every one of {self.n_positions} positions "
                f"for the same number of {self.d_sae} latents: n_cohorts * positions_per_latent must be a multiple of "
                "the context length, and the number of latents a multiple of n_cohorts"
            )
        cohorts = torch.zeros(self.n_positions, n_cohorts)
        for cohort in range(n_cohorts):
            # The positions used least so far, ties at random: usage stays level, and no position comes twice.
            order = cohorts.sum(1) + torch.rand(self.n_positions, generator=random)
            cohorts[order.topk(n_open, largest=False).indices, cohort] = 1.0
        self._fix(cohorts.repeat_interleave(self.d_sae // n_cohorts, dim=1))

    @classmethod
    def width_at_equal_compute(cls, settings: MaskSettings, n_positions: int, d_live: int) -> int:
        assert isinstance(settings, cls.Settings)
        if d_live * n_positions % settings.positions_per_latent:
            raise BadSetting(
                f"{d_live} live latents x {n_positions} positions is no multiple of positions_per_latent = "
                f"{settings.positions_per_latent}: choose a divisor"
            )
        return d_live * n_positions // settings.positions_per_latent


class Soft(PositionMask):
    """Learned openness sigma(theta), initial values uniform in [low, high] (the log's Runs 2 and 3).

    With `apply = "gradient"` the loss does not depend on theta, so that the openness stays as it was drawn.
    """

    class Settings(MaskSettings):
        kind: Literal["soft"] = "soft"
        low: float = Field(gt=0, lt=1)
        high: float = Field(gt=0, lt=1)

    settings: Settings
    learns = True

    def _start(self, random: torch.Generator) -> None:
        low, high = self.settings.low, self.settings.high
        if low > high:
            raise BadSetting(f"low = {low} is above high = {high}: openness starts uniform between them")
        drawn = low + (high - low) * torch.rand(self.n_positions, self.d_sae, generator=random)
        self.theta = nn.Parameter(torch.logit(drawn))

    def openness(self) -> Float[Tensor, "position latent"]:
        return torch.sigmoid(self.theta)

    def learn(self, openness_gradient: Float[Tensor, "position latent"]) -> None:
        if self.gates_code():
            self.openness().backward(openness_gradient)


class Importance(PositionMask):
    """Learned from gradients: starts open, ends strict at each latent's most important positions (the log's Run 4).

    Saliency |M * dL/dM| is summed over batches. At `n_prunings` moments, evenly spaced over the training from
    `first_pruning` to `last_pruning` (shares of its steps), each latent keeps its most salient positions; how many
    falls geometrically from all of them to `positions_per_latent`. Saliency is halved at each pruning.
    """

    class Settings(MaskSettings):
        kind: Literal["importance"] = "importance"
        positions_per_latent: int = Field(gt=0)
        n_prunings: int = Field(default=8, gt=0)
        first_pruning: float = Field(default=0.15, gt=0, lt=1)
        last_pruning: float = Field(default=0.6, gt=0, le=1)

    settings: Settings
    learns = True
    saliency: Tensor
    tie: Tensor

    def _start(self, random: torch.Generator) -> None:
        _check_positions_per_latent(self.settings.positions_per_latent, self.n_positions)
        if self.settings.first_pruning > self.settings.last_pruning:
            raise BadSetting(
                f"first_pruning = {self.settings.first_pruning} comes after last_pruning = "
                f"{self.settings.last_pruning}: give shares of the training in order"
            )
        self._fix(torch.ones(self.n_positions, self.d_sae))
        self.register_buffer("saliency", torch.zeros(self.n_positions, self.d_sae), persistent=False)
        # Decides between positions of equal saliency, which otherwise all latents would settle alike.
        self.register_buffer(
            "tie", torch.rand(self.n_positions, self.d_sae, generator=random) * 1e-12, persistent=False
        )

    def learn(self, openness_gradient: Float[Tensor, "position latent"]) -> None:
        self.saliency += (self.fixed_openness * openness_gradient).abs()

    def pruning_steps(self, n_steps: int) -> list[int]:
        settings = self.settings
        shares = torch.linspace(settings.first_pruning, settings.last_pruning, settings.n_prunings).tolist()
        return [min(n_steps, max(1, round(share * n_steps))) for share in shares]

    def after_step(self, done: int, n_steps: int) -> None:
        for number, step in enumerate(self.pruning_steps(n_steps), start=1):
            if step == done:
                shrink = self.settings.positions_per_latent / self.n_positions
                self._keep(math.ceil(self.n_positions * shrink ** (number / self.settings.n_prunings) - 1e-9))

    def _keep(self, n_open: int) -> None:
        ranked = (self.saliency + self.tie).masked_fill(self.fixed_openness == 0, -1.0)
        kept = ranked.topk(n_open, dim=0).indices
        self.fixed_openness.zero_().scatter_(0, kept, 1.0)
        self.saliency *= 0.5
        self._changed()


MASKS: dict[str, type[PositionMask]] = {
    "open": Open,
    "slice": Slice,
    "hard": Hard,
    "cohort": Cohort,
    "soft": Soft,
    "importance": Importance,
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
