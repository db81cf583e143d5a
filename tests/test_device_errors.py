"""Devices that are missing, too old, without a driver or out of memory, simulated by replacing functions of torch."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import make_sae, train_on
from posmask.cli import commands
from posmask.errors import BadSetting, OutOfMemory
from posmask.kernels import devices, runtime
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.storage import layout
from posmask.study import estimate, ray_engine, run
from posmask.study.study_file import read_study
from posmask.training.settings import TrainingSettings

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"
FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
    "free. Process 12 has 77.9 GiB memory in use. See https://pytorch.org/docs/stable/notes/cuda.html"
)


@pytest.fixture
def cuda(monkeypatch):
    """Simulate a build of torch for CUDA with some GPUs, whose first use may fail."""

    def simulate(n_devices=1, capability=(9, 0), failure=None):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: failure is None and n_devices > 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        make = torch.ones

        def ones(*shape, device=None, **options):
            if failure is not None and device is not None and torch.device(device).type == "cuda":
                raise failure
            return make(*shape, **options)

        monkeypatch.setattr(torch, "ones", ones)

    return simulate


@pytest.mark.parametrize(
    ("name", "simulated", "message"),
    [
        ("cuda", {"failure": RuntimeError(OLD_DRIVER)}, "driver on your system is too old (found version 11040)):"),
        ("cuda", {"failure": RuntimeError(NO_KERNEL)}, "no kernel image is available for execution on the device):"),
        ("cuda:0", {"failure": FULL}, "(it tried to allocate 20.00 GiB): compare the driver"),
        ("cuda", {"n_devices": 0, "failure": RuntimeError("No CUDA GPUs are available")}, "(No CUDA GPUs are avail"),
        ("cuda:7", {"n_devices": 1}, "device = 'cuda:7' is not on this machine: use cuda:0, or cpu"),
        ("cuda:7", {"n_devices": 4}, "device = 'cuda:7' is not on this machine: use cuda:0 to cuda:3, or cpu"),
        ("cpu:1", {}, "device = 'cpu:1' is not on this machine, which has one cpu: use cpu"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_sentence(name, simulated, message, cuda):
    cuda(**simulated)
    with pytest.raises(BadSetting) as raised:
        devices.check_device(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "http" not in str(raised.value)


def test_devices_that_work_are_accepted(cuda, monkeypatch):
    cuda(n_devices=2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        devices.check_device(name)


def test_builds_of_torch_without_the_device_are_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BadSetting, match="is a build without CUDA: use cpu, or install torch's build for CUDA"):
        devices.check_device("cuda")
    with pytest.raises(BadSetting, match="device = 'mps' is not on this machine"):
        devices.check_device("mps")


@pytest.mark.parametrize("stage", ["run", "plan"])
def test_a_device_is_checked_before_anything_is_done(stage, study_file, tmp_path, cuda):
    cuda(failure=RuntimeError(OLD_DRIVER))
    study = read_study(study_file, ["device=cuda"])
    with pytest.raises(BadSetting, match="driver on your system is too old"):
        run.run_study(study, tmp_path / "run", print) if stage == "run" else estimate.plan(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_that_train_together_need_a_gpu_each(cuda):
    cuda(n_devices=2)
    assert devices.check_own_gpu("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(BadSetting, match="process 3 of this machine has no GPU: start 2 per node, one per GPU"):
        devices.check_own_gpu("cuda", 2)
    with pytest.raises(BadSetting, match="device = 'cuda:1', but processes that train together use a GPU each"):
        devices.check_own_gpu("cuda:1", 0)


def test_ray_assigns_gpus_itself(study_file):
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2, "GPU": 2}}])
    with pytest.raises(BadSetting, match="device = 'cuda:1', but Ray gives each task a GPU of its own"):
        ray_engine.Cluster(ray, read_study(study_file, ["device=cuda:1"]), 1)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_does_not_emulate_bfloat16_on_an_old_gpu(capability, fast, cuda, study_file):
    cuda(capability=capability)
    assert runtime.fast_precision("cuda:0") == fast
    lines: list[str] = []
    run._warn_of_slow_precision(read_study(study_file, ["device=cuda", "training.precision=bfloat16"]), lines.append)
    assert len(lines) == (fast == "float32")
    assert not lines or lines[0].startswith("training.precision = 'bfloat16', which this GPU emulates. Set")


@pytest.mark.parametrize("features", ["Features : fp asimd asimddp bf16 i8mm sve", None], ids=["arm", "macos"])
def test_processors_without_x86_features_use_float32(features, monkeypatch, activations):
    def read_text(path, encoding=None):
        if features is None:
            raise FileNotFoundError(path)
        return features

    settings = {"n_steps": 8, "batch_tokens": 256, "learning_rate": 5e-3}
    trained = []
    for precision in ("float32", "auto"):
        sae = make_sae("slice")
        train_on(sae, activations, TrainingSettings(**settings, precision=precision))
        trained.append(sae.decoder)
        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(runtime, "float32_stays_float32", lambda: False)  # a fast product that is bfloat16
    assert runtime.fast_precision() == "float32"
    torch.testing.assert_close(*trained)


def fail(*args, **options):
    raise FULL


@pytest.fixture
def posmask(study_file, tmp_path, monkeypatch, capsys):
    """Run the study with the command line, and return its exit code and the last line of standard error."""
    root = tmp_path / "run"

    def call():
        monkeypatch.setattr(sys, "argv", ["posmask", "run", str(study_file), "--root", str(root)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        lines = capsys.readouterr().err.splitlines()
        return ended.value.code, lines[-1] if lines else ""

    return root, call


@pytest.mark.parametrize(
    ("name", "stage", "remedy", "has_baselines"),
    [
        ("data.models.load_complete", "loading the model", "set model.precision to 'bfloat16', choose a", False),
        ("data.harvest._shard", "the harvest", "set model.precision to 'bfloat16', or lower", False),
        ("evaluation.suite._pooled_vectors", "the evaluation", "lower evaluation.probe_train or --jobs", False),
        ("training.fast_loss.fast_gradients", "training", "lower training.batch_tokens, sae.d_sae", True),
        ("evaluation.suite._heldout", "the evaluation", "finish on the CPU with --set device=cpu", True),
    ],
)
def test_lack_of_memory_names_its_stage_and_what_to_lower(name, stage, remedy, has_baselines, posmask, monkeypatch):
    root, call = posmask
    monkeypatch.setattr(f"posmask.{name}", fail)
    code, line = call()
    assert code == 1
    assert line.startswith(f"posmask: memory ran out in {stage} (it tried to allocate 20.00 GiB): ")
    assert remedy in line
    assert line.endswith("then repeat the command; it resumes from what is finished")
    assert (layout.cell_folder(root, layout.BASELINES) / "manifest.json").exists() == has_baselines


def test_an_sae_that_does_not_fit_on_the_device_is_named(posmask, monkeypatch):
    monkeypatch.setattr(SparseAutoencoder, "to", fail)
    code, line = posmask[1]()
    assert (code, line.partition(" (")[0]) == (1, "posmask: memory ran out in training")


def test_other_errors_of_a_stage_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shape"), devices.memory_for("training", "lower it"):
        raise RuntimeError("shape mismatch")
    for error in (MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), FULL):
        with pytest.raises(OutOfMemory, match="ran out in training"), devices.memory_for("training", "lower it"):
            raise error
