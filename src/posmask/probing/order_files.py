"""Write the order tasks to files: one JSON line per text, and a README that describes them."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posmask.data import embedded, tokens
from posmask.errors import BadSetting, NothingToDo
from posmask.probing.order_tasks import ORDER_TASKS, OrderTask, find_groups
from posmask.storage.manifest import MANIFEST, finished, identity, write_folder

__all__ = ["write_order_tasks"]


def write_order_tasks(
    tokenizer: tokens.Tokenizer,
    tokenizer_name: str,
    folder: Path,
    *,
    n_positions: int,
    n_train_groups: int,
    n_test_groups: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Write every task as `<task>.jsonl`, with a README.md. The folder is written atomically.

    A task with fewer groups than requested is written with all its groups, and reported. A folder that was already
    written with the same settings is unchanged.

    Args:
        tokenizer_name: reported in the README.
        folder: new or empty.
        n_positions: texts have fewer tokens than this, so that they fit into a context after its BOS.
        n_train_groups: training groups per task.
        n_test_groups: test groups per task.
        seed: of the groups.
        say: called with each line to report.

    Raises:
        BadSetting: the folder has other contents.
        NothingToDo: no group of a task fits the context.
    """
    made_from = {
        "what": "order tasks",
        "tokenizer": tokenizer_name,
        "tokens": identity({"ids": tokenizer(_questions(), add_special_tokens=False)["input_ids"]}),
        "n_positions": n_positions,
        "train_groups": n_train_groups,
        "test_groups": n_test_groups,
        "seed": seed,
        "carriers": {carrier.package: carrier.wheel_sha256 for carrier in embedded.CARRIERS},
    }
    if finished(folder, made_from):
        say(f"{folder} was written with the same settings and is unchanged.")
        return
    _check_empty(folder)
    tasks = []
    for name in ORDER_TASKS:
        task = find_groups(name, tokenizer, n_positions, n_train_groups, n_test_groups, seed=seed)
        counts = f"{task.n_train_groups} training and {task.n_test_groups} test groups"
        if not task.n_train_groups or not task.n_test_groups:
            raise NothingToDo(f"{name} has {counts} that fit {n_positions} positions: raise n_positions")
        fewer = task.n_train_groups < n_train_groups or task.n_test_groups < n_test_groups
        say(f"{name}: {counts}" + (f", all available ({n_train_groups} and {n_test_groups} requested)" * fewer))
        tasks.append(task)
    with write_folder(
        folder, made_from, groups={task.name: [task.n_train_groups, task.n_test_groups] for task in tasks}
    ) as draft:
        for task in tasks:
            lines = (json.dumps(row, ensure_ascii=False) for row in _rows(task))
            (draft / f"{task.name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf8")
        (draft / "README.md").write_text(_readme(tasks, made_from), encoding="utf8")
    say(f"Written: {folder}, described in {folder / 'README.md'}")


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        reason = "was written with other settings" if (folder / MANIFEST).is_file() else "has other contents"
        raise BadSetting(f"{folder} {reason}: name a new folder, or remove this one")


def _questions() -> list[str]:
    return [recipe.question for recipe in ORDER_TASKS.values()]


def _rows(task: OrderTask) -> list[dict[str, Any]]:
    labels = ORDER_TASKS[task.name].labels
    rows = []
    for number, text in enumerate(task.texts):
        group, class_ = divmod(number, task.n_classes)
        split = "train" if group < task.n_train_groups else "test"
        rows.append(
            {"task": task.name, "group": group, "class": class_, "label": labels[class_], "split": split, "text": text}
        )
    return rows


def _readme(tasks: list[OrderTask], made_from: dict[str, Any]) -> str:
    return _HEAD.format(**made_from) + "".join(map(_section, tasks))


_HEAD = """# Order-sensitive tasks

The texts of a group contain **exactly the same token ids, equally often, in different orders** under the tokenizer
`{tokenizer}`, and each text has a different class. A classifier that only sees which tokens a text
contains, and how often, therefore classifies exactly one text of each group correctly: 1/K of all texts, for K classes.
This was checked for every group, and groups that fail were left out. It need not hold under another tokenizer: write
the files again for that tokenizer.

All texts of a group are in the same split, as is the material it was made of ("split by" below). Texts have fewer
than {n_positions} tokens. Seed {seed}; {train_groups} training and {test_groups} test groups were requested.

One file per task, one JSON object per line:

| field | meaning |
|---|---|
| `task` | the task's name |
| `group` | the number of the group within the task |
| `class` | 0 .. K - 1; a group has one text of each |
| `label` | what the class means |
| `split` | `train` or `test` |
| `text` | the text, without special tokens |
"""


def _section(task: OrderTask) -> str:
    recipe = ORDER_TASKS[task.name]
    sources = [f"{carrier.requirement} ({carrier.license}): {what}" for carrier, what in recipe.sources]
    lines = [
        f"**{recipe.question}**",
        inspect.getdoc(recipe.groups) or "",
        *(f"- class {number}: {label}" for number, label in enumerate(recipe.labels)),
        f"- groups: {task.n_train_groups} training, {task.n_test_groups} test; split by {recipe.split_by}",
        f"- source: {'; '.join(sources) or 'word lists of posmask (Apache-2.0)'}",
        "- the first group:",
        *(f"  - {text}" for text in task.texts[: task.n_classes]),
    ]
    return f"\n## {task.name}\n\n" + "\n".join([f"{lines[0]}\n", f"{lines[1].strip()}\n", *lines[2:]]) + "\n"
