"""How often each unit comes in draws with replacement: one definition for single numbers and for paired differences."""

from functools import lru_cache

import numpy as np

__all__ = ["resample_counts"]

N_RESAMPLES = 500


@lru_cache(maxsize=32)
def resample_counts(n_units: int, name: str = "") -> np.ndarray:
    """[draw unit]: counts of `N_RESAMPLES` draws of n_units with replacement; the same for the same arguments.

    The same array, too, while it is remembered: not to be written into.
    """
    random = np.random.default_rng([n_units, *name.encode()])
    return random.multinomial(n_units, np.full(n_units, 1 / n_units), N_RESAMPLES).astype(np.float64)
