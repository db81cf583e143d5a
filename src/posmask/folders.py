"""A finished folder: written beside its place, checksummed, manifest last, then moved in one rename.

Every stage writes its output this way and finds it by the identity of what made it, so no stage has caching or
resume logic of its own: a folder is either finished and trusted, or it is not there.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from posmask.errors import DamagedFolder

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Parts",
    "as_json",
    "claim",
    "damage_under",
    "file_entry",
    "file_sha256",
    "finished",
    "identity",
    "manifest_of",
    "read_manifest",
    "remove",
    "replacing",
    "sealed_manifest",
    "set_aside",
    "take_apart",
    "write_folder",
    "write_in_parts",
]

FORMAT = 4  # Part of every identity: raise it when the same settings would now write something else.
MANIFEST = "manifest.json"
_SEAL = "sha256"
_PARTS = "parts.json"
_REMEDY = "`posmask run` makes anew what is lost"


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
    _make_folder(path.parent)
    draft = _draft_of(path)
    _clear(path)
    draft.mkdir()
    try:
        yield draft
        files = {
            file.relative_to(draft).as_posix(): file_entry(file) for file in sorted(draft.rglob("*")) if file.is_file()
        }
        _finish(draft, path, made_from, facts, files)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class Parts:
    """A folder in the making whose files are kept, each as soon as it is whole, whatever happens afterwards."""

    def __init__(self, draft: Path, made_from: Mapping[str, Any]) -> None:
        self._draft = draft
        self._identity = identity(made_from)
        self.files: dict[str, Any] = {}
        for name in (_PARTS, MANIFEST):  # The latter of a folder that was finished once, or all but for its name.
            try:
                kept = json.loads((draft / name).read_text(encoding="utf8"))
                if kept["identity"] == self._identity:
                    files = kept["files"].items()
                    self.files = {file: entry for file, entry in files if not _damage(draft, file, entry)}
                    break
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                pass
        if not self.files:
            shutil.rmtree(draft, ignore_errors=True)
        for file in draft.glob("*"):  # What a kill left of a file that was being written has a name of its own.
            if file.name not in (*self.files, _PARTS, MANIFEST):
                file.unlink()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` make the file, and keep it."""
        _make_folder(self._draft)
        file = self._draft / name
        try:
            write(file)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self.files[name] = file_entry(file)
        with replacing(self._draft / _PARTS) as beside:
            beside.write_text(as_json({"identity": self._identity, "files": self.files}), encoding="utf8")


@contextmanager
def write_in_parts(path: Path, made_from: Mapping[str, Any], **facts: Any) -> Iterator[Parts]:
    """Like `write_folder`, for long work: what was added before a stop is there again when the same work begins anew.

    Only one process at a time may do so for a `path`: see `claim`.
    """
    parts = Parts(_parts_of(path), made_from)
    yield parts
    _finish(_parts_of(path), path, made_from, facts, dict(sorted(parts.files.items())))


def remove(path: Path) -> None:
    """Remove a finished folder so that it is never seen as one that lacks files."""
    (path / MANIFEST).unlink(missing_ok=True)
    if path.is_dir():
        _sync(path)  # Else files could be lost with the power, and the manifest be there again.
    shutil.rmtree(path, ignore_errors=True)


def take_apart(path: Path) -> None:
    """Make a damaged folder one in the making again, so that `write_in_parts` makes only those files that are lost."""
    draft = _parts_of(path)
    shutil.rmtree(draft, ignore_errors=True)
    path.rename(draft)
    _sync(path.parent)


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft-{os.getpid()}")


def _clear(path: Path) -> None:
    """Remove drafts that were left behind by processes that are no more."""
    for left_behind in path.parent.glob(f".{glob.escape(path.name)}.draft-*"):
        process = left_behind.name.rpartition("-")[2]
        if left_behind == _draft_of(path) or (process.isdecimal() and not _is_running(int(process))):
            if left_behind.is_dir():
                shutil.rmtree(left_behind, ignore_errors=True)
            else:
                left_behind.unlink(missing_ok=True)


