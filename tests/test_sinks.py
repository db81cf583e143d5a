"""Attention sinks are excluded from centering, scaling, training and metrics, counted and reported."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import N_POSITIONS, WORDS, batch_of, codes_of, make_sae, make_texts
from posmask import notebook
from posmask.data.activations import training_batches
from posmask.data.harvest import harvest, sinks
from posmask.data.sites import LanguageModel
from posmask.data.tokens import pack, shifted
from posmask.evaluation import suite
from posmask.evaluation.position import PositionInformation, ShiftDesign
from posmask.evaluation.reconstruction import Reconstruction
from posmask.evaluation.retention import PositionMass
from posmask.evaluation.settings import EvaluationSettings
from test_metrics import by_slice, fired

SUNK = (1, 9)
"""Positions at which the model below gives vectors of a large norm."""


@pytest.fixture
def sinking_model(causal_lm):
    def scale(module, inputs, output):
        factor = torch.ones(output.shape[1], 1)
        factor[[position for position in SUNK if position < len(factor)]] = 100.0
        return output * factor

    model = LlamaForCausalLM(causal_lm.config).eval()
    model.load_state_dict(causal_lm.state_dict())
    model.model.layers[1].register_forward_hook(scale)
    return model


@pytest.fixture
def sunk(tokenizer, sinking_model, tmp_path):
    tokens = pack(make_texts(200), tokenizer, N_POSITIONS, 3000)
    return harvest(tokens, LanguageModel(sinking_model, 2), tmp_path / "sunk", {"what": "sunk"}, "heldout")


def test_sinks_are_kept_tokens_far_above_the_median_norm():
    norms = torch.ones(80)
    norms[:8], norms[10], norms[30], norms[50] = 500.0, 30.0, 9.9, 10.1
    keep = torch.arange(80) >= 8
    assert sinks(norms, keep, 10.0).nonzero()[:, 0].tolist() == [10, 50]
    assert sinks(norms, keep, 20.0).nonzero()[:, 0].tolist() == [10]
    assert not bool(sinks(norms, keep, 0.0).any())
    assert not bool(sinks(norms, torch.zeros_like(keep), 10.0).any())


def test_a_harvest_excludes_and_reports_sinks(tokenizer, sinking_model, tmp_path, capsys):
    tokens = pack(make_texts(200), tokenizer, N_POSITIONS, 3000)
    sunk = harvest(tokens, LanguageModel(sinking_model, 2), tmp_path / "sunk", {}, "heldout")
    assert set(sunk.position[sunk.sink].tolist()) == set(SUNK)
    assert not bool((sunk.sink & sunk.keep).any())
    assert sunk.kept_positions.tolist() == [p for p in range(1, N_POSITIONS) if p not in SUNK]
    kept = sunk.batch(sunk.keep.nonzero()[:, 0]).vectors
    center, scale = sunk.center_and_scale
    torch.testing.assert_close(center, kept.mean(0))
    torch.testing.assert_close(scale, (kept - kept.mean(0)).square().mean().sqrt())
    for batch in training_batches(sunk, 64, 20, 0):
        assert not bool(torch.isin(batch.position, torch.tensor(SUNK)).any())
    manifest = json.loads((tmp_path / "sunk" / "manifest.json").read_text())
    counts = {str(position): int((sunk.position[sunk.sink] == position).sum()) for position in SUNK}
    assert manifest["sink_tokens"] == counts
    assert manifest["kept_tokens"] == sunk.n_kept
    n = sum(counts.values())
    assert (
        f"heldout: {n} of {n + sunk.n_kept:,} tokens are attention sinks and do not count, at position "
        f"{max(counts, key=counts.__getitem__)} (" in capsys.readouterr().err
    )
    every = harvest(tokens, LanguageModel(sinking_model, 2, sink_norm=0.0), tmp_path / "all", {}, "all")
    assert every.n_kept == sunk.n_kept + n
    assert not bool(every.sink.any())
    assert "attention sinks" not in capsys.readouterr().err


def test_explained_variance_is_reported_with_sinks_and_without():
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 12, generator=random) + 1
    position = torch.arange(400) % 4 + 1
    is_sink = position == 1
    vectors[is_sink] *= 50
    reconstruction = vectors + torch.where(is_sink, 20.0, 0.3)[:, None] * torch.randn(400, 12, generator=random)
    batch, codes = batch_of(vectors, position, torch.arange(400) // 10), codes_of(torch.ones(400, 3))
    metric = Reconstruction(5, 40, vectors[~is_sink].mean(0))
    metric.update(batch.select(~is_sink), codes.select(~is_sink), reconstruction[~is_sink])
    metric.update_sinks(batch.select(is_sink), reconstruction[is_sink])
    measures = metric.measures()

    def explained(of):
        error = (vectors - reconstruction)[of].double().square().sum()
        return float(1 - error / (vectors[of] - vectors[of].mean(0)).double().square().sum())

    assert by_slice(measures, "explained_variance")[()].value == pytest.approx(explained(~is_sink), rel=1e-5)
    with_sinks = by_slice(measures, "explained_variance_with_sinks")[()]
    assert with_sinks.value == pytest.approx(explained(torch.ones(400, dtype=torch.bool)), rel=1e-5)
    assert with_sinks.n == 400
    by_position = by_slice(measures, "explained_variance")
    assert by_position[(("position", 1),)].n == 0
    assert by_position[(("position", 1),)].value != by_position[(("position", 1),)].value  # NaN
    assert by_position[(("position", 2),)].value == pytest.approx(explained(position == 2), rel=1e-5)
    counts = by_slice(measures, "sink_tokens")
    assert {where: int(count.value) for where, count in counts.items()} == {(): 100, (("position", 1),): 100}


def test_without_sinks_both_explained_variances_are_equal(activations):
    sae = notebook.make_sae(activations, 32, mask={"kind": "open"}, rule={"kind": "topk", "k": 4}, n_positions=16)
    notebook.fit(sae, activations, n_steps=20, batch_tokens=256)
    measures = {measure.metric: measure.value for measure in notebook.measure(sae, activations) if not measure.slice}
    assert measures["sink_tokens"] == 0
    assert measures["explained_variance_with_sinks"] == pytest.approx(measures["explained_variance"], rel=1e-6)


def test_sinks_count_in_the_row_with_sinks_alone(sunk):
    sae = notebook.make_sae(sunk, 32, mask={"kind": "open"}, rule={"kind": "topk", "k": 4}, n_positions=16)
    notebook.fit(sae, sunk, n_steps=20, batch_tokens=256)
    measures = {measure.metric: measure for measure in notebook.measure(sae, sunk) if not measure.slice}
    assert measures["explained_variance"].n == sunk.n_kept
    assert measures["sink_tokens"].value == int(sunk.sink.sum())
    assert measures["explained_variance_with_sinks"].value != pytest.approx(measures["explained_variance"].value)


def test_rotations_leave_out_positions_without_kept_tokens():
    rate = torch.full((N_POSITIONS, 200), 0.2)
    batch, codes = fired(rate)
    kept = ~torch.isin(batch.position, torch.tensor(SUNK))
    batch, codes = batch.select(kept), codes.select(kept)
    metric = PositionInformation(*rate.shape, 200, batch.position.unique().long())
    used = PositionMass(*rate.shape)
    metric.update(batch, codes)
    used.update(batch, codes)
    assert torch.equal(metric._null_tokens[0], used.tokens.sum(0))
    values = {measure.metric: measure.value for measure in metric.measures(used)}
    assert abs(values["position_information"]) < 0.0005


def test_content_that_sinks_in_one_window_is_left_out_of_all(tokenizer, sinking_model, tmp_path):
    n_windows, length = 2, 5  # positions 6 to 10 and 11 to 15; position 9 sinks
    tokens = shifted(make_texts(300), tokenizer, N_POSITIONS, 40, n_windows)
    shift = harvest(tokens, LanguageModel(sinking_model, 2), tmp_path / "shift", {}, "shift")
    assert set(shift.position[shift.sink].tolist()) == {9}
    settings = EvaluationSettings.model_construct(shift_texts=40, shift_windows=n_windows)
    data = suite.EvaluationData(lambda: shift, shift, shift, {}, {}, tokenizer, N_POSITIONS, settings, lambda: None)
    sae = make_sae("open", d_sae=len(WORDS))
    stored = suite._StoredCodes(sae)
    suite._shift(sae, data, {"on": stored}, lambda n: None)
    batch = stored.shift.batch
    assert ((batch.position - 1) % length).bincount().tolist() == [80, 80, 80, 0, 80]
    design = ShiftDesign(40, length, n_windows, len(WORDS))
    design.update(batch, next(codes for _, codes in stored.shift.blocks()))
    assert sum(measure.value for measure in design.measures("on")) == pytest.approx(1.0)
