"""Carry out a study: make the folders that are missing and join their rows into one results table."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.settings import may_have_controls
from posmask.interop import reading
from posmask.kernels import devices, runtime
from posmask.progress import stage_label, stages_finished, study_progress
from posmask.results import comparisons, rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae, write_sae
from posmask.storage import atomic, layout, manifest
from posmask.storage.record import (
    RECORD_MARK,
    StudyRecord,
    check_links,
    check_record,
    claim_of,
    read_record,
    write_record,
)
from posmask.study import engines
from posmask.study.cell import evaluate_to_folder, fill_baselines, train_cell
from posmask.study.estimate import Plan
from posmask.study.harvests import Harvest, harvests, prepare
from posmask.study.saes import untrained
from posmask.study.settings import StudySettings
from posmask.study.source import Source, texts_identity
from posmask.study.targets import Target, check_fits, checked_init, results_origin, rows_in, state_of, targets_of
from posmask.training import distributed
from posmask.training.checkpoints import check_checkpoints, remove_checkpoints
from posmask.training.trackers import check_tracker

__all__ = ["check_shared", "evaluate_folder", "run_study", "train_together"]

_OUTPUTS = {
    layout.RESULTS_FILE: (rows.header_of(rows.Row),),
    layout.VERDICTS_FILE: (rows.header_of(comparisons.Verdict),),
    layout.REPORT_FILE: (layout.PAGE_MARK,),
    layout.STUDY_FILE: (RECORD_MARK,),
}
"""Files that a run writes beside its folders, and the marks by which it recognizes its own."""


def run_study(
    study: StudySettings,
    root: Path,
    say: Callable[[str], None] = print,
    n_jobs: int = 1,
    engine: Literal["local", "ray"] = "local",
    plan: Plan | None = None,
) -> list[rows.Row]:
    """Make what is missing under `root`, write `results.csv` and `verdicts.csv` there, and return the rows.

    A finished folder is never recomputed. A folder that was made from other settings is moved to `root/stale`.

    Args:
        n_jobs: how many cells are made at a time, by processes that share the CPU's threads.
        engine: local: processes on this machine. ray: tasks on a cluster, see `ray_engine`.
        plan: predicted seconds of each part, for the time left; None: every cell takes as long as the others.

    Raises:
        BadSetting: a file or folder that posmask did not write is in the way; nothing is changed then. Or another run
            with other settings uses the same root.
    """
    check_links(root)
    for name, marks in _OUTPUTS.items():
        atomic.check_file(root / name, *marks)
    runtime.keep_freed_memory()
    if engine == "local":
        devices.check_device(study.device)
    check_tracker(study.track)
    _warn_of_slow_precision(study, say)
    source = Source(study.model, study.device)
    targets = targets_of(study, source, root)
    states = {target.label: state_of(target, verify=True) for target in targets}
    todo = [target for target in targets if states[target.label] != "finished"]
    if len(todo) < len(targets):
        say(f"{len(targets) - len(todo)} of {len(targets)} folders are finished and stay as they are.")
    for target in todo:
        manifest.check_aside(target.folder)
        check_checkpoints(target.checkpoints)
    if todo:
        missing = [item for item in harvests(study, source.made_from, texts_identity(study)) if not item.facts(root)]
        trained = {label for label, state in states.items() if state == "trained"}
        costs = _costs(study, missing, todo, trained, plan)
        with _engine(engine, study, n_jobs) as made_by, study_progress(study.name, costs):
            data = prepare(study, source, root, made_by.compute)  # If this fails, existing results are untouched.
            stages_finished(stage_label("harvest", item.label) for item in missing)  # A store may have had them.
            _begin(study, targets, root, recompute=True)
            made_by.make(study, todo, data, root, say)
    else:
        _begin(study, targets, root, recompute=False)
    for target in targets:
        remove_checkpoints(target.checkpoints)
    return _join_results(study, targets, root)


def _costs(
    study: StudySettings, missing: list[Harvest], todo: list[Target], trained: set[str], plan: Plan | None
) -> dict[str, float]:
    """Predicted seconds of each stage, by its label; without a plan all stages weigh the same.

    Args:
        study: the settings.
        missing: harvests that are not finished.
        todo: folders that are not finished.
        trained: labels of those whose SAE is kept.
        plan: predicted seconds.
    """
    n_of_kind = Counter(item.kind for item in missing)
    costs = {
        stage_label("harvest", item.label): plan.harvest_seconds(item.kind) / n_of_kind[item.kind] if plan else 1.0
        for item in missing
    }
    n_evaluated = Counter(target.cell.name for target in todo if target.cell is not None)
    n_trained = Counter(target.cell.name for target in todo if target.cell is not None and target.label not in trained)
    for target in todo:
        cell = target.cell
        if cell is None:
            costs[engines.stages_of(target)[0]] = plan.seconds("baselines") if plan else 1.0
            continue
        train, evaluate, *unmasked = engines.stages_of(target)
        training = plan.seconds("training", cell.name) / max(1, n_trained[cell.name]) if plan else 1.0
        costs[evaluate] = plan.seconds("evaluation", cell.name) / n_evaluated[cell.name] if plan else 1.0
        steps = {} if target.label in trained else {train: study.n_steps(cell)}
        steps |= dict.fromkeys(unmasked, round(max(study.evaluation.forgetting_fractions) * study.training.n_steps))
        costs |= {stage: training * n / sum(steps.values()) for stage, n in steps.items()}
    return costs


def _engine(engine: Literal["local", "ray"], study: StudySettings, n_jobs: int):
    if engine == "local":
        return nullcontext(engines.Local(n_jobs))
    from posmask.study import ray_engine

    return ray_engine.connected(study, n_jobs)


def _join_results(study: StudySettings, targets: list[Target], root: Path) -> list[rows.Row]:
    with claim_of(root, root / layout.STUDY_FILE, wait=True):  # So that the root keeps its study meanwhile.
        check_record(root, _record(study, targets))
        results = [row for target in targets for row in rows_in(target)]
        with atomic.replacing(root / layout.RESULTS_FILE, *_OUTPUTS[layout.RESULTS_FILE]) as draft:
            rows.write_rows(draft, results)
        with atomic.replacing(root / layout.VERDICTS_FILE, *_OUTPUTS[layout.VERDICTS_FILE]) as draft:
            comparisons.write_verdicts(draft, _verdicts(study, targets))
    return results


def _record(study: StudySettings, targets: list[Target]) -> StudyRecord:
    return StudyRecord(study.name, study.baseline, {target.label: target.identity for target in targets})


def _warn_of_slow_precision(study: StudySettings, say: Callable[[str], None]) -> None:
    """Report settings that force bfloat16 where auto would not take it; on the CPU with the measured slowdown."""
    forced = [name for name in ("model", "training") if getattr(study, name).precision == "bfloat16"]
    if study.device == "mps" or not forced or runtime.fast_precision(study.device) == "bfloat16":
        return
    names = " and ".join(f"{name}.precision" for name in forced)
    cost = (
        f"this CPU does not multiply natively: a product takes {runtime.bfloat16_slowdown():.1f} times as long as in "
        "float32"
        if study.device == "cpu"
        else "this GPU emulates"
    )
    say(f"{names} = 'bfloat16', which {cost}. Set precision to 'auto'.")


def _begin(study: StudySettings, targets: list[Target], root: Path, *, recompute: bool) -> None:
    """Record that the run folder belongs to this study, and remove results that would not match its cells.

    Args:
        recompute: whether cells will be made.
    """
    record = _record(study, targets)
    with claim_of(root, root / layout.STUDY_FILE, wait=True):  # Several processes may begin it.
        try:
            changed = read_record(root) != record
        except DamagedFolder:
            changed = True
        if recompute or changed:
            for name in (layout.RESULTS_FILE, layout.VERDICTS_FILE, layout.REPORT_FILE):
                atomic.remove_file(root / name, *_OUTPUTS[name])
        if changed:
            write_record(root, record)


def _verdicts(study: StudySettings, targets: list[Target]) -> list[comparisons.Verdict]:
    """The study's hypotheses, each cell against the baseline and its controls, and what the study lists."""
    units: dict[str, dict[int, dict[str, rows.Units]]] = {}
    for target in targets:
        if target.cell is not None:
            units.setdefault(target.cell.name, {})[target.seed] = rows.read_units(target.folder / layout.UNITS_FILE)
    baseline = study.baseline
    pairs = [(cell.name, baseline) for cell in study.cells if baseline is not None and cell.name != baseline]
    pairs += [
        (cell.name, f"{cell.name} + {control}")
        for cell in study.cells
        if may_have_controls(cell.mask)
        for control in rows.CONTROLS
    ]
    if baseline is not None:
        pairs += [(control, baseline) for _, control in pairs if control.partition(" + ")[2] in rows.CONTROLS]
    if baseline is not None:
        pairs += [(f"{baseline} + {pooling}", baseline) for pooling in study.evaluation.order_poolings]
    pairs += [(comparison.cell, comparison.against) for comparison in study.comparisons]
    hypotheses = [
        comparisons.Hypothesis(each.cell, each.against, each.column, each.expected) for each in study.hypotheses
    ]
    planned = [comparisons.Comparison(*pair) for pair in pairs]
    return comparisons.judge(units, planned, hypotheses, study.margins.by_column())


