"""One cell: its place in a run folder, what it is made from, and its making: train one SAE, evaluate it, write it."""

import importlib.metadata
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posmask.data.activations import training_batches
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.suite import Data, baselines, evaluate, forgetting
from posmask.interop import saebench, sites
from posmask.kernels import runtime
from posmask.probing import datasets
from posmask.results import rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import WEIGHTS_FILE, read_origin, read_sae, write_sae
from posmask.sae.rules import make_rule
from posmask.sae.warm_start import renormalize_
from posmask.storage import manifest
from posmask.storage.record import check_identity
from posmask.study.harvests import Source, texts_identity
from posmask.study.settings import MODEL_CELL, CellSettings, StudySettings
from posmask.training import distributed, loop
from posmask.training.checkpoints import Checkpoints
from posmask.training.curve import write_curve
from posmask.training.settings import product_precision
from posmask.training.trackers import curve_writer

__all__ = [
    "BASELINES",
    "SAEBENCH_FILE",
    "UNITS_FILE",
    "CellState",
    "Place",
    "checked_init",
    "fill",
    "places_of",
    "read_init",
    "results_origin",
    "rows_in",
    "state_of",
    "train_cell",
    "untrained",
    "write_saebench",
]

BASELINES = "baselines"
UNITS_FILE = "units.safetensors"
SAEBENCH_FILE = "saebench.json"
_SNAPSHOTS_FILE = "snapshots.safetensors"
_CHECKPOINTS = "checkpoints"
CHECKPOINT_SECONDS = 90.0


@dataclass(frozen=True)
class Place:
    """A cell's folder and what it must have been made from."""

    cell: CellSettings | None  # None: the baselines
    seed: int
    folder: Path
    made_from: dict[str, Any]
    init_folder: Path | None = None  # the folder of the SAE that the cell starts from
    init_identity: str | None = None  # of that folder, where it is a cell of the study

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """Where its training stands, as long as it is not finished."""
        root = self.folder.parents[0 if self.cell is None else 1]
        return root / _CHECKPOINTS / self.label


def results_origin(study: StudySettings, source: Source) -> dict[str, Any]:
    """What every result of a study was made from."""
    return {
        "model": source.made_from,
        "texts": texts_identity(study),
        "corpus": study.corpus.model_dump(mode="json", exclude_none=True),
        "evaluation": study.evaluation.model_dump(mode="json"),
    }


def places_of(study: StudySettings, source: Source, root: Path) -> list[Place]:
    shared = results_origin(study, source)
    training_part = study.model_dump(mode="json", include={"sae", "training"})
    by_name = {cell.name: cell for cell in study.cells}

    def made_from_of(cell: CellSettings, seed: int) -> dict[str, Any]:
        own = cell.model_dump(mode="json", exclude={"seeds"})
        return {**shared, **training_part, "cell": own, "seed": seed}

    places = [Place(None, 0, root / BASELINES, shared)]
    for cell in study.cells:
        for seed in study.seeds_of(cell):
            made_from = made_from_of(cell, seed)
            start, init_identity = cell.init_folder, None
            if start is not None:
                made_from["init_from"] = checked_init(start, source.made_from)
            elif cell.init_from is not None:
                # A cell is recomputed when the cell that it starts from is.
                origin = by_name[cell.init_from]
                start = root / "cells" / f"{cell.init_from}-seed{seed}"
                init_identity = manifest.identity(made_from_of(origin, seed))
                made_from["init_from"] = origin.model_dump(mode="json", exclude={"measure_forgetting", "seeds"})
            folder = root / "cells" / f"{cell.name}-seed{seed}"
            places.append(Place(cell, seed, folder, made_from, start, init_identity))
    return places


