"""Strategies to train one SAE: in a single process, or in several that torch.distributed has connected.

`SingleProcess` is the interface that the training loop calls. `ByData` and `ByPosition` divide the work:

- By data, each process has a full copy of the SAE and a part of every batch, and gradients are summed.
- By position, for strict masks, each process owns groups of positions with the latents that are open there, their
  gradients and their optimizer moments. It trains on the tokens at these positions. Only biases that belong to no
  latent are shared.

Either way the numbers equal those of a single process with the same batches, up to the order of sums.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Int
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.masks.base import PositionMask
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.selection import LargestOfToken
from posmask.training.reference_loss import StepLoss
from posmask.training.state import latent_row_names

__all__ = ["ByData", "ByPosition", "Distributed", "SingleProcess", "position_groups", "why_undivided"]


class SingleProcess:
    """Single-process strategy: every collective is a no-op.

    Attributes:
        owns_all_latents: whether this process trains every latent of the SAE.
        leads: whether this process writes the checkpoints and curves of all processes.
    """

    owns_all_latents = True
    leads = True

    def combine(self, sae: SparseAutoencoder, step: StepLoss) -> StepLoss:
        """Combine a step over the processes, and set the gradients of `sae` to those of the whole batch."""
        return step

    def gradient_norm(self, sae: SparseAutoencoder, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of the gradients over the parameters of all processes."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def totals(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        return list(values)

    def leader_decision(self, decision: bool) -> bool:
        """The decision of the leading process."""
        return decision

    def full_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The training state of all latents, from this process's; any number of processes can resume from it."""
        return state

    def local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of a training state of all latents."""
        return state


class Distributed(SingleProcess):
    """Base of the strategies for several processes.

    Attributes:
        rank: the number of this process.
        n_processes: how many processes train the SAE.
        bytes_sent: bytes that this process handed to collectives, counted once per call. The traffic depends on the
            backend; a ring sends up to twice as much.
    """

    def __init__(self) -> None:
        self.rank, self.n_processes = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0

    def token_indices(self, position: Int[Tensor, " token"]) -> Int[Tensor, " index"]:
        """Indices of this process's tokens in a batch with these positions, for `training_batches`."""
        raise NotImplementedError

    def _sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return tensor

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process in the order of ranks; their first sizes may differ."""
        sizes = self._sum_(_one_hot(self.rank, self.n_processes, len(tensor), tensor.device)).tolist()
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        self.bytes_sent += padded.numel() * padded.element_size()
        return [part[:size] for part, size in zip(gathered, sizes, strict=True)]

    @property
    def leads(self) -> bool:  # type: ignore[override]
        """Whether this process has rank 0."""
        return self.rank == 0

    def totals(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # nccl sums no tensors of the CPU
        return self._sum_(torch.tensor(values, dtype=torch.float64, device=device)).tolist()

    def leader_decision(self, decision: bool) -> bool:
        """The decision of the leading process."""
        return self.totals(float(decision and self.leads))[0] > 0


def _one_hot(index: int, length: int, value: int, device: torch.device) -> Int[Tensor, " index"]:
    vector = torch.zeros(length, dtype=torch.int64, device=device)
    vector[index] = value
    return vector


class ByData(Distributed):
    """Each process trains on every n-th token of a batch, for n processes.

    Args:
        sae: the SAE, with equal parameters in all processes.

    Raises:
        BadSetting: the rule chooses over whole batches, or the mask routes by vectors.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        _check_rule(sae)
        if sae.mask.reads_vectors:
            raise BadSetting(
                f"a {sae.mask.settings.kind} mask balances its experts over a whole batch, and a process has only a "
                "part of it: train in one process"
            )

    def token_indices(self, position: Int[Tensor, " token"]) -> Int[Tensor, " index"]:
        """Indices of this process's tokens in a batch with these positions, for `training_batches`."""
        return torch.arange(self.rank, len(position), self.n_processes)

    def combine(self, sae: SparseAutoencoder, step: StepLoss) -> StepLoss:
        """Sum the gradients over the processes; gather the codes only for a mask that observes them."""
        gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
        if step.openness_gradient is not None:
            gradients.append(step.openness_gradient)
        flat = self._sum_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
        fired, mask_row = self._sum_(step.fired.to(torch.uint8)) > 0, torch.cat(self._gather(step.mask_row))
        if not sae.mask.watches:
            return replace(step, fired=fired, mask_row=mask_row, codes=None, residual=None)
        codes = step.codes
        assert codes is not None
        assert step.residual is not None
        residuals = self._gather(step.residual)
        n_tokens_before = sum(len(residual) for residual in residuals[: self.rank])
        token, latent, value = (
            torch.cat(self._gather(part)) for part in (codes.token + n_tokens_before, codes.latent, codes.value)
        )
        codes = Codes(token, latent, value, len(mask_row), codes.d_sae)
        return replace(step, fired=fired, mask_row=mask_row, codes=codes, residual=torch.cat(residuals))


