import itertools
import json
from bisect import bisect
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch

from conftest import make_texts
from posmask.data import embedded, models, tokens
from posmask.data.embedded_models import DEFAULT_MODEL
from posmask.errors import BadSetting, NothingToDo
from posmask.probing import catalogs, order_files, order_probes, order_tasks
from posmask.probing.order_tasks import OrderTask, find_groups, make_order_task
from posmask.probing.pooling import PooledTexts
from posmask.storage.manifest import read_manifest


@pytest.fixture(scope="module")
def smollm():
    return models.load_tokenizer(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tasks(smollm):
    """Every task, built once."""
    return {name: make_order_task(name, smollm, 128, 60, 20) for name in order_tasks.ORDER_TASKS}


def sides(task):
    cut = task.n_train_groups * task.n_classes
    return task.texts[:cut], task.texts[cut:]


def parts(texts):
    """Return the parts that the task joined, without the shared beginning and end."""
    return {part.strip() for text in texts for part in text.split(":", 1)[1].removesuffix(" ;").split(" ; ")}


@pytest.mark.embedded
@pytest.mark.parametrize("name", order_tasks.ORDER_TASKS)
def test_order_groups_have_equal_bags_and_a_bag_of_words_scores_exactly_1_over_k(name, tasks, smollm):
    task = tasks[name]
    assert len(task.texts) == 80 * task.n_classes
    rows = smollm(list(task.texts), add_special_tokens=False)["input_ids"]
    for start in range(0, len(rows), task.n_classes):
        group = rows[start : start + task.n_classes]
        assert all(Counter(row) == Counter(group[0]) for row in group)
        assert len({tuple(row) for row in group}) == task.n_classes
        assert len(group[0]) < 128
    (control,) = order_probes.bag_accuracy(task, smollm)
    assert control.value == pytest.approx(1 / task.n_classes, abs=1e-12)
    used = sorted({token for row in rows for token in row})
    bag = torch.zeros(len(rows), len(used))
    for row, ids in zip(bag, rows, strict=True):
        row.index_add_(0, torch.from_numpy(np.searchsorted(used, ids)), torch.ones(len(ids)))
    features = PooledTexts(len(bag) + task.n_test_groups * task.n_classes, len(used))
    features.add(torch.arange(features.n_texts), torch.cat([bag, bag[task.n_train_groups * task.n_classes :]]))
    for measure in order_probes.order_accuracy(task, features, (1, 20), "bag"):
        assert measure.value == 0.5


@pytest.mark.embedded
@pytest.mark.parametrize("name", order_tasks.ORDER_TASKS)
def test_order_tasks_are_determined_by_the_seed_and_splits_are_disjoint(name, tasks, smollm):
    task = tasks[name]
    assert task == make_order_task(name, smollm, 128, 60, 20)
    other = make_order_task(name, smollm, 128, 60, 20, seed=1)
    assert len(set(task.texts) & set(other.texts)) < len(task.texts) / 2
    train, test = sides(task)
    assert not set(train) & set(test)


@pytest.mark.embedded
@pytest.mark.parametrize(
    "name", ["topic_permutation", "chronology", "bigram_shift", "sentence_order", "dialogue_order"]
)
def test_no_article_person_sentence_or_turn_is_in_both_splits(name, tasks):
    train, test = sides(tasks[name])
    assert not parts(train) & parts(test)


@pytest.mark.embedded
def test_no_noun_is_in_both_splits(tasks):
    train, test = (
        {word.rstrip("s") for text in side for word in text.split()[3::3][:2]}
        for side in sides(tasks["agreement_swap"])
    )
    assert train
    assert not train & test


@pytest.mark.embedded
@pytest.mark.parametrize("name", ["bigram_shift", "sentence_order"])
def test_all_sentences_of_an_article_are_in_the_same_split(name, smollm):
    task = find_groups(name, smollm, 128, 3000, 1000)
    articles = sorted({" ".join(text.split()) for text, _ in embedded.read_table("100_news_fake")})
    joined = "\n".join(articles)
    ends = list(accumulate(len(article) + 1 for article in articles))

    def article_indices(texts):
        for part in sorted(parts(texts))[::5]:
            start = joined.index(part)
            if joined.find(part, start + 1) < 0:
                yield bisect(ends, start)

    train, test = (set(article_indices(side[1::2])) for side in sides(task))
    assert len(test) > 40
    assert not train & test
    assert not parts(sides(task)[0]) & parts(sides(task)[1])


@pytest.mark.embedded
def test_test_dialogues_are_contiguous_in_the_films(tasks):
    index_of = {turns: number for number, turns in enumerate(embedded.read_dialogue())}
    dialogues = sorted(
        (index_of[tuple(text.removeprefix("Dialogue: ").removesuffix(" ;").split(" ; "))], split)
        for split, texts in zip("train test".split(), sides(tasks["dialogue_order"]), strict=True)
        for text in texts[1::2]
    )
    assert {tokens.split_of(turn) for turn in parts(tasks["dialogue_order"].texts)} == {"evaluation"}
    splits = [split for _, split in dialogues]
    assert sum(split != following for split, following in zip(splits, splits[1:] + splits[:1], strict=True)) == 2


@pytest.mark.embedded
def test_no_message_is_in_both_splits_in_any_language_and_no_group_contains_a_translation(smollm):
    task = find_groups("language_order", smollm, 128, 1000, 1000)
    number = {}
    for index, pair in enumerate(catalogs.translations("de").items()):
        number |= {" ".join(text.split()): index for text in pair}

    def messages(words):
        """Return the messages that a paragraph consists of, or None."""
        if not words:
            return set()
        for end in range(len(words), 0, -1):
            first = " ".join(words[:end])
            if first in number and (rest := messages(words[end:])) is not None:
                return {first, *rest}
        return None

    groups = []
    for text in task.texts[1::2]:
        both = [messages(part.split()) for part in text.removeprefix("Text:").removesuffix(" ;").split(" ; ")]
        assert {tokens.split_of(message) for message in set.union(*both)} == {"evaluation"}
        english, german = ({number[message] for message in language} for language in both)
        assert not english & german
        groups.append(english | german)
    assert len(groups) > 600
    assert not set.union(*groups[: task.n_train_groups]) & set.union(*groups[task.n_train_groups :])


@pytest.mark.embedded
def test_contrast_order_tests_on_no_part_of_a_training_phrase(tasks):
    def phrases(texts):
        return {part.strip() for text in texts for part in text[len("Review: ") : -1].split(" , but ")}

    train, test = map(phrases, sides(tasks["contrast_order"]))
    assert not [phrase for phrase in test if any(phrase in other or other in phrase for other in train)]


@pytest.mark.embedded
def test_too_few_order_groups_raise_an_error(smollm):
    with pytest.raises(NothingToDo, match=r"chronology has only \d+ groups .* but 5000 are requested"):
        make_order_task("chronology", smollm, 128, 5000, 10)


def test_each_part_is_used_once_over_both_splits():
    seen = set()
    assert order_tasks._each_once([("a", "b"), ("b", "c"), ("d", "d"), ("e", "f")], seen) == [("a", "b"), ("e", "f")]
    assert order_tasks._each_once([("f", "g"), ("c", "d")], seen) == [("c", "d")]


def test_edge_features_count_the_words_at_both_ends(tokenizer):
    texts = ("red blue green old new and", "red old new blue green and", "red big and", "red small or and")
    task = OrderTask("toy", 2, texts, 1, 1, "local")
    counts = order_tasks.edge_features(task, tokenizer, 2).toarray()
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in "red blue green old new big small or and".split()}
    first, last = np.split(counts, 2, axis=1)
    expected = [("blue green", "old new"), ("old new", "blue green"), ("big", "big"), ("small or", "small or")]
    for row, words in enumerate(expected):
        for side, word_counts in zip(words, (first[row], last[row]), strict=True):
            assert {word for word, i in ids.items() if word_counts[i]} == set(side.split())
            assert word_counts.sum() == len(side.split())


