"""Train and evaluate one cell of a study, and write its folder."""

import importlib.metadata
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.data.activations import training_batches
from posmask.evaluation.controls import controls_of
from posmask.evaluation.suite import EvaluationData, baselines, evaluate, forgetting
from posmask.kernels import runtime
from posmask.results import rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae, write_sae
from posmask.sae.rules import make_rule
from posmask.storage import layout, manifest
from posmask.storage.json_file import read_json
from posmask.study.saebench_file import write_saebench
from posmask.study.saes import read_init, untrained
from posmask.study.settings import MODEL_CELL, MeasurementSettings, StudySettings
from posmask.study.targets import Target, trained_before, training_part
from posmask.training import distributed, loop
from posmask.training.checkpoints import Checkpoints
from posmask.training.curve import write_curve
from posmask.training.settings import product_precision
from posmask.training.trackers import curve_writer

__all__ = ["evaluate_to_folder", "fill", "fill_baselines", "train_cell"]

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
    checkpoints = Checkpoints(
        target.checkpoints, training_part(target.made_from), CHECKPOINT_SECONDS, keeps_end=keeps_end
    )
    batches = training_batches(
        data.training,
        settings.batch_tokens,
        settings.n_steps - checkpoints.done,
        target.seed,
        after=n_steps_of_source + checkpoints.done,
        token_indices=None if processes is None else processes.token_indices,
        pairs=sae.rule.pairs_tokens,
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


def fill_baselines(study: MeasurementSettings, target: Target, data: EvaluationData) -> None:
    """Make the folder of the baselines: what the model itself does on the same texts and tasks."""
    with manifest.write_folder(target.folder, target.made_from, versions=_versions()) as draft:
        (draft / layout.SETTINGS_FILE).write_text(manifest.as_json(target.made_from), encoding="utf8")
        columns = {"cell": MODEL_CELL, "mask": "none", "budget": "", "gating": "", "seed": 0}
        _write_measures(draft, baselines(data), columns)
    runtime.give_back_freed_memory()


def fill(study: StudySettings, target: Target, data: EvaluationData, baseline: list[rows.Row]) -> None:
    """Make the folder of the baselines, or train a cell, evaluate it and write its folder.

    If an earlier folder of the cell has the same training, its SAE is evaluated instead of training another.

    Args:
        baseline: the rows of the baselines; empty for the baselines themselves.
    """
    if target.cell is None:
        fill_baselines(study, target, data)
        return
    earlier = trained_before(target, verify=True)
    facts = {"versions": _versions(), "training_precision": _training_precision(study, target, earlier)}
    with manifest.write_folder(target.folder, target.made_from, **facts) as draft:
        (draft / layout.SETTINGS_FILE).write_text(manifest.as_json(target.made_from), encoding="utf8")
        if earlier is None:
            sae, training = _train(study, target, data, draft)
        else:
            sae, training = _copy_training(earlier, draft)
            sae.to(study.device)
        columns = {"cell": target.cell.name, "budget": target.cell.budget, "seed": target.seed}

        def measure_forgetting() -> list[rows.Measure]:
            return forgetting(sae, data, study.training, target.seed, target.label)

        further = {"forgetting": measure_forgetting} if target.cell.measure_forgetting else {}
        evaluate_to_folder(study, target, sae, data, baseline, draft, columns, training, further)
    runtime.give_back_freed_memory()


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a finished training that the evaluation reports.

    Attributes:
        dead: the latents that were dead at its end.
        n_tokens: training tokens, with those of the SAE that it started from.
        seconds: duration of the training.
        earlier: the folder of an earlier evaluation of the SAE; parts that would be the same are taken from it.
    """

    dead: Bool[Tensor, " latent"]
    n_tokens: int
    seconds: float
    earlier: Path | None = None


def _train(
    study: StudySettings, target: Target, data: EvaluationData, draft: Path
) -> tuple[SparseAutoencoder, TrainingFacts]:
    """Train a cell's SAE, and write it and the records of its training."""
    sae, n_tokens_before = untrained(study, target, data.training)
    trained = train_cell(study, target, sae, data)
    runtime.give_back_freed_memory()
    write_curve(draft / layout.CURVE_FILE, trained.curve)
    trained.snapshots.write(draft / layout.SNAPSHOTS_FILE, study.training.batch_tokens)
    save_file({"dead": trained.dead.cpu()}, draft / layout.DEAD_FILE)
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
    return sae, TrainingFacts(trained.dead, n_tokens, trained.seconds)


_TRAINING_FILES = (
    layout.WEIGHTS_FILE,
    layout.SAE_FILE,
    layout.OPENNESS_FILE,
    layout.CURVE_FILE,
    layout.SNAPSHOTS_FILE,
    layout.DEAD_FILE,
)


def _copy_training(earlier: Path, draft: Path) -> tuple[SparseAutoencoder, TrainingFacts]:
    """Copy a trained SAE and the records of its training from a finished folder."""
    for name in _TRAINING_FILES:
        if (earlier / name).exists():
            shutil.copyfile(earlier / name, draft / name)
    (seconds,) = (row.value for row in rows.read_rows(earlier / layout.ROWS_FILE) if row.metric == "train_seconds")
    dead = load_file(draft / layout.DEAD_FILE)["dead"]
    return read_sae(draft), TrainingFacts(dead, read_origin(draft)["training_tokens"], seconds, earlier)


def evaluate_to_folder(
    study: MeasurementSettings,
    target: Target,
    sae: SparseAutoencoder,
    data: EvaluationData,
    baseline: list[rows.Row],
    draft: Path,
    columns: Mapping[str, Any],
    training: TrainingFacts | None = None,
    further: Mapping[str, Callable[[], list[rows.Measure]]] | None = None,
) -> None:
    """Evaluate an SAE and write its rows, units, latents and SAEBench file.

    Args:
        columns: of its rows: cell, budget and seed.
        training: its training, if the study trained it.
        further: parts of the evaluation that come after the others, by name.
    """
    identities = _part_identities(study, target)
    unmasked = None
    if target.unmasked_folder is not None:
        unmasked = read_init(target.unmasked_folder, sae.d_model, target.unmasked_identity)
    earlier = None if training is None else training.earlier
    kept = {} if earlier is None else _kept_parts(earlier, identities)
    started = time.perf_counter()
    dead = None if training is None else training.dead
    measures, latents = evaluate(sae, dead, data, target.label, kept, earlier, controls_of(sae, unmasked))
    evaluate_seconds = time.perf_counter() - started
    latents.write(draft, data.tokenizer)
    if training is not None:
        facts = {"train_seconds": training.seconds, "evaluate_seconds": evaluate_seconds}
        facts |= {"train_tokens": training.n_tokens, "d_sae": sae.d_sae}
        measures = {"training": [rows.Measure(name, value, n=1) for name, value in facts.items()], **measures}
    for name, measure in (further or {}).items():
        measures[name] = kept.get(name) or measure()
    every = [measure for of_part in measures.values() for measure in of_part]
    if study.evaluation.probe_datasets:
        path = draft / layout.SAEBENCH_FILE
        write_saebench(path, study, target.label, target.made_from, every, baseline)
    mask = sae.mask.settings
    _write_measures(draft, every, {**columns, "mask": mask.kind, "gating": mask.gating})
    parts = {name: {"identity": identities.get(name, ""), "rows": len(part)} for name, part in measures.items()}
    (draft / layout.PARTS_FILE).write_text(manifest.as_json(parts), encoding="utf8")


def _part_identities(study: MeasurementSettings, target: Target) -> dict[str, str]:
    """The identity of each part of an evaluation: SAE, corpus, and the settings that the part depends on."""
    shared = {"sae": training_part(target.made_from), "corpus": target.made_from["corpus"]}
    shared |= {name: target.made_from[name] for name in ("unmasked",) if name in target.made_from}
    return {
        name: manifest.identity({**shared, "part": name, "evaluation": settings})
        for name, settings in study.evaluation.parts().items()
    }


def _kept_parts(earlier: Path, identities: Mapping[str, str]) -> dict[str, list[rows.Measure]]:
    """The measures of an earlier evaluation of the same SAE whose parts have these identities, by part."""
    table, units = rows.read_rows(earlier / layout.ROWS_FILE), rows.read_units(earlier / layout.UNITS_FILE)
    kept, start = {}, 0
    for name, part in read_json(earlier / layout.PARTS_FILE).items():
        of_part = table[start : start + part["rows"]]
        if part["identity"] == identities.get(name):
            kept[name] = [row.measure(units) for row in of_part]
        start += part["rows"]
    return kept


def _write_measures(draft: Path, measures: list[rows.Measure], columns: Mapping[str, Any]) -> None:
    table = [rows.Row.of(measure, **columns) for measure in measures]
    rows.write_rows(draft / layout.ROWS_FILE, table)
    rows.write_units(draft / layout.UNITS_FILE, measures)


def _versions() -> dict[str, str]:
    """Package versions, for the manifest."""
    return {name: importlib.metadata.version(name) for name in ("posmask", "torch", "transformers", "numpy")}


def _training_precision(study: StudySettings, target: Target, earlier: Path | None) -> str:
    """The precision of a cell's training, for the manifest; it is not part of the identity."""
    assert target.cell is not None
    if earlier is not None:
        return manifest.read_manifest(earlier)["training_precision"]
    rule = make_rule(study.rule_of(target.cell), study.width(target.cell))
    return product_precision(study.training, rule, study.device)
