"""Sentences from the messages of one program in five languages, for tasks on languages and their order.

The messages are translations of each other, so a probe cannot distinguish the languages by topic. Messages that are not
sentences are left out.
"""

import re

from posmask.data import embedded, tokens

__all__ = ["LANGUAGES", "sentences_by_language", "translations"]

LANGUAGES = ("en", "fr", "de", "es", "nl")
_MARKED_UP = re.compile(r"[{}<>\[\]%$`*_|\n]|https?:")  # Placeholders, HTML, Markdown, addresses.
_SHORTEST, _LONGEST = 5, 60  # Words.


def sentences_by_language(split: tokens.EvalSplit) -> dict[str, list[str]]:
    """The unique sentences of one split in each of `LANGUAGES`.

    A text that occurs in two languages (untranslated, or equal in both) is left out of both.

    Raises:
        MissingAsset: the carrier is unavailable.
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
    """English sentences and the same messages in another language. No text occurs twice.

    Sentences are from all splits; callers filter the texts that they use by split.

    Raises:
        MissingAsset: there are no messages in this language, or the carrier is unavailable.
    """
    translated = embedded.read_messages(language)
    pairs: dict[str, str] = {}
    seen: set[str] = set()
    for name, english in embedded.read_messages("en").items():
        other = translated.get(name, "")
        keys = {tokens.text_key(english), tokens.text_key(other)}
        if _is_sentence(english) and _is_sentence(other) and len(keys) == 2 and not keys & seen:
            pairs[english] = other
            seen |= keys
    return pairs


def _is_sentence(text: str) -> bool:
    return _SHORTEST <= len(text.split()) <= _LONGEST and not _MARKED_UP.search(text)