def checked_init(folder: Path, model_made_from: dict[str, Any]) -> dict[str, Any]:
    """The identity of an SAE that a user brings.

    Raises:
        BadSetting: it says that it was trained on another model, layer or site.
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


def state_of(place: Place, *, verify: bool = False) -> CellState:
    """
    Args:
        verify: read every file of a finished folder, too.
    """
    try:
        if manifest.finished(place.folder, place.made_from):
            manifest.read_manifest(place.folder, verify=verify)
            return "finished"
    except DamagedFolder:
        return "damaged"
    return "other settings" if place.folder.exists() else "missing"


def untrained(study: StudySettings, place: Place, data: Data) -> tuple[SparseAutoencoder, int]:
    """A cell's SAE before its training, and the tokens that the SAE it starts from was trained on."""
    assert place.cell is not None
    if place.init_folder is None:
        sae = study.make_sae(place.cell, data.training.d_model, place.seed)
        sae.center, sae.scale = data.training.center_and_scale
        return sae.to(study.device), 0
    started = read_init(place.init_folder, data.training.d_model, place.init_identity)
    origin = read_origin(place.init_folder)
    if "imported" in origin:  # Else with the constants that its weights were made for.
        renormalize_(started, *data.training.center_and_scale)
    sae = study.init_sae(place.cell, started, place.seed)
    return sae.to(study.device), origin.get("training_tokens", 0)


def train_cell(
    study: StudySettings,
    place: Place,
    sae: SparseAutoencoder,
    data: Data,
    processes: distributed.Distributed | None = None,
    *,
    keeps_end: bool = False,
) -> loop.Trained:
    """Train a cell's SAE, or with others this process's part of it, from its last checkpoint on.

    Args:
        keeps_end: leave a checkpoint after the last step in any case, for another process to evaluate from.
    """
    assert place.cell is not None
    settings = study.training.model_copy(update={"n_steps": study.n_steps(place.cell)})
    taken = round(place.cell.step_fraction * study.training.n_steps) - settings.n_steps  # by the cell it starts from
    checkpoints = Checkpoints(place.checkpoints, place.made_from, CHECKPOINT_SECONDS, keeps_end=keeps_end)
    batches = training_batches(
        data.training,
        settings.batch_tokens,
        settings.n_steps - checkpoints.done,
        place.seed,
        after=taken + checkpoints.done,
        mine=None if processes is None else processes.token_indices,
    )
    root = place.folder.parents[1]
    track = study.track if processes is None or processes.leads else None
    with curve_writer(track, root, study.name, place.label, place.made_from) as write:
        return loop.train(
            sae,
            batches,
            settings,
            place.label,
            on_point=write,
            checkpoints=checkpoints,
            processes=processes,
        )


def fill(study: StudySettings, place: Place, data: Data, baseline: list[rows.Row]) -> None:
    """Fill one folder.

    Args:
        baseline: the rows of the baselines, which come first.
    """
    cell = place.cell
    with manifest.write_folder(place.folder, place.made_from, **_manifest_facts(study, place)) as draft:
        if cell is None:
            found = baselines(data)
            columns = {"mask": "none", "budget": "", "gating": ""}
            name = MODEL_CELL
        else:
            sae, before = untrained(study, place, data)
            trained = train_cell(study, place, sae, data)
            runtime.give_back_freed_memory()
            write_curve(draft / "curve.csv", trained.curve)
            trained.snapshots.write(draft / _SNAPSHOTS_FILE, study.training.batch_tokens)
            n_tokens = before + trained.n_tokens
            model_made_from = place.made_from["model"]
            write_sae(
                sae,
                draft,
                {
                    "model": study.model.name,
                    "weights": model_made_from["weights"],
                    "layer": model_made_from["layer"],
                    "site": study.model.site,
                    "training_tokens": n_tokens,
                },
            )
            started = time.perf_counter()
            measured, facts = evaluate(sae, trained.dead, data, place.label)
            evaluate_seconds = time.perf_counter() - started
            facts.write(draft, data.tokenizer)
            found = [
                rows.Measure("train_seconds", trained.seconds, n=1),
                rows.Measure("evaluate_seconds", evaluate_seconds, n=1),
                rows.Measure("train_tokens", n_tokens, n=1),
                rows.Measure("d_sae", sae.d_sae, n=1),
                *measured,
            ]
            if cell.measure_forgetting:
                found += forgetting(sae, data, study.training, place.seed, place.label)
            if study.evaluation.probe_datasets:
                write_saebench(draft / SAEBENCH_FILE, study, place, found, baseline)
            columns = {"mask": cell.mask.kind, "budget": cell.budget, "gating": cell.mask.gating}
            name = cell.name
        (draft / "settings.json").write_text(manifest.as_json(place.made_from), encoding="utf8")
        rows.write_rows(
            draft / "rows.csv",
            [rows.Row.of(measure, cell=name, seed=place.seed, **columns) for measure in found],
        )
        rows.write_units(draft / UNITS_FILE, found)
    runtime.give_back_freed_memory()


