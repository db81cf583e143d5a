"""What a run shows on standard error: in a log file, on a terminal, and with --quiet."""

import os
import pty
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from posmask import progress
from posmask.cli.commands import app
from posmask.cli.options import registered
from posmask.progress import announce, no_progress, part_finished, progress_bar, study_progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that time.monotonic returns; add to them to let time pass."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


CELLS = ("baselines", "open", "slice", "hard", "soft")
COSTS = dict.fromkeys(CELLS[1:], 1.0)


def test_a_log_has_a_line_per_cell_with_time_left_after_ten_seconds(capsys, clock):
    with study_progress("quick", CELLS, CELLS[:1], COSTS):
        for cell, seconds in zip(CELLS[1:], (4, 8, 18), strict=False):
            clock[0] += seconds
            part_finished(cell)
            part_finished(cell)  # counted once
    assert capsys.readouterr().err.splitlines() == [
        "quick: 2 of 5 cells done, 4 s elapsed",
        "quick: 3 of 5 cells done, 12 s elapsed, about 12 s left",
        "quick: 4 of 5 cells done, 30 s elapsed, about 10 s left",
    ]


def test_time_left_weighs_parts_by_their_predicted_cost(capsys, clock):
    with study_progress("quick", CELLS, CELLS[:3], {"harvest": 20.0, "hard": 60.0, "soft": 20.0}):
        for part, seconds in (("harvest", 30), ("hard", 70)):
            clock[0] += seconds
            part_finished(part)
    assert capsys.readouterr().err.splitlines() == [
        "quick: 3 of 5 cells done, 30 s elapsed, about 2 min 00 s left",
        "quick: 4 of 5 cells done, 1 min 40 s elapsed, about 25 s left",
    ]


def test_a_stage_within_a_study_is_shown_and_a_bar_within_it_is_not(capsys, clock):
    with study_progress("quick", CELLS, (), COSTS), progress_bar("train slice", 2000, "tokens") as advance:
        with progress_bar("inner", 5, "tokens") as inner:
            clock[0] += 12
            inner(5)
        advance(1000)
        clock[0] += 8
        advance(1000)
    assert capsys.readouterr().err.splitlines() == [
        "train slice: 1,000 of 2,000 tokens, 83 tokens/s, 12 s left",
        "train slice: 2,000 tokens in 20 s, 100 tokens/s",
    ]


def test_a_slow_or_stopped_stage_never_reports_0_per_second(capsys, clock):
    with progress_bar("train slice", 2000, "tokens") as advance:
        clock[0] += 60
        advance(3)
    with progress_bar("train half", 2000, "tokens"):
        clock[0] += 60
    text = capsys.readouterr().err
    assert "3 of 2,000 tokens, 0.050 tokens/s, 11 h 06 min left" in text
    assert "train half: 0 tokens in 1 min 00 s\n" in text
    assert " 0 tokens/s" not in text


def test_nothing_is_shown_within_no_progress(capsys, clock):
    with no_progress(), study_progress("quick", CELLS, (), COSTS), progress_bar("train slice", 10, "tokens") as advance:
        clock[0] += 60
        advance(10)
        announce("Reading.")
        part_finished("open")
    assert capsys.readouterr().err == ""
    announce("Reading.")
    assert capsys.readouterr().err == "Reading.\n"


def test_a_terminal_shows_the_study_above_the_current_stage():
    program = """
from posmask.progress import part_finished, progress_bar, study_progress
with study_progress("quick", ("open", "slice", "half"), ("open",), {"slice": 1.0, "half": 2.0}):
    with progress_bar("train slice", 2000, "tokens") as advance:
        advance(2000)
    part_finished("slice")
    print("on stdout")
    with progress_bar("train half", 2000, "tokens") as advance:
        advance(500)
"""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=slave, env=environment, check=True
    )
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert done.stdout == b"on stdout\n"
    last = shown[shown.rindex("quick") :]
    assert "2/3" in last
    assert "500/2,000" in last
    assert "train slice" not in last


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["work"], True), (["work", "--quiet"], False), (["work", "-q"], False), (["-q", "work"], False)],
)
def test_quiet_is_accepted_before_and_after_the_command(arguments, shown, monkeypatch):
    monkeypatch.setattr(app, "registered_commands", [])
    registered(app, "work", "Results")(lambda: announce("Reading."))
    registered(app, "rest", "Results")(lambda: None)
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (0, "Reading.\n" * shown)


def test_a_run_shows_its_cells_and_a_quiet_run_prints_nothing_on_standard_error(study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    root = tmp_path / "run"
    quiet = CliRunner().invoke(app, ["--quiet", "run", str(study_file), "--root", str(root)])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "The page: " in quiet.stdout
    shutil.rmtree(root / "cells" / "slice-compute-seed0")
    run = CliRunner().invoke(app, ["run", str(study_file), "--root", str(root)])
    assert "3 of 3 cells done" in run.stderr
    assert "Estimated time: " in run.stderr
    assert "evaluate slice-compute-seed0: " in run.stderr
