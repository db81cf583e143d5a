"""A study: settings x cells x seeds -> run folders -> one results table. Does only what is missing.

The path of the data, in the order of the functions below: `prepare` harvests vectors once for all cells, `run_cell`
trains one SAE and evaluates it into its folder, `run_study` goes over the cells and joins their rows.
"""

import difflib
import multiprocessing
import os
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from posmask import assets, corpus, folders, kernels, mask_kinds, masks, model, rows, rules, training, verdicts
from posmask.activations import Activations, Stored, harvest, training_batches
from posmask.errors import BadSetting, PosmaskError
from posmask.evaluation import Data, EvaluationSettings, baselines, decay, evaluate, growing_name
from posmask.interop import saebench
from posmask.probing import topics
from posmask.probing.order import order_tokens
from posmask.probing.order_tasks import make_order_task
from posmask.progress import announce
from posmask.sae import WEIGHTS_FILE, SparseAutoencoder, read_origin, read_sae, started_from, write_sae

__all__ = ["CellSettings", "StudySettings", "cell_states", "read_study", "run_study"]

RESULTS_FILE = "results.csv"
VERDICTS_FILE = "verdicts.csv"
UNITS_FILE = "units.safetensors"
SAEBENCH_FILE = "saebench.json"
_BASELINES = "baselines"
_MODEL_CELL = "llm"  # what the baselines' rows say in the column `cell`


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Settings):
    """Whose vectors, and from where in it."""

    name: str
    """`embedded:SmolLM2-135M-Instruct`, a name on the hub, or a folder."""
    layer: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, lt=1)]
    """Vectors are read after this many layers (`hidden_states[layer]`). Below 1: after this share of all layers, for
    studies that are to carry over to other models."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model's forward pass and of the stored vectors. auto: bfloat16 where the processor is fast in it."""
    stored: Stored = "model"
    """Of the training vectors on disk; those that are measured on always keep the model's precision."""


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
    measured_on: corpus.Measured = "evaluation"
    """Whose texts metrics, order tasks and probes use. validation: others than any reported number rests on, for
    choosing recipes and settings."""
    max_characters: int = Field(default=1000, gt=0)
    """Texts are cut to this length, so that a few long ones do not make up the corpus."""


class SaeSettings(_Settings):
    """The unmasked SAE's size; `budget` says what a cell makes of it."""

    d_sae: int = Field(gt=0)
    rule: SerializeAsAny[rules.RuleSettings]

    @field_validator("rule", mode="before")
    @classmethod
    def _known_rule(cls, value: Any) -> Any:
        return rules.rule_settings(value) if isinstance(value, dict) else value


