"""Where a study's cells are made: in this process, or shared with others on this machine. `on_ray` has the clusters.

An engine gives `compute`, which computes vectors, and `make`, which fills the folders of cells.
"""

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
from posmask.evaluation.suite import Data
from posmask.kernels import runtime
from posmask.progress import cell_finished
from posmask.results import rows
from posmask.storage import manifest
from posmask.storage.record import check_listed, read_record
from posmask.study.cell import BASELINES, Place, fill, places_of, rows_in, state_of
from posmask.study.harvests import Source, prepare
from posmask.study.settings import StudySettings

__all__ = ["Engine", "Local", "make_anew", "needs"]


class Engine(Protocol):
    """Where the work is done. Results do not depend on it."""

    @property
    def compute(self) -> ComputeShards | None:
        """Computes vectors; None: this process does."""

    def make(self, study: StudySettings, todo: list[Place], data: Data, root: Path, say: Callable[[str], None]) -> None:
        """Fill all these folders."""


class Local:
    """This machine.

    Args:
        n_jobs: how many processes share the cells, and the processor's threads. What the others say goes to
            `root/jobs`.
    """

    compute = None

    def __init__(self, n_jobs: int = 1) -> None:
        self._n_jobs = n_jobs

    def make(self, study: StudySettings, todo: list[Place], data: Data, root: Path, say: Callable[[str], None]) -> None:
        if self._n_jobs > 1:
            say(f"{self._n_jobs} processes share the cells; what the others say goes to {root / 'jobs'}.")
        n_threads = max(1, torch.get_num_threads() // self._n_jobs)
        # Set even where it stays: torch multiplies otherwise with one thread that was set than with one it found.
        with _helpers(study, root, self._n_jobs - 1, n_threads), runtime.threads(n_threads):
            _share(study, todo, data, root, say)


def needs(place: Place, root: Path, missing: set[Path]) -> bool:
    """Whether a folder cannot be filled yet because others are missing: the baselines, or what it starts from."""
    return (place.cell is not None and root / BASELINES in missing) or place.init_folder in missing


def make_anew(study: StudySettings, place: Place, data: Data, root: Path, say: Callable[[str], None]) -> None:
    """Fill one folder unless it is finished; whoever calls holds its claim. What stands in its place is set aside."""
    check_listed(root, place.label, place.made_from)
    state = state_of(place, verify=True)
    if state in ("other settings", "damaged"):
        moved = manifest.set_aside(place.folder, root / "stale")
        why = "was made from other settings" if state == "other settings" else "is damaged"
        say(f"{place.label} {why}: moved to {moved}.")
    if state != "finished":
        baseline: list[rows.Row] = []
        if place.cell is not None:
            record = read_record(root)
            assert record is not None
            baseline = rows_in(root / BASELINES, record.folders[BASELINES])
        fill(study, place, data, baseline)


def _share(study: StudySettings, todo: list[Place], data: Data, root: Path, say: Callable[[str], None]) -> None:
    """Make what is missing, each folder in one process alone, until all of them are there."""
    waiting = sorted(todo, key=lambda place: place.init_folder is not None)  # what others start from comes first
    while waiting:
        for place in list(waiting):
            if needs(place, root, {other.folder for other in waiting}):
                continue  # Another process is at what this one needs.
            with manifest.claim(place.folder, wait=False) as mine:
                if not mine:
                    continue
                make_anew(study, place, data, root, say)
            waiting.remove(place)
            cell_finished()
            break
        else:
            time.sleep(1)


@contextmanager
def _helpers(study: StudySettings, root: Path, n_helpers: int, n_threads: int) -> Iterator[None]:
    """Other processes that run this study's cells as long as this one does."""
    if n_helpers:
        (root / "jobs").mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=_help, args=(study, root, n_threads, root / "jobs" / f"{number}.log"), daemon=True)
        for number in range(2, 2 + n_helpers)
    ]
    for helper in helpers:
        helper.start()
    try:
        yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _end_with_parent() -> None:
    """Let this process end when its parent does, however that ends.

    On Linux the kernel sees to it, even while a compiled loop holds the interpreter; elsewhere a thread does.
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


def _help(study: StudySettings, root: Path, n_threads: int, log: Path) -> None:
    _end_with_parent()
    with log.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file), runtime.threads(n_threads):
        runtime.keep_freed_memory()
        source = Source(study.model, study.device)
        todo = [place for place in places_of(study, source, root) if state_of(place, verify=True) != "finished"]
        _share(study, todo, prepare(study, source, root), root, print)
