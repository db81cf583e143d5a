"""Checkpoints, from which an interrupted training resumes.

Each checkpoint is a folder of its own, written by `storage.manifest.write_folder`, so it is either complete and
verified or absent. A checkpoint is removed once two newer ones exist.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.errors import DamagedFolder, first_line
from posmask.progress import announce
from posmask.storage.atomic import clear_drafts, refusal
from posmask.storage.manifest import MANIFEST, finished, foreign_in, read_manifest, remove, write_folder

__all__ = ["Checkpoints", "check_checkpoints", "remove_checkpoints"]

_STATE_FILE = "state.safetensors"
_STEP_DIGITS = 9
_FILES = (MANIFEST, _STATE_FILE)
_COST_MULTIPLE = 50
"""Least time between checkpoints, in multiples of the time to write one: writing takes at most 2 % of the time."""
_BYTES_PER_SECOND = 40e6
"""Assumed speed of a slow disk, including sync and checksum; it decides when the first checkpoint is written."""


def check_checkpoints(folder: Path) -> None:
    """Check that a folder for checkpoints has only content that posmask wrote under the names of checkpoints.

    Raises:
        BadSetting: the folder, its parent or a checkpoint is a symbolic link or a file, or a checkpoint holds other
            files.
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
    """Remove all checkpoints in a folder, and the folder if it is then empty. Symbolic links are not followed."""
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
    """The last two checkpoints of a training, in a folder of their own.

    Attributes:
        folder: the folder of the checkpoints.
        done: the number of steps before the newest valid checkpoint; 0 without one.

    Args:
        folder: `folder/STEP` is the checkpoint after that many steps.
        made_from: identity of the training; checkpoints with another identity are skipped, and removed by the next
            `write`.
        every_seconds: least time between checkpoints in seconds, longer if writing one takes more than 2 % of it.
        keeps_end: always write a checkpoint after the last step, for another process to resume from.

    Raises:
        BadSetting: see `check_checkpoints`.
    """

    def __init__(
        self, folder: Path, made_from: Mapping[str, Any], every_seconds: float = 90.0, *, keeps_end: bool = False
    ) -> None:
        self.folder = folder
        self.done = 0
        self._made_from = made_from
        self._every_seconds = every_seconds
        self._keeps_end = keeps_end
        self._kept: list[Path] = []
        check_checkpoints(folder)
        clear_drafts(folder)
        for path in _steps(folder):
            if not (path / MANIFEST).exists():  # left by an interrupted removal
                _remove(path)
        newest_first = _steps(folder)[::-1]
        for number, path in enumerate(newest_first):
            if self._is_valid(path):
                self.done, self._kept = int(path.name), [path]
                announce(f"{folder.name} resumes from its checkpoint after {self.done:,} steps.")
                for other in newest_first[number + 2 :]:  # left by a process killed before it removed them
                    _remove(other)
                break
        self._expected_cost = 0.0  # seconds
        self._cost: float | None = None  # seconds that the last checkpoint took
        self._last = time.monotonic()

    def _identity(self, done: int) -> dict[str, Any]:
        return {**self._made_from, "checkpoint": done}

    def _is_valid(self, path: Path) -> bool:
        try:
            if not finished(path, self._identity(int(path.name))):
                return False
            read_manifest(path, verify=True)
        except DamagedFolder as error:
            announce(f"A damaged checkpoint is skipped; training resumes from an earlier one, if any: {error}")
            return False
        return True

    @property
    def newest(self) -> Path:
        """The folder of the newest valid checkpoint, if `done` is not 0."""
        return self._kept[-1]

    def read(self) -> dict[str, Tensor]:
        """The state of the newest checkpoint, copied into memory so that the file can be removed.

        Raises:
            DamagedFolder: it is not a safetensors file.
        """
        try:
            return {name: tensor.clone() for name, tensor in load_file(self.newest / _STATE_FILE).items()}
        except (OSError, SafetensorError) as error:
            raise DamagedFolder(
                f"{self.newest} cannot be read ({first_line(error)}): remove it; `posmask run` resumes from an earlier "
                "one, or from the first step"
            ) from None

    def expect(self, n_bytes: float) -> None:
        """Set the expected size of a checkpoint in bytes, which delays the first one according to its cost."""
        self._expected_cost = n_bytes / _BYTES_PER_SECOND

    def due(self, *, at_end: bool = False) -> bool:
        """Whether enough time has passed since the last checkpoint to write another.

        Args:
            at_end: no more steps follow, but evaluation would have to repeat them. Once the cost of a checkpoint has
                been measured, a quarter of `every_seconds` is enough.
        """
        since = time.monotonic() - self._last
        seconds = self._every_seconds / (4 if at_end and self._cost is not None else 1)
        cost = self._expected_cost if self._cost is None else self._cost
        return (at_end and self._keeps_end) or since >= max(seconds, _COST_MULTIPLE * cost)

    def write(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Write the state after `done` steps, and remove all earlier checkpoints but the newest."""
        started = time.monotonic()
        path = self.folder / f"{done:0{_STEP_DIGITS}d}"
        _remove(path)  # of another training, or damaged
        with write_folder(path, self._identity(done)) as draft:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft / _STATE_FILE)
        self._kept = [*self._kept[-1:], path]
        for other in _steps(self.folder):
            if other not in self._kept:
                _remove(other)
        self.done = done
        self._last = time.monotonic()
        self._cost = self._last - started
