"""Plans: token counts, scaling of time, the limit on measuring, finished folders, GPUs and bad input."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import make_sae, train_on
from posmask.cli.commands import app
from posmask.data import models, sites
from posmask.data.embedded_models import DEFAULT_MODEL, MODELS
from posmask.errors import BadSetting, DegenerateResult
from posmask.kernels import cpu, runtime
from posmask.masks import make_mask, mask_settings
from posmask.storage import manifest
from posmask.study import estimate, harvests, run, targets
from posmask.study.estimate import Machine, Rates
from posmask.study.source import Source, texts_identity
from posmask.study.study_file import read_study
from posmask.training import loop
from posmask.training.settings import TrainingSettings
from study_toml import tiny_study

GEMMA = Path(__file__).parent.parent / "studies" / "gemma-2-2b.toml"
ROUND = Machine("round", {"bfloat16": 1e12, "float32": 1e11}, 1e9, "nowhere", 0.5, 0.1, 1.0, 0.0, None)
NOTHING = replace(ROUND, product_rates={"bfloat16": 1e30, "float32": 1e30}, bandwidth=1e30)

STUDY = tiny_study(
    """
[[cells]]
name = "open"
mask = { kind = "open" }
[[cells]]
name = "slice"
mask = { kind = "slice", n_slices = 4 }
budget = "compute"
measure_forgetting = true
[[cells]]
name = "half"
mask = { kind = "open" }
step_fraction = 0.5
""",
    seeds="seeds = [0, 1]",
    order_tasks='order_tasks = ["chronology", "topic_permutation"]',
    probe_datasets='probe_datasets = ["ag_news"]',
)


def rates(machine=ROUND, below=0.0, above=0.0, **changes):
    """Make rates; host work takes no time unless `host` is set."""
    return Rates(machine, below, above, **{"host": 0.0, **changes})


@pytest.fixture
def study_file(tmp_path, model_folder):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY.replace("MODEL", str(model_folder)))
    return path


@pytest.fixture
def settings(study_file):
    return read_study(study_file)


def make_targets(settings, root):
    return targets.targets_of(settings, Source(settings.model), root)


def finish(target):
    with manifest.write_folder(target.folder, target.made_from):
        pass


def tokens_of(plan, stage):
    return {line.what: line.tokens for line in plan.lines if line.stage == stage}


def seconds_of(plan, stage):
    return {line.what: line.seconds for line in plan.lines if line.stage == stage}


def test_tokens_follow_from_the_settings(settings, tmp_path):
    plan = estimate.plan(settings, tmp_path, rates())
    # Texts of 15 tokens: 2 x (30 + 10) and 20 shuffled for one task, 6 x (30 + 10) and 60 for the other.
    order, probes = (100 + 300) * 15, 3 * 25 * 15
    assert tokens_of(plan, "harvest") == {
        "training texts": 1500, "held-out texts": 1500, "shift design": 40 * 4 * 3, "order tasks": order,
        "probe datasets": probes,
    }  # fmt: skip
    assert tokens_of(plan, "baselines") == {"the model itself": order + probes}
    steps = 20 * 256
    assert tokens_of(plan, "training") == {"open": 2 * steps, "slice": 4 * steps, "half": steps}
    evaluated = 1500 + 480 + order + probes + 3 * 8 * 16
    lifted = 1500 + 480 + 1500 * 6  # once with the mask lifted, and after 0, 1, 2, 5, 10 and 20 steps without it
    controls = 2 * (1500 + order + probes)  # zero-step and matched; slices have no copies
    assert tokens_of(plan, "evaluation") == {
        "open": 2 * evaluated,
        "slice": 2 * (evaluated + lifted + controls),
        "half": 2 * evaluated,
    }
    assert (plan.n_folders, plan.n_finished) == (7, 0)


def test_seconds_are_counts_times_rates(settings, tmp_path):
    plan = estimate.plan(settings, tmp_path, rates(NOTHING, below=0.01, above=0.1))
    assert seconds_of(plan, "harvest")["shift design"] == pytest.approx(0.01 * 40 * (7 + 10 + 13 + 16))
    assert seconds_of(plan, "baselines") == {"the model itself": pytest.approx(2 * 8 * 16 * 0.1)}
    for seconds in seconds_of(plan, "evaluation").values():
        assert seconds == pytest.approx(2 * 3 * 8 * 16 * 0.1)
    assert plan.seconds() == pytest.approx(sum(line.seconds for line in plan.lines))
    assert plan.seconds() == pytest.approx(sum(plan.seconds(stage) for stage in ("harvest", "baselines", "evaluation")))


def changed(settings, part, **changes):
    return settings.model_copy(update={part: getattr(settings, part).model_copy(update=changes)})


def test_training_time_follows_steps_tokens_and_open_latents(settings, tmp_path):
    plan = estimate.plan(settings, tmp_path, rates())
    once = seconds_of(plan, "training")
    longer = seconds_of(estimate.plan(changed(settings, "training", n_steps=40), tmp_path, rates()), "training")
    assert longer == {name: pytest.approx(2 * seconds) for name, seconds in once.items()}
    assert once["half"] == pytest.approx(once["open"] / 2)
    wider = seconds_of(estimate.plan(changed(settings, "training", batch_tokens=2560), tmp_path, rates()), "training")
    assert 8 * once["open"] < wider["open"] < 10 * once["open"]  # everything but Adam's part scales
    twice = seconds_of(estimate.plan(settings, tmp_path, rates(factor=2.0)), "training")
    assert twice["open"] == pytest.approx(2 * once["open"])
    d_model, step = models.load_outline(settings.model.name, 2).d_model, 0.0
    for n_live in (32, 128):  # The slice at equal compute: 32 of 128 latents are open; without its mask all are.
        step += sum(ROUND.step_parts(d_model, 128, n_live, 4, 256, runtime.fast_precision()).values())
    assert once["slice"] == pytest.approx(2 * 20 * step)


def test_host_time_of_the_evaluation_scales_with_its_work(settings, tmp_path):
    def host(study):
        return seconds_of(estimate.plan(study, tmp_path, rates(NOTHING, host=1.0)), "evaluation")

    once = host(settings)
    assert once["half"] == once["open"]
    more = host(changed(settings, "evaluation", order_train_groups=60, probe_train=80))
    assert all(1 < more[name] / once[name] < 2 for name in once)
    faster = seconds_of(estimate.plan(settings, tmp_path, rates(NOTHING, host=0.5)), "evaluation")
    assert faster == {name: pytest.approx(seconds / 2) for name, seconds in once.items()}


@pytest.mark.parametrize(
    ("mask", "n_live"),
    [
        ({"kind": "open"}, 32),
        ({"kind": "slice", "n_slices": 4}, 8),
        ({"kind": "slice", "n_slices": 4, "gating": "gradient"}, 32),
        ({"kind": "slice", "n_slices": 4, "free_fraction": 0.5}, 20),
        ({"kind": "importance", "positions_per_latent": 4}, 32),
    ],
)
def test_a_shape_counts_the_computed_latents(mask, n_live):
    shape = estimate.shape_of(make_mask(mask_settings(mask), 16, 32))
    assert shape.d_sae == 32
    assert shape.n_live == n_live


def test_finished_folders_take_no_time(settings, tmp_path):
    everything = estimate.plan(settings, tmp_path, rates(below=1.0, above=1.0))
    targets = make_targets(settings, tmp_path)
    finish(targets[0])
    finish(targets[1])  # open, seed 0
    plan = estimate.plan(settings, tmp_path, rates(below=1.0, above=1.0))
    assert plan.n_finished == 2
    assert seconds_of(plan, "baselines") == {"the model itself": 0.0}
    for stage in ("training", "evaluation"):
        before, after = seconds_of(everything, stage), seconds_of(plan, stage)
        assert after == {"open": before["open"] / 2, "slice": before["slice"], "half": before["half"]}
    assert plan.disk_bytes < everything.disk_bytes
    for target in targets[2:]:
        finish(target)
    plan = estimate.plan(settings, tmp_path)  # nothing is measured
    assert {(line.tokens, line.seconds) for line in plan.lines} == {(0, 0.0)}
    assert (plan.n_finished, plan.disk_bytes, plan.memory_bytes) == (7, 0, 0)


def test_harvested_vectors_take_no_time_and_count_their_stored_tokens(settings, tmp_path):
    def declared(study):
        model, texts = Source(study.model).made_from, texts_identity(study)
        return {item.label: item for item in harvests.harvests(study, model, texts)}

    def write(item, kept):
        with manifest.write_folder(item.folder(tmp_path), item.made_from, kept_tokens=kept, sink_tokens={"1": 7}):
            pass

    items, other_groups = declared(settings), declared(changed(settings, "evaluation", probe_train=80))
    for label, kept in (("training", 1501), ("evaluation", 1502), ("chronology", 777)):
        write(items[label], kept)
    write(other_groups["ag_news"], 555)  # harvested for other settings
    plan = estimate.plan(settings, tmp_path, rates(below=1.0))
    harvest = tokens_of(plan, "harvest")
    assert (harvest["training texts"], harvest["held-out texts"]) == (0, 0)
    assert "training: 7 of 1,508 tokens are attention sinks and do not count, at position 1 (7)." in plan.assumptions
    assert (harvest["order tasks"], harvest["probe datasets"]) == (300 * 15, 75 * 15)
    assert tokens_of(plan, "baselines") == {"the model itself": 777 + 300 * 15 + 75 * 15}
    other = settings.model_copy(update={"corpus": settings.corpus.model_copy(update={"heldout_tokens": 1400})})
    assert tokens_of(estimate.plan(other, tmp_path, rates()), "harvest")["held-out texts"] == 1400


def test_vectors_take_the_planned_disk_space(settings, tmp_path, activations):
    outline = models.load_outline(settings.model.name, 2)
    sets = estimate._sets(settings, tmp_path)
    each = estimate._Costs(settings, outline, sets, rates()).bytes_per_token(sets[0])
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
@pytest.mark.parametrize("name", [DEFAULT_MODEL, pytest.param("embedded:gemma-3-270m", marks=pytest.mark.slow)])
def test_the_embedded_models_have_the_recorded_sizes(name):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODELS[name].folder())
    assert {size: getattr(config, size) for size in MODELS[name].sizes} == MODELS[name].sizes


def test_every_stage_is_measured_and_nothing_is_written(settings, tmp_path):
    root = tmp_path / "none"
    plan = estimate.plan(settings.model_copy(update={"seeds": (0,)}), root)
    assert not root.exists()
    assert all(line.seconds > 0 and math.isfinite(line.seconds) for line in plan.lines)
    assert not any("The model was not run" in line for line in plan.assumptions)


@pytest.mark.parametrize("rule", ['kind = "relu", l1_coefficient = 0.1', 'kind = "batchtopk", k = 4'])
def test_training_steps_of_every_rule_are_measured(study_file, rule):
    study_file.write_text(study_file.read_text().replace('kind = "topk", k = 4', rule))
    settings = read_study(study_file)
    measured = estimate.measure(settings, settings.cells[:2], models.load_outline(settings.model.name, 2))
    assert measured.factor > 0
    assert not any("not measured" in sentence for sentence in measured.assumptions)


def test_without_weights_model_time_follows_from_its_sizes(settings, tmp_path, model_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model_folder / "config.json", bare)
    outline = models.load_outline(str(bare), 2)
    measured = estimate.measure(changed(settings, "model", name=str(bare)), [], outline)
    below, above = outline.n_parameters()
    assert measured.above / measured.below == pytest.approx(1.2 * above / below)
    assert "The model was not run" in measured.assumptions[0]


class SlowClock:
    """A clock that each model pass and training step advances by some seconds."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.perf_counter() + self.ahead


