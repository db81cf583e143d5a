"""A study on a real Ray cluster gives the same results as in one process, even if workers and nodes die.

Clusters run in separate processes, because Ray changes the signal handlers and warnings of its process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_texts
from posmask.errors import MissingExtra
from posmask.study import ray_engine
from posmask.study.study_file import read_study
from test_parallel import STUDY

MORE_CELLS = """
[[cells]]
name = "open"
mask = { kind = "open" }
[[cells]]
name = "half"
mask = { kind = "open" }
step_fraction = 0.5
[[cells]]
name = "started"
mask = { kind = "slice", n_slices = 4 }
budget = "compute"
init_from = "half"
"""
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def study_file(tmp_path, model_folder):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1200)))
    path = tmp_path / "tiny.toml"
    study = STUDY.replace("MODEL", str(model_folder)).replace("TEXTS", str(tmp_path / "texts.jsonl"))
    path.write_text(study + MORE_CELLS)
    return path


def rows_of(root):
    return [line for line in (root / "results.csv").read_text().splitlines() if "_seconds" not in line]


def weights_of(root):
    return {file.parent.name: file.read_bytes() for file in root.glob("cells/*/sae.safetensors")}


def command(*words):
    return subprocess.run([sys.executable, *map(str, words)], env=HERE, capture_output=True, text=True, check=False)


def test_missing_ray_raises_an_error_with_the_pip_command(monkeypatch, study_file):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingExtra, match=r"pip install 'posmask\[ray\]'"),
        ray_engine.connected(read_study(study_file), 1),
    ):
        pass


@pytest.mark.slow
def test_an_unreachable_cluster_is_reported_without_traceback(study_file, tmp_path):
    words = ["import os; os.environ['RAY_ADDRESS'] = '127.0.0.1:1'; from posmask.cli import main; main()"]
    result = command("-c", *words, "run", study_file, "--root", tmp_path / "run", "--engine", "ray")
    assert result.returncode == 2
    assert "no Ray cluster can be reached" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_error_on_a_worker_is_reported_without_traceback(study_file, tmp_path):
    study_file.write_text(study_file.read_text().replace("learning_rate = 5e-3", "learning_rate = 1e9"))
    result = command(
        "-m", "posmask.cli", "run", study_file, "--root", tmp_path / "run", "--engine", "ray", "--jobs", "2"
    )
    assert result.returncode == 1
    assert "lower learning_rate = 1000000000.0" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_results_are_unchanged_if_workers_and_a_node_die(study_file, tmp_path):
    """Of three nodes, a worker is killed while it trains, another while it evaluates, and then a complete node."""
    alone = command("-m", "posmask.cli", "run", study_file, "--root", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    result = command(Path(__file__).parent / "on_a_dying_cluster.py", study_file, tmp_path / "cluster")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["train", "evaluate", "node"]
    assert rows_of(tmp_path / "cluster") == rows_of(tmp_path / "alone")
    assert weights_of(tmp_path / "cluster") == weights_of(tmp_path / "alone")
    assert len(weights_of(tmp_path / "alone")) == 4
