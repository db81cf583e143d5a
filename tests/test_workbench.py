"""The Python interface: training in a dozen lines, lazy imports, and protection of user files."""

import json
import subprocess
import sys

import pytest
import torch

import posmask
from conftest import make_texts
from posmask.data import models
from posmask.errors import BadSetting, NothingToDo
from posmask.storage.manifest import write_folder


def test_imports_are_lazy_and_every_name_exists():
    code = "import sys, posmask; assert 'torch' not in sys.modules; posmask.summarize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(posmask.__all__) <= set(dir(posmask))
    assert all(callable(getattr(posmask, name)) for name in posmask.__all__)
    with pytest.raises(AttributeError, match="No posmask attribute nothing"):
        posmask.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("text", "reason"), [("a \ud800", "with lone surrogates"), (None, "with null"), (["a"], "of type list")]
)
def test_a_text_that_no_tokenizer_takes_raises_an_error(text, reason, model_folder, tmp_path):
    with pytest.raises(BadSetting, match=rf"texts\[1\] is a value {reason}, which no tokenizer takes"):
        posmask.read_vectors(["red", text], str(model_folder), 2, tmp_path / "vectors", n_tokens=1)


def test_vectors_training_and_measures_from_python(model_folder, tmp_path):
    options = {"model": str(model_folder), "layer": 2, "n_positions": 16, "precision": "float32"}
    training = posmask.read_vectors(make_texts(200), folder=tmp_path / "training", n_tokens=3000, **options)
    heldout = posmask.read_vectors(make_texts(80, seed=1), folder=tmp_path / "heldout", n_tokens=1000, **options)
    sae = posmask.make_sae(
        training,
        16,
        mask={"kind": "slice", "n_slices": 4},
        rule={"kind": "topk", "k": 4},
        budget="compute",
        n_positions=16,
    )
    assert sae.d_sae == 64
    trained = posmask.fit(sae, training, n_steps=60, batch_tokens=256)
    values = {
        measure.metric: measure.value
        for measure in posmask.measure(trained.sae, heldout, retention_positions=4)
        if not measure.slice
    }
    assert 0.2 < values["explained_variance"] < 1
    assert values["l0"] <= 4
    assert values["mean_openness"] == pytest.approx(0.25)
    assert {"retention", "retention_chance", "strictness"} <= set(values)
    posmask.write_sae(sae, tmp_path / "sae")
    read = posmask.read_sae(tmp_path / "sae")
    batch = heldout.batch(torch.arange(20))
    assert torch.equal(read.encode(batch.vectors, batch.position), sae.encode(batch.vectors, batch.position))


def test_vectors_are_reused_only_for_the_same_texts(model_folder, tmp_path, monkeypatch):
    options = {"model": str(model_folder), "layer": 2, "n_positions": 16, "n_tokens": 500, "folder": tmp_path / "v"}
    first = posmask.read_vectors(make_texts(40), **options)
    written = (tmp_path / "v" / "manifest.json").stat().st_mtime_ns
    posmask.read_vectors(make_texts(40), **options)
    assert (tmp_path / "v" / "manifest.json").stat().st_mtime_ns == written
    other = posmask.read_vectors(make_texts(40, seed=5), **options)
    assert not torch.equal(other.token_id[:300], first.token_id[:300])
    with pytest.raises(NothingToDo, match="lower the number of tokens, or give more"):
        posmask.read_vectors(make_texts(4), **{**options, "folder": tmp_path / "few", "n_tokens": 5000})


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_study_beside_others(folder):
    with write_folder(folder / "study" / "cells" / "open-seed0", {"cell": "open"}) as draft:
        (draft / "rows.csv").write_text("value")


def a_site(folder):
    (folder / "index.html").write_text("<html>")
    (folder / "manifest.json").write_text(json.dumps({"name": "my site", "icons": []}))


def a_cell(folder):
    with write_folder(folder, {"cell": "open", "seed": 0}) as draft:
        (draft / "rows.csv").write_text("value")


@pytest.mark.parametrize("fill", [a_study_beside_others, a_site, a_cell])
def test_vectors_replace_only_vectors(model_folder, tmp_path, monkeypatch, fill):
    folder = tmp_path / "runs"
    folder.mkdir()
    fill(folder)
    before = snapshot(folder)
    monkeypatch.setattr(models, "load_model", lambda *given, **options: pytest.fail("the model was loaded"))
    with pytest.raises(BadSetting, match=r"runs holds .*: choose another path, or move it away"):
        posmask.read_vectors(
            make_texts(40), str(model_folder), 2, folder, n_positions=16, n_tokens=500, precision="float32"
        )
    assert snapshot(tmp_path) == {f"runs/{name}": content for name, content in before.items()}


def test_files_added_to_vectors_are_kept(model_folder, tmp_path):
    options = {"model": str(model_folder), "layer": 2, "n_positions": 16, "n_tokens": 500, "folder": tmp_path / "v"}
    posmask.read_vectors(make_texts(40), **options)
    (tmp_path / "v" / "notes.txt").write_text("what I saw")
    posmask.read_vectors(make_texts(40), **options)  # reads the vectors and replaces nothing
    with pytest.raises(BadSetting, match=r"v holds notes.txt, which posmask did not write"):
        posmask.read_vectors(make_texts(40, seed=5), **options)
    shard = tmp_path / "v" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BadSetting, match=r"v holds notes.txt, which posmask did not write"):
        posmask.read_vectors(make_texts(40), **options)
    assert (tmp_path / "v" / "notes.txt").read_text() == "what I saw"
    (tmp_path / "v" / "notes.txt").unlink()
    (tmp_path / "empty").mkdir()
    for folder in ("v", "empty"):
        assert posmask.read_vectors(make_texts(40, seed=5), **{**options, "folder": tmp_path / folder}).n_kept >= 500
