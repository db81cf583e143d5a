"""SAEBench's evaluation file for a cell, from the rows of its probes."""

import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posmask.interop import saebench
from posmask.probing import datasets
from posmask.progress import announce
from posmask.results import rows
from posmask.storage import manifest
from posmask.study.settings import MeasurementSettings

__all__ = ["write_saebench"]


def write_saebench(
    path: Path,
    study: MeasurementSettings,
    label: str,
    made_from: Mapping[str, Any],
    measures: Iterable[rows.Measure],
    baseline: list[rows.Row],
) -> None:
    """Write the probe accuracies of an SAE and of the model as SAEBench's sparse probing evaluation.

    The file is left out if an accuracy could not be computed, which it cannot represent.

    Args:
        baseline: the rows of the model's own channels.
    """
    evaluation = study.evaluation
    slices = [rows.parse_slice(row.slice) for row in baseline]
    llm = _accuracies((row.metric, where, row.value) for row, where in zip(baseline, slices, strict=True))
    sae = _accuracies(
        (measure.metric, rows.parse_slice(rows.slice_text(measure.slice or {})), measure.value) for measure in measures
    )
    without = [
        name for name in evaluation.probe_datasets if not all(name in of for of in map(_datasets_of, (llm, sae)))
    ]
    if without:
        announce(f"{label} has no {path.name}, because accuracies on {', '.join(without)} could not be computed.")
        return
    config = saebench.EvalConfig(
        random_seed=datasets.SAEBENCH_SEED,
        dataset_names=evaluation.probe_datasets,
        probe_train_set_size=evaluation.probe_train,
        probe_test_set_size=evaluation.probe_test,
        context_length=study.corpus.n_positions,
        llm_dtype=made_from["model"]["precision"],
        model_name=study.model.name,
        k_values=evaluation.ks,
    )
    identity = manifest.identity(made_from)
    # The configuration has the sizes that were requested; these are the sizes that the datasets had.
    sizes = {
        where["dataset"]: [int(where["train"]), row.n]
        for row, where in zip(baseline, slices, strict=True)
        if row.metric == "probe_accuracy" and "train" in where and "class" not in where
    }
    run = saebench.EvalRun(
        eval_id=str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        epoch_milliseconds=round(time.time() * 1000),
        sae_name=f"posmask {study.name} {label}",
        sae_id=None,
        sae_config={
            "identity": identity,
            "probe_protocol": evaluation.probe_protocol,
            "probe_texts": sizes,
            **made_from,
        },
    )
    saebench.write_eval_output(path, saebench.eval_output(llm, sae, config, run))


def _datasets_of(accuracies: saebench.Accuracies) -> set[str]:
    return {dataset for dataset, _, _ in accuracies}


def _accuracies(values: Iterable[tuple[str, Mapping[str, str], float]]) -> saebench.Accuracies:
    """Probe accuracies by dataset, class and k, with mean pooling."""
    return {
        (where["dataset"], where["class"], "all" if where["k"] == "all" else int(where["k"])): value
        for metric, where, value in values
        if metric == "probe_accuracy" and "class" in where and where["pooling"] == "mean"
    }
