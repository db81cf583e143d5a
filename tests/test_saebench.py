import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from posmask.errors import BadSetting
from posmask.interop.saebench import KS, EvalConfig, EvalRun, eval_file_name, eval_output, write_eval_output

DATA = Path(__file__).parent / "data"
SCHEMA = json.loads((DATA / "eval_output_schema_sparse_probing.json").read_text(encoding="utf8"))
STREAM = json.loads((DATA / "saebench_probing.json").read_text(encoding="utf8"))["stream"]
CONFIG = EvalConfig(dataset_names=("one", "two"), k_values=(1, 2, 5), model_name="toy", llm_dtype="float32")
RUN = EvalRun("an-id", 1_700_000_000_000, "me/sae", {"d_sae": 96})


def recorded(source):
    """Return the accuracies recorded from SAEBench."""
    return {
        (probe["dataset"], probe["class"], probe["k"] or "all"): probe["accuracy"]
        for probe in STREAM["probes"]
        if probe["source"] == source
    }


def test_means_equal_those_of_sae_bench():
    output = eval_output(recorded("llm"), recorded("sae"), CONFIG, RUN)
    metrics = output["eval_result_metrics"]
    means = {key: value for source in ("llm", "sae") for key, value in metrics[source].items() if value is not None}
    assert means == {key: value for key, value in STREAM["means"].items() if not isinstance(value, dict)}
    for detail in output["eval_result_details"]:
        means = {key: value for key, value in detail.items() if value is not None and key != "dataset_name"}
        assert means == STREAM["means"][detail["dataset_name"]]
    assert output["eval_result_unstructured"]["two_results"]["sae_top_5_test_accuracy"] == {
        label: recorded("sae")["two", label, 5] for label in "01234"
    }


def test_output_has_exactly_the_fields_of_the_sae_bench_schema():
    output = eval_output(recorded("llm"), recorded("sae"), CONFIG, RUN)
    jsonschema.validate(json.loads(json.dumps(output)), SCHEMA)
    parts = SCHEMA["$defs"]
    for part, schema in [
        (output, SCHEMA),
        (output["eval_config"], parts["SparseProbingEvalConfig"]),
        (output["eval_result_metrics"]["llm"], parts["SparseProbingLlmMetrics"]),
        (output["eval_result_metrics"]["sae"], parts["SparseProbingSaeMetrics"]),
        (output["eval_result_details"][1], parts["SparseProbingResultDetail"]),
    ]:
        assert list(part) == list(schema["properties"])
    assert set(KS) == {
        int(name.split("_")[2]) for name in parts["SparseProbingLlmMetrics"]["properties"] if "top" in name
    }


def test_defaults_equal_those_of_sae_bench():
    defaults = EvalConfig().model_dump(mode="json")
    for name, field in SCHEMA["$defs"]["SparseProbingEvalConfig"]["properties"].items():
        if "default" in field:
            assert defaults[name] == field["default"]


def test_k_without_a_field_is_omitted_and_missing_sae_probes_are_null():
    config = EvalConfig(dataset_names=("one",), k_values=(1, 3))
    accuracies = {("one", label, k): 0.75 for label in "ab" for k in (1, 3)}
    llm = accuracies | {("one", label, "all"): 0.5 for label in "ab"}
    output = eval_output(llm, accuracies, config, RUN)
    jsonschema.validate(json.loads(json.dumps(output)), SCHEMA)
    assert output["eval_config"]["k_values"] == [1, 3]
    assert output["eval_result_metrics"]["sae"]["sae_test_accuracy"] is None
    assert "top_3" not in json.dumps(output)


def test_files_have_the_name_and_layout_of_sae_bench(tmp_path):
    output = eval_output(recorded("llm"), recorded("sae"), CONFIG, RUN)
    path = tmp_path / eval_file_name("me/sae")
    write_eval_output(path, output)
    assert path.name == "me_sae_custom_sae_eval_results.json"
    assert json.loads(path.read_text(encoding="utf8")) == output
    write_eval_output(path, output)
    path.write_text("years of work")
    with pytest.raises(BadSetting, match="is a file, which posmask did not write"):
        write_eval_output(path, output)
    assert path.read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({("one", "0", 1): float("nan")}, r"sae accuracy nan of one, class '0', k 1 is outside 0 to 1: give fractions"),
        ({("one", "0", 1): 74.0}, r"sae accuracy 74\.0 of one"),
        ({("three", "0", 1): 0.5}, "sae accuracies of three are not of the dataset_names"),
        ({("one", "0", 10): 0.5}, "of one and k_values differ in sae_top_10_test_accuracy: give both the same k"),
        ({("two", "new", 1): 0.5}, "of two have other classes for other k"),
    ],
)
def test_inconsistent_accuracies_raise_an_error(change, message):
    with pytest.raises(BadSetting, match=message):
        eval_output(recorded("llm"), recorded("sae") | change, CONFIG, RUN)


def test_a_missing_llm_probe_and_a_time_in_another_unit_raise_an_error():
    llm = {key: value for key, value in recorded("llm").items() if key[2] != "all"}
    with pytest.raises(BadSetting, match="llm accuracies of one and k_values differ in llm_test_accuracy"):
        eval_output(llm, recorded("sae"), CONFIG, RUN)
    with pytest.raises(BadSetting, match="is not a time in milliseconds since 1970"):
        eval_output(recorded("llm"), recorded("sae"), CONFIG, replace(RUN, epoch_milliseconds=1 << 60))