def train_together(
    study: StudySettings, root: Path, cell: str, seed: int, by: Literal["data", "position"]
) -> distributed.Distributed | None:
    """Train one cell in all processes that torch.distributed has connected, and leave it for `run_study` to evaluate.

    Args:
        by: what is divided among the processes; see `training.distributed`.

    Returns:
        The strategy, with its traffic; None if the cell is trained already.

    Raises:
        BadSetting: no such cell, one that cannot be divided in this way, or one that other processes are making.
    """
    check_links(root)
    source = Source(study.model, study.device)
    label = layout.cell_label(cell, seed)
    target = next((target for target in targets_of(study, source, root) if target.label == label), None)
    if target is None or target.cell is None:
        known = ", ".join(other.name for other in study.cells)
        raise BadSetting(f"{study.name} has no cell {cell!r} with seed {seed}: choose from {known}, and its seeds")
    if state_of(target) in ("finished", "trained"):
        return None
    check_checkpoints(target.checkpoints)
    with _claimed(target) if dist.get_rank() == 0 else nullcontext():  # One claim for all processes.
        data = prepare(study, source, root)
        sae, _ = untrained(study, target, data.training)
        if by == "data":
            strategy = distributed.ByData(sae)
            train_cell(study, target, sae, data, strategy, keeps_end=True)
        else:
            strategy = distributed.ByPosition(sae, data.training.position[data.training.keep])
            train_cell(study, target, strategy.local_sae, data, strategy, keeps_end=True)
    return strategy


