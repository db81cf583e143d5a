"""Activation rules: how gated pre-activations become codes, and what a rule adds to the training loss.

With pre = (x - decoder_bias) . encoder[j] + encoder_bias[j], and M the openness at the token's position:

    relu        code = M relu(pre)                                              + l1_coefficient sum_j code
    topk        the k largest M relu(pre) of each token
    batchtopk   the k B largest M relu(pre) of a batch of B tokens; at inference all above a fixed threshold
    matryoshka  topk or batchtopk whose nested parts must reconstruct the vector too
    jumprelu    code = M relu(pre) where that is above the latent's threshold   + l0_coefficient (active codes)
    gated       code = M relu(e^r pre + m) where pre > 0                        + l1_coefficient sum_j M relu(pre), and
                                                                                  those must reconstruct the vector too

The gate acts before a rule selects, so a closed latent never takes one of the k places.

To add a rule: write one subclass of `ActivationRule` with its `Settings`, and add it to `RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.autograd import Function

from posmask.errors import BadSetting
from posmask.sae.selection import Above, Choice, LargestOfBatch, LargestOfToken

__all__ = ["RULES", "ActivationRule", "Coded", "RuleSettings", "Take", "TopK", "make_rule", "rule_settings"]

Take = Callable[[Tensor], Tensor]
"""Takes a parameter of all latents, [latent], to those of the columns at hand, [token live] or [live]."""


class RuleSettings(BaseModel):
    """What decides a rule; each rule's own `Settings` adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    only_for_training: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not decide what codes a trained SAE has."""

    kind: str

    def of_codes(self) -> dict[str, Any]:
        """What decides the codes of a trained SAE, beside its parameters."""
        return self.model_dump(exclude=set(self.only_for_training))


@dataclass(frozen=True)
class Coded:
    """Codes of some tokens as training sees them.

    `penalty` is the rule's own term of the loss, summed over the tokens. `through_gate` are codes that must
    reconstruct the vectors too, through a decoder taken as constant.
    """

    codes: Float[Tensor, "token live"]
    penalty: Float[Tensor, ""] | None = None
    through_gate: Float[Tensor, "token live"] | None = None


