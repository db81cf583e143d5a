"""Curves are written to the files of each tracker and read back with its reader, without a network."""

import json
import os
import subprocess
import sys

import pytest

from posmask.errors import MissingExtra
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
