"""Errors that a caller may want to catch. Each message gives the value, the rule that it breaks, and the remedy."""

__all__ = [
    "BadSetting",
    "DamagedFolder",
    "DegenerateResult",
    "MissingAsset",
    "MissingExtra",
    "NothingToDo",
    "PosmaskError",
]


class PosmaskError(Exception):
    """Base of every error that posmask raises on purpose. The command line prints its message and exits with 1.

    The exit code is 2 for `BadSetting` and 3 for `DamagedFolder`.
    """


class BadSetting(PosmaskError):
    """A setting, or a combination of settings, that cannot be carried out."""


class NothingToDo(PosmaskError):
    """A stage that would do nothing: no steps, no kept tokens, fewer tokens than a batch."""


class DegenerateResult(PosmaskError):
    """A result that would be a number without meaning: an all-zero SAE, constant pooled latents."""


class DamagedFolder(PosmaskError):
    """A folder that says it is finished but does not hold what it was finished with."""


class MissingAsset(PosmaskError):
    """A model or text file that could not be fetched, or whose checksum is wrong."""


class MissingExtra(PosmaskError):
    """A package that only an optional part of posmask needs is not installed."""
