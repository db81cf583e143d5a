"""Several processes train one SAE as one process would: by data and by position, over gloo."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import D_MODEL, D_SAE, MASKS, N_POSITIONS, RULES, make_sae, make_texts
from posmask.data.activations import Activations, training_batches
from posmask.errors import BadSetting
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.training import distributed
from posmask.training.checkpoints import Checkpoints
from posmask.training.distributed import ByData, ByPosition
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

SETTINGS = TrainingSettings(n_steps=30, batch_tokens=240, learning_rate=5e-3, dead_after_eligible_tokens=300, aux_k=4)
STUDY = """
name = "tiny"
seeds = [0]
[model]
name = "MODEL"
layer = 2
precision = "float32"
[corpus]
n_positions = 16
training_tokens = 1500
heldout_tokens = 1500
texts = "TEXTS"
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
order_tasks = []
order_train_groups = 30
order_test_groups = 10
probe_datasets = []
probe_train = 40
probe_test = 10
ks = [1, 5]
[[cells]]
name = "slice"
mask = { kind = "slice", n_slices = 4 }
"""
EVEN = torch.arange(16)


class _Stopped(Exception):
    pass


def trained(folder, kind, rule, together=None, kept=None, write_at=0, stop=False):
    """The curve, the SAE and the bytes sent of one process, by data or by position among others, or alone.

    With `kept` it resumes from the newest checkpoint in that folder, and writes one after step `write_at`.
    """
    activations = Activations(folder)
    mask = make_mask(mask_settings(MASKS[kind]), N_POSITIONS, D_SAE)
    sae = SparseAutoencoder(D_MODEL, rule_settings(RULES[rule]), mask)
    sae.center, sae.scale = activations.center_and_scale
    if together is None:
        way, part, token_indices, rest = None, sae, None, {}
    else:
        way = ByData(sae) if together == "data" else ByPosition(sae, activations.position[activations.keep])
        part, token_indices, rest = getattr(way, "local_sae", sae), way.token_indices, {"processes": way}
    checkpoints = None if kept is None else Checkpoints(Path(kept), {"what": kind})
    behind = 0 if checkpoints is None else checkpoints.done

    def after_step(done):
        if stop and done > write_at:
            raise _Stopped
        if checkpoints is not None:
            checkpoints.due = lambda at_end: done == write_at

    batches = training_batches(
        activations, SETTINGS.batch_tokens, SETTINGS.n_steps - behind, 0, after=behind, token_indices=token_indices
    )
    curve = train(part, batches, SETTINGS, "test", after_step, checkpoints, **rest).curve
    return curve, way.merge_() if together == "position" else sae, getattr(way, "bytes_sent", 0)


CASES = {
    2: [
        ("data", "slice", "topk"),
        ("data", "split", "topk"),
        ("data", "soft", "gated"),
        ("position", "slice", "topk"),
        ("position", "slice", "jumprelu"),
    ],
    4: [
        ("data", "split", "topk"),
        ("data", "importance", "relu"),
        ("position", "slice", "topk"),
        ("position", "slice", "gated"),
    ],
}


def one_of(rank, n_processes, meeting, folder, kept, out):
    """What each process does: all cases, so that starting it is paid for once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_processes)
    try:
        for number, (together, kind, rule) in enumerate(CASES[n_processes]):
            curve, sae, sent = trained(folder, kind, rule, together, f"{kept}-{number}", write_at=20)
            found = {"curve": [vars(point) for point in curve], "sae": sae.state_dict(), "sent": sent}
            torch.save(found, f"{out}-{number}-{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("n_processes", CASES)
def test_several_processes_equal_one_and_by_position_sends_little(activations, tmp_path, n_processes):
    spawn = multiprocessing.get_context("spawn")
    given = (n_processes, tmp_path / "meeting", activations.folder, tmp_path / "kept", tmp_path / "found")
    for number, (_, kind, rule) in enumerate(CASES[n_processes]):
        with pytest.raises(_Stopped):
            trained(activations.folder, kind, rule, None, tmp_path / f"kept-{number}", write_at=10, stop=True)
    processes = [spawn.Process(target=one_of, args=(rank, *given)) for rank in range(n_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for number, (together, kind, rule) in enumerate(CASES[n_processes]):
        curve, sae, _ = trained(activations.folder, kind, rule)
        on, on_sae, _ = trained(activations.folder, kind, rule, None, tmp_path / f"kept-{number}")  # after step 20
        own = {"curve": [vars(point) for point in on], "sae": on_sae.state_dict(), "sent": 0}
        others = [torch.load(tmp_path / f"found-{number}-{rank}", weights_only=True) for rank in range(n_processes)]
        for found in (own, *others):
            for one, other in zip(curve, found["curve"], strict=True):
                for name, value in vars(one).items():
                    assert other[name] == pytest.approx(value, rel=1e-5), (together, kind, rule, one.step, name)
            for name, tensor in sae.state_dict().items():
                torch.testing.assert_close(found["sae"][name], tensor, rtol=1e-4, atol=1e-5)
            if together == "position":
                each_step = 4 * 12 + 8 * 12  # the decoder bias, and a few sums
                keeping = 3 * 4 * (D_SAE * (2 * 12 + 8) + 12)  # a checkpoint: weights and two moments
                joining = 4 * (D_SAE * (2 * 12 + 8) + 12)  # once, at the end
                assert found["sent"] < joining + keeping + SETTINGS.n_steps * each_step


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
    """The command as docs/cluster.md has it, on a study of one slice cell, by position, in two processes."""
    study_file = tmp_path / "tiny.toml"
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1200)))
    study_file.write_text(STUDY.replace("MODEL", str(model_folder)).replace("TEXTS", str(tmp_path / "texts.jsonl")))
    command = [sys.executable, "-m"]
    started = [
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
    found = subprocess.run([*command, *started, "--by", "position", *root], capture_output=True, text=True, check=True)
    assert "slice with seed 0 is trained. Each process sent" in found.stdout
    found = subprocess.run(
        [*command, "posmask.cli", "run", str(study_file), *root], capture_output=True, text=True, check=True
    )
    assert "slice-seed0 resumes from its checkpoint after 20 steps" in found.stdout + found.stderr
    assert (tmp_path / "run" / "cells" / "slice-seed0" / "manifest.json").exists()
    alone = subprocess.run(
        [*command, "posmask.cli", "train-distributed", str(study_file), "slice"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 2
    assert "needs processes started by torchrun" in alone.stderr
