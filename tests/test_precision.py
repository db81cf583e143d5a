"""Training precision `auto`: bfloat16 only where the CPU multiplies it fast, and only for selection."""

import tomllib
from pathlib import Path

import pytest
import torch

from conftest import make_sae, train_on
from posmask.kernels import runtime
from posmask.training.settings import TrainingSettings

SETTINGS = {"n_steps": 8, "batch_tokens": 256, "learning_rate": 5e-3}


def trained(activations, rule, **settings):
    sae = make_sae("slice", rule=rule)
    train_on(sae, activations, TrainingSettings(**SETTINGS, **settings))
    return torch.cat([parameter.detach().flatten() for parameter in sae.parameters()])


@pytest.mark.parametrize("path", sorted(Path("studies").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_study_trains_with_precision_auto(path):
    assert tomllib.loads(path.read_text())["training"].get("precision", "auto") == "auto"


@pytest.mark.parametrize("fast", ["float32", "bfloat16"])
def test_auto_selects_latents_in_the_fast_precision(activations, fast, monkeypatch):
    monkeypatch.setattr(runtime, "fast_precision", lambda device="cpu": fast)
    assert torch.equal(trained(activations, "topk"), trained(activations, "topk", precision=fast))


def test_auto_does_not_round_values_of_rules_without_selection(activations, monkeypatch):
    monkeypatch.setattr(runtime, "fast_precision", lambda device="cpu": "bfloat16")
    assert torch.equal(trained(activations, "relu"), trained(activations, "relu", precision="float32"))
    assert not torch.equal(trained(activations, "relu"), trained(activations, "relu", precision="bfloat16"))


def test_bfloat16_is_fast_only_on_a_cpu_with_its_instructions(monkeypatch):
    features = "flags : fpu sse4_2 avx avx2 fma"
    monkeypatch.setattr(Path, "read_text", lambda path, encoding=None: features)
    assert runtime.fast_precision() == "float32"
    features += " avx512f avx512_bf16"
    assert runtime.fast_precision() == "bfloat16"


def test_bfloat16_slowdown_is_a_ratio_of_measured_times():
    assert 0.01 < runtime.bfloat16_slowdown() < 100
