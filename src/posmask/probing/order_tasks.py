"""Order-sensitive tasks: classes that hold the same multiset of tokens, so that only order can tell them apart.

A task is a list of groups; a group has one text a class, and all its texts have exactly the same token ids in
different orders. Any function of the bag of tokens therefore gets exactly one of a group's K texts right: 1/K is a
proof, not a statistic. Groups whose tokens are not equal under the tokenizer are dropped, and a group stays whole on
one side of the split, as do the articles, people and nouns that it is made of.

To add a task: write a function from a random generator to two iterators of groups (training, test), and add it to
`ORDER_TASKS`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations

import torch

from posmask import assets, corpus
from posmask.errors import BadSetting, NothingToDo
from posmask.seeds import generator

__all__ = ["ORDER_TASKS", "OrderTask", "make_order_task"]

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


_NOUNS: list[str] = """
    house road river tree car table chair window garden school tower bridge market farm field mountain lake ship
    boat train truck engine lamp clock picture mirror door wall roof cabinet desk bottle basket barrel fountain
    statue station hotel museum theater hospital temple castle cottage barn fence gate
""".split()
_PLACES = ("near", "behind", "beside", "above", "below", "beyond", "opposite")
_STATES = "old new small large famous empty beautiful dirty expensive ugly clean".split()

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
