"""What a plan counts, what it leaves out because it is finished, and what it says of bad input."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from posmask.cli.commands import app
from posmask.data import models
from posmask.errors import BadSetting
from posmask.progress import progress_bar
from posmask.storage import manifest
from posmask.study import harvests, planning, rates
from posmask.study.cell import places_of
from posmask.study.rates import Linear, Rates, Shape
from posmask.study.settings import read_study

STUDY = """
name = "tiny"
seeds = [0, 1]
[model]
name = "MODEL"
layer = 2
precision = "float32"
[corpus]
n_positions = 16
training_tokens = 1500
heldout_tokens = 1500
tables = ["words"]
[sae]
d_sae = 32
rule = { kind = "topk", k = 4 }
[training]
n_steps = 20
batch_tokens = 256
learning_rate = 5e-3
[evaluation]
retention_positions = 4
shift_texts = 40
shift_windows = 4
model_contexts = 8
order_tasks = ["chronology", "topic_permutation"]
order_train_groups = 30
order_test_groups = 10
order_segments = 4
probe_datasets = ["ag_news"]
probe_train = 40
probe_test = 10
ks = [1, 5, 20]
[[cells]]
name = "open"
mask = { kind = "open" }
[[cells]]
name = "slice"
mask = { kind = "slice", n_slices = 4 }
budget = "compute"
decay = true
[[cells]]
name = "half"
mask = { kind = "open" }
steps_share = 0.5
"""


class Every(dict):
    """The same rate for whatever is asked."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def __missing__(self, key):
        return self.rate


def costing(**changes):
    """A second for a step and nothing for anything else, but for what is changed."""
    free = Linear(0.0, 0.0)
    given = Rates(0.0, 0.0, Every(Linear(0.0, 1.0)), Every(0.0), frozenset(), *[free] * 6)
    return replace(given, **changes)


@pytest.fixture
def study_file(tmp_path, model_folder):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY.replace("MODEL", str(model_folder)))
    return path


@pytest.fixture
def settings(study_file):
    return read_study(study_file)


def places(settings, root):
    return places_of(settings, harvests.Source(settings.model), root)


def finish(place):
    with manifest.write_folder(place.folder, place.made_from):
        pass


def tokens_of(plan, stage):
    return {line.what: line.tokens for line in plan.lines if line.stage == stage}


def seconds_of(plan, stage):
    return {line.what: line.seconds for line in plan.lines if line.stage == stage}


def test_tokens_follow_from_the_settings(settings, tmp_path):
    plan = planning.plan(settings, tmp_path, costing())
    # Of three orders of 15 tokens: 2 x (30 + 10) texts and 20 shuffled ones, 6 x (30 + 10) and 60.
    order, probes = (100 + 300) * 15, 3 * 25 * 15
    assert tokens_of(plan, "harvest") == {
        "training texts": 1500, "held-out texts": 1500, "shift design": 40 * 4 * 3, "order tasks": order,
        "probe datasets": probes,
    }  # fmt: skip
    assert tokens_of(plan, "baselines") == {"the model itself": order + probes}
    steps = 20 * 256
    assert tokens_of(plan, "training") == {"open": 2 * steps, "slice": 4 * steps, "half": steps}
    asked = 1500 + 480 + order + probes + 3 * 8 * 16
    lifted = 1500 + 480 + 1500 * 6  # once lifted, and after 0, 1, 2, 5, 10 and 20 steps without the mask
    assert tokens_of(plan, "evaluation") == {"open": 2 * asked, "slice": 2 * (asked + lifted), "half": 2 * asked}
    assert (plan.n_folders, plan.n_finished) == (7, 0)


def test_seconds_are_counts_times_rates(settings, tmp_path):
    shape = Shape(settings.cells[1].mask, 128)
    encode = Every(0.001) | {shape: 0.002}
    given = costing(below=0.01, above=0.1, encode={**encode, shape.opened: 0.004}, closing=frozenset([shape]))
    given = replace(given, encode=Every(0.001), count=Linear(0.0, 1e-4), conclude=Linear(1.0, 0.0))
    plan = planning.plan(settings, tmp_path, given)
    assert seconds_of(plan, "harvest")["shift design"] == pytest.approx(0.01 * 40 * (7 + 10 + 13 + 16))
    assert seconds_of(plan, "training") == {"open": 40.0, "slice": 80.0, "half": 20.0}
    asked = tokens_of(plan, "evaluation")
    for cell, width in (("open", 32), ("slice", 128)):
        in_model, heldout = 3 * 8 * 16 * 0.1, 1500 * width * 1e-4
        expected = asked[cell] * 0.001 + 2 * (in_model + heldout + 1)
        assert seconds_of(plan, "evaluation")[cell] == pytest.approx(expected)
    assert plan.seconds() == pytest.approx(sum(line.seconds for line in plan.lines))


