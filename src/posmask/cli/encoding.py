"""Output to terminals and logs that are not UTF-8."""

import codecs
import io
import sys

__all__ = ["replace_unencodable"]

_PLAIN = {"−": "-", "–": "-", "—": "-", "…": ".", "±": "+/-", "×": "x", "─": "-", "•": "*"}


def replace_unencodable() -> None:
    """Write characters that standard output or error cannot encode as similar ones, or as question marks.

    Such a character would otherwise end a finished run with an error; a minus sign must not become a question mark.
    """
    codecs.register_error("posmask.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="posmask.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end
