"""Sentences of one program's messages, in five languages: for telling languages apart, and their order.

The messages come from one translated program, so the languages speak of the same things, and a probe cannot tell
them by topic. What no reader would call a sentence is left out.
"""

import re

from posmask.data import embedded, tokens

__all__ = ["LANGUAGES", "sentences_by_language", "translations"]

LANGUAGES = ("en", "fr", "de", "es", "nl")
_MARKED_UP = re.compile(r"[{}<>\[\]%$`*_|\n]|https?:")  # Placeholders, HTML, Markdown, addresses.
_SHORTEST, _LONGEST = 5, 60  # Words.


def sentences_by_language(split: tokens.EvalSplit) -> dict[str, list[str]]:
    """One split's sentences of each of `LANGUAGES`, each once.

    A text that stands in two languages (untranslated, or the same in both) is in neither.
    """
    by_language = {
        language: tokens.unique_texts(filter(_is_sentence, embedded.read_messages(language).values()), split)
        for language in LANGUAGES
    }
    shared: set[str] = set()
    seen: set[str] = set()
    for texts in by_language.values():
        keys = {tokens.text_key(text) for text in texts}
        shared |= keys & seen
        seen |= keys
    return {
        language: [text for text in texts if tokens.text_key(text) not in shared]
        for language, texts in by_language.items()
    }


def translations(language: str) -> dict[str, str]:
    """English sentences -> the same message in another language; no text stands on either side twice.

    On both sides of the wall between training and evaluation: whoever uses one text of a pair asks for its own side.
    """
    translated = embedded.read_messages(language)
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, english in embedded.read_messages("en").items():
        other = translated.get(name, "")
        keys = {tokens.text_key(english), tokens.text_key(other)}
        if _is_sentence(english) and _is_sentence(other) and len(keys) == 2 and not keys & seen:
            found[english] = other
            seen |= keys
    return found


def _is_sentence(text: str) -> bool:
    return _SHORTEST <= len(text.split()) <= _LONGEST and not _MARKED_UP.search(text)
