"""Batches -> a trained SAE and its curve: the one training loop."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.kernels import operations, runtime
from posmask.masks.base import Copies, Observed
from posmask.progress import progress_bar
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import flaw_of
from posmask.sae.warm_start import copy_latents_
from posmask.training import fast_loss, reference_loss
from posmask.training.checkpoints import Checkpoints
from posmask.training.curve import CurvePoint, MaskSnapshots
from posmask.training.settings import TrainingSettings, product_precision

__all__ = ["SingleProcess", "Trained", "rows_of_latents", "train"]

_CURVE_EVERY = 10
_DIVERGED = 1000


@dataclass(frozen=True)
class Trained:
    """What training gave: the SAE, its curve, and the seconds it took (which alone differ between equal runs)."""

    sae: SparseAutoencoder
    curve: list[CurvePoint]
    snapshots: MaskSnapshots
    dead: Bool[Tensor, " latent"]
    n_tokens: int
    seconds: float


class SingleProcess:
    """What a training step asks of the processes that train together: here there is one.

    `parallel.py` has the others. Each of them sees a part of every batch, and owns all latents or some.
    """

    owns_all_latents = True
    leads = True  # and so writes what all have made together

    def combined(self, sae: SparseAutoencoder, step: reference_loss.StepLoss) -> reference_loss.StepLoss:
        """The step on the whole batch, of the latents that this process owns; sets their gradients anew."""
        return step

    def clip_(self, sae: SparseAutoencoder, parameters: list[nn.Parameter], max_norm: float) -> None:
        """Scale gradients down to `max_norm`, that of all parameters of all processes together."""
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def totals(self, *values: float) -> list[float]:
        """Sums over the processes."""
        return list(values)

    def decided(self, whether: bool) -> bool:
        """What the leading process says."""
        return whether

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of all latents from one of this process's: any number of processes can go on from it."""
        return state

    def part_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of a checkpoint of all latents."""
        return state


_ALONE = SingleProcess()


class DeadLatents:
    """For each latent, on how many tokens it was open since it last fired."""

    def __init__(self, sae: SparseAutoencoder, dead_after_eligible_tokens: int) -> None:
        self._limit = dead_after_eligible_tokens
        self.eligible_since_fired: Float[Tensor, " latent"] = torch.zeros(sae.d_sae, device=sae.encoder.device)

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        return self.eligible_since_fired >= self._limit

    def update(self, sae: SparseAutoencoder, step: reference_loss.StepLoss) -> None:
        live = sae.mask.live()
        eligible = torch.bincount(step.mask_row, minlength=len(live)).to(live.dtype) @ live
        self.eligible_since_fired = torch.where(step.fired, 0.0, self.eligible_since_fired + eligible)

    def copy_(self, copies: Copies) -> None:
        self.eligible_since_fired[copies.target] = self.eligible_since_fired[copies.source]


def train(
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    settings: TrainingSettings,
    label: str,
    after_step: Callable[[int], None] = lambda done: None,
    checkpoints: Checkpoints | None = None,
    on_point: Callable[[CurvePoint], None] = lambda point: None,
    together: SingleProcess = _ALONE,
) -> Trained:
    """Train `sae` in place, on its device. Parameters that require no gradient stay as they are.

    Args:
        batches: `n_steps` of them, such as `training_batches`; the SAE's center and scale must suit their vectors.
        after_step: called with the number of steps done, after each.
        checkpoints: to go on from and to write. `batches` must then begin behind the `checkpoints.done` first ones;
            the outcome is that of a training that was never stopped, bit for bit.
        on_point: called with each point of the curve as it comes.
        together: the processes that train one SAE; `batches` then are this one's parts of them.

    Raises:
        NothingToDo: fewer kept tokens than a batch.
        DegenerateResult: the loss is not finite or diverges, all latents are dead, or the trained SAE explains
            nothing or holds numbers that are not finite. Checkpoints stay as they are.
    """
    runtime.keep_freed_memory()
    mask_parameters = sae.mask.openness_parameters()
    own = [p for p in sae.parameters() if p.requires_grad and all(p is not other for other in mask_parameters)]
    optimizer = torch.optim.Adam(
        [
            {"params": own, "lr": settings.learning_rate},
            {"params": mask_parameters, "lr": settings.mask_learning_rate},
        ],
        fused=True,
    )
    highest = [group["lr"] for group in optimizer.param_groups]
    precision = product_precision(settings, sae.rule, sae.encoder.device.type)
    deaths = DeadLatents(sae, settings.dead_after_eligible_tokens)
    curve: list[CurvePoint] = []
    snapshots = MaskSnapshots(sae.mask, settings.n_steps)
    started = time.perf_counter()
    behind = 0 if checkpoints is None else checkpoints.done
    if checkpoints is not None and behind:
        state = checkpoints.read()
        curve, seconds = _restore_(sae, optimizer, deaths, together.part_of(state))
        snapshots.restore_(state)
        started -= seconds
    if checkpoints is not None:
        n_bytes = 3.0 * sum(parameter.nbytes for parameter in sae.parameters())  # with Adam's moments
        checkpoints.expect(n_bytes if together.owns_all_latents else together.totals(n_bytes)[0])

    def stays() -> str:
        if checkpoints is None or not checkpoints.done:
            return ""
        return f"; the checkpoint after {checkpoints.done} steps stays in {checkpoints.folder}"

    n_tokens = (settings.n_steps - behind) * settings.batch_tokens
    with progress_bar(f"train {label}", n_tokens, "tokens") as advance:
        for done, batch in enumerate((batch.to(sae.encoder.device) for batch in batches), start=behind + 1):
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * _rate_factor(done - 1, settings)
            for part in (sae.mask, sae.rule):
                part.before_step(done - 1, settings.n_steps)
            step = fast_loss.fast_gradients(
                sae,
                batch.vectors,
                batch.positions(sae.mask.settings.position_origin),
                dead=deaths.dead,
                aux_k=settings.aux_k,
                precision=precision,
                loss_tokens=settings.batch_tokens,
                details=sae.mask.watches,
            )
            if not math.isfinite(step.reconstruction):
                raise DegenerateResult(
                    f"the loss of {label} is {step.reconstruction} at step {done}: lower learning_rate = "
                    f"{settings.learning_rate}, or look for NaN in the vectors{stays()}"
                )
            step = together.combined(sae, step)
            if step.openness_gradient is not None:
                sae.mask.learn(step.openness_gradient)
            if sae.mask.watches:
                sae.mask.observe(_observed(step))
            if sae.mask.settings.gradient_sharing:
                share_gradients_(sae)
            if settings.max_gradient_norm is not None:
                together.clip_(sae, own, settings.max_gradient_norm)
            learning_rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            sae.mask.zero_grad()  # the SAE's own gradients are set anew each step
            operations.unit_rows_(sae.decoder.detach())
            sae.rule.after_step(step.least)
            deaths.update(sae, step)
            copies = sae.mask.after_step(done, settings.n_steps)
            if copies is not None:
                copy_latents_(sae, copies)
                _copy_moments_(optimizer, sae, copies)
                deaths.copy_(copies)
            snapshots.after_step(sae.mask, done)
            if done % _CURVE_EVERY == 0 or done in (1, settings.n_steps):
                n_dead = int(deaths.dead.sum())
                curve.append(_point(sae, batch, step, done, settings, learning_rate, n_dead, together))
                _check_alive(curve[-1], n_dead == sae.d_sae, label, settings, stays())
                on_point(curve[-1])
            advance(settings.batch_tokens)
            after_step(done)
            if checkpoints is not None and together.decided(checkpoints.due(at_end=done == settings.n_steps)):
                seconds = time.perf_counter() - started
                state = together.whole(_state(sae, optimizer, deaths, curve, seconds)) | snapshots.state()
                broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
                if broken:
                    raise DegenerateResult(
                        f"{label} holds NaN or infinite numbers after step {done} (in {', '.join(broken[:3])}): lower "
                        f"learning_rate = {settings.learning_rate}{stays()}"
                    )
                if together.leads:
                    checkpoints.write(done, state)
    flaw = flaw_of(sae)
    if together.totals(float(flaw is not None))[0]:
        raise DegenerateResult(
            f"{label}: {flaw or 'the part of another process is useless'} after {settings.n_steps} steps: lower "
            f"learning_rate = {settings.learning_rate}, or look for NaN in what it starts from{stays()}"
        )
    final = curve[-1]
    if final.l0 == 0 or not final.explained_variance > 0:
        raise DegenerateResult(
            f"{label} codes {final.l0:.3g} latents a token and explains {final.explained_variance:.3g} of the variance "
            f"after {settings.n_steps} steps: train longer, or change learning_rate = {settings.learning_rate}"
        )
    n_tokens = settings.n_steps * settings.batch_tokens
    return Trained(sae, curve, snapshots, deaths.dead, n_tokens, time.perf_counter() - started)


def _check_alive(point: CurvePoint, all_dead: bool, label: str, settings: TrainingSettings, stays: str) -> None:
    """
    Raises:
        DegenerateResult: going on would be in vain.
    """
    remedy = f"lower learning_rate = {settings.learning_rate}{stays}"
    if point.explained_variance < -_DIVERGED:
        raise DegenerateResult(
            f"the loss of {label} diverges: {point.loss:.3g} at step {point.step}, more than {_DIVERGED} times the "
            f"variance of the vectors: {remedy}"
        )
    if all_dead and point.l0 == 0:
        raise DegenerateResult(
            f"all {point.dead_latents} latents of {label} are dead at step {point.step}, none fired on the last "
            f"{settings.dead_after_eligible_tokens:,} tokens: lower the rule's penalty, or {remedy}"
        )


_CURVE, _SINCE_FIRED, _SECONDS = "curve", "eligible_since_fired", "seconds"


def _state(
    sae: SparseAutoencoder,
    optimizer: torch.optim.Adam,
    deaths: DeadLatents,
    curve: list[CurvePoint],
    seconds: float,
) -> dict[str, Tensor]:
    """All that the rest of a training depends on, but for the batches, which their number decides."""
    found = {f"sae.{name}": tensor.detach() for name, tensor in (*sae.named_parameters(), *sae.named_buffers())}
    for name, parameter in sae.named_parameters():
        found |= {f"adam.{name}.{what}": value for what, value in optimizer.state.get(parameter, {}).items()}
    found[_SINCE_FIRED] = deaths.eligible_since_fired
    found[_CURVE] = torch.tensor([astuple(point) for point in curve], dtype=torch.float64)
    found[_SECONDS] = torch.tensor(seconds, dtype=torch.float64)
    return found


def rows_of_latents(sae: SparseAutoencoder, state: dict[str, Tensor]) -> list[str]:
    """The names in a checkpoint whose tensors have a row or a number for each latent, but for the mask's."""
    own = {
        name
        for name, parameter in sae.named_parameters()
        if any(parameter is other for other in sae.latent_parameters())
    }
    keys = [(key, *key.split(".", 1)) for key in state if "." in key]
    found = [key for key, kind, name in keys if kind == "sae" and name in own]
    adam = [(key, name.rpartition(".")[0]) for key, kind, name in keys if kind == "adam"]
    return [*found, *(key for key, name in adam if name in own and state[key].dim()), _SINCE_FIRED]


