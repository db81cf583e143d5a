"""The performance page agrees with results.json, whose rows are complete."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKS = {
    "topk-float32",
    "topk-bf16-select",
    "mask-cohort",
    "mask-slice",
    "mask-contiguous",
    "mask-hard",
    "batchtopk",
    "jumprelu",
    "gated",
    "matryoshka",
    "relu-l1-float32",
    "relu-l1-bf16",
    "harvest-float32",
    "harvest-bf16",
    "probing",
}


def results():
    return json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf8"))


def test_every_benchmark_has_a_ratio_with_its_range():
    measured = results()
    assert {row["work"] for row in measured["ratios"]} == WORKS
    for row in measured["ratios"]:
        assert row["low"] <= row["high"]
        for ratio in (row["ratio"], row["peer_ms"] / row["ours_ms"]):  # medians of ratios or times, near the rounds'
            assert 0.9 * row["low"] <= ratio <= 1.1 * row["high"]
    assert {"processor", "cores"} <= set(measured["machine"])
    assert {"torch", "sae-lens", "eai-sparsify", "dictionary-learning", "overcomplete"} <= set(measured["versions"])


def test_the_tables_of_the_page_are_generated_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("tables")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf8")
    for name, text in module.tables(results()).items():
        assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in page, name
