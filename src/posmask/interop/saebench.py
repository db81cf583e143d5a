"""Write probe accuracies in the file format of SAEBench's sparse probing evaluation, field for field.

Source: sae-bench 0.6.0, evals/sparse_probing/{main,eval_config,eval_output}.py. The package is not needed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from posmask.errors import BadSetting
from posmask.probing.saebench_datasets import HUB_DATASETS
from posmask.storage.atomic import check_file

__all__ = ["KS", "Accuracies", "EvalConfig", "EvalRun", "eval_file_name", "eval_output", "write_eval_output"]

KS = (1, 2, 5, 10, 20, 50, 100)
"""The k for which SAEBench's format has fields. Other k are only in the rows of posmask."""

Accuracies = Mapping[tuple[str, str, int | str], float]
"""(dataset, class, k) -> test accuracy of that class's probe; k is "all" for the probe on every feature."""


class EvalConfig(BaseModel):
    """SAEBench's `eval_config`, with its names, order and defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    random_seed: int = 42
    """Seed of the choice of texts."""
    dataset_names: tuple[str, ...] = tuple(HUB_DATASETS)
    """Datasets, by their names on the hub."""
    probe_train_set_size: int = 4000
    """Texts per probe for training, half of them of its class."""
    probe_test_set_size: int = 1000
    """Texts per probe for the test, half of them of its class."""
    context_length: int = 128
    """Tokens per text, including BOS."""
    sae_batch_size: int = Field(default=125, gt=0)
    """Texts per batch of the SAE."""
    llm_batch_size: int | None = None
    """Texts per batch of the model; None if SAEBench chooses it."""
    llm_dtype: str = ""
    """Number format of the model, such as bfloat16."""
    model_name: str = ""
    """Name of the model in TransformerLens."""
    k_values: tuple[int, ...] = (1, 2, 5)
    """Numbers of latents per probe."""
    lower_vram_usage: bool = False
    """Whether SAEBench omits the probe on all latents."""


@dataclass(frozen=True)
class EvalRun:
    """Identity of an evaluation: the fields of SAEBench's output besides settings and results.

    Attributes:
        eval_id: identifier of the evaluation.
        epoch_milliseconds: time of the evaluation in milliseconds since 1970.
        sae_name: value of `sae_lens_release_id`, as SAEBench fills it for an SAE that is passed as an object.
        sae_config: value of `sae_cfg_dict`.
        sae_id: value of `sae_lens_id`, as SAEBench fills it for an SAE that is passed as an object.
        sae_lens_version: version of SAELens that ran; None if none did.
        commit: commit of SAEBench that ran; "Unknown" if none did.
    """

    eval_id: str
    epoch_milliseconds: int
    sae_name: str
    sae_config: Mapping[str, Any]
    sae_id: str | None = "custom_sae"
    sae_lens_version: str | None = None
    commit: str = "Unknown"


def eval_output(
    llm: Accuracies,
    sae: Accuracies,
    config: EvalConfig,
    run: EvalRun,
) -> dict[str, Any]:
    """Return SAEBench's output: each accuracy is a mean over the classes of a dataset, then over datasets, unweighted.

    Args:
        llm: accuracies of probes on the model's channels, for each dataset and k of `config`, and "all".
        sae: accuracies of probes on latents, for the same; "all" may be missing.
        config: settings of the evaluation.
        run: identity of the evaluation.

    Raises:
        BadSetting: an accuracy is missing or out of range, or SAEBench cannot read the time.
    """
    if not 0 <= run.epoch_milliseconds <= 9_999_999_999_999:
        raise BadSetting(f"{run.epoch_milliseconds} is not a time in milliseconds since 1970: multiply seconds by 1000")
    classes = _by_metric(llm, "llm", config), _by_metric(sae, "sae", config)
    per_dataset = [
        {name: {metric: _mean(by_class) for metric, by_class in source[name].items()} for name in config.dataset_names}
        for source in classes
    ]
    return {
        "eval_type_id": "sparse_probing",
        "eval_config": config.model_dump(mode="json"),
        "eval_id": run.eval_id,
        "datetime_epoch_millis": run.epoch_milliseconds,
        "eval_result_metrics": {
            source: _fields(source) | _over_datasets(datasets)
            for source, datasets in zip(("llm", "sae"), per_dataset, strict=True)
        },
        "eval_result_details": [
            {"dataset_name": f"{name}_results"}
            | _fields("llm")
            | _fields("sae")
            | per_dataset[0][name]
            | per_dataset[1][name]
            for name in config.dataset_names
        ],
        "sae_bench_commit_hash": run.commit,
        "sae_lens_id": run.sae_id,
        "sae_lens_release_id": run.sae_name,
        "sae_lens_version": run.sae_lens_version,
        "sae_cfg_dict": dict(run.sae_config),
        "eval_result_unstructured": {
            f"{name}_results": classes[0][name] | classes[1][name] for name in config.dataset_names
        },
    }


def write_eval_output(path: Path, output: Mapping[str, Any]) -> None:
    """Write the result of `eval_output` with SAEBench's indentation.

    Raises:
        BadSetting: a file that is not such an evaluation exists.
    """
    check_file(path, b'"eval_type_id":')
    path.write_text(json.dumps(output, indent=2, default=str), encoding="utf8")


def eval_file_name(sae_name: str, sae_id: str = "custom_sae") -> str:
    """Return the file name under which SAEBench looks for a finished evaluation.

    >>> eval_file_name("me/sae")
    'me_sae_custom_sae_eval_results.json'
    """
    return f"{sae_name}_{sae_id}_eval_results.json".replace("/", "_")


def _metric(source: str, k: int | str) -> str:
    return f"{source}_test_accuracy" if k == "all" else f"{source}_top_{k}_test_accuracy"


def _fields(source: str) -> dict[str, float | None]:
    return {_metric(source, k): None for k in ("all", *KS)}


def _by_metric(accuracies: Accuracies, source: str, config: EvalConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Return a map dataset -> metric -> class -> accuracy, for each k that has fields."""
    by_dataset: dict[str, dict[str, dict[str, float]]] = {name: {} for name in config.dataset_names}
    for (name, label, k), accuracy in accuracies.items():
        if not (math.isfinite(accuracy) and 0 <= accuracy <= 1):
            raise BadSetting(
                f"{source} accuracy {accuracy} of {name}, class {label!r}, k {k} is outside 0 to 1: give fractions"
            )
        if name not in by_dataset:
            raise BadSetting(f"{source} accuracies of {name} are not of the dataset_names: add it, or leave them out")
        if k == "all" or k in KS:
            by_dataset[name].setdefault(_metric(source, k), {})[label] = accuracy
    has_all = source == "llm" or any(k == "all" for _, _, k in accuracies)
    wanted = {_metric(source, k) for k in (*config.k_values, *(("all",) if has_all else ())) if k == "all" or k in KS}
    for name, metrics in by_dataset.items():
        if set(metrics) != wanted:
            differing = ", ".join(sorted(wanted ^ set(metrics)))
            raise BadSetting(f"{source} accuracies of {name} and k_values differ in {differing}: give both the same k")
        if len({frozenset(labels) for labels in metrics.values()}) > 1:
            raise BadSetting(f"{source} accuracies of {name} have other classes for other k: give all classes every k")
    return by_dataset


def _mean(by_class: Mapping[str, float]) -> float:
    return sum(by_class.values()) / len(by_class)


def _over_datasets(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    parts: Sequence[Mapping[str, float]] = list(datasets.values())
    return {metric: sum(part[metric] for part in parts) / len(parts) for metric in parts[0]}