def _manifest_facts(study: StudySettings, place: Place) -> dict[str, Any]:
    """What the manifest records beside the identity: package versions and, for cells, the precision of training."""
    facts: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in ("posmask", "torch", "transformers", "numpy")}
    }
    if place.cell is not None:
        rule = make_rule(study.sae.rule, study.width(place.cell))
        facts["training_precision"] = product_precision(study.training, rule, study.device)
    return facts


def read_init(folder: Path, d_model: int, identity: str | None = None) -> SparseAutoencoder:
    """The SAE that a cell starts from.

    Args:
        identity: that the folder must have; None for an SAE from outside the study.
    """
    if identity is not None:
        check_identity(folder, identity)
    sae = read_sae(folder, verify=identity is None)
    if sae.d_model != d_model:
        raise BadSetting(f"the SAE in {folder} codes vectors of {sae.d_model} numbers, the model gives {d_model}")
    return sae


def write_saebench(
    path: Path, study: StudySettings, place: Place, found: list[rows.Measure], baseline: list[rows.Row]
) -> None:
    """SAEBench's own evaluation file, with the same SAE's probe accuracies."""
    ask = study.evaluation
    llm, sae = (
        {
            (where["dataset"], where["class"], "all" if where["k"] == "all" else int(where["k"])): value
            for metric, where, value in some
            if metric == "probe_accuracy" and "class" in where and where["pooling"] == "mean"
        }
        for some in (
            [(row.metric, rows.parse_slice(row.slice), row.value) for row in baseline],
            [(one.metric, rows.parse_slice(rows.slice_text(one.slice or {})), one.value) for one in found],
        )
    )
    config = saebench.EvalConfig(
        random_seed=datasets.SAEBENCH_SEED,
        dataset_names=ask.probe_datasets,
        probe_train_set_size=ask.probe_train,
        probe_test_set_size=ask.probe_test,
        context_length=study.corpus.n_positions,
        llm_dtype=place.made_from["model"]["precision"],
        model_name=study.model.name,
        k_values=ask.ks,
    )
    identity = manifest.identity(place.made_from)
    sizes = [
        (where, row.n)
        for row in baseline
        if row.metric == "probe_accuracy" and "class" not in (where := rows.parse_slice(row.slice))
    ]
    output = saebench.eval_output(
        llm,
        sae,
        config,
        eval_id=str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        epoch_milliseconds=round(time.time() * 1000),
        sae_name=f"posmask {study.name} {place.label}",
        sae_id=None,
        # Sizes as asked stand above; the texts that probes had, here.
        sae_config={
            "identity": identity,
            "probe_protocol": ask.probe_protocol,
            "probe_texts": {where["dataset"]: [int(where["train"]), n] for where, n in sizes},
            **place.made_from,
        },
    )
    saebench.write_eval_output(path, output)


def rows_in(folder: Path, identity: str) -> list[rows.Row]:
    """The rows of a finished folder with this identity.

    Raises:
        BadSetting: it was made from other settings.
        DamagedFolder: it is not what was written.
    """
    check_identity(folder, identity)
    return rows.read_rows(folder / "rows.csv")
