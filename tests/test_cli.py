import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import pytest
from rich.console import Console
from typer.testing import CliRunner

from posmask.cli import commands
from posmask.cli.commands import app
from posmask.cli.printing import results_table, status_table
from posmask.errors import BadSetting, DamagedFolder, DegenerateResult, MissingAsset, MissingExtra, NothingToDo
from posmask.kernels import runtime
from posmask.report import write_report
from posmask.results.rows import Row
from posmask.results.table import summarize
from posmask.storage.manifest import write_folder
from posmask.storage.record import StudyRecord, write_record

ROOT = Path(__file__).parent.parent


@pytest.fixture
def posmask(monkeypatch, capsys):
    """Run the command line in this process and return its exit code, standard output and standard error."""
    # Without this, huggingface_hub retries an unreachable hub for most of a minute.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["posmask", *words])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("run", "studies/none.toml"), 2, "posmask: there is no study file studies/none.toml"),
        (("plan", "studies/none.toml"), 2, "posmask: there is no study file studies/none.toml"),
        (("status", "README.md"), 2, "posmask: README.md is not a readable TOML file"),
        (("report", "studies"), 3, "posmask: studies has neither results.csv nor cells nor evaluated SAEs"),
        (("run", "studies/quick.toml", "--root", "Makefile/run"), 1, "Not a directory: 'Makefile/run"),
        (
            ("order-tasks", "--tokenizer", "no/such/model", "--out", "x"),
            2,
            "posmask: model 'no/such/model' is missing: there is no such folder; check the path",
        ),
        (
            ("order-tasks", "--tokenizer", "x", "--out", "x", "--train-groups", "0"),
            2,
            "Invalid value for '--train-groups'",
        ),
        (("export", "studies", "x", "--to", "gguf"), 2, "Invalid value for '--to'"),
        (("import", "studies", "x"), 3, "posmask: studies holds no SAE of a known format"),
        (("verify", "studies"), 2, "posmask: studies is not a study's folder"),
        (("fly",), 2, "No such command 'fly'"),
    ],
)
def test_an_error_is_one_sentence_and_its_exit_code(words, code, message, posmask, monkeypatch):
    monkeypatch.chdir(ROOT)
    exit_code, _, errors = posmask(*words)
    assert (exit_code, errors.count("Traceback")) == (code, 0), errors
    assert message in errors


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "posmask.cli", "status", "none.toml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("posmask: there is no study file none.toml")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NothingToDo("x"), 1),
        (DegenerateResult("x"), 1),
        (MissingAsset("x"), 1),
        (MissingExtra("x"), 1),
        (OSError(28, "No space left on device"), 1),
        (MemoryError(), 1),
        (BadSetting("x"), 2),
        (DamagedFolder("x"), 3),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error, code, posmask, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(commands, "app", fail)
    exit_code, _, errors = posmask()
    assert (exit_code, errors.count("\n")) == (code, 1), errors
    assert errors.startswith("posmask: ")


def test_verbose_prints_the_traceback_of_an_error_of_posmask(posmask):
    exit_code, _, errors = posmask("status", "none.toml", "--verbose")
    assert exit_code == 2
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("posmask: there is no study file none.toml")


def test_help_shows_defaults_groups_and_exit_codes():
    runner = CliRunner(env={"COLUMNS": "100"})
    text = runner.invoke(app, ["-h"]).output
    assert text == runner.invoke(app, ["--help"]).output
    for panel in ("Studies", "Results", "SAEs", "Installation"):
        assert f"─ {panel} ─" in text
    assert re.search(r"Exit codes: 0 .* 1 .* 2 .* 3 ", " ".join(text.split()))
    for command, default in (
        ("run", "runs/NAME of the study"),
        ("report", "report.html in DIR, or report/ with --all"),
        ("export", "the model that it was trained on"),
        ("import", "the length that its files state"),
    ):
        text = " ".join(re.sub("│", " ", runner.invoke(app, [command, "-h"]).output).split())
        assert f"[default: ({default})]" in text


def test_version_is_the_installed_one():
    assert CliRunner().invoke(app, ["--version"]).output == f"posmask {importlib.metadata.version('posmask')}\n"


def test_help_imports_nothing_heavy():
    program = """
import sys
from typer.testing import CliRunner
from posmask.cli import commands
from posmask.cli.commands import app
assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
print([name for name in ("torch", "numpy", "scipy", "transformers", "numba", "rich.progress") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_study_file_is_read_without_the_packages_that_only_a_run_needs():
    heavy = ("transformers", "sklearn", "scipy.stats", "scipy.sparse", "numba", "gguf", "datasets", "altair")
    program = f"""