class CellSettings(_Settings):
    """One row of the study: a mask at a budget."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    mask: SerializeAsAny[masks.MaskSettings]
    budget: Literal["width", "compute"] = "width"
    """width: d_sae latents in all. compute: d_sae latents open at each position, as many in all as that takes."""
    start: str | None = None
    """Where its weights come from: the name of an open cell, or (with a slash in it) the folder of an SAE that is open
    everywhere; each latent becomes a copy. None: drawn at random."""
    steps_share: float = Field(default=1.0, gt=0, le=1)
    """Its share of `training.n_steps`, counting those of the cell it starts from: there are no free steps."""
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    """In place of the study's, for rows that need more of them, or fewer."""
    decay: bool = False
    """Whether a copy is trained on without the mask, to see how fast specialisation fades: costs as much again."""

    @property
    def start_folder(self) -> Path | None:
        return Path(self.start) if self.start is not None and "/" in self.start else None

    @field_validator("mask", mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        return mask_kinds.mask_settings(value) if isinstance(value, dict) else value


class QuestionSettings(_Settings):
    """A comparison to be judged, beside each cell's with the first open one."""

    cell: str
    against: str
    """A cell's name, or `CELL + POOLING` for its order probes on another pooling, such as `open + segments8`."""


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
    questions: tuple[QuestionSettings, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> "StudySettings":
        names = [cell.name for cell in self.cells]
        if _MODEL_CELL in names:
            raise ValueError(f"a cell is called {_MODEL_CELL!r}, which stands for the model itself: rename it")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two cells are called {name!r}: give each its own name")
        self._check_questions(names)
        self._check_starts()
        steps = [round(share * self.training.n_steps) for share in self.evaluation.decay_shares]
        if len(set(steps)) < len(steps) or not any(steps):
            raise ValueError(
                f"evaluation.decay_shares = {list(self.evaluation.decay_shares)} of {self.training.n_steps} steps are "
                f"the steps {steps}: name shares that differ by a step, one of them above 0"
            )
        corpus.shift_length(self.corpus.n_positions, self.evaluation.shift_windows)
        for seeds in (self.seeds, *(cell.seeds for cell in self.cells if cell.seeds)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds = {list(seeds)} repeats a seed: the same run twice is no second sample")
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

    def _check_starts(self) -> None:
        by_name = {cell.name: cell for cell in self.cells}
        baseline = by_name.get(self.baseline or "")
        for cell in self.cells:
            source = by_name.get(cell.start or "")
            if baseline is not None and baseline.start_folder != cell.start_folder:
                raise ValueError(
                    f"{cell.name} starts from {cell.start or 'scratch'}, but {baseline.name}, with which it would be "
                    f"compared, from {baseline.start or 'scratch'}: let all start from the same folder, or none, since "
                    "training tokens count"
                )
            if cell.decay and cell.mask.kind == "switch":
                raise ValueError(f"{cell.name} has decay, but a switch cannot be trained on without its router")
            if cell.start is None or cell.start_folder:
                if self.n_steps(cell) < 1:
                    raise ValueError(f"steps_share = {cell.steps_share} of {cell.name} makes 0 steps: raise it")
                continue
            if source is None:
                raise ValueError(f"{cell.name} starts from {cell.start!r}, which is no cell (a folder needs a slash)")
            if source.mask.kind != "open" or source.budget != "width" or source.start is not None:
                raise ValueError(
                    f"{cell.name} starts from {cell.start}, which is not an open cell of its own: name one that is"
                )
            if lacking := sorted(set(self.seeds_of(cell)) - set(self.seeds_of(source))):
                raise ValueError(
                    f"{cell.name} starts from {cell.start}, which has no seeds {lacking}: give it those too"
                )
            if self.n_steps(cell) < 1:
                raise ValueError(
                    f"{cell.name} starts from {cell.start}, which leaves no step of its {self.training.n_steps}: name "
                    "an open cell with a smaller steps_share"
                )

    def seeds_of(self, cell: CellSettings) -> tuple[int, ...]:
        return cell.seeds or self.seeds

    def n_steps(self, cell: CellSettings) -> int:
        """Steps that a cell itself is trained for."""
        source = next((other for other in self.cells if other.name == cell.start), None)
        total = round(cell.steps_share * self.training.n_steps)
        return total - (self.n_steps(source) if source is not None and source != cell else 0)

    def _check_questions(self, names: list[str]) -> None:
        baseline = self.baseline
        asked = {(cell.name, baseline) for cell in self.cells if baseline not in (None, cell.name)}
        open_cells = {cell.name for cell in self.cells if cell.mask.kind == "open"}
        pooled = {f"segments{self.evaluation.order_segments}", growing_name(self.corpus.n_positions)}
        for question in self.questions:
            sides = question.cell, question.against
            for side in sides:
                name, _, pooling = side.partition(" + ")
                if name not in names:
                    raise ValueError(f"questions ask about {side!r}, which is no cell: choose from {', '.join(names)}")
                known = pooled if name in open_cells else {"fair"}
                if pooling and pooling not in known:
                    raise ValueError(f"questions ask about {side!r}, but {name} has the poolings {sorted(known)}")
            one, other = (next(cell for cell in self.cells if cell.name == side.partition(" + ")[0]) for side in sides)
            if not set(self.seeds_of(one)) & set(self.seeds_of(other)):
                raise ValueError(
                    f"questions compare {sides[0]!r} with {sides[1]!r}, which share no seed: give them one"
                )
            if sides[0] == sides[1] or sides in asked:
                raise ValueError(
                    f"questions ask for {sides[0]!r} against {sides[1]!r} twice, or for nothing: remove it"
                )
            asked.add(sides)

    @property
    def baseline(self) -> str | None:
        """The cell that every other is compared with: the first open one."""
        for cell in self.cells:
            if cell.mask.kind == "open" and cell.budget == "width" and cell.steps_share == 1:
                return cell.name
        return None

    def width(self, cell: CellSettings) -> int:
        """How many latents a cell's SAE has."""
        if cell.budget == "width":
            return self.sae.d_sae
        kind = mask_kinds.MASKS[cell.mask.kind]
        return kind.width_at_equal_compute(cell.mask, self.corpus.n_positions, self.sae.d_sae)

    def make_sae(self, cell: CellSettings, d_model: int, seed: int) -> SparseAutoencoder:
        mask = self._make_mask(cell, seed)
        return SparseAutoencoder(d_model, self.sae.rule, mask, seed)

    def _make_mask(self, cell: CellSettings, seed: int) -> masks.PositionMask:
        return mask_kinds.make_mask(cell.mask, self.corpus.n_positions, self.width(cell), seed)

    def start_sae(self, cell: CellSettings, source: SparseAutoencoder, seed: int) -> SparseAutoencoder:
        """The SAE of a cell that starts from another."""
        if source.rule.settings != self.sae.rule:
            raise BadSetting(
                f"{cell.name} would start from an SAE with the rule {source.rule.settings.model_dump()}, but sae.rule "
                f"is {self.sae.rule.model_dump()}: make them equal"
            )
        return started_from(source, self._make_mask(cell, seed), seed)


def read_study(path: Path, changes: Sequence[str] = ()) -> StudySettings:
    """The settings in a study file, checked as far as can be without loading anything.

    Args:
        changes: settings to replace, such as `model.layer=5`; what stands behind = is a TOML value, or bare text.

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
    for change in changes:
        _apply_change(values, change)
    try:
        study = StudySettings.model_validate(values)
        for cell in study.cells:  # Masks that do not fit are found here, not after the harvest.
            study.make_sae(cell, d_model=1, seed=study.seeds[0])
            if cell.start_folder is not None:
                study.start_sae(cell, read_sae(cell.start_folder), seed=study.seeds[0])
            elif cell.start is not None:
                stand_in = CellSettings(name="source", mask=mask_kinds.mask_settings({"kind": "open"}))
                study.start_sae(cell, study.make_sae(stand_in, d_model=1, seed=0), seed=study.seeds[0])
    except ValidationError as error:
        raise BadSetting(f"{path}: {_first_mistake(error)}") from None
    except PosmaskError as error:
        raise BadSetting(f"{path}: {error}") from None
    return study


def _apply_change(values: dict[str, Any], change: str) -> None:
    """Put `table.key=value` into a study's values."""
    place, equals, text = change.partition("=")
    *tables, key = place.strip().split(".")
    for table in tables:
        values = values.get(table, {})
        if not isinstance(values, dict):
            break
    if not equals or not isinstance(values, dict) or not values:
        raise BadSetting(f"{change!r} changes no setting: write TABLE.KEY=VALUE, such as model.layer=5")
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[key] = text.strip()


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
        QuestionSettings,
        training.TrainingSettings,
    ):
        found |= set(part.model_fields)
    for part in (*mask_kinds.MASKS.values(), *rules.RULES.values()):
        found |= set(part.Settings.model_fields)
    return sorted(found)


class Source:
    """The model a study reads vectors from, loaded only when something must be harvested."""

    def __init__(self, settings: ModelSettings) -> None:
        precision = model.fast_precision() if settings.precision == "auto" else settings.precision
        self._settings = settings
        self._precision: model.ModelPrecision = precision

    @cached_property
    def layer(self) -> int:
        return model.layer_number(self._settings.name, self._settings.layer)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        return {
            "weights": model.weights_identity(self._settings.name),
            "layer": self.layer,
            "precision": self._precision,
        }

    @cached_property
    def tokenizer(self) -> Any:
        return model.load_tokenizer(self._settings.name)

    @cached_property
    def loaded(self) -> model.LanguageModel:
        return model.load_model(self._settings.name, self.layer, self._precision)


def _texts_identity() -> dict[str, Any]:
    carriers = {carrier.package: carrier.wheel_sha256 for carrier in assets.CARRIERS if carrier != assets.MODEL_CARRIER}
    shares = [corpus.TRAINING_SHARE, corpus.VALIDATION_SHARE]
    return {"carriers": carriers, "shares": shares}


def prepare(study: StudySettings, source: Source, root: Path) -> Data:
    """Harvest what is missing: training, held-out, order and probe texts, each into a folder of its own."""
    n_positions = study.corpus.n_positions
    shared = {
        "model": source.made_from,
        "texts": _texts_identity(),
        "n_positions": n_positions,
    }

    def harvested(
        label: str, what: dict[str, Any], tokens: Callable[[], corpus.Tokens], stored: Stored = "model"
    ) -> Activations:
        made_from = {**shared, **what, "stored": stored}
        folder = root / "activations" / f"{label}-{folders.identity(made_from)}"
        if folders.finished(folder, made_from):
            return Activations(folder)
        with folders.claim(folder, wait=True):  # Another process may have made it meanwhile.
            if folders.finished(folder, made_from):
                return Activations(folder)
            return harvest(tokens(), source.loaded, folder, made_from, label, stored)

    @cache
    def texts(split: corpus.Split) -> list[str]:
        announce(f"Reading the {split} texts of {len(study.corpus.tables)} tables.")
        found = corpus.unique_texts(
            (text for name in study.corpus.tables for text, _ in assets.read_table(name)), split
        )
        return [text[: study.corpus.max_characters] for text in found]

    def packed(split: corpus.Split, n_tokens: int) -> Callable[[], corpus.Tokens]:
        return lambda: corpus.pack(texts(split), source.tokenizer, n_positions, n_tokens)

    settings = study.corpus.model_dump(mode="json", include={"tables", "max_characters"})
    measured_on = study.corpus.measured_on
    ask = study.evaluation
    splits: tuple[tuple[corpus.Split, int, Stored], ...] = (
        ("training", study.corpus.training_tokens, study.model.stored),
        (measured_on, study.corpus.heldout_tokens, "model"),
    )
    sets = {
        split: harvested(split, {"split": split, "tokens": n_tokens, **settings}, packed(split, n_tokens), stored)
        for split, n_tokens, stored in splits
    }
    kernels.give_back_freed_memory()
    n_pieces, n_windows = ask.shift_texts, ask.shift_windows
    shift = harvested(
        "shift",
        {"shift": [n_pieces, n_windows], "split": measured_on, **settings},
        lambda: corpus.shifted(texts(measured_on), source.tokenizer, n_positions, n_pieces, n_windows),
    )
    tasks, datasets = {}, {}
    for name in ask.order_tasks:
        task = make_order_task(
            name, source.tokenizer, n_positions, ask.order_train_groups, ask.order_test_groups, measured_on
        )
        tokens = partial(order_tokens, task, source.tokenizer, n_positions)
        tasks[name] = task, harvested(name, {"shuffled_too": True, "texts_of": list(task.texts)}, tokens)
    for name in ask.probe_datasets:
        dataset = topics.read_probe_dataset(
            name, ask.probe_train, ask.probe_test, study.corpus.max_characters, measured_on
        )
        tokens = partial(corpus.pad, dataset.texts, source.tokenizer, n_positions)
        datasets[name] = dataset, harvested(name, {"texts_of": list(dataset.texts)}, tokens)
    return Data(
        sets["training"],
        sets[measured_on],
        shift,
        tasks,
        datasets,
        source.tokenizer,
        n_positions,
        ask,
        lambda: source.loaded,
    )


@dataclass(frozen=True)
class _Place:
    """A cell's folder and what it must have been made from."""

    cell: CellSettings | None  # None: the baselines
    seed: int
    folder: Path
    made_from: dict[str, Any]
    start: Path | None = None  # the folder of the SAE that the cell starts from

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
    names = [cell.name for cell in study.cells]
    for cell in study.cells:
        for seed in study.seeds_of(cell):
            own = cell.model_dump(mode="json", exclude={"seeds"})
            made_from = {**shared, **training_part, "cell": own, "seed": seed}
            start = cell.start_folder
            if start is not None:
                made_from["start"] = _checked_start(start, source.made_from)
            elif cell.start is not None:
                # Where the cell it starts from would be made anew, so must it be.
                origin = study.cells[names.index(cell.start)]
                start = root / "cells" / f"{cell.start}-seed{seed}"
                made_from["start"] = origin.model_dump(mode="json", exclude={"decay", "seeds"})
            places.append(_Place(cell, seed, root / "cells" / f"{cell.name}-seed{seed}", made_from, start))
    return places


def _checked_start(folder: Path, model_made_from: dict[str, Any]) -> dict[str, Any]:
    """The identity of an SAE that a user brings.

    Raises:
        BadSetting: it says that it was trained on another model or layer.
    """
    origin = read_origin(folder)
    for what in ("weights", "layer"):
        if what in origin and origin[what] != model_made_from[what]:
            raise BadSetting(
                f"the SAE in {folder} was trained on {what} {origin[what]!r} of a model, not on "
                f"{model_made_from[what]!r}: start from one of the same model and layer"
            )
    return {"sha256": folders.file_sha256(folder / WEIGHTS_FILE)}


CellState = Literal["finished", "missing", "other settings"]


def _state(place: _Place) -> CellState:
    if folders.finished(place.folder, place.made_from):
        return "finished"
    return "other settings" if place.folder.exists() else "missing"


def cell_states(study: StudySettings, root: Path) -> list[tuple[str, CellState]]:
    """For the baselines and each cell: whether its folder is finished, missing, or made from other settings."""
    return [(place.label, _state(place)) for place in _places(study, Source(study.model), root)]


def run_study(study: StudySettings, root: Path, say: Callable[[str], None] = print, n_jobs: int = 1) -> list[rows.Row]:
    """Do what is missing under `root` and write `results.csv` there; returns its rows.

    A finished folder is never made again. One that was made from other settings is moved to `root/stale`.

    Args:
        n_jobs: how many processes share the cells, and the processor's threads. The others' output goes to
            `root/jobs`.
    """
    kernels.keep_freed_memory()
    source = Source(study.model)
    places = _places(study, source, root)
    todo = [place for place in places if _state(place) != "finished"]
    if len(todo) < len(places):
        say(f"{len(places) - len(todo)} of {len(places)} folders are finished and stay as they are.")
    if todo:
        data = prepare(study, source, root)  # What cannot be prepared has moved nothing yet.
        for name in (RESULTS_FILE, VERDICTS_FILE, "report.html"):  # Old numbers must not stand beside new cells.
            (root / name).unlink(missing_ok=True)
        if n_jobs > 1:
            say(f"{n_jobs} processes share the cells; what the others say goes to {root / 'jobs'}.")
        with _helpers(study, root, n_jobs):
            _run_places(study, todo, data, root, say)
    results = [row for place in places for row in _read_rows(place.folder)]
    _write_whole(root / RESULTS_FILE, partial(rows.write_rows, rows=results))
    _write_whole(root / VERDICTS_FILE, partial(verdicts.write_verdicts, verdicts=_verdicts(study, places)))
    return results


def _run_places(study: StudySettings, todo: list[_Place], data: Data, root: Path, say: Callable[[str], None]) -> None:
    """Make what is missing, each folder in one process alone, until all of them are there."""
    waiting = sorted(todo, key=lambda place: place.start is not None)  # what others start from comes first
    while waiting:
        for place in list(waiting):
            missing = {other.folder for other in waiting}
            if (place.cell is not None and root / _BASELINES in missing) or place.start in missing:
                continue  # Another process is at what this one needs.
            with folders.claim(place.folder, wait=False) as mine:
                if not mine:
                    continue
                state = _state(place)
                if state == "other settings":
                    moved = folders.set_aside(place.folder, root / "stale")
                    say(f"{place.label} was made from other settings: moved to {moved}.")
                if state != "finished":
                    _run_place(study, place, data, [] if place.cell is None else _read_rows(root / _BASELINES))
            waiting.remove(place)
            break
        else:
            time.sleep(1)


@contextmanager
def _helpers(study: StudySettings, root: Path, n_jobs: int) -> Iterator[None]:
    """Other processes that run this study's cells as long as this one does."""
    if n_jobs == 1:
        yield
        return
    n_threads = max(1, (os.cpu_count() or 1) // n_jobs)
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=_help, args=(study, root, n_threads, root / "jobs" / f"{number}.log"), daemon=True)
        for number in range(2, n_jobs + 1)
    ]
    for helper in helpers:
        helper.start()
    try:
        with kernels.threads(n_threads):
            yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _help(study: StudySettings, root: Path, n_threads: int, log: Path) -> None:
    with log.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file), kernels.threads(n_threads):
        kernels.keep_freed_memory()
        source = Source(study.model)
        todo = [place for place in _places(study, source, root) if _state(place) != "finished"]
        _run_places(study, todo, prepare(study, source, root), root, print)


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and move it there, so that it is never seen half-written."""
    draft = path.with_name(f".{path.name}.draft")
    write(draft)
    draft.replace(path)


def _verdicts(study: StudySettings, places: list[_Place]) -> list[verdicts.Verdict]:
    """Each cell against the first open one, then the study's own questions."""
    units: dict[str, dict[int, dict[str, rows.Units]]] = {}
    for place in places:
        if place.cell is not None:
            units.setdefault(place.cell.name, {})[place.seed] = rows.read_units(place.folder / UNITS_FILE)
    baseline = study.baseline
    asked = [verdicts.Comparison(cell.name, baseline) for cell in study.cells if baseline not in (None, cell.name)]
    asked += [verdicts.Comparison(question.cell, question.against) for question in study.questions]
    return verdicts.judge(units, asked)


