"""Derive an SAE from another: copied latents, other centering constants, no mask."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posmask.errors import BadSetting
from posmask.masks import make_mask, mask_settings
from posmask.masks.base import Copies, PositionMask
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import RuleSettings

__all__ = ["copied_latents", "copy_latents_", "renormalize_", "warm_start", "without_mask"]


def copy_latents_(sae: SparseAutoencoder, copies: Copies) -> None:
    """Copy the parameters of latents, including those of the rule, from `copies.source` to `copies.target`."""
    with torch.no_grad():
        for tensor in (*sae.latent_parameters(), *sae.rule.buffers()):
            if tensor.dim():  # a scalar belongs to all latents
                tensor[copies.target] = tensor[copies.source]


def without_mask(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy of an SAE with every latent open everywhere."""
    settings = mask_settings({"kind": "open", "position_origin": sae.mask.settings.position_origin})
    mask = make_mask(settings, sae.mask.n_positions, sae.d_sae)
    copy = SparseAutoencoder(sae.d_model, sae.rule.settings, mask, position_bias=sae.position_bias_kind)
    weights = {name: value for name, value in sae.state_dict().items() if "mask." not in name}
    copy.load_state_dict({**copy.state_dict(), **weights})
    return copy


def renormalize_(sae: SparseAutoencoder, center: Float[Tensor, " d_model"], scale: Float[Tensor, ""]) -> None:
    """Rebase an SAE without a router to new centering constants, without changing its function.

    Codes become sae.scale / scale times as large. An imported SAE then trains in the units of the study's data.
    """
    factor = sae.scale / scale
    with torch.no_grad():
        sae.decoder_bias.copy_((sae.decoder_bias * sae.scale + sae.center - center) / scale)
        if sae.position_bias is not None:
            sae.position_bias.mul_(factor)
        sae.encoder_bias.mul_(factor)
        sae.rule.rescale_(factor.expand(sae.d_sae))
    sae.center, sae.scale = center.clone(), scale.clone()


def warm_start(
    source: SparseAutoencoder, mask: PositionMask, seed: int = 0, rule: RuleSettings | None = None
) -> SparseAutoencoder:
    """An SAE with this mask whose latents are copies of those of an unmasked SAE.

    If the mask has as many latents as the source, each is a copy of one. Otherwise the free latents copy the first
    latents and each block of the mask copies the rest, so that exactly one copy of each latent is live at every
    position and the new SAE computes the function of the source (*upcycling*). `split` starts with one copy of each
    latent; its other latents are unborn.

    Args:
        source: an SAE with an open mask.
        mask: the mask of the new SAE; its `copied_from` is set.
        seed: seed of the weights that are not copied.
        rule: settings to train with, under which codes are those of the source; None for those of the source.

    Raises:
        BadSetting: the source has a mask, or the mask does not open one copy of each latent at every position.
    """
    _check_source(source, mask)
    unborn = ~(mask.live() > 0).any(0)
    copied = copied_latents(source, mask)
    sae = SparseAutoencoder(source.d_model, rule or source.rule.settings, mask, seed, source.position_bias_kind).to(
        source.encoder.dtype
    )
    mask.copied_from[~unborn] = copied[~unborn]
    weights = source.state_dict()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name.startswith("mask.") or name == "rule.level":  # the mask decides the level
                continue
            if name in ("encoder", "encoder_bias", "decoder") or (name.startswith("rule.") and weights[name].dim()):
                tensor[~unborn] = weights[name][copied[~unborn]]
            else:
                tensor.copy_(weights[name])
    return sae


def _check_source(source: SparseAutoencoder, mask: PositionMask) -> None:
    if source.mask.settings.kind != "open":
        raise BadSetting(
            f"the SAE to start from has a {source.mask.settings.kind!r} mask: start from one that is open everywhere"
        )
    if source.mask.n_positions != mask.n_positions:
        raise BadSetting(
            f"the SAE to start from was trained on contexts of {source.mask.n_positions} positions, not "
            f"{mask.n_positions}: harvest at that length, or start from another SAE"
        )
    if mask.reads_vectors:
        raise BadSetting(
            f"a {mask.settings.kind!r} mask multiplies codes by its router's p, so it cannot start as "
            "another SAE does: leave out init_from"
        )


def copied_latents(source: SparseAutoencoder, mask: PositionMask) -> Int[Tensor, " latent"]:
    """The latent of the source that each latent of the mask copies; of unborn latents any.

    Raises:
        BadSetting: not exactly one copy of each latent is live at every position.
    """
    n_free, n_latents = mask.n_free, source.d_sae
    latent = torch.arange(mask.d_sae)
    live = mask.live() > 0
    if mask.d_sae == n_latents and bool(live.any(0).all()):
        return latent
    families, family = mask.copied_from.unique(return_inverse=True)
    if len(families) == n_latents:
        return family
    per_block = max(1, n_latents - n_free)
    copied = torch.where(latent < n_free, latent, n_free + (latent - n_free) % per_block)
    once = all(torch.equal(copied[row].sort().values, torch.arange(n_latents)) for row in live)
    if n_free > n_latents or not once:
        raise BadSetting(
            f"a {mask.settings.kind!r} mask of {mask.d_sae} latents does not open one copy of each of the "
            f"{n_latents} latents to start from at every position: use slice, band, windows, split or cohort with "
            'budget = "compute", or as many latents as the source has'
        )
    return copied
