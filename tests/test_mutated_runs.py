"""Run folders, checkpoints and stores with changed content: a result or an error of posmask, never a traceback.

Manifests are sealed again after each change, as by somebody who forges results, so that checksums find nothing.
"""

import json
import math
import shutil

import pytest

from conftest import D_SAE, MASKS, N_POSITIONS, RULES
from mutations import changed_file, changed_folder, few, refused_or_fine, run_cases
from posmask.data.activations import training_batches
from posmask.interop.saelens_files import export_saelens
from posmask.masks import make_mask, mask_settings
from posmask.report import write_report
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_sae
from posmask.sae.rules import rule_settings
from posmask.storage.manifest import MANIFEST, damage_under, file_entry, sealed_manifest
from posmask.storage.record import misplaced
from posmask.study.run import run_study
from posmask.study.study_file import read_study
from posmask.study.targets import cell_states
from posmask.training.checkpoints import Checkpoints
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings


def seal(folder):
    """Write a manifest that matches the folder's files."""
    old = json.loads((folder / MANIFEST).read_text())
    facts = {key: value for key, value in old.items() if key not in ("identity", "made_from", "files", "sha256")}
    files = {name: file_entry(folder / name) for name in old["files"]}
    (folder / MANIFEST).write_text(sealed_manifest(old["made_from"], facts, files))


@few
@pytest.mark.parametrize("where", ["results", "cell", "baselines"])
def test_any_content_of_a_finished_run(amount, where, study_file, finish, tmp_path):
    intact, root = tmp_path / "intact", tmp_path / "run"
    finish(intact)
    folder = {"results": "", "cell": "cells/slice-compute-seed0", "baselines": "baselines"}[where]
    files = sorted(path for path in (intact / folder).iterdir() if path.is_file())
    names = [path.name for path in files if path.name != MANIFEST and path.suffix in (".csv", ".json", ".safetensors")]
    study = read_study(study_file)

    def case(change):
        name, content = change
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(intact, root)
        (root / folder / name).write_bytes(content)
        if folder:
            seal(root / folder)
        with refused_or_fine(None):
            damage_under(root)
            misplaced(root)
        with refused_or_fine(None):
            write_report(root)
        with refused_or_fine(None):
            states = {state for _, state in cell_states(study, root)}
            assert states == {"finished"}
            run_study(study, root, say=lambda line: None)
        if where == "cell":
            with refused_or_fine(None):
                read_sae(root / folder)
                export_saelens(root / folder, tmp_path / "exported", lossy=True)
            shutil.rmtree(tmp_path / "exported", ignore_errors=True)

    run_cases(case, changed_folder(intact / folder, names), amount)


@few
@pytest.mark.parametrize(("kind", "rule"), [("split", "topk"), ("importance", "jumprelu")])
def test_any_content_of_a_checkpoint(amount, kind, rule, activations, tmp_path):
    settings = TrainingSettings(n_steps=8, batch_tokens=64, learning_rate=5e-3, dead_after_eligible_tokens=300, aux_k=4)
    intact, folder = tmp_path / "intact", tmp_path / "checkpoints"

    def run(where, n_steps):
        mask = make_mask(mask_settings(MASKS[kind]), N_POSITIONS, D_SAE)
        sae = SparseAutoencoder(activations.d_model, rule_settings(RULES[rule]), mask)
        sae.center, sae.scale = activations.center_and_scale
        checkpoints = Checkpoints(where, {"what": "test"})
        checkpoints.due = lambda at_end: not at_end
        batches = training_batches(activations, 64, n_steps - checkpoints.done, 0, after=checkpoints.done)
        return train(sae, batches, settings, "test", lambda done: None, checkpoints)

    run(intact, 8)
    newest = sorted(intact.iterdir())[-1].name

    def case(content):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact, folder)
        (folder / newest / "state.safetensors").write_bytes(content)
        seal(folder / newest)
        with refused_or_fine(None):
            trained = run(folder, 8)
            assert all(math.isfinite(point.explained_variance) for point in trained.curve)

    run_cases(case, changed_file(intact / newest / "state.safetensors"), amount)
