import json
import secrets
from pathlib import Path

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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 'is not a JSON object with a text in "text": correct or remove it'),
        ('{"content": "x", "id": 1}', r'.* in "text" \(it has content, id\)'),
        ("{}", r'.* in "text" \(it has no fields\)'),
        ('["text"]', 'is not a JSON object with a text in "text"'),
        ('{"text": ' + "[" * 100_000, 'is not a JSON object with a text in "text"'),
        ('{"text": "x", "n": ' + "1" * 5000 + "}", 'is not a JSON object with a text in "text"'),
        ('{"text": 3}', 'has a value of type int in "text" instead of a string: write each text as one string'),
        ('{"text": [{"role": "user"}]}', 'has a value of type list in "text"'),
    ],
)
def test_a_line_without_a_text_raises_an_error(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(BadSetting, match=r"^line 2 of .*a\.jsonl " + message):
        list(texts.read_texts(str(tmp_path)))


@pytest.mark.parametrize("source", ["files", "hub"])
def test_rows_that_no_tokenizer_takes_are_skipped_and_counted(source, tmp_path, monkeypatch, capsys):
    rows = [{"text": value} for value in ("one", None, "\ud800", "two", None, "three")]
    if source == "files":
        name = str(tmp_path / "a.jsonl")
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    else:
        name = "hf:some/set"
        monkeypatch.setattr(texts, "load_from_hub", lambda path, **options: rows)
    assert list(texts.read_texts(name)) == ["one", "two", "three"]
    reasons = "1 with lone surrogates and 2 with null"
    assert f"Skipped 3 rows of {name} without a usable text: {reasons}." in capsys.readouterr().err
    assert list(texts.read_texts(name, 2)) == ["one", "two"]


def test_a_hub_dataset_that_breaks_off_raises_an_error(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise EOFError("stream ended")

    monkeypatch.setattr(texts, "load_from_hub", lambda path, **options: rows())
    with pytest.raises(MissingAsset, match=r"some/set could not be read after row 1 \(stream ended\)"):
        list(texts.read_texts("hf:some/set"))
    monkeypatch.setattr(texts, "load_from_hub", lambda path, **options: [{"text": ["a", "b"]}])
    with pytest.raises(BadSetting, match='row 1 of some/set has a value of type list in "text"'):
        list(texts.read_texts("hf:some/set"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-8-sig", None),
        ("utf-16", "is encoded in UTF-16 or UTF-32: convert it"),
        ("utf-32", "is encoded in UTF-16 or UTF-32: convert it"),
        ("utf-16-le", "line 1 of .* has NUL characters"),
        ("latin-1", r"line 2 of .* is not UTF-8 \(byte 0xe9\): convert the file"),
    ],
)
def test_other_encodings_are_read_or_refused(name, encoding, message, tmp_path):
    as_json = [json.dumps({"text": text}, ensure_ascii=False) for text in ("red", "café")]
    content = "\n".join(["red", "café"] if name == "a.txt" else as_json).encode(encoding)
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    if message is None:
        assert list(texts.read_texts(str(tmp_path))) == (["red\ncafé"] if name == "a.txt" else ["red", "café"])
    else:
        with pytest.raises(BadSetting, match=message):
            list(texts.read_texts(str(tmp_path)))


def test_line_ends_of_other_systems_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"red\r\nblue\rold")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "tree"}\r\n{"text": "road"}\r\n')
    assert list(texts.read_texts(str(tmp_path))) == ["red\nblue\nold", "tree", "road"]


def test_damaged_compressed_files_are_refused_and_several_frames_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    lines = [f"{n} " + secrets.token_hex(200) for n in range(2000)]
    packed = zstandard.compress("\n".join(json.dumps({"text": line}) for line in lines).encode())
    path.write_bytes(packed + zstandard.compress(b'\n{"text": "last"}'))
    assert list(texts.read_texts(str(path))) == [*lines, "last"]
    for content, reason in (
        (packed[: len(packed) // 2], "it ends in the middle of a frame"),
        (packed + b"more", "zstd decompress"),
        (b'{"text": "plain"}', "zstd decompress"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadSetting, match=rf"a\.jsonl\.zst is damaged \({reason}.*\): copy or compress it again"):
            list(texts.read_texts(str(path)))


def test_a_folder_without_texts_raises_an_error(tmp_path):
    with pytest.raises(BadSetting, match=r"is not a file or folder with \.txt, \.jsonl, \.jsonl\.zst in it"):
        list(texts.read_texts(str(tmp_path)))
    with pytest.raises(BadSetting, match=r"corpus\.texts = '.*none\.txt' does not exist: give a file or folder"):
        list(texts.read_texts(str(tmp_path / "none.txt")))


def test_only_tables_are_cut_unless_the_study_says_so():
    sizes = {"n_positions": 16, "training_tokens": 10, "heldout_tokens": 10}
    own, tables = CorpusSettings(texts="a", **sizes), CorpusSettings(tables=("a",), **sizes)
    assert own.max_characters is None
    assert own.source == {"tables": []}
    assert tables.source == {"tables": ["a"], "max_characters": 1000}
    assert CorpusSettings(tables=("a",), max_characters=50, **sizes).max_characters == 50
    assert CorpusSettings(texts="a", max_characters=50, **sizes).max_characters == 50
    assert CorpusSettings.model_validate(tables.model_dump()) == tables


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


def selected(given, split, **options):
    return tokens.select_texts(given, split, key=tokens.whole_text_key, **options)


def test_user_texts_are_split(folder):
    sides = {split: set(selected(texts.read_texts(str(folder)), split).texts) for split in tokens.Split.__args__}
    assert sum(map(len, sides.values())) == 41
    assert all(sides.values())


def test_chats_with_the_same_system_prompt_are_different_texts():
    chats = ["You are a helpful assistant. " * 20 + f"User: {n}" for n in range(2000)]
    sides = [selected([*chats, chats[0].upper()], split) for split in tokens.Split.__args__]
    assert sorted(text for side in sides for text in side.texts) == sorted(chats)
    assert sum(side.n_duplicates for side in sides) == 1
    assert 450 < len(sides[0].texts) < 550
    assert {side.n_all for side in sides} == {2001}
    short = "A short text"
    assert tokens.whole_text_key(short) == tokens.text_key(short)


def test_cuts_and_duplicates_are_counted_and_described():
    given = [f"{n} " + "x" * n for n in range(1, 201)]
    side = selected([*given, *given, "", " "], "evaluation", max_characters=100)
    assert side.n_all == 400
    assert side.n_duplicates == len(side.texts)
    assert side.n_cut == sum(len(text) == 100 for text in side.texts) > 20
    n = len(side.texts)
    assert str(side) == (
        f"{n} evaluation texts (of 400 in all, of which 55% are for evaluation; without {n} duplicates; {side.n_cut} "
        "of them cut to corpus.max_characters = 100)"
    )
