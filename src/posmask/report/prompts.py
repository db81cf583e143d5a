"""The box of a served page into which readers type texts."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posmask.errors import PosmaskError
from posmask.report.browser import shown_word

__all__ = ["MOST_BYTES", "Codes", "answer", "takes_prompts", "with_prompts"]

Codes = Callable[[str, str, str], dict[str, Any]]
"""Encodes a text: `posmask.study.prompts.Prompts.codes`."""

_MOST_CHARACTERS = 20_000
MOST_BYTES = 12 * _MOST_CHARACTERS + 2_000
"""The largest request: a text with every character escaped as a UTF-16 pair, and what names the SAE."""
_HERE = Path(__file__).parent


def takes_prompts(page: Path) -> bool:
    """Whether this version of posmask wrote a page, so that the box fits it."""
    with page.open("rb") as file:
        return f'content="posmask {importlib.metadata.version("posmask")}"'.encode() in file.read(1000)


def with_prompts(page: str) -> str:
    """Return a page with the box for texts, which may ask the server that it comes from."""
    style, script = ((_HERE / f"prompts.{kind}").read_text(encoding="utf8") for kind in ("css", "js"))
    settings = f"const MOST_CHARACTERS = {_MOST_CHARACTERS};"
    before, end, after = page.rpartition("</body>")
    before = before.replace("connect-src 'none'", "connect-src 'self'", 1)
    return f"{before}<style>\n{style}</style>\n<script>\n{settings}\n{script}</script>\n{end}{after}"


def answer(codes: Codes, body: bytes) -> dict[str, Any] | None:
    """Answer a request of the box: the codes of a text, or `error` with a sentence; None if it is not a request.

    Args:
        codes: encodes the text.
        body: JSON with `folder` and `identity` of an SAE and `text`.
    """
    try:
        values = json.loads(body)
        folder, identity, text = (values[name] for name in ("folder", "identity", "text"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(value, str) for value in (folder, identity, text)):
        return None
    if not text:
        return {"error": "the text is empty: type at least one word"}
    if len(text) > _MOST_CHARACTERS:
        return {"error": f"the text has {len(text):,} characters: give at most {_MOST_CHARACTERS:,}"}
    try:
        found = codes(folder, identity, text)
    except PosmaskError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error}: check the path and its permissions"}
    return found | {"words": [shown_word(word) for word in found["words"]]}
