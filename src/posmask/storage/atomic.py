"""Replace and remove files and folders so that an interruption leaves no half-written ones.

Output is written under a temporary name beside its path (a draft), synced to disk, and renamed. Drafts that a killed
process left are removed by the next one. A file that posmask did not write is refused with `BadSetting`, and symbolic
links are never followed. Only this module and `manifest` remove or rename anything.
"""

import glob
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from posmask.errors import BadSetting

__all__ = [
    "check_file",
    "check_new_folder",
    "claim",
    "clear_drafts",
    "clear_drafts_of",
    "delete",
    "draft_of",
    "make_folder",
    "move_file",
    "refusal",
    "remove_file",
    "replacing",
    "scratch_file",
    "scratch_folder",
    "sync",
]

_MARKED_BYTES = 4096
_replacing = threading.RLock()  # The threads of a process would use the same draft.


def check_file(path: Path, *marks: bytes) -> None:
    """Refuse a path for a file unless it is free or a file that posmask wrote.

    Args:
        marks: a file that posmask wrote holds one of them in its first or last 4,096 bytes; none are needed in a folder
            that is posmask's own.

    Raises:
        BadSetting: something else is in the way.
    """
    try:
        mode = path.lstat().st_mode  # Looked at once: another thread may write the file in between.
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise refusal(f"{path} is a symbolic link")
    if not stat.S_ISREG(mode):
        raise refusal(f"{path} is not a regular file")
    if marks and (ends := _ends(path)) and not any(mark in ends for mark in marks):
        raise refusal(f"{path} is a file")


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that exists and is not empty.

    Raises:
        BadSetting: something is in the way.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadSetting(f"{folder} exists and is not empty: name a new folder, or remove that one")


def _ends(path: Path) -> bytes:
    """The first and last bytes of a file; empty if another process has removed it in the meantime."""
    try:
        with path.open("rb") as file:
            begin = file.read(_MARKED_BYTES)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MARKED_BYTES))
            return begin + file.read()
    except FileNotFoundError:
        return b""


def remove_file(path: Path, *marks: bytes) -> None:
    """Remove a file that posmask wrote, if it exists.

    Raises:
        BadSetting: as `check_file`.
    """
    check_file(path, *marks)
    path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, *marks: bytes) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; the file is synced to disk and renamed to `path` at the end.

    Raises:
        BadSetting: as `check_file`, before anything is written.
    """
    check_file(path, *marks)
    beside = draft_of(path)
    with _replacing:
        clear_drafts_of(path)
        try:
            yield beside
            sync(beside)
            beside.replace(path)
            sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed afterwards."""
    make_folder(path.parent)
    draft = draft_of(path)
    clear_drafts_of(path)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path`, which is removed afterwards unless `move_file` took it.

    Unlike a draft it has another name in each call, for threads that share `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def move_file(source: Path, path: Path) -> None:
    """Move a file from `scratch_file` to its path in a folder that posmask wrote."""
    check_file(path)
    source.replace(path)


def delete(path: Path) -> None:
    """Remove a draft: a file, a folder with its content, or a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """The temporary path of this process for a file or folder."""
    return path.with_name(f".{path.name}.draft-{os.getpid()}")


def clear_drafts_of(path: Path) -> None:
    """Remove drafts of `path` that processes left behind when they ended."""
    _clear_all(path.parent.glob(f".{glob.escape(path.name)}.draft-*"))


def clear_drafts(folder: Path) -> None:
    """Remove all drafts in a folder that processes left behind when they ended."""
    _clear_all(folder.glob(".*.draft-*"))


def _clear_all(drafts: Iterable[Path]) -> None:
    for draft in drafts:
        process = draft.name.rpartition("-")[2]
        if process.isdecimal() and (int(process) == os.getpid() or not _is_running(int(process))):
            delete(draft)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and sync their names to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Sync a file's content or a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claim(locks: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Hold a lock, so that only one of several processes makes a folder. Released when the process ends.

    Args:
        locks: the folder of the locks, which are left behind.
        name: of what is made.

    Yields:
        Whether this process holds it; always so with `wait`, which waits for the others.
    """
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / name)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _is_running(process: int) -> bool:
    """Whether a process works; one that ended and that its parent has not waited for (a zombie) does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    try:  # of Linux; elsewhere a zombie counts as running
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return True
    return state[:1] not in (["Z"], ["X"])


def refusal(what: str) -> BadSetting:
    """The error for a file or folder in the way.

    Args:
        what: a clause that names it, such as "x/y is a symbolic link".
    """
    return BadSetting(f"{what}, which posmask did not write and does not replace: choose another path, or move it away")
