"""The examples of docs/saelens.md run in SAEDashboard, nnsight, delphi and dictionary_learning, with equal codes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from stand_ins import MASKS, write_data_sets, write_model, write_saes

from conftest import RULES

PYTHONS = {
    "SAEDashboard": os.environ.get("POSMASK_TOOLS_PYTHON"),
    "nnsight": os.environ.get("POSMASK_TOOLS_PYTHON"),
    "delphi": os.environ.get("POSMASK_TOOLS_PYTHON"),
    "dictionary_learning": os.environ.get("POSMASK_DICTIONARY_LEARNING_PYTHON"),
}
pytestmark = [pytest.mark.interop, pytest.mark.slow]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    write_model(folder / "gpt2")
    write_data_sets(folder)
    write_saes(folder)
    return folder


@pytest.fixture
def run(request):
    def run(tool):
        if not PYTHONS[tool]:
            pytest.skip(f"the variable for {tool} is not set, see tests/interop/README.md")
        folder = request.getfixturevalue("folder")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(HERE.parent.parent / "src"), "WANDB_MODE": "disabled"}
        command = [PYTHONS[tool], HERE / "run_in_tools.py", f"{tool}.json", tool]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads((folder / f"{tool}.json").read_text(encoding="utf8"))[tool]

    return run


def test_sae_dashboard_shows_the_codes_of_every_export(run):
    result = run("SAEDashboard")
    assert set(result) == {name + form for name in {*MASKS, *RULES} - {"topk"} for form in ("", "-lossy")}
    for name, measures in result.items():
        assert measures["shown value that is no code"] < 1e-3, name
        assert measures["missing from the largest"] < 1e-3, name
        assert measures["difference of frequency"] < 1e-4, name
        assert measures["page"], name
    assert sum(measures["n_codes"] > 0 for measures in result.values()) > len(result) / 2


def test_nnsight_encodes_padded_texts_and_generated_tokens(run):
    result = run("nnsight")
    assert result.pop("padding") > 0
    assert max(result.values()) < 1e-4


def test_delphi_caches_the_codes(run):
    result = run("delphi")
    assert result["difference"] < 1e-4
    assert len(result["files"]) == 4


def test_dictionary_learning_evaluates_the_codes(run):
    result = run("dictionary_learning")
    assert result["codes"] < 1e-4
    assert result["padded texts"] < 1e-4
    assert result["measures"] == pytest.approx(result["expected"], rel=1e-4)
    assert all(0 < loss < 20 for loss in result["losses"])
