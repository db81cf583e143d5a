"""The training loop: batches to a trained SAE and its training curve."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import BadSetting, DamagedFolder, DegenerateResult, first_line
from posmask.kernels import operations, runtime
from posmask.kernels.devices import memory_for
from posmask.masks.base import Copies, Observed
from posmask.progress import progress_bar, stage_label
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import flaw_of
from posmask.sae.warm_start import copy_latents_
from posmask.training import fast_loss
from posmask.training.checkpoints import Checkpoints
from posmask.training.curve import CurvePoint, MaskSnapshots
from posmask.training.distributed import SingleProcess
from posmask.training.optimizer import UnitRowAdam
from posmask.training.reference_loss import StepLoss
from posmask.training.settings import TrainingSettings, product_precision
from posmask.training.state import restore_state_, training_state

__all__ = ["DeadLatents", "Trained", "share_gradients_", "train"]

_CURVE_EVERY = 10
_DIVERGED = 1000


@dataclass(frozen=True)
class Trained:
    """A trained SAE, its training curve, and the seconds it took, which alone differ between equal runs."""

    sae: SparseAutoencoder
    curve: list[CurvePoint]
    snapshots: MaskSnapshots
    dead: Bool[Tensor, " latent"]
    n_tokens: int
    seconds: float


@memory_for("training", "lower training.batch_tokens, sae.d_sae or --jobs")
def train(
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    settings: TrainingSettings,
    label: str,
    after_step: Callable[[int], None] = lambda done: None,
    checkpoints: Checkpoints | None = None,
    on_point: Callable[[CurvePoint], None] = lambda point: None,
    processes: SingleProcess | None = None,
) -> Trained:
    """Train `sae` in place, on its device. Parameters that require no gradient stay as they are.

    Args:
        sae: its center and scale must suit the vectors of the batches.
        batches: `n_steps` batches, for example from `training_batches`.
        settings: optimizer, schedule and precision.
        label: the SAE's name in the progress bar and in errors.
        after_step: called after each step with the number of steps done.
        checkpoints: resumed from and written. `batches` must then start after the first `checkpoints.done` batches;
            the result is bit for bit that of an uninterrupted training.
        on_point: called with each point of the curve as it is recorded.
        processes: the strategy of the processes that train the SAE, a single one by default. `batches` then are this
            process's parts of the batches.

    Raises:
        NothingToDo: there are fewer kept tokens than a batch has.
        BadSetting: the rule trains on pairs of tokens, and a batch does not hold pairs.
        DegenerateResult: the loss is not finite or diverges, all latents are dead, or the trained SAE explains
            nothing or holds numbers that are not finite. Checkpoints stay as they are.
        OutOfMemory: a step needs more memory than there is.
    """
    runtime.keep_freed_memory()
    trainer = _Trainer(sae, settings, label, checkpoints, processes or SingleProcess())
    n_done = trainer.restore()
    n_tokens = (settings.n_steps - n_done) * settings.batch_tokens
    with progress_bar(stage_label("train", label), n_tokens, "tokens") as advance:
        for done, batch in enumerate((batch.to(sae.encoder.device) for batch in batches), start=n_done + 1):
            step = trainer.step(batch, done)
            explained_variance = None
            if _is_recorded(done, settings.n_steps):
                point = trainer.record(batch, step, done)
                on_point(point)
                explained_variance = point.explained_variance
            advance(settings.batch_tokens, explained_variance=explained_variance)
            after_step(done)
            trainer.write_checkpoint_if_due(done)
    return trainer.finish()


class _Trainer:
    """The state of a training and the operations of the loop on it; steps are counted from 1."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        settings: TrainingSettings,
        label: str,
        checkpoints: Checkpoints | None,
        processes: SingleProcess,
    ) -> None:
        self._sae = sae
        self._settings = settings
        self._label = label
        self._checkpoints = checkpoints
        self._processes = processes
        self._precision: runtime.Precision = product_precision(settings, sae.rule, str(sae.encoder.device))
        mask_parameters = sae.mask.openness_parameters()
        self._parameters = [
            p for p in sae.parameters() if p.requires_grad and all(p is not other for other in mask_parameters)
        ]
        self._optimizer = UnitRowAdam(
            [
                {"params": self._parameters, "lr": settings.learning_rate},
                {"params": mask_parameters, "lr": settings.mask_learning_rate},
            ],
            unit_rows=sae.decoder,
            copied=sae.encoder if self._precision == "bfloat16" else None,
        )
        self._peak_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._deaths = DeadLatents(sae, settings.dead_after_eligible_tokens)
        self._curve: list[CurvePoint] = []
        self._snapshots = MaskSnapshots(sae.mask, settings.n_steps)
        self._started = time.perf_counter()

    def restore(self) -> int:
        """Restore the newest checkpoint, and return the number of steps done before it; 0 without a checkpoint.

        Raises:
            DamagedFolder: its tensors are not those of such a training.
        """
        checkpoints = self._checkpoints
        if checkpoints is None:
            return 0
        if checkpoints.done:
            state = checkpoints.read()
            try:
                local = self._processes.local_state(state)
                deaths, self._curve, seconds = restore_state_(self._sae, self._optimizer, local)
                self._snapshots.restore_(state)
            except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
                raise DamagedFolder(
                    f"{checkpoints.newest} is not a state of this training ({first_line(error)}): remove it; `posmask "
                    "run` resumes from an earlier one, or from the first step"
                ) from error
            self._deaths.eligible_since_fired = deaths
            self._deaths.n_tokens = checkpoints.done * self._settings.batch_tokens
            self._started -= seconds
        n_bytes = 3.0 * sum(parameter.nbytes for parameter in self._sae.parameters())  # with Adam's two moments
        checkpoints.expect(n_bytes if self._processes.owns_all_latents else self._processes.totals(n_bytes)[0])
        return checkpoints.done

    def step(self, batch: Batch, done: int) -> StepLoss:
        """Take one optimizer step, the `done`-th, and update the mask, the rule and the dead latents.

        Raises:
            DegenerateResult: the loss is not finite.
        """
        sae = self._sae
        for group, rate in zip(self._optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = rate * _rate_factor(done - 1, self._settings)
        for part in (sae.mask, sae.rule):
            part.before_step(done - 1, self._settings.n_steps)
        step = self._set_gradients(batch, done)
        max_norm = self._settings.max_gradient_norm
        norm = None if max_norm is None else self._processes.gradient_norm(sae, self._parameters)
        self._optimizer.clipped_step(norm, max_norm)
        sae.mask.zero_grad()  # fast_gradients overwrites the other gradients
        sae.rule.after_step(step.numbers.least if sae.rule.uses_least else 0.0)
        self._deaths.update(sae, step)
        copies = sae.mask.after_step(done, self._settings.n_steps)
        if copies is not None:
            copy_latents_(sae, copies)
            _copy_moments_(self._optimizer, sae, copies)
            self._deaths.copy_(copies)
        self._snapshots.after_step(sae.mask, done)
        return step

    def _set_gradients(self, batch: Batch, done: int) -> StepLoss:
        """Set the gradients of the batch over all processes, shared between copies."""
        sae, settings = self._sae, self._settings
        if sae.rule.pairs_tokens:
            _check_pairs(batch)
        step = fast_loss.fast_gradients(
            sae,
            batch.vectors,
            batch.positions(sae.mask.settings.position_origin),
            dead=self._deaths.to_revive,
            aux_k=settings.aux_k,
            precision=self._precision,
            loss_tokens=settings.batch_tokens,
            details=sae.mask.watches,
            low_encoder=self._optimizer.low_copy(),
        )
        reads = sae.encoder.device.type == "cpu" or _is_recorded(done, settings.n_steps)
        if reads and not math.isfinite(step.numbers.reconstruction):
            raise DegenerateResult(
                f"the loss of {self._label} is {step.numbers.reconstruction} at step {done}: lower learning_rate = "
                f"{settings.learning_rate}, or look for NaN in the vectors{self._checkpoint_note()}"
            )
        step = self._processes.combine(sae, step)
        if step.openness_gradient is not None:
            sae.mask.learn(step.openness_gradient)
        if sae.mask.watches:
            sae.mask.observe(_observed(sae, step))
        if sae.mask.settings.gradient_sharing:
            share_gradients_(sae)
        return step

    def record(self, batch: Batch, step: StepLoss, done: int) -> CurvePoint:
        """Append a point to the curve and return it.

        Raises:
            DegenerateResult: training diverges, or all latents are dead.
        """
        sae, settings, processes = self._sae, self._settings, self._processes
        n_dead = int(self._deaths.dead.sum())
        with torch.no_grad():
            squares = float(sae.normalize(batch.vectors).square().sum())
            openness = sae.mask.openness()
        n = len(batch)
        squares, error, auxiliary, n_active = processes.totals(
            squares, step.numbers.reconstruction * n, step.numbers.auxiliary * n, float(step.numbers.n_active)
        )
        dead, opened, n_gates = float(n_dead), float(openness.sum()), float(openness.numel())
        if not processes.owns_all_latents:
            dead, opened, n_gates = processes.totals(dead, opened, n_gates)
        point = CurvePoint(
            step=done,
            tokens=done * settings.batch_tokens,
            learning_rate=self._optimizer.param_groups[0]["lr"],
            loss=error / settings.batch_tokens,
            auxiliary_loss=auxiliary / settings.batch_tokens,
            explained_variance=1 - error / squares,
            l0=n_active / settings.batch_tokens,
            dead_latents=int(dead),
            mean_openness=opened / n_gates,
        )
        self._curve.append(point)
        self._check_progress(point, n_dead == sae.d_sae)
        return point

    def _check_progress(self, point: CurvePoint, all_dead: bool) -> None:
        remedy = f"lower learning_rate = {self._settings.learning_rate}{self._checkpoint_note()}"
        if point.explained_variance < -_DIVERGED:
            raise DegenerateResult(
                f"the loss of {self._label} diverges: {point.loss:.3g} at step {point.step}, more than {_DIVERGED} "
                f"times the variance of the vectors: {remedy}"
            )
        if all_dead and point.l0 == 0:
            raise DegenerateResult(
                f"all {point.dead_latents} latents of {self._label} are dead at step {point.step}, none fired on the "
                f"last {self._settings.dead_after_eligible_tokens:,} tokens: lower the rule's penalty, or {remedy}"
            )

    def write_checkpoint_if_due(self, done: int) -> None:
        """Write the state after `done` steps if a checkpoint is due; the leading process decides and writes.

        Raises:
            DegenerateResult: the state holds NaN or infinite numbers.
        """
        checkpoints, processes = self._checkpoints, self._processes
        if checkpoints is None or not processes.leader_decision(checkpoints.due(at_end=done == self._settings.n_steps)):
            return
        seconds = time.perf_counter() - self._started
        local = training_state(self._sae, self._optimizer, self._deaths.eligible_since_fired, self._curve, seconds)
        state = processes.full_state(local) | self._snapshots.state()
        not_finite = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
        if not_finite:
            raise DegenerateResult(
                f"{self._label} holds NaN or infinite numbers after step {done} (in {', '.join(not_finite[:3])}): "
                f"lower learning_rate = {self._settings.learning_rate}{self._checkpoint_note()}"
            )
        if processes.leads:
            checkpoints.write(done, state)

    def finish(self) -> Trained:
        """Return the trained SAE after the final checks.

        Raises:
            DegenerateResult: the SAE explains nothing or holds numbers that are not finite.
        """
        settings, flaw = self._settings, flaw_of(self._sae)
        if self._processes.totals(float(flaw is not None))[0]:
            raise DegenerateResult(
                f"{self._label}: {flaw or 'the part of another process is not usable'} after {settings.n_steps} steps: "
                f"lower learning_rate = {settings.learning_rate}, or look for NaN in the initial SAE"
                f"{self._checkpoint_note()}"
            )
        final = self._curve[-1]
        if final.l0 == 0 or not final.explained_variance > 0:
            raise DegenerateResult(
                f"{self._label} has {final.l0:.3g} active latents per token and explains "
                f"{final.explained_variance:.3g} of the variance after {settings.n_steps} steps: train longer, or "
                f"change learning_rate = {settings.learning_rate}"
            )
        n_tokens, seconds = settings.n_steps * settings.batch_tokens, time.perf_counter() - self._started
        return Trained(self._sae, self._curve, self._snapshots, self._deaths.dead, n_tokens, seconds)

    def _checkpoint_note(self) -> str:
        """The end of an error message: which checkpoint is kept."""
        if self._checkpoints is None or not self._checkpoints.done:
            return ""
        return f"; the checkpoint after {self._checkpoints.done} steps stays in {self._checkpoints.folder}"


def _check_pairs(batch: Batch) -> None:
    """Check that a batch holds pairs of neighbors, as rules with `pairs_tokens` need.

    Raises:
        BadSetting: it does not.
    """
    half = len(batch) // 2
    is_after = torch.equal(batch.position[:half], batch.position[half:] + 1)
    if not is_after or not torch.equal(batch.text[:half], batch.text[half:]):
        raise BadSetting(
            "the rule trains on pairs of neighboring tokens, and the second half of a batch does not hold the tokens "
            "before those of the first half: draw batches with training_batches(..., pairs=True)"
        )


class DeadLatents:
    """Which latents are dead, from the tokens at which each was open since it last fired.

    Attributes:
        eligible_since_fired: the number of these tokens per latent.
        n_tokens: the number of all tokens so far.

    Args:
        dead_after_eligible_tokens: the number from which a latent is dead.
    """

    def __init__(self, sae: SparseAutoencoder, dead_after_eligible_tokens: int) -> None:
        self._limit = dead_after_eligible_tokens
        self.n_tokens = 0
        self.eligible_since_fired: Float[Tensor, " latent"] = torch.zeros(sae.d_sae, device=sae.encoder.device)

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        """Whether each latent is dead."""
        return self.eligible_since_fired >= self._limit

    @property
    def to_revive(self) -> Bool[Tensor, " latent"] | None:
        """`dead`; None while there are too few tokens for a latent to be dead, which the host knows without a GPU."""
        return self.dead if self.n_tokens >= self._limit else None

    def update(self, sae: SparseAutoencoder, step: StepLoss) -> None:
        """Count the tokens of a step, and restart the count of latents that fired."""
        self.n_tokens += len(step.mask_row)
        live = sae.mask.live()
        eligible = operations.counts(step.mask_row, len(live)).to(live.dtype) @ live
        self.eligible_since_fired = torch.where(step.fired, 0.0, self.eligible_since_fired + eligible)

    def copy_(self, copies: Copies) -> None:
        """Give copied latents the counts of the latents that they copy."""
        self.eligible_since_fired[copies.target] = self.eligible_since_fired[copies.source]


def _is_recorded(done: int, n_steps: int) -> bool:
    """Whether the curve has a point of a step, counted from 1."""
    return done % _CURVE_EVERY == 0 or done in (1, n_steps)


def share_gradients_(sae: SparseAutoencoder) -> None:
    """Mix each latent's gradient with the mean over the copies of the latent that it was copied from."""
    sharing = sae.mask.settings.gradient_sharing
    origin, copy_of = sae.mask.copied_from.to(sae.encoder.device).unique(return_inverse=True)
    if len(origin) == sae.d_sae:
        return
    count = torch.bincount(copy_of, minlength=len(origin)).to(sae.encoder.dtype)
    copies = operations.Grouped(copy_of, len(origin))
    latents = torch.arange(sae.d_sae, device=copy_of.device)
    for parameter in sae.latent_parameters():
        gradient = parameter.grad
        assert gradient is not None
        rows = gradient.view(sae.d_sae, -1)
        mean = copies.sum_rows(1 / count[copy_of], rows, latents)
        rows.mul_(1 - sharing).add_(mean[copy_of], alpha=sharing)


def _observed(sae: SparseAutoencoder, step: StepLoss) -> Observed:
    codes = step.codes
    assert codes is not None
    assert step.residual is not None
    return Observed(step.mask_row, codes.token, codes.latent, codes.value, step.residual)


def _copy_moments_(optimizer: torch.optim.Adam, sae: SparseAutoencoder, copies: Copies) -> None:
    """Give copied latents the Adam moments of the latents that they copy."""
    for parameter in sae.latent_parameters():
        for moment in optimizer.state[parameter].values():
            if moment.dim():  # Adam's count of steps has no dimension.
                moment[copies.target] = moment[copies.source]


def _rate_factor(done: int, settings: TrainingSettings) -> float:
    """The factor of the learning rate at the step after `done` steps."""
    warmup, decay = settings.warmup_fraction * settings.n_steps, settings.decay_fraction * settings.n_steps
    rising = (done + 1) / warmup if warmup else 1.0
    falling = (settings.n_steps - done) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))
