"""Standard sparse probing: labeled datasets with one probe per class against the other classes, as in SAEBench.

There are two protocols. `saebench` reproduces sae-bench 0.6.0, including its random draws: negatives are redrawn for
every k, and the probe on all features reports its best epoch on the test texts. `default` differs in these two points:
all k and sources use the same negatives, and the epoch is chosen on held-out training texts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from posmask.data import embedded, tokens
from posmask.errors import BadSetting, DegenerateResult
from posmask.probing.catalogs import LANGUAGES, sentences_by_language
from posmask.probing.pooling import PooledTexts
from posmask.probing.probes import OnFit, ProbeTask, all_feature_correct, k_sparse_correct
from posmask.probing.saebench_datasets import HUB_DATASETS, cut_to_smallest, read_hub_texts
from posmask.results.intervals import ratio
from posmask.results.rows import Measure, missing
from posmask.seeds import generator

__all__ = [
    "DATASETS",
    "SAEBENCH_SEED",
    "ProbeDataset",
    "Protocol",
    "class_names",
    "dataset_names",
    "probe_accuracy",
    "read_probe_dataset",
]

Protocol = Literal["default", "saebench"]
SAEBENCH_SEED = 42

DATASETS: dict[str, dict[str, tuple[str, str]]] = {
    # name: {class: (embedded table, label)}. Counterparts of SAEBench's datasets, from the same sources if the embedded
    # tables have them. They differ from the hub's datasets, so their names differ too.
    "ag_news": {  # fancyzhx/ag_news, without its fourth class
        "world": ("161_agnews_0", "1"),
        "sports": ("162_agnews_1", "1"),
        "business": ("163_agnews_2", "1"),
    },
    "github_code": {  # codeparrot/github-code
        "C": ("158_code_C", "1"),
        "Python": ("159_code_Python", "1"),
        "HTML": ("160_code_HTML", "1"),
    },
    "amazon_sentiment": {  # canrager/amazon_reviews_mcauley_1and5_sentiment
        "5_stars": ("157_amazon_5star", "1"),
        "other": ("157_amazon_5star", "0"),
    },
    "occupations_1": {  # LabHC/bias_in_bios: the profession of the person a text speaks about, here from Wikipedia
        "journalist": ("59_wikidata_occupation_isjournalist", "1"),
        "athlete": ("60_wikidata_occupation_isathlete", "1"),
        "actor": ("61_wikidata_occupation_isactor", "1"),
    },
    "occupations_2": {
        "politician": ("62_wikidata_occupation_ispolitician", "1"),
        "singer": ("63_wikidata_occupation_issinger", "1"),
        "researcher": ("64_wikidata_occupation_isresearcher", "1"),
    },
    "news_class": {  # canrager/amazon_reviews_mcauley_1and5: the closest thing to its product categories
        "politics": ("97_news_class", "Politics"),
        "technology": ("97_news_class", "Technology"),
        "sport": ("97_news_class", "Sport"),
        "entertainment": ("97_news_class", "Entertainment"),
    },
}


@dataclass(frozen=True)
class ProbeDataset:
    """Texts with the index of their class; `train` is True for the training texts of probes."""

    name: str
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    label: Int[Tensor, " text"]
    train: Bool[Tensor, " text"]


SENTENCE_LANGUAGE = "sentence_language"  # Helsinki-NLP/europarl: the language of a sentence, here of program messages


def dataset_names() -> tuple[str, ...]:
    """All names that `read_probe_dataset` accepts: embedded datasets, then SAEBench's datasets by their hub names."""
    return (*DATASETS, SENTENCE_LANGUAGE, *HUB_DATASETS)


def class_names(name: str) -> tuple[str, ...]:
    """The classes of a dataset, without reading it."""
    if name in HUB_DATASETS:
        return tuple(HUB_DATASETS[name].classes)
    return LANGUAGES if name == SENTENCE_LANGUAGE else tuple(DATASETS[name])


