"""A small SAE with a position mask and its inputs, without random numbers: equal in every environment."""

import torch

from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings

D_MODEL, D_SAE, N_POSITIONS = 6, 32, 8
CLAMPED, MULTIPLIER = [2, 5, 9, 20], 25
POSITION = 5


def waves(*shape: int, phase: float) -> torch.Tensor:
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.7 * count + 0.3 * count.sqrt() + phase).reshape(shape).float()


def make_sae() -> SparseAutoencoder:
    mask = make_mask(mask_settings({"kind": "slice", "n_slices": 2}), N_POSITIONS, D_SAE)
    sae = SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 6}), mask)
    with torch.no_grad():
        sae.encoder.copy_(waves(*sae.encoder.shape, phase=0.0))
        sae.encoder_bias.copy_(0.1 * waves(D_SAE, phase=1.0))
        decoder = waves(*sae.decoder.shape, phase=2.0)
        sae.decoder.copy_(decoder / decoder.norm(dim=1, keepdim=True))
        sae.center, sae.scale = waves(D_MODEL, phase=3.0), torch.tensor(2.5)
    return sae


def make_vectors() -> torch.Tensor:
    """Return vectors [text, position, d_model] in the model's units."""
    return 9 * waves(2, N_POSITIONS, D_MODEL, phase=4.0)
