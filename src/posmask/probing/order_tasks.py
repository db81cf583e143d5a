"""Order-sensitive tasks: the classes of a task have the same multisets of tokens and differ only in their order.

A task is a list of groups. A group has one text per class, and all its texts have exactly the same token ids in
different orders. Any function of the bag of tokens therefore classifies exactly one of the K texts of a group
correctly, so its accuracy is 1/K by construction. Groups with unequal tokens under the tokenizer are dropped. All texts
of a group are in the same split, as are the articles, people and nouns they are made of. Every part that moves begins
with a space and lies between a beginning and an end that all texts of the task share, so moving it changes no token.

To add a task, write a function that takes a random generator and a split and returns two iterators of groups (training
and test). Its docstring describes the groups. Add it to `ORDER_TASKS` with the meanings of its classes.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, permutations, zip_longest
from typing import Literal, TypeVar

import numpy as np
import scipy
import torch

from posmask.data import embedded, tokens
from posmask.errors import BadSetting, NothingToDo
from posmask.probing.catalogs import translations
from posmask.seeds import generator

__all__ = ["ORDER_TASKS", "About", "OrderRecipe", "OrderTask", "edge_features", "find_groups", "make_order_task"]

Group = tuple[str, ...]  # One text per class, in the order of the classes.
_Groups = tuple[Iterator[Group], Iterator[Group]]  # Training and test groups.


About = Literal["block", "local"]
"""block: where a passage of several words stands. local: the order of neighboring words or sentences."""


@dataclass(frozen=True)
class OrderTask:
    """Texts of complete groups: text `g * n_classes + c` is class c of group g; the first `n_train_groups` train.

    With `at_offsets` each group stands at a random position of its context, after the end of other texts.
    """

    name: str
    n_classes: int
    texts: tuple[str, ...]
    n_train_groups: int
    n_test_groups: int
    about: About
    at_offsets: bool = False


@dataclass(frozen=True)
class OrderRecipe:
    """How a task's groups are made, and its description.

    Args:
        groups: makes (training, test) groups from a random generator and a split.
        question: the question about a text that its class answers.
        labels: meaning of each class.
        split_by: what is never in both the training and the test groups.
        sources: each carrier with a description of the part that is used.
        about: what kind of order it is.
        for_confirmation: whether it is kept for confirming hypotheses, so that nothing may be chosen by it. The texts
            of these tasks stand at random positions of the context, so that no position of the context tells where in
            the text a token is.
    """

    groups: Callable[[torch.Generator, tokens.EvalSplit], _Groups]
    question: str
    labels: tuple[str, ...]
    split_by: str
    sources: tuple[tuple[embedded.Carrier, str], ...]
    about: About
    for_confirmation: bool = False


_Item = TypeVar("_Item")


def _shuffled(items: list[_Item], random: torch.Generator) -> list[_Item]:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]


def _halves(items: list[_Item], test_share: float = 0.25) -> tuple[list[_Item], list[_Item]]:
    cut = round(len(items) * (1 - test_share))
    return items[:cut], items[cut:]


def _in_rounds(lists: Iterable[list[_Item]]) -> Iterator[_Item]:
    """The first of each list, then the second of each, and so on."""
    return (item for items in zip_longest(*lists) for item in items if item is not None)


def _texts(table: str, split: tokens.EvalSplit, label: str | None = None) -> list[str]:
    return tokens.unique_texts(
        (text for text, row_label in embedded.read_table(table) if label is None or row_label == label), split
    )


def _opening(text: str, n_words: int) -> str:
    return " ".join(text.split()[:n_words])


def _each_once(groups: Iterable[tuple[str, ...]], seen: set[str]) -> list[tuple[str, ...]]:
    """The groups of distinct parts that are not in `seen`, in order; their parts are added to `seen`."""
    unseen = []
    for parts in groups:
        if len(set(parts)) == len(parts) and not seen.intersection(parts):
            seen.update(parts)
            unseen.append(parts)
    return unseen


def _in_both_orders(start: str, pairs: Iterable[tuple[str, ...]]) -> Iterator[Group]:
    """Two parts in reversed order (class 0) and in the given order (class 1)."""
    for first, second in pairs:
        yield f"{start} {second} ; {first} ;", f"{start} {first} ; {second} ;"


def _sentences(text: str) -> list[str]:
    """The sentences of a text that end with a word in lower case and a mark."""
    sentences, words = [], []
    for word in text.split():
        words.append(word)
        if _LAST_WORD.fullmatch(word):
            sentences.append(" ".join(words))
            words = []
    return sentences


def _articles(random: torch.Generator, split: tokens.EvalSplit) -> tuple[list[list[str]], list[list[str]]]:
    """The complete sentences of news articles, by article, for the training and for the test articles.

    A sentence ends with a word in lower case and a full stop, so "U.S." and "Sen." do not end sentences. Headlines and
    first sentences, which begin with a place and an agency, are left out.
    """
    articles = [_sentences(text.partition("\n")[2])[1:] for text in _texts("100_news_fake", split, "1")]
    return _halves(_shuffled(articles, random))


_LAST_WORD = re.compile(r"[a-z-]+[.!?][\"”]?")


def _topic_permutation(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """The openings of three articles on politics, technology and sport, in each of the 6 orders (K = 6).

    No article is in more than one group.
    """
    pools = [_shuffled(_texts("97_news_class", split, topic), random) for topic in _TOPICS]
    pairs = [_halves(pool) for pool in pools]

    def groups(side: int) -> Iterator[Group]:
        for articles in zip(*(pair[side] for pair in pairs), strict=False):
            openings = [f" {_opening(article, 10)} ;" for article in articles]
            yield tuple("News:" + "".join(openings[i] for i in order) for order in permutations(range(3)))

    return groups(0), groups(1)


_TOPICS = ("Politics", "Technology", "Sport")


def _contrast_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """A review of one good and one bad phrase, "Review: P, but N." or "Review: N, but P.": the last phrase's polarity.

    No phrase is in more than one group, and no test phrase contains a training phrase or is contained in one.
    """
    sides = []
    for label in ("1", "0"):
        phrases = [text.strip(" .") for text in _texts("92_glue_sst2", split, label)]
        train, test = _halves(_shuffled([text for text in phrases if 3 <= len(text.split()) <= 12], random))
        sides.append((train, [new for new in test if not any(new in old or old in new for old in train)]))

    def groups(side: int) -> Iterator[Group]:
        for good, bad in zip(sides[0][side], sides[1][side], strict=False):
            yield f"Review: {good} , but {bad} .", f"Review: {bad} , but {good} ."

    return groups(0), groups(1)


def _chronology(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """Two people and their years of birth, at least 20 years apart: was the person named first born earlier?

    No person is in more than one group.
    """
    people = {}
    for name, year in embedded.read_table("2_hist_fig_birthyear"):
        if tokens.split_of(name) == split and year.isdigit() and len(year) == 4:
            people[name] = year
    names = _shuffled(list(people), random)

    def groups(names: list[str]) -> Iterator[Group]:
        for name_a, name_b in zip(names[::2], names[1::2], strict=False):
            if abs(int(people[name_a]) - int(people[name_b])) >= 20:
                early, late = sorted((name_a, name_b), key=lambda name: int(people[name]))
                first, second = (f" {name} was born in {people[name]} ;" for name in (early, late))
                yield f"People:{second}{first}", f"People:{first}{second}"

    train, test = _halves(names)
    return groups(train), groups(test)


def _agreement_swap(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """ "They say the N1 near the N2 is old.": swapping a singular with a plural noun breaks the verb's agreement.

    No noun is in both splits. A third of the nouns is for validation.
    """
    split_nouns = [noun for n, noun in enumerate(_NOUNS) if (n % 3 == 0) == (split == "validation")]
    train, test = _halves(_shuffled(split_nouns, random), test_share=0.4)

    def groups(nouns: list[str]) -> Iterator[Group]:
        seen = set()
        while len(seen) < len(nouns) * (len(nouns) - 1) * 4:
            noun_a, noun_b = (nouns[i] for i in torch.randperm(len(nouns), generator=random)[:2].tolist())
            where = _PREPOSITIONS[int(torch.randint(len(_PREPOSITIONS), (), generator=random))]
            how = _STATES[int(torch.randint(len(_STATES), (), generator=random))]
            verb = ("is", "are")[int(torch.randint(2, (), generator=random))]
            if (key := (noun_a, noun_b, where, how, verb)) in seen:
                continue
            seen.add(key)
            subject, rest = (noun_a, noun_b + "s") if verb == "is" else (noun_a + "s", noun_b)
            yield (
                f"They say the {rest} {where} the {subject} {verb} {how}.",
                f"They say the {subject} {where} the {rest} {verb} {how}.",
            )

    return groups(train), groups(test)


_NOUNS: list[str] = [
    *"""
    house road river tree car table chair window garden school tower bridge market farm field mountain lake ship
    boat train truck engine lamp clock picture mirror door wall roof cabinet desk bottle basket barrel fountain
    statue station hotel museum theater hospital temple castle cottage barn fence gate
    """.split()
]
_PREPOSITIONS = ("near", "behind", "beside", "above", "below", "beyond", "opposite")
_STATES = "old new small large famous empty beautiful dirty expensive ugly clean".split()


def _bigram_shift(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """A sentence of a news article, and the same with two adjacent inner words in lower case swapped (SentEval's task).

    At most four sentences per article. No sentence is used twice, and no article is in both splits.
    """
    seen: set[str] = set()

    def groups(articles: list[list[str]]) -> Iterator[Group]:
        fitting = ([(text,) for text in article if 8 <= len(text.split()) <= 30][:4] for article in articles)
        return _with_swapped_words("Sentence:", _each_once(_in_rounds(fitting), seen), random)

    train, test = _articles(random, split)
    return iter(list(groups(train))), groups(test)  # All training draws come before the first test draw.


def _with_swapped_words(start: str, sentences: Iterable[tuple[str, ...]], random: torch.Generator) -> Iterator[Group]:
    """Sentences with two adjacent inner words in lower case swapped (class 0) and intact (class 1)."""
    for (sentence,) in sentences:
        words = sentence.split()
        plain = [re.fullmatch("[a-z]+", word) is not None for word in words]
        starts = [i for i in range(1, len(words) - 2) if plain[i] and plain[i + 1] and words[i] != words[i + 1]]
        if starts:
            i = starts[int(torch.randint(len(starts), (), generator=random))]
            swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
            yield f"{start} {' '.join(swapped)} ;", f"{start} {sentence} ;"


def _sentence_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """Two adjacent sentences of a news article, in their original or in reversed order.

    At most two pairs per article. No sentence is used twice, and no article is in both splits.
    """
    seen: set[str] = set()

    def groups(articles: list[list[str]]) -> Iterator[Group]:
        pairs = ([*zip(article[::2], article[1::2], strict=False)] for article in articles)
        fitting = (
            [pair for pair in of_article if all(5 <= len(text.split()) <= 30 for text in pair)][:2]
            for of_article in pairs
        )
        return _in_both_orders("News:", _each_once(_in_rounds(fitting), seen))

    train, test = _articles(random, split)
    return groups(train), groups(test)


def _dialogue_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """A turn of a film's dialogue and its reply, in their original or in reversed order.

    No turn is used twice. The test pairs are one contiguous stretch of the collection, in which the pairs of a film are
    contiguous, so only the films at its two ends can be in both splits.
    """
    pairs = [
        pair
        for pair in embedded.read_dialogue()
        if all(_is_turn(text) and tokens.split_of(text) == split for text in pair)
    ]
    start = int(torch.randint(len(pairs), (), generator=random))
    sides = _halves(pairs[start:] + pairs[:start])
    seen: set[str] = set()
    train, test = (_shuffled(_each_once(side, seen), random) for side in sides)
    return _in_both_orders("Dialogue:", train), _in_both_orders("Dialogue:", test)


def _is_turn(text: str) -> bool:
    return 4 <= len(text.split()) <= 30 and text.endswith((".", "!", "?"))


def _language_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """A paragraph of English messages and a paragraph of German messages, in either order.

    The paragraphs have about the same number of characters and are not translations of each other. No message is in
    both splits, in either language.
    """
    german_of = translations("de")

    def paragraphs(messages: list[str]) -> Iterator[str]:
        paragraph = ""
        for message in tokens.unique_texts(messages, split):
            paragraph = f"{paragraph} {message}".strip()
            if len(paragraph) >= 80:
                if len(paragraph) <= 160:
                    yield paragraph
                paragraph = ""

    def groups(messages: list[str]) -> Iterator[Group]:
        # The German messages of a group are half the list away from the English ones.
        offset = len(messages) // 2
        german = [german_of[message] for message in messages[offset:] + messages[:offset]]
        return _in_both_orders("Text:", zip(paragraphs(messages), paragraphs(german), strict=False))

    train, test = _halves(_shuffled(list(german_of), random))
    return groups(train), groups(test)


def _plain_texts(table: str, split: tokens.EvalSplit, label: str | None = None) -> list[str]:
    """The texts of a table in one line each."""
    texts = (text.replace("\\n", " ") for text in _texts(table, split, label))
    return [" ".join(text.split()) for text in texts]


def _openings_in_both_orders(first: list[str], second: list[str], random: torch.Generator) -> _Groups:
    """The openings of two kinds of texts in both orders; no text is in more than one group."""
    sides = [_halves(_shuffled([_opening(text, 20) for text in texts], random), 1 / 3) for texts in (first, second)]
    train, test = (_in_both_orders("Text:", zip(*(side[part] for side in sides), strict=False)) for part in (0, 1))
    return train, test


def _genre_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """The opening of a restaurant review and that of a school essay, in either order.

    No text is in more than one group.
    """
    return _openings_in_both_orders(_plain_texts("111_yelp_data", split), _plain_texts("94_ai_gen", split), random)


def _rating_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """The openings of a review with the best and of one with the worst rating, in either order.

    No review is in more than one group.
    """
    best, worst = (_plain_texts("111_yelp_data", split, label) for label in ("4", "0"))
    return _openings_in_both_orders(best, worst, random)


def _story_order(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """Two adjacent sentences of a personal story, in their original or in reversed order.

    One pair per story, no sentence is used twice, and no story is in both splits.
    """
    seen: set[str] = set()
    sides = _halves(_shuffled([_sentences(text) for text in _plain_texts("48_cm_correct", split)], random))

    def groups(stories: list[list[str]]) -> Iterator[Group]:
        fitting = (
            [pair for pair in pairwise(story) if all(8 <= len(s.split()) <= 30 for s in pair)][:1] for story in stories
        )
        return _in_both_orders("Story:", _each_once(_in_rounds(fitting), seen))

    return groups(sides[0]), groups(sides[1])


def _review_shift(random: torch.Generator, split: tokens.EvalSplit) -> _Groups:
    """A sentence of a review of at least 15 words, and the same with two adjacent inner words in lower case swapped.

    One sentence per review, no sentence is used twice, and no review is in both splits.
    """
    seen: set[str] = set()
    sides = _halves(_shuffled([_sentences(text) for text in _plain_texts("111_yelp_data", split)], random))

    def groups(reviews: list[list[str]]) -> Iterator[Group]:
        fitting = ([(text,) for text in review if 15 <= len(text.split()) <= 45][:1] for review in reviews)
        return _with_swapped_words("Review:", _each_once(_in_rounds(fitting), seen), random)

    return iter(list(groups(sides[0]))), groups(sides[1])  # All training draws come before the first test draw.


ORDER_TASKS: dict[str, OrderRecipe] = {
    "topic_permutation": OrderRecipe(
        _topic_permutation,
        "In which order do the openings of an article on politics, one on technology and one on sport stand?",
        tuple(", ".join(order) for order in permutations(_TOPICS)),
        "article",
        ((embedded.TEXT_CARRIER, "table 97_news_class"),),
        "block",
    ),
    "contrast_order": OrderRecipe(
        _contrast_order,
        "Does a review of one good and one bad phrase end with the good one?",
        ("ends with the bad phrase", "ends with the good phrase"),
        "phrase",
        ((embedded.TEXT_CARRIER, "table 92_glue_sst2"),),
        "block",
    ),
    "chronology": OrderRecipe(
        _chronology,
        "Was the person named first born first?",
        ("the later born is named first", "the earlier born is named first"),
        "person",
        ((embedded.TEXT_CARRIER, "table 2_hist_fig_birthyear"),),
        "block",
    ),
    "agreement_swap": OrderRecipe(
        _agreement_swap,
        'Does the verb agree with its subject in "They say the N1 near the N2 is old."?',
        ("does not agree", "agrees"),
        "noun",
        (),
        "local",
    ),
    "bigram_shift": OrderRecipe(
        _bigram_shift,
        "Is a sentence intact, or are two adjacent words in it swapped?",
        ("swapped", "intact"),
        "article",
        ((embedded.TEXT_CARRIER, "table 100_news_fake, the genuine articles"),),
        "local",
    ),
    "language_order": OrderRecipe(
        _language_order,
        "Does the English paragraph stand before the German one?",
        ("German first", "English first"),
        "message",
        ((embedded.MESSAGE_CARRIER, "its messages in English and German"),),
        "block",
    ),
    "sentence_order": OrderRecipe(
        _sentence_order,
        "Do two adjacent sentences of an article stand in their true order?",
        ("reversed", "true order"),
        "article",
        ((embedded.TEXT_CARRIER, "table 100_news_fake, the genuine articles"),),
        "local",
    ),
    "dialogue_order": OrderRecipe(
        _dialogue_order,
        "Do a turn and its reply stand in their true order?",
        ("reversed", "true order"),
        "turn, and by film but for the two at the border",
        ((embedded.DIALOGUE_CARRIER, "its film dialogue"),),
        "local",
    ),
    "genre_order": OrderRecipe(
        _genre_order,
        "Does the opening of a restaurant review stand before that of a school essay?",
        ("essay first", "review first"),
        "text",
        ((embedded.TEXT_CARRIER, "tables 111_yelp_data and 94_ai_gen"),),
        "block",
        for_confirmation=True,
    ),
    "rating_order": OrderRecipe(
        _rating_order,
        "Does the opening of a review with the best rating stand before that of one with the worst?",
        ("worst first", "best first"),
        "review",
        ((embedded.TEXT_CARRIER, "table 111_yelp_data"),),
        "block",
        for_confirmation=True,
    ),
    "story_order": OrderRecipe(
        _story_order,
        "Do two adjacent sentences of a personal story stand in their true order?",
        ("reversed", "true order"),
        "story",
        ((embedded.TEXT_CARRIER, "table 48_cm_correct"),),
        "local",
        for_confirmation=True,
    ),
    "review_shift": OrderRecipe(
        _review_shift,
        "Is a sentence of a review intact, or are two adjacent words in it swapped?",
        ("swapped", "intact"),
        "review",
        ((embedded.TEXT_CARRIER, "table 111_yelp_data"),),
        "local",
        for_confirmation=True,
    ),
}


def make_order_task(
    name: str,
    tokenizer: tokens.Tokenizer,
    n_positions: int,
    n_train_groups: int,
    n_test_groups: int,
    split: tokens.EvalSplit = "evaluation",
    seed: int = 0,
) -> OrderTask:
    """Build a task with exactly the requested numbers of groups.

    Args:
        name: key of `ORDER_TASKS`.
        n_positions: texts have fewer tokens than this.
        split: of the texts that groups are made of.
        seed: of the groups.

    Raises:
        BadSetting: no task has this name.
        NothingToDo: the embedded texts give fewer groups.
    """
    task = find_groups(name, tokenizer, n_positions, n_train_groups, n_test_groups, split, seed)
    for available, requested in ((task.n_train_groups, n_train_groups), (task.n_test_groups, n_test_groups)):
        if available < requested:
            raise NothingToDo(
                f"{name} has only {available} groups of equal token multisets, but {requested} are requested: lower "
                "order_train_groups or order_test_groups"
            )
    return task


def find_groups(
    name: str,
    tokenizer: tokens.Tokenizer,
    n_positions: int,
    n_train_groups: int,
    n_test_groups: int,
    split: tokens.EvalSplit = "evaluation",
    seed: int = 0,
) -> OrderTask:
    """Build a task with at most the requested numbers of groups.

    Groups are left out if their token multisets differ, if two of their texts have the same tokens in the same order,
    or if they do not fit the context.

    Args:
        name: key of `ORDER_TASKS`.
        n_positions: texts have fewer tokens than this.
        split: of the texts that groups are made of.
        seed: of the groups.

    Raises:
        BadSetting: no task has this name.
    """
    if name not in ORDER_TASKS:
        raise BadSetting(f"order task {name!r} is unknown: choose from {', '.join(ORDER_TASKS)}")
    recipe = ORDER_TASKS[name]
    train, test = (
        list(islice((group for group in groups if _only_order_differs(group, tokenizer, n_positions)), most))
        for groups, most in zip(
            recipe.groups(generator(seed, name), split),
            (min(n, sys.maxsize) for n in (n_train_groups, n_test_groups)),
            strict=True,
        )
    )
    texts = tuple(text for group in train + test for text in group)
    return OrderTask(
        name, len(recipe.labels), texts, len(train), len(test), recipe.about, at_offsets=recipe.for_confirmation
    )


def _only_order_differs(group: Group, tokenizer: tokens.Tokenizer, n_positions: int) -> bool:
    """Whether the texts have the same tokens in different orders and fit the context."""
    rows = tokenizer(list(group), add_special_tokens=False)["input_ids"]
    bags = [Counter(row) for row in rows]
    different = len(set(map(tuple, rows))) == len(rows)
    return len(rows[0]) < n_positions and different and all(bag == bags[0] for bag in bags)


def edge_features(task: OrderTask, tokenizer: tokens.Tokenizer, n_edge: int = 3) -> "scipy.sparse.csr_matrix":
    """Counts of the first and of the last tokens of each text, concatenated, to probe the edges alone.

    The beginning and the end that all texts of the task share are skipped.

    Args:
        n_edge: tokens at each end; a shorter text uses all of its tokens.

    Returns:
        Counts [text, 2 * token id].
    """
    rows = [np.array(ids) for ids in tokenizer(list(task.texts), add_special_tokens=False)["input_ids"]]
    shortest = min(map(len, rows))
    start = _n_shared([row[:shortest] for row in rows])
    end = _n_shared([row[::-1][: shortest - start] for row in rows])
    content = [row[start : len(row) - end] for row in rows]
    n_ids = 1 + max(int(row.max()) for row in rows)
    sides = [[row[:n_edge] for row in content], [row[::-1][:n_edge] for row in content]]
    return scipy.sparse.csr_matrix(scipy.sparse.hstack([_counts(side, n_ids) for side in sides]))


def _n_shared(rows: list[np.ndarray]) -> int:
    """Number of first tokens that all rows share; the rows have equal lengths."""
    same = (np.stack(rows) == rows[0]).all(0)
    return int(same.cumprod().sum())


def _counts(rows: list[np.ndarray], n_ids: int) -> "scipy.sparse.csr_matrix":
    """Counts of each token id in each row."""
    text = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    counts = scipy.sparse.csr_matrix((np.ones(len(text)), (text, np.concatenate(rows))), shape=(len(rows), n_ids))
    counts.sum_duplicates()
    return counts
