"""A study: settings x cells x seeds -> run folders -> one results table. Does only what is missing."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from posmask.data import models
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.suite import evaluate
from posmask.kernels import runtime
from posmask.results import comparisons, rows
from posmask.sae.files import read_sae
from posmask.storage import manifest
from posmask.storage.record import RECORD_MARK, STUDY_FILE, StudyRecord, read_record, write_record
from posmask.study import engines, ray_engine
from posmask.study.cell import (
    BASELINES,
    SAEBENCH_FILE,
    UNITS_FILE,
    CellState,
    Place,
    checked_init,
    fill,
    places_of,
    read_init,
    results_origin,
    rows_in,
    state_of,
    train_cell,
    untrained,
    write_saebench,
)
from posmask.study.harvests import Source, prepare
from posmask.study.settings import StudySettings
from posmask.training import distributed
from posmask.training.checkpoints import check_checkpoints, remove_checkpoints
from posmask.training.trackers import check_tracker

__all__ = ["cell_states", "evaluate_folder", "run_study", "train_together"]

RESULTS_FILE = "results.csv"
VERDICTS_FILE = "verdicts.csv"
_OUTPUTS = {
    RESULTS_FILE: (rows.header_of(rows.Row),),
    VERDICTS_FILE: (rows.header_of(comparisons.Verdict),),
    "report.html": manifest.PAGE_MARKS,
    STUDY_FILE: (RECORD_MARK,),
}
"""What a study's folder holds beside its cells, and by what each file is recognized."""


def cell_states(study: StudySettings, root: Path) -> list[tuple[str, CellState]]:
    """For the baselines and each cell: whether its folder is finished, missing, or made from other settings.

    Where there is no folder yet the model is not asked for, which may be out of reach.
    """
    if not root.exists():
        labels = [f"{cell.name}-seed{seed}" for cell in study.cells for seed in study.seeds_of(cell)]
        return [(label, "missing") for label in (BASELINES, *labels)]
    return [(place.label, state_of(place)) for place in places_of(study, Source(study.model, study.device), root)]


def run_study(
    study: StudySettings,
    root: Path,
    say: Callable[[str], None] = print,
    n_jobs: int = 1,
    engine: Literal["local", "ray"] = "local",
) -> list[rows.Row]:
    """Do what is missing under `root` and write `results.csv` there; returns its rows.

    A finished folder is never made again. One that was made from other settings is moved to `root/stale`.

    Args:
        n_jobs: how many cells are made at a time, by processes that share the processors' threads.
        engine: local: this machine's processes. ray: tasks on a cluster, see `on_ray`.

    Raises:
        BadSetting: something that posmask did not write is in the way; nothing is changed then.
    """
    for name, marks in _OUTPUTS.items():
        manifest.check_file(root / name, *marks)
    runtime.keep_freed_memory()
    if engine == "local":
        models.check_device(study.device)
    check_tracker(study.track)
    _warn_of_slow_precision(study, say)
    source = Source(study.model, study.device)
    places = places_of(study, source, root)
    todo = [place for place in places if state_of(place, verify=True) != "finished"]
    if len(todo) < len(places):
        say(f"{len(places) - len(todo)} of {len(places)} folders are finished and stay as they are.")
    for place in todo:
        manifest.check_aside(place.folder)
        check_checkpoints(place.checkpoints)
    if todo:
        where = nullcontext(engines.Local(n_jobs)) if engine == "local" else ray_engine.connected(study, n_jobs)
        with where as made_by:
            data = prepare(study, source, root, made_by.compute)  # What cannot be prepared has moved nothing yet.
            _begin(study, places, root, anew=True)
            made_by.make(study, todo, data, root, say)
    else:
        _begin(study, places, root, anew=False)
    for place in places:
        remove_checkpoints(place.checkpoints)
    results = [row for place in places for row in rows_in(place.folder, manifest.identity(place.made_from))]
    with manifest.replacing(root / RESULTS_FILE, *_OUTPUTS[RESULTS_FILE]) as beside:
        rows.write_rows(beside, results)
    with manifest.replacing(root / VERDICTS_FILE, *_OUTPUTS[VERDICTS_FILE]) as beside:
        comparisons.write_verdicts(beside, _verdicts(study, places))
    return results


def _warn_of_slow_precision(study: StudySettings, say: Callable[[str], None]) -> None:
    """Report settings that force bfloat16 where auto would not take it, with the slowdown measured on this CPU."""
    forced = [name for name in ("model", "training") if getattr(study, name).precision == "bfloat16"]
    if study.device != "cpu" or not forced or runtime.fast_precision() == "bfloat16":
        return
    names = " and ".join(f"{name}.precision" for name in forced)
    say(
        f"{names} = 'bfloat16', which this CPU does not multiply natively: a product takes "
        f"{runtime.bfloat16_slowdown():.1f} times as long as in float32. Set precision to 'auto'."
    )


