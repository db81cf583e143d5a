"""Probes on order tasks, and controls for other explanations of their accuracy.

Chance is 0.5 for every probe. A task of more than two classes has one probe per class, against one other text of the
same group, so the texts of every probe come in pairs of equal bags of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from posmask.data import tokens
from posmask.errors import BadSetting, DegenerateResult
from posmask.probing.attention import TextCodes, attention_correct
from posmask.probing.order_tasks import OrderTask, edge_features
from posmask.probing.pooling import PooledTexts
from posmask.probing.probes import OnFit, ProbeTask, all_feature_correct, k_sparse_correct
from posmask.results.intervals import ratio
from posmask.results.rows import Measure, missing
from posmask.seeds import generator

__all__ = [
    "attention_accuracy",
    "bag_accuracy",
    "edge_accuracy",
    "order_accuracy",
    "order_accuracy_of_all",
    "order_tokens",
    "positives",
    "validation_accuracy",
    "with_chosen",
]

N_PERMUTATIONS = 5


def order_tokens(task: OrderTask, tokenizer: tokens.Tokenizer, n_positions: int) -> tokens.Tokens:
    """The tokens of a task's texts, followed by copies of its test texts with their tokens in random order."""
    test = torch.arange(task.n_train_groups * task.n_classes, len(task.texts))
    groups = torch.arange(len(task.texts)) // task.n_classes if task.at_offsets else None
    padded = tokens.pad(task.texts, tokenizer, n_positions, groups_at_offsets=groups)
    return tokens.with_shuffled(padded, test, tokenizer)


def order_accuracy(
    task: OrderTask,
    features: PooledTexts,
    ks: Sequence[int],
    pooling: str,
    *,
    permutations: bool = True,
    on_fit: OnFit = lambda *fit: None,
) -> list[Measure]:
    """`order_accuracy`: the share of test texts that a k-sparse probe classifies correctly, with two controls.

    Means over classes. `order_shuffled` is the accuracy of the same probe on test texts with shuffled tokens.
    `order_permuted` is the mean accuracy of 5 probes whose training labels are swapped in a random half of the groups.
    Both controls are 0.5 in expectation. `order_accuracy_by_t` is the accuracy of probes on the features with the
    largest t statistics. Units are test groups.

    Args:
        features: one row per text of `order_tokens`.
        ks: numbers of features.
        pooling: name of the pooling or control that `features` are from, reported in the slice.
        permutations: whether to fit probes with permuted labels.
        on_fit: called with the probes of `positives(task)` in order, followed by the permuted probes.

    Returns:
        One measure per metric and k; `order_accuracy` without a value if the features are constant on training texts.
    """
    n_texts = len(task.texts)
    train, test = _groups(task)
    probes, permuted = [], []
    for positive in positives(task):
        train_pairs, train_label = _pairs(task, train, positive)
        test_pairs, test_label = _pairs(task, test, positive)
        shuffled = test_pairs + n_texts - task.n_train_groups * task.n_classes
        tested = torch.cat([test_pairs, shuffled]), test_label.repeat(2)
        probes.append(ProbeTask(train_pairs, train_label, *tested))
        for draw in range(N_PERMUTATIONS if permutations else 0):
            swap = torch.rand(len(train), generator=generator(positive, f"permuted {task.name} {draw}")) < 0.5
            permuted.append(ProbeTask(train_pairs, train_label ^ swap.repeat_interleave(2), *tested))
    slices = {k: {"task": task.name, "about": task.about, "k": k, "pooling": pooling} for k in ks}
    try:
        correct_by_k = k_sparse_correct(features, [*probes, *permuted], ks, on_fit)
        correct_by_t = k_sparse_correct(features, probes, ks, ranking="t")
    except DegenerateResult as error:
        return missing(str(error), ["order_accuracy"], slices.values())
    measures = []
    for k, correct in correct_by_k.items():
        by_group = torch.stack([right.double().view(2, -1, 2).mean(2) for right in correct])
        accuracy = by_group[: len(probes)].mean(0)
        by_t = torch.stack([right.double().view(2, -1, 2).mean(2)[0] for right in correct_by_t[k]]).mean(0)
        measures += [
            ratio("order_accuracy", accuracy[0], slice=slices[k]),
            ratio("order_shuffled", accuracy[1], slice=slices[k]),
            ratio("order_accuracy_by_t", by_t, slice=slices[k]),
        ]
        if permutations:
            measures.append(ratio("order_permuted", by_group[len(probes) :].mean(0)[0], slice=slices[k]))
    return measures


def order_accuracy_of_all(task: OrderTask, features: PooledTexts, pooling: str) -> list[Measure]:
    """`order_accuracy` with `k=all`: that of probes on all features (`all_feature_correct`), mean over classes."""
    slices = {"task": task.name, "about": task.about, "k": "all", "pooling": pooling}
    random, right = generator(0, f"all features {task.name}"), []
    for positive in positives(task):
        pairs = [_pairs(task, groups, positive) for groups in _groups(task)]
        probe = ProbeTask(*pairs[0], *pairs[1])
        right.append(all_feature_correct(features, probe, random).double().view(-1, 2).mean(1))
    return [ratio("order_accuracy", torch.stack(right).mean(0), slice=slices)]


