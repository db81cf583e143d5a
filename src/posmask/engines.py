"""Where a study's cells are made: in this process, or shared with others on this machine."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from posmask import folders, kernels
from posmask.cells import BASELINES, Place, fill, places_of, rows_in, state_of
from posmask.evaluation import Data
from posmask.settings import StudySettings
from posmask.sources import Source, prepare

__all__ = ["helpers", "share"]


def share(study: StudySettings, todo: list[Place], data: Data, root: Path, say: Callable[[str], None]) -> None:
    """Make what is missing, each folder in one process alone, until all of them are there."""
    waiting = sorted(todo, key=lambda place: place.start is not None)  # what others start from comes first
    while waiting:
        for place in list(waiting):
            missing = {other.folder for other in waiting}
            if (place.cell is not None and root / BASELINES in missing) or place.start in missing:
                continue  # Another process is at what this one needs.
            with folders.claim(place.folder, wait=False) as mine:
                if not mine:
                    continue
                state = state_of(place, verify=True)
                if state in ("other settings", "damaged"):
                    moved = folders.set_aside(place.folder, root / "stale")
                    why = "was made from other settings" if state == "other settings" else "is damaged"
                    say(f"{place.label} {why}: moved to {moved}.")
                if state != "finished":
                    fill(study, place, data, [] if place.cell is None else rows_in(root / BASELINES))
            waiting.remove(place)
            break
        else:
            time.sleep(1)


@contextmanager
def helpers(study: StudySettings, root: Path, n_jobs: int) -> Iterator[None]:
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
        todo = [place for place in places_of(study, source, root) if state_of(place, verify=True) != "finished"]
        share(study, todo, prepare(study, source, root), root, print)
