"""Controls of a masked SAE: what its mask gives without training.

For a mask that depends only on positions, an unmasked SAE of the same seed gives two SAEs' worth of codes without a
training step, and the trained SAE itself a third:

    zero-step   the mask on the unmasked SAE: each latent is a copy of one of its latents
    matched     the codes of the unmasked SAE, multiplied by the openness of each copy at the token's position, so that
                pooling them is pooling the unmasked SAE by the mask's windows
    re-tied     the trained SAE with the copies of each latent replaced by their mean

Proposition: if the mask is 0 or 1 and opens exactly one copy of each latent at every position, zero-step and matched
codes are equal, and the reconstruction is that of the unmasked SAE. At every position the live latents are one copy of
each latent, with its encoder row and bias, so a rule that reads only the live pre-activations selects the same latents
with the same values; their decoder rows are equal. `tests/test_controls.py` checks it to the last bit.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import BadSetting
from posmask.evaluation.settings import may_have_controls
from posmask.masks.base import PositionMask
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.warm_start import copied_latents, warm_start

__all__ = ["Control", "controls_of"]


@dataclass(frozen=True)
class Control:
    """Codes to probe in place of those of the masked SAE.

    Attributes:
        encode: the codes of kept tokens.
        d_sae: number of latents.
        sae: the SAE whose reconstruction belongs to these codes.
    """

    encode: Callable[[Batch], Codes]
    d_sae: int
    sae: SparseAutoencoder


def controls_of(sae: SparseAutoencoder, unmasked: SparseAutoencoder | None) -> dict[str, Control]:
    """The controls of a masked SAE, by name; empty if its mask does not gate codes by position.

    Args:
        unmasked: the open SAE of the same seed, on the CPU; None leaves out the controls that need it. They are also
            left out if the mask does not open one copy of each of its latents at every position, nor has as many
            latents.
    """
    if not may_have_controls(sae.mask.settings) or sae.mask.is_open():
        return {}
    controls = {}
    if unmasked is not None and (latents := _copied(unmasked, sae.mask)) is not None:
        started = warm_start(unmasked, copy.deepcopy(sae.mask).cpu()).to(sae.encoder.device)
        controls["zero-step"] = Control(started.encode_batch, sae.d_sae, started)
        unmasked = unmasked.to(sae.encoder.device)
        controls["matched"] = Control(_by_mask(unmasked, sae.mask, latents), sae.d_sae, unmasked)
    if len(sae.mask.copied_from.unique()) < sae.d_sae:
        tied = retied(sae)
        controls["re-tied"] = Control(tied.encode_batch, sae.d_sae, tied)
    return controls


def _copied(unmasked: SparseAutoencoder, mask: PositionMask) -> Int[Tensor, " latent"] | None:
    """The latent of the unmasked SAE that each latent of the mask is a copy of; None if it has no such copies."""
    is_born = (mask.openness().detach() > 0).any(0)
    n_families, n_born = len(mask.copied_from[is_born].unique()), int(is_born.sum())
    if n_families < n_born and n_families != unmasked.d_sae:
        return None
    try:
        return copied_latents(unmasked, mask)
    except BadSetting:
        return None


def _by_mask(
    unmasked: SparseAutoencoder, mask: PositionMask, latents: Int[Tensor, " latent"]
) -> Callable[[Batch], Codes]:
    """The codes of an unmasked SAE, with the copies of each latent multiplied by their openness.

    Args:
        latents: the latent of the unmasked SAE that each latent of the mask is a copy of.
    """
    openness = mask.openness().detach()
    latents = latents.to(openness.device)
    copies = (openness > 0).any(0).nonzero()[:, 0]
    copies = copies[latents[copies].sort(stable=True).indices]  # by the latent that they copy
    n_copies = torch.bincount(latents[copies], minlength=unmasked.d_sae)
    first = n_copies.cumsum(0) - n_copies

    def encode(batch: Batch) -> Codes:
        codes = unmasked.encode_batch(batch)
        count = n_copies[codes.latent]
        entry = torch.arange(len(count), device=count.device).repeat_interleave(count)
        within = torch.arange(len(entry), device=count.device) - (count.cumsum(0) - count)[entry]
        latent = copies[first[codes.latent[entry]] + within]
        token = codes.token[entry]
        position = batch.positions(mask.settings.position_origin).long()[token]
        value = codes.value[entry] * openness[position.clamp(max=len(openness) - 1), latent]
        some = value != 0
        return Codes(token[some], latent[some], value[some], codes.n_tokens, mask.d_sae)

    return encode


def retied(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy of an SAE in which the copies of each latent have the mean of their weights; decoder rows have norm 1."""
    tied = copy.deepcopy(sae)
    _, family = sae.mask.copied_from.unique(return_inverse=True)
    is_live = (sae.mask.openness().detach() > 0).any(0).to(sae.encoder.dtype)  # unborn latents have no weight in a mean
    n = torch.zeros(int(family.max()) + 1, dtype=is_live.dtype, device=is_live.device).index_add_(0, family, is_live)
    with torch.no_grad():
        for parameter in (*tied.latent_parameters(), *tied.rule.buffers()):
            if parameter.dim() == 0 or not parameter.is_floating_point():
                continue
            weighted = parameter * is_live.view(-1, *[1] * (parameter.dim() - 1))
            total = torch.zeros(len(n), *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
            total.index_add_(0, family, weighted)
            mean = total / n.clamp(min=1).view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(
                torch.where((n > 0).view(-1, *[1] * (parameter.dim() - 1))[family], mean[family], parameter)
            )
        tied.decoder.div_(tied.decoder.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return tied
