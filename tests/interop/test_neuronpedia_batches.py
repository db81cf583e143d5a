"""SAEDashboard reads exported latents as its own batches, and the schema of the other tests is its schema."""

import json
import os
import subprocess

import pytest

from posmask.interop.neuronpedia import export_neuronpedia
from test_neuronpedia import SCHEMA, write_cell

PYTHON = os.environ.get("POSMASK_TOOLS_PYTHON")
pytestmark = pytest.mark.interop
CODE = """
import inspect, json, sys
from sae_dashboard.neuronpedia.neuronpedia_dashboard import (
    NeuronpediaDashboardActivation, NeuronpediaDashboardBatch, NeuronpediaDashboardFeature
)
kinds = NeuronpediaDashboardBatch, NeuronpediaDashboardFeature, NeuronpediaDashboardActivation
def type_of(annotation):
    text = str(annotation)
    return text.replace("typing.", "") if "[" in text else annotation.__name__
types = [{name: p.annotation for name, p in inspect.signature(kind).parameters.items()} for kind in kinds]
schema = [{name: type_of(type[name]) for name in kind().to_dict()} for kind, type in zip(kinds, types)]
with open(sys.argv[1], encoding="utf8") as file:
    values = json.load(file)
print(json.dumps([NeuronpediaDashboardBatch(**values).to_dict() == values, *schema]))
"""


@pytest.mark.skipif(not PYTHON, reason="POSMASK_TOOLS_PYTHON is not set, see tests/interop/README.md")
def test_sae_dashboard_reads_exported_latents(tmp_path):
    write_cell(tmp_path / "cell")
    export_neuronpedia(tmp_path / "cell", tmp_path / "out")
    command = [PYTHON, "-c", CODE, tmp_path / "out" / "batch-0.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    is_equal, batch, feature, activation = json.loads(result.stdout)
    assert is_equal
    assert batch.pop("features") == feature.pop("activations") == "list[dict[str, Any]]"
    assert {"batch": batch, "feature": feature, "activation": activation} == SCHEMA
