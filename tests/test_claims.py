"""Claims, leftovers of killed processes, and files that the operating system adds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from posmask.errors import BadSetting
from posmask.storage import atomic
from posmask.storage.manifest import remove, write_folder
from posmask.storage.record import claim_of
from posmask.study.run import evaluate_folder, run_study, train_together
from posmask.study.study_file import read_study
from posmask.training.checkpoints import Checkpoints, remove_checkpoints

MADE_FROM = {"cell": "open", "seed": 0}
SYSTEM_FILES = [".DS_Store", "._rows.csv", "Thumbs.db", "desktop.ini"]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def test_training_together_claims_its_cell(study_file, tmp_path, one_process):
    root = tmp_path / "run"
    study = read_study(study_file)
    with (
        claim_of(root, root / "cells" / "open-seed0", wait=False),
        pytest.raises(BadSetting, match=r"open-seed0 is being made by another process .* wait for it"),
    ):
        train_together(study, root, "open", 0, "data")
    assert not (root / "activations").exists()


def test_an_evaluation_claims_its_folder(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    study = read_study(study_file)
    sae = root / "cells" / "open-seed0"
    with (
        claim_of(root, root / "evaluated" / "open-seed0", wait=False),
        pytest.raises(BadSetting, match=r"evaluated/open-seed0 is being made by another process"),
    ):
        evaluate_folder(study, root, sae, lambda line: None)
    assert not (root / "evaluated").exists()


def test_drafts_of_a_zombie_are_removed(tmp_path):
    """A process that ended and that its parent has not waited for still has a number."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    draft = tmp_path / f".open-seed0.draft-{process.pid}"
    draft.mkdir()
    (draft / "rows.csv").write_text("half")
    atomic.clear_drafts_of(tmp_path / "open-seed0")
    assert not draft.exists()
    process.wait()


def test_drafts_of_a_running_process_are_kept(tmp_path):
    draft = tmp_path / f".open-seed0.draft-{os.getppid()}"
    draft.mkdir()
    atomic.clear_drafts_of(tmp_path / "open-seed0")
    assert draft.exists()


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_files_of_the_operating_system_stop_no_later_run(tmp_path, name):
    folder = tmp_path / "checkpoints" / "open-seed0"
    Checkpoints(folder, MADE_FROM).write(1, {"a": torch.zeros(1)})
    (folder / name).write_bytes(b"view")
    (folder / "000000001" / name).write_bytes(b"view")
    checkpoints = Checkpoints(folder, MADE_FROM)
    assert checkpoints.done == 1
    for done in (2, 3):
        checkpoints.write(done, {"a": torch.zeros(1)})
    remove_checkpoints(folder)
    assert not folder.exists()
    for number in range(2):
        with write_folder(tmp_path / "cell", MADE_FROM) as draft:
            (draft / "rows.csv").write_text(f"{number}")
        (tmp_path / "cell" / name).write_bytes(b"view")
    assert remove(tmp_path / "cell")


def test_a_link_named_like_a_file_of_the_operating_system_is_not_one(tmp_path):
    with write_folder(tmp_path / "cell", MADE_FROM) as draft:
        (draft / "rows.csv").write_text("1")
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "cell" / ".DS_Store").symlink_to(tmp_path / "thesis.txt")
    assert not remove(tmp_path / "cell")


@pytest.mark.slow
def test_a_run_completes_with_files_of_the_operating_system_everywhere(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"view")
    for label in ("open-seed0", "slice-compute-seed0"):
        (root / "checkpoints" / label).mkdir(parents=True)
        (Path(root / "checkpoints" / label) / ".DS_Store").write_bytes(b"view")
    run_study(read_study(study_file, ["training.learning_rate=0.004"]), root, lambda line: None)
