"""Batches -> a trained SAE and its curve: the one training loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from posmask import objective
from posmask.activations import Activations, Batch, training_batches
from posmask.errors import DegenerateResult
from posmask.kernels import Precision
from posmask.progress import progress_bar
from posmask.rows import write_records
from posmask.sae import SparseAutoencoder

__all__ = ["CurvePoint", "Trained", "TrainingSettings", "train", "write_curve"]

_CURVE_EVERY = 10


class TrainingSettings(BaseModel):
    """How an SAE is trained. Tokens are kept tokens; shares are of the training's steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n_steps: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    """Of Adam (betas 0.9 and 0.999), after warm-up and before decay."""
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    """The learning rate rises linearly from 0 over this share of the steps."""
    decay_share: float = Field(default=0.3, ge=0, le=1)
    """It falls linearly to 0 over this share, the last."""
    mask_learning_rate: float = Field(default=0.01, gt=0)
    """Of a learned mask's own parameters; same warm-up and decay."""
    dead_after_eligible_tokens: int = Field(default=100_000, gt=0)
    """A latent is dead when it has not fired on this many tokens at which it was open."""
    aux_k: int = Field(default=32, ge=0)
    """How many dead latents reconstruct the error on each token, to be revived; 0 leaves them dead."""
    selection: Precision = "float32"
    """Precision of the product that chooses the k latents. bfloat16 is faster where the processor has it, and may
    choose another latent where two are within half a percent; values and gradients are float32 either way."""


@dataclass(frozen=True)
class CurvePoint:
    """One line of a training curve. `explained_variance` is of the batch just seen, against the training mean."""

    step: int
    tokens: int
    learning_rate: float
    loss: float
    auxiliary_loss: float
    explained_variance: float
    l0: float
    dead_latents: int
    mean_openness: float


@dataclass(frozen=True)
class Trained:
    """What training gave: the SAE, its curve, and the seconds it took (which alone differ between equal runs)."""

    sae: SparseAutoencoder
    curve: list[CurvePoint]
    dead: Bool[Tensor, " latent"]
    n_tokens: int
    seconds: float


class DeadLatents:
    """For each latent, on how many tokens it was open since it last fired."""

    def __init__(self, sae: SparseAutoencoder, dead_after_eligible_tokens: int) -> None:
        self._limit = dead_after_eligible_tokens
        self.eligible_since_fired: Float[Tensor, " latent"] = torch.zeros(sae.d_sae, dtype=torch.float64)

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        return self.eligible_since_fired >= self._limit

    def update(self, sae: SparseAutoencoder, batch: Batch, step: objective.StepLoss) -> None:
        tokens_at = torch.bincount(batch.position, minlength=sae.mask.n_positions)
        eligible = tokens_at.float() @ sae.mask.live()
        fired = torch.zeros(sae.d_sae, dtype=torch.bool)
        fired[step.codes.latent[step.codes.value > 0]] = True
        self.eligible_since_fired = torch.where(fired, 0.0, self.eligible_since_fired + eligible)


def train(
    sae: SparseAutoencoder,
    activations: Activations,
    settings: TrainingSettings,
    seed: int,
    label: str,
    after_step: Callable[[int], None] = lambda done: None,
) -> Trained:
    """Train `sae` in place.

    Args:
        after_step: called with the number of steps done, after each.

    Raises:
        NothingToDo: fewer kept tokens than a batch.
        DegenerateResult: the loss is not finite, or the trained SAE explains nothing.
    """
    sae.center, sae.scale = activations.centre_and_scale
    optimizer = torch.optim.Adam(
        [
            {
                "params": [sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias],
                "lr": settings.learning_rate,
            },
            {"params": list(sae.mask.parameters()), "lr": settings.mask_learning_rate},
        ],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate_factor(done, settings))
    deaths = DeadLatents(sae, settings.dead_after_eligible_tokens)
    curve: list[CurvePoint] = []
    started = time.perf_counter()
    batches = training_batches(activations, settings.batch_tokens, settings.n_steps, seed)
    with progress_bar(f"train {label}", settings.n_steps * settings.batch_tokens, "tokens") as advance:
        for done, batch in enumerate(batches, start=1):
            dead = deaths.dead
            step = objective.fast_gradients(
                sae,
                batch.vectors,
                batch.position,
                dead=dead,
                aux_k=settings.aux_k,
                precision=settings.selection,
            )
            if not math.isfinite(step.reconstruction):
                raise DegenerateResult(
                    f"the loss of {label} is {step.reconstruction} at step {done}: lower learning_rate = "
                    f"{settings.learning_rate}, or look for NaN in the vectors"
                )
            if step.openness_gradient is not None:
                sae.mask.learn(step.openness_gradient)
            learning_rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            sae.mask.zero_grad()  # the SAE's own gradients are set anew each step
            schedule.step()
            with torch.no_grad():
                sae.decoder.div_(sae.decoder.norm(dim=1, keepdim=True))
            sae.mask.after_step(done, settings.n_steps)
            deaths.update(sae, batch, step)
            if done % _CURVE_EVERY == 0 or done in (1, settings.n_steps):
                curve.append(_point(sae, batch, step, done, settings, learning_rate, int(deaths.dead.sum())))
            advance(len(batch))
            after_step(done)
    final = curve[-1]
    if final.l0 == 0 or not final.explained_variance > 0:
        raise DegenerateResult(
            f"{label} codes {final.l0:.3g} latents a token and explains {final.explained_variance:.3g} of the variance "
            f"after {settings.n_steps} steps: train longer, or change learning_rate = {settings.learning_rate}"
        )
    return Trained(sae, curve, deaths.dead, settings.n_steps * settings.batch_tokens, time.perf_counter() - started)


def _rate_factor(done: int, settings: TrainingSettings) -> float:
    """What the learning rate is multiplied by at the step after `done` steps."""
    warmup, decay = settings.warmup_share * settings.n_steps, settings.decay_share * settings.n_steps
    rising = (done + 1) / warmup if warmup else 1.0
    falling = (settings.n_steps - done) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def _point(
    sae: SparseAutoencoder,
    batch: Batch,
    step: objective.StepLoss,
    done: int,
    settings: TrainingSettings,
    learning_rate: float,
    n_dead: int,
) -> CurvePoint:
    with torch.no_grad():
        variance = float(sae.normalise(batch.vectors).square().sum(1).mean())
        mean_openness = float(sae.mask.openness().mean())
    return CurvePoint(
        step=done,
        tokens=done * settings.batch_tokens,
        learning_rate=learning_rate,
        loss=step.reconstruction,
        auxiliary_loss=step.auxiliary,
        explained_variance=1 - step.reconstruction / variance,
        l0=float((step.codes.value > 0).sum(1).float().mean()),
        dead_latents=n_dead,
        mean_openness=mean_openness,
    )


def write_curve(path: Path, curve: list[CurvePoint]) -> None:
    write_records(path, CurvePoint, curve)
