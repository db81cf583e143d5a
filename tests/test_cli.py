import contextlib
import importlib.metadata
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from rich.console import Console
from typer.testing import CliRunner

from posmask.cli import commands, printing
from posmask.cli import installation as doctor
from posmask.cli.commands import app
from posmask.cli.encoding import replace_unencodable
from posmask.cli.printing import audit_table, results_table, status_table, table_note
from posmask.errors import BadSetting, DamagedFolder, DegenerateResult, MissingAsset, MissingExtra, NothingToDo
from posmask.kernels import runtime
from posmask.report import write_report
from posmask.results.comparisons import Verdict
from posmask.results.finding import finding, headline
from posmask.results.rows import Row
from posmask.results.table import SHOWN, summarize
from posmask.storage.manifest import write_folder
from posmask.storage.record import StudyRecord, write_record
from posmask.study.estimate import Line, Plan
from posmask.study.study_file import read_study

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
    assert all(isinstance(problem, str) for problem in report["problems"])


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
    assert re.match(r"(Ready, after a download of \d+ MB|Not ready: )", result.output.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def test_status_of_the_quick_study_needs_no_model(tmp_path):
    result = CliRunner().invoke(app, ["status", str(ROOT / "studies" / "quick.toml"), "--root", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "0 of 9 finished" in result.output
    assert "\x1b" not in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    assert re.search(r"^slice-gradient +seed 0", result.output, re.M)


HOSTILE = "[red]x[/x]" + "y" * 50


def rows_of(cell, value, mask="slice", seed=0):
    """The rows of a cell whose reported numbers are all `value`."""
    return [
        Row(cell, mask, "" if mask == "none" else "compute", "forward", seed, metric, where, value, 0.0, 0.0, 9)
        for metric, where in (
            ("explained_variance", ""),
            ("ce_recovered", ""),
            *(("probe_accuracy", f"k={k};pooling=mean") for k in (1, 5, 20)),
            *(
                ("order_accuracy", f"about={about};k={k};pooling=mean")
                for about in ("block", "local")
                for k in (1, 5, 20)
            ),
        )
    ]


def verdict(label, column, effect, half=0.004, kind="undecided", n_seeds=3, against="open"):
    p = 0.5 if kind == "undecided" else 0.001
    return Verdict(label, against, column, effect, effect - half, effect + half, p, n_seeds, 12, kind)


SEGMENTS = "order_accuracy", "about=block;k=5;pooling=segments4"
ROWS = [
    *rows_of("open", 0.75, mask="open"),
    Row("open", "open", "compute", "forward", 0, *SEGMENTS, 0.625, 0.0, 0.0, 9),
    *rows_of(HOSTILE, 0.125),
    *rows_of("llm", 0.5, mask="none"),
]


def shown_at(width, verdicts, **settings):
    file = io.StringIO()
    table = results_table(summarize(ROWS), "open", verdicts, width)
    Console(file=file, width=width, **settings).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [66, 80, 120, 200])
def test_the_table_has_eight_columns_with_differences_and_never_cuts_a_number(width):
    verdicts = [verdict(HOSTILE, column.name, -0.0625) for column in SHOWN]
    text = shown_at(width, [*verdicts, verdict("open + segments4", "block k=5", -0.125)])
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert not re.search("\x1b|…", text)
    assert lines[1].split() == ["cell", "budget", "var.", "rec.", "k=1", "k=5", "k=5", "k=5"]
    rules = [number for number, line in enumerate(lines) if "─" in line]
    assert [line.split()[0] for line in lines[rules[0] + 1 : rules[1]]] == ["open", "open", "the"]
    assert lines[rules[0] + 1].split() == ["open", "compute", *["0.750"] * 6]
    assert lines[rules[0] + 2].split() == ["open", "+", "segments4", "compute", "–", "0.625", "–", "–"]
    below = "\n".join(lines[rules[1] + 1 :])
    assert "".join(line.split(" ")[0] for line in below.splitlines()) == HOSTILE
    assert (below.count("−0.062"), below.count("±0.004")) == (6, 6)
    assert below.count("0.125") == 6 * (width == 200)  # Wide tables have room for values, too.


def test_columns_that_do_not_fit_are_left_out_and_counted():
    text = shown_at(44, [verdict(HOSTILE, column.name, -0.0625) for column in SHOWN])
    assert max(map(len, text.splitlines())) <= 44
    assert "3 columns do not fit" in text
    assert "…" not in text


def test_a_table_without_differences_shows_values():
    text = shown_at(80, [])
    assert text.count("0.125") == 6
    assert "±" not in text


def test_small_intervals_do_not_read_as_zero():
    assert "±0.0004" in shown_at(80, [verdict(HOSTILE, "explained_variance", -0.002, half=0.0004)])


def test_significant_differences_have_a_star_and_a_color_where_there_is_color():
    verdicts = [
        verdict(HOSTILE, "explained_variance", -0.0625, kind="worse"),
        verdict(HOSTILE, "block k=5", 0.0625, kind="better"),
        verdict(HOSTILE, "block k=1", 0.0625),
    ]
    plain = shown_at(120, verdicts)
    assert len(re.findall(r"−0\.062\*", plain)) == len(re.findall(r"\+0\.062\*", plain)) == 1
    assert "* better or worse, after correction" in table_note("open", verdicts)
    equal = [verdict(HOSTILE, "block k=5", 0.0004, kind="equivalent")]
    assert "+0.0004=" in shown_at(120, equal)
    assert "; = equivalent, after correction" in table_note("open", equal)
    colors = {"force_terminal": True, "color_system": "standard"}
    colored = shown_at(120, verdicts, **colors)
    assert "\x1b[31m−0.062*" in colored
    assert "\x1b[32m+0.062*" in colored
    assert colored.count("\x1b[31m") == colored.count("\x1b[32m") == 1
    without = shown_at(120, verdicts, **colors, no_color=True)
    assert "\x1b[31m" not in without
    assert "−0.062*" in without


def test_a_table_on_a_terminal_without_unicode_keeps_signs(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unencodable()
    Console(width=80).print(results_table(summarize(ROWS), "open", [verdict(HOSTILE, "block k=5", -0.0625)], 80))
    print("−1 ± 2 … 日")
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "-0.062" in text
    assert "+/-0.004" in text
    assert text.endswith("-1 +/- 2 . ?\n")


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        ([], "Nothing is compared: the study has neither an open cell as baseline nor comparisons."),
        (
            [verdict("slice", "block k=5", 0.9, n_seeds=1)],
            "With 1 seed no difference to open can be established: comparisons need 3 seeds.",
        ),
        (
            [verdict("slice", "block k=5", 0.9)],
            "Compared with open (3 seeds, corrected for 12 comparisons), no difference is significant.",
        ),
        (
            [
                verdict("slice", "explained_variance", -0.1, kind="worse"),
                verdict("hard", "explained_variance", -0.2, kind="worse", n_seeds=5),
                verdict("hard", "block k=5", 0.02, kind="better"),
                verdict("hard", "block k=1", 0.5),
                verdict("hard", "block k=1", 0.7, against="slice", kind="better"),
                verdict("late", "block k=5", 0.5, n_seeds=2),
            ],
            "Compared with open (2 to 5 seeds, corrected for 12 comparisons), explained variance is lower in 2 rows, "
            "most in hard (−0.200, 95 % CI [−0.204, −0.196]); block order at k = 5 is higher in hard (+0.020, 95 % "
            "CI [0.016, 0.024]); no other difference is significant; late: fewer than 3 seeds.",
        ),
        (
            [verdict("hard", "block k=1", 0.7, against="slice", kind="better")],
            "Compared with slice (3 seeds, corrected for 12 comparisons), block order at k = 1 is higher in hard "
            "(+0.700, 95 % CI [0.696, 0.704]); no other difference is significant.",
        ),
    ],
)
def test_the_finding_is_what_the_verdicts_say(verdicts, sentence):
    assert finding(verdicts, "open") == sentence


@pytest.mark.parametrize(
    ("verdicts", "sentences"),
    [
        ([], ["Nothing is compared: the study has neither an open cell as baseline nor comparisons."]),
        (
            [
                verdict("slice", "block k=5", 0.9, n_seeds=1),
                verdict("slice", "block k=5", 0.9, n_seeds=1, against="slice + matched"),
            ],
            ["With 1 seed no difference to open can be established: comparisons need 3 seeds."],
        ),
        (
            [verdict("slice", "probing k=5", 0.9)],
            ["Compared with open (3 seeds), SAEs do not differ significantly in standard probing."],
        ),
        ([verdict("slice", "block k=1", 0.9, kind="better")], []),
        (
            [
                replace(verdict("slice", "block k=5", 0.9), hypothesis=2, expected="better"),
                replace(verdict("slice", "probing k=5", 0.0, kind="equivalent"), hypothesis=1, expected="equivalent"),
            ],
            [
                "1 of 2 hypotheses stated beforehand came out as expected; slice against open is undecided in block "
                "order where better was expected (+0.900, 95 % CI [0.896, 0.904]).",
                "Compared with open (3 seeds), SAEs do not differ significantly in block order and standard probing.",
            ],
        ),
        (
            [
                verdict("slice", "block k=5", 0.3, kind="better"),
                verdict("hard", "block k=5", 0.2, kind="better"),
                verdict("hard", "probing k=5", -0.1, kind="worse"),
                verdict("hard", "explained_variance", 0.9),
                verdict("hard + zero-step", "block k=5", 0.9, kind="better"),
                verdict("open + max", "local k=5", 0.4, kind="better"),
                verdict("hard", "block k=5", 0.04, kind="better", against="hard + matched"),
                verdict("slice", "block k=5", 0.5, against="slice + matched"),
                verdict("slice", "local k=5", -0.02, against="slice + matched"),
            ],
            [
                "Training with a mask improves on pooling the unmasked SAE's codes by the same mask: +0.040 in block "
                "order (hard, 95 % CI [0.036, 0.044]); the largest other gain, −0.020 in local order (slice, 95 % CI "
                "[−0.024, −0.016]), is not significant.",
                "Compared with open (3 seeds), SAEs differ by up to +0.300 in block order (slice, 95 % CI [0.296, "
                "0.304]), −0.100 in standard probing (hard, 95 % CI [−0.104, −0.096]) and not significantly in "
                "explained variance; other poolings of codes differ by up to +0.400 in local order (open + max, 95 % "
                "CI [0.396, 0.404]).",
            ],
        ),
    ],
)
def test_the_headline_names_the_largest_effects(verdicts, sentences):
    assert headline(verdicts, "open") == sentences


def test_a_run_ends_with_finding_page_and_next_command(study_file, finish, tmp_path, monkeypatch):
    finish(tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def end_of(*options):
        words = ["run", "tiny.toml", "--root", "run", *options]
        return CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()

    *_, empty, found, page, command, cost = end_of("--set", "training.batch_tokens=256")
    assert (empty, page) == ("", "The page: run/report.html")
    assert found == "With 1 seed no difference to open can be established: comparisons need 3 seeds."
    assert command == ("Next: posmask run tiny.toml --root run --set training.batch_tokens=256 --set 'seeds=[0, 1, 2]'")
    assert re.fullmatch(r" +\(3 seeds, about \d.* more; finished cells stay\)", cost)
    read_study(study_file, ["seeds=[0, 1, 2]"])


def test_the_next_command_follows_from_the_seeds(study_file, tmp_path):
    def next_step(*changes):
        settings = read_study(study_file, changes)
        return commands._next_step(settings, [], study_file, None, tmp_path, list(changes), 1)

    command = next_step("seeds=[1]")
    assert "--set 'seeds=[1, 0, 2]'" in command
    assert command.count("seeds=") == 1
    assert next_step("seeds=[0, 1, 2]") == f"Next: posmask report {tmp_path} --all writes a page with all latents"
    cells = 'cells=[{name = "open", mask = {kind = "open"}}, {name = "cut", mask = {kind = "open"}, seeds = [0]}]'
    assert next_step("seeds=[0, 1, 2]", cells, "comparisons=[]") == (f"Next: give cut at least 3 seeds in {study_file}")


@pytest.mark.parametrize("width", [44, 80])
def test_the_table_of_a_plan_keeps_every_number_and_enough_of_the_names(width):
    name = "windows-with-a-long-name.and-more_of-it"
    lines = [Line("harvest", "training texts", 5000, 1.0), Line("baselines", "the model itself", 2250, 0.5)]
    lines += [Line("training", name, 768_000, 1000.0), Line("evaluation", name, 6594, 10_000.0)]
    file = io.StringIO()
    for table in printing._plan_tables(Plan(tuple(lines), 3, 0, 1, 1, ()), width):
        Console(file=file, width=width).print(table)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert all(number in text for number in ("16 min 40 s", "2 h 47 min"))
    assert ("768,000" in text) == (width == 80)
    assert text.count("\n") < 14


def test_an_audited_name_is_not_markup():
    summary = {
        "name": HOSTILE,
        "d_sae": 8,
        "classes": {"on": {"position": {"count": 1}}},
        "explained_variance": {"value": 0.5},
        "l0": {"value": 4},
    }
    file = io.StringIO()
    Console(file=file, width=120).print(audit_table([summary]))
    assert HOSTILE in file.getvalue()


def test_watching_prints_a_line_per_change_and_ends_with_the_page(monkeypatch, tmp_path, capsys):
    steps = [
        [("baselines", "missing"), ("open-seed0", "missing")],
        [("baselines", "finished"), ("open-seed0", "missing")],
        [("baselines", "finished"), ("open-seed0", "missing")],
        [("baselines", "finished"), ("open-seed0", "finished")],
        [("baselines", "finished"), ("open-seed0", "finished")],
    ]
    remaining = iter(steps)

    def sleep(seconds):
        if steps[-1] is not steps[0] and remaining.__length_hint__() == 1:
            for name in ("results.csv", "report.html"):
                (tmp_path / name).touch()

    monkeypatch.setattr(printing.time, "sleep", sleep)
    (tmp_path / "checkpoints" / "open-seed0").mkdir(parents=True)
    printing.watched(lambda: next(remaining), tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        f"0 of 2 finished under {tmp_path}; with checkpoints: open-seed0",
        f"1 of 2 finished under {tmp_path}; with checkpoints: open-seed0",
        f"2 of 2 finished under {tmp_path}; results.csv and report.html not yet written",
        f"2 of 2 finished under {tmp_path}",
    ]


def test_watching_on_a_terminal_refreshes_a_table_until_interrupted(tmp_path):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "posmask.cli", "status", "studies/quick.toml", "--root", tmp_path, "--watch"]
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    # A shell that runs the tests in the background ignores interrupts, also for the processes that they start.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=slave, stderr=slave, cwd=ROOT, env=environment, **heeds) as process:
        os.close(slave)
        text, interrupted = "", False
        try:
            with contextlib.suppress(OSError):  # EIO: the process has ended.
                # What it writes at its end must be read, too, or it waits.
                while select.select([master], [], [], 60)[0]:
                    text += os.read(master, 65536).decode()
                    if not interrupted and "0 of 9 finished" in text:
                        process.send_signal(signal.SIGINT)
                        interrupted = True
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
            os.close(master)
    assert "slice-gradient" in text
    assert "Traceback" not in text


def test_watch_and_json_exclude_each_other(posmask):
    code, _, errors = posmask("status", "studies/quick.toml", "--watch", "--json")
    assert (code, errors) == (2, "posmask: --watch and --json exclude each other: choose one\n")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "Ready: all packages fit, and the embedded model and texts are downloaded."),
        (
            {"downloads": [{"megabytes": 93, "cached": False}, {"megabytes": 5, "cached": True}]},
            "Ready, after a download of 93 MB, which `posmask fetch` or the first run does.",
        ),
        ({"problems": ["a", "b"]}, "Not ready: a; b."),
    ],
)
def test_the_verdict_of_doctor_is_a_sentence(changes, verdict):
    assert doctor._verdict({"problems": [], "downloads": [], **changes}) == verdict


def test_doctor_names_unmet_requirements_and_a_full_disk(monkeypatch, tmp_path):
    needs = ["rich>=13.9", "typer>=99", "nothing-of-this-name>=1", "ray>=999; extra == 'ray'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3e8))
    first, second = doctor._unmet_requirements()
    assert re.fullmatch(r"typer is [\d.]+: pip install 'typer>=99'", first)
    assert second == "nothing-of-this-name is not installed: pip install 'nothing-of-this-name>=1'"
    assert doctor._disk_problems(tmp_path / "cache") == [
        f"only 0.3 GB are free in {tmp_path}: free 2 GB, or set POSMASK_CACHE"
    ]


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