@pytest.mark.parametrize(("pass_seconds", "step_seconds"), [(0.0, 1.0), (0.0, 7.0), (3.0, 7.0), (0.5, 0.0)])
def test_measuring_stops_within_its_budget(settings, monkeypatch, pass_seconds, step_seconds):
    clock, real_pass, real_train = SlowClock(), sites.LanguageModel.vectors, loop.train
    n_steps = []

    def slow_pass(self, ids):
        clock.ahead += pass_seconds * ids.numel() / 32
        return real_pass(self, ids)

    def slow_train(sae, batches, settings, label, after_step):
        def slow_step(done):
            clock.ahead += step_seconds
            n_steps.append(done)
            after_step(done)

        return real_train(sae, batches, settings, label, slow_step)

    monkeypatch.setattr(sites.LanguageModel, "vectors", slow_pass)
    monkeypatch.setattr(loop, "train", slow_train)
    started = clock()
    measured = estimate.measure(settings, settings.cells * 5, models.load_outline(settings.model.name, 2), clock=clock)
    # A started step completes, and at least two steps per shape are needed.
    assert clock() - started < estimate.MEASURING_SECONDS + 2 * step_seconds
    if step_seconds:
        assert n_steps
        assert len(n_steps) < 6 * 15
        assert math.isfinite(measured.factor)