class ActivationRule(nn.Module):
    """How gated pre-activations become codes. Abstract: see the rules below.

    Functions get some tokens and the live latents at them: `preactivation` before relu, their `openness`, None for 1
    everywhere, and `take` for the rule's own parameters.

    Args:
        d_sae: number of latents; tensors that hold something for each have it as their first dimension.
    """

    Settings: ClassVar[type[RuleSettings]]
    revives: ClassVar[bool] = False
    """Whether dead latents are revived by an auxiliary loss of their own."""
    compares_latents: ClassVar[bool] = False
    """Whether latents' values are held against one another, so that all of them must be on one scale."""
    level: Tensor | None
    """For rules with nested parts, the first part that each latent belongs to, [latent]."""

    def __init__(self, settings: RuleSettings, d_sae: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("level", None)

    def nest(self, support: Bool[Tensor, "place latent"], n_free: int) -> None:
        """Called once with where latents may speak, for rules that divide them into parts."""

    def codes(
        self,
        preactivation: Float[Tensor, "*token live"],
        openness: Float[Tensor, "*token live"] | None,
        take: Take,
    ) -> Float[Tensor, "*token live"]:
        """The codes at inference, each token by itself."""
        raise NotImplementedError

    def training_codes(
        self, preactivation: Float[Tensor, "token live"], openness: Float[Tensor, "token live"] | None, take: Take
    ) -> Coded:
        """The codes in training, differentiable."""
        return Coded(self.codes(preactivation, openness, take))

    def rescale_(self, factor: Float[Tensor, " latent"]) -> None:
        """Make codes `factor` times as large, given pre-activations `factor` times as large.

        Args:
            factor: the same for all latents where the rule compares them.
        """

    def choice(self) -> Choice | None:
        """How `codes` can be had by choosing among gated pre-activations; None where that does not give them."""

    def training_choice(self) -> Choice | None:
        """The same of `training_codes`, where few codes are active from the start; else None."""

    def before_step(self, done: int, n_steps: int) -> None:
        """Called before each of `n_steps` training steps, `done` of which are behind us."""

    def after_step(self, least: float) -> None:
        """Called after each step with its least active code, 0 where `training_choice` is None."""


def gated(preactivation: Tensor, openness: Tensor | None) -> Tensor:
    return preactivation.relu() if openness is None else preactivation.relu() * openness


class _Penalized(RuleSettings):
    only_for_training = frozenset(
        {"penalty_warmup_fraction", "l1_coefficient", "l0_coefficient", "bandwidth", "initial_threshold"}
    )
    penalty_warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """The penalty rises linearly from 0 over this share of the steps."""


class _WithPenalty(ActivationRule):
    settings: _Penalized

    def __init__(self, settings: _Penalized, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self._warmth = 1.0

    def before_step(self, done: int, n_steps: int) -> None:
        rising = self.settings.penalty_warmup_fraction * n_steps
        self._warmth = min(1.0, (done + 1) / rising) if rising else 1.0


class ReLU(_WithPenalty):
    """All positive pre-activations; an L1 penalty keeps them few (Bricken et al. 2023)."""

    class Settings(_Penalized):
        kind: Literal["relu"] = "relu"
        l1_coefficient: float = Field(ge=0)

    settings: Settings

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        return gated(preactivation, openness)

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        codes = gated(preactivation, openness)
        return Coded(codes, self._warmth * self.settings.l1_coefficient * codes.sum())

    def choice(self) -> Choice:
        return Above(0.0)


class TopK(ActivationRule):
    """The k largest gated pre-activations of each token (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

    class Settings(RuleSettings):
        kind: Literal["topk"] = "topk"
        k: int = Field(gt=0)
        """How many latents may be active on a token."""

    settings: Settings
    revives = True
    compares_latents = True

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        if settings.k > d_sae:
            raise BadSetting(f"k = {settings.k} is more than the {d_sae} latents there are: lower k or raise d_sae")

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        value = gated(preactivation, openness)
        top = value.topk(min(self.settings.k, value.shape[-1]), dim=-1)
        # Where fewer than k are positive the rest is chosen arbitrarily: it must send no gradient either.
        return torch.zeros_like(value).scatter(-1, top.indices, top.values * (top.values > 0))

    def choice(self) -> Choice:
        return LargestOfToken(self.settings.k)

    def training_choice(self) -> Choice:
        return self.choice()


class BatchTopK(TopK):
    """The k B largest gated pre-activations of a batch of B tokens (Bussmann et al. 2024, arXiv 2412.06410).

    At inference each token stands alone: all above a threshold, the running mean over training batches of the least
    code that was active.
    """

    class Settings(TopK.Settings):
        only_for_training = frozenset({"threshold_rate"})

        kind: Literal["batchtopk"] = "batchtopk"  # type: ignore[assignment]
        threshold_rate: float = Field(default=0.02, gt=0, le=1)
        """Share of the newest batch in the running mean."""

    settings: Settings
    threshold: Tensor

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.register_buffer("threshold", torch.zeros(()))
        self._least = 0.0  # of the last step's codes

    @property
    def _by_batch(self) -> bool:
        return True

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        if not self._by_batch:
            return super().codes(preactivation, openness, take)
        value = gated(preactivation, openness)
        return value * (value > self.threshold)

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        if not self._by_batch:
            return super().training_codes(preactivation, openness, take)
        value = gated(preactivation, openness)
        top = value.flatten().topk(min(self.settings.k * len(value), value.numel()))
        return Coded(
            torch.zeros_like(value).flatten().scatter(0, top.indices, top.values * (top.values > 0)).view_as(value)
        )

    def rescale_(self, factor: Tensor) -> None:
        self.threshold.mul_(factor[0])

    def choice(self) -> Choice:
        return Above(float(self.threshold)) if self._by_batch else super().choice()

    def training_choice(self) -> Choice:
        return LargestOfBatch(self.settings.k, near=0.8 * self._least) if self._by_batch else super().choice()

    def after_step(self, least: float) -> None:
        if self._by_batch and least > 0:
            self._least = least
            rate = self.settings.threshold_rate if float(self.threshold) > 0 else 1.0
            self.threshold.lerp_(self.threshold.new_tensor(least), rate)


class Matryoshka(BatchTopK):
    """Nested dictionaries: the first parts of the latents must reconstruct the vector alone (arXiv 2503.17547).

    The loss is the mean over the parts of |x - x_hat from the part's codes|^2, x_hat = x_hat of all being the last. A
    part is a share of the latents that one set of positions is open for, so each slice of a mask is nested in itself;
    latents whose set few others have are put together, and so are the free ones.
    """

    class Settings(BatchTopK.Settings):
        kind: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
        select: Literal["token", "batch"] = "batch"
        """Whether codes are chosen as by topk or as by batchtopk."""
        parts: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
        """The share of the latents in each part, growing to 1."""

        @field_validator("parts")
        @classmethod
        def _growing(cls, parts: tuple[float, ...]) -> tuple[float, ...]:
            if list(parts) != sorted(set(parts)) or not parts or parts[0] <= 0 or parts[-1] != 1:
                raise ValueError(f"parts = {list(parts)} must grow from above 0 to 1")
            return parts

    settings: Settings
    level: Tensor

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.register_buffer("level", torch.zeros(d_sae, dtype=torch.int64))
        self.nest(torch.ones(1, d_sae, dtype=torch.bool), 0)

    @property
    def _by_batch(self) -> bool:
        return self.settings.select == "batch"

    def nest(self, support: Tensor, n_free: int) -> None:
        parts = self.settings.parts
        is_free = torch.arange(support.shape[1]) < n_free
        _, sets, counts = torch.unique(
            torch.cat([is_free[None], support]), dim=1, return_inverse=True, return_counts=True
        )
        sets = torch.where(counts[sets] < 2 * len(parts), -1, sets)
        for one in sets.unique():
            members = (sets == one).nonzero()[:, 0]
            share = (torch.arange(len(members)) + 1) / len(members)
            self.level[members] = torch.searchsorted(torch.tensor(parts), share).clamp(max=len(parts) - 1)

    @property
    def n_parts(self) -> int:
        return len(self.settings.parts)


class _Jump(Function):
    """value where it is above threshold; the threshold learns from the values within half a bandwidth of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(value, threshold)
        ctx.bandwidth = bandwidth
        return value * (value > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        value, threshold = ctx.saved_tensors
        near = _near(value, threshold, ctx.bandwidth)
        return gradient * (value > threshold), -(threshold / ctx.bandwidth) * near * gradient, None


class _Count(Function):
    """1 where value is above threshold; both learn from the values within half a bandwidth of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(value, threshold)
        ctx.bandwidth = bandwidth
        return (value > threshold).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        value, threshold = ctx.saved_tensors
        ste = _near(value, threshold, ctx.bandwidth) * gradient / ctx.bandwidth
        return ste, -ste, None


def _near(value: Tensor, threshold: Tensor, bandwidth: float) -> Bool[Tensor, "token live"]:
    return ((value - threshold).abs() < bandwidth / 2) & (value > 0)  # A closed latent is at 0 and sends nothing.


class JumpReLU(_WithPenalty):
    """Gated pre-activations above a learned threshold of each latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Unlike there, the penalty's estimated gradient goes to the pre-activations too, not to the threshold alone.
    """

    class Settings(_Penalized):
        kind: Literal["jumprelu"] = "jumprelu"
        l0_coefficient: float = Field(ge=0)
        bandwidth: float = Field(default=2.0, gt=0)
        """In units of codes, like `initial_threshold`: vectors are scaled to a mean |x|^2 of d_model."""
        initial_threshold: float = Field(default=0.5, gt=0)

    settings: Settings

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.threshold = nn.Parameter(torch.full((d_sae,), settings.initial_threshold))

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        value = gated(preactivation, openness)
        return value * (value > take(self.threshold))

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        value, threshold = gated(preactivation, openness), take(self.threshold).expand_as(preactivation)
        codes = _Jump.apply(value, threshold, self.settings.bandwidth)
        active = _Count.apply(value, threshold, self.settings.bandwidth)
        return Coded(codes, self._warmth * self.settings.l0_coefficient * active.sum())

    def rescale_(self, factor: Tensor) -> None:
        self.threshold.data.mul_(factor)

    def after_step(self, least: float) -> None:
        self.threshold.data.clamp_(min=0)


class Gated(_WithPenalty):
    """Whether a latent speaks and how loudly are two paths of one encoder (Rajamanoharan et al. 2024, 2404.16014).

    The paper's magnitude bias b_mag is m + e^r b_gate here: the same functions, another start of the optimizer.
    """

    class Settings(_Penalized):
        kind: Literal["gated"] = "gated"
        l1_coefficient: float = Field(ge=0)

    settings: Settings

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.magnitude = nn.Parameter(torch.zeros(d_sae))
        self.magnitude_bias = nn.Parameter(torch.zeros(d_sae))

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        loudness = take(self.magnitude).exp() * preactivation + take(self.magnitude_bias)
        return gated(loudness, openness) * (preactivation > 0)

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        gate = gated(preactivation, openness)
        penalty = self._warmth * self.settings.l1_coefficient * gate.sum()
        return Coded(self.codes(preactivation, openness, take), penalty, gate)

    def rescale_(self, factor: Tensor) -> None:
        self.magnitude_bias.data.mul_(factor)


RULES: dict[str, type[ActivationRule]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def rule_settings(values: dict[str, Any]) -> RuleSettings:
    """Settings of the activation rule that `values["kind"]` names, checked."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in RULES:
        raise BadSetting(f"activation rule {kind!r} is unknown: choose one of {', '.join(RULES)}")
    return RULES[kind].Settings(**values)


def make_rule(settings: RuleSettings, d_sae: int) -> ActivationRule:
    """The rule that settings name, for that many latents.

    Raises:
        BadSetting: it needs more latents.
    """
    return RULES[settings.kind](settings, d_sae)
