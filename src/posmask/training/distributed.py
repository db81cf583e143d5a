"""One SAE trained by several processes, which torch.distributed has connected.

By data: each process has the whole SAE and a part of every batch, and gradients are summed. By position, for strict
masks: each owns some groups of positions with the latents that are open there, their gradients and their optimizer's
moments, and sees the tokens at these positions; the decoder bias is all they share. Either way the numbers are those
of one process with the same batches, up to the order of sums.
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
from posmask.training.loop import SingleProcess, rows_of_latents
from posmask.training.reference_loss import StepLoss

__all__ = ["ByData", "ByPosition", "Distributed", "position_groups", "why_undivided"]


class Distributed(SingleProcess):
    """What both ways share.

    `bytes_sent` counts what this process handed to the others, once for each sum or exchange: what the network carries
    depends on how the backend does it, for a ring up to twice as much.
    """

    def __init__(self) -> None:
        self.rank, self.n_processes = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0

    def mine(self, position: Int[Tensor, " token"]) -> Int[Tensor, " some"]:
        """The numbers of a batch's tokens that are this process's: for `training_batches`."""
        raise NotImplementedError

    def _sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return tensor

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, in the order of their ranks. They may differ in their first size."""
        sizes = self._sum_(_one_hot(self.rank, self.n_processes, len(tensor), tensor.device)).tolist()
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        self.bytes_sent += padded.numel() * padded.element_size()
        return [part[:size] for part, size in zip(found, sizes, strict=True)]

    @property
    def leads(self) -> bool:  # type: ignore[override]
        return self.rank == 0

    def totals(self, *values: float) -> list[float]:
        return self._sum_(torch.tensor(values, dtype=torch.float64)).tolist()

    def decided(self, whether: bool) -> bool:
        return self.totals(float(whether and self.leads))[0] > 0


def _one_hot(mask_row: int, length: int, value: int, device: torch.device) -> Int[Tensor, " place"]:
    found = torch.zeros(length, dtype=torch.int64, device=device)
    found[mask_row] = value
    return found


class ByData(Distributed):
    """Each process sees every so many-th token of a batch; `sae` must be equal in all of them.

    Raises:
        BadSetting: the rule chooses over the whole batch, or the mask routes by vectors; no process sees enough.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        _check_rule(sae)
        if sae.mask.reads_vectors:
            raise BadSetting(
                f"a {sae.mask.settings.kind} mask balances its experts over a whole batch, of which a process sees a "
                "part: train it in one process"
            )

    def mine(self, position: Int[Tensor, " token"]) -> Int[Tensor, " some"]:
        return torch.arange(self.rank, len(position), self.n_processes)

    def combined(self, sae: SparseAutoencoder, step: StepLoss) -> StepLoss:
        gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
        if step.openness_gradient is not None:
            gradients.append(step.openness_gradient)
        flat = self._sum_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, whole in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))
        fired, mask_row = self._sum_(step.fired.to(torch.uint8)) > 0, torch.cat(self._all(step.mask_row))
        if not sae.mask.watches:
            return replace(step, fired=fired, mask_row=mask_row, codes=None, residual=None)
        codes = step.codes
        assert codes is not None
        assert step.residual is not None
        residuals = self._all(step.residual)
        before = sum(len(part) for part in residuals[: self.rank])
        token, latent, value = (
            torch.cat(self._all(part)) for part in (codes.token + before, codes.latent, codes.value)
        )
        codes = Codes(token, latent, value, len(mask_row), codes.d_sae)
        return replace(step, fired=fired, mask_row=mask_row, codes=codes, residual=torch.cat(residuals))


class ByPosition(Distributed):
    """Each process owns groups of positions and the latents that are open there.

    Attributes:
        part: this process's latents as an SAE of their own, to be trained on its tokens.

    Args:
        position: of every token to train on, so that the work is shared out evenly.

    Raises:
        BadSetting: latents are not bound to groups of positions that are apart, or these are fewer than processes.
    """

    owns_all_latents = False

    def __init__(self, sae: SparseAutoencoder, position: Int[Tensor, " token"]) -> None:
        super().__init__()
        _check_rule(sae)
        self._whole = sae
        n_tokens = torch.bincount(position.long(), minlength=sae.mask.n_positions)
        owner_of_position, owner_of_latent = _owners(sae, n_tokens, self.n_processes)
        self._owner = owner_of_position
        self._latents = [(owner_of_latent == rank).nonzero()[:, 0] for rank in range(self.n_processes)]
        self.part = _part(sae, self._latents[self.rank])

    def mine(self, position: Int[Tensor, " token"]) -> Int[Tensor, " some"]:
        return (self._owner[position.long()] == self.rank).nonzero()[:, 0]

    def combined(self, sae: SparseAutoencoder, step: StepLoss) -> StepLoss:
        assert sae.decoder_bias.grad is not None
        self._sum_(sae.decoder_bias.grad)
        return step

    def clip_(self, sae: SparseAutoencoder, parameters: list[nn.Parameter], max_norm: float) -> None:
        norms = [torch.linalg.vector_norm(one.grad) for one in parameters if one is not sae.decoder_bias]
        own = torch.stack(norms).square().sum()
        shared = torch.linalg.vector_norm(sae.decoder_bias.grad).square()
        norm = (self._sum_(own) + shared).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(state)
        for name in rows_of_latents(self.part, state):
            found[name] = state[name].new_zeros(self._whole.d_sae, *state[name].shape[1:])
            for latents, rows in zip(self._latents, self._all(state[name]), strict=True):
                found[name][latents] = rows
        return found | _mask_state(self._whole)

    def part_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = rows_of_latents(self.part, state)
        own = {name: tensor[self._latents[self.rank]] if name in rows else tensor for name, tensor in state.items()}
        return own | _mask_state(self.part)

    def join_(self) -> SparseAutoencoder:
        """Put all parts back into the SAE that was divided, in every process; returns it."""
        with torch.no_grad():
            for whole, own in zip(self._whole.latent_parameters(), self.part.latent_parameters(), strict=True):
                for latents, rows in zip(self._latents, self._all(own.detach()), strict=True):
                    whole[latents] = rows
            self._whole.decoder_bias.copy_(self.part.decoder_bias)
        return self._whole


def _mask_state(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The entries of a checkpoint that are a mask's: where it can be divided by position, nothing moves them."""
    return {f"sae.{name}": tensor for name, tensor in sae.named_buffers() if name.startswith("mask.")}