@contextmanager
def _claimed(target: Target) -> Iterator[None]:
    """Hold the claim to make a folder.

    Raises:
        BadSetting: another process holds it.
    """
    with claim_of(target.root, target.folder, wait=False) as claimed:
        if not claimed:
            raise BadSetting(f"{target.folder} is being made by another process on this root: wait for it, or end it")
        yield


def evaluate_folder(
    study: StudySettings, root: Path, folder: Path, say: Callable[[str], None] = print
) -> list[rows.Row]:
    """Evaluate an SAE that the study did not train as it evaluates its cells, on the same texts.

    A folder of SAELens or GemmaScope is converted first. Rows are written to `root/evaluated/NAME`, where NAME is the
    folder's name. The baselines are made if they are missing. There are no rows about training or about latents that
    were dead at its end.

    Returns:
        The SAE's rows, then those of the baselines.

    Raises:
        BadSetting: the SAE is of another model, layer or site, or of contexts of another length; or the root belongs
            to a study with other settings, or another process evaluates an SAE of this name.
    """
    check_links(root)
    runtime.keep_freed_memory()
    name = folder.resolve().name
    if not reading.is_external(folder):
        return _evaluate(study, root, folder, name, say)
    converted = layout.evaluated_folder(root, name)
    with atomic.scratch_folder(converted.with_name(f"{name}.imported")) as scratch:
        reading.import_sae(folder, scratch / name, n_positions=study.corpus.n_positions)
        return _evaluate(study, root, scratch / name, name, say)


def _evaluate(study: StudySettings, root: Path, folder: Path, name: str, say: Callable[[str], None]) -> list[rows.Row]:
    source = Source(study.model, study.device)
    sae, n_positions = read_sae(folder, verify=True), study.corpus.n_positions
    if sae.mask.n_positions != n_positions:
        raise BadSetting(
            f"the SAE in {folder} is for contexts of {sae.mask.n_positions} positions, the study's have {n_positions}: "
            f"set corpus.n_positions, or import it with --n-positions {n_positions}"
        )
    check_fits(folder, source)
    made_from = {**results_origin(study, source), "sae": checked_init(folder, source.made_from)}
    target = Target(None, 0, root, layout.evaluated_folder(root, name), made_from)
    baseline = targets_of(study, source, root)[0]
    check_shared(baseline)
    with _claimed(target):
        return _evaluate_claimed(study, source, target, baseline, sae, folder, say)


def check_shared(baseline: Target) -> None:
    """Check that results can be compared with those of the study in the run folder, if there is one.

    Raises:
        BadSetting: the run folder belongs to a study whose results have other settings than these baselines.
    """
    record = read_record(baseline.root)
    if record is not None and record.folders.get(baseline.label) != baseline.identity:
        raise BadSetting(
            f"{baseline.root} belongs to the study {record.study!r} with another model, other texts or another "
            "evaluation, so results would not be comparable: give --root, or run the study with these settings first"
        )


def _evaluate_claimed(
    study: StudySettings,
    source: Source,
    target: Target,
    baseline: Target,
    sae: SparseAutoencoder,
    folder: Path,
    say: Callable[[str], None],
) -> list[rows.Row]:
    root = target.root
    missing = [item for item in (baseline, target) if state_of(item) != "finished"]
    for item in missing:
        manifest.check_aside(item.folder)
    if missing:
        data = prepare(study, source, root, for_training=False)
        with claim_of(root, baseline.folder, wait=True):
            if state_of(baseline) != "finished":  # Another process may have made them in the meantime.
                _set_aside(baseline, say)
                fill_baselines(study, baseline, data)
        if target in missing:
            _set_aside(target, say)
            sae = sae.to(study.device)
            with manifest.write_folder(target.folder, target.made_from) as draft:
                columns = {"cell": target.label, "budget": "", "seed": 0}
                evaluate_to_folder(study, target, sae, data, rows_in(baseline), draft, columns)
                write_sae(sae, draft, read_origin(folder))  # The page shows its latents and mask.
    return [*rows_in(target), *rows_in(baseline)]


def _set_aside(target: Target, say: Callable[[str], None]) -> None:
    if target.folder.exists():
        moved = manifest.set_aside(target.folder, layout.stale_paths(target.root, target.label))
        say(f"{target.label} was made from other settings: moved to {moved}.")
