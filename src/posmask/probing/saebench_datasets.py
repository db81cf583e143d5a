"""SAEBench's eight datasets from the Hugging Face hub: their columns, their classes, and the texts that it samples.

Sources: sae-bench 0.6.0, sae_bench_utils/dataset_utils.py and dataset_info.py, and the hub's dataset pages. The
sampling is tested against sae-bench's on tables with the same columns, but not on the hub itself.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from posmask.data.texts import load_from_hub as _load
from posmask.errors import BadSetting, MissingAsset

__all__ = ["HUB_DATASETS", "HubDataset", "cut_to_smallest", "read_hub_texts"]


@dataclass(frozen=True)
class HubDataset:
    """A dataset's columns and classes.

    Args:
        path: name on the hub.
        text: column of the texts.
        label: column of the labels.
        classes: SAEBench's name of each class, which is its label as a string, and its meaning.
        balance: column of two values, each of which gives half of the texts of every class; None if not balanced.
    """

    path: str
    text: str
    label: str
    classes: Mapping[str, str]
    balance: str | None = None


def _biographies(**professions: int) -> HubDataset:
    classes = {str(number): name for name, number in professions.items()}
    return HubDataset("LabHC/bias_in_bios", "hard_text", "profession", classes, balance="gender")


_REVIEWS = "canrager/amazon_reviews_mcauley_1and5"
_CATEGORIES = {
    "1": "Toys_and_Games",
    "2": "Cell_Phones_and_Accessories",
    "3": "Industrial_and_Scientific",
    "5": "Musical_Instruments",
    "6": "Electronics",
}

HUB_DATASETS: dict[str, HubDataset] = {
    "LabHC/bias_in_bios_class_set1": _biographies(accountant=0, architect=1, attorney=2, dentist=6, filmmaker=9),
    "LabHC/bias_in_bios_class_set2": _biographies(journalist=11, nurse=13, painter=14, photographer=18, physician=19),
    "LabHC/bias_in_bios_class_set3": _biographies(poet=20, professor=21, psychologist=22, surgeon=25, teacher=26),
    _REVIEWS: HubDataset(_REVIEWS, "text", "category", _CATEGORIES, balance="rating"),
    f"{_REVIEWS}_sentiment": HubDataset(_REVIEWS, "text", "rating", {"1.0": "1 star", "5.0": "5 stars"}),
    "codeparrot/github-code": HubDataset(
        "codeparrot/github-code", "content", "path", {name: name for name in ("C", "Python", "HTML", "Java", "PHP")}
    ),
    "fancyzhx/ag_news": HubDataset(
        "fancyzhx/ag_news", "text", "label", {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}
    ),
    "Helsinki-NLP/europarl": HubDataset(
        "Helsinki-NLP/europarl",
        "translation",
        "translation",
        {"en": "English", "fr": "French", "de": "German", "es": "Spanish", "nl": "Dutch"},
    ),
}


def read_hub_texts(name: str, n_train: int, n_test: int, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Read the (training, test) texts of each class that SAEBench draws, the same number in every class.

    The draw differs from SAEBench's in two cases: a class is too small (SAEBench stops with an error), or rows have
    empty texts, which are dropped before the draw (SAEBench keeps them).

    Args:
        name: key of `HUB_DATASETS`.
        n_train: training texts per probe, half of them of its class (SAEBench: 4000); reduced with `n_test` in the
            same ratio if the smallest class has fewer.
        n_test: test texts per probe, half of them of its class (SAEBench: 1000).
        seed: of the draw.

    Raises:
        BadSetting: no dataset has this name, or a class has no texts.
        MissingAsset: the hub is unavailable, or the dataset lacks these columns.
        MissingExtra: the package `datasets` is not installed.
    """
    if name not in HUB_DATASETS:
        raise BadSetting(f"hub dataset {name!r} is unknown: choose from {', '.join(HUB_DATASETS)}")
    if min(n_train, n_test) < 4:
        raise BadSetting(
            f"{n_train} training and {n_test} test texts are fewer than 4: raise probe_train or probe_test"
        )
    read = _STREAMS.get(name)
    if read is None:
        return _sampled(name, n_train, n_test, seed)
    return _shuffled(name, read(n_train // 2 + n_test // 2), n_train // 2, n_test // 2, seed)


def _sampled(name: str, n_train: int, n_test: int, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Draw from tables with a training and a test split; the two values of `balance` are drawn one after the other."""
    dataset = HUB_DATASETS[name]
    table = _load(dataset.path)
    train, test = (_by_class_and_half(dataset, table[split], split) for split in ("train", "test"))
    n_halves = 2 if dataset.balance else 1
    by_class = {}
    for label in dataset.classes:
        halves = [(train[label][half], test[label][half]) for half in sorted(train[label]) if half in test[label]]
        by_class[label] = halves
        if len(halves) < n_halves:
            raise BadSetting(f"{name} has no texts of class {_describe_class(dataset, label)}: leave the dataset out")
    n_train, n_test = n_train // (2 * n_halves), n_test // (2 * n_halves)
    smallest = min(
        min(len(test), len(train) * n_test // n_train) for halves in by_class.values() for train, test in halves
    )
    n_train, n_test = _enough(name, min(n_train, smallest * n_train // n_test), min(n_test, smallest))
    return {
        label: (
            [text for train, _ in halves for text in _draw(train, n_train, seed)],
            [text for _, test in halves for text in _draw(test, n_test, seed)],
        )
        for label, halves in by_class.items()
    }


def _by_class_and_half(dataset: HubDataset, rows: Iterable[Any], split: str) -> dict[str, dict[Any, list[str]]]:
    labels = {_key(label): label for label in dataset.classes} | {name: key for key, name in dataset.classes.items()}
    by_class: dict[str, dict[Any, list[str]]] = {label: {} for label in dataset.classes}
    for row in rows:
        _check(dataset, row, split)
        label = labels.get(_key(row[dataset.label]))
        if label is not None and (row[dataset.text] or "").strip():
            half = _key(row[dataset.balance]) if dataset.balance else ""
            by_class[label].setdefault(half, []).append(row[dataset.text])
    return by_class


def _check(dataset: HubDataset, row: Mapping[str, Any], split: str) -> None:
    wanted = {dataset.text, dataset.label} | ({dataset.balance} if dataset.balance else set())
    if not wanted <= row.keys():
        raise MissingAsset(
            f"{dataset.path} ({split}) has the columns {', '.join(row)}, not {', '.join(sorted(wanted))}: the hub's "
            "copy was changed, use an older revision"
        )


def _key(label: Any) -> Any:
    """A key that is equal for 1, 1.0, "1" and "1.0"."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return label


def _draw(texts: list[str], n: int, seed: int) -> list[str]:
    # The same draw as pandas' `.sample(n, random_state=seed)`, which SAEBench uses.
    return [texts[i] for i in np.random.RandomState(seed).choice(len(texts), n, replace=False)]


def _shuffled(
    name: str, pools: dict[str, list[str]], n_train: int, n_test: int, seed: int
) -> dict[str, tuple[list[str], list[str]]]:
    """Shuffle the beginnings of streams and cut them. All classes in turn use the same random generator."""
    for label, pool in pools.items():
        if not pool:
            raise BadSetting(
                f"{name} has no texts of class {_describe_class(HUB_DATASETS[name], label)}: leave the dataset out"
            )
    n_train, n_test = cut_to_smallest(name, min(map(len, pools.values())), n_train, n_test)
    order = random.Random(seed)
    for pool in pools.values():
        order.shuffle(pool)
    return {label: (pool[:n_train], pool[n_train : n_train + n_test]) for label, pool in pools.items()}


def cut_to_smallest(name: str, smallest: int, n_train: int, n_test: int) -> tuple[int, int]:
    """The numbers of (training, test) texts per class, reduced in the same ratio if the smallest class has fewer.

    Args:
        name: of the dataset, for the error message.
        smallest: texts of the smallest class.
        n_train: requested training texts per class.
        n_test: requested test texts per class.

    Raises:
        BadSetting: one of the two numbers would be 0.
    """
    if smallest < n_train + n_test:
        n_test = smallest * n_test // (n_train + n_test)
        n_train = smallest - n_test
    return _enough(name, n_train, n_test)


def _enough(name: str, n_train: int, n_test: int) -> tuple[int, int]:
    if n_train < 1 or n_test < 1:
        raise BadSetting(f"{name} has a class with too few texts to split for a probe: leave the dataset out")
    return n_train, n_test


def _describe_class(dataset: HubDataset, label: str) -> str:
    means = f" ({dataset.classes[label]})" if dataset.classes[label] != label else ""
    half = f" for both values of {dataset.balance}" if dataset.balance else ""
    return f"{label!r}{means}{half}"


# The language pair that SAEBench reads each language from; each pair is a configuration of the dataset on the hub.
_PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}


def _read_europarl(n_texts: int) -> dict[str, list[str]]:
    pools: dict[str, list[str]] = {}
    for language, pair in _PAIRS.items():
        pool = pools.setdefault(language, [])
        for row in _load("Helsinki-NLP/europarl", name=pair, split="train", streaming=True):
            _check(HUB_DATASETS["Helsinki-NLP/europarl"], row, pair)
            if (text := row["translation"][language] or "").strip():
                pool.append(text)
            if len(pool) > n_texts:
                break
    return pools


_LANGUAGES = {".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".java": "Java"} | dict.fromkeys(
    (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"), "PHP"
)
_LICENSE_CHARACTERS = 150  # Skipped because licenses are at the head of files: 50 tokens of 3 characters.
_LEAST_CHARACTERS = 534  # The skipped characters and 128 tokens; shorter files are left out.


def _read_code(n_texts: int) -> dict[str, list[str]]:
    """Read files in stream order until every language has enough. Common languages have more, which affects the draw.

    SAEBench runs the dataset's loading script, which current versions of `datasets` refuse. The script reads the
    repository's parquet files in order, determines the language from a file's extension, and renames `content` to
    `code`. This function reads the same parquet files. (The hub's conversion, refs/convert/parquet, has only part of
    datasets of this size.)
    """
    dataset = HUB_DATASETS["codeparrot/github-code"]
    pools: dict[str, list[str]] = {name: [] for name in dataset.classes}
    files = "hf://datasets/codeparrot/github-code/data/train-*.parquet"
    for row in _load("parquet", data_files={"train": files}, split="train", streaming=True):
        _check(dataset, row, "train")
        language = _LANGUAGES.get("." + row["path"].rpartition(".")[2])
        code = row["content"] or ""
        if language and len(code) > _LEAST_CHARACTERS and (text := code[_LICENSE_CHARACTERS:]).strip():
            pools[language].append(text)
            if all(len(pool) > n_texts for pool in pools.values()):
                break
    return pools


_STREAMS: dict[str, Callable[[int], dict[str, list[str]]]] = {
    "Helsinki-NLP/europarl": _read_europarl,
    "codeparrot/github-code": _read_code,
}
