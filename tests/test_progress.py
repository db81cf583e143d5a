"""What a run shows on standard error: in a log file, on a terminal, and with --quiet."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
from typer.testing import CliRunner

from posmask import progress
from posmask.cli.commands import app
from posmask.cli.options import registered
from posmask.progress import (
    Stage,
    announce,
    no_progress,
    progress_bar,
    sent_by,
    stage_label,
    stages_finished,
    study_progress,
)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that time.monotonic returns; add to them to let time pass."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def run_stage(clock, label, *seconds, explained_variance=None):
    """Go through a stage of 1,000 tokens in equal parts that take these times."""
    with progress_bar(label, 1000, "tokens") as advance:
        for time_of_part in seconds:
            clock[0] += time_of_part
            advance(1000 // len(seconds), explained_variance=explained_variance)


COSTS = dict.fromkeys(("harvest training", "evaluate the model itself", "train open", "evaluate open"), 1.0)


def test_a_log_has_a_line_per_stage_with_time_left_after_ten_seconds(capsys, clock):
    with study_progress("quick", COSTS):
        run_stage(clock, "harvest training", 4)
        run_stage(clock, "evaluate the model itself", 8)
        run_stage(clock, "train open", 18, explained_variance=0.8476)
    assert capsys.readouterr().err.splitlines() == [
        "quick, stage 1 of 4: harvest training took 4 s (1,000 tokens), 250 tokens/s; 4 s elapsed",
        "quick, stage 2 of 4: evaluate the model itself took 8 s (1,000 tokens), 125 tokens/s; "
        "12 s elapsed, about 12 s left",
        "quick, stage 3 of 4: train open took 18 s (1,000 tokens), 56 tokens/s, explained variance 0.848; "
        "30 s elapsed, about 10 s left",
    ]


def test_a_log_has_a_line_per_minute_of_a_stage(capsys, clock):
    with study_progress("quick", COSTS):
        run_stage(clock, "train open", 40, 40, 40, 40, explained_variance=-0.1)
    assert capsys.readouterr().err.splitlines() == [
        "quick, stage 1 of 4: train open at 50 % (500 of 1,000 tokens), 6.2 tokens/s, explained variance −0.100; "
        "1 min 20 s elapsed, about 9 min 20 s left",
        "quick, stage 1 of 4: train open at 100 % (1,000 of 1,000 tokens), 6.2 tokens/s, explained variance −0.100; "
        "2 min 40 s elapsed, about 8 min 00 s left",
        "quick, stage 1 of 4: train open took 2 min 40 s (1,000 tokens), 6.2 tokens/s, explained variance −0.100; "
        "2 min 40 s elapsed, about 8 min 00 s left",
    ]


def test_time_left_weighs_stages_by_their_predicted_cost_and_counts_parts_of_them(capsys, clock):
    with study_progress("quick", {"harvest training": 20.0, "train hard": 60.0, "train soft": 20.0}):
        run_stage(clock, "harvest training", 30)
        run_stage(clock, "train hard", 70, 20)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("; ")[2] for line in lines] == [
        "30 s elapsed, about 2 min 00 s left",
        "1 min 40 s elapsed, about 1 min 40 s left",  # 20 + 30 of 100 are done
        "2 min 00 s elapsed, about 30 s left",
    ]


def test_stages_of_other_processes_count_and_are_named_once(capsys, clock):
    with study_progress("quick", COSTS):
        run_stage(clock, "train open", 5)
        for _ in range(2):
            stages_finished(["train open", "evaluate open", "train unknown"])
    assert capsys.readouterr().err.splitlines()[1:] == ["quick, stage 2 of 4: finished elsewhere: evaluate open"]


def test_a_stage_within_a_stage_is_not_shown(capsys, clock):
    with progress_bar("train slice", 2000, "tokens") as advance:
        with progress_bar("inner", 5, "tokens") as inner:
            clock[0] += 12
            inner(5)
        advance(1000)
        clock[0] += 8
        advance(1000)
    assert capsys.readouterr().err == "train slice took 20 s (2,000 tokens), 100 tokens/s\n"


def test_time_left_of_a_stage_is_measured_from_its_first_units(capsys, clock):
    """The first step of a training compiles its loops."""
    with progress_bar("train slice", 1000, "tokens") as advance:
        clock[0] += 70
        advance(10)
        clock[0] += 50
        advance(490)
        clock[0] += 50
        advance(500)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "train slice at 1 % (10 of 1,000 tokens), 0.14 tokens/s"
    assert second.startswith("train slice at 100 % ")
    with progress_bar("train slice", 1000, "tokens") as advance:
        advance(10)
        clock[0] += 70
        advance(490)
    assert capsys.readouterr().err.splitlines()[0].endswith("7.0 tokens/s, 1 min 11 s left")


def test_a_stage_that_failed_does_not_end(capsys, clock):
    with pytest.raises(ZeroDivisionError), progress_bar("train slice", 10, "tokens") as advance:
        advance(10 // 0)
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_within_no_progress(capsys, clock):
    with no_progress(), study_progress("quick", COSTS), progress_bar("train open", 10, "tokens") as advance:
        clock[0] += 70
        advance(10)
        announce("Reading.")
        stages_finished(["evaluate open"])
    assert capsys.readouterr().err == ""
    announce("Reading.")
    assert capsys.readouterr().err == "Reading.\n"


def test_stages_are_shown_here_and_sent_twice_per_second(capsys, clock):
    sent = []
    with sent_by(sent.append):
        run_stage(clock, "train open", 0.1, 0.1, 0.4, 0.1)
    assert [(stage.done, stage.ended) for stage in sent] == [(0, False), (750, False), (1000, True)]
    assert sent[-1] == Stage("train open", 1000, "tokens", 1000, None, ended=True)
    assert capsys.readouterr().err.startswith("train open took 1 s ")


def shown_on_terminal(program, n_columns, **environment):
    """Run a program with standard error on a terminal of this width, and return what it wrote there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, n_columns, 0, 0))
    without = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**without, "TERM": "xterm-256color", **environment},
        check=True,
    )
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # how Linux reports the end
            break
        text += part
        if not part:
            break
    os.close(master)
    assert done.stdout == b"on stdout\n"
    return text


CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TERMINAL_PROGRAM = """
import time
from posmask.progress import progress_bar, stages_finished, study_progress
names = ["open", "slice", "windows-[red]of[/x]-" + 40 * "long"]
with study_progress("quick", {f"train {name}-seed12": 1.0 for name in names}):
    with progress_bar(f"train {names[1]}-seed12", 2000, "tokens") as advance:
        advance(2000)
    stages_finished([f"train {names[0]}-seed12"])
    print("on stdout")
    with progress_bar(f"train {names[2]}-seed12", 2000, "tokens") as advance:
        advance(500, explained_variance=0.8476)
        time.sleep(0.4)  # The display is refreshed ten times per second.
"""


@pytest.mark.parametrize("n_columns", [44, 80, 120, 200])
def test_a_terminal_shows_the_study_above_the_stage_in_one_line_each(n_columns):
    text = shown_on_terminal(TERMINAL_PROGRAM, n_columns).decode()
    lines = [CONTROL.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) <= n_columns
    study = [line for line in lines if line.startswith("quick")]
    stages = [line for line in lines if line.startswith("trai")]
    assert all(re.search(r" stage \d of 3 .*\b\d+ s$", line) for line in study)
    assert "stage 3 of 3" in study[-1]
    assert re.search(r"…\S*d12 .* 25 % .*expl\. var\. 0\.848", stages[-1])
    if n_columns >= 120:
        assert "train windows-[red]of" in stages[-1]


def test_bars_are_plain_characters_on_a_terminal_without_unicode():
    text = shown_on_terminal(TERMINAL_PROGRAM, 80, PYTHONIOENCODING="ascii:replace")
    assert b"expl. var. 0.848" in text
    assert text.isascii()


def test_a_dumb_terminal_gets_lines():
    text = shown_on_terminal(TERMINAL_PROGRAM, 80, TERM="dumb").decode()
    assert "quick, stage 1 of 3: train slice-seed12 took 0 s (2,000 tokens)" in text
    assert "\x1b" not in text


def test_a_log_gets_lines_even_if_color_is_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("train slice", 10, "tokens") as advance:
        advance(10)
    assert re.fullmatch(r"train slice took 0 s \(10 tokens\), [\d,]+ tokens/s\n", capsys.readouterr().err)


def test_labels_of_stages_are_kind_and_name():
    assert stage_label("evaluate", "open-seed0") == "evaluate open-seed0"


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


def test_a_run_counts_every_stage_and_a_quiet_run_prints_nothing_on_standard_error(study_file, tmp_path):
    root = tmp_path / "run"
    quiet = CliRunner().invoke(app, ["--quiet", "run", str(study_file), "--root", str(root)])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert "report.html" in quiet.stdout
    shutil.rmtree(root / "cells" / "slice-compute-seed0")
    shutil.rmtree(next((root / "activations").glob("shift-*")))
    run = CliRunner().invoke(app, ["run", str(study_file), "--root", str(root)])
    assert "Estimated time: " in run.stderr
    stages = re.findall(r"^tiny, stage (\d) of 4: (.*?) took .*?(explained variance)?; ", run.stderr, re.M)
    assert [(number, label) for number, label, _ in stages] == [
        ("1", "harvest shift"),
        ("2", "train slice-compute-seed0"),
        ("3", "evaluate slice-compute-seed0"),
        ("4", "train slice-compute-seed0 without its mask"),
    ]
    assert len(re.findall("explained variance 0", run.stderr)) == 3
