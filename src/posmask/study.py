"""A study: settings x cells x seeds -> run folders -> one results table. Does only what is missing.

The path of the data, in the order of the functions below: `prepare` harvests vectors once for all cells, `run_cell`
trains one SAE and evaluates it into its folder, `run_study` goes over the cells and joins their rows.
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

from posmask import assets, corpus, folders, kernels, model, parallel, rows, training, verdicts
from posmask.activations import Activations, Stored, finished_activations, harvest, training_batches
from posmask.checkpoints import Checkpoints
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation import Data, baselines, decay, evaluate
from posmask.interop import saebench
from posmask.latents import LATENTS_FILE
from posmask.probing import topics
from posmask.probing.order import order_tokens
from posmask.probing.order_tasks import make_order_task
from posmask.progress import announce
from posmask.sae import WEIGHTS_FILE, SparseAutoencoder, read_origin, read_sae, restate_, write_sae
from posmask.settings import MODEL_CELL, CellSettings, ModelSettings, StudySettings
from posmask.texts import content_of, read_texts
from posmask.tracking import check_tracker, curve_writer

__all__ = ["Source", "cell_states", "evaluate_folder", "look_at_latents", "run_study", "train_together"]

RESULTS_FILE = "results.csv"
VERDICTS_FILE = "verdicts.csv"
UNITS_FILE = "units.safetensors"
SAEBENCH_FILE = "saebench.json"
_BASELINES = "baselines"
_CHECKPOINTS = "checkpoints"
CHECKPOINT_SECONDS = 90.0


class Source:
    """The model a study reads vectors from, loaded only when something must be harvested."""

    def __init__(self, settings: ModelSettings, device: str = "cpu") -> None:
        precision = model.fast_precision(device) if settings.precision == "auto" else settings.precision
        self._settings = settings
        self._device = device
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
            # Named only where it is not what all folders were made from before there was a choice.
            **({} if self._settings.site == "residual_after" else {"site": self._settings.site}),
        }

    @cached_property
    def tokenizer(self) -> Any:
        return model.load_tokenizer(self._settings.name)

    @cached_property
    def loaded(self) -> model.LanguageModel:
        settings = self._settings
        return model.load_model(settings.name, self.layer, self._precision, site=settings.site, device=self._device)


def _texts_identity(study: StudySettings) -> dict[str, Any]:
    carriers = {carrier.package: carrier.wheel_sha256 for carrier in assets.CARRIERS if carrier != assets.MODEL_CARRIER}
    shares = [corpus.TRAINING_SHARE, corpus.VALIDATION_SHARE]
    own = study.corpus.texts
    return {"carriers": carriers, "shares": shares} | ({} if own is None else {"own": content_of(own)})


def prepare(study: StudySettings, source: Source, root: Path) -> Data:
    """Harvest what is missing: training, held-out, order and probe texts, each into a folder of its own."""
    n_positions = study.corpus.n_positions
    shared = {
        "model": source.made_from,
        "texts": _texts_identity(study),
        "n_positions": n_positions,
    }
    store = study.store(root)

    def harvested(
        label: str, what: dict[str, Any], tokens: Callable[[], corpus.Tokens], stored: Stored = "model"
    ) -> Activations:
        made_from = {**shared, **what, "stored": stored}
        place = root / "activations" / f"{label}-{folders.identity(made_from)}"
        folder = place if store is None else store.folder(place.name)

        def there() -> Activations | None:
            with contextlib.suppress(DamagedFolder):  # Then `harvest` says so, and mends it.
                return finished_activations(folder, made_from)
            return None

        if (found := there()) is not None:
            return found
        with folders.claim(place, wait=True):  # Another process may have made it meanwhile.
            return there() or harvest(tokens(), source.loaded, folder, made_from, label, stored)

    @cache
    def texts(split: corpus.Split) -> list[str]:
        tables, own = study.corpus.tables, study.corpus.texts
        announce(f"Reading the {split} texts of {own or f'{len(tables)} tables'}.")
        every = (text for name in tables for text, _ in assets.read_table(name))
        found = corpus.unique_texts(every if own is None else read_texts(own, study.corpus.n_texts), split)
        return [text[: study.corpus.max_characters] for text in found]

    def packed(split: corpus.Split, n_tokens: int) -> Callable[[], corpus.Tokens]:
        return lambda: corpus.pack(texts(split), source.tokenizer, n_positions, n_tokens)

    settings = study.corpus.source
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

    @property
    def checkpoints(self) -> Path:
        """Where its training stands, as long as it is not finished."""
        root = self.folder.parents[0 if self.cell is None else 1]
        return root / _CHECKPOINTS / self.label


def _shared(study: StudySettings, source: Source) -> dict[str, Any]:
    """What every result of a study was made from."""
    return {
        "model": source.made_from,
        "texts": _texts_identity(study),
        "corpus": study.corpus.model_dump(mode="json", exclude_none=True),
        "evaluation": study.evaluation.model_dump(mode="json"),
    }


def _places(study: StudySettings, source: Source, root: Path) -> list[_Place]:
    shared = _shared(study, source)
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
    for what in ("weights", "layer", "site"):
        if what in origin and origin[what] != model_made_from.get(what, "residual_after"):
            raise BadSetting(
                f"the SAE in {folder} was trained on {what} {origin[what]!r} of a model, not on "
                f"{model_made_from.get(what, 'residual_after')!r}: start from one of the same model and layer"
            )
    return {"sha256": folders.file_sha256(folder / WEIGHTS_FILE)}


CellState = Literal["finished", "missing", "other settings", "damaged"]


def _state(place: _Place, *, verify: bool = False) -> CellState:
    """
    Args:
        verify: read every file of a finished folder, too.
    """
    try:
        if folders.finished(place.folder, place.made_from):
            folders.read_manifest(place.folder, verify=verify)
            return "finished"
    except DamagedFolder:
        return "damaged"
    return "other settings" if place.folder.exists() else "missing"


def cell_states(study: StudySettings, root: Path) -> list[tuple[str, CellState]]:
    """For the baselines and each cell: whether its folder is finished, missing, or made from other settings.

    Where there is no folder yet the model is not asked for, which may be out of reach.
    """
    if not root.exists():
        labels = [f"{cell.name}-seed{seed}" for cell in study.cells for seed in study.seeds_of(cell)]
        return [(label, "missing") for label in (_BASELINES, *labels)]
    return [(place.label, _state(place)) for place in _places(study, Source(study.model, study.device), root)]


def run_study(study: StudySettings, root: Path, say: Callable[[str], None] = print, n_jobs: int = 1) -> list[rows.Row]:
    """Do what is missing under `root` and write `results.csv` there; returns its rows.

    A finished folder is never made again. One that was made from other settings is moved to `root/stale`.

    Args:
        n_jobs: how many processes share the cells, and the processor's threads. The others' output goes to
            `root/jobs`.
    """
    kernels.keep_freed_memory()
    model.check_device(study.device)
    check_tracker(study.track)
    source = Source(study.model, study.device)
    places = _places(study, source, root)
    todo = [place for place in places if _state(place, verify=True) != "finished"]
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
    for place in places:
        for checkpoint in place.checkpoints.glob("*"):
            folders.remove(checkpoint)
        shutil.rmtree(place.checkpoints, ignore_errors=True)
    results = [row for place in places for row in _read_rows(place.folder)]
    with folders.replacing(root / RESULTS_FILE) as beside:
        rows.write_rows(beside, results)
    with folders.replacing(root / VERDICTS_FILE) as beside:
        verdicts.write_verdicts(beside, _verdicts(study, places))
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
                state = _state(place, verify=True)
                if state in ("other settings", "damaged"):
                    moved = folders.set_aside(place.folder, root / "stale")
                    why = "was made from other settings" if state == "other settings" else "is damaged"
                    say(f"{place.label} {why}: moved to {moved}.")
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
        source = Source(study.model, study.device)
        todo = [place for place in _places(study, source, root) if _state(place, verify=True) != "finished"]
        _run_places(study, todo, prepare(study, source, root), root, print)


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


def _untrained(study: StudySettings, place: _Place, data: Data) -> tuple[SparseAutoencoder, int]:
    """A cell's SAE before its training, and the tokens that the SAE it starts from was trained on."""
    assert place.cell is not None
    if place.start is None:
        sae = study.make_sae(place.cell, data.training.d_model, place.seed)
        sae.center, sae.scale = data.training.centre_and_scale
        return sae.to(study.device), 0
    started, origin = _read_start(place.start, data.training.d_model), read_origin(place.start)
    if "imported" in origin:  # Else with the constants that its weights were made for.
        restate_(started, *data.training.centre_and_scale)
    sae = study.start_sae(place.cell, started, place.seed)
    return sae.to(study.device), origin.get("training_tokens", 0)