class ByPosition(Distributed):
    """Each process owns groups of positions and the latents that are open there.

    Attributes:
        local_sae: an SAE of this process's latents, to be trained on its tokens.

    Args:
        sae: the full SAE, equal in all processes.
        position: the position of every training token; it balances the load of the processes.

    Raises:
        BadSetting: the rule chooses over whole batches, the mask changes during training, or it has fewer groups of
            positions that share no latent than there are processes.
    """

    owns_all_latents = False

    def __init__(self, sae: SparseAutoencoder, position: Int[Tensor, " token"]) -> None:
        super().__init__()
        _check_rule(sae)
        self._full_sae = sae
        n_tokens = torch.bincount(position.long(), minlength=sae.mask.n_positions)
        owner_of_position, owner_of_latent = _owners(sae, n_tokens, self.n_processes)
        self._owner = owner_of_position
        self._latents = [(owner_of_latent == rank).nonzero()[:, 0] for rank in range(self.n_processes)]
        self.local_sae = _local_sae(sae, self._latents[self.rank])

    def token_indices(self, position: Int[Tensor, " token"]) -> Int[Tensor, " index"]:
        """Indices of this process's tokens in a batch with these positions, for `training_batches`."""
        return (self._owner[position.long()] == self.rank).nonzero()[:, 0]

    def combine(self, sae: SparseAutoencoder, step: StepLoss) -> StepLoss:
        """Sum the gradients of the shared parameters."""
        for parameter in _shared(sae):
            assert parameter.grad is not None
            self._sum_(parameter.grad)
        return step

    def gradient_norm(self, sae: SparseAutoencoder, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of the gradients over the latents of all processes and the shared parameters."""
        shared = _shared(sae)
        norms = [
            torch.linalg.vector_norm(parameter.grad)
            for parameter in parameters
            if all(parameter is not other for other in shared)
        ]
        of_latents = self._sum_(torch.stack(norms).square().sum())
        of_shared = [torch.linalg.vector_norm(parameter.grad).square() for parameter in shared]
        return (of_latents + torch.stack(of_shared).sum()).sqrt()

    def full_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The training state of all latents, gathered from all processes."""
        full = dict(state)
        for name in latent_row_names(self.local_sae, state):
            full[name] = state[name].new_zeros(self._full_sae.d_sae, *state[name].shape[1:])
            for latents, rows in zip(self._latents, self._gather(state[name]), strict=True):
                full[name][latents] = rows
        return full | _mask_state(self._full_sae)

    def local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The training state of this process's latents."""
        names = latent_row_names(self.local_sae, state)
        local = {name: tensor[self._latents[self.rank]] if name in names else tensor for name, tensor in state.items()}
        return local | _mask_state(self.local_sae)

    def merge_(self) -> SparseAutoencoder:
        """Copy the parts of all processes into the full SAE, in every process, and return it."""
        with torch.no_grad():
            parameters = zip(self._full_sae.latent_parameters(), self.local_sae.latent_parameters(), strict=True)
            for full, local in parameters:
                for latents, rows in zip(self._latents, self._gather(local.detach()), strict=True):
                    full[latents] = rows
            for full, local in zip(_shared(self._full_sae), _shared(self.local_sae), strict=True):
                full.copy_(local)
        return self._full_sae


def _shared(sae: SparseAutoencoder) -> list[nn.Parameter]:
    """The trained parameters that belong to no latent."""
    biases = (sae.decoder_bias, sae.position_bias)
    return [bias for bias in biases if bias is not None and bias.requires_grad]


def _mask_state(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The mask's entries of a training state; a mask that is divided by position does not change in training."""
    return {f"sae.{name}": tensor for name, tensor in sae.named_buffers() if name.startswith("mask.")}


def _check_rule(sae: SparseAutoencoder) -> None:
    choice = sae.rule.training_choice()
    if not (choice is None or isinstance(choice, LargestOfToken)) or sae.rule.level is not None:
        raise BadSetting(
            f"the rule {sae.rule.settings.kind} chooses over whole batches or dictionaries, and a process has only a "
            "part of them: choose topk, relu, jumprelu or gated, or train in one process"
        )


def _owners(
    sae: SparseAutoencoder, n_tokens: Int[Tensor, " position"], n_processes: int
) -> tuple[Int[Tensor, " position"], Int[Tensor, " latent"]]:
    """The process that owns each position and each latent: groups by falling cost, each to the least loaded process."""
    mask = sae.mask
    if why := why_undivided(mask):
        raise BadSetting(why)
    live = mask.live().cpu() > 0
    n_groups, group = position_groups(mask)
    if n_groups < n_processes:
        raise BadSetting(
            f"the {mask.settings.kind} mask makes {n_groups} groups of positions that share no latent, fewer than the "
            f"{n_processes} processes: choose a strict mask with at least as many groups, such as slice, or train by "
            "data"
        )
    cost = [float((n_tokens * live.sum(1))[group == number].sum()) for number in range(n_groups)]
    load, owner = [0.0] * n_processes, torch.zeros(n_groups, dtype=torch.int64)
    for number in sorted(range(n_groups), key=lambda number: -cost[number]):
        owner[number] = least = min(range(n_processes), key=lambda rank: load[rank])
        load[least] += cost[number]
    by_position = owner[group]
    return by_position, by_position[live.int().argmax(0)]


def why_undivided(mask: PositionMask) -> str | None:
    """The reason why a mask's latents cannot be divided by position, or None if they can."""
    if not (mask.changes_in_training or mask.reads_vectors or mask.settings.gradient_sharing):
        return None
    return (
        f"a {mask.settings.kind} mask that changes in training, or shares gradients, cannot be divided by position: "
        "choose a mask that stays fixed, such as slice, or train by data"
    )


def position_groups(mask: PositionMask) -> tuple[int, Int[Tensor, " position"]]:
    """Count the groups of positions that share no latent, and return the group of each position."""
    live = mask.live().cpu()
    n_groups, group = connected_components((live @ live.T).numpy() > 0)
    return n_groups, torch.from_numpy(group).long()


def _local_sae(sae: SparseAutoencoder, latents: Int[Tensor, " local_latent"]) -> SparseAutoencoder:
    local = SparseAutoencoder(
        sae.d_model, sae.rule.settings, sae.mask.part(latents), position_bias=sae.position_bias_kind
    )
    local = local.to(sae.encoder.device, sae.encoder.dtype)
    with torch.no_grad():
        for parameter, full in zip(local.latent_parameters(), sae.latent_parameters(), strict=True):
            parameter.copy_(full[latents])
        local.decoder_bias.copy_(sae.decoder_bias)
        if local.position_bias is not None and sae.position_bias is not None:
            local.position_bias.copy_(sae.position_bias)
    local.center, local.scale = sae.center, sae.scale
    return local
