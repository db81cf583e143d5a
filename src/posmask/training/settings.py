"""Settings of the training of an SAE."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from posmask.kernels import runtime
from posmask.sae.rules import ActivationRule

__all__ = ["TrainingSettings", "product_precision"]


class TrainingSettings(BaseModel):
    """Settings of the training of an SAE. All tokens are kept tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n_steps: int = Field(gt=0)
    """Number of optimizer steps."""
    batch_tokens: int = Field(gt=0)
    """Tokens per step."""
    learning_rate: float = Field(gt=0)
    """Learning rate of Adam (betas 0.9 and 0.999) between warm-up and decay."""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the steps, at the start, in which the learning rate rises linearly from 0."""
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the steps, at the end, in which the learning rate falls linearly to 0."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """The gradient of all parameters except the mask's is scaled down to this norm; None disables clipping. With
    vectors of mean |x|^2 = d_model nearly every step is clipped. Without clipping the large first gradients slow Adam
    down for hundreds of steps."""
    mask_learning_rate: float = Field(default=0.01, gt=0)
    """Learning rate of the parameters of a learned mask, with the same warm-up and decay."""
    dead_after_eligible_tokens: int = Field(default=100_000, gt=0)
    """A latent is dead if it has not fired on this many consecutive tokens at which it was open."""
    aux_k: int = Field(default=32, ge=0)
    """Dead latents per token that reconstruct the error, which revives them; 0 disables the auxiliary loss."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of products with the dictionary. With topk, batchtopk, matryoshka and temporal bfloat16 affects only
    the selection of latents, which may differ between pre-activations within 0.5 % of each other; values and gradients
    are float32. With relu, jumprelu and gated the codes, reconstruction and gradients carry its rounding. auto is
    bfloat16 if the CPU or GPU multiplies it natively and only the selection depends on it, else float32."""


def product_precision(settings: TrainingSettings, rule: ActivationRule, device: str) -> runtime.Precision:
    """The precision that `settings.precision` selects on a device, such as "cpu" or "cuda"."""
    if settings.precision != "auto":
        return settings.precision
    return runtime.fast_precision(device) if rule.training_choice() is not None else "float32"