def _train(
    study: StudySettings, place: _Place, sae: SparseAutoencoder, data: Data, together: parallel.Together | None = None
) -> training.Trained:
    """Train a cell's SAE, or with others this process's part of it, from its last checkpoint on."""
    assert place.cell is not None
    settings = study.training.model_copy(update={"n_steps": study.n_steps(place.cell)})
    taken = round(place.cell.steps_share * study.training.n_steps) - settings.n_steps  # by the cell it starts from
    checkpoints = Checkpoints(place.checkpoints, place.made_from, CHECKPOINT_SECONDS, keeps_end=together is not None)
    batches = training_batches(
        data.training,
        settings.batch_tokens,
        settings.n_steps - checkpoints.done,
        place.seed,
        after=taken + checkpoints.done,
        mine=None if together is None else together.mine,
    )
    root = place.folder.parents[1]
    track = study.track if together is None or together.leads else None
    with curve_writer(track, root, study.name, place.label, place.made_from) as write:
        return training.train(
            sae,
            batches,
            settings,
            place.label,
            on_point=write,
            checkpoints=checkpoints,
            together=together or training.Alone(),
        )


def train_together(
    study: StudySettings, root: Path, cell: str, seed: int, by: Literal["data", "position"]
) -> parallel.Together | None:
    """Train one cell in all processes that torch.distributed has connected, and leave it for `run_study` to evaluate.

    Args:
        by: what is divided among the processes; see `parallel`.

    Returns:
        How they were together; None where the cell was finished already.

    Raises:
        BadSetting: no such cell, or one that cannot be divided so.
    """
    source = Source(study.model, study.device)
    place = next((one for one in _places(study, source, root) if one.label == f"{cell}-seed{seed}"), None)
    if place is None or place.cell is None:
        known = ", ".join(one.name for one in study.cells)
        raise BadSetting(f"{study.name} has no cell {cell!r} with seed {seed}: choose from {known}, and its seeds")
    if _state(place) == "finished":
        return None
    data = prepare(study, source, root)
    whole, _ = _untrained(study, place, data)
    if by == "data":
        together = parallel.ByData(whole)
        _train(study, place, whole, data, together)
    else:
        together = parallel.ByPosition(whole, data.training.position[data.training.keep])
        _train(study, place, together.part, data, together)
    return together