def test_pooling_and_probes_count_every_way_in_which_a_cell_pools(settings, tmp_path):
    shape = Shape(settings.cells[1].mask, 128)
    closing = frozenset([shape])
    plan = planning.plan(settings, tmp_path, costing(closing=closing, order_probes=Linear(1.0, 0.0)))
    # chronology asks one question, topic_permutation six; open pools by mean and in two kinds of segments.
    assert seconds_of(plan, "evaluation") == {"open": 2 * 3 * 7, "slice": 2 * 2 * 7, "half": 2 * 3 * 7}
    assert seconds_of(plan, "baselines") == {"the model itself": 2 * 7}
    plan = planning.plan(settings, tmp_path, costing(closing=closing, topic_probes=Linear(1.0, 0.0)))
    assert seconds_of(plan, "evaluation") == {"open": 2 * 3, "slice": 2 * 2 * 3, "half": 2 * 3}
    plan = planning.plan(settings, tmp_path, costing(full_probe=Linear(0.0, 1.0)))
    assert seconds_of(plan, "evaluation") == {"open": 2 * 3 * 32, "slice": 2 * 3 * 128, "half": 2 * 3 * 32}
    plan = planning.plan(settings, tmp_path, costing(pool=Linear(0.0, 1.0)))
    order, probes = 400, 75
    assert seconds_of(plan, "evaluation")["open"] == 2 * 32 * (probes + order * (1 + 4 + 4))


def test_twice_the_steps_cost_twice_the_training_but_for_what_happens_once(settings, tmp_path):
    longer = settings.model_copy(update={"training": settings.training.model_copy(update={"n_steps": 40})})
    given = costing(training=Every(Linear(3.0, 0.5)))
    once, twice = (seconds_of(planning.plan(some, tmp_path, given), "training") for some in (settings, longer))
    assert once["open"] == 2 * (3 + 20 * 0.5)
    assert twice["open"] - 2 * 3 == pytest.approx(2 * (once["open"] - 2 * 3))


def test_finished_folders_cost_nothing(settings, tmp_path):
    everything = planning.plan(settings, tmp_path, costing(below=1.0, above=1.0))
    own = places(settings, tmp_path)
    finish(own[0])
    finish(own[1])  # open, seed 0
    plan = planning.plan(settings, tmp_path, costing(below=1.0, above=1.0))
    assert plan.n_finished == 2
    assert seconds_of(plan, "baselines") == {"the model itself": 0.0}
    for stage in ("training", "evaluation"):
        before, after = seconds_of(everything, stage), seconds_of(plan, stage)
        assert after == {"open": before["open"] / 2, "slice": before["slice"], "half": before["half"]}
    assert plan.disk_bytes < everything.disk_bytes
    for place in own[2:]:
        finish(place)
    plan = planning.plan(settings, tmp_path)  # nothing to be measured
    assert {(line.tokens, line.seconds) for line in plan.lines} == {(0, 0.0)}
    assert (plan.n_finished, plan.disk_bytes, plan.memory_bytes) == (7, 0, 0)


def test_harvested_vectors_cost_nothing_and_are_counted_as_they_are(settings, tmp_path):
    shared = {"model": harvests.Source(settings.model).made_from, "n_positions": 16}
    drawn = {"tables": ["words"], "max_characters": 1000}

    def write(label, kept, **made_from):
        with manifest.write_folder(tmp_path / "activations" / f"{label}-0", {**shared, **made_from}, kept_tokens=kept):
            pass

    write("training", 1501, split="training", tokens=1500, **drawn)
    write("evaluation", 1502, split="evaluation", tokens=1500, **drawn)
    write("chronology", 777, shuffled_too=True, texts_of=["text"] * 80)
    write("ag_news", 555, texts_of=["text"] * 60)  # made for other settings
    plan = planning.plan(settings, tmp_path, costing(below=1.0))
    harvest = tokens_of(plan, "harvest")
    assert (harvest["training texts"], harvest["held-out texts"]) == (0, 0)
    assert (harvest["order tasks"], harvest["probe datasets"]) == (300 * 15, 75 * 15)
    assert tokens_of(plan, "baselines") == {"the model itself": 777 + 300 * 15 + 75 * 15}
    other = settings.model_copy(update={"corpus": settings.corpus.model_copy(update={"heldout_tokens": 1400})})
    assert tokens_of(planning.plan(other, tmp_path, costing()), "harvest")["held-out texts"] == 1400


def test_vectors_take_the_room_that_a_plan_says(settings, tmp_path, activations):
    outline = models.load_outline(settings.model.name, 2)
    sets = planning._sets(settings, tmp_path, any_finished=False)
    each = planning._Costs(settings, outline, sets, costing()).bytes_a_token(sets[0])
    files = manifest.read_manifest(activations.folder)["files"]
    assert each * activations.n_tokens == pytest.approx(sum(file["bytes"] for file in files.values()), rel=0.02)


def test_an_outline_has_the_sizes_of_the_model(model_folder, causal_lm):
    outline = models.load_outline(str(model_folder), 2)
    below, above = outline.n_parameters()
    layer = sum(parameter.numel() for parameter in causal_lm.model.layers[0].parameters())
    every = sum(parameter.numel() for parameter in causal_lm.parameters())
    assert below == 2 * layer
    assert below + above == every - causal_lm.get_input_embeddings().weight.numel()
    assert (outline.d_model, outline.n_vocabulary) == (causal_lm.config.hidden_size, causal_lm.config.vocab_size)


