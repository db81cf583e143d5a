"""Codes of simulated latents whose dependence on position and content is known."""

import math

import torch

from posmask.data import tokens as data_tokens
from posmask.data.activations import Batch
from posmask.evaluation.blocks import latent_blocks
from posmask.evaluation.latent_table import LatentTableParts
from posmask.evaluation.stored_codes import StoredCodes
from posmask.sae.autoencoder import Codes

N_POSITIONS, N_WINDOWS, SHIFT_TEXTS = 128, 5, 96
LENGTH = data_tokens.shift_length(N_POSITIONS, N_WINDOWS)
N_TRAITS = 24


def batch_of(position, text, text_position):
    zeros = torch.zeros(len(position), dtype=torch.long)
    keep = torch.ones(len(position), dtype=torch.bool)
    return Batch(torch.zeros(len(position), 0), position, zeros, text, keep, zeros, zeros, zeros, text_position)


def contents(n_texts, length, random):
    """Traits of each token [text token trait]: some of single tokens, some of passages, some of texts' beginnings."""
    traits = torch.rand(n_texts, length, N_TRAITS, generator=random) < 0.08
    topic = torch.rand(n_texts, 1, 6, generator=random) < 0.3
    traits[..., :6] &= topic | (torch.rand(n_texts, length, 6, generator=random) < 0.2)
    runs = torch.rand(n_texts, math.ceil(length / 10), 6, generator=random) < 0.15
    traits[..., 6:12] = runs.repeat_interleave(10, 1)[:, :length]
    begins = torch.arange(length)[None, :, None] < torch.tensor([1, 2, 3, 5, 8, 13])
    traits[..., 12:18] = begins & (torch.rand(n_texts, length, 6, generator=random) < 0.95)
    return traits


def simulate(fires, n_latents, n_tokens=100_000, seed=0, starts_alike=False, sink_firings=None, sink_position=()):
    """The table of latents that fire where `fires(position, traits, random)` says, as [token latent].

    Args:
        starts_alike: each text begins a context, as with one text per context.
        sink_firings: number of attention sinks at which each latent fires; None for none.
        sink_position: position of each attention sink.
    """
    random = torch.Generator().manual_seed(seed)
    n_texts, width = n_tokens // 120, N_POSITIONS - 1
    traits = contents(n_texts, 240, random)
    lengths = torch.full((n_texts,), width) if starts_alike else torch.randint(40, 200, (n_texts,), generator=random)
    text = torch.arange(n_texts).repeat_interleave(lengths)
    text_position = torch.cat([torch.arange(1, n + 1) for n in lengths.tolist()])
    position = torch.arange(len(text)) % width + 1
    heldout, shift = StoredCodes(n_latents), StoredCodes(n_latents)
    for part in torch.arange(len(text)).split(8192):
        firing = fires(position[part], traits[text[part], text_position[part] - 1], random)
        heldout.add(batch_of(position[part], text[part], text_position[part]), codes_of(firing, random))
    pieces = contents(SHIFT_TEXTS, LENGTH, random)
    for window in range(N_WINDOWS):
        content = torch.arange(SHIFT_TEXTS * LENGTH)
        where = 1 + (window + 1) * LENGTH + content % LENGTH
        firing = fires(where, pieces.flatten(0, 1), random)
        shift.add(batch_of(where, content // LENGTH, content % LENGTH + 1), codes_of(firing, random))
    parts = LatentTableParts(N_POSITIONS)
    for block in latent_blocks(heldout, shift, n_positions=N_POSITIONS, n_windows=N_WINDOWS, shift_length=LENGTH):
        parts.add(block)
    sink_firings = torch.zeros(n_latents, dtype=torch.int64) if sink_firings is None else torch.tensor(sink_firings)
    sink_position = torch.tensor(sink_position, dtype=torch.int64)
    return parts.table(heldout.batch, sink_firings, sink_position)


def codes_of(firing, random):
    token, latent = firing.nonzero(as_tuple=True)
    value = 1 + 0.3 * torch.rand(len(token), generator=random)
    return Codes(token, latent, value, *firing.shape)
