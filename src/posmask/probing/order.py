"""Order-sensitive probing: classes that hold the same multiset of tokens, so that only order can tell them apart.

A task is a list of groups; a group has one text a class, and all its texts have exactly the same token ids in
different orders. Any function of the bag of tokens therefore gets exactly one of a group's K texts right: 1/K is a
proof, not a statistic. Groups whose tokens are not equal under the tokenizer are dropped, and a group stays whole on
one side of the split, as do the articles, people and nouns that it is made of.

To add a task: write a function from a random generator to two iterators of groups (training, test), and add it to
`ORDER_TASKS`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, permutations

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from posmask import assets, corpus
from posmask.errors import BadSetting, NothingToDo
from posmask.intervals import mean_interval
from posmask.probing.sparse import k_sparse_correct
from posmask.rows import Measure
from posmask.seeds import generator

__all__ = ["ORDER_TASKS", "OrderTask", "bag_accuracy", "make_order_task", "order_accuracy"]

Group = tuple[str, ...]  # One text a class, in the order of the classes.
_Groups = tuple[Iterator[Group], Iterator[Group]]  # Training and test groups.


@dataclass(frozen=True)
class OrderTask:
    """Texts in whole groups: text `g * n_classes + c` is class c of group g; the first `n_train_groups` train."""

    name: str
    n_classes: int
    texts: tuple[str, ...]
    n_train_groups: int
    n_test_groups: int


def _shuffled(items: list[str], random: torch.Generator) -> list[str]:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]


def _halves(items: list[str], test_share: float = 0.25) -> tuple[list[str], list[str]]:
    cut = round(len(items) * (1 - test_share))
    return items[:cut], items[cut:]


def _evaluation_texts(table: str, label: str | None = None) -> list[str]:
    return corpus.unique_texts(
        (text for text, found in assets.read_table(table) if label is None or found == label), "evaluation"
    )


def _opening(text: str, n_words: int) -> str:
    return " ".join(text.split()[:n_words])


def _topic_permutation(random: torch.Generator) -> _Groups:
    """The openings of three articles on politics, technology and sport, in each of the 6 orders (K = 6).

    No article is in more than one group.
    """
    pools = [_shuffled(_evaluation_texts("97_news_class", topic), random) for topic in _TOPICS]
    pairs = [_halves(pool) for pool in pools]

    def groups(side: int) -> Iterator[Group]:
        for articles in zip(*(pair[side] for pair in pairs), strict=False):
            openings = [f" {_opening(article, 10)} ;" for article in articles]
            yield tuple("News:" + "".join(openings[i] for i in order) for order in permutations(range(3)))

    return groups(0), groups(1)


_TOPICS = ("Politics", "Technology", "Sport")


def _contrast_order(random: torch.Generator) -> _Groups:
    """A review of one good and one bad phrase, "Review: P, but N." or "Review: N, but P.": the last one's polarity.

    No phrase is in more than one group, and none of the test phrases lies within a training phrase or around one.
    """
    sides = []
    for label in ("1", "0"):
        phrases = [text.strip(" .") for text in _evaluation_texts("92_glue_sst2", label)]
        train, test = _halves(_shuffled([text for text in phrases if 3 <= len(text.split()) <= 12], random))
        sides.append((train, [new for new in test if not any(new in old or old in new for old in train)]))

    def groups(side: int) -> Iterator[Group]:
        for good, bad in zip(sides[0][side], sides[1][side], strict=False):
            yield f"Review: {good} , but {bad} .", f"Review: {bad} , but {good} ."

    return groups(0), groups(1)


def _chronology(random: torch.Generator) -> _Groups:
    """Two people and their years of birth: was the first named one born earlier? At least 20 years lie between.

    No person is in more than one group.
    """
    people = {}
    for name, year in assets.read_table("2_hist_fig_birthyear"):
        if corpus.split_of(name) == "evaluation" and year.isdigit() and len(year) == 4:
            people[name] = year
    names = _shuffled(list(people), random)

    def groups(names: list[str]) -> Iterator[Group]:
        for one, other in zip(names[::2], names[1::2], strict=False):
            if abs(int(people[one]) - int(people[other])) >= 20:
                early, late = sorted((one, other), key=lambda name: int(people[name]))
                first, second = (f" {name} was born in {people[name]} ;" for name in (early, late))
                yield f"People:{second}{first}", f"People:{first}{second}"

    train, test = _halves(names)
    return groups(train), groups(test)


def _agreement_swap(random: torch.Generator) -> _Groups:
    """ "They say the N1 near the N2 is old.": swapping a singular with a plural noun breaks the verb's agreement.

    No noun is in both splits.
    """
    train, test = _halves(_shuffled(_NOUNS, random), test_share=0.4)

    def groups(nouns: list[str]) -> Iterator[Group]:
        seen = set()
        while len(seen) < len(nouns) * (len(nouns) - 1) * 4:
            one, other = (nouns[i] for i in torch.randperm(len(nouns), generator=random)[:2].tolist())
            where = _PLACES[int(torch.randint(len(_PLACES), (), generator=random))]
            how = _STATES[int(torch.randint(len(_STATES), (), generator=random))]
            verb = ("is", "are")[int(torch.randint(2, (), generator=random))]
            if (key := (one, other, where, how, verb)) in seen:
                continue
            seen.add(key)
            subject, rest = (one, other + "s") if verb == "is" else (one + "s", other)
            yield (
                f"They say the {rest} {where} the {subject} {verb} {how}.",
                f"They say the {subject} {where} the {rest} {verb} {how}.",
            )

    return groups(train), groups(test)


_NOUNS = [
    "house",
    "road",
    "river",
    "tree",
    "car",
    "table",
    "chair",
    "window",
    "garden",
    "school",
    "tower",
    "bridge",
    "market",
    "farm",
    "field",
    "mountain",
    "lake",
    "ship",
    "boat",
    "train",
    "truck",
    "engine",
    "lamp",
    "clock",
    "picture",
    "mirror",
    "door",
    "wall",
    "roof",
    "cabinet",
    "desk",
    "bottle",
    "basket",
    "barrel",
    "fountain",
    "statue",
    "station",
    "hotel",
    "museum",
    "theater",
    "hospital",
    "temple",
    "castle",
    "cottage",
    "barn",
    "fence",
    "gate",
]
_PLACES = ("near", "behind", "beside", "above", "below", "beyond", "opposite")
_STATES = (
    "old",
    "new",
    "small",
    "large",
    "famous",
    "empty",
    "beautiful",
    "dirty",
    "expensive",
    "ugly",
    "clean",
)

ORDER_TASKS: dict[str, Callable[[torch.Generator], _Groups]] = {
    "topic_permutation": _topic_permutation,
    "contrast_order": _contrast_order,
    "chronology": _chronology,
    "agreement_swap": _agreement_swap,
}


def make_order_task(
    name: str,
    tokenizer: corpus.Tokenizer,
    n_positions: int,
    n_train_groups: int,
    n_test_groups: int,
    seed: int = 0,
) -> OrderTask:
    """Build a task's texts; groups whose token multisets differ, or which do not fit the context, are left out.

    Raises:
        BadSetting: no such task.
        NothingToDo: the embedded texts do not give that many groups.
    """
    if name not in ORDER_TASKS:
        raise BadSetting(f"order task {name!r} is unknown: choose from {', '.join(ORDER_TASKS)}")
    chosen: list[Group] = []
    for groups, wanted in zip(ORDER_TASKS[name](generator(seed, name)), (n_train_groups, n_test_groups), strict=True):
        valid = (group for group in groups if _same_bag(group, tokenizer, n_positions))
        found = list(islice(valid, wanted))
        if len(found) < wanted:
            raise NothingToDo(
                f"{name} has only {len(found)} groups of equal token multisets where {wanted} were asked for: lower "
                "order_train_groups or order_test_groups"
            )
        chosen += found
    texts = tuple(text for group in chosen for text in group)
    return OrderTask(name, len(chosen[0]), texts, n_train_groups, n_test_groups)


def _same_bag(group: Group, tokenizer: corpus.Tokenizer, n_positions: int) -> bool:
    rows = tokenizer(list(group), add_special_tokens=False)["input_ids"]
    bags = [Counter(row) for row in rows]
    return len(rows[0]) < n_positions and all(bag == bags[0] for bag in bags)


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