def read_probe_dataset(
    name: str, n_train: int, n_test: int, max_characters: int | None, split: tokens.EvalSplit = "evaluation"
) -> ProbeDataset:
    """Read a dataset with the same number of texts in every class.

    Args:
        name: one of `dataset_names()`.
        n_train: training texts per probe, half of them of its class; reduced with `n_test` in the same ratio if the
            smallest class has fewer.
        n_test: test texts per probe, half of them of its class.
        max_characters: texts are truncated to this length, which is far longer than the context; None: they are not.
        split: of the embedded texts; the hub's datasets keep the splits that they have.

    Raises:
        BadSetting: no dataset has this name, one of its classes has no texts, or it has too few texts to probe.
        MissingAsset: the embedded texts or the hub are unavailable.
        MissingExtra: a dataset on the hub needs the package `datasets`, which is not installed.
    """
    if name in HUB_DATASETS:
        sides = read_hub_texts(name, n_train, n_test, SAEBENCH_SEED)
    elif name in DATASETS or name == SENTENCE_LANGUAGE:
        sides = _embedded_texts(name, n_train // 2, n_test // 2, split)
    else:
        raise BadSetting(f"probe dataset {name!r} is unknown: choose from {', '.join(dataset_names())}")
    rows = [
        (text[:max_characters], number, is_train)
        for number, pair in enumerate(sides.values())
        for is_train, texts in zip((True, False), pair, strict=True)
        for text in texts
    ]
    texts, labels, train = zip(*rows, strict=True)
    return ProbeDataset(name, tuple(sides), texts, torch.tensor(labels), torch.tensor(train))


def _embedded_texts(
    name: str, n_train: int, n_test: int, split: tokens.EvalSplit
) -> dict[str, tuple[list[str], list[str]]]:
    """The (training, test) texts of each class, from a split that SAEs do not train on."""
    by_class: dict[str, list[str]] = {}
    if name == SENTENCE_LANGUAGE:
        by_class = sentences_by_language(split)
    seen: set[str] = set()
    for label, (table, target) in DATASETS.get(name, {}).items():
        texts = tokens.unique_texts(
            (text for text, row_label in embedded.read_table(table) if row_label == target), split
        )
        by_class[label] = [text for text in texts if tokens.text_key(text) not in seen]
        seen.update(tokens.text_key(text) for text in texts)
    for label, texts in by_class.items():
        if not texts:
            raise BadSetting(f"{name} has no texts of its class {label!r}: leave the dataset out")
    n_train, n_test = cut_to_smallest(name, min(map(len, by_class.values())), n_train, n_test)
    sides = {}
    for number, (label, texts) in enumerate(by_class.items()):
        drawn = torch.randperm(len(texts), generator=generator(number, f"probe texts {name}")).tolist()
        chosen = [texts[index] for index in drawn[: n_train + n_test]]
        sides[label] = chosen[:n_train], chosen[n_train:]
    return sides


_Tasks = dict[int | str, list[ProbeTask]]
"""The tasks of the classes, by k."""
_Correct = dict[int | str, list[Tensor]]
"""Whether each test text of each task is classified correctly, by k."""


def probe_accuracy(
    dataset: ProbeDataset,
    features: PooledTexts,
    ks: Sequence[int],
    *,
    source: Literal["sae", "llm"],
    pooling: str = "mean",
    protocol: Protocol = "default",
    on_all: bool = True,
    random: torch.Generator | None = None,
    on_fit: OnFit = lambda *fit: None,
) -> list[Measure]:
    """`probe_accuracy`: the share of test texts that probes classify correctly, mean over classes; chance is 0.5.

    The positives of a class are all its texts. The same number of negatives is drawn evenly from the other classes, so
    training and test sets are exactly balanced. In the `default` protocol the k-sparse probes are fitted on `n_draws`
    draws of negatives, and the accuracy is the mean over the draws. Returns one measure per k, and one per k and class
    (`class` in the slice). Intervals by bootstrap over test texts, which are positives of one class and may be
    negatives of others.

    Args:
        features: one row per text, in the dataset's order; texts without kept tokens are left out.
        ks: numbers of features of the k-sparse probes.
        source: reported in the slice.
        pooling: name of the pooling of `features`, reported in the slice.
        on_all: add the probe on all features, as `k=all`.
        random: for the `saebench` protocol: the generator that sae-bench draws from, seeded once per run and passed
            from dataset to dataset.
        on_fit: called with the probes of the classes in order, draw by draw.

    Returns:
        The measures; without a value if the features are constant on training texts.

    Raises:
        BadSetting: a class or its negatives have no texts with kept tokens.
    """
    where = {"source": source, "pooling": pooling, "protocol": protocol}
    try:
        if protocol == "saebench":
            assert random is not None
            tasks, right = _saebench_correct(dataset, features, ks, on_all, random, on_fit)
        else:
            tasks, right = _default_correct(dataset, features, ks, on_all, on_fit)
    except DegenerateResult as error:
        return missing(str(error), ["probe_accuracy"], [{"dataset": dataset.name, "k": k, **where} for k in ks])
    return _accuracies(dataset, ~dataset.train & (features.n_tokens > 0), tasks, right, where)


def _accuracies(
    dataset: ProbeDataset,
    tested: Bool[Tensor, " text"],
    tasks: _Tasks,
    right: _Correct,
    where: Mapping[str, object],
) -> list[Measure]:
    """The measures of `probe_accuracy`.

    Args:
        tested: texts that probes may be tested on: the units, which are the same in every cell.
        where: more of the slice.
    """
    measures = []
    for k, correct_by_task in right.items():
        n_train = min(len(task.train) for task in tasks[k])
        at_k = {"dataset": dataset.name, "k": k, **where, "train": n_train}
        top, bottom = (torch.zeros(len(dataset.classes), len(dataset.texts), dtype=torch.float64) for _ in range(2))
        for number, (task, correct) in enumerate(zip(tasks[k], correct_by_task, strict=True)):
            number %= len(dataset.classes)
            top[number, task.test] += correct.double()
            bottom[number, task.test] += 1
        for number, label in enumerate(dataset.classes):
            is_tested = bottom[number] > 0
            size = {"train": len(tasks[k][number].train), "class": label}
            of_class = top[number, is_tested], bottom[number, is_tested]
            measures.append(ratio("probe_accuracy", *of_class, slice={**at_k, **size}))
        measures.append(ratio("probe_accuracy", top.sum(0)[tested], bottom.sum(0)[tested], slice=at_k))
    return measures


def n_draws(n_classes: int, n_test: int) -> int:
    """How often the negatives of a probe are drawn: until it is tested on 500 texts, at most 5 times.

    With two classes there is no choice of negatives. With large test sets it hardly matters.

    >>> n_draws(5, 60), n_draws(5, 200), n_draws(5, 1000), n_draws(2, 60)
    (5, 3, 1, 1)
    """
    return 1 if n_classes == 2 else max(1, min(5, math.ceil(500 / n_test)))


def _saebench_correct(
    dataset: ProbeDataset,
    features: PooledTexts,
    ks: Sequence[int],
    on_all: bool,
    random: torch.Generator,
    on_fit: OnFit,
) -> tuple[_Tasks, _Correct]:
    """Fit the probes in the order of sae-bench's random draws: on all features, then for each k on new negatives."""
    kept, numbers = features.n_tokens > 0, range(len(dataset.classes))
    tasks: _Tasks = {}
    right: _Correct = {}
    if on_all:
        tasks["all"], right["all"] = [], []
        for number in numbers:
            tasks["all"].append(_task(dataset, kept, number, random))
            right["all"].append(all_feature_correct(features, tasks["all"][-1], random, choose_on_test=True))
    for k in ks:
        tasks[k] = [_task(dataset, kept, number, random) for number in numbers]
        right[k] = k_sparse_correct(features, tasks[k], (k,), on_fit)[k]
    return tasks, right


def _default_correct(
    dataset: ProbeDataset, features: PooledTexts, ks: Sequence[int], on_all: bool, on_fit: OnFit
) -> tuple[_Tasks, _Correct]:
    """Fit the probes of all k on the same draws of negatives; the probe on all features on the first draw."""
    kept, numbers = features.n_tokens > 0, range(len(dataset.classes))
    streams = [generator(number, f"probe {dataset.name}") for number in numbers]

    def draw() -> list[ProbeTask]:
        return [_task(dataset, kept, number, stream) for number, stream in zip(numbers, streams, strict=True)]

    first = draw()
    tasks: _Tasks = {}
    right: _Correct = {}
    if on_all:
        tasks["all"] = first
        right["all"] = [all_feature_correct(features, *pair) for pair in zip(first, streams, strict=True)]
    n_test = max(len(task.test) for task in first)
    every = [*first, *(task for _ in range(n_draws(len(numbers), n_test) - 1) for task in draw())]
    right |= k_sparse_correct(features, every, ks, on_fit)
    return tasks | dict.fromkeys(ks, every), right


def _task(dataset: ProbeDataset, kept: Bool[Tensor, " text"], number: int, random: torch.Generator) -> ProbeTask:
    """A class against the others, with the draws of sae-bench's `prepare_probe_data`, training texts first."""
    sides = []
    for train in (True, False):
        of_class = [
            ((dataset.label == other) & (dataset.train == train) & kept).nonzero()[:, 0]
            for other in range(len(dataset.classes))
        ]
        positives = of_class.pop(number)
        each = math.ceil(len(positives) / len(of_class))
        negatives = torch.cat([texts[torch.randperm(len(texts), generator=random)[:each]] for texts in of_class])
        negatives = negatives[torch.randperm(len(negatives), generator=random)[: len(positives)]]
        drawn = torch.cat([positives[: len(negatives)], negatives])
        if len(drawn) == 0:
            raise BadSetting(
                f"{dataset.name} has no texts with content on both sides of its class {dataset.classes[number]!r}: "
                "give each class more texts"
            )
        drawn = drawn[torch.randperm(len(drawn), generator=random)]
        sides += [drawn, dataset.label[drawn] == number]
    return ProbeTask(*sides)
