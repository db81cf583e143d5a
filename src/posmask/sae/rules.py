"""Activation rules: how gated pre-activations become codes, and the terms that they add to the training loss.

With pre = (x - decoder_bias) . encoder[j] + encoder_bias[j], and M the openness at the token's position:

    relu        code = M relu(pre)                                              + l1_coefficient sum_j code
    topk        the k largest M relu(pre) of each token
    batchtopk   the k B largest M relu(pre) of a batch of B tokens; at inference all above a fixed threshold
    matryoshka  topk or batchtopk whose nested parts must reconstruct the vector too
    temporal    matryoshka, with a first part that is alike at neighboring tokens  + contrast_weight InfoNCE
    jumprelu    code = M relu(pre) where that is above the latent's threshold   + l0_coefficient (active codes)
    gated       code = M relu(e^r pre + m) where pre > 0                        + l1_coefficient sum_j M relu(pre), and
                                                                                  those must reconstruct the vector too

The gate acts before the rule selects, so a closed latent is never one of the k.

To add a rule, write one subclass of `ActivationRule` with its `Settings`, and add it to `RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import cross_entropy, normalize

from posmask.errors import BadSetting, unknown_kind
from posmask.sae.selection import Above, Choice, LargestOfBatch, LargestOfToken

__all__ = ["RULES", "ActivationRule", "Coded", "RuleSettings", "Take", "TopK", "make_rule", "rule_settings"]

Take = Callable[[Tensor], Tensor]
"""Selects the values of the live latents, [live] or [token live], from a parameter of all latents, [latent]."""


class RuleSettings(BaseModel):
    """Base of the settings of a rule; the `Settings` of each rule adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    only_for_training: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not affect the codes of a trained SAE."""

    kind: str

    def of_codes(self) -> dict[str, Any]:
        """The fields that affect the codes of a trained SAE."""
        return self.model_dump(exclude=set(self.only_for_training))


@dataclass(frozen=True)
class Coded:
    """Codes in training, with what the rule adds to the loss.

    Attributes:
        codes: differentiable codes.
        penalty: the rule's term of the loss, summed over tokens; None for 0.
        through_gate: codes whose reconstruction error, with the decoder held constant, is a term of the loss, too.
    """

    codes: Float[Tensor, "token live"]
    penalty: Float[Tensor, ""] | None = None
    through_gate: Float[Tensor, "token live"] | None = None


class ActivationRule(nn.Module):
    """How gated pre-activations become codes. Abstract; `RULES` lists the rules.

    Methods that compute codes take the `preactivation` of the live latents before relu, their `openness` (None for 1
    everywhere), and `take`, which selects the live latents from a parameter of the rule.

    Args:
        settings: an instance of the rule's `Settings`.
        d_sae: number of latents, the first dimension of parameters and buffers with a value per latent.
    """

    Settings: ClassVar[type[RuleSettings]]
    revives: ClassVar[bool] = False
    """Whether dead latents are revived by an auxiliary loss (AuxK)."""
    compares_latents: ClassVar[bool] = False
    """Whether the values of latents are compared with each other, so that all must have one scale."""
    pairs_tokens: ClassVar[bool] = False
    """Whether a training batch holds pairs of neighbors: tokens, and in its second half the tokens before them."""
    uses_least: ClassVar[bool] = True
    """Whether `after_step` uses the smallest active code; without it the host need not wait for a GPU at each step."""
    level: Tensor | None
    """For rules with nested parts, the first part that contains each latent, [latent]."""

    def __init__(self, settings: RuleSettings, d_sae: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("level", None)

    def nest(self, support: Bool[Tensor, "row latent"], n_free: int) -> None:
        """Divide the latents into nested parts, given where the mask opens them; called once."""

    def codes(
        self,
        preactivation: Float[Tensor, "*token live"],
        openness: Float[Tensor, "*token live"] | None,
        take: Take,
    ) -> Float[Tensor, "*token live"]:
        """The codes at inference; each token is independent of the others."""
        raise NotImplementedError

    def training_codes(
        self, preactivation: Float[Tensor, "token live"], openness: Float[Tensor, "token live"] | None, take: Take
    ) -> Coded:
        """The codes in training, differentiable."""
        return Coded(self.codes(preactivation, openness, take))

    def rescale_(self, factor: Float[Tensor, " latent"]) -> None:
        """Make codes `factor` times as large, given pre-activations `factor` times as large.

        Args:
            factor: the same for all latents if the rule compares them.
        """

    def choice(self) -> Choice | None:
        """The choice among gated pre-activations that gives `codes`; None if no choice does."""

    def training_choice(self) -> Choice | None:
        """The choice that gives `training_codes` if few codes are active from the start of training; otherwise None."""

    def penalty_gradient(
        self, token: Int[Tensor, " entry"], latent: Int[Tensor, " entry"], code: Float[Tensor, " entry"], n_tokens: int
    ) -> Float[Tensor, " entry"] | None:
        """The gradient of the penalty of `training_codes` with respect to active codes; None for 0.

        Only for rules with a `training_choice`, whose codes are known as entries of token, latent and code.

        Args:
            token: in the order of the batch.
            latent: -1 for empty entries, whose gradient is 0.
            code: before a router's strength.
            n_tokens: tokens of the batch.
        """

    def before_step(self, done: int, n_steps: int) -> None:
        """Prepare a training step; called before each of `n_steps` steps, after `done` finished steps."""

    def after_step(self, least: float) -> None:
        """Update the rule after each step.

        Args:
            least: the smallest active code of the step; 0 if `training_choice` is None or `uses_least` is False.
        """


def gated(preactivation: Tensor, openness: Tensor | None) -> Tensor:
    """openness * relu(preactivation)."""
    return preactivation.relu() if openness is None else preactivation.relu() * openness


class _Penalized(RuleSettings):
    only_for_training = frozenset(
        {"penalty_warmup_fraction", "l1_coefficient", "l0_coefficient", "bandwidth", "initial_threshold"}
    )
    penalty_warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the penalty rises linearly from 0."""