@pytest.mark.embedded
def test_the_embedded_model_has_the_sizes_that_are_said_of_it():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models.embedded_model_folder())
    assert {name: getattr(config, name) for name in models._EMBEDDED_SHAPE} == models._EMBEDDED_SHAPE


def test_every_rate_is_measured_and_nothing_is_written(settings, tmp_path):
    root = tmp_path / "none"
    plan = planning.plan(settings.model_copy(update={"seeds": (0,)}), root)
    assert not root.exists()
    assert all(line.seconds > 0 and math.isfinite(line.seconds) for line in plan.lines)
    assert not any("weights" in line for line in plan.assumptions)


def test_each_mask_and_width_is_measured_once_and_told_whether_it_closes(settings):
    found = rates.measure(settings, settings.cells, models.load_outline(settings.model.name, 2), 10)
    unmasked, sliced = (Shape(cell.mask, width) for cell, width in zip(settings.cells, (32, 128), strict=False))
    assert set(found.training) == set(found.encode) == {unmasked, sliced, sliced.opened}
    assert found.closing == {sliced}


@pytest.mark.parametrize("rule", ['kind = "relu", l1_coefficient = 0.1', 'kind = "batchtopk", k = 4'])
def test_shapes_of_every_rule_can_be_measured(study_file, tmp_path, rule, monkeypatch):
    monkeypatch.setattr(rates, "_ACTIVE", 8)
    study_file.write_text(study_file.read_text().replace('kind = "topk", k = 4', rule))
    settings = read_study(study_file)
    outline = models.load_outline(settings.model.name, 2)
    vectors = rates._noise(settings, outline, tmp_path / "noise")
    sae, training = rates._training_seconds(settings, Shape(settings.cells[0].mask, 32), vectors, 0.1)
    assert training.each > 0
    rates._encoding_seconds(sae, vectors)
    batch = vectors.batch(torch.arange(1, 16))
    assert 1 < sae.sparse_encode(batch.vectors, batch.position).n_active().mean() < 12


def test_without_weights_the_models_time_comes_from_its_sizes(settings, tmp_path, model_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model_folder / "config.json", bare)
    asked = settings.model_copy(update={"model": settings.model.model_copy(update={"name": str(bare)})})
    outline = models.load_outline(str(bare), 2)
    below, above, said = rates._model_seconds(asked, outline, tmp_path / "model")
    assert below / above == pytest.approx(outline.n_parameters()[0] / outline.n_parameters()[1])
    assert "weights are not here" in said[0]


def test_a_line_through_two_points_never_falls_and_never_starts_below_zero():
    assert Linear.through((2, 5.0), (4, 9.0)) == Linear(1.0, 2.0)
    assert Linear.through((2, 9.0), (4, 5.0)) == Linear(5.0, 0.0)
    assert Linear.through((2, 1.0), (4, 9.0)) == Linear(0.0, 2.25)
    assert Linear.through((2, 3.0), (2, 3.0)) == Linear(3.0, 0.0)


def test_a_bar_within_a_bar_shows_nothing(capsys, monkeypatch):
    monkeypatch.setattr("posmask.progress._QUIET_SECONDS", 0.0)
    with progress_bar("outer", 2, "parts") as advance:
        with progress_bar("inner", 5, "tokens") as inner:
            inner(5)
        advance(2)
    said = capsys.readouterr().err
    assert "outer: 2 parts" in said
    assert "inner" not in said


@pytest.mark.parametrize(
    ("given", "instead", "message"),
    [
        (
            'name = "MODEL"',
            'name = "no/such-model"',
            "model 'no/such-model' has no config.json of a causal language model",
        ),
        ("layer = 2", "layer = 9", "layer = 9 does not exist"),
        ("n_positions = 16", "n_positions = 100", "more than the 64 positions of the model"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(tmp_path, model_folder, given, instead, message):
    path = tmp_path / "bad.toml"
    path.write_text(STUDY.replace(given, instead).replace("MODEL", str(model_folder)))
    with pytest.raises(BadSetting, match=message):
        planning.plan(read_study(path), tmp_path, costing())


def test_the_command_prints_a_plan_that_fits_80_columns(study_file, tmp_path, monkeypatch):
    given = costing(below=0.01, assumptions=("Nothing was measured.",))
    monkeypatch.setattr(planning, "measure", lambda *args: given)
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", str(study_file), "--root", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for text in ("training texts", "1,500", "slice", "In all", "0 of 7 folders", "GB", "- Nothing was measured."):
        assert text in result.output
    for place in places(read_study(study_file), tmp_path / "run"):
        finish(place)
    result = CliRunner().invoke(app, ["plan", str(study_file), "--root", str(tmp_path / "run")])
    assert "7 of 7 folders" in result.output
    assert "nothing is left to do" in " ".join(result.output.split())
