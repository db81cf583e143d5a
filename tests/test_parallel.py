"""Data-parallel and position-parallel training over gloo gives the same SAE as one process."""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from conftest import D_MODEL, D_SAE, MASKS, N_POSITIONS, RULES, make_sae, make_texts
from parallel_training import SETTINGS, Stopped, train_all_cases, trained
from posmask.errors import BadSetting
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.training import distributed
from posmask.training.distributed import ByData, ByPosition
from study_toml import tiny_study

STUDY = tiny_study(
    """
[[cells]]
name = "slice"
mask = { kind = "slice", n_slices = 4 }
""",
    tables='texts = "TEXTS"',
    order_tasks="order_tasks = []",
    probe_datasets="probe_datasets = []",
    ks="ks = [1, 5]",
)
EVEN = torch.arange(16)

CASES = {
    2: [
        ("data", "slice", "topk"),
        ("data", "split", "topk"),
        ("data", "soft", "gated"),
        ("position", "slice", "topk"),
        ("position", "slice", "jumprelu"),
        ("data", "slice", "topk", "learned"),
        ("position", "slice", "topk", "learned"),
        ("position", "slice", "topk", "mean"),
    ],
    4: [
        ("data", "split", "topk"),
        ("data", "importance", "relu"),
        ("position", "slice", "topk"),
        ("position", "slice", "gated"),
    ],
}


def fresh_sae(kind, rule, position_bias=None):
    mask = make_mask(mask_settings(MASKS[kind]), N_POSITIONS, D_SAE)
    sae = SparseAutoencoder(D_MODEL, rule_settings(RULES[rule]), mask, position_bias=position_bias)
    sae.start_position_bias_(0.1 * torch.randn(N_POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(0)))
    return sae


@pytest.mark.parametrize("n_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_same_sae_and_send_few_bytes(activations, tmp_path, n_processes):
    spawn = multiprocessing.get_context("spawn")
    cases = [(parallel_by, fresh_sae(*sae)) for parallel_by, *sae in CASES[n_processes]]
    files = (tmp_path / "checkpoints", tmp_path / "result")
    arguments = (n_processes, tmp_path / "meeting", activations.folder, cases, *files)
    for number, (_, sae) in enumerate(cases):
        with pytest.raises(Stopped):
            trained(activations.folder, sae, None, tmp_path / f"checkpoints-{number}", write_at=5, stop=True)
    processes = [spawn.Process(target=train_all_cases, args=(rank, *arguments)) for rank in range(n_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for number, (parallel_by, *of_sae) in enumerate(CASES[n_processes]):
        curve, sae, _ = trained(activations.folder, cases[number][1])
        checkpoint_folder = tmp_path / f"checkpoints-{number}"  # of step 10
        resumed_curve, resumed_sae, _ = trained(activations.folder, cases[number][1], None, checkpoint_folder)
        resumed = {"curve": [vars(point) for point in resumed_curve], "sae": resumed_sae.state_dict(), "sent": 0}
        others = [torch.load(tmp_path / f"result-{number}-{rank}", weights_only=True) for rank in range(n_processes)]
        for result in (resumed, *others):
            for expected, actual in zip(curve, result["curve"], strict=True):
                for name, value in vars(expected).items():
                    case = parallel_by, *of_sae, expected.step, name
                    assert actual[name] == pytest.approx(value, rel=1e-5), case
            for name, tensor in sae.state_dict().items():
                torch.testing.assert_close(result["sae"][name], tensor, rtol=1e-4, atol=1e-5)
            if parallel_by == "position":
                shared = 12 + 12 * N_POSITIONS * ("learned" in of_sae)  # the decoder bias, and one per position
                step_bytes = 4 * shared + 8 * 12  # and a few sums
                checkpoint_bytes = 3 * 4 * (D_SAE * (2 * 12 + 8) + 12)  # a checkpoint: weights and two moments
                merge_bytes = 4 * (D_SAE * (2 * 12 + 8) + 12)  # once, at the end
                assert result["sent"] < merge_bytes + checkpoint_bytes + SETTINGS.n_steps * step_bytes


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByData(make_sae("open", rule="batchtopk")), "the rule batchtopk chooses over whole batches"),
        (lambda: ByData(make_sae("switch")), "balances its experts over a whole batch"),
        (lambda: ByPosition(make_sae("slice", rule="matryoshka"), EVEN), "the rule matryoshka chooses"),
        (lambda: ByPosition(make_sae("soft"), EVEN), "a soft mask that changes in training"),
        (
            lambda: distributed._owners(make_sae("slice", "gradient"), torch.ones(16).long(), 2),
            "makes 1 groups of positions",
        ),
    ],
)
def test_indivisible_saes_raise_an_error(alone, make, message):
    with pytest.raises(BadSetting, match=message):
        make()


@pytest.mark.slow
def test_a_cell_trained_by_torchrun_is_evaluated_without_training(tmp_path, model_folder):
    """Run the command of docs/cluster.md on a study of one slice cell, by position, in two processes."""
    study_file = tmp_path / "tiny.toml"
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1200)))
    study_file.write_text(STUDY.replace("MODEL", str(model_folder)).replace("TEXTS", str(tmp_path / "texts.jsonl")))
    command = [sys.executable, "-m"]
    torchrun = [
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "posmask.cli",
        "train-distributed",
        str(study_file),
        "slice",
    ]
    root = ["--root", str(tmp_path / "run")]
    result = subprocess.run(
        [*command, *torchrun, "--by", "position", *root], capture_output=True, text=True, check=True
    )
    assert "slice with seed 0 is trained. Each process sent" in result.stdout
    result = subprocess.run(
        [*command, "posmask.cli", "run", str(study_file), *root], capture_output=True, text=True, check=True
    )
    assert "slice-seed0 resumes from its checkpoint after 20 steps" in result.stdout + result.stderr
    assert (tmp_path / "run" / "cells" / "slice-seed0" / "manifest.json").exists()
    alone = subprocess.run(
        [*command, "posmask.cli", "train-distributed", str(study_file), "slice"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 2
    assert "needs processes started by torchrun" in alone.stderr