def test_a_machine_too_slow_for_a_step_uses_sizes_only(settings, monkeypatch):
    monkeypatch.setattr(runtime, "product_rate", lambda precision, n_rows: 1e3)
    measured = estimate.measure(settings, settings.cells, models.load_outline(settings.model.name, 2))
    assert measured.factor == 1.0
    assert "3 of 3 kinds of training steps were not measured: lack of time." in measured.assumptions
    plan = estimate.plan(settings, Path("none"), measured)
    assert seconds_of(plan, "training")["open"] > 1000


def test_steps_are_not_measured_if_their_loops_are_not_compiled(settings, monkeypatch):
    monkeypatch.setattr(cpu, "loops_are_compiled", lambda: False)
    measured = estimate.measure(settings, settings.cells, models.load_outline(settings.model.name, 2))
    assert measured.factor == 1.0
    assert any("not compiled before the first run" in sentence for sentence in measured.assumptions)


def test_compiled_loops_are_detected_from_the_numba_cache(activations, tmp_path):
    settings = TrainingSettings(n_steps=2, batch_tokens=256, learning_rate=5e-3)
    with contextlib.suppress(DegenerateResult):  # Two steps explain little variance.
        train_on(make_sae("open"), activations, settings)
    assert cpu.loops_are_compiled()
    code = "from posmask.kernels import cpu; print(cpu.loops_are_compiled())"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_planned_training_time_is_within_a_factor_of_three(study_file, texts, tmp_path):
    """A factor of 3, because steps of this tiny study take a millisecond and other work on the machine matters."""
    text = study_file.read_text().replace("n_steps = 20", "n_steps = 300").replace("d_sae = 32", "d_sae = 1024")
    text = text.replace('"chronology", "topic_permutation"', '"toy_order"').replace('"ag_news"', '"toy"')
    study_file.write_text(text.replace("measure_forgetting = true", "").replace("seeds = [0, 1]", "seeds = [0]"))
    settings = read_study(study_file)
    planned = estimate.plan(settings, tmp_path / "run").seconds("training")
    rows = run.run_study(settings, tmp_path / "run", say=lambda text: None)
    seconds = sum(row.value for row in rows if row.metric == "train_seconds")
    assert seconds / 3 < planned < 3 * seconds


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
def test_bad_settings_raise_before_planning(tmp_path, model_folder, given, instead, message):
    path = tmp_path / "bad.toml"
    path.write_text(STUDY.replace(given, instead).replace("MODEL", str(model_folder)))
    with pytest.raises(BadSetting, match=message):
        estimate.plan(read_study(path), tmp_path, rates())