def _restore_(
    sae: SparseAutoencoder, optimizer: torch.optim.Adam, deaths: DeadLatents, state: dict[str, Tensor]
) -> tuple[list[CurvePoint], float]:
    """Put back what `_state` gave; returns the curve and the seconds until then."""
    known = set(sae.state_dict())
    with torch.no_grad():
        for name, tensor in state.items():
            kind, _, mask_row = name.partition(".")
            owner, _, own = mask_row.rpartition(".")
            if kind == "sae" and mask_row not in known:
                setattr(sae.get_submodule(owner), own, tensor.to(sae.encoder.device))
            elif kind == "adam":
                optimizer.state[sae.get_parameter(owner)][own] = tensor.to(sae.encoder.device)
    sae.load_state_dict({name: state[f"sae.{name}"] for name in known})
    deaths.eligible_since_fired = state[_SINCE_FIRED].to(deaths.eligible_since_fired.device)
    types = [field.type for field in fields(CurvePoint)]
    points = [[kind(value) for kind, value in zip(types, line, strict=True)] for line in state[_CURVE].tolist()]  # type: ignore[operator]
    return [CurvePoint(*point) for point in points], float(state[_SECONDS])


def share_gradients_(sae: SparseAutoencoder) -> None:
    """Mix each latent's gradient with the mean over the copies of the latent that it was copied from."""
    tie = sae.mask.settings.gradient_sharing
    origin, copy_of = sae.mask.copied_from.to(sae.encoder.device).unique(return_inverse=True)
    if len(origin) == sae.d_sae:
        return
    count = torch.bincount(copy_of, minlength=len(origin)).to(sae.encoder.dtype)
    copies = operations.Grouped(copy_of, len(origin))
    every = torch.arange(sae.d_sae, device=copy_of.device)
    for parameter in sae.latent_parameters():
        gradient = parameter.grad
        assert gradient is not None
        rows = gradient.view(sae.d_sae, -1)
        mean = copies.sum_rows(1 / count[copy_of], rows, every)
        rows.mul_(1 - tie).add_(mean[copy_of], alpha=tie)


