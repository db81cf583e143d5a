"""One cell of a study: what its folder must be made from, its SAE, its training, and its evaluation to a folder."""

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posmask import masks
from posmask.data.activations import training_batches
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.suite import EvaluationData, baselines, evaluate, forgetting
from posmask.interop import sites
from posmask.kernels import runtime
from posmask.masks.base import PositionMask
from posmask.results import rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import WEIGHTS_FILE, read_origin, read_sae, write_sae
from posmask.sae.rules import make_rule
from posmask.sae.warm_start import renormalize_, warm_start
from posmask.storage import layout, manifest
from posmask.storage.record import check_identity
from posmask.study.harvests import Source, texts_identity
from posmask.study.saebench_file import write_saebench
from posmask.study.settings import MODEL_CELL, CellSettings, StudySettings
from posmask.training import distributed, loop
from posmask.training.checkpoints import Checkpoints
from posmask.training.curve import write_curve
from posmask.training.settings import product_precision
from posmask.training.trackers import curve_writer

__all__ = [
    "CellState",
    "Target",
    "baselines_of",
    "check_buildable",
    "checked_init",
    "evaluate_to_folder",
    "fill",
    "make_sae",
    "read_init",
    "results_origin",
    "rows_in",
    "state_of",
    "targets_of",
    "train_cell",
    "untrained",
]

CHECKPOINT_SECONDS = 90.0


# What a folder must be made from


@dataclass(frozen=True)
class Target:
    """A folder that a study makes: where it is and what it must be made from.

    `cell` is None for the baselines and for SAEs that the study did not train. `init_folder` holds the SAE that the
    cell starts from; `init_identity` is the identity of that folder if it is a cell of the study.
    """

    cell: CellSettings | None
    seed: int
    root: Path
    folder: Path
    made_from: dict[str, Any]
    init_folder: Path | None = None
    init_identity: str | None = None

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> str:
        return manifest.identity(self.made_from)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints while it is being trained."""
        return layout.checkpoints_folder(self.root, self.label)


def results_origin(study: StudySettings, source: Source) -> dict[str, Any]:
    """The part of every identity that all results of a study share."""
    return {
        "model": source.made_from,
        "texts": texts_identity(study),
        "corpus": study.corpus.model_dump(mode="json", exclude_none=True),
        "evaluation": study.evaluation.model_dump(mode="json"),
    }


def baselines_of(target: Target) -> Target:
    """The baselines that belong to a cell."""
    made_from = {key: target.made_from[key] for key in ("model", "texts", "corpus", "evaluation")}
    return Target(None, 0, target.root, layout.cell_folder(target.root, layout.BASELINES), made_from)


def targets_of(study: StudySettings, source: Source, root: Path) -> list[Target]:
    """The baselines and every cell with every seed, in the order of the study file."""
    shared = results_origin(study, source)
    training_part = study.model_dump(mode="json", include={"sae", "training"})
    by_name = {cell.name: cell for cell in study.cells}

    def made_from_of(cell: CellSettings, seed: int) -> dict[str, Any]:
        cell_part = cell.model_dump(mode="json", exclude={"seeds"})
        return {**shared, **training_part, "cell": cell_part, "seed": seed}

    def target_of(cell: CellSettings, seed: int) -> Target:
        made_from = made_from_of(cell, seed)
        init_folder, init_identity = cell.init_folder, None
        if init_folder is not None:
            made_from["init_from"] = checked_init(init_folder, source.made_from)
        elif cell.init_from is not None:
            # A cell is recomputed when the cell that it starts from is.
            origin = by_name[cell.init_from]
            init_folder = layout.cell_folder(root, layout.cell_label(cell.init_from, seed))
            init_identity = manifest.identity(made_from_of(origin, seed))
            made_from["init_from"] = origin.model_dump(mode="json", exclude={"measure_forgetting", "seeds"})
        folder = layout.cell_folder(root, layout.cell_label(cell.name, seed))
        return Target(cell, seed, root, folder, made_from, init_folder, init_identity)

    baselines_target = Target(None, 0, root, layout.cell_folder(root, layout.BASELINES), shared)
    return [baselines_target, *(target_of(cell, seed) for cell in study.cells for seed in study.seeds_of(cell))]


def checked_init(folder: Path, model_made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of an SAE from outside the study.

    Raises:
        BadSetting: its origin names another model, layer or site.
    """
    origin = read_origin(folder)
    weights = model_made_from["weights"]
    if origin.get("weights", weights) != weights:
        raise BadSetting(
            f"the SAE in {folder} was trained on weights {origin['weights']!r} of a model, not on {weights!r}: start "
            "from one of the same model"
        )
    layer = model_made_from["layer"]
    theirs = sites.canonical(origin.get("layer", layer), origin.get("site", "residual_after"))
    ours = sites.canonical(layer, model_made_from.get("site", "residual_after"))
    if theirs != ours and not origin.keys().isdisjoint({"layer", "site"}):
        raise BadSetting(
            f"the SAE in {folder} was trained on {sites.described(*theirs)}, the study reads {sites.described(*ours)}: "
            "start from an SAE of the same layer and site"
        )
    return {"sha256": manifest.file_sha256(folder / WEIGHTS_FILE)}