def _begin(study: StudySettings, places: list[Place], root: Path, *, anew: bool) -> None:
    """Let the run folder belong to this study; results that would not match its cells are removed.

    Args:
        anew: whether cells will be made.
    """
    record = StudyRecord(
        study.name, study.baseline, {place.label: manifest.identity(place.made_from) for place in places}
    )
    with manifest.claim(root / "cells" / STUDY_FILE, wait=True):  # Several processes may begin the same study.
        try:
            changed = read_record(root) != record
        except DamagedFolder:
            changed = True
        if anew or changed:
            for name in (RESULTS_FILE, VERDICTS_FILE, "report.html"):
                manifest.remove_file(root / name, *_OUTPUTS[name])
        if changed:
            write_record(root, record)


def _verdicts(study: StudySettings, places: list[Place]) -> list[comparisons.Verdict]:
    """Each cell against the first open one, then the study's own questions."""
    units: dict[str, dict[int, dict[str, rows.Units]]] = {}
    for place in places:
        if place.cell is not None:
            units.setdefault(place.cell.name, {})[place.seed] = rows.read_units(place.folder / UNITS_FILE)
    baseline = study.baseline
    asked = [comparisons.Comparison(cell.name, baseline) for cell in study.cells if baseline not in (None, cell.name)]
    asked += [comparisons.Comparison(comparison.cell, comparison.against) for comparison in study.comparisons]
    return comparisons.judge(units, asked)


def train_together(
    study: StudySettings, root: Path, cell: str, seed: int, by: Literal["data", "position"]
) -> distributed.Distributed | None:
    """Train one cell in all processes that torch.distributed has connected, and leave it for `run_study` to evaluate.

    Args:
        by: what is divided among the processes; see `parallel`.

    Returns:
        How they were together; None where the cell was finished already.

    Raises:
        BadSetting: no such cell, or one that cannot be divided so.
    """
    source = Source(study.model, study.device)
    place = next((one for one in places_of(study, source, root) if one.label == f"{cell}-seed{seed}"), None)
    if place is None or place.cell is None:
        known = ", ".join(one.name for one in study.cells)
        raise BadSetting(f"{study.name} has no cell {cell!r} with seed {seed}: choose from {known}, and its seeds")
    if state_of(place) == "finished":
        return None
    check_checkpoints(place.checkpoints)
    data = prepare(study, source, root)
    whole, _ = untrained(study, place, data)
    if by == "data":
        together = distributed.ByData(whole)
        train_cell(study, place, whole, data, together, keeps_end=True)
    else:
        together = distributed.ByPosition(whole, data.training.position[data.training.keep])
        train_cell(study, place, together.local_sae, data, together, keeps_end=True)
    return together


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
    runtime.keep_freed_memory()
    source = Source(study.model, study.device)
    sae, n_positions = read_sae(folder), study.corpus.n_positions
    if sae.mask.n_positions != n_positions:
        raise BadSetting(
            f"the SAE in {folder} is for contexts of {sae.mask.n_positions} positions, the study's have {n_positions}: "
            f"set corpus.n_positions, or import it with --n-positions {n_positions}"
        )
    made_from = {**results_origin(study, source), "sae": checked_init(folder, source.made_from)}
    name = folder.resolve().name
    place = Place(None, 0, root / "evaluated" / name, made_from)
    baseline = places_of(study, source, root)[0]
    missing = [one for one in (baseline, place) if state_of(one) != "finished"]
    for one in missing:
        manifest.check_aside(one.folder)
    data = prepare(study, source, root) if missing else None
    for one in missing:
        assert data is not None
        if one.folder.exists():
            say(f"{one.label} was made from other settings: moved to {manifest.set_aside(one.folder, root / 'stale')}.")
        if one is baseline:
            fill(study, one, data, [])
            continue
        sae = read_init(folder, data.training.d_model).to(study.device)
        with manifest.write_folder(place.folder, made_from) as draft:
            found, facts = evaluate(sae, None, data, name)
            facts.write(draft, data.tokenizer)
            if study.evaluation.probe_datasets:
                llm = rows_in(baseline.folder, manifest.identity(baseline.made_from))
                write_saebench(draft / SAEBENCH_FILE, study, place, found, llm)
            mask = sae.mask.settings
            columns = {"cell": name, "mask": mask.kind, "budget": "", "gating": mask.gating, "seed": 0}
            rows.write_rows(draft / "rows.csv", [rows.Row.of(measure, **columns) for measure in found])
            rows.write_units(draft / UNITS_FILE, found)
    return [row for one in (place, baseline) for row in rows_in(one.folder, manifest.identity(one.made_from))]
