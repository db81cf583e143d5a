"""How often each unit comes in draws with replacement: one definition for single numbers and for paired differences."""

import numpy as np

__all__ = ["resample_counts"]

N_RESAMPLES = 500


def resample_counts(n_units: int, name: str = "") -> np.ndarray:
    """[draw unit]: counts of `N_RESAMPLES` draws of n_units with replacement; the same for the same arguments."""
    random = np.random.default_rng([n_units, *name.encode()])
    return random.multinomial(n_units, np.full(n_units, 1 / n_units), N_RESAMPLES).astype(np.float64)
