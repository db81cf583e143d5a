"""A study: settings x cells x seeds -> run folders -> one results table. Does only what is missing.

The path of the data, in the order of the functions below: `prepare` harvests vectors once for all cells, `run_cell`
trains one SAE and evaluates it into its folder, `run_study` goes over the cells and joins their rows.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtyping import Bool
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor

from posmask import assets, corpus, folders, kernels, masks, model, rows, training
from posmask.activations import Activations, Batch, evaluation_batches, harvest
from posmask.errors import BadSetting, PosmaskError
from posmask.metrics.reconstruction import Reconstruction, dead_share
from posmask.metrics.specialization import PositionMass, profile_fidelity, retention
from posmask.probing import order, topics
from posmask.probing.order_tasks import ORDER_TASKS, OrderTask, make_order_task
from posmask.probing.pooling import Pool
from posmask.progress import announce, progress_bar
from posmask.sae import SparseAutoencoder, TopK, rule_settings, write_sae

__all__ = ["CellSettings", "StudySettings", "cell_states", "read_study", "run_study"]

RESULTS_FILE = "results.csv"
_BASELINES = "baselines"
_MODEL_CELL = "llm"  # what the baselines' rows say in the column `cell`


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Settings):
    """Whose vectors, and from where in it."""

    name: str
    """`embedded:SmolLM2-135M-Instruct`, a name on the hub, or a folder."""
    layer: int = Field(gt=0)
    """Vectors are read after this many layers (`hidden_states[layer]`)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model's forward pass and of the stored vectors. auto: bfloat16 where the processor is fast in it."""


class CorpusSettings(_Settings):
    """The texts that SAEs are trained on and measured on; see `corpus.split_of` for the wall between the two."""

    tables: tuple[str, ...] = Field(min_length=1)
    """Embedded tables; a quarter of their texts trains, tokens for measuring come from the rest."""
    n_positions: int = Field(gt=1)
    """Context length, BOS included."""
    training_tokens: int = Field(gt=0)
    """Kept tokens to harvest for training, at least."""
    heldout_tokens: int = Field(gt=0)
    """Kept tokens for reconstruction, retention and fidelity, at least."""
    max_characters: int = Field(default=1000, gt=0)
    """Texts are cut to this length, so that a few long ones do not make up the corpus."""


class SaeSettings(_Settings):
    """The unmasked SAE's size; `budget` says what a cell makes of it."""

    d_sae: int = Field(gt=0)
    rule: TopK

    @field_validator("rule", mode="before")
    @classmethod
    def _known_rule(cls, value: Any) -> Any:
        return rule_settings(value) if isinstance(value, dict) else value


class EvaluationSettings(_Settings):
    """What each cell is asked, and how many texts it is asked with."""

    retention_positions: int = Field(gt=0)
    """How many top positions stand in for a mask, for latents whose mask binds them to none."""
    order_tasks: tuple[str, ...] = tuple(ORDER_TASKS)
    order_train_groups: int = Field(gt=0)
    order_test_groups: int = Field(gt=0)
    order_segments: int = Field(default=8, gt=1)
    """Position segments of the segment-pooled rival of the unmasked SAE."""
    probe_datasets: tuple[str, ...] = tuple(topics.DATASETS)
    probe_train: int = Field(gt=1)
    """Training texts a probe, half of them of its class; capped at what the dataset has, with the test texts."""
    probe_test: int = Field(gt=1)
    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(1, 5, 20, 50), min_length=1)
    """How many latents a probe may use."""

    @model_validator(mode="after")
    def _known_names(self) -> "EvaluationSettings":
        for given, known in ((self.order_tasks, ORDER_TASKS), (self.probe_datasets, topics.DATASETS)):
            for name in given:
                if name not in known:
                    raise ValueError(f"{name!r} is unknown: choose from {', '.join(known)}")
        return self


