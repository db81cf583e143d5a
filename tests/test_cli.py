import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from posmask.cli.commands import app
from posmask.cli.printing import results_table, status_table
from posmask.results.rows import Row
from posmask.results.table import summarize

ROOT = Path(__file__).parent.parent


def posmask(*words):
    command = [sys.executable, "-m", "posmask.cli", *words]
    # Without this, a hub that is out of reach is asked again and again, for most of a minute.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "studies/none.toml"), "posmask: there is no study file studies/none.toml"),
        (("plan", "studies/none.toml"), "posmask: there is no study file studies/none.toml"),
        (("status", "README.md"), "posmask: README.md is not a readable TOML file"),
        (("report", "studies"), "posmask: studies has neither results.csv nor cells"),
        (("run", "studies/quick.toml", "--root", "Makefile/run"), "Not a directory: 'Makefile/run"),
        (
            ("order-tasks", "--tokenizer", "no/such/model", "--out", "x"),
            "posmask: model 'no/such/model' cannot be loaded",
        ),
        (
            ("order-tasks", "--tokenizer", "x", "--out", "x", "--train-groups", "0"),
            "Invalid value for '--train-groups'",
        ),
        (("export", "studies", "x", "--to", "gguf"), "Invalid value for '--to'"),
        (("import", "studies", "x"), "posmask: studies holds no cfg.json"),
        (("fly",), "No such command 'fly'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = posmask(*words)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [info.name or info.callback.__name__ for info in app.registered_commands])
def test_every_command_explains_itself_and_is_in_the_readme(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.split()) > 15
    assert f"posmask {command}" in (ROOT / "README.md").read_text()


def test_doctor_says_what_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "auto means" in result.output
    assert "would be downloaded, 93 MB" in result.output
    assert list(tmp_path.iterdir()) == []


def test_status_of_the_quick_study_needs_no_model(tmp_path):
    result = CliRunner().invoke(app, ["status", str(ROOT / "studies" / "quick.toml"), "--root", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "0 of 18 finished" in result.output
    assert "\x1b" not in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    assert re.search(r"^slice-upcycled +seed 0", result.output, re.M)


def test_the_table_keeps_every_number_at_80_columns_and_in_a_log():
    rows = [
        Row("c" * 60, "slice", "compute", "forward", 0, metric, where, -0.1234, 0.0, 0.0, 9)
        for metric, where in (
            ("explained_variance", ""),
            ("ce_recovered", ""),
            ("retention", ""),
            ("retention_chance", ""),
            *((f"{what}_accuracy", f"k={k};pooling=mean") for what in ("order", "probe") for k in (1, 5, 20)),
        )
    ]
    log = io.StringIO()
    Console(file=log, width=80).print(results_table(summarize(rows)))
    assert log.getvalue().count("−0.123") == 7
    assert re.search(r" 0\.000 ", log.getvalue())  # retention minus chance
    assert not re.search("\x1b|…", log.getvalue())
    assert max(map(len, log.getvalue().splitlines())) <= 80


def test_a_damaged_cell_stands_in_the_table_of_states():
    log = io.StringIO()
    Console(file=log, width=80).print(status_table([("open-seed0", "finished"), ("open-seed1", "damaged")]))
    assert log.getvalue().split() == ["cell", "finished", "damaged", "open", "seed", "0", "seed", "1"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="asks bash what it completes")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("posmask ver", ["verify"]),
        ("posmask run --tr", ["--track"]),
        ("posmask export x y --to saelens-", ["saelens-lossy"]),
        ("posmask train-distributed studies/quick.toml half", ["half-free"]),
        ("posmask train-distributed Makefile half", []),
        ("posmask plan stud", []),  # so that the shell goes on with files
    ],
)
def test_a_shell_completes_commands_options_and_cells(line, expected, completing):
    assert completing(line) == expected


@pytest.fixture(scope="module")
def completing(tmp_path_factory):
    """What bash finds after `posmask --install-completion`, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    paths = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"

    def bash(script):
        environment = {**os.environ, "HOME": str(home), "PATH": paths}
        command = ["bash", "--norc", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout

    said = bash("posmask --install-completion; true")
    assert "bash completion installed" in said

    def found(line):
        words = line.split()
        script = f"source ~/.bashrc; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}"
        return bash(f'{script}; _posmask_completion posmask; printf "%s\\n" "${{COMPREPLY[@]}}"').split()

    return found
