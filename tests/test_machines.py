"""Costs by a machine's rates: their formulas, and that they carry on the one machine that is here."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from posmask.cli.commands import app
from posmask.data import models
from posmask.data.activations import training_batches
from posmask.data.harvest import harvest
from posmask.errors import BadSetting
from posmask.kernels import runtime
from posmask.study import machines, planning, rates
from posmask.study.harvests import Source
from posmask.study.machines import Machine
from posmask.study.settings import read_study
from posmask.training.loop import train

QUICK, GEMMA = (Path(__file__).parent.parent / "studies" / f"{name}.toml" for name in ("quick", "gemma-2-2b"))
ROUND = Machine("round", {"bfloat16": 1e12, "float32": 1e11}, 1e9, 1e9, "nowhere", 0.5, 0.1, 1.0, 0.0, None)


def test_costs_are_operations_and_bytes_over_rates():
    assert ROUND.pass_seconds(10**9, "bfloat16") == pytest.approx(2e9 / 0.5e12)
    product, moved = 2 * 100 * 50 / 1e10, 4 * (2 * 50 + 8 * 100) / 1e9
    assert ROUND.encode_seconds(100, 50, 8, "float32") == pytest.approx(product + moved)
    product, moved, adam = 2 * 100 * 50 / 1e11, 4 * (2 * 50 + 5 * 8 * 100) / 1e9, 4 * 7 * 2 * 400 * 100 / 1e9
    expected = 1000 * (product + moved) + adam
    assert ROUND.step_seconds(100, 400, 50, 8, 1000, "bfloat16") == pytest.approx(expected)
    dense = 1000 * (4 * product + 4 * 2 * 50 / 1e9) + adam
    assert ROUND.step_seconds(100, 400, 50, None, 1000, "bfloat16") == pytest.approx(dense)


def test_an_unknown_gpu_is_refused_with_those_known():
    with pytest.raises(BadSetting, match=r"GPU 'a1000' is not among those .*: choose from a100, h100, l4, rtx4090"):
        machines.gpu_named("a1000")


def test_the_gemma_study_is_planned_for_a_gpu_that_is_not_here_without_its_model(monkeypatch, tmp_path):
    """Without its weights, its config.json, the hub, or a folder; the counts and what is printed with them."""
    measured = rates.Rates(0.0, 0.0, {}, {}, frozenset(), *[rates.Linear(0.0, 0.0)] * 6)

    def without_measuring(study, cells, outline, text_tokens, machine):
        assert outline.n_parameters() == (13 * 77_865_984, 13 * 77_865_984 + 2304 + 256_000 * 2304)
        below, above, said = rates._elsewhere(study, outline, machine)
        assert below == pytest.approx(2 * 13 * 77_865_984 / (312e12 * 0.4) + 2 * 2304 / 1e9)
        steps, encode = {}, {}
        for shape in {rates.shape_of(study, cell) for cell in cells}:
            for one in (shape, shape.opened):
                steps[one], encode[one] = rates._shape_elsewhere(study, one, outline.d_model, machine, 1e-6)
        return replace(measured, below=below, above=above, training=steps, encode=encode, assumptions=said)

    monkeypatch.setattr(planning, "measure", without_measuring)
    words = ["plan", str(GEMMA), "--gpu", "a100", "--root", str(tmp_path / "none")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for words in (
        "27 cells", "on one A100 80 GB SXM", "GPU hours", "training texts 20,000,000", "312 TFLOP/s", "2,039 GB/s",
        "40% reached in the model", "assumed, not measured", "On it: some 7 GB", "Disk: 111.6 GB",
        "under Slurm, a cell at a time: srun --nodes 2",
    ):  # fmt: skip
        assert words in said, words
    assert not (tmp_path / "none").exists()


def test_without_a_gpu_named_a_study_for_one_is_refused(tmp_path):
    with pytest.raises(BadSetting, match="device = 'cuda' is not on this machine"):
        planning.plan(read_study(GEMMA), tmp_path)


def spent(work):
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def best(work):
    """The least processor time of some calls: others may use the machine."""
    return min(spent(work)[0] for _ in range(8))


def this_machine():
    """Its peaks as they are now; what share of them is reached was found once, on studies/quick.toml."""
    numbers = torch.ones(25_000_000)
    copied = torch.empty_like(numbers)
    peaks = {}
    for name in ("bfloat16", "float32"):
        left, right = (torch.ones(shape, dtype=getattr(torch, name)) for shape in ((2048, 576), (576, 2304)))
        with runtime.fast_float32():
            peaks[name] = 2 * 2048 * 576 * 2304 / best(lambda: left @ right)  # noqa: B023
    bandwidth = 2 * 4 * len(numbers) / best(lambda: copied.copy_(numbers))
    print(peaks, bandwidth)
    return Machine("here", peaks, bandwidth, 0.0, "measured", 0.65, 0.9, 0.9, overhead=0.0, transfer=None)


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize(
    "changes",
    [[], ["model.layer=20", "sae.rule.k=48", "training.batch_tokens=8192"]],
    ids=["the quick study", "other sizes"],
)
def test_this_machine_by_its_rates_takes_what_a_run_took(changes, tmp_path):
    """Within a quarter, harvest and training; one thread's processor time, since others may use the machine."""
    study = read_study(QUICK, [*changes, "questions=[]"])
    source = Source(study.model)
    outline = models.load_outline(study.model.name, source.layer)
    here = this_machine()
    below, *_ = rates._elsewhere(study, outline, here)
    tokens = rates._random_tokens(128, study.corpus.n_positions, outline.n_vocabulary)
    harvest(rates._random_tokens(8, study.corpus.n_positions, 100), source.loaded, tmp_path / "first", {}, "first")
    seconds, vectors = spent(lambda: harvest(tokens, source.loaded, tmp_path / "more", {}, "tokens"))
    print("harvest", tokens.id.numel() * below / seconds)
    foretold, measured = 0.0, 0.0
    for name in ("open", "slice", "hard", "half-free", "slice-compute"):
        cell = next(cell for cell in study.cells if cell.name == name)
        sae = study.make_sae(cell, vectors.d_model, 0)
        sae.center, sae.scale = vectors.centre_and_scale
        n_steps = 4 + 16
        settings = study.training.model_copy(update={"n_steps": n_steps})
        moments = []
        batches = training_batches(vectors, settings.batch_tokens, n_steps, 0)
        train(sae, batches, settings, name, lambda done: moments.append(time.process_time()))  # noqa: B023
        measured += moments[-1] - moments[3]  # the first steps compile, and fill Adam's moments
        step, _ = rates._shape_elsewhere(study, rates.shape_of(study, cell), vectors.d_model, here, 0.0)
        foretold += 16 * step.each
        print(name, 16 * step.each / (moments[-1] - moments[3]))
    print("training", foretold / measured)
    assert tokens.id.numel() * below == pytest.approx(seconds, rel=0.25)
    assert foretold == pytest.approx(measured, rel=0.25)
