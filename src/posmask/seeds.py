"""Randomness: an integer seed at the door, a generator of its own for each purpose inside."""

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random generator that depends on both arguments, so that drawing more for one purpose shifts no other.

    >>> a, b = generator(0, "data"), generator(0, "weights")
    >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
    False
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