class CellSettings(_Settings):
    """One row of the study: a mask at a budget."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    mask: SerializeAsAny[masks.MaskSettings]
    budget: Literal["width", "compute"] = "width"
    """width: d_sae latents in all. compute: d_sae latents open at each position, as many in all as that takes."""

    @field_validator("mask", mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        return masks.mask_settings(value) if isinstance(value, dict) else value


class StudySettings(_Settings):
    """Everything that decides a study's numbers. The same thing as a TOML file, see `studies/`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    seeds: tuple[int, ...] = Field(min_length=1)
    model: ModelSettings
    corpus: CorpusSettings
    sae: SaeSettings
    training: training.TrainingSettings
    evaluation: EvaluationSettings
    cells: tuple[CellSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "StudySettings":
        names = [cell.name for cell in self.cells]
        if _MODEL_CELL in names:
            raise ValueError(f"a cell is called {_MODEL_CELL!r}, which stands for the model itself: rename it")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two cells are called {name!r}: give each its own name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} repeats a seed: the same run twice is no second sample")
        if self.training.batch_tokens > self.corpus.training_tokens:
            raise ValueError(
                f"training.batch_tokens = {self.training.batch_tokens:,} is more than corpus.training_tokens = "
                f"{self.corpus.training_tokens:,}, which would make 0 steps: lower the one or raise the other"
            )
        if self.evaluation.retention_positions >= self.corpus.n_positions - 1:
            raise ValueError(
                f"evaluation.retention_positions = {self.evaluation.retention_positions} is not below the "
                f"{self.corpus.n_positions - 1} positions after BOS: retention would be 1 for everything"
            )
        if max(self.evaluation.ks) > self.sae.d_sae:
            raise ValueError(
                f"evaluation.ks asks for probes on {max(self.evaluation.ks)} latents of sae.d_sae = {self.sae.d_sae}: "
                "lower it"
            )
        return self

    def width(self, cell: CellSettings) -> int:
        """How many latents a cell's SAE has."""
        if cell.budget == "width":
            return self.sae.d_sae
        kind = masks.MASKS[cell.mask.kind]
        return kind.width_at_equal_compute(cell.mask, self.corpus.n_positions, self.sae.d_sae)

    def make_sae(self, cell: CellSettings, d_model: int, seed: int) -> SparseAutoencoder:
        mask = masks.make_mask(cell.mask, self.corpus.n_positions, self.width(cell), seed)
        return SparseAutoencoder(d_model, self.sae.rule, mask, seed)


