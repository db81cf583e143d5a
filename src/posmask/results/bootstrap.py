"""Bootstrap counts: how often each unit is in each draw, for intervals of single numbers and of paired differences.

A module without torch, because the report needs paired differences and imports no torch.
"""

from functools import lru_cache

import numpy as np

__all__ = ["resample_counts"]

N_RESAMPLES = 500


@lru_cache(maxsize=32)
def resample_counts(n_units: int, name: str = "") -> np.ndarray:
    """Return counts [draw unit] of `N_RESAMPLES` draws of `n_units` units with replacement.

    The same arguments give the same counts. The array is cached and must not be modified.
    """
    random = np.random.default_rng([n_units, *name.encode()])
    return random.multinomial(n_units, np.full(n_units, 1 / n_units), N_RESAMPLES).astype(np.float64)
