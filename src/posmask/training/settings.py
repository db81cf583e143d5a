"""Settings of a training."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from posmask.kernels import runtime
from posmask.sae.rules import ActivationRule

__all__ = ["TrainingSettings", "product_precision"]


class TrainingSettings(BaseModel):
    """How an SAE is trained. Tokens are kept tokens; shares are of the training's steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n_steps: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    """Of Adam (betas 0.9 and 0.999), after warm-up and before decay."""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """The learning rate rises linearly from 0 over this share of the steps."""
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    """It falls linearly to 0 over this share, the last."""
    max_gradient_norm: float | None = Field(default=1.0, gt=0)
    """The gradient of all parameters but the mask's together is scaled down to this norm, as it nearly always is with
    vectors at a mean |x|^2 of d_model. Else the large first gradients would slow Adam down for hundreds of steps."""
    mask_learning_rate: float = Field(default=0.01, gt=0)
    """Of a learned mask's own parameters; same warm-up and decay."""
    dead_after_eligible_tokens: int = Field(default=100_000, gt=0)
    """A latent is dead when it has not fired on this many tokens at which it was open."""
    aux_k: int = Field(default=32, ge=0)
    """How many dead latents reconstruct the error on each token, to be revived; 0 leaves them dead."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the products with the dictionary. With rules that choose few latents (topk, batchtopk, matryoshka) bfloat16
    affects only the choice, which may differ where two pre-activations are within half a percent; values and
    gradients stay float32. With the others (relu, jumprelu, gated) codes, reconstruction and gradients carry its
    rounding. auto: bfloat16 where the CPU or GPU multiplies it natively and only the choice depends on it."""


def product_precision(settings: TrainingSettings, rule: ActivationRule, device: str) -> runtime.Precision:
    """The precision that `settings.precision` stands for on a device."""
    if settings.precision != "auto":
        return settings.precision
    return runtime.fast_precision(device) if rule.training_choice() is not None else "float32"
