"""sae-bench in its own environment: it reproduces the recorded fixture and reads the files that posmask writes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from posmask.interop.saebench import write_eval_output
from test_saebench import CONFIG, RUN, SCHEMA, eval_output, recorded

PYTHON = os.environ.get("POSMASK_SAEBENCH_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON, reason="POSMASK_SAEBENCH_PYTHON is not set to a Python with sae-bench"),
]
HERE = Path(__file__).parent
FIXTURE = HERE.parent / "data" / "saebench_probing.json"


def test_sae_bench_reproduces_the_recorded_fixture(tmp_path):
    path = tmp_path / "again.json"
    subprocess.run([PYTHON, HERE / "record_saebench.py", path], check=True, capture_output=True, text=True)
    again, recorded = (json.loads(file.read_text(encoding="utf8")) for file in (path, FIXTURE))
    for case in ("each_k", "stream"):
        for probe in (probes := again[case].pop("probes")):
            probe["accuracy"] = pytest.approx(probe["accuracy"], abs=1e-6)
            if "epoch_accuracies" in probe:
                probe["epoch_accuracies"] = pytest.approx(probe["epoch_accuracies"], abs=1e-6)
        assert recorded[case].pop("probes") == probes
    assert recorded == again, "recorded with other versions, seeds or activations: record the fixture again"


READ_WITH_SAE_BENCH = """
import importlib.resources, json, sys
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
output = SparseProbingEvalOutput(**json.load(open(sys.argv[1])))
package = importlib.resources.files("sae_bench") / "evals" / "sparse_probing"
schema = json.loads((package / "eval_output_schema_sparse_probing.json").read_text())
print(json.dumps({"output": json.loads(output.to_json()), "schema": schema}))
"""


def test_sae_bench_reads_our_output_and_writes_it_unchanged(tmp_path):
    path = tmp_path / "eval.json"
    output = eval_output(recorded("llm"), recorded("sae"), CONFIG, RUN)
    write_eval_output(path, output)
    command = [PYTHON, "-c", READ_WITH_SAE_BENCH, path]
    environment = os.environ | {"JAXTYPING_DISABLE": "1"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    written = json.loads(result.stdout.splitlines()[-1])
    assert written["output"] == output
    assert list(written["output"]) == list(output)
    assert facts(written["schema"]) == {key: value for key, value in SCHEMA.items() if key != "$comment"}


def facts(schema):
    """Remove descriptive fields from a schema."""
    if isinstance(schema, list):
        return [facts(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    descriptive = ("description", "title", "ui_default_display")
    return {key: facts(value) for key, value in schema.items() if key not in descriptive or isinstance(value, dict)}
