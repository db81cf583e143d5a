"""Standard sparse probing: labelled datasets, one probe a class against the others, as SAEBench does it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask import assets, corpus
from posmask.errors import BadSetting
from posmask.intervals import mean_interval
from posmask.probing.sparse import k_sparse_correct
from posmask.rows import Measure
from posmask.seeds import generator

__all__ = ["DATASETS", "ProbeDataset", "probe_accuracy", "read_probe_dataset"]

DATASETS: dict[str, dict[str, tuple[str, str]]] = {
    # name: {class: (embedded table, label)}. The roles that SAEBench's datasets play, from the same sources where the
    # embedded tables have them; they are not the hub's datasets and do not go under their names.
    "ag_news": {
        "world": ("161_agnews_0", "1"),
        "sports": ("162_agnews_1", "1"),
        "business": ("163_agnews_2", "1"),
    },
    "github_code": {
        "C": ("158_code_C", "1"),
        "Python": ("159_code_Python", "1"),
        "HTML": ("160_code_HTML", "1"),
    },
    "amazon_sentiment": {"5_stars": ("157_amazon_5star", "1"), "other": ("157_amazon_5star", "0")},
}


@dataclass(frozen=True)
class ProbeDataset:
    """Texts with one class each; `train` says on which side of the probe's split each stands."""

    name: str
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    label: Int[Tensor, " text"]
    train: Bool[Tensor, " text"]


def read_probe_dataset(name: str, n_train: int, n_test: int, max_characters: int) -> ProbeDataset:
    """An embedded dataset, balanced: every class has the same number of texts.

    Args:
        n_train, n_test: how many texts a probe is fitted and tested on, half of them of its class; capped at what
            the smallest class has, 4 : 1 or as asked.
        max_characters: texts are cut to this length first (far beyond the context).
    """
    if name not in DATASETS:
        raise BadSetting(f"probe dataset {name!r} is unknown: choose from {', '.join(DATASETS)}")
    by_class: dict[str, list[str]] = {}
    seen: set[str] = set()
    for label, (table, target) in DATASETS[name].items():
        texts = corpus.unique_texts((text for text, found in assets.read_table(table) if found == target), "evaluation")
        by_class[label] = [text[:max_characters] for text in texts if corpus.text_key(text) not in seen]
        seen.update(corpus.text_key(text) for text in texts)
    smallest = min(map(len, by_class.values()))
    n_class_train, n_class_test = n_train // 2, n_test // 2
    if smallest < n_class_train + n_class_test:
        n_class_test = smallest * n_class_test // (n_class_train + n_class_test)
        n_class_train = smallest - n_class_test
    if n_class_train == 0 or n_class_test == 0:
        raise BadSetting(f"{name} has only {smallest} texts in its smallest class: too few to probe")
    texts, labels, train = [], [], []
    for number, found in enumerate(by_class.values()):
        drawn = torch.randperm(len(found), generator=generator(number, f"probe texts {name}"))
        for place, index in enumerate(drawn[: n_class_train + n_class_test].tolist()):
            texts.append(found[index])
            labels.append(number)
            train.append(place < n_class_train)
    return ProbeDataset(name, tuple(by_class), tuple(texts), torch.tensor(labels), torch.tensor(train))


def probe_accuracy(
    dataset: ProbeDataset, features: Float[Tensor, "text feature"], ks: Sequence[int], source: str
) -> list[Measure]:
    """`probe_accuracy`: the share of test texts that k-sparse probes get right, mean over classes; chance is 0.5.

    For each class, positives are all its texts and negatives as many, drawn evenly from the other classes; training
    and test sets are exactly balanced. One draw serves every k and every source (SAEBench draws anew for each).

    Args:
        features: mean-pooled, one row a text.
        source: `sae` or `llm`; stands in the slice.
    """
    correct: dict[int, list[Tensor]] = {k: [] for k in ks}
    for number in range(len(dataset.classes)):
        sides = [_balanced(dataset, number, train) for train in (True, False)]
        train, test = sides
        found = k_sparse_correct(
            features[train], dataset.label[train] == number, features[test], dataset.label[test] == number, ks
        )
        for k, right in found.items():
            correct[k].append(right.double())
    measures = []
    for k, parts in correct.items():
        joined = torch.cat(parts)
        where = {"dataset": dataset.name, "k": k, "source": source}
        measures.append(Measure("probe_accuracy", float(joined.mean()), *mean_interval(joined), len(joined), where))
    return measures


def _balanced(dataset: ProbeDataset, number: int, train: bool) -> Int[Tensor, " text"]:
    """Texts of one class and as many of the others, on one side of the split."""
    side = dataset.train == train
    positives = ((dataset.label == number) & side).nonzero()[:, 0]
    others = [other for other in range(len(dataset.classes)) if other != number]
    random = generator(number, f"negatives {dataset.name} {train}")
    each = -(-len(positives) // len(others))
    drawn = []
    for other in others:
        pool = ((dataset.label == other) & side).nonzero()[:, 0]
        drawn.append(pool[torch.randperm(len(pool), generator=random)[:each]])
    negatives = torch.cat(drawn)
    negatives = negatives[torch.randperm(len(negatives), generator=random)[: len(positives)]]
    return torch.cat([positives, negatives])
