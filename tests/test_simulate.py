"""The simulation of many GPUs: bytes equal those that processes send, and docs/scaling.md has the measured values."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import D_MODEL, D_SAE, RULES, make_sae
from posmask.data.activations import training_batches
from posmask.errors import BadSetting
from posmask.sae.rules import rule_settings
from posmask.study.study_file import read_study
from posmask.training.checkpoints import Checkpoints
from posmask.training.distributed import ByData, ByPosition
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling  # noqa: E402 (scripts, not a package)
import simulate  # noqa: E402
from simulate import MODELS, Job, Linked, forecast, reach  # noqa: E402

JOB = Job("round", 100, 10**9, 2 * 10**9, 10**6, 10**6, 1000, 128, 4, 8, precision="float32")
ROUND = Linked(
    "round", {"bfloat16": 1e12, "float32": 1e11}, 1e9, "nowhere", 0.5, 0.1, 1.0, 0.0, 1e9, 1e9, (1e8, 1e7), (1.0, 0.5)
)


@pytest.mark.parametrize("design", ["data", "position"])
def test_simulated_bytes_equal_the_bytes_sent(activations, tmp_path, design):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        sae = make_sae("slice")
        sae.center, sae.scale = activations.center_and_scale
        strategy = ByData(sae) if design == "data" else ByPosition(sae, activations.position)
        settings = TrainingSettings(n_steps=30, batch_tokens=240, learning_rate=5e-3)
        sent = []
        train(
            getattr(strategy, "local_sae", sae),
            training_batches(activations, 240, 30, 0),
            settings,
            "test",
            lambda done: sent.append(strategy.bytes_sent),
            Checkpoints(tmp_path / "checkpoints", {"what": design}),
            processes=strategy,
        )
    finally:
        dist.destroy_process_group()
    steps = {after - before for before, after in pairwise(sent[:4])}  # steps without a curve point
    if design == "data":
        assert steps == {simulate.bytes_by_data(D_MODEL, D_SAE, 240, 1)}
    else:
        assert steps == {simulate.bytes_by_position(D_MODEL)}


def test_a_forecast_equals_a_calculation_by_hand():
    alone, two = (forecast(JOB, ROUND, "data", 50, n) for n in (1, 2))
    assert alone.bytes_sent == alone.parts["network"] == 0
    assert two.bytes_sent == 4 * (201 * 50 + 100) + 50 + 16 + 8 * 500 + 8
    assert two.parts["network"] == pytest.approx(two.bytes_sent / 1e8)  # in a ring of two, each sends everything once
    assert two.parts["products"] == pytest.approx(500 * 2 * 100 * 50 / 1e10)
    assert two.parts["disk"] == pytest.approx(500 * (100 + 4 + 20) / 1e9)
    assert two.seconds == pytest.approx(1000 * sum(two.parts.values()))
    assert two.bytes_held["weights, gradient, moments"] == 16 * (201 * 50 + 100)
    assert two.bytes_held["mask"] == 2 * 4 * 128 * 50
    far = forecast(JOB, ROUND, "data", 50, 16)
    assert far.parts["network"] == pytest.approx(2 * 15 / 16 * far.bytes_sent / 5e6)


def test_latents_and_positions_divide_memory_and_positions_divide_work():
    latents, position = forecast(JOB, ROUND, "latents", 400, 4), forecast(JOB, ROUND, "position", 400, 4)
    for job in (latents, position):
        assert job.bytes_held["weights, gradient, moments"] == 16 * (201 * 100 + 100)
    assert position.parts["products"] == pytest.approx(250 * 2 * 100 * 100 / 1e10)
    assert latents.parts["products"] == pytest.approx(1000 * 2 * 100 * 100 / 1e10)
    assert latents.parts["disk"] == position.parts["disk"]
    assert latents.parts["host"] == position.parts["host"]
    assert position.bytes_sent == 4 * 100 + 4 + 8
    assert latents.bytes_sent == 124 * 250 + 4 * 8 * 1000 + 4 * 100 * 1000
    three = forecast(JOB, ROUND, "position", 400, 3)  # one process has two of the four groups
    assert three.parts["products"] == pytest.approx(2 * position.parts["products"])


def test_the_limit_of_a_design_is_reported():
    assert forecast(JOB, ROUND, "position", 400, 8).limit == "groups"
    wide = forecast(JOB, ROUND, "data", 10**6, 8)
    assert wide.limit == "memory"
    assert not wide.possible
    assert reach(JOB, ROUND, "data", 10**6)[::2] == (None, "memory")
    first, best, limit = reach(JOB, ROUND, "position", 2 * 10**5)
    assert (first.n_gpus, best.n_gpus, limit) == (1, 4, "groups")
    _, best, limit = reach(JOB, ROUND, "data", 10**5)
    assert limit == "network"
    assert best.seconds < 1.5 * forecast(JOB, ROUND, "data", 10**5, 2 * best.n_gpus).seconds
    # A job that needs several GPUs starts at the smallest sufficient number.
    small = replace(ROUND, memory=4e7)
    first, _, _ = reach(JOB, small, "latents", 10**5)
    assert first.n_gpus > 1
    assert sum(forecast(JOB, small, "latents", 10**5, first.n_gpus // 2).bytes_held.values()) > 4e7


def test_model_sizes_equal_their_configs():
    study = read_study(ROOT / "studies" / "gemma-2-2b.toml")
    assert MODELS["gemma-2-2b"] == study.model.sizes
    layers = {"gemma-2-2b": 2.6e9, "gemma-2-9b": 9.2e9, "llama-3.1-8b": 7.5e9, "gemma-2-27b": 27.2e9}
    for name, n_parameters in layers.items():  # published sizes, for Llama without its input embeddings
        assert Job.of_model(name).weights == pytest.approx(n_parameters, rel=0.02)


def test_a_job_has_the_sizes_of_its_study():
    study = read_study(ROOT / "studies" / "gemma-2-2b.toml")
    job = Job.of_study(study)
    assert (job.d_model, job.k, job.batch_tokens, job.n_groups, job.stored) == (2304, 40, 4096, 8, "int8")
    assert job.trained_tokens == 4882 * 4096
    assert job.below == 13 * 77_865_984
    relu = study.sae.model_copy(update={"rule": rule_settings(RULES["relu"])})
    with pytest.raises(BadSetting, match="needs a rule with k active latents, and relu has no k: take topk"):
        Job.of_study(study.model_copy(update={"sae": relu}))


def run_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["simulate.py", *words])
    monkeypatch.setenv("COLUMNS", "80")
    simulate.main()


def test_the_script_prints_each_model_at_80_columns_with_its_assumptions(capsys, monkeypatch):
    run_script(monkeypatch, "--gpu", "a100")
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    text = " ".join(output.split())
    for words in (*MODELS, "groups: no", "memory: no", "312 TFLOP/s", "Nothing here was measured on a GPU"):
        assert words in text, words
    assert re.search(r"16,777,216 +1 +data", output)


def test_the_script_simulates_a_study(capsys, monkeypatch):
    run_script(monkeypatch, str(ROOT / "studies" / "gemma-2-2b.toml"))
    assert "H100 SXM" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "l4"], "the links of GPU 'l4' to others are unknown: choose from a100, h100"),
        (["--gpu", "a1000"], "GPU 'a1000' is not among those whose rates are known"),
        (["no-such.toml"], "no-such.toml"),
    ],
)
def test_invalid_arguments_raise_an_error(capsys, monkeypatch, words, message):
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, *words)
    assert capsys.readouterr().out == ""


def test_the_scaling_page_is_current_and_the_formulas_are_exact():
    measured = json.loads((ROOT / "benchmarks" / "scaling.json").read_text(encoding="utf8"))
    script, rows = scaling, measured["runs"]
    assert {(row["design"], row["n_processes"]) for row in rows} == {
        (d, n) for d in ("data", "position") for n in (1, 2, 4)
    }
    for row in rows:
        assert row["bytes_a_step"][-1] == script.formula(row), row  # the largest step if processes differ
    text = script.PAGE.read_text(encoding="utf8")
    assert script.page(text, measured) == text
    assert set(re.findall(r"<!-- (?!end of )(.+?) -->", text)) == {"traffic", "stops", "harvest"}


def test_the_link_between_machines_is_slower():
    assert simulate.linked_gpu("h100").link_rate(8) == pytest.approx(450e9 * 0.65)
    assert simulate.linked_gpu("h100").link_rate(9) == pytest.approx(50e9 * 0.9)
