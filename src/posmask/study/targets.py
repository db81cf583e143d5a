"""Folders that a study makes: where they are, what they must be made from, and their state on disk."""

import contextlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from posmask import masks
from posmask.data.models import is_path
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.settings import may_have_controls
from posmask.interop import sites
from posmask.results import rows
from posmask.sae.files import WEIGHTS_FILE, read_origin, read_width
from posmask.storage import layout, manifest
from posmask.storage.record import check_identity
from posmask.study.settings import MODEL_CELL, CellSettings, MeasurementSettings, StudySettings
from posmask.study.source import Source

__all__ = [
    "CellState",
    "Target",
    "baselines_of",
    "cell_states",
    "check_fits",
    "checked_init",
    "results_origin",
    "rows_in",
    "state_of",
    "targets_of",
    "trained_before",
    "training_part",
]


@dataclass(frozen=True)
class Target:
    """A folder that a study makes: where it is and what it must be made from.

    `cell` is None for the baselines and for SAEs that the study did not train. `init_folder` holds the SAE that the
    cell starts from; `init_identity` is the identity of that folder if it is a cell of the study. `unmasked_folder`
    is the baseline of the same seed, whose SAE the controls of a masked cell need, and `unmasked_identity` its
    identity.
    """

    cell: CellSettings | None
    seed: int
    root: Path
    folder: Path
    made_from: dict[str, Any]
    init_folder: Path | None = None
    init_identity: str | None = None
    unmasked_folder: Path | None = None
    unmasked_identity: str | None = None

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


def results_origin(study: MeasurementSettings, source: Source) -> dict[str, Any]:
    """The part of every identity that all results of a study share."""
    return {
        "model": source.made_from,
        "texts": source.texts_identity(study),
        "corpus": study.corpus.model_dump(mode="json", exclude_none=True, exclude={"texts"}),
        "evaluation": study.evaluation.model_dump(mode="json"),
    }


def baselines_of(target: Target) -> Target:
    """The baselines that belong to a cell."""
    made_from = {key: target.made_from[key] for key in ("model", "texts", "corpus", "evaluation")}
    return Target(None, 0, target.root, layout.cell_folder(target.root, layout.BASELINES), made_from)


def targets_of(study: StudySettings, source: Source, root: Path) -> list[Target]:
    """The baselines and every cell with every seed, in the order of the study file."""
    shared = results_origin(study, source)
    of_training = study.model_dump(mode="json", include={"training"})
    by_name = {cell.name: cell for cell in study.cells}

    def made_from_of(cell: CellSettings, seed: int) -> dict[str, Any]:
        sae = {"d_sae": study.sae.d_sae, "rule": study.rule_of(cell).model_dump(mode="json")}
        # The path of a folder does not matter; `init_from` of the result has the checksum of its SAE.
        elsewhere = {"seeds", "rule"} | ({"init_from"} if cell.init_folder else set())
        cell_part = cell.model_dump(mode="json", exclude=elsewhere)
        if (code := masks.code_of(cell.mask)) is not None:
            cell_part["mask_code"] = code
        return {**shared, "sae": sae, **of_training, "cell": cell_part, "seed": seed}

    def target_of(cell: CellSettings, seed: int) -> Target:
        made_from = made_from_of(cell, seed)
        init_folder, init_identity = cell.init_folder, None
        if init_folder is not None:
            check_fits(init_folder, source)
            made_from["init_from"] = checked_init(init_folder, source.made_from)
        elif cell.init_from is not None:
            # A cell is recomputed when the cell that it starts from is.
            origin = by_name[cell.init_from]
            init_folder = layout.cell_folder(root, layout.cell_label(cell.init_from, seed))
            init_identity = manifest.identity(made_from_of(origin, seed))
            made_from["init_from"] = origin.model_dump(mode="json", exclude={"measure_forgetting", "seeds", "rule"})
            if study.rule_of(origin) != study.rule_of(cell):
                made_from["init_from"]["rule"] = study.rule_of(origin).model_dump(mode="json")
        folder = layout.cell_folder(root, layout.cell_label(cell.name, seed))
        target = Target(cell, seed, root, folder, made_from, init_folder, init_identity)
        unmasked = None if study.baseline is None else by_name[study.baseline]
        if unmasked is None or not may_have_controls(cell.mask) or seed not in study.seeds_of(unmasked):
            return target
        if (study.rule_of(cell), cell.position_bias) != (study.rule_of(unmasked), unmasked.position_bias):
            return target  # The controls would differ by more than the training.
        of_unmasked = made_from_of(unmasked, seed)
        if unmasked.init_folder is not None:
            of_unmasked["init_from"] = checked_init(unmasked.init_folder, source.made_from)
        made_from["unmasked"] = training_part(of_unmasked)
        folder = layout.cell_folder(root, layout.cell_label(unmasked.name, seed))
        return replace(target, unmasked_folder=folder, unmasked_identity=manifest.identity(of_unmasked))

    baselines_target = Target(None, 0, root, layout.cell_folder(root, layout.BASELINES), shared)
    return [baselines_target, *(target_of(cell, seed) for cell in study.cells for seed in study.seeds_of(cell))]