def read_study(path: Path) -> StudySettings:
    """The settings in a study file, checked as far as can be without loading anything.

    Raises:
        BadSetting: one sentence on the first thing that is wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise BadSetting(
            f"there is no study file {path}: give the path of a TOML file, such as studies/quick.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"{path} is not a readable TOML file ({error}): correct it") from None
    try:
        study = StudySettings.model_validate(values)
        for cell in study.cells:  # Masks that do not fit are found here, not after the harvest.
            study.make_sae(cell, d_model=1, seed=study.seeds[0])
    except ValidationError as error:
        raise BadSetting(f"{path}: {_first_mistake(error)}") from None
    except PosmaskError as error:
        raise BadSetting(f"{path}: {error}") from None
    return study


def _first_mistake(error: ValidationError) -> str:
    # A misspelt setting is also a missing one: the misspelling says more.
    mistakes = error.errors(include_url=False)
    mistake = next((found for found in mistakes if found["type"] == "extra_forbidden"), mistakes[0])
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        known = _all_fields()
        close = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
        return f"{place} is not a setting: {f'did you mean {close[0]}?' if close else 'remove it'}"
    if mistake["type"] == "missing":
        return f"{place} is missing: give it a value"
    if mistake["type"] == "value_error":
        return (
            f"{place}: {mistake['msg'].removeprefix('Value error, ')}"
            if place
            else mistake["msg"].removeprefix("Value error, ")
        )
    return f"{place} = {mistake['input']!r} is not valid ({mistake['msg'].lower()}): correct it"


def _all_fields() -> list[str]:
    found = set(StudySettings.model_fields)
    for part in (
        ModelSettings,
        CorpusSettings,
        SaeSettings,
        EvaluationSettings,
        CellSettings,
        training.TrainingSettings,
    ):
        found |= set(part.model_fields)
    for mask in masks.MASKS.values():
        found |= set(mask.Settings.model_fields)
    return sorted(found)


@dataclass(frozen=True)
class Data:
    """Everything that all cells share: harvested vectors, with the tasks they belong to."""

    training: Activations
    heldout: Activations
    order: dict[str, tuple[OrderTask, Activations]]
    probes: dict[str, tuple[topics.ProbeDataset, Activations]]
    tokenizer: corpus.Tokenizer


class Source:
    """The model a study reads vectors from, loaded only when something must be harvested."""

    def __init__(self, settings: ModelSettings) -> None:
        precision = model.fast_precision() if settings.precision == "auto" else settings.precision
        self._settings = settings
        self._precision: model.ModelPrecision = precision

    @cached_property
    def made_from(self) -> dict[str, Any]:
        return {
            "weights": model.weights_identity(self._settings.name),
            "layer": self._settings.layer,
            "precision": self._precision,
        }

    @cached_property
    def tokenizer(self) -> Any:
        return model.load_tokenizer(self._settings.name)

    @cached_property
    def loaded(self) -> model.LanguageModel:
        return model.load_model(self._settings.name, self._settings.layer, self._precision)


def _texts_identity() -> dict[str, Any]:
    return {"carrier": assets.TEXT_CARRIER.wheel_sha256, "training_share": corpus.TRAINING_SHARE}


def prepare(study: StudySettings, source: Source, root: Path) -> Data:
    """Harvest what is missing: training, held-out, order and probe texts, each into a folder of its own."""
    n_positions = study.corpus.n_positions
    shared = {
        "model": source.made_from,
        "texts": _texts_identity(),
        "n_positions": n_positions,
    }

    def harvested(label: str, what: dict[str, Any], tokens: Callable[[], corpus.Tokens]) -> Activations:
        made_from = {**shared, **what}
        folder = root / "activations" / f"{label}-{folders.identity(made_from)}"
        if folders.finished(folder, made_from):
            return Activations(folder)
        return harvest(tokens(), source.loaded, folder, made_from, label)

    def packed(split: Literal["training", "evaluation"], n_tokens: int) -> Callable[[], corpus.Tokens]:
        def build() -> corpus.Tokens:
            announce(f"Reading the {split} texts of {len(study.corpus.tables)} tables.")
            texts = corpus.unique_texts(
                (text for name in study.corpus.tables for text, _ in assets.read_table(name)), split
            )
            cut = [text[: study.corpus.max_characters] for text in texts]
            return corpus.pack(cut, source.tokenizer, n_positions, n_tokens)

        return build

    def padded(texts: tuple[str, ...]) -> Callable[[], corpus.Tokens]:
        return lambda: corpus.pad(texts, source.tokenizer, n_positions)

    settings = study.corpus.model_dump(mode="json", include={"tables", "max_characters"})
    ask = study.evaluation
    splits: tuple[tuple[Literal["training", "evaluation"], int], ...] = (
        ("training", study.corpus.training_tokens),
        ("evaluation", study.corpus.heldout_tokens),
    )
    sets = {
        split: harvested(split, {"split": split, "tokens": n_tokens, **settings}, packed(split, n_tokens))
        for split, n_tokens in splits
    }
    tasks, datasets = {}, {}
    for name in ask.order_tasks:
        task = make_order_task(name, source.tokenizer, n_positions, ask.order_train_groups, ask.order_test_groups)
        tasks[name] = task, harvested(name, {"texts_of": list(task.texts)}, padded(task.texts))
    for name in ask.probe_datasets:
        dataset = topics.read_probe_dataset(name, ask.probe_train, ask.probe_test, study.corpus.max_characters)
        datasets[name] = dataset, harvested(name, {"texts_of": list(dataset.texts)}, padded(dataset.texts))
    return Data(sets["training"], sets["evaluation"], tasks, datasets, source.tokenizer)


def _kept_batches(activations: Activations, advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in evaluation_batches(activations):
        kept = batch.kept()
        yield kept
        advance(len(kept))


def evaluate(
    study: StudySettings, sae: SparseAutoencoder, dead: Bool[Tensor, " latent"], data: Data, label: str
) -> list[rows.Measure]:
    """Every measure of a trained SAE."""
    ask, n_positions = study.evaluation, study.corpus.n_positions
    strict = sae.mask.bound_positions()
    lift_changes_codes = sae.mask.gates_code() and not bool((sae.mask.openness() == 1).all())
    heldout = data.heldout
    n_tokens = heldout.n_kept * (2 if lift_changes_codes else 1)
    n_tokens += sum(activations.n_kept for _, activations in [*data.order.values(), *data.probes.values()])
    found: list[rows.Measure] = []
    with progress_bar(f"evaluate {label}", n_tokens, "tokens") as advance:
        mean, _ = heldout.centre_and_scale
        fidelity = Reconstruction(n_positions, heldout.n_texts, mean)
        used = PositionMass(n_positions, sae.d_sae)
        for batch in _kept_batches(heldout, advance):
            codes = sae.sparse_encode(batch.vectors, batch.position)
            fidelity.update(batch, codes, sae.sparse_decode(codes))
            used.update(batch, codes)
        found += fidelity.measures() + dead_share(sae, dead)
        found += profile_fidelity(used, sae.mask.openness().detach())
        lifted = used
        if lift_changes_codes:
            lifted = PositionMass(n_positions, sae.d_sae)
            for batch in _kept_batches(heldout, advance):
                lifted.update(batch, sae.sparse_encode(batch.vectors, batch.position, lift=True))
        found += retention(lifted, strict, ask.retention_positions)

        segments = [1, ask.order_segments] if sae.mask.settings.kind == "open" else [1]
        for task, activations in data.order.values():
            pools = {count: Pool(len(task.texts), sae.d_sae, n_positions, count) for count in segments}
            for batch in _kept_batches(activations, advance):
                codes = sae.sparse_encode(batch.vectors, batch.position)
                for pool in pools.values():
                    pool.update(batch, codes)
            for count, pool in pools.items():
                pooling = "mean" if count == 1 else f"segments{count}"
                found += order.order_accuracy(task, pool.features(), ask.ks, pooling)
        for dataset, activations in data.probes.values():
            pool = Pool(len(dataset.texts), sae.d_sae, n_positions)
            for batch in _kept_batches(activations, advance):
                pool.update(batch, sae.sparse_encode(batch.vectors, batch.position))
            found += topics.probe_accuracy(dataset, pool.features(), ask.ks, "sae")
    return found


def baselines(study: StudySettings, data: Data) -> list[rows.Measure]:
    """What needs no SAE: probes on the model's own channels, and the bag-of-words control of each order task."""
    ask, n_positions = study.evaluation, study.corpus.n_positions
    found: list[rows.Measure] = []
    n_tokens = sum(activations.n_kept for _, activations in [*data.order.values(), *data.probes.values()])
    with progress_bar("evaluate the model itself", n_tokens, "tokens") as advance:

        def pooled(activations: Activations, n_texts: int) -> Tensor:
            pool = Pool(n_texts, activations.d_model, n_positions)
            for batch in _kept_batches(activations, advance):
                pool.update_dense(batch)
            return pool.features()

        for task, activations in data.order.values():
            found += order.bag_accuracy(task, data.tokenizer)
            found += order.order_accuracy(task, pooled(activations, len(task.texts)), ask.ks, "mean")
        for dataset, activations in data.probes.values():
            features = pooled(activations, len(dataset.texts))
            found += topics.probe_accuracy(dataset, features, ask.ks, "llm")
    return found