def attention_accuracy(task: OrderTask, codes: TextCodes) -> list[Measure]:
    """`order_accuracy` with `pooling=attention;k=all`: that of attention probes, mean over classes."""
    slices = {"task": task.name, "about": task.about, "k": "all", "pooling": "attention"}
    random, right = generator(0, f"attention {task.name}"), []
    for positive in positives(task):
        train, test = (_pairs(task, groups, positive) for groups in _groups(task))
        try:
            correct = attention_correct(codes, ProbeTask(*train, *test), random)
        except DegenerateResult as error:
            return missing(str(error), ["order_accuracy"], [slices])
        right.append(correct.double().view(-1, 2).mean(1))
    return [ratio("order_accuracy", torch.stack(right).mean(0), slice=slices)]


def validation_accuracy(task: OrderTask, features: PooledTexts, ks: Sequence[int], pooling: str) -> list[Measure]:
    """`order_validation`: `order_accuracy` on the last quarter of the training groups, of probes on the others."""
    train, _ = _groups(task)
    cut = 3 * len(train) // 4
    probes = [
        ProbeTask(*_pairs(task, train[:cut], positive), *_pairs(task, train[cut:], positive))
        for positive in positives(task)
    ]
    slices = {k: {"task": task.name, "about": task.about, "k": k, "pooling": pooling} for k in ks}
    try:
        correct_by_k = k_sparse_correct(features, probes, ks)
    except DegenerateResult as error:
        return missing(str(error), ["order_validation"], slices.values())
    return [
        ratio(
            "order_validation",
            torch.stack([right.double().view(-1, 2).mean(1) for right in correct]).mean(0),
            slice=slices[k],
        )
        for k, correct in correct_by_k.items()
    ]


def with_chosen(measures: Sequence[Measure]) -> list[Measure]:
    """Return a task's measures, and the `order_accuracy` of `pooling=chosen`.

    It is that of the pooling with the highest `order_validation` at the same k; the first of several.
    """
    chosen = []
    of_metric = {
        metric: [measure for measure in measures if measure.metric == metric and math.isfinite(measure.value)]
        for metric in ("order_validation", "order_accuracy")
    }
    for k in dict.fromkeys(measure.slice["k"] for measure in of_metric["order_validation"] if measure.slice):
        at_k = [measure for measure in of_metric["order_validation"] if measure.slice and measure.slice["k"] == k]
        best = max(at_k, key=lambda measure: measure.value)
        (tested,) = [measure for measure in of_metric["order_accuracy"] if measure.slice == best.slice]
        chosen.append(replace(tested, slice={**(tested.slice or {}), "pooling": "chosen"}))
    return [*measures, *chosen]


def _groups(task: OrderTask) -> tuple[Int[Tensor, " train_group"], Int[Tensor, " test_group"]]:
    """The training and the test groups."""
    train = torch.arange(task.n_train_groups)
    return train, torch.arange(task.n_train_groups, task.n_train_groups + task.n_test_groups)


def positives(task: OrderTask) -> range:
    """The classes with a probe: all classes, or class 1 of a task of two classes."""
    return range(1, 2) if task.n_classes == 2 else range(task.n_classes)


def _pairs(
    task: OrderTask, groups: Int[Tensor, " group"], positive: int
) -> tuple[Int[Tensor, " text"], Bool[Tensor, " text"]]:
    """The text of the positive class and one other text of each group, group by group, with their labels."""
    other = (positive + 1 + groups % (task.n_classes - 1)) % task.n_classes
    first = groups * task.n_classes
    pairs = torch.stack([first + positive, first + other], 1).flatten()
    return pairs, torch.tensor([True, False]).repeat(len(groups))


def bag_accuracy(task: OrderTask, tokenizer: tokens.Tokenizer) -> list[Measure]:
    """`order_bag_accuracy`: accuracy of a classifier of the K classes on token counts, which must be 1/K.

    Raises:
        BadSetting: the accuracy is not 1/K, so the groups of the task do not have equal token counts.
    """
    rows = tokenizer(list(task.texts), add_special_tokens=False)["input_ids"]
    text = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    counts = csr_matrix((np.ones(len(text)), (text, np.concatenate(rows).astype(np.int64))))
    counts.sum_duplicates()
    labels = np.arange(len(rows)) % task.n_classes
    cut = task.n_train_groups * task.n_classes
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(counts[:cut], labels[:cut])
    accuracy = float((probe.predict(counts[cut:]) == labels[cut:]).mean())
    if abs(accuracy - 1 / task.n_classes) > 1e-9:
        raise BadSetting(
            f"a bag of words scores {accuracy} on {task.name}, not exactly 1/{task.n_classes}: its groups do not "
            "have equal token counts under this tokenizer; remove the task"
        )
    return [
        Measure("order_bag_accuracy", accuracy, n=task.n_test_groups, slice={"task": task.name, "about": task.about})
    ]


def edge_accuracy(task: OrderTask, tokenizer: tokens.Tokenizer) -> list[Measure]:
    """`order_edges`: accuracy of probes on the first three and last three tokens, on the pairs of `order_accuracy`."""
    edges = edge_features(task, tokenizer)
    train, test = _groups(task)
    right = []
    for positive in positives(task):
        train_pairs, train_label = _pairs(task, train, positive)
        test_pairs, test_label = _pairs(task, test, positive)
        probe = LogisticRegression(C=1.0, max_iter=1000).fit(edges[train_pairs.numpy()], train_label.numpy())
        predicted = torch.from_numpy(np.asarray(probe.predict(edges[test_pairs.numpy()]), dtype=bool))
        right.append((predicted == test_label).double().view(-1, 2).mean(1))
    return [ratio("order_edges", torch.stack(right).mean(0), slice={"task": task.name, "about": task.about})]