def test_texts_of_a_group_stand_at_one_random_offset_after_other_texts(tokenizer):
    texts = tuple(f"{a} {b} old" for a, b in itertools.permutations("red blue green big small new and or".split(), 2))
    task = OrderTask("toy", 2, texts, 20, 8, "local", at_offsets=True)
    padded = order_probes.order_tokens(task, tokenizer, 16)
    assert padded.keep.sum(1).tolist() == [3] * len(padded.keep)  # what stands before a text is not kept
    starts = padded.keep.float().argmax(1)
    groups = starts[: len(texts)].view(-1, 2)
    assert torch.equal(groups[:, 0], groups[:, 1])
    assert len(groups.unique()) > 8
    assert (int(groups.min()), int(groups.max())) == (1, 13)
    for text, row in enumerate(padded.id[: len(texts)].tolist()):
        start, ids = int(starts[text]), tokenizer(texts[text], add_special_tokens=False)["input_ids"]
        assert row[start : start + 3] == ids
        assert row[1:start] == padded.id[text ^ 1, 1:start].tolist()  # the same before all texts of a group
        assert tokenizer.eos_token_id not in row[1:start]
    # The shuffled copies of the test texts keep their places.
    assert torch.equal(padded.keep[len(texts) :], padded.keep[40 : len(texts)])


@pytest.fixture
def toy(monkeypatch):
    """Replace the embedded tasks by a toy task with 30 training and 10 test groups."""

    def swapped(random, split):
        """A text, and the same text with the two ends swapped."""
        groups = []
        for text in make_texts(200, n_words=8):
            first, *inner, last = text.split()
            if first != last:
                groups.append((" ".join([last, *inner, first]), text))
        return iter(groups[:30]), iter(groups[30:40])

    recipe = order_tasks.OrderRecipe(
        swapped, "Which end is first?", ("swapped", "intact"), "text", ((embedded.TEXT_CARRIER, "no table"),), "local"
    )
    for name in list(order_tasks.ORDER_TASKS):
        monkeypatch.delitem(order_tasks.ORDER_TASKS, name)
    monkeypatch.setitem(order_tasks.ORDER_TASKS, "toy", recipe)


