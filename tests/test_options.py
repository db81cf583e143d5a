"""Every option and argument of every command with bad values: a result, or a sentence and its exit code."""

import contextlib
import json
import random

import huggingface_hub
import pytest
import typer
from typer.testing import CliRunner

from conftest import make_texts
from posmask.auditing import run as auditing_run
from posmask.cli.commands import app
from posmask.cli.encoding import replace_unencodable
from posmask.data import models
from posmask.errors import NothingToDo, PosmaskError
from posmask.report import serving
from posmask.study import run as study_run

BAD = ["", " ", "x", "é", "-1", "0", "1.5", "1e999", "nan", "inf", "99999", "9" * 30, "9" * 5000, "1_0", "0x10", "٣"]
BAD += ["..", "/", "/dev/null", "/proc/self/mem", "/proc/self/nothing/x", "a" * 300, "a/" * 3000, "\0", "\udce9", "\n"]
BAD += [
    "hf:",
    "saelens:",
    "saelens:x",
    "embedded:",
    "embedded:x",
    "a=b",
    "=",
    ".",
    "model.layer=",
    "[",
    "{}",
    "--",
    "-",
]


class Runner(CliRunner):
    """Writes characters that standard output cannot encode as `main` does."""

    @contextlib.contextmanager
    def isolation(self, *args, **options):
        with super().isolation(*args, **options) as streams:
            replace_unencodable()
            yield streams


NOT_TRIED = ("push", "fetch", "doctor")  # They take no other files and values, or the network.


@pytest.fixture
def commands(study_file, model_folder, finish, tmp_path, monkeypatch):
    """A command line that is valid, by the name of its command; nothing is computed or served."""
    monkeypatch.chdir(tmp_path)
    finish(tmp_path / "run")
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(50)))

    def nothing(*args, **options):
        raise NothingToDo("nothing is computed in this test: go on")

    for module, name in ((study_run, "prepare"), (auditing_run, "_run"), (models, "load_model")):
        monkeypatch.setattr(module, name, nothing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it tries for half a minute
    monkeypatch.setattr(serving.PageServer, "serve_forever", lambda server: None)
    cell, model = "run/cells/open-seed0", str(model_folder)
    return {
        "init": ["--model", model, "--texts", "texts.txt", "--out", "new.toml"],
        "run": [str(study_file), "--root", "run"],
        "train-distributed": [str(study_file), "open", "--root", "run"],
        "status": [str(study_file), "--root", "run"],
        "verify": ["run"],
        "plan": [str(study_file), "--root", "run"],
        "report": ["run"],
        "serve": ["run/report.html", "--port", "0"],
        "order-tasks": ["--tokenizer", model, "--out", "tasks"],
        "evaluate": [str(study_file), cell, "--root", "run"],
        "export": [cell, "exported", "--to", "saelens"],
        "import": ["exported", "imported"],
        "audit": [cell, "--model", model, "--root", "audits"],
    }


def read_name(study_file):
    return json.loads(
        study_file.read_text().partition("name = ")[2].partition("[model]\nname = ")[2].partition("\n")[0]
    )


def all_changes(lines):
    """Each command line with a bad value for one of its options or arguments, as (command, words)."""
    changes = []
    for command in typer.main.get_command(app).commands.values():
        if command.name in NOT_TRIED:
            continue
        words = lines[command.name]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                changes += [(command.name, [*words, parameter.opts[0], bad]) for bad in BAD]
        n_arguments = sum(parameter.param_type_name == "argument" for parameter in command.params)
        for place in range(n_arguments):
            changes += [(command.name, [*words[:place], bad, *words[place + 1 :]]) for bad in BAD]
        changes.append((command.name, []))
    return changes


@pytest.mark.parametrize("amount", [60, pytest.param(None, marks=pytest.mark.slow)])
def test_any_value_of_any_option(amount, commands):
    changes = all_changes(commands)
    failures = []
    for name, words in changes if amount is None else random.Random(0).sample(changes, amount):
        result = Runner().invoke(app, [name, *words])
        error = result.exception
        has_remedy = isinstance(error, PosmaskError) and (": " in str(error) or "; " in str(error))
        if not has_remedy and not isinstance(error, OSError) and result.exit_code not in (0, 2):
            failures.append((name, [word[:40] for word in words], repr(error)[:300]))
    assert failures == []
