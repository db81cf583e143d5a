import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from posmask.data import texts, tokens
from posmask.errors import BadSetting, MissingAsset
from posmask.study.settings import CorpusSettings

LINES = [f"this is text number {n}" for n in range(40)]


@pytest.fixture
def folder(tmp_path):
    """Write text files of a user: a plain text, JSON lines with the schema of the Pile, and a compressed file."""
    (tmp_path / "a.txt").write_text("one text\nof two lines\n")
    rows = [json.dumps({"text": line, "meta": {"pile_set_name": "x"}}) for line in LINES]
    (tmp_path / "b.jsonl").write_text("\n".join(rows[:20]) + "\n\n")
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(rows[20:]).encode()))
    (tmp_path / "notes.md").write_text("not a text")
    return tmp_path


def test_files_are_read_in_alphabetical_order(folder):
    assert list(texts.read_texts(str(folder))) == ["one text\nof two lines\n", *LINES]
    assert list(texts.read_texts(str(folder / "b.jsonl"), 3)) == LINES[:3]


def test_the_identity_follows_the_content(folder):
    before = texts.content_of(str(folder))
    assert list(before) == ["a.txt", "b.jsonl", "c.jsonl.zst"]
    (folder / "a.txt").write_text("another")
    after = texts.content_of(str(folder))
    assert before["a.txt"] != after["a.txt"]
    assert before["b.jsonl"] == after["b.jsonl"]
    assert texts.content_of("hf:monology/pile-uncopyrighted@abc") == {"hub": "monology/pile-uncopyrighted@abc"}


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    table = pyarrow.Table.from_pylist([{"text": line, "meta": {"pile_set_name": "x"}} for line in LINES])
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    calls = []
    load = texts.load_from_hub

    def local(path, **options):  # reads a local folder with the real library
        calls.append((path, options))
        return load(str(tmp_path), **{**options, "name": None, "revision": None})

    monkeypatch.setattr(texts, "load_from_hub", local)
    assert list(texts.read_texts("hf:monology/pile-uncopyrighted:all@abc", 5)) == LINES[:5]
    options = {"split": "train", "streaming": True, "name": "all", "revision": "abc"}
    assert calls == [("monology/pile-uncopyrighted", options)]


def test_a_missing_dataset_raises_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingAsset, match=r"no/such could not be loaded \(.+\): check the network"):
        next(texts.read_texts("hf:no/such", 1))


@pytest.mark.parametrize("line", ["{", '{"content": "x"}', '["text"]', '{"text": 3}'])
def test_a_line_without_a_text_raises_an_error(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(BadSetting, match=r'line 2 of .*a\.jsonl is not a JSON object with a text in "text"'):
        list(texts.read_texts(str(tmp_path)))


def test_a_folder_without_texts_raises_an_error(tmp_path):
    for source in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(BadSetting, match=r"is not a file or folder with \.txt, \.jsonl, \.jsonl\.zst in it"):
            list(texts.read_texts(str(source)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either tables or texts"),
        ({"tables": ["a"], "texts": "b"}, "either tables or texts"),
        ({"texts": "hf:a/b"}, "may be unlimited: set n_texts to the number of texts to read"),
    ],
)
def test_a_corpus_has_a_single_source(given, message):
    sizes = {"n_positions": 16, "training_tokens": 10, "heldout_tokens": 10}
    with pytest.raises(ValueError, match=message):
        CorpusSettings(**given, **sizes)


def test_user_texts_are_split(folder):
    sides = {split: set(tokens.unique_texts(texts.read_texts(str(folder)), split)) for split in tokens.Split.__args__}
    assert sum(map(len, sides.values())) == 41
    assert all(sides.values())
