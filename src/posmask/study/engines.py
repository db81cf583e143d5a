"""Engines: where the cells of a study are made. `Local` uses processes on this machine, `ray_engine` a cluster.

An engine has `compute`, which computes vectors, and `make`, which makes the folders of cells.
"""

import contextvars
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import connection
from pathlib import Path
from typing import Protocol

import torch

from posmask.data.harvest import ComputeShards
from posmask.evaluation.suite import EvaluationData, unmasked_label
from posmask.kernels import runtime
from posmask.progress import Show, progress_bars, sent_by, stage_label, stages_finished
from posmask.results.table import MODEL_LABEL
from posmask.storage import atomic, layout, manifest
from posmask.storage.record import check_listed, claim_of
from posmask.study.cell import fill
from posmask.study.harvests import prepare
from posmask.study.settings import StudySettings
from posmask.study.source import Source
from posmask.study.targets import Target, baselines_of, rows_in, state_of, targets_of

__all__ = ["Engine", "Local", "make_target", "needs", "stages_of"]


_WATCH_SECONDS = 1.0

Say = Callable[[str], None]
"""Reports one line to the user."""


class Engine(Protocol):
    """Where cells are made. Results do not depend on it."""

    @property
    def compute(self) -> ComputeShards | None:
        """Computes vectors; None: this process computes them."""

    def make(self, study: StudySettings, todo: list[Target], data: EvaluationData, root: Path, say: Say) -> None:
        """Make all these folders."""


class Local:
    """This machine.

    Args:
        n_jobs: how many processes share the cells and the CPU's threads. The helpers write their output to
            `root/jobs`.
    """

    compute = None

    def __init__(self, n_jobs: int = 1) -> None:
        self._n_jobs = n_jobs

    def make(self, study: StudySettings, todo: list[Target], data: EvaluationData, root: Path, say: Say) -> None:
        n_jobs = min(self._n_jobs, len(todo))
        if n_jobs > 1:
            say(f"{n_jobs} processes share the cells; helpers write their output to {layout.jobs_folder(root)}.")
        n_threads = max(1, torch.get_num_threads() // n_jobs)
        # Set explicitly even if unchanged: torch multiplies differently with one thread set than with one detected.
        with (
            progress_bars() as show,
            _helpers(study, root, n_jobs - 1, n_threads, show),
            runtime.threads(n_threads),
            _watching(todo),
        ):
            _share(study, todo, data, root, say)


def stages_of(target: Target) -> list[str]:
    """The labels of the stages in which a folder is made, at most: an SAE may be trained already."""
    if target.cell is None:
        return [stage_label("evaluate", MODEL_LABEL)]
    stages = [stage_label("train", target.label), stage_label("evaluate", target.label)]
    if target.cell.measure_forgetting:
        stages.append(stage_label("train", unmasked_label(target.label)))
    return stages


def needs(target: Target, root: Path, missing: set[Path]) -> bool:
    """Whether a folder must wait for others: the baselines, the cell that it starts from, or the unmasked cell."""
    return (target.cell is not None and layout.cell_folder(root, layout.BASELINES) in missing) or (
        target.init_folder in missing or target.unmasked_folder in missing
    )


def make_target(study: StudySettings, target: Target, data: EvaluationData, root: Path, say: Say) -> None:
    """Make one folder unless it is finished; the caller holds its claim. A stale folder is moved out of the way."""
    check_listed(root, target.label, target.made_from)
    state = state_of(target, verify=True)
    if state == "finished":
        return
    if target.folder.exists():
        moved = manifest.set_aside(target.folder, layout.stale_paths(root, target.label))
        why = "is damaged" if state == "damaged" else "was made from other settings"
        say(f"{target.label} {why}: moved to {moved}.")
    if state == "trained":
        say(f"{target.label} keeps its training and is evaluated again.")
    baseline = [] if target.cell is None else rows_in(baselines_of(target))
    fill(study, target, data, baseline)


def _share(study: StudySettings, todo: list[Target], data: EvaluationData, root: Path, say: Say) -> None:
    """Make the missing folders, each in one process, until all are finished."""
    waiting = sorted(todo, key=_comes_later)
    while waiting:
        for target in list(waiting):
            if needs(target, root, {other.folder for other in waiting}):
                continue  # Another process is making the folder that this one needs.
            with claim_of(root, target.folder, wait=False) as claimed:
                if not claimed:
                    continue
                make_target(study, target, data, root, say)
            waiting.remove(target)
            stages_finished(stages_of(target))
            break
        else:
            time.sleep(1)


def _comes_later(target: Target) -> bool:
    """Whether a folder may need that of another cell."""
    return target.init_folder is not None or target.unmasked_folder is not None


@contextmanager
def _watching(todo: list[Target]) -> Iterator[None]:
    """Report folders as finished while the block runs, whichever process makes them."""
    stop = threading.Event()

    def watch() -> None:
        waiting = list(todo)
        while waiting and not stop.wait(_WATCH_SECONDS):
            for target in [target for target in waiting if state_of(target) == "finished"]:
                waiting.remove(target)
                stages_finished(stages_of(target))

    watcher = threading.Thread(target=contextvars.copy_context().run, args=(watch,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


@contextmanager
def _helpers(study: StudySettings, root: Path, n_helpers: int, n_threads: int, show: Show) -> Iterator[None]:
    """Helper processes that make cells of this study while the block runs; `show` displays their stages."""
    logs = [layout.job_log(root, number) for number in range(2, 2 + n_helpers)]
    for log in logs:
        log.parent.mkdir(parents=True, exist_ok=True)
        atomic.check_file(log)
    spawn = multiprocessing.get_context("spawn")
    helpers, receivers = [], []
    for log in logs:
        receiver, sender = spawn.Pipe(duplex=False)
        helpers.append(spawn.Process(target=_help, args=(study, root, n_threads, log, sender), daemon=True))
        helpers[-1].start()
        sender.close()  # The helper has its own; the receiver ends with it.
        receivers.append(receiver)
    threading.Thread(target=_relay, args=(receivers, show), daemon=True).start()
    try:
        yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _relay(receivers: list[connection.Connection], show: Show) -> None:
    """Show the stages that helpers send, until all of them have ended."""
    while receivers:
        for receiver in connection.wait(receivers):
            assert isinstance(receiver, connection.Connection)
            try:
                show(receiver.recv())
            except (EOFError, OSError):
                receivers.remove(receiver)


def _end_with_parent() -> None:
    """End this process when its parent ends, for whatever reason.

    On Linux the kernel does so, even while a compiled loop holds the interpreter; elsewhere a thread does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _help(study: StudySettings, root: Path, n_threads: int, log: Path, sender: connection.Connection) -> None:
    _end_with_parent()
    with (
        log.open("a", buffering=1, encoding="utf8") as file,
        redirect_stdout(file),
        redirect_stderr(file),
        runtime.threads(n_threads),
        sent_by(sender.send),
    ):
        runtime.keep_freed_memory()
        source = Source(study.model, study.device)
        todo = [target for target in targets_of(study, source, root) if state_of(target, verify=True) != "finished"]
        _share(study, todo, prepare(study, source, root), root, print)