def _run_place(study: StudySettings, place: _Place, data: Data, baseline: list[rows.Row]) -> None:
    """Fill one folder.

    Args:
        baseline: the rows of the baselines, which come first.
    """
    cell = place.cell
    with folders.write_folder(place.folder, place.made_from) as draft:
        if cell is None:
            found = baselines(data)
            columns = {"mask": "none", "budget": "", "apply": ""}
            name = _MODEL_CELL
        else:
            before = 0
            if place.start is None:
                sae = study.make_sae(cell, data.training.d_model, place.seed)
                sae.center, sae.scale = data.training.centre_and_scale
            else:  # With the constants that its weights were made for.
                sae = study.start_sae(cell, _read_start(place.start, data.training.d_model), place.seed)
                before = read_origin(place.start).get("training_tokens", 0)
            settings = study.training.model_copy(update={"n_steps": study.n_steps(cell)})
            taken = round(cell.steps_share * study.training.n_steps) - settings.n_steps  # by the cell it starts from
            batches = training_batches(data.training, settings.batch_tokens, settings.n_steps, place.seed, after=taken)
            trained = training.train(sae, batches, settings, place.label)
            del batches
            kernels.give_back_freed_memory()
            training.write_curve(draft / "curve.csv", trained.curve)
            n_tokens = before + trained.n_tokens
            model_made_from = place.made_from["model"]
            write_sae(
                sae,
                draft,
                {
                    "weights": model_made_from["weights"],
                    "layer": model_made_from["layer"],
                    "training_tokens": n_tokens,
                },
            )
            found = [
                rows.Measure("train_seconds", trained.seconds, n=1),
                rows.Measure("train_tokens", n_tokens, n=1),
                rows.Measure("d_sae", sae.d_sae, n=1),
                *evaluate(sae, trained.dead, data, place.label),
            ]
            if cell.decay:
                found += decay(sae, data, study.training, place.seed, place.label)
            if study.evaluation.probe_datasets:
                _write_saebench(draft / SAEBENCH_FILE, study, place, found, baseline)
            columns = {"mask": cell.mask.kind, "budget": cell.budget, "apply": cell.mask.apply}
            name = cell.name
        (draft / "settings.json").write_text(folders.as_json(place.made_from), encoding="utf8")
        rows.write_rows(
            draft / "rows.csv",
            [rows.Row.of(measure, cell=name, seed=place.seed, **columns) for measure in found],
        )
        rows.write_units(draft / UNITS_FILE, found)
    kernels.give_back_freed_memory()


def _read_start(folder: Path, d_model: int) -> SparseAutoencoder:
    sae = read_sae(folder)
    if sae.d_model != d_model:
        raise BadSetting(f"the SAE in {folder} codes vectors of {sae.d_model} numbers, the model gives {d_model}")
    return sae


def _write_saebench(
    path: Path, study: StudySettings, place: _Place, found: list[rows.Measure], baseline: list[rows.Row]
) -> None:
    """SAEBench's own evaluation file, with the same cell's probe accuracies."""
    assert place.cell is not None
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
        random_seed=topics.SAEBENCH_SEED,
        dataset_names=ask.probe_datasets,
        probe_train_set_size=ask.probe_train,
        probe_test_set_size=ask.probe_test,
        context_length=study.corpus.n_positions,
        llm_dtype=place.made_from["model"]["precision"],
        model_name=study.model.name,
        k_values=ask.ks,
    )
    identity = folders.identity(place.made_from)
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


def _read_rows(folder: Path) -> list[rows.Row]:
    folders.read_manifest(folder, verify=True)
    return rows.read_rows(folder / "rows.csv")