def _parts_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write beside `path`; it takes that place whole, and is on the disk by then."""
    beside = _draft_of(path)
    _clear(path)
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def file_entry(file: Path) -> dict[str, Any]:
    """What a manifest says of a file, which is on the disk by then."""
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _finish(draft: Path, path: Path, made_from: Mapping[str, Any], facts: Mapping[str, Any], files: Any) -> None:
    with replacing(draft / MANIFEST) as beside:
        beside.write_text(sealed_manifest(made_from, facts, files), encoding="utf8")
    for folder in draft.rglob("*"):
        if folder.is_dir():
            _sync(folder)
    (draft / _PARTS).unlink(missing_ok=True)
    before = path.with_name(f".{path.name}.draft-before-{os.getpid()}")
    if path.exists():
        path.rename(before)  # Between here and the next line there is none.
    draft.rename(path)
    _sync(path.parent)  # Else the name could be lost with the power, though the content is safe.
    shutil.rmtree(before, ignore_errors=True)


def sealed_manifest(made_from: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The text of a finished folder's manifest, with a checksum of its own.

    Args:
        files: what `file_entry` says of each.
    """
    manifest = {"identity": identity(made_from), "made_from": made_from, **facts, "files": files}
    return as_json({**manifest, _SEAL: _seal(manifest)})


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(as_json(manifest).encode()).hexdigest()


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, whose names are on the disk by then."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        DamagedFolder: no or unreadable manifest, or files that differ from what was written, all of them named.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf8")
    except FileNotFoundError:
        raise DamagedFolder(f"{path} has no {MANIFEST}, so it was never finished: {_REMEDY}") from None
    except ValueError as error:
        raise DamagedFolder(f"{path / MANIFEST} cannot be read ({error}): {_REMEDY}") from None
    manifest = manifest_of(text, path / MANIFEST)
    if verify and (
        found := [said for name, entry in manifest["files"].items() if (said := _damage(path, name, entry))]
    ):
        raise DamagedFolder(f"{'; '.join(found)}: {_REMEDY}")
    return manifest


def manifest_of(text: str, where: Path | str) -> dict[str, Any]:
    """What `sealed_manifest` made the text from.

    Args:
        where: it was read, for the message.

    Raises:
        DamagedFolder: the text is not what was written.
    """
    try:
        manifest = json.loads(text)
        files, _ = manifest["files"], manifest["identity"]
        as_written = as_json(manifest)
        last = list(manifest)[-1]  # Manifests had no seal once: then the files came last.
        if text != as_written or (last != "files" and manifest.pop(_SEAL) != _seal(manifest)):
            raise ValueError("it is not what was written")
        files.items()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedFolder(f"{where} cannot be read ({error}): {_REMEDY}") from None
    return manifest


def damage_under(root: Path) -> tuple[int, list[str]]:
    """How many finished folders lie under `root`, those set aside left out, and what is wrong with any of them."""
    n_folders, found = 0, []
    for manifest in sorted(root.rglob(MANIFEST)):
        within = manifest.relative_to(root).parts[:-1]
        if within[:1] == ("stale",) or any(name.startswith(".") for name in within):
            continue
        n_folders += 1
        try:
            read_manifest(manifest.parent, verify=True)
        except DamagedFolder as error:
            found.append(str(error))
    return n_folders, found


def _damage(folder: Path, name: str, entry: Any) -> str | None:
    """What is wrong with a file that a manifest lists; None where nothing is."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        return f"{file} lies outside the folder"
    if not file.is_file():
        return f"{file} is missing, though the manifest lists it"
    try:
        if file.stat().st_size == entry["bytes"] and file_sha256(file) == entry["sha256"]:
            return None
    except (KeyError, TypeError):
        pass
    return f"{file} is not what was written (size or checksum differs)"


def set_aside(path: Path, aside: Path) -> Path:
    """Move a folder under `aside`, where it is kept but never read again; returns its new place."""
    aside.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := aside / f"{path.name}-{number}").exists():
        number += 1
    return path.rename(target)
