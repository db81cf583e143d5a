"""Start an SAE from another: copies of its latents, other constants, no mask."""

import torch
from jaxtyping import Float
from torch import Tensor

from posmask.errors import BadSetting
from posmask.masks import make_mask, mask_settings
from posmask.masks.base import Copies, PositionMask
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import RuleSettings

__all__ = ["copy_latents_", "renormalize_", "warm_start", "without_mask"]


def copy_latents_(sae: SparseAutoencoder, copies: Copies) -> None:
    """Make some latents copies of others, with whatever the rule holds for them."""
    with torch.no_grad():
        for tensor in (*sae.latent_parameters(), *sae.rule.buffers()):
            if tensor.dim():  # A rule may keep a number for all latents together.
                tensor[copies.target] = tensor[copies.source]


def without_mask(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy of an SAE, every latent open everywhere."""
    settings = mask_settings({"kind": "open", "position_origin": sae.mask.settings.position_origin})
    mask = make_mask(settings, sae.mask.n_positions, sae.d_sae)
    copy = SparseAutoencoder(sae.d_model, sae.rule.settings, mask)
    own = copy.state_dict()
    copy.load_state_dict({**own, **{name: value for name, value in sae.state_dict().items() if "mask." not in name}})
    return copy


def renormalize_(sae: SparseAutoencoder, center: Float[Tensor, " d_model"], scale: Float[Tensor, ""]) -> None:
    """Give an SAE without a router other constants, and parameters with which it does what it did.

    Codes become sae.scale / scale times as large. So an SAE from elsewhere is trained on in the units of this data.
    """
    factor = sae.scale / scale
    with torch.no_grad():
        sae.decoder_bias.copy_((sae.decoder_bias * sae.scale + sae.center - center) / scale)
        sae.encoder_bias.mul_(factor)
        sae.rule.rescale_(factor.expand(sae.d_sae))
    sae.center, sae.scale = center.clone(), scale.clone()


def warm_start(
    source: SparseAutoencoder, mask: PositionMask, seed: int = 0, rule: RuleSettings | None = None
) -> SparseAutoencoder:
    """An SAE with this mask whose latents are copies of an unmasked SAE's.

    Where the mask has as many latents as the source, each is a copy of its own. Otherwise the free latents copy the
    first ones and each block of the mask the rest, so that at every position exactly one copy of each latent is live
    and the new SAE does what the source did (*upcycling*); splitting starts with one copy of each, the rest unborn.

    Args:
        rule: settings to train on with, that decide codes as the source's do; None: the source's.

    Raises:
        BadSetting: the source has a mask, or the mask has no such blocks for its latents.
    """
    n_free, n_latents = mask.n_free, source.d_sae
    if source.mask.settings.kind != "open":
        raise BadSetting(
            f"the SAE to start from has a {source.mask.settings.kind!r} mask: start from one that is open everywhere"
        )
    if source.mask.n_positions != mask.n_positions:
        raise BadSetting(
            f"the SAE to start from was trained on contexts of {source.mask.n_positions} positions, not "
            f"{mask.n_positions}: harvest at that length, or start from another"
        )
    if mask.reads_vectors:
        raise BadSetting(
            f"a {mask.settings.kind!r} mask multiplies codes by its router's p, so it cannot do what an SAE did: leave "
            "out init_from"
        )
    latent = torch.arange(mask.d_sae)
    live = mask.live() > 0
    unborn = ~live.any(0)
    known, of_known = mask.copied_from.unique(return_inverse=True)
    if mask.d_sae == n_latents and not bool(unborn.any()):
        copied = latent
    elif len(known) == n_latents:
        copied = of_known
    else:
        per_block = max(1, n_latents - n_free)
        copied = torch.where(latent < n_free, latent, n_free + (latent - n_free) % per_block)
        once = all(torch.equal(copied[row].sort().values, torch.arange(n_latents)) for row in live)
        if n_free > n_latents or not once:
            raise BadSetting(
                f"a {mask.settings.kind!r} mask of {mask.d_sae} latents does not open one copy of each of the "
                f"{n_latents} latents to start from at every position: use slice, band, windows, split or cohort with "
                'budget = "compute", or as many latents as the source has'
            )
    sae = SparseAutoencoder(source.d_model, rule or source.rule.settings, mask, seed).to(source.encoder.dtype)
    mask.copied_from[~unborn] = copied[~unborn]
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name.startswith("mask."):
                continue
            given = source.state_dict()[name]
            if name == "rule.level":  # The mask decides.
                continue
            if name in ("encoder", "encoder_bias", "decoder") or (name.startswith("rule.") and given.dim()):
                tensor[~unborn] = given[copied[~unborn]]
            else:
                tensor.copy_(given)
    return sae
