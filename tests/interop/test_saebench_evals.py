"""SAEBench's results for exported SAEs equal those for the same SAEs after SAELens's `fold_W_dec_norm`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from stand_ins import MASKS, write_data_sets, write_model, write_saes

PYTHON = os.environ.get("POSMASK_SAEBENCH_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="POSMASK_SAEBENCH_PYTHON is not set to a Python with sae-bench"),
]
HERE = Path(__file__).parent
EVALUATIONS = ["core", "sparse_probing", "scr", "tpp", "absorption", "unlearning", "ravel", "autointerp"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saebench")
    write_model(folder / "gpt2")
    write_data_sets(folder)
    write_saes(folder)
    environment = os.environ | {"JAXTYPING_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment |= {"PYTHONPATH": str(HERE.parent.parent / "src"), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, HERE / "run_saebench_evals.py", "results.json", *EVALUATIONS]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "results.json").read_text(encoding="utf8"))


def test_sae_bench_reproduces_the_recorded_hooks(tmp_path):
    path, fixture = tmp_path / "again.json", HERE.parent / "data" / "saebench_hooks.json"
    environment = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": str(HERE.parent.parent / "src")}
    command = [PYTHON, HERE / "record_saebench_hooks.py", path]
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    again, recorded = (json.loads(file.read_text(encoding="utf8")) for file in (path, fixture))
    assert again.pop("version") == recorded.pop("version")
    assert numbers(again) == pytest.approx(numbers(recorded), rel=1e-4, abs=1e-4)


def numbers(metrics, path=""):
    """Return every number in nested metrics by its path."""
    if isinstance(metrics, dict):
        return {key: value for name, part in metrics.items() for key, value in numbers(part, f"{path}/{name}").items()}
    if isinstance(metrics, list):
        return numbers(dict(enumerate(metrics)), path)
    return {} if metrics is None else {path: metrics}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("form", ["", "-lossy"])
@pytest.mark.parametrize("mask", MASKS)
def test_results_equal_those_of_the_folded_sae(results, mask, form, evaluation):
    as_it_is, folded = results[mask + form][evaluation], results[f"{mask}{form}-folded"][evaluation]
    assert not isinstance(as_it_is, str), as_it_is
    assert numbers(as_it_is) == pytest.approx(numbers(folded), rel=1e-3, abs=1e-5)


def test_the_example_sets_the_side_of_the_padding(results):
    assert results["padding_side"] == ["left", "right"]


@pytest.mark.parametrize("mask", MASKS)
def test_results_are_not_trivial(results, mask):
    result = results[mask]
    assert result["core"]["reconstruction_quality"]["explained_variance"] > 0.85
    assert 0.8 < result["sparse_probing"]["sae_top_1_test_accuracy"] < 1
    assert result["tpp"]["tpp_metrics"]["tpp_threshold_10_total_metric"] > 0.2
    assert result["scr"]["scr_metrics"]["scr_metric_threshold_10"] > 0.3
    assert 0.1 < result["absorption"]["mean_full_absorption_score"] < 1
    assert result["unlearning"]["change"] > 10
    assert result["ravel"]["change"] > 1
    assert 0.3 < result["autointerp"]["autointerp_score"] < 1
