from collections import Counter

import pytest

from posmask.data import embedded, tokens
from posmask.probing import catalogs

ENGLISH = {
    "a/1": "The lamp is on now, {name}.",
    "a/2": "The lamp does not answer at all.",
    "a/3": "Lamp on",
    "b/1": "The lamp does not answer at all.",
    "b/2": "See https://example.org for all the rest.",
    "b/3": "Error 12 Error 13 Error 14",
    "b/4": "Please restart the bridge and wait.",
    "b/5": "This sentence is in English only.",
}
GERMAN = {
    "a/1": "Die Lampe ist nun an, {name}.",
    "a/2": "Die Lampe antwortet leider gar nicht.",
    "a/3": "Lampe an",
    "b/1": "Diese Lampe hier antwortet gar nicht.",
    "b/2": "Alles Weitere steht auf https://example.org für dich.",
    "b/3": "Error 12 Error 13 Error 14",
    "b/4": "Die Lampe antwortet leider gar nicht.",
}


@pytest.fixture
def messages(monkeypatch):
    catalog = {"en": ENGLISH, "de": GERMAN}
    monkeypatch.setattr(embedded, "read_messages", lambda language: catalog.get(language, {}))
    monkeypatch.setattr(tokens, "split_of", lambda text, *key: "training" if "restart" in text else "evaluation")


def test_sentences_are_complete_unique_and_from_the_evaluation_split(messages):
    sentences = catalogs.sentences_by_language("evaluation")
    assert list(sentences) == ["en", "fr", "de", "es", "nl"]
    assert sentences["en"] == ["The lamp does not answer at all.", "This sentence is in English only."]
    assert sentences["de"] == ["Die Lampe antwortet leider gar nicht.", "Diese Lampe hier antwortet gar nicht."]


def test_no_translation_occurs_twice(messages):
    assert catalogs.translations("de") == {"The lamp does not answer at all.": "Die Lampe antwortet leider gar nicht."}


@pytest.mark.embedded
def test_the_embedded_sentences_are_in_their_languages():
    by_language = catalogs.sentences_by_language("evaluation")
    commonest = {"en": "the", "fr": "de", "de": "die", "es": "de", "nl": "de"}
    for language, sentences in by_language.items():
        assert len(sentences) > 1100
        assert {tokens.split_of(text) for text in sentences} == {"evaluation"}
        words = Counter(word for text in sentences for word in text.lower().split())
        assert words.most_common(1)[0][0] == commonest[language]
    assert len({text for sentences in by_language.values() for text in sentences}) == sum(
        map(len, by_language.values())
    )