def test_the_command_prints_the_total_first_and_fits_80_columns(study_file, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda *args: rates(below=0.01, assumptions=("Nothing was measured.",)))
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", str(study_file), "--root", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert result.output.startswith("In all ")
    for text in ("training texts", "1,500", "slice", "0 of 7 folders", "GB", "- Nothing was measured."):
        assert text in result.output
    for target in make_targets(read_study(study_file), tmp_path / "run"):
        finish(target)
    result = CliRunner().invoke(app, ["plan", str(study_file), "--root", str(tmp_path / "run")])
    assert "7 of 7 folders" in result.output
    assert "nothing is left to do" in " ".join(result.output.split())


def test_machine_times_are_operations_and_bytes_over_rates():
    assert ROUND.pass_seconds(10**9, "bfloat16") == pytest.approx(2e9 / 0.5e12)
    product, moved, adam = 2 * 100 * 50 / 1e11, 4 * (2 * 50 + 5 * 8 * 100) / 1e9, 4 * 7 * 2 * 400 * 100 / 1e9
    parts = ROUND.step_parts(100, 400, 50, 8, 1000, "bfloat16")
    assert sum(parts.values()) == pytest.approx(1000 * (product + moved) + adam)
    parts = ROUND.step_parts(100, 400, 50, None, 1000, "bfloat16")
    assert sum(parts.values()) == pytest.approx(1000 * (4 * product + 4 * 2 * 50 / 1e9) + adam)


def test_an_unknown_gpu_raises_and_lists_the_known_ones():
    with pytest.raises(BadSetting, match=r"GPU 'a1000' is not among those .*: choose from a100, h100, l4, rtx4090"):
        estimate.gpu_named("a1000")


def test_the_gemma_study_is_planned_without_its_model_or_gpu(tmp_path):
    """No GPU, weights, config.json or hub is needed, and no folder is written."""
    words = ["plan", str(GEMMA), "--gpu", "a100", "--root", str(tmp_path / "none")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    for words in (
        "on one A100 80 GB SXM", "GPU hours", "0 of 28 folders", "training texts 20,000,000", "312 TFLOP/s",
        "2,039 GB/s", "40% reached in the model", "assumed, not measured", "Disk: 111.7 GB",
        "with Slurm, one cell at a time: srun --nodes 2",
    ):  # fmt: skip
        assert words in output, words
    assert not (tmp_path / "none").exists()


def test_gpu_time_follows_from_published_rates():
    settings = read_study(GEMMA)
    outline = models.load_outline(settings.model.name, 13, settings.model.site, settings.model.sizes)
    measured = estimate.measure(settings, settings.cells, outline, estimate.GPUS["a100"])
    assert measured.below == pytest.approx(2 * 13 * 77_865_984 / (312e12 * 0.4) + 2 * 2304 / 1e9)
    assert measured.factor == 1.0


def test_a_cuda_study_without_a_gpu_raises_an_error(tmp_path):
    with pytest.raises(BadSetting, match=r"device = 'cuda', but torch .* is a build without CUDA"):
        estimate.plan(read_study(GEMMA), tmp_path)
