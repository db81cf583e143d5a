from collections import Counter

import pytest
import torch

from posmask import model
from posmask.errors import NothingToDo
from posmask.probing import order, order_tasks


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer(model.EMBEDDED_MODEL)


@pytest.mark.embedded
@pytest.mark.parametrize("name", order_tasks.ORDER_TASKS)
def test_order_groups_hold_equal_bags_and_a_bag_of_words_scores_exactly_1_over_k(name, tokenizer):
    task = order_tasks.make_order_task(name, tokenizer, 128, 24, 12)
    assert len(task.texts) == 36 * task.n_classes
    rows = tokenizer(list(task.texts), add_special_tokens=False)["input_ids"]
    for start in range(0, len(rows), task.n_classes):
        group = rows[start : start + task.n_classes]
        assert all(Counter(row) == Counter(group[0]) for row in group)
        assert len({tuple(row) for row in group}) == task.n_classes
        assert len(group[0]) < 128
    (control,) = order.bag_accuracy(task, tokenizer)
    assert control.value == pytest.approx(1 / task.n_classes, abs=1e-12)
    bag = torch.zeros(len(rows), 49152)
    for row, ids in zip(bag, rows, strict=True):
        row.index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    for measure in order.order_accuracy(task, bag, (1, 20), "bag"):
        assert measure.value == 0.5


@pytest.mark.embedded
@pytest.mark.parametrize("name", order_tasks.ORDER_TASKS)
def test_order_tasks_repeat_with_the_seed_and_split_by_what_they_are_made_of(name, tokenizer):
    task = order_tasks.make_order_task(name, tokenizer, 128, 24, 12)
    assert task == order_tasks.make_order_task(name, tokenizer, 128, 24, 12)
    cut = 24 * task.n_classes
    train, test = task.texts[:cut], task.texts[cut:]
    assert not set(train) & set(test)
    if name in ("topic_permutation", "chronology"):
        units = [{unit for text in side for unit in text.split(":", 1)[1].split(" ;")} for side in (train, test)]
        assert units[0] & units[1] <= {""}
    if name == "agreement_swap":
        nouns = [{word.rstrip("s") for text in side for word in text.split()[3::3][:2]} for side in (train, test)]
        assert not nouns[0] & nouns[1]


@pytest.mark.embedded
def test_order_tasks_say_when_they_run_out(tokenizer):
    with pytest.raises(NothingToDo, match=r"chronology has only \d+ groups .* where 5000 were asked for"):
        order_tasks.make_order_task("chronology", tokenizer, 128, 5000, 10)


@pytest.mark.embedded
def test_contrast_order_never_tests_on_part_of_a_training_phrase(tokenizer):
    task = order_tasks.make_order_task("contrast_order", tokenizer, 128, 150, 50)
    cut = 150 * 2

    def phrases(texts):
        return {part.strip() for text in texts for part in text[len("Review: ") : -1].split(" , but ")}

    train, test = phrases(task.texts[:cut]), phrases(task.texts[cut:])
    assert not [one for one in test if any(one in other or other in one for other in train)]
