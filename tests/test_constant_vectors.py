"""Vectors that are all equal, exactly or up to rounding, are refused: every number on them would be noise."""

import copy

import pytest
import torch

from conftest import N_POSITIONS, make_texts
from posmask.data.harvest import harvest
from posmask.data.sites import LanguageModel
from posmask.data.tokens import pack
from posmask.errors import DegenerateResult
from posmask.notebook import make_sae, measure
from posmask.results.rows import missing, read_rows
from posmask.storage.manifest import read_manifest
from posmask.study.run import run_study
from posmask.study.saebench_file import write_saebench
from posmask.study.study_file import read_study

MESSAGE = "all vectors are equal"


def constant_model(causal_lm, *, noise=0.0):
    """Return the model with one embedding for all tokens, up to noise relative to its entries."""
    model = copy.deepcopy(causal_lm)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight.copy_(weight[:1].clone().expand_as(weight))
        weight.mul_(1 + noise * torch.randn(weight.shape, generator=random))
    return model


def vectors_of(model, tokenizer, tmp_path, *, dtype=torch.float32, storage_dtype="model"):
    tokens = pack(make_texts(60), tokenizer, N_POSITIONS, 500)
    language_model = LanguageModel(model.to(dtype).eval(), layer=2)
    return harvest(tokens, language_model, tmp_path / "v", {"a": 1}, "test", storage_dtype)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 5e-7])
def test_vectors_that_are_equal_up_to_rounding_are_refused(causal_lm, tokenizer, tmp_path, noise):
    activations = vectors_of(constant_model(causal_lm, noise=noise), tokenizer, tmp_path)
    with pytest.raises(DegenerateResult, match=MESSAGE):
        _ = activations.center_and_scale
    with pytest.raises(DegenerateResult, match=MESSAGE):
        make_sae(activations, 32, mask={"kind": "open"}, rule={"kind": "topk", "k": 4}, n_positions=N_POSITIONS)


@pytest.mark.parametrize(
    ("dtype", "storage_dtype"),
    [(torch.bfloat16, "model"), (torch.float32, "bfloat16"), (torch.float32, "int8")],
)
def test_coarse_rounding_of_constant_vectors_is_no_variance(causal_lm, tokenizer, tmp_path, dtype, storage_dtype):
    model = constant_model(causal_lm, noise=1e-3)
    activations = vectors_of(model, tokenizer, tmp_path, dtype=dtype, storage_dtype=storage_dtype)
    with pytest.raises(DegenerateResult, match=MESSAGE):
        _ = activations.center_and_scale


@pytest.mark.parametrize(
    ("dtype", "storage_dtype", "noise"),
    [
        (torch.float32, "model", 1e-4),
        (torch.bfloat16, "model", 0.05),
        (torch.float32, "int8", 0.05),
    ],
)
def test_small_but_real_differences_are_kept(causal_lm, tokenizer, tmp_path, dtype, storage_dtype, noise):
    model = constant_model(causal_lm, noise=noise)
    activations = vectors_of(model, tokenizer, tmp_path, dtype=dtype, storage_dtype=storage_dtype)
    assert activations.center_and_scale[1] > 0


def test_measuring_on_constant_vectors_is_refused(activations, causal_lm, tokenizer, tmp_path):
    sae = make_sae(activations, 32, mask={"kind": "open"}, rule={"kind": "topk", "k": 4}, n_positions=N_POSITIONS)
    with pytest.raises(DegenerateResult, match=MESSAGE):
        measure(sae, vectors_of(constant_model(causal_lm), tokenizer, tmp_path))


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_study_of_a_constant_model_ends_with_a_sentence(study_file, causal_lm, tokenizer, tmp_path, noise):
    constant_model(causal_lm, noise=noise).save_pretrained(tmp_path / "constant")
    tokenizer.save_pretrained(tmp_path / "constant")
    settings = read_study(study_file, [f"model.name={tmp_path / 'constant'}"])
    with pytest.raises(DegenerateResult, match=MESSAGE):
        run_study(settings, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run" / "results.csv").exists()


def test_probes_that_cannot_be_computed_leave_out_the_file_of_saebench(study_file, finish, tmp_path, capsys):
    finish(tmp_path / "run")
    baseline = read_rows(tmp_path / "run" / "baselines" / "rows.csv")
    made_from = read_manifest(tmp_path / "run" / "cells" / "open-seed0")["made_from"]
    lacking = missing("all vectors are equal", ["probe_accuracy"], [{"dataset": "toy", "k": k} for k in (1, 5)])
    file = tmp_path / "saebench.json"
    write_saebench(file, read_study(study_file), "open-seed0", made_from, lacking, baseline)
    assert not file.exists()
    assert "open-seed0 has no saebench.json, because accuracies on toy could not be computed" in capsys.readouterr().err
