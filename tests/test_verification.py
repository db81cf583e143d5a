"""Files are compared with their manifests before they are used, and `posmask verify` finds what is lost."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import make_sae
from posmask.cli.commands import app
from posmask.data.activations import evaluation_batches, training_batches
from posmask.data.harvest import harvest
from posmask.data.tokens import pack
from posmask.errors import DamagedFolder
from posmask.interop import hub
from posmask.interop.saelens_files import export_saelens
from posmask.report import write_report
from posmask.sae.files import write_sae
from posmask.storage.manifest import read_manifest, sealed_manifest, write_folder
from posmask.storage.remote import Store
from posmask.study.run import evaluate_folder
from posmask.study.study_file import read_study


@pytest.fixture
def root(finish, tmp_path):
    finish(tmp_path / "run")
    return tmp_path / "run"


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def verify(root):
    CliRunner().invoke(app, ["verify", str(root)], catch_exceptions=False)


def uses(cell, out, study_file):
    """Every way to pass a cell on, as functions."""
    return {
        "export": lambda: export_saelens(cell, out),
        "push": lambda: hub.push(cell, "user/name"),
        "evaluate": lambda: evaluate_folder(read_study(study_file), cell.parent.parent, cell, lambda line: None),
    }


@pytest.mark.parametrize("use", ["export", "push", "evaluate"])
@pytest.mark.parametrize("name", ["sae.safetensors", "rows.csv", "sae.json", "manifest.json"])
def test_a_damaged_cell_is_neither_exported_nor_pushed_nor_evaluated(root, study_file, tmp_path, use, name):
    cell = root / "cells" / "open-seed0"
    flip_bit(cell / name)
    with pytest.raises(DamagedFolder, match=name.replace(".", r"\.")):
        uses(cell, tmp_path / "out", study_file)[use]()
    assert not (tmp_path / "out").exists()
    assert not (root / "evaluated" / "open-seed0").exists()


@pytest.mark.parametrize("use", ["export", "push", "evaluate"])
def test_a_cell_without_a_manifest_is_not_passed_on(root, study_file, tmp_path, use):
    cell = root / "cells" / "open-seed0"
    (cell / "manifest.json").unlink()
    with pytest.raises(DamagedFolder, match=r"open-seed0 has no manifest\.json"):
        uses(cell, tmp_path / "out", study_file)[use]()


def test_cached_shards_are_compared_again_in_each_process(tokenizer, language_model, tmp_path):
    from conftest import N_POSITIONS, make_texts

    tokens = pack(make_texts(60), tokenizer, N_POSITIONS, 500)
    url = f"memory://{tmp_path.name}"
    first = harvest(tokens, language_model, Store(url, tmp_path / "cache", 10**9).folder("v"), {"a": 1}, "test")
    expected = next(evaluation_batches(first)).vectors.clone()
    (shard,) = (tmp_path / "cache" / "v").glob("shard-00000.safetensors")
    flip_bit(shard)
    # The same name and size, in a process that starts later.
    second = harvest(tokens, None, Store(url, tmp_path / "cache", 10**9).folder("v"), {"a": 1}, "test")
    assert torch.equal(next(evaluation_batches(second)).vectors, expected)


FLAWS = {
    "NaN in the encoder": ("encoder", float("nan"), "encoder holds NaN or infinite numbers"),
    "infinity in the decoder": ("decoder", float("inf"), "decoder holds NaN or infinite numbers"),
    "NaN in the openness": ("mask.fixed_openness", float("nan"), "openness holds NaN or infinite numbers"),
    "openness 2": ("mask.fixed_openness", 2.0, "openness is not within 0 and 1"),
    "openness -1": ("mask.fixed_openness", -1.0, "openness is not within 0 and 1"),
    "a negative scale": ("scale", -1.0, "scale = -1 is not above 0"),
    "a scale of zero": ("scale", 0.0, "scale = 0 is not above 0"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_an_sae_with_impossible_numbers_is_not_evaluated(study_file, tmp_path, flaw):
    name, value, message = FLAWS[flaw]
    write_sae(make_sae("slice", rule="topk"), tmp_path / "sae")
    file = tmp_path / "sae" / "sae.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[name].flatten()[0] = value
    save_file(tensors, file)
    with pytest.raises(DamagedFolder, match=message):
        evaluate_folder(read_study(study_file), tmp_path / "run", tmp_path / "sae", lambda line: None)
    with pytest.raises(DamagedFolder, match=message):
        export_saelens(tmp_path / "sae", tmp_path / "out")


def test_verify_finds_a_damaged_cell_behind_a_link(root, tmp_path):
    cell = root / "cells" / "open-seed0"
    cell.rename(tmp_path / "elsewhere")
    cell.symlink_to(tmp_path / "elsewhere")
    verify(root)
    flip_bit(tmp_path / "elsewhere" / "sae.safetensors")
    with pytest.raises(DamagedFolder, match=r"sae\.safetensors is not what was written"):
        verify(root)


def test_verify_ends_with_links_that_form_a_cycle(root):
    (root / "cells" / "around").symlink_to(root)
    with pytest.raises(DamagedFolder, match=r"1 problems[^:]*around has no manifest\.json"):
        verify(root)


@pytest.mark.parametrize("name", ["baselines", "cells/slice-compute-seed0", "activations/SHIFT", "evaluated/sae"])
def test_verify_finds_each_kind_of_folder_that_lost_its_manifest(root, name):
    with write_folder(root / "evaluated" / "sae", {"sae": 1}) as draft:
        (draft / "rows.csv").write_text("value")
    verify(root)
    if name == "activations/SHIFT":
        (folder,) = (root / "activations").glob("shift-*")
    else:
        folder = root / name
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedFolder, match=rf"{folder.name} has no manifest\.json") as error:
        verify(root)
    assert str(error.value).startswith("1 problems")


@pytest.mark.parametrize("edit", ["other seed", "other file", "no seal", "other identity"])
def test_an_edited_manifest_is_found_with_and_without_its_seal(root, edit):
    path = root / "cells" / "open-seed0" / "manifest.json"
    manifest = json.loads(path.read_text())
    if edit == "other seed":
        manifest["made_from"]["seed"] = 7
    elif edit == "other file":
        del manifest["files"]["rows.csv"]
    elif edit == "other identity":
        manifest["identity"] = "0" * 16
    del manifest["sha256"]
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(DamagedFolder, match=r"manifest\.json cannot be read"):
        read_manifest(path.parent)
    with pytest.raises(DamagedFolder, match=r"manifest\.json cannot be read"):
        verify(root)


def test_a_harvest_is_compared_before_each_use(root, study_file):
    from posmask.study.harvests import prepare
    from posmask.study.source import Source

    study = read_study(study_file)
    (folder,) = (root / "activations").glob("training-*")
    shard = folder / "shard-00000.safetensors"
    expected = shard.read_bytes()
    flip_bit(shard)
    data = prepare(study, Source(study.model), root)
    assert shard.read_bytes() == expected
    assert next(training_batches(data.training, 64, 1, 0)).vectors.isfinite().all()


def test_any_flipped_bit_of_any_file_of_a_run_is_found(root):
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        if file.parent == root or ".locks" in file.parts:
            continue
        kept = file.read_bytes()
        if not kept:
            continue
        flip_bit(file)
        with pytest.raises(DamagedFolder):
            verify(root)
        file.write_bytes(kept)
    verify(root)


@pytest.mark.parametrize("folder", ["cells/open-seed0", "baselines", "activations"])
def test_verify_names_files_that_posmask_did_not_write(root, folder):
    folder = root / folder
    if folder.name == "activations":
        folder = next(path for path in folder.iterdir() if (path / "manifest.json").is_file())
    (folder / ".DS_Store").write_bytes(b"of the system")
    verify(root)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DamagedFolder, match=rf"{folder.name} holds notes\.txt, which posmask did not write or use"):
        verify(root)


def test_the_page_shows_no_file_that_a_cell_was_not_finished_with(root):
    cell = root / "cells" / "slice-compute-seed0"
    manifest = json.loads((cell / "manifest.json").read_text())
    facts = {key: manifest[key] for key in manifest.keys() - {"identity", "made_from", "files", "sha256"}}
    files = {name: entry for name, entry in manifest["files"].items() if not name.startswith("latents.")}
    (cell / "manifest.json").write_text(sealed_manifest(manifest["made_from"], facts, files))
    page = write_report(root).read_text(encoding="utf8")
    assert "1 cells have no data for the latent browser (slice-compute)" in page
