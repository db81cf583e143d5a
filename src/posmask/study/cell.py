"""Train and evaluate one cell of a study, and write its folder."""

import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posmask.data.activations import training_batches
from posmask.evaluation.suite import EvaluationData, baselines, evaluate, forgetting
from posmask.kernels import runtime
from posmask.results import rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import write_sae
from posmask.sae.rules import make_rule
from posmask.storage import layout, manifest
from posmask.study.saebench_file import write_saebench
from posmask.study.saes import untrained
from posmask.study.settings import MODEL_CELL, CellSettings, StudySettings
from posmask.study.targets import Target
from posmask.training import distributed, loop
from posmask.training.checkpoints import Checkpoints
from posmask.training.curve import write_curve
from posmask.training.settings import product_precision
from posmask.training.trackers import curve_writer

__all__ = ["evaluate_to_folder", "fill", "train_cell"]

CHECKPOINT_SECONDS = 90.0


def train_cell(
    study: StudySettings,
    target: Target,
    sae: SparseAutoencoder,
    data: EvaluationData,
    processes: distributed.Distributed | None = None,
    *,
    keeps_end: bool = False,
) -> loop.Trained:
    """Train a cell's SAE, or this process's part of it, from its last checkpoint on.

    Args:
        keeps_end: leave a checkpoint after the last step, for another process to evaluate from.
    """
    assert target.cell is not None
    settings = study.training.model_copy(update={"n_steps": study.n_steps(target.cell)})
    n_steps_of_source = round(target.cell.step_fraction * study.training.n_steps) - settings.n_steps
    checkpoints = Checkpoints(target.checkpoints, target.made_from, CHECKPOINT_SECONDS, keeps_end=keeps_end)
    batches = training_batches(
        data.training,
        settings.batch_tokens,
        settings.n_steps - checkpoints.done,
        target.seed,
        after=n_steps_of_source + checkpoints.done,
        token_indices=None if processes is None else processes.token_indices,
        device=sae.encoder.device,
    )
    track = study.track if processes is None or processes.leads else None
    with curve_writer(track, target.root, study.name, target.label, target.made_from) as write:
        return loop.train(
            sae,
            batches,
            settings,
            target.label,
            on_point=write,
            checkpoints=checkpoints,
            processes=processes,
        )


def fill(study: StudySettings, target: Target, data: EvaluationData, baseline: list[rows.Row]) -> None:
    """Make the folder of the baselines, or train a cell, evaluate it and write its folder.

    Args:
        baseline: the rows of the baselines; empty for the baselines themselves.
    """
    with manifest.write_folder(target.folder, target.made_from, **_manifest_facts(study, target)) as draft:
        (draft / layout.SETTINGS_FILE).write_text(manifest.as_json(target.made_from), encoding="utf8")
        if target.cell is None:
            columns = {"cell": MODEL_CELL, "mask": "none", "budget": "", "gating": "", "seed": 0}
            _write_measures(draft, baselines(data), columns)
        else:
            _train_and_evaluate(study, target, target.cell, data, baseline, draft)
    runtime.give_back_freed_memory()


def _train_and_evaluate(
    study: StudySettings,
    target: Target,
    cell: CellSettings,
    data: EvaluationData,
    baseline: list[rows.Row],
    draft: Path,
) -> None:
    sae, n_tokens_before = untrained(study, target, data.training)
    trained = train_cell(study, target, sae, data)
    runtime.give_back_freed_memory()
    write_curve(draft / layout.CURVE_FILE, trained.curve)
    trained.snapshots.write(draft / layout.SNAPSHOTS_FILE, study.training.batch_tokens)
    n_tokens = n_tokens_before + trained.n_tokens
    model = target.made_from["model"]
    origin = {
        "model": study.model.name,
        "weights": model["weights"],
        "layer": model["layer"],
        "site": study.model.site,
        "training_tokens": n_tokens,
    }
    write_sae(sae, draft, origin)
    columns = {"cell": cell.name, "budget": cell.budget, "seed": target.seed}
    evaluate_to_folder(study, target, sae, data, baseline, draft, columns, trained=trained, n_tokens=n_tokens)


def evaluate_to_folder(
    study: StudySettings,
    target: Target,
    sae: SparseAutoencoder,
    data: EvaluationData,
    baseline: list[rows.Row],
    draft: Path,
    columns: Mapping[str, Any],
    *,
    trained: loop.Trained | None = None,
    n_tokens: int = 0,
) -> None:
    """Evaluate an SAE and write its rows, units, latents and SAEBench file.

    Args:
        columns: of its rows: cell, budget and seed.
        trained: its training, if the study trained it on `n_tokens` in all.
    """
    started = time.perf_counter()
    measures, latents = evaluate(sae, None if trained is None else trained.dead, data, target.label)
    evaluate_seconds = time.perf_counter() - started
    latents.write(draft, data.tokenizer)
    if trained is not None:
        measures = [
            rows.Measure("train_seconds", trained.seconds, n=1),
            rows.Measure("evaluate_seconds", evaluate_seconds, n=1),
            rows.Measure("train_tokens", n_tokens, n=1),
            rows.Measure("d_sae", sae.d_sae, n=1),
            *measures,
        ]
    if target.cell is not None and target.cell.measure_forgetting:
        measures += forgetting(sae, data, study.training, target.seed, target.label)
    if study.evaluation.probe_datasets:
        path = draft / layout.SAEBENCH_FILE
        write_saebench(path, study, target.label, target.made_from, measures, baseline)
    mask = sae.mask.settings
    _write_measures(draft, measures, {**columns, "mask": mask.kind, "gating": mask.gating})


def _write_measures(draft: Path, measures: list[rows.Measure], columns: Mapping[str, Any]) -> None:
    table = [rows.Row.of(measure, **columns) for measure in measures]
    rows.write_rows(draft / layout.ROWS_FILE, table)
    rows.write_units(draft / layout.UNITS_FILE, measures)


def _manifest_facts(study: StudySettings, target: Target) -> dict[str, Any]:
    """Facts in the manifest that are not part of the identity: package versions and the precision of training."""
    packages = ("posmask", "torch", "transformers", "numpy")
    facts: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in packages}}
    if target.cell is not None:
        rule = make_rule(study.sae.rule, study.width(target.cell))
        facts["training_precision"] = product_precision(study.training, rule, study.device)
    return facts
