"""The recorded fixture is what sae-bench does: recorded once more in its environment, it comes out the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("POSMASK_SAEBENCH_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON, reason="POSMASK_SAEBENCH_PYTHON names no Python with sae-bench"),
]
HERE = Path(__file__).parent
FIXTURE = HERE.parent / "data" / "saebench_probing.json"


def test_fixture_is_what_sae_bench_does(tmp_path):
    path = tmp_path / "again.json"
    subprocess.run([PYTHON, HERE / "record_saebench.py", path], check=True, capture_output=True, text=True)
    again, recorded = (json.loads(file.read_text(encoding="utf8")) for file in (path, FIXTURE))
    for case in ("each_k", "stream"):
        for probe in (found := again[case].pop("probes")):
            probe["accuracy"] = pytest.approx(probe["accuracy"], abs=1e-6)
            if "epoch_accuracies" in probe:
                probe["epoch_accuracies"] = pytest.approx(probe["epoch_accuracies"], abs=1e-6)
        assert recorded[case].pop("probes") == found
    assert recorded == again, "recorded with other versions, seeds or activations: record anew"