def check_fits(folder: Path, source: Source) -> None:
    """Check that an SAE from outside the study is for vectors of the study's model, before anything is harvested.

    Raises:
        BadSetting: vectors have another size, or its origin names another model.
    """
    if (width := read_width(folder)) != source.d_model:
        raise BadSetting(
            f"the SAE in {folder} codes vectors of {width} numbers, {source.name} gives {source.d_model}: choose an "
            "SAE of the same model"
        )
    origin = read_origin(folder)
    theirs = origin.get("model")
    # Weights that are identified are compared instead, and the folder of a model may have any name.
    if theirs is None or "weights" in origin or is_path(source.name) or is_path(str(theirs)):
        return
    if _plain(str(theirs)) != _plain(source.name):
        raise BadSetting(
            f"the SAE in {folder} was trained on {theirs}, the study reads {source.name}: choose an SAE of the same "
            f"model, or import it with --model-name {source.name} if its vectors are meant to be coded"
        )


def _plain(model: str) -> str:
    """A model's name without its owner, for comparison.

    >>> _plain("openai-community/gpt2") == _plain("gpt2-small")
    True
    """
    name = re.sub(r"^embedded:|^meta-(?=llama)|\.gguf$", "", model.lower().rpartition("/")[2])
    return "gpt2" if name == "gpt2-small" else name


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


_FOR_EVALUATION = {
    "corpus": {"heldout_tokens", "eval_split"},
    "cell": {"measure_forgetting"},
    "evaluation": None,
    "unmasked": None,
}
"""Settings in an identity that training does not depend on."""


def training_part(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a cell's identity that decides its training; the rest decides only its evaluation."""
    part = {}
    for name, settings in made_from.items():
        left_out = _FOR_EVALUATION.get(name, set())
        if left_out is not None:
            part[name] = {k: v for k, v in settings.items() if k not in left_out} if left_out else settings
    return part


def trained_before(target: Target, *, verify: bool = False) -> Path | None:
    """A finished folder of this cell with the training that the target needs, whatever its evaluation was.

    Args:
        verify: also compare its files with their checksums; a damaged folder is passed over.
    """
    if target.cell is None:
        return None
    stale = itertools.takewhile(Path.exists, layout.stale_paths(target.root, target.label))
    for folder in (target.folder, *reversed(list(stale))):
        with contextlib.suppress(DamagedFolder):
            record = manifest.read_manifest(folder)
            is_current = record["identity"] == manifest.identity(record["made_from"])
            if is_current and training_part(record["made_from"]) == training_part(target.made_from):
                manifest.read_manifest(folder, verify=verify)
                return folder
    return None


CellState = Literal["finished", "trained", "missing", "other settings", "damaged"]
"""trained: only the evaluation has other settings, so the training is kept."""


def state_of(target: Target, *, verify: bool = False) -> CellState:
    """The state of a target's folder.

    Args:
        verify: compare every file with its checksum instead of its size only.
    """
    try:
        if manifest.finished(target.folder, target.made_from):
            if verify:
                manifest.read_manifest(target.folder, verify=True)
            else:
                manifest.check_sizes(target.folder)
            return "finished"
    except DamagedFolder:
        return "damaged"
    if trained_before(target, verify=verify) is not None:
        return "trained"
    return "other settings" if target.folder.exists() else "missing"


def rows_in(target: Target) -> list[rows.Row]:
    """The rows of a finished target.

    Raises:
        BadSetting: the folder was made from other settings.
        DamagedFolder: a file differs from its checksum, or rows are of another cell.
    """
    check_identity(target.folder, target.identity)
    name = MODEL_CELL if target.label == layout.BASELINES else target.label
    return rows.read_rows_of(
        target.folder / layout.ROWS_FILE, name if target.cell is None else target.cell.name, target.seed
    )


def cell_states(study: StudySettings, root: Path) -> list[tuple[str, CellState]]:
    """The label and state of the baselines and of each cell.

    If the root does not exist the model is not looked up, so this works without access to it.
    """
    if not root.exists():
        labels = [layout.cell_label(cell.name, seed) for cell in study.cells for seed in study.seeds_of(cell)]
        return [(label, "missing") for label in (layout.BASELINES, *labels)]
    return [(target.label, state_of(target)) for target in targets_of(study, Source(study.model, study.device), root)]