CellState = Literal["finished", "missing", "other settings", "damaged"]


def state_of(target: Target, *, verify: bool = False) -> CellState:
    """The state of a target's folder.

    Args:
        verify: also compare every file with its checksum.
    """
    try:
        if manifest.finished(target.folder, target.made_from):
            manifest.read_manifest(target.folder, verify=verify)
            return "finished"
    except DamagedFolder:
        return "damaged"
    return "other settings" if target.folder.exists() else "missing"


def rows_in(target: Target) -> list[rows.Row]:
    """The rows of a finished target.

    Raises:
        BadSetting: the folder was made from other settings.
        DamagedFolder: a file differs from its checksum.
    """
    check_identity(target.folder, target.identity)
    return rows.read_rows(target.folder / layout.ROWS_FILE)


# The SAE of a cell


def make_sae(study: StudySettings, cell: CellSettings, d_model: int, seed: int) -> SparseAutoencoder:
    """The SAE of a cell that starts from random weights."""
    return SparseAutoencoder(d_model, study.sae.rule, _make_mask(study, cell, seed), seed)


def _make_mask(study: StudySettings, cell: CellSettings, seed: int) -> PositionMask:
    return masks.make_mask(cell.mask, study.corpus.n_positions, study.width(cell), seed)


def _init_sae(study: StudySettings, cell: CellSettings, source: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """The SAE of a cell that starts from another SAE."""
    if source.rule.settings.of_codes() != study.sae.rule.of_codes():
        raise BadSetting(
            f"{cell.name} would start from an SAE with the rule {source.rule.settings.model_dump()}, but sae.rule "
            f"is {study.sae.rule.model_dump()}: make them equal"
        )
    return warm_start(source, _make_mask(study, cell, seed), seed, study.sae.rule)


def check_buildable(study: StudySettings, cell: CellSettings) -> None:
    """Build a cell's SAE for vectors of one number, so that a mask that does not fit is found before the harvest.

    Raises:
        PosmaskError: mask, rule, sizes and starting SAE do not fit together.
    """
    seed = study.seeds[0]
    sae = make_sae(study, cell, 1, seed)
    if cell.init_folder is not None:
        sae = _init_sae(study, cell, read_sae(cell.init_folder), seed)
    elif cell.init_from is not None:
        open_cell = CellSettings(name="source", mask=masks.mask_settings({"kind": "open"}))
        sae = _init_sae(study, cell, make_sae(study, open_cell, 1, 0), seed)
    if cell.mask.gradient_sharing and not sae.mask.may_have_copies():
        raise BadSetting(
            f"{cell.name} has gradient_sharing = {cell.mask.gradient_sharing}, but its latents are not copies of each "
            "other: leave it out, or let the cell start from an open one"
        )


def read_init(folder: Path, d_model: int, identity: str | None = None) -> SparseAutoencoder:
    """The SAE that a cell starts from.

    Args:
        identity: the identity that the folder must have; None for an SAE from outside the study.

    Raises:
        BadSetting: the identity differs, or the SAE is for vectors of another size.
    """
    if identity is not None:
        check_identity(folder, identity)
    sae = read_sae(folder, verify=identity is None)
    if sae.d_model != d_model:
        raise BadSetting(f"the SAE in {folder} codes vectors of {sae.d_model} numbers, the model gives {d_model}")
    return sae


def untrained(study: StudySettings, target: Target, data: EvaluationData) -> tuple[SparseAutoencoder, int]:
    """A cell's SAE before its training, and the number of tokens that the SAE it starts from was trained on."""
    assert target.cell is not None
    if target.init_folder is None:
        sae = make_sae(study, target.cell, data.training.d_model, target.seed)
        sae.center, sae.scale = data.training.center_and_scale
        return sae.to(study.device), 0
    source = read_init(target.init_folder, data.training.d_model, target.init_identity)
    origin = read_origin(target.init_folder)
    if "imported" in origin:  # Its constants are not those of these vectors.
        renormalize_(source, *data.training.center_and_scale)
    sae = _init_sae(study, target.cell, source, target.seed)
    return sae.to(study.device), origin.get("training_tokens", 0)


# Training and evaluation


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
        mine=None if processes is None else processes.token_indices,
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
    sae, n_tokens_before = untrained(study, target, data)
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
