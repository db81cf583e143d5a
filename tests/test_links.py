"""Symbolic links inside a run folder: nothing is removed, moved or written outside of it."""

import pytest

from conftest import make_sae
from posmask.errors import BadSetting
from posmask.sae.files import write_sae
from posmask.storage import layout
from posmask.storage.manifest import set_aside, write_folder
from posmask.storage.record import claim_of
from posmask.study.run import evaluate_folder, run_study, train_together
from posmask.study.study_file import read_study

FOLDERS = ["cells", "activations", "activations/.store", "checkpoints", "evaluated", "stale", "jobs", ".locks"]


def silent(line):
    pass


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def other_study(tmp_path):
    """Write a folder outside the run folder that holds finished folders of posmask and a user's file."""
    folder = tmp_path / "other study"
    for label in ("open-seed0", "slice-compute-seed0"):
        with write_folder(folder / label, {"cell": label, "seed": 0}) as draft:
            (draft / "rows.csv").write_text("value")
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_a_linked_folder_of_a_run_folder_raises_before_any_work(study_file, tmp_path, other_study, name):
    root = tmp_path / "run"
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(other_study)
    write_sae(make_sae("open", rule="topk"), tmp_path / "sae")
    before = snapshot(other_study)
    study = read_study(study_file)
    for work in (
        lambda: run_study(study, root, silent),
        lambda: evaluate_folder(study, root, tmp_path / "sae", silent),
        lambda: train_together(study, root, "open", 0, "data"),
    ):
        with pytest.raises(BadSetting, match=f"{name} is a symbolic link, which posmask did not write"):
            work()
    assert snapshot(other_study) == before
    assert {path.name for path in root.rglob("*")} <= set(name.split("/"))


def test_a_linked_run_folder_is_used(study_file, finish, tmp_path):
    finish(tmp_path / "big disk")
    (tmp_path / "run").symlink_to(tmp_path / "big disk")
    lines = []
    run_study(read_study(study_file), tmp_path / "run", lines.append)
    assert lines == ["3 of 3 folders are finished and stay as they are."]


def test_a_folder_is_never_moved_onto_a_link(tmp_path):
    with write_folder(tmp_path / "cells" / "open-seed0", {"seed": 0}) as draft:
        (draft / "rows.csv").write_text("value")
    (tmp_path / "stale").mkdir()
    (tmp_path / "stale" / "open-seed0-1").symlink_to(tmp_path / "nowhere")
    moved = set_aside(tmp_path / "cells" / "open-seed0", layout.stale_paths(tmp_path, "open-seed0"))
    assert moved.name == "open-seed0-2"


def test_locks_are_inside_the_run_folder(study_file, tmp_path):
    """The parent of a run folder may belong to somebody else."""
    root = tmp_path / "run"
    study = read_study(study_file)
    with pytest.raises(BadSetting, match="no cell 'x'"):
        train_together(study, root, "x", 0, "data")
    for path in (root / "baselines", root / "cells" / "open-seed0", root / "activations" / "heldout-0"):
        with claim_of(root, path, wait=True) as claimed:
            assert claimed
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"run"}
    assert {path.name for path in root.iterdir()} == {".locks"}


def test_the_log_of_a_helper_is_not_written_through_a_link(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    (tmp_path / "thesis.txt").write_text("years of work")
    (root / "jobs").mkdir()
    (root / "jobs" / "2.log").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(BadSetting, match=r"jobs/2\.log is a symbolic link"):
        run_study(read_study(study_file, ["training.learning_rate=0.004"]), root, silent, n_jobs=2)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