class _WithPenalty(ActivationRule):
    settings: _Penalized
    uses_least = False

    def __init__(self, settings: _Penalized, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self._penalty_factor = 1.0

    def before_step(self, done: int, n_steps: int) -> None:
        """Warm up the penalty."""
        warmup_steps = self.settings.penalty_warmup_fraction * n_steps
        self._penalty_factor = min(1.0, (done + 1) / warmup_steps) if warmup_steps else 1.0


class ReLU(_WithPenalty):
    """All positive pre-activations, with an L1 penalty (Bricken et al. 2023)."""

    class Settings(_Penalized):
        """Settings of the ReLU rule."""

        kind: Literal["relu"] = "relu"
        l1_coefficient: float = Field(ge=0)
        """Coefficient of the sum of codes."""

    settings: Settings

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        """openness * relu(preactivation)."""
        return gated(preactivation, openness)

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        """The codes; the penalty is `l1_coefficient` times their sum, with warm-up."""
        codes = gated(preactivation, openness)
        return Coded(codes, self._penalty_factor * self.settings.l1_coefficient * codes.sum())

    def choice(self) -> Choice:
        """All values above 0."""
        return Above(0.0)


class TopK(ActivationRule):
    """The k largest gated pre-activations of each token (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

    class Settings(RuleSettings):
        """Settings of the TopK rule."""

        kind: Literal["topk"] = "topk"
        k: int = Field(gt=0)
        """Maximum number of active latents per token."""

    settings: Settings
    revives = True
    compares_latents = True
    uses_least = False

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        if settings.k > d_sae:
            raise BadSetting(f"k = {settings.k} is more than the {d_sae} latents: lower k or raise d_sae")

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        """The k largest gated pre-activations of each token; all others are 0."""
        value = gated(preactivation, openness)
        top = value.topk(min(self.settings.k, value.shape[-1]), dim=-1)
        # If fewer than k are positive, topk fills up with zeros, which must send no gradient.
        return torch.zeros_like(value).scatter(-1, top.indices, top.values * (top.values > 0))

    def choice(self) -> Choice:
        """The k largest values of each token."""
        return LargestOfToken(self.settings.k)

    def training_choice(self) -> Choice:
        """The same as `choice`."""
        return self.choice()


class BatchTopK(TopK):
    """The k B largest gated pre-activations of a batch of B tokens (Bussmann et al. 2024, arXiv 2412.06410).

    At inference tokens are independent: all pre-activations above a threshold are active. The threshold is the running
    mean over training batches of the smallest active code.
    """

    class Settings(TopK.Settings):
        """Settings of the BatchTopK rule."""

        only_for_training = frozenset({"threshold_rate"})

        kind: Literal["batchtopk"] = "batchtopk"  # type: ignore[assignment]
        threshold_rate: float = Field(default=0.02, gt=0, le=1)
        """Weight of the newest batch in the running mean."""

    settings: Settings
    uses_least = True
    threshold: Tensor

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.register_buffer("threshold", torch.zeros(()))
        self._least = 0.0  # smallest active code of the last step

    @property
    def _by_batch(self) -> bool:
        return True

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        """The gated pre-activations above the threshold; all others are 0."""
        if not self._by_batch:
            return super().codes(preactivation, openness, take)
        value = gated(preactivation, openness)
        return value * (value > self.threshold)

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        """The k B largest gated pre-activations of the batch; all others are 0."""
        if not self._by_batch:
            return super().training_codes(preactivation, openness, take)
        value = gated(preactivation, openness)
        top = value.flatten().topk(min(self.settings.k * len(value), value.numel()))
        return Coded(
            torch.zeros_like(value).flatten().scatter(0, top.indices, top.values * (top.values > 0)).view_as(value)
        )

    def rescale_(self, factor: Tensor) -> None:
        """Scale the threshold; all factors are equal."""
        self.threshold.mul_(factor[0])

    def choice(self) -> Choice:
        """All values above the threshold."""
        return Above(float(self.threshold)) if self._by_batch else super().choice()

    def training_choice(self) -> Choice:
        """The k B largest values of the batch, with a guess of the smallest from the last step."""
        return LargestOfBatch(self.settings.k, near=0.8 * self._least) if self._by_batch else super().choice()

    def after_step(self, least: float) -> None:
        """Update the threshold, the running mean of the smallest active code of each batch."""
        if self._by_batch and least > 0:
            self._least = least
            rate = self.settings.threshold_rate if float(self.threshold) > 0 else 1.0
            self.threshold.lerp_(self.threshold.new_tensor(least), rate)


class Matryoshka(BatchTopK):
    """Nested dictionaries: the first parts of the latents must reconstruct the vector alone (arXiv 2503.17547).

    The loss is the mean over the parts of |x - x_hat|^2, where x_hat uses the codes of the part; the last part is all
    latents. Parts are taken within each set of latents with the same open positions, so each slice of a mask is nested
    in itself. The free latents form one set, and so do the latents that share their positions with few others.
    """

    class Settings(BatchTopK.Settings):
        """Settings of nested dictionaries."""

        kind: Literal["matryoshka"] = "matryoshka"  # type: ignore[assignment]
        select: Literal["token", "batch"] = "batch"
        """Whether codes are chosen per token, as by topk, or per batch, as by batchtopk."""
        parts: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
        """Share of the latents in each part, increasing to 1."""

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
        """Assign each latent to the first part that contains it."""
        parts = self.settings.parts
        is_free = torch.arange(support.shape[1]) < n_free
        _, sets, counts = torch.unique(
            torch.cat([is_free[None], support]), dim=1, return_inverse=True, return_counts=True
        )
        sets = torch.where(counts[sets] < 2 * len(parts), -1, sets)
        for number in sets.unique():
            members = (sets == number).nonzero()[:, 0]
            share = (torch.arange(len(members)) + 1) / len(members)
            self.level[members] = torch.searchsorted(torch.tensor(parts), share).clamp(max=len(parts) - 1)

    @property
    def n_parts(self) -> int:
        """Number of nested parts."""
        return len(self.settings.parts)


class Temporal(Matryoshka):
    """Nested dictionaries whose first part is alike at neighboring tokens (T-SAE; Bhalla et al. 2025, 2511.05541).

    A training batch holds N pairs of neighbors. With z[i] the codes of the first part at the later token of pair i, and
    y[i] those at the earlier one, the loss has the additional term

        contrast_weight / parts * mean over i of -log softmax_j(s(z[i], y[j]))[i] - log softmax_j(s(z[j], y[i]))[i]

    s is the cosine of the paper, or the dot product of its published code. The weight is divided by the number of
    parts because the reconstruction errors are averaged over them, where the paper sums them.
    """

    class Settings(Matryoshka.Settings):
        """Settings of nested dictionaries with a temporal first part."""

        only_for_training = frozenset({"threshold_rate", "contrast_weight", "similarity"})

        kind: Literal["temporal"] = "temporal"  # type: ignore[assignment]
        parts: tuple[float, ...] = (0.2, 1.0)
        """Share of the latents in each part, increasing to 1; the first one is contrasted."""
        contrast_weight: float = Field(default=1.0, ge=0)
        """Weight of the contrastive loss; 0 leaves nested dictionaries trained on pairs."""
        similarity: Literal["cosine", "dot"] = "cosine"
        """Similarity of two codes."""

    settings: Settings
    pairs_tokens = True

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        """The codes of all latents, and the contrastive loss of the first part."""
        coded = super().training_codes(preactivation, openness, take)
        return replace(coded, penalty=self._penalty(coded.codes[:, self.level == 0]))

    def penalty_gradient(self, token: Tensor, latent: Tensor, code: Tensor, n_tokens: int) -> Tensor:
        """The gradient of the contrastive loss with respect to the active codes of the first part; 0 for others."""
        is_first = self.level == 0
        entry = ((latent >= 0) & is_first[latent]).nonzero()[:, 0]
        row, column = token[entry], (is_first.cumsum(0) - 1)[latent[entry]]
        codes = code.new_zeros(n_tokens, int(is_first.sum()))
        codes[row, column] = code[entry]
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._penalty(codes.requires_grad_()), codes)
        of_entries = torch.zeros_like(code)
        of_entries[entry] = gradient[row, column]
        return of_entries

    def _penalty(self, codes: Float[Tensor, "token first"]) -> Float[Tensor, ""]:
        contrast = _contrast(codes, cosine=self.settings.similarity == "cosine")
        return contrast * (self.settings.contrast_weight / self.n_parts * len(codes))


def _contrast(codes: Float[Tensor, "token first"], *, cosine: bool) -> Float[Tensor, ""]:
    """InfoNCE in both directions between the first half of the tokens and the second half."""
    if len(codes) % 2:
        raise BadSetting(f"a batch of {len(codes)} tokens does not consist of pairs of neighbors: pass an even number")
    later, earlier = (normalize(half, eps=1e-8) if cosine else half for half in codes.chunk(2))
    similarity, pair = later @ earlier.T, torch.arange(len(later), device=codes.device)
    return cross_entropy(similarity, pair) + cross_entropy(similarity.T, pair)


class _Jump(Function):
    """value where it exceeds threshold; the threshold learns from values within half a bandwidth of it."""

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
    """1 where value exceeds threshold; both learn from values within half a bandwidth of it."""

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
    return ((value - threshold).abs() < bandwidth / 2) & (value > 0)  # a closed latent, at 0, sends no gradient


class JumpReLU(_WithPenalty):
    """Gated pre-activations above a learned threshold of each latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Unlike in the paper, the estimated gradient of the penalty reaches the pre-activations, not only the threshold.
    """

    class Settings(_Penalized):
        """Settings of the JumpReLU rule."""

        kind: Literal["jumprelu"] = "jumprelu"
        l0_coefficient: float = Field(ge=0)
        """Coefficient of the number of active codes."""
        bandwidth: float = Field(default=2.0, gt=0)
        """Width of the window of the straight-through estimator, in units of codes (vectors have a mean |x|^2 of
        d_model)."""
        initial_threshold: float = Field(default=0.5, gt=0)
        """In units of codes."""

    settings: Settings

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.threshold = nn.Parameter(torch.full((d_sae,), settings.initial_threshold))

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        """The gated pre-activations above the threshold of their latent; all others are 0."""
        value = gated(preactivation, openness)
        return value * (value > take(self.threshold))

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        """The codes; the penalty is `l0_coefficient` times the number of active codes, with warm-up.

        Codes and penalty have straight-through gradients: a rectangle of width `bandwidth` around the threshold
        replaces the derivative of the step function, as in the paper.
        """
        value, threshold = gated(preactivation, openness), take(self.threshold).expand_as(preactivation)
        codes = _Jump.apply(value, threshold, self.settings.bandwidth)
        active = _Count.apply(value, threshold, self.settings.bandwidth)
        return Coded(codes, self._penalty_factor * self.settings.l0_coefficient * active.sum())

    def rescale_(self, factor: Tensor) -> None:
        """Scale the thresholds."""
        self.threshold.data.mul_(factor)

    def after_step(self, least: float) -> None:
        """Keep the thresholds at or above 0."""
        self.threshold.data.clamp_(min=0)


class Gated(_WithPenalty):
    """Whether a latent fires and its magnitude are two paths of one encoder (Rajamanoharan et al. 2024, 2404.16014).

    The magnitude bias b_mag of the paper is m + e^r b_gate: the same functions with another initialization.
    """

    class Settings(_Penalized):
        """Settings of the Gated rule."""

        kind: Literal["gated"] = "gated"
        l1_coefficient: float = Field(ge=0)
        """Coefficient of the sum of gates."""

    settings: Settings

    def __init__(self, settings: Settings, d_sae: int) -> None:
        super().__init__(settings, d_sae)
        self.magnitude = nn.Parameter(torch.zeros(d_sae))
        self.magnitude_bias = nn.Parameter(torch.zeros(d_sae))

    def codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Tensor:
        """openness * relu(e^magnitude * preactivation + magnitude_bias) where preactivation > 0; all others are 0."""
        magnitude = take(self.magnitude).exp() * preactivation + take(self.magnitude_bias)
        return gated(magnitude, openness) * (preactivation > 0)

    def training_codes(self, preactivation: Tensor, openness: Tensor | None, take: Take) -> Coded:
        """The codes; the penalty is `l1_coefficient` times the sum of the gates M relu(preactivation), with warm-up.

        The gates must reconstruct the vector, too: the paper's auxiliary loss, which holds the decoder constant.
        """
        gate = gated(preactivation, openness)
        penalty = self._penalty_factor * self.settings.l1_coefficient * gate.sum()
        return Coded(self.codes(preactivation, openness, take), penalty, gate)

    def rescale_(self, factor: Tensor) -> None:
        """Scale the magnitude biases; the gates scale with their pre-activations."""
        self.magnitude_bias.data.mul_(factor)


RULES: dict[str, type[ActivationRule]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "temporal": Temporal,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def rule_settings(values: dict[str, Any]) -> RuleSettings:
    """Validated settings of the activation rule `values["kind"]`.

    Raises:
        BadSetting: the kind is unknown.
        ValidationError: a setting is invalid.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in RULES:
        raise unknown_kind("activation rule", kind, RULES)
    return RULES[kind].Settings(**values)


def make_rule(settings: RuleSettings, d_sae: int) -> ActivationRule:
    """The rule `settings.kind` for `d_sae` latents.

    Raises:
        BadSetting: the rule needs more latents.
    """
    return RULES[settings.kind](settings, d_sae)
