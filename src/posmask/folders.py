"""A finished folder: written beside its place, checksummed, manifest last, then moved in one rename.

Every stage writes its output this way and finds it by the identity of what made it, so no stage has caching or
resume logic of its own: a folder is either finished and trusted, or it is not there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from posmask.errors import DamagedFolder

__all__ = [
    "FORMAT",
    "MANIFEST",
    "as_json",
    "claim",
    "file_sha256",
    "finished",
    "identity",
    "read_manifest",
    "set_aside",
    "write_folder",
]

FORMAT = 4  # Part of every identity: raise it when the same settings would now write something else.
MANIFEST = "manifest.json"


def identity(made_from: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with anything in `made_from` (JSON values only).

    >>> identity({"layer": 5}) == identity({"layer": 19})
    False
    """
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_json(values: Mapping[str, Any]) -> str:
    """As a person reads it: indented, keys in the order given."""
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_folder(path: Path, made_from: Mapping[str, Any], **facts: Any) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `path` only when the block ends without an error.

    Args:
        made_from: everything that decides the content; its hash is the folder's identity.
        facts: put into the manifest beside it (counts, versions), without a part in the identity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    for left_behind in path.parent.glob(f".{path.name}.draft-*"):
        if left_behind == draft or not _is_running(int(left_behind.name.rsplit("-", 1)[1])):
            shutil.rmtree(left_behind, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        files = {
            file.relative_to(draft).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(draft.rglob("*"))
            if file.is_file()
        }
        for name in files:
            with (draft / name).open("rb") as file:
                os.fsync(file.fileno())
        manifest = {"identity": identity(made_from), "made_from": made_from, **facts, "files": files}
        with (draft / MANIFEST).open("w", encoding="utf8") as file:
            file.write(as_json(manifest))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.rmtree(path)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the right to make a folder, so that of several processes only one does. Ends with the process, too.

    Yields:
        Whether this process holds it; always so with `wait`, which waits for the others.
    """
    locks = path.parent.with_name(".locks")  # Apart, since they are left behind.
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{path.parent.name}-{path.name}")
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
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def finished(path: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether `path` is a finished folder made from exactly this."""
    return (path / MANIFEST).is_file() and read_manifest(path)["identity"] == identity(made_from)


def read_manifest(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a finished folder.

    Args:
        verify: also compare every file's size and checksum with it.

    Raises:
        DamagedFolder: no or unreadable manifest, or a file that differs from what was written.
    """
    remedy = "remove the folder and run again, and it is made anew"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf8"))
        files, _ = manifest["files"], manifest["identity"]
    except FileNotFoundError:
        raise DamagedFolder(f"{path} has no {MANIFEST}, so it was never finished: {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedFolder(f"{path / MANIFEST} cannot be read ({error}): {remedy}") from None
    for name, entry in files.items() if verify else ():
        file = path / name
        if not file.is_file():
            raise DamagedFolder(f"{file} is missing, though the manifest lists it: {remedy}")
        if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
            raise DamagedFolder(f"{file} is not what was written (size or checksum differs): {remedy}")
    return manifest


def set_aside(path: Path, aside: Path) -> Path:
    """Move a folder under `aside`, where it is kept but never read again; returns its new place."""
    aside.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := aside / f"{path.name}-{number}").exists():
        number += 1
    return path.rename(target)