import sys
from typer.testing import CliRunner
from posmask.cli.commands import app
assert CliRunner().invoke(app, ["status", "studies/quick.toml", "--root", "none"]).exit_code == 0
print([name for name in {heavy} if name in sys.modules])
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"


def test_the_core_imports_no_optional_part():
    optional = ("ray", "fsspec", "s3fs", "tenacity", "sae_lens", "datasets", "wandb", "tensorboard")
    program = f"""
import sys
import posmask.study.run
from posmask.cli import commands
from posmask.cli.commands import app
import torch.distributed
print([name for name in {optional} if name in sys.modules], torch.distributed.is_initialized())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[] False\n"


def test_status_notices_lost_and_truncated_files_and_prints_the_whole_command(
    study_file, finish, tmp_path, monkeypatch
):
    root, change = tmp_path / "the run", "training.n_steps = 20"
    finish(root)
    monkeypatch.chdir(tmp_path)

    def status():
        words = ["status", "tiny.toml", "--root", "the run", "--set", change]
        return CliRunner().invoke(app, words, catch_exceptions=False).output.splitlines()

    command = "`posmask run tiny.toml --root 'the run' --set 'training.n_steps = 20'`"
    assert status()[-1] == f"3 of 3 finished under the run; {command} writes report.html."
    write_report(root)
    assert status()[-1] == "3 of 3 finished under the run."
    cells = root / "cells"
    (cells / "open-seed0" / "rows.csv").unlink()
    weights = cells / "slice-compute-seed0" / "sae.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    *table, last = status()
    assert last == f"1 of 3 finished under the run; {command} completes the rest."
    assert [line.split() for line in table[1:]] == [
        ["baselines", "yes"],
        ["open", "seed", "0"],
        ["slice-compute", "seed", "0"],
    ]
    assert table[0].split() == ["cell", "finished", "damaged"]


def test_status_as_json(study_file, tmp_path):
    root = tmp_path / "run"
    result = CliRunner().invoke(app, ["status", str(study_file), "--root", str(root), "--json"])
    status = json.loads(result.stdout)
    assert status.keys() == {"study", "root", "finished", "cells"}
    assert (status["root"], status["finished"]) == (str(root), 0)
    assert status["cells"][:2] == [
        {"label": "baselines", "state": "missing"},
        {"label": "open-seed0", "state": "missing"},
    ]


def test_doctor_as_json(monkeypatch, tmp_path):
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path))
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["versions"]["posmask"] == importlib.metadata.version("posmask")
    assert report["precision"] in ("float32", "bfloat16")
    assert report["cache"] == str(tmp_path)
    assert report["gflops"].keys() == {"float32", "bfloat16"}
    assert {download["cached"] for download in report["downloads"]} == {False}


def test_verify_refuses_what_is_no_study_and_an_unfinished_one(tmp_path):
    with write_folder(tmp_path / "run" / "cells" / "open-seed0", {}):
        pass
    with pytest.raises(BadSetting, match="is not a study's folder"):
        CliRunner().invoke(app, ["verify", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(DamagedFolder, match=r"has no study\.json"):
        CliRunner().invoke(app, ["verify", str(tmp_path / "run")], catch_exceptions=False)
    write_record(tmp_path / "new", StudyRecord("new", None, {}))
    with pytest.raises(NothingToDo, match="holds no finished folder"):
        CliRunner().invoke(app, ["verify", str(tmp_path / "new")], catch_exceptions=False)


@pytest.mark.parametrize("command", [info.name or info.callback.__name__ for info in app.registered_commands])
def test_every_command_explains_itself_and_is_in_the_readme(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.split()) > 15
    assert f"posmask {command}" in (ROOT / "README.md").read_text()


def test_doctor_says_what_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path))
    # The measurement takes seconds: see test_doctor_as_json.
    monkeypatch.setattr(runtime, "product_rate", {"float32": 87e9, "bfloat16": 15e9}.get)
    monkeypatch.setattr(runtime, "fast_precision", lambda: "float32")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "float32 87 GFLOP/s" in result.output
    assert "bfloat16 15 GFLOP/s" in result.output
    assert "auto means float32" in result.output
    assert "would be downloaded, 93 MB" in result.output
    assert list(tmp_path.iterdir()) == []


def test_status_of_the_quick_study_needs_no_model(tmp_path):
    result = CliRunner().invoke(app, ["status", str(ROOT / "studies" / "quick.toml"), "--root", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "0 of 9 finished" in result.output
    assert "\x1b" not in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    assert re.search(r"^slice-gradient +seed 0", result.output, re.M)


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
        ("posmask train-distributed studies/quick.toml soft-h", ["soft-high"]),
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