def _run_place(study: StudySettings, place: _Place, data: Data, baseline: list[rows.Row]) -> None:
    """Fill one folder.

    Args:
        baseline: the rows of the baselines, which come first.
    """
    cell = place.cell
    with folders.write_folder(place.folder, place.made_from, versions=_versions()) as draft:
        if cell is None:
            found = baselines(data)
            columns = {"mask": "none", "budget": "", "apply": ""}
            name = MODEL_CELL
        else:
            sae, before = _untrained(study, place, data)
            trained = _train(study, place, sae, data)
            kernels.give_back_freed_memory()
            training.write_curve(draft / "curve.csv", trained.curve)
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
            measured, facts = evaluate(sae, trained.dead, data, place.label)
            facts.write(draft, data.tokenizer)
            found = [
                rows.Measure("train_seconds", trained.seconds, n=1),
                rows.Measure("train_tokens", n_tokens, n=1),
                rows.Measure("d_sae", sae.d_sae, n=1),
                *measured,
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


def evaluate_folder(
    study: StudySettings, root: Path, folder: Path, say: Callable[[str], None] = print
) -> list[rows.Row]:
    """Ask an SAE that the study did not train what it asks its cells, on the same texts; returns its rows.

    They go to `root/evaluated/NAME`, NAME being the folder's. The baselines are made if they are missing; of training,
    and of what was dead at its end, nothing is said.

    Returns:
        The SAE's rows, then those of the baselines.

    Raises:
        BadSetting: the SAE is of another model or layer, or of contexts of another length.
    """
    kernels.keep_freed_memory()
    source = Source(study.model, study.device)
    sae, n_positions = read_sae(folder), study.corpus.n_positions
    if sae.mask.n_positions != n_positions:
        raise BadSetting(
            f"the SAE in {folder} is for contexts of {sae.mask.n_positions} positions, the study's have {n_positions}: "
            f"set corpus.n_positions, or import it with --n-positions {n_positions}"
        )
    made_from = {**_shared(study, source), "sae": _checked_start(folder, source.made_from)}
    name = folder.resolve().name
    place = _Place(None, 0, root / "evaluated" / name, made_from)
    baseline = _places(study, source, root)[0]
    missing = [one for one in (baseline, place) if _state(one) != "finished"]
    data = prepare(study, source, root) if missing else None
    for one in missing:
        assert data is not None
        if one.folder.exists():
            say(f"{one.label} was made from other settings: moved to {folders.set_aside(one.folder, root / 'stale')}.")
        if one is baseline:
            _run_place(study, one, data, [])
            continue
        sae = _read_start(folder, data.training.d_model).to(study.device)
        with folders.write_folder(place.folder, made_from) as draft:
            found, facts = evaluate(sae, None, data, name)
            facts.write(draft, data.tokenizer)
            if study.evaluation.probe_datasets:
                _write_saebench(draft / SAEBENCH_FILE, study, place, found, _read_rows(baseline.folder))
            mask = sae.mask.settings
            columns = {"cell": name, "mask": mask.kind, "budget": "", "apply": mask.apply, "seed": 0}
            rows.write_rows(draft / "rows.csv", [rows.Row.of(measure, **columns) for measure in found])
            rows.write_units(draft / UNITS_FILE, found)
    return _read_rows(place.folder) + _read_rows(baseline.folder)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("posmask", "torch", "transformers", "numpy")}