def _observed(step: reference_loss.StepLoss) -> Observed:
    codes = step.codes
    assert codes is not None
    assert step.residual is not None
    return Observed(step.mask_row, codes.token, codes.latent, codes.value, step.residual)


def _copy_moments_(optimizer: torch.optim.Adam, sae: SparseAutoencoder, copies: Copies) -> None:
    """Give copied latents the Adam moments of those they copy."""
    for parameter in sae.latent_parameters():
        for moment in optimizer.state[parameter].values():
            if moment.dim():  # not the count of steps
                moment[copies.target] = moment[copies.source]


def _rate_factor(done: int, settings: TrainingSettings) -> float:
    """What the learning rate is multiplied by at the step after `done` steps."""
    warmup, decay = settings.warmup_fraction * settings.n_steps, settings.decay_fraction * settings.n_steps
    rising = (done + 1) / warmup if warmup else 1.0
    falling = (settings.n_steps - done) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def _point(
    sae: SparseAutoencoder,
    batch: Batch,
    step: reference_loss.StepLoss,
    done: int,
    settings: TrainingSettings,
    learning_rate: float,
    n_dead: int,
    together: SingleProcess,
) -> CurvePoint:
    n = len(batch)
    with torch.no_grad():
        squares = float(sae.normalize(batch.vectors).square().sum())
        openness = sae.mask.openness()
    squares, lost, auxiliary, n_active = together.totals(
        squares, step.reconstruction * n, step.auxiliary * n, float(step.n_active)
    )
    dead, opened, n_gates = float(n_dead), float(openness.sum()), float(openness.numel())
    if not together.owns_all_latents:
        dead, opened, n_gates = together.totals(dead, opened, n_gates)
    return CurvePoint(
        step=done,
        tokens=done * settings.batch_tokens,
        learning_rate=learning_rate,
        loss=lost / settings.batch_tokens,
        auxiliary_loss=auxiliary / settings.batch_tokens,
        explained_variance=1 - lost / squares,
        l0=n_active / settings.batch_tokens,
        dead_latents=int(dead),
        mean_openness=opened / n_gates,
    )