@dataclass(frozen=True)
class _Place:
    """A cell's folder and what it must have been made from."""

    cell: CellSettings | None  # None: the baselines
    seed: int
    folder: Path
    made_from: dict[str, Any]

    @property
    def label(self) -> str:
        return self.folder.name


def _places(study: StudySettings, source: Source, root: Path) -> list[_Place]:
    shared = {
        "model": source.made_from,
        "texts": _texts_identity(),
        **study.model_dump(mode="json", include={"corpus", "evaluation"}),
    }
    places = [_Place(None, 0, root / _BASELINES, shared)]
    training_part = study.model_dump(mode="json", include={"sae", "training"})
    for cell in study.cells:
        for seed in study.seeds:
            made_from = {**shared, **training_part, "cell": cell.model_dump(mode="json"), "seed": seed}
            places.append(_Place(cell, seed, root / "cells" / f"{cell.name}-seed{seed}", made_from))
    return places


CellState = Literal["finished", "missing", "other settings"]


def _state(place: _Place) -> CellState:
    if folders.finished(place.folder, place.made_from):
        return "finished"
    return "other settings" if place.folder.exists() else "missing"


def cell_states(study: StudySettings, root: Path) -> list[tuple[str, CellState]]:
    """For the baselines and each cell: whether its folder is finished, missing, or made from other settings."""
    return [(place.label, _state(place)) for place in _places(study, Source(study.model), root)]