def look_at_latents(study: StudySettings, root: Path, say: Callable[[str], None] = print) -> int:
    """Evaluate finished cells that lack what the page's latent browser shows, and add it to their folders.

    Nothing is trained, and rows stay as they were. Returns for how many cells it was done.
    """
    source = Source(study.model, study.device)
    todo = [
        place
        for place in _places(study, source, root)
        if place.cell is not None and _state(place) == "finished" and not (place.folder / LATENTS_FILE).is_file()
    ]
    data = prepare(study, source, root) if todo else None
    for place in todo:
        assert data is not None
        manifest = folders.read_manifest(place.folder, verify=True)
        sae = read_sae(place.folder).to(study.device)
        _, facts = evaluate(sae, None, data, place.label)
        kept = {key: manifest[key] for key in manifest.keys() - {"identity", "made_from", "files"}}
        with (
            folders.claim(place.folder, wait=True),
            folders.write_folder(place.folder, place.made_from, **kept) as draft,
        ):
            for name in manifest["files"]:
                shutil.copy2(place.folder / name, draft / name)
            facts.write(draft, data.tokenizer)
        say(f"{place.label}: looked at {sae.d_sae:,} latents.")
    return len(todo)


def _read_start(folder: Path, d_model: int) -> SparseAutoencoder:
    if (folder / folders.MANIFEST).exists():  # An SAE that a user brings may have none.
        folders.read_manifest(folder, verify=True)
    sae = read_sae(folder)
    if sae.d_model != d_model:
        raise BadSetting(f"the SAE in {folder} codes vectors of {sae.d_model} numbers, the model gives {d_model}")
    return sae


def _write_saebench(
    path: Path, study: StudySettings, place: _Place, found: list[rows.Measure], baseline: list[rows.Row]
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
