"""Probing of order: what k-sparse probes, and the bag of tokens, tell of the order-sensitive tasks."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from posmask import corpus
from posmask.errors import BadSetting
from posmask.intervals import mean_interval
from posmask.probing.order_tasks import OrderTask
from posmask.probing.sparse import k_sparse_correct
from posmask.rows import Measure

__all__ = ["bag_accuracy", "order_accuracy"]


def order_accuracy(
    task: OrderTask, features: Float[Tensor, "text feature"], ks: Sequence[int], pooling: str
) -> list[Measure]:
    """`order_accuracy`: the share of test texts whose order a k-sparse probe tells; chance is 0.5 in every task.

    Where there are more than two classes, one probe a class against the others, on one other text of each of its
    groups: so every probe's texts come in pairs of equal bags. The mean over classes. Intervals by bootstrap over
    test groups; `n` counts test groups.

    Args:
        features: one row a text, in the task's order.
        pooling: how they were pooled; stands in the slice.
    """
    groups = features.unflatten(0, (-1, task.n_classes))
    train, test = groups[: task.n_train_groups], groups[task.n_train_groups :]
    positives = range(1, 2) if task.n_classes == 2 else range(task.n_classes)
    right: dict[int, list[Tensor]] = {k: [] for k in ks}
    for positive in positives:
        pairs = [_pairs(side, positive) for side in (train, test)]
        labels = [torch.tensor([True, False]).repeat(len(pair) // 2) for pair in pairs]
        for k, correct in k_sparse_correct(pairs[0], labels[0], pairs[1], labels[1], ks).items():
            right[k].append(correct.double().unflatten(0, (-1, 2)).mean(1))
    measures = []
    for k, parts in right.items():
        by_group = torch.stack(parts).mean(0)
        where = {"task": task.name, "k": k, "pooling": pooling}
        measures.append(
            Measure("order_accuracy", float(by_group.mean()), *mean_interval(by_group), len(by_group), where)
        )
    return measures


def _pairs(groups: Float[Tensor, "group class feature"], positive: int) -> Float[Tensor, "text feature"]:
    """The positive class's text and one other of each group, group by group."""
    n_classes = groups.shape[1]
    number = torch.arange(len(groups))
    other = (positive + 1 + number % (n_classes - 1)) % n_classes
    return torch.stack([groups[:, positive], groups[number, other]], 1).flatten(0, 1)


def bag_accuracy(task: OrderTask, tokenizer: corpus.Tokenizer) -> list[Measure]:
    """`order_bag_accuracy`: the same split, K classes, from token counts alone: exactly 1/K, or the task leaks."""
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
            f"a bag of words scores {accuracy} on {task.name}, not exactly 1/{task.n_classes}: its groups do not hold "
            "equal bags under this tokenizer, leave the task out"
        )
    return [Measure("order_bag_accuracy", accuracy, n=task.n_test_groups, slice={"task": task.name})]
