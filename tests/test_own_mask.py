"""A mask kind in a module beside the study file works from the command line, in worker processes too."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_texts
from posmask import masks
from posmask.cli.commands import app
from posmask.errors import BadSetting
from posmask.masks import make_mask, mask_settings
from posmask.results.rows import read_rows
from posmask.sae.files import read_sae
from posmask.study import targets
from posmask.study.source import Source
from posmask.study.study_file import read_study
from test_wheel import STUDY

MODULE = """
import torch
from pydantic import Field
from posmask.masks.base import MaskSettings, PositionMask

class HeadTail(PositionMask):
    class Settings(MaskSettings):
        head: int = Field(gt=0)
    settings: Settings
    def _start(self, random):
        position, latent = torch.arange(self.n_positions), torch.arange(self.n_bound)
        self._fix(((position[:, None] < self.settings.head) == (latent % 2 == 0)).float())

class Named(HeadTail):
    class Settings(HeadTail.Settings):
        kind: str = "x"

from typing import Literal
class Fixed(HeadTail):
    class Settings(HeadTail.Settings):
        kind: Literal["fixed"] = "fixed"
"""
CELL = '[[cells]]\nname = "ends"\nmask = { kind = "NAME:HeadTail", head = 4 }\n'


@pytest.fixture
def study_file(tmp_path, model_folder, monkeypatch, request):
    """Write a study, its texts and the module of its mask into a folder that is not the current one."""
    name = f"masks_{request.node.name.partition('[')[0]}"  # A module is imported once per process.
    folder = tmp_path / "mine"
    (folder / "texts").mkdir(parents=True)
    for number, text in enumerate(make_texts(300)):
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    (folder / f"{name}.py").write_text(MODULE)
    (folder / "study.toml").write_text(STUDY.format(model=model_folder) + CELL.replace("NAME", name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return folder / "study.toml"


def test_a_kind_is_imported_from_beside_the_study_file(study_file, tmp_path):
    study = read_study(study_file)
    (cell,) = [cell for cell in study.cells if cell.name == "ends"]
    assert (cell.mask.head, type(cell.mask).__module__ + ":HeadTail") == (4, cell.mask.kind)
    del masks.MASKS[cell.mask.kind]
    mask = masks.make_mask(pickle.loads(pickle.dumps(study)).cells[-1].mask, 16, 32)  # as in a worker process
    assert mask.openness()[:, 1].tolist() == [0.0] * 4 + [1.0] * 12
    result = CliRunner().invoke(app, ["status", str(study_file), "--root", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "ends" in result.output


def test_the_identity_of_a_cell_covers_the_code_of_its_mask(study_file, tmp_path):
    def identities():
        study = read_study(study_file)
        return {target.label: target.identity for target in targets.targets_of(study, Source(study.model), tmp_path)}

    before = identities()
    (module,) = study_file.parent.glob("*.py")
    module.write_text(MODULE + "# another version\n")
    after = identities()
    assert [label for label in before if before[label] != after[label]] == ["ends-seed0"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nowhere:HeadTail", r"module 'nowhere' cannot be imported \(ModuleNotFoundError.*put nowhere\.py beside"),
        ("NAME:HeadTial", r"class 'HeadTial' is unknown: choose one of HeadTail, .*\(did you mean 'HeadTail'\?\)"),
        ("NAME:torch", "class 'torch' is unknown: choose one of HeadTail"),
        ("NAME:Fixed", r"Fixed\.Settings restricts `kind`, which is '.*:Fixed' here: leave `kind` out of it"),
        ("broken:HeadTail", r"module 'broken' cannot be imported \(SyntaxError"),
    ],
)
def test_a_kind_that_cannot_be_imported_is_refused(kind, message, study_file):
    (study_file.parent / "broken.py").write_text("def (:")
    text = study_file.read_text()
    name = text.partition(":HeadTail")[0].rpartition('"')[2]
    study_file.write_text(text.replace(f"{name}:HeadTail", kind.replace("NAME", name)))
    with pytest.raises(BadSetting, match=f'cell "ends": mask: mask kind .*{message}'):
        read_study(study_file)


@pytest.mark.slow
def test_a_study_with_an_own_kind_runs_in_two_processes(study_file, tmp_path):
    def posmask(*words):
        command = [sys.executable, "-m", "posmask.cli", *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
        assert result.returncode == 0, result.stderr
        return result.stdout

    root = tmp_path / "run"
    assert "ends" in posmask("plan", study_file, "--root", root)
    assert "2 processes share the cells" in posmask("run", study_file, "--root", root, "--jobs", 2)
    assert "3 of 3 finished" in posmask("status", study_file, "--root", root)
    kinds = {row.mask for row in read_rows(root / "results.csv")}
    (module,) = study_file.parent.glob("*.py")
    kind = f"{module.stem}:HeadTail"
    assert kinds == {"none", "open", kind}
    (root / "report.html").unlink()
    posmask("report", root)
    assert kind in (root / "report.html").read_text()
    cell = root / "cells" / "ends-seed0"
    posmask("evaluate", cell, study_file, "--root", root)
    assert json.loads((cell / "sae.json").read_text())["mask"]["kind"] == kind
    with pytest.raises(BadSetting, match="is defined outside posmask, and code that a file names is not run"):
        read_sae(cell)
    sys.path.append(str(study_file.parent))
    assert masks.MASKS[kind].__name__ == "HeadTail"
    assert read_sae(cell).mask.settings.head == 4


def test_the_two_latents_of_a_ramp_are_together_open_once_everywhere(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "studies")
    mask = make_mask(mask_settings({"kind": "ramps:Ramps"}, may_import=True), 16, 6)
    openness = mask.openness()
    torch.testing.assert_close(openness[:, :3] + openness[:, 3:], torch.ones(16, 3))
    assert openness[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert openness[-1].tolist() == [0, 0, 0, 1, 1, 1]
    assert mask.copied_from.tolist() == [0, 1, 2, 0, 1, 2]
