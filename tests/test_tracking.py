"""Curves are written to the files of each tracker and read back with its reader, without a network."""

import functools
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest

from posmask.errors import MissingExtra
from posmask.study.run import run_study
from posmask.study.study_file import read_study
from posmask.training import trackers
from posmask.training.curve import CurvePoint

POINTS = [CurvePoint(step, step * 256, 1e-3, 1 / step, 0.0, 1 - 1 / step, 4.0, step % 3, 0.5) for step in (1, 10, 20)]

WRITE_AND_READ = """
import glob, json, sys
from pathlib import Path
from posmask.training.trackers import curve_writer
from posmask.training.curve import CurvePoint

trackers = {"tensorboard", "wandb", "trackio"}
folder = Path(sys.argv[1])
with curve_writer(None, folder, "tiny", "open-seed0", {}) as write:
    write(CurvePoint(1, 256, 1e-3, 1.0, 0.0, 0.5, 4.0, 0, 0.5))
assert not list(folder.iterdir()) and not trackers & set(sys.modules)

for name in sorted(trackers):
    with curve_writer(name, folder, "tiny", "open-seed0", {"seed": 7}) as write:
        for step in (1, 10, 20):
            write(CurvePoint(step, step * 256, 1e-3, 1 / step, 0.0, 1 - 1 / step, 4.0, step % 3, float("nan")))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(folder / "tensorboard" / "open-seed0"))
events.Reload()
curves = {"tensorboard": {tag: [[p.step, p.value] for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}}

from trackio.sqlite_storage import SQLiteStorage
curves["trackio"] = {}
for row in SQLiteStorage.get_logs("posmask-tiny", "open-seed0"):
    for key, value in row.items():
        curves["trackio"].setdefault(key, []).append([row["step"], value])

from wandb.proto.wandb_internal_pb2 import Record
curves["wandb"], settings = {}, {}
(path,) = glob.glob(str(folder / "wandb" / "offline-run-*" / "run-*.wandb"))
data, at, record = Path(path).read_bytes(), 7, b""  # the log format of LevelDB after a header
while at + 7 <= len(data):
    if (left := 32768 - at % 32768) < 7:
        at += left
        continue
    length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        settings |= {item.key: json.loads(item.value_json) for item in Record.FromString(record).run.config.update}
        history = Record.FromString(record).history
        for item in history.item:
            key = item.key or item.nested_key[0]
            curves["wandb"].setdefault(key, []).append([history.step.num, json.loads(item.value_json)])
        record = b""
assert settings["seed"] == 7, settings
print(json.dumps(curves))
"""


def test_every_tracker_records_all_points_and_is_imported_only_if_used(tmp_path):
    (tmp_path / "run").mkdir()
    offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WRITE_AND_READ, str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **offline})
    assert run.returncode == 0, run.stdout + run.stderr
    for points in json.loads(run.stdout.splitlines()[-1]).values():
        assert "mean_openness" not in points  # NaN is omitted.
        for key in ("loss", "explained_variance", "tokens"):
            expected = [(point.step, getattr(point, key)) for point in POINTS]
            assert [tuple(pair) for pair in points[key]] == [pytest.approx(pair) for pair in expected]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_raises_an_error_with_the_pip_command(name, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(MissingExtra, match=rf"needs the package `{name}`: pip install 'posmask\[track\]'"):
        trackers.check_tracker(name)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Remove every source of a key."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", ["nothing", "variable", "offline", "netrc", "settings"])
def test_a_missing_key_is_reported_before_the_run(source, no_key, monkeypatch, tmp_path, capsys):
    if source == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    elif source == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    elif source == "netrc":
        (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
        (tmp_path / ".netrc").chmod(0o600)
    elif source == "settings":
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    trackers.check_tracker("wandb")
    assert ("track = 'wandb' has no API key" in capsys.readouterr().err) == (source == "nothing")
    trackers.check_tracker("trackio")
    assert capsys.readouterr().err == ""


def test_a_tracker_without_a_key_is_not_opened(no_key, monkeypatch, tmp_path):
    tracker = Tracker(None)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with trackers.curve_writer("wandb", tmp_path, "tiny", "open-seed0", {}) as write:
        write(POINTS[0])
    assert tracker.calls == []


class Tracker:
    """A tracker that fails at one of its calls, as on a machine without a network."""

    __spec__ = ModuleSpec("trackio", None)

    def __init__(self, failing):
        self.calls = []
        for name in ("init", "log", "finish"):
            setattr(self, name, functools.partial(self.call, name, failing))

    def call(self, called, failing, *args, **options):
        self.calls.append(called)
        if called == failing:
            raise ConnectionError("no route to host\nand more")


@pytest.mark.parametrize("failing", ["init", "log", "finish", None])
def test_a_failing_tracker_gives_one_warning_and_is_left_out(failing, monkeypatch, tmp_path, capsys):
    tracker = Tracker(failing)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr(trackers, "_given_up", set())
    for cell in ("open-seed0", "slice-seed0"):
        with trackers.curve_writer("trackio", tmp_path, "tiny", cell, {}) as write:
            for point in POINTS:
                write(point)
    warning = "The tracker trackio failed (ConnectionError: no route to host): training continues without it"
    assert capsys.readouterr().err.count(warning) == (failing is not None)
    assert (
        tracker.calls
        == {
            "init": ["init"],
            "log": ["init", "log", "finish"],
            "finish": ["init", "log", "log", "log", "finish"],
            None: ["init", "log", "log", "log", "finish"] * 2,
        }[failing]
    )


def test_an_error_of_training_is_not_the_trackers(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "trackio", Tracker("finish"))
    monkeypatch.setattr(trackers, "_given_up", set())
    with pytest.raises(ZeroDivisionError), trackers.curve_writer("trackio", tmp_path, "tiny", "open-seed0", {}):
        raise ZeroDivisionError
    assert "trackio failed" in capsys.readouterr().err


def test_a_study_whose_tracker_fails_is_the_same_as_without_one(study_file, begin, tmp_path, monkeypatch, capsys):
    study = read_study(study_file, ["track=trackio"])
    monkeypatch.setattr(trackers, "_given_up", set())
    monkeypatch.setitem(sys.modules, "trackio", Tracker("log"))
    run_study(study, begin(tmp_path / "run"), say=lambda line: None)
    assert capsys.readouterr().err.count("The tracker trackio failed") == 1
    for cell in ("open-seed0", "slice-compute-seed0"):
        assert len((tmp_path / "run" / "cells" / cell / "curve.csv").read_text().splitlines()) > 2