def run_study(study: StudySettings, root: Path, say: Callable[[str], None] = print) -> list[rows.Row]:
    """Do what is missing under `root` and write `results.csv` there; returns its rows.

    A finished folder is never made again. One that was made from other settings is moved to `root/stale`.
    """
    kernels.keep_freed_memory()
    source = Source(study.model)
    places = _places(study, source, root)
    todo = [place for place in places if _state(place) != "finished"]
    if len(todo) < len(places):
        say(f"{len(places) - len(todo)} of {len(places)} folders are finished and stay as they are.")
    if todo:
        data = prepare(study, source, root)  # What cannot be prepared has moved nothing yet.
        for name in (RESULTS_FILE, "report.html"):  # Old numbers must not stand beside new cells.
            (root / name).unlink(missing_ok=True)
        for place in todo:
            if place.folder.exists():
                moved = folders.set_aside(place.folder, root / "stale")
                say(f"{place.label} was made from other settings: moved to {moved}.")
            _run_place(study, place, data)
    results = [row for place in places for row in _read_rows(place.folder)]
    draft = root / f".{RESULTS_FILE}.draft"
    rows.write_rows(draft, results)
    draft.replace(root / RESULTS_FILE)
    return results


def _run_place(study: StudySettings, place: _Place, data: Data) -> None:
    cell = place.cell
    with folders.write_folder(place.folder, place.made_from) as draft:
        if cell is None:
            found = baselines(study, data)
            columns = {"mask": "none", "budget": "", "apply": ""}
            name = _MODEL_CELL
        else:
            sae = study.make_sae(cell, data.training.d_model, place.seed)
            trained = training.train(sae, data.training, study.training, place.seed, place.label)
            training.write_curve(draft / "curve.csv", trained.curve)
            write_sae(sae, draft)
            found = [
                rows.Measure("train_seconds", trained.seconds, n=1),
                rows.Measure("train_tokens", trained.n_tokens, n=1),
                rows.Measure("d_sae", sae.d_sae, n=1),
                *evaluate(study, sae, trained.dead, data, place.label),
            ]
            columns = {"mask": cell.mask.kind, "budget": cell.budget, "apply": cell.mask.apply}
            name = cell.name
        (draft / "settings.json").write_text(folders.as_json(place.made_from), encoding="utf8")
        rows.write_rows(
            draft / "rows.csv",
            [rows.Row.of(measure, cell=name, seed=place.seed, **columns) for measure in found],
        )


def _read_rows(folder: Path) -> list[rows.Row]:
    folders.read_manifest(folder, verify=True)
    return rows.read_rows(folder / "rows.csv")
