"""Exported latents have SAEDashboard's keys and types, and their numbers are those of the cell."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from conftest import D_SAE, N_POSITIONS, SHOWN_WORDS, make_sae, make_vectors, write_latents
from posmask.cli.commands import app
from posmask.errors import BadSetting, DamagedFolder
from posmask.interop import neuronpedia
from posmask.interop.neuronpedia import export_neuronpedia
from posmask.sae.files import write_sae
from posmask.storage import layout
from posmask.storage.manifest import write_folder

SCALE = 2.5
ORIGIN = {"model": "gpt2", "layer": 3, "site": "residual_before"}
INTEGERS, NUMBERS, WORDS = "list[int]", "list[float]", "list[str]"
SCHEMA = {
    "batch": {"model_id": "str", "layer": "int", "sae_set": "str", "sae_id_suffix": "Optional[str]"},
    "feature": {
        "feature_index": "int",
        "neuron_alignment_indices": INTEGERS,
        "neuron_alignment_values": NUMBERS,
        "neuron_alignment_l1": NUMBERS,
        "correlated_neurons_indices": INTEGERS,
        "correlated_neurons_l1": NUMBERS,
        "correlated_neurons_pearson": NUMBERS,
        "correlated_features_indices": INTEGERS,
        "correlated_features_l1": NUMBERS,
        "correlated_features_pearson": NUMBERS,
        "neg_str": WORDS,
        "neg_values": NUMBERS,
        "pos_str": WORDS,
        "pos_values": NUMBERS,
        "frac_nonzero": "float",
        "freq_hist_data_bar_values": NUMBERS,
        "freq_hist_data_bar_heights": NUMBERS,
        "logits_hist_data_bar_heights": NUMBERS,
        "logits_hist_data_bar_values": NUMBERS,
        "n_prompts_total": "int",
        "n_tokens_in_prompt": "int",
        "dataset": "str",
        "decoder_weights_dist": NUMBERS,
        "vector": NUMBERS,
    },
    "activation": {
        "bin_min": "float",
        "bin_max": "float",
        "bin_contains": "float",
        "tokens": WORDS,
        "values": NUMBERS,
        "qualifying_token_index": "int",
    },
}
"""The types of sae-dashboard 0.8.0 beside the lists `features` and `activations`, which `tests/interop` compares."""


def is_of(value, kind):
    if kind.startswith("list"):
        return isinstance(value, list) and all(is_of(part, kind[5:-1]) for part in value)
    if kind == "Optional[str]":
        return value is None or isinstance(value, str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"str": isinstance(value, str), "int": type(value) is int, "float": is_number}[kind]


def write_cell(folder, kind="slice", origin=ORIGIN, change=lambda draft: None, made_from=None):
    """A cell of a small SAE with the data of its latents, of which the last one never fires."""
    sae = make_sae(kind)
    with torch.no_grad():
        sae.encoder_bias[-1] = -100
    sae.scale.fill_(SCALE)
    with write_folder(folder, made_from or {"what": "cell"}) as draft:
        write_sae(sae, draft, origin)
        write_latents(sae, draft)
        change(draft)
    return sae


@pytest.fixture
def cell(tmp_path):
    write_cell(tmp_path / "slice-seed0")
    return tmp_path / "slice-seed0"


def batches_of(folder):
    files = sorted(folder.glob("batch-*.json"), key=lambda path: int(path.stem.removeprefix("batch-")))
    return [json.loads(file.read_text(encoding="utf8")) for file in files]


def features_of(folder):
    return {feature["feature_index"]: feature for batch in batches_of(folder) for feature in batch["features"]}


def test_batches_have_the_keys_and_types_of_sae_dashboard(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "_LATENTS_PER_BATCH", 12)
    export_neuronpedia(cell, tmp_path / "out")
    batches = batches_of(tmp_path / "out")
    assert [len(batch["features"]) for batch in batches] == [12, 12, D_SAE - 1 - 24]
    for batch in batches:
        features = batch.pop("features")
        for feature in features:
            activations = feature.pop("activations")
            parts = [("feature", feature), *(("activation", activation) for activation in activations)]
            for name, part in [("batch", batch), *parts]:
                assert part.keys() == SCHEMA[name].keys()
                assert [key for key, kind in SCHEMA[name].items() if not is_of(part[key], kind)] == []
            assert activations
            for activation in activations:
                assert len(activation["tokens"]) == len(activation["values"]) > activation["qualifying_token_index"]
        assert batch == {"model_id": "gpt2", "layer": 2, "sae_set": "slice-seed0", "sae_id_suffix": None}


def test_numbers_are_those_of_the_cell(tmp_path):
    sae = write_cell(tmp_path / "cell")
    written = export_neuronpedia(tmp_path / "cell", tmp_path / "out", model_name="gpt2-small")
    assert (written.model_name, written.hook) == ("gpt2-small", "blocks.2.hook_resid_pre")
    assert (written.n_latents, written.n_silent) == (D_SAE - 1, 1)
    assert (written.n_contexts, written.n_positions) == (600 // (N_POSITIONS - 1), N_POSITIONS)
    vectors, _ = make_vectors(600)
    dense = sae.encode(vectors, torch.arange(600) % (N_POSITIONS - 1) + 1).detach().numpy()
    arrays, features = load_file(tmp_path / "cell" / layout.LATENTS_FILE), features_of(tmp_path / "out")
    assert features.keys() == {*range(D_SAE - 1)}
    for latent, feature in features.items():
        codes = dense[:, latent]
        assert feature["frac_nonzero"] == pytest.approx((codes > 0).mean())
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (written.n_contexts, N_POSITIONS)
        largest = float(codes.max()) * SCALE
        heights, centers = feature["freq_hist_data_bar_heights"], feature["freq_hist_data_bar_values"]
        assert sum(heights) == (codes > 0).sum()
        assert centers == pytest.approx((np.arange(20) + 0.5) / 20 * largest, rel=1e-3)
        words, logits = arrays["promoted"][latent], arrays["promoted_logit"][latent]
        assert feature["pos_str"] == [SHOWN_WORDS[word] for word in words]
        assert feature["pos_values"] == pytest.approx(logits.tolist(), rel=1e-3)
        assert feature["neg_str"] == [SHOWN_WORDS[word] for word in arrays["suppressed"][latent]]
        first = feature["activations"][0]
        assert first["values"][first["qualifying_token_index"]] == pytest.approx(largest, rel=1e-3)
        chosen = [start for start in arrays["text_start"][latent] if start >= 0]
        for number, (start, activation) in enumerate(zip(chosen, feature["activations"], strict=True)):
            these = slice(start, start + len(activation["values"]))
            assert activation["values"] == pytest.approx(codes[these] * SCALE, abs=largest / 240)
            assert activation["tokens"] == [SHOWN_WORDS[token % len(SHOWN_WORDS)] for token in range(600)[these]]
            value = activation["values"][activation["qualifying_token_index"]]
            if activation["bin_min"] == -1:
                assert number < 6
                assert activation["bin_max"] == pytest.approx(largest, rel=1e-3)
                assert activation["bin_contains"] == -1
            else:
                assert activation["bin_min"] * 0.999 <= value <= activation["bin_max"] * 1.001
                bin = int(np.argmin(np.abs(np.array(centers) - (activation["bin_min"] + activation["bin_max"]) / 2)))
                assert activation["bin_contains"] == pytest.approx(heights[bin] / sum(heights))


def test_a_dataset_on_the_hub_is_named(tmp_path):
    write_cell(tmp_path / "cell", made_from={"texts": {"own": {"hub": "owner/name"}}})
    export_neuronpedia(tmp_path / "cell", tmp_path / "out")
    assert {feature["dataset"] for feature in features_of(tmp_path / "out").values()} == {"owner/name"}


def without_latents(draft):
    (draft / layout.LATENTS_FILE).unlink()


def of_an_earlier_version(draft):
    arrays = load_file(draft / layout.LATENTS_FILE)
    del arrays["histogram"]
    save_file(arrays, draft / layout.LATENTS_FILE)


def of_another_form(draft):
    (draft / layout.LATENT_WORDS_FILE).write_text("[]")


def without_excerpts(draft):
    about = json.loads((draft / layout.LATENT_WORDS_FILE).read_text())
    (draft / layout.LATENT_WORDS_FILE).write_text(json.dumps({key: about[key] for key in about if key != "excerpts"}))


def unreadable(draft):
    (draft / layout.LATENT_WORDS_FILE).write_text("{")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_latents, "has no data of latents to export.*posmask run"),
        (of_an_earlier_version, "they lack histogram, as in earlier versions"),
        (unreadable, "has no data of latents to export"),
        (of_another_form, "has no data of latents to export"),
        (without_excerpts, "has no data of latents to export .*excerpts"),
    ],
)
def test_cells_without_readable_latents_are_refused(tmp_path, change, sentence):
    write_cell(tmp_path / "cell", change=change)
    with pytest.raises(DamagedFolder, match=sentence):
        export_neuronpedia(tmp_path / "cell", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_cells_and_full_folders_are_refused(cell, tmp_path):
    export_neuronpedia(cell, tmp_path / "out")
    with pytest.raises(BadSetting, match="out"):
        export_neuronpedia(cell, tmp_path / "out")
    (cell / layout.LATENTS_FILE).write_bytes(b"damaged")
    with pytest.raises(DamagedFolder, match=re.escape(layout.LATENTS_FILE)):
        export_neuronpedia(cell, tmp_path / "other")


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ({"layer": 3}, "does not state its model, which Neuronpedia needs: give --model-name"),
        ({"model": "gpt2"}, "does not state its layer, which Neuronpedia needs: export an SAE that a study"),
    ],
)
def test_an_unknown_model_or_layer_is_named(tmp_path, origin, sentence):
    write_cell(tmp_path / "cell", origin=origin)
    with pytest.raises(BadSetting, match=sentence):
        export_neuronpedia(tmp_path / "cell", tmp_path / "out")


def test_the_command_names_the_values_that_the_converter_needs(cell, tmp_path):
    out = tmp_path / "out"
    command = ["export", str(cell), str(out), "--to", "neuronpedia"]
    refused = CliRunner().invoke(app, [*command, "--unknown-position", "typical"])
    assert isinstance(refused.exception, BadSetting)
    assert "leave it out with --to neuronpedia" in str(refused.exception)
    result = CliRunner().invoke(app, [*command, "--model-name", "gpt2-small"])
    assert result.exit_code == 0, result.output
    assert f"Written: {out}, 31 latents; 1 never fired and are left out" in result.output
    needed = f"--saedashboard-output-dir {out} --model-name gpt2-small --layer-num 2 --hook-point hook_resid_pre "
    assert needed + "--n-prompts-total 40 --n-tokens-in-prompt 16" in result.output
