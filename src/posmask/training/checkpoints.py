"""Where a long training stands, so that it goes on from there after whatever happened to the machine.

Each checkpoint is a finished folder of its own (`folders.write_folder`), so it is either whole and verified or not
there, and the one before it is removed only when two newer ones are there.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.errors import DamagedFolder
from posmask.progress import announce
from posmask.storage.manifest import (
    MANIFEST,
    clear_drafts,
    finished,
    foreign_in,
    read_manifest,
    refusal,
    remove,
    write_folder,
)

__all__ = ["Checkpoints", "check_checkpoints", "remove_checkpoints"]

_STATE_FILE = "state.safetensors"
_STEP_DIGITS = 9
_FILES = (MANIFEST, _STATE_FILE)
_TIMES_ITS_COST = 50
"""Work goes on for at least so many times as long as the last checkpoint took: 2 % of the time at the most."""
_BYTES_A_SECOND = 40e6
"""What a slow disk takes, synced and read again for its checksum (30 to 90 MB/s were seen): it decides when the first
one comes."""


def check_checkpoints(folder: Path) -> None:
    """Refuse a folder for checkpoints in which writing or removing them would reach what posmask did not write.

    Raises:
        BadSetting: it is a symbolic link or in one, or a checkpoint's name in it is taken by something else.
    """
    steps = _steps(folder)
    if link := next((path for path in (folder.parent, folder, *steps) if path.is_symlink()), None):
        raise refusal(f"{link} is a symbolic link")
    if file := next((path for path in (folder.parent, folder, *steps) if path.is_file()), None):
        raise refusal(f"{file} is a file")
    for path in steps:
        if (foreign := foreign_in(path, _FILES)) is not None:
            raise refusal(f"{path} holds {foreign}")


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of finished work, and their folder if nothing else is in it. Follows no symbolic link."""
    if folder.parent.is_symlink() or folder.is_symlink():
        return
    for path in _steps(folder):
        _remove(path)
    clear_drafts(folder)
    remove(folder)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if len(path.name) >= _STEP_DIGITS and path.name.isdecimal())


def _remove(path: Path) -> None:
    remove(path, *_FILES)


class Checkpoints:
    """The last two checkpoints of one piece of work, in a folder of their own.

    Args:
        folder: `folder/STEP` holds the state after so many steps.
        made_from: identity of the work; checkpoints of other work are passed over, and removed at the next `write`.
        every_seconds: how much work is lost at the most, unless checkpoints take so long that they come less often.
        keeps_end: whether the state after the last step is kept whatever it took, for another process to go on from.
    """

    def __init__(
        self, folder: Path, made_from: Mapping[str, Any], every_seconds: float = 90.0, *, keeps_end: bool = False
    ) -> None:
        self.folder = folder
        self.done = 0
        """Steps behind the newest checkpoint that is whole; 0 where there is none."""
        self._made_from = made_from
        self._every_seconds = every_seconds
        self._keeps_end = keeps_end
        self._kept: list[Path] = []
        check_checkpoints(folder)
        clear_drafts(folder)
        for path in _steps(folder):
            if not (path / MANIFEST).exists():  # Its removal was stopped.
                _remove(path)
        there = _steps(folder)[::-1]
        for number, path in enumerate(there):
            if self._is_whole(path):
                self.done, self._kept = int(path.name), [path]
                announce(f"{folder.name} goes on from its checkpoint after {self.done:,} steps.")
                for other in there[number + 2 :]:  # A kill came between the last one and this.
                    _remove(other)
                break
        self._expected = 0.0
        self._cost: float | None = None  # of the last one, seconds; None before the first
        self._last = time.monotonic()

    def _of(self, done: int) -> dict[str, Any]:
        return {**self._made_from, "checkpoint": done}

    def _is_whole(self, path: Path) -> bool:
        try:
            if not finished(path, self._of(int(path.name))):
                return False
            read_manifest(path, verify=True)
        except DamagedFolder as error:
            announce(f"A checkpoint is passed over, work goes on from the one before: {error}")
            return False
        return True

    def read(self) -> dict[str, Tensor]:
        """What `write` was given after `done` steps, in memory of its own and no longer the file's."""
        return {name: tensor.clone() for name, tensor in load_file(self._kept[-1] / _STATE_FILE).items()}

    def expect(self, n_bytes: float) -> None:
        """Say how much a checkpoint will hold, so that not even the first comes before it is worth its time."""
        self._expected = n_bytes / _BYTES_A_SECOND

    def due(self, *, at_end: bool = False) -> bool:
        """Whether so much work was done since the last checkpoint that another is worth its time.

        Args:
            at_end: no more steps follow, only work that would start with these again: once it is known what a
                checkpoint costs, a quarter of the time is enough.
        """
        since = time.monotonic() - self._last
        seconds = self._every_seconds / (4 if at_end and self._cost is not None else 1)
        cost = self._expected if self._cost is None else self._cost
        return (at_end and self._keeps_end) or since >= max(seconds, _TIMES_ITS_COST * cost)

    def write(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state after `done` steps, and of the earlier ones only the newest."""
        started = time.monotonic()
        path = self.folder / f"{done:0{_STEP_DIGITS}d}"
        _remove(path)  # of other work, or damaged
        with write_folder(path, self._of(done)) as draft:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft / _STATE_FILE)
        self._kept = [*self._kept[-1:], path]
        for other in _steps(self.folder):
            if other not in self._kept:
                _remove(other)
        self.done = done
        self._last = time.monotonic()
        self._cost = self._last - started
