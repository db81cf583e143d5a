"""Errors that a caller may want to catch. Each message gives the value, the rule that it breaks, and the remedy."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError

__all__ = [
    "BadSetting",
    "DamagedFolder",
    "DegenerateResult",
    "MissingAsset",
    "MissingExtra",
    "NothingToDo",
    "OutOfMemory",
    "PosmaskError",
    "first_line",
    "unknown_kind",
]


class PosmaskError(Exception):
    """Base of every error that posmask raises on purpose. The command line prints its message and exits with 1.

    The exit code is 2 for `BadSetting` and 3 for `DamagedFolder`.
    """


class BadSetting(PosmaskError):
    """A setting, or a combination of settings, that cannot be carried out."""


class NothingToDo(PosmaskError):
    """A stage that would do nothing: no steps, no kept tokens, fewer tokens than a batch."""


class OutOfMemory(PosmaskError):
    """A stage that needs more memory than the CPU or the GPU has."""


class DegenerateResult(PosmaskError):
    """A result that would be a number without meaning: an all-zero SAE, constant pooled latents."""


class DamagedFolder(PosmaskError):
    """A folder that says it is finished but does not hold what it was finished with."""


class MissingAsset(PosmaskError):
    """A model or text file that could not be fetched, or whose checksum is wrong."""


class MissingExtra(PosmaskError):
    """A package that only an optional part of posmask needs is not installed, or is broken."""


_LONGEST_REASON = 300


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, shortened to 300 characters; the name of its type if it has none.

    Errors of other libraries may quote whole files.

    >>> first_line(ValueError("no such key\\nin this table"))
    'no such key'
    """
    if isinstance(error, ValidationError):  # Its first line is the number of its problems.
        problem = error.errors(include_url=False)[0]
        error = " ".join([*map(str, problem["loc"]), problem["msg"]])
    line = str(error).strip().partition("\n")[0].strip() or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."


def unknown_kind(what: str, kind: object, known: Iterable[str]) -> BadSetting:
    """The error for a `kind` that is not in a registry; it lists the known kinds and the closest of them.

    >>> str(unknown_kind("mask kind", "opne", ["open", "slice"]))
    "mask kind 'opne' is unknown: choose one of open, slice (did you mean 'open'?)"
    """
    known = list(known)
    if kind is None:
        return BadSetting(f"{what} is missing: choose one of {', '.join(known)}")
    close = difflib.get_close_matches(str(kind), known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return BadSetting(f"{what} {kind!r} is unknown: choose one of {', '.join(known)}{hint}")