def _check_rule(sae: SparseAutoencoder) -> None:
    choice = sae.rule.training_choice()
    if not (choice is None or isinstance(choice, LargestOfToken)) or sae.rule.level is not None:
        raise BadSetting(
            f"the rule {sae.rule.settings.kind} chooses over whole batches or dictionaries, of which a process sees a "
            "part: take topk, relu, jumprelu or gated, or train in one process"
        )


def _owners(
    sae: SparseAutoencoder, n_tokens: Int[Tensor, " position"], n_processes: int
) -> tuple[Int[Tensor, " position"], Int[Tensor, " latent"]]:
    """Which process owns each position and each latent: groups that share no latent, the dearest dealt out first."""
    mask = sae.mask
    if why := why_undivided(mask):
        raise BadSetting(why)
    live = mask.live() > 0
    n_groups, group = position_groups(mask)
    if n_groups < n_processes:
        raise BadSetting(
            f"the {mask.settings.kind} mask makes {n_groups} groups of positions that share no latent, for "
            f"{n_processes} processes: take a strict mask with at least as many groups, such as slice, or train by data"
        )
    cost = [float((n_tokens * live.sum(1))[group == number].sum()) for number in range(n_groups)]
    burden, owner = [0.0] * n_processes, torch.zeros(n_groups, dtype=torch.int64)
    for number in sorted(range(n_groups), key=lambda number: -cost[number]):
        owner[number] = least = min(range(n_processes), key=lambda rank: burden[rank])
        burden[least] += cost[number]
    by_position = owner[group]
    return by_position, by_position[live.int().argmax(0)]


def why_undivided(mask: PositionMask) -> str | None:
    """Why a mask's latents cannot be owned by positions; None where they can."""
    if not (mask.changes_in_training or mask.reads_vectors or mask.settings.gradient_sharing):
        return None
    return (
        f"a {mask.settings.kind} mask that changes in training, or ties latents, cannot be divided by position: take "
        "one that stays as it is, such as slice, or train by data"
    )


def position_groups(mask: PositionMask) -> tuple[int, Int[Tensor, " position"]]:
    """How many groups of positions share no latent with each other, and which is each position's."""
    live = mask.live()
    n_groups, group = connected_components((live @ live.T).numpy() > 0)
    return n_groups, torch.from_numpy(group).long()


def _part(sae: SparseAutoencoder, latents: Int[Tensor, " some"]) -> SparseAutoencoder:
    part = SparseAutoencoder(sae.d_model, sae.rule.settings, sae.mask.part(latents)).to(sae.encoder.dtype)
    with torch.no_grad():
        for own, whole in zip(part.latent_parameters(), sae.latent_parameters(), strict=True):
            own.copy_(whole[latents])
        part.decoder_bias.copy_(sae.decoder_bias)
    part.center, part.scale = sae.center, sae.scale
    return part