def write(tokenizer, folder, lines=None, **changed):
    settings = {"n_positions": 16, "n_train_groups": 20, "n_test_groups": 5, "seed": 0, **changed}
    order_files.write_order_tasks(
        tokenizer, "toy-words", folder, **settings, say=(lines if lines is not None else []).append
    )


def test_written_tasks_equal_the_generated_tasks(toy, tokenizer, tmp_path):
    log = []
    write(tokenizer, tmp_path / "out", log)
    assert log[0] == "toy: 20 training and 5 test groups"
    rows = [json.loads(line) for line in (tmp_path / "out" / "toy.jsonl").read_text().splitlines()]
    task = make_order_task("toy", tokenizer, 16, 20, 5)
    assert tuple(row["text"] for row in rows) == task.texts
    assert [(row["group"], row["class"]) for row in rows] == [(i // 2, i % 2) for i in range(50)]
    assert [row["label"] for row in rows] == ["swapped", "intact"] * 25
    assert [row["split"] for row in rows] == ["train"] * 40 + ["test"] * 10
    assert {row["task"] for row in rows} == {"toy"}
    assert set(read_manifest(tmp_path / "out", verify=True)["files"]) == {"README.md", "toy.jsonl"}
    page = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "`toy-words`", "Which end is first?", "the two ends swapped", "class 1: intact", "Seed 0",
        "20 training, 5 test; split by text", "sae-probes==0.4.2 (MIT): no table",
    ):  # fmt: skip
        assert words in page


def test_fewer_groups_than_requested_are_written_and_reported(toy, tokenizer, tmp_path):
    log = []
    write(tokenizer, tmp_path / "out", log, n_train_groups=100)
    assert log[0] == "toy: 30 training and 5 test groups, all available (100 and 5 requested)"
    page = (tmp_path / "out" / "README.md").read_text()
    assert "30 training, 5 test" in page
    assert "100 training and 5 test groups were requested" in page


def test_written_tasks_are_never_overwritten(toy, tokenizer, tmp_path):
    folder, log = tmp_path / "out", []
    write(tokenizer, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write(tokenizer, folder, log)
    assert log == [f"{folder} was written with the same settings and is unchanged."]
    with pytest.raises(BadSetting, match=r"out was written with other settings: name a new folder"):
        write(tokenizer, folder, seed=1)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadSetting, match=r"notes has other contents: name a new folder"):
        write(tokenizer, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def test_contexts_too_short_for_any_group_raise_and_write_nothing(toy, tokenizer, tmp_path):
    with pytest.raises(NothingToDo, match="toy has 0 training and 0 test groups that fit 8 positions: raise n_pos"):
        write(tokenizer, tmp_path / "out", n_positions=8)
    assert list(tmp_path.iterdir()) == []


def test_groups_must_differ_in_order_only(toy, tokenizer):
    assert not order_tasks._only_order_differs(("red blue", "red blue"), tokenizer, 16)
    assert not order_tasks._only_order_differs(("red blue", "blue blue"), tokenizer, 16)
    assert order_tasks._only_order_differs(("red blue", "blue red"), tokenizer, 16)


@pytest.mark.embedded
def test_every_task_can_be_written(tasks, smollm, tmp_path, monkeypatch):
    monkeypatch.setattr(order_files, "find_groups", lambda name, *settings, **more: tasks[name])
    write(smollm, tmp_path / "out", n_positions=128)
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    for name, recipe in order_tasks.ORDER_TASKS.items():
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf8").splitlines()
        assert tuple(json.loads(line)["text"] for line in lines) == tasks[name].texts
        assert len({json.loads(line)["label"] for line in lines}) == tasks[name].n_classes
        assert f"## {name}\n\n**{recipe.question}**" in page
    for carrier in {carrier for recipe in order_tasks.ORDER_TASKS.values() for carrier, _ in recipe.sources}:
        assert f"{carrier.requirement} ({carrier.license})" in page


@pytest.mark.embedded
@pytest.mark.parametrize("name", order_tasks.ORDER_TASKS)
def test_validation_uses_other_texts_than_evaluation(name, tasks, smollm):
    validation = find_groups(name, smollm, 128, 60, 20, "validation")
    assert min(validation.n_train_groups, validation.n_test_groups) >= 15
    if name == "agreement_swap":
        used = [
            {word.rstrip("s") for text in task.texts for word in text.split()[3::3][:2]}
            for task in (validation, tasks[name])
        ]
    else:
        used = [parts(task.texts) for task in (validation, tasks[name])]
    # Different articles and reviews sometimes share a phrase, because the split is by text.
    assert len(used[0] & used[1]) <= 0.02 * len(used[0])
