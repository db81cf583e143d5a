"""Hub datasets, read from local folders by the real `datasets` library."""

import builtins
import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from interop.synthetic import TABLES, code_rows, table_rows, translation_rows
from posmask.errors import BadSetting, MissingAsset, MissingExtra
from posmask.probing import datasets, saebench_datasets

RECORDED = json.loads((Path(__file__).parent / "data" / "saebench_probing.json").read_text(encoding="utf8"))["texts"]
AG_NEWS, BIOGRAPHIES = "fancyzhx/ag_news", "LabHC/bias_in_bios_class_set1"


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def hub_folder(monkeypatch, tmp_path):
    """Load datasets from folders under tmp_path, named as on the hub."""
    load = saebench_datasets._load

    def local(path, *, name=None, data_files=None, **options):
        if data_files is not None:
            files = data_files["train"].removeprefix("hf://datasets/")
            return load(path, data_files={"train": str(tmp_path / files)}, **options)
        return load(str(tmp_path / path / (name or "")), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(saebench_datasets, "_load", local)
    return tmp_path


@pytest.fixture
def hub_datasets(hub_folder):
    for path in TABLES:
        for split in ("train", "test"):
            write(hub_folder / path, split, table_rows(path, split))
    for pair in saebench_datasets._PAIRS.values():
        write(hub_folder / "Helsinki-NLP/europarl" / pair, "train", translation_rows(pair))
    write(hub_folder / "codeparrot/github-code" / "data", "train", code_rows())


@pytest.mark.parametrize("name", saebench_datasets.HUB_DATASETS)
def test_sampled_texts_equal_those_of_sae_bench(hub_datasets, name):
    texts_by_class = saebench_datasets.read_hub_texts(name, RECORDED["n_train"], RECORDED["n_test"], RECORDED["seed"])
    assert {
        label: [hashlib.sha256("\0".join(texts).encode()).hexdigest() for texts in sides]
        for label, sides in texts_by_class.items()
    } == RECORDED["sha256"][name]
    assert list(texts_by_class) == list(saebench_datasets.HUB_DATASETS[name].classes)
    for train, test in texts_by_class.values():
        assert (len(train), len(test)) == (40, 10)
        assert not set(train) & set(test)


def labeled(n_class, labels, empty=0):
    return [{"text": f"{label} {i}", "label": label} for label in labels for i in range(n_class)] + [
        {"text": " ", "label": labels[0]} for _ in range(empty)
    ]


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], ["0", "1", "2", "3"], ["World", "Sports", "Business", "Sci/Tech"]])
def test_labels_may_be_numbers_strings_or_names(hub_folder, labels):
    for split in ("train", "test"):
        write(hub_folder / AG_NEWS, split, labeled(40, labels))
    texts_by_class = saebench_datasets.read_hub_texts(AG_NEWS, 40, 10, 0)
    assert list(texts_by_class) == ["0", "1", "2", "3"]
    assert texts_by_class["2"][0][0].startswith(str(labels[2]))


def test_small_classes_reduce_both_sizes_and_empty_texts_are_dropped(hub_folder):
    write(hub_folder / AG_NEWS, "train", [*labeled(200, [0, 1, 2]), *labeled(48, [3], empty=50)])
    write(hub_folder / AG_NEWS, "test", labeled(100, [0, 1, 2, 3]))
    texts_by_class = saebench_datasets.read_hub_texts(AG_NEWS, 4000, 1000, 0)
    assert {(len(train), len(test)) for train, test in texts_by_class.values()} == {(48, 12)}
    assert all(text.strip() for sides in texts_by_class.values() for side in sides for text in side)


def test_short_streams_reduce_the_sizes(hub_datasets):
    texts_by_class = saebench_datasets.read_hub_texts("Helsinki-NLP/europarl", 4000, 1000, 0)
    assert {(len(train), len(test)) for train, test in texts_by_class.values()} == {(72, 18)}


def test_biographies_are_balanced_by_gender(hub_datasets):
    gender = {row["hard_text"]: row["gender"] for row in table_rows("LabHC/bias_in_bios", "train")}
    for train, _ in saebench_datasets.read_hub_texts(BIOGRAPHIES, 80, 20, 1).values():
        assert sorted(gender[text] for text in train) == [0] * 20 + [1] * 20


def test_missing_classes_and_columns_raise_an_error(hub_folder):
    write(hub_folder / AG_NEWS, "train", labeled(40, [0, 1, 2]))
    write(hub_folder / AG_NEWS, "test", labeled(40, [0, 1, 2]))
    with pytest.raises(BadSetting, match=r"fancyzhx/ag_news has no texts of class '3' \(Sci/Tech\): leave"):
        saebench_datasets.read_hub_texts(AG_NEWS, 40, 10, 0)
    write(hub_folder / "codeparrot/github-code" / "data", "train", [{"code": "x" * 600, "language": "C"}])
    with pytest.raises(MissingAsset, match="has the columns code, language, not content, path"):
        saebench_datasets.read_hub_texts("codeparrot/github-code", 40, 10, 0)
    rows = [{"hard_text": f"a {i}", "profession": i % 10, "gender": 0} for i in range(200)]
    for split in ("train", "test"):
        write(hub_folder / "LabHC/bias_in_bios", split, rows)
    with pytest.raises(BadSetting, match=r"class '0' \(accountant\) for both values of gender"):
        saebench_datasets.read_hub_texts(BIOGRAPHIES, 40, 10, 0)


def test_unreadable_hub_datasets_raise_an_error(hub_folder, monkeypatch):
    with pytest.raises(BadSetting, match="hub dataset 'imdb' is unknown: choose from LabHC/bias_in_bios_class_set1, "):
        saebench_datasets.read_hub_texts("imdb", 40, 10, 0)
    with pytest.raises(BadSetting, match="40 training and 2 test texts are fewer than 4"):
        saebench_datasets.read_hub_texts(AG_NEWS, 40, 2, 0)
    with pytest.raises(MissingAsset, match=r"could not be loaded \(.+\): check the network"):
        saebench_datasets.read_hub_texts(AG_NEWS, 40, 10, 0)
    write(hub_folder / AG_NEWS, "train", labeled(1, [0, 1, 2, 3]))
    write(hub_folder / AG_NEWS, "test", labeled(1, [0, 1, 2, 3]))
    with pytest.raises(BadSetting, match="has a class with too few texts"):
        saebench_datasets.read_hub_texts(AG_NEWS, 40, 10, 0)
    real = builtins.__import__

    def without_datasets(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(MissingExtra, match=r"needs the package `datasets`: pip install 'posmask\[hub\]'"):
        saebench_datasets.read_hub_texts(AG_NEWS, 40, 10, 0)


def test_a_probe_dataset_is_read_by_its_hub_name(hub_datasets):
    dataset = datasets.read_probe_dataset(AG_NEWS, 80, 20, 5)
    assert dataset.classes == ("0", "1", "2", "3")
    assert Counter(zip(dataset.label.tolist(), dataset.train.tolist(), strict=True)) == {
        (label, train): 40 if train else 10 for label in range(4) for train in (True, False)
    }
    assert max(map(len, dataset.texts)) == 5
