"""Finished folders: written under a temporary name, checksummed, completed by a manifest, then renamed.

Every stage writes its output in this way and finds it by its identity, the hash of everything that decides its content.
So no stage has its own caching or resume logic: a folder is either finished and trusted, or it does not exist.

A folder is replaced or removed only if its manifest lists all of its files. Anything else in the way is refused with
`BadSetting`, and symbolic links are never followed.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from posmask.errors import BadSetting, DamagedFolder, first_line
from posmask.storage import layout
from posmask.storage.atomic import delete, make_folder, refusal, replacing, scratch_folder, sync
from posmask.storage.json_file import read_json

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Parts",
    "as_json",
    "check_aside",
    "check_folder",
    "check_sizes",
    "damage_under",
    "file_entry",
    "file_sha256",
    "finished",
    "foreign_in",
    "identity",
    "manifest_of",
    "read_manifest",
    "remove",
    "sealed_manifest",
    "set_aside",
    "take_apart",
    "write_folder",
    "write_in_parts",
]

FORMAT = 7  # Part of every identity: raise it when the same settings would now write something else.
MANIFEST = "manifest.json"
_SEAL = "sha256"
_PARTS = "parts.json"
_REMEDY = "`posmask run` recomputes it"
_SYSTEM_FILES = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini")
"""Names of files in which operating systems keep how a folder is shown; they are nobody's data."""


def identity(made_from: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with anything in `made_from` (JSON values only).

    >>> identity({"layer": 5}) == identity({"layer": 19})
    False
    """
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_json(values: Mapping[str, Any]) -> str:
    """JSON text for people: indented, keys in the given order."""
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

    Raises:
        BadSetting: as `check_folder`, before anything is written.
    """
    check_folder(path, made_from)
    with scratch_folder(path) as draft:
        yield draft
        files = {
            file.relative_to(draft).as_posix(): file_entry(file) for file in sorted(draft.rglob("*")) if file.is_file()
        }
        _finish(draft, path, made_from, facts, files)


class Parts:
    """An unfinished folder whose files are kept, each as soon as it is complete.

    Attributes:
        files: the manifest's entry of each complete file.
        facts: more facts for the manifest, beside those of `write_in_parts`.
    """

    def __init__(self, draft: Path, made_from: Mapping[str, Any]) -> None:
        self._draft = draft
        self._lock = threading.Lock()
        self._identity = identity(made_from)
        self.files: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        for name in (_PARTS, MANIFEST):  # The latter of a folder that was finished once, or all but for its name.
            try:
                kept = read_json(draft / name)
                if kept["identity"] == self._identity:
                    files = kept["files"].items()
                    self.files = {file: entry for file, entry in files if not _damage(draft, file, entry)}
                    break
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                pass
        if not self.files:
            delete(draft)
        for file in draft.glob("*"):  # What a kill left of a file that was being written has a separate name.
            if file.name not in (*self.files, _PARTS, MANIFEST):
                delete(file)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def path(self, name: str) -> Path:
        """Where a file is until the folder is finished."""
        return self._draft / name

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` write the file, and record it; several threads may add files."""
        make_folder(self._draft)
        file = self._draft / name
        try:
            write(file)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        entry = file_entry(file)
        with self._lock, replacing(self._draft / _PARTS) as beside:
            self.files[name] = entry
            beside.write_text(as_json({"identity": self._identity, "files": self.files}), encoding="utf8")


@contextmanager
def write_in_parts(path: Path, made_from: Mapping[str, Any], **facts: Any) -> Iterator[Parts]:
    """Like `write_folder`, for long work: parts that were added before an interruption are reused.

    Only one process at a time may do so for a `path`: see `claim`.

    Raises:
        BadSetting: as `check_folder`, before anything is written.
    """
    check_folder(path, made_from)
    draft = _parts_of(path)
    if draft.is_symlink():
        raise refusal(f"{draft} is a symbolic link")
    parts = Parts(draft, made_from)
    yield parts
    _finish(draft, path, made_from, facts | parts.facts, dict(sorted(parts.files.items())))


def check_folder(path: Path, made_from: Collection[str]) -> None:
    """Refuse a path for a folder unless it is free, empty, or a folder that posmask wrote for the same purpose.

    Args:
        made_from: what decides the new folder's content, by name; a folder with other names serves another purpose.

    Raises:
        BadSetting: something else is in the way.
    """
    if path.name in ("", ".."):
        raise BadSetting(f"{str(path)!r} names no folder that could be replaced: give the folder's own name")
    if path.is_symlink():
        raise refusal(f"{path} is a symbolic link")
    if not path.exists():
        return
    if not path.is_dir():
        raise refusal(f"{path} is a file")
    if (foreign := foreign_in(path)) is not None:
        raise refusal(f"{path} holds {foreign}")
    manifest = _posmask_manifest(path)
    if manifest is not None and set(manifest["made_from"]) != set(made_from):
        raise BadSetting(
            f"{path} holds other results of posmask (made from {', '.join(manifest['made_from'])}): choose another "
            "path, or move it away"
        )


def check_aside(path: Path) -> None:
    """Refuse to move a folder that is not a finished one, or was not.

    Raises:
        BadSetting: it has no manifest, or is no folder at all.
    """
    if path.is_symlink():
        raise refusal(f"{path} is a symbolic link")
    if path.exists() and not path.is_dir():
        raise refusal(f"{path} is a file")
    if path.exists() and not (path / MANIFEST).is_file() and (foreign := foreign_in(path)) is not None:
        raise refusal(f"{path} holds {foreign}")


def _posmask_manifest(path: Path) -> dict[str, Any] | None:
    """A folder's manifest if it has the form of a posmask manifest, with or without a valid checksum."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if isinstance(manifest["identity"], str) and all(
            isinstance(manifest[of], dict) for of in ("made_from", "files")
        ):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def foreign_in(path: Path, known: Collection[str] = ()) -> str | None:
    """The name of the first file in a folder that posmask did not write, or None.

    Files that an operating system adds to folders that are looked at (.DS_Store) do not count.

    Args:
        known: files that are posmask's whatever the manifest says.
    """
    manifest = _posmask_manifest(path)
    listed = {*known, *(() if manifest is None else (MANIFEST, _PARTS, *manifest["files"]))}
    for folder, below, files in os.walk(path):
        for name in sorted((*below, *files)):
            file = Path(folder, name)
            within = file.relative_to(path).as_posix()
            is_foreign = name in files and within not in listed and not _SYSTEM_FILES.fullmatch(name)
            if file.is_symlink() or is_foreign:
                return f"a foreign or damaged {MANIFEST}" if within == MANIFEST else within
    return None


def remove(path: Path, *known: str) -> bool:
    """Remove a folder that posmask wrote, manifest first, so that it never appears as an incomplete finished folder.

    Args:
        known: names of its files, where the manifest may be gone already because an earlier removal was stopped.

    Returns:
        Whether it was removed; a folder that holds anything else and a link stay as they are.
    """
    if path.is_symlink() or not path.is_dir() or foreign_in(path, known) is not None:
        return False
    (path / MANIFEST).unlink(missing_ok=True)
    sync(path)  # Else files could be lost with the power, and the manifest be there again.
    shutil.rmtree(path, ignore_errors=True)
    return True


def take_apart(path: Path, *known: str) -> None:
    """Turn a damaged folder into an unfinished one, so that `write_in_parts` recomputes only the damaged files.

    Args:
        known: names of its files, where the manifest may be damaged.

    Raises:
        BadSetting: it holds something that posmask did not write.
    """
    if path.is_symlink():
        raise refusal(f"{path} is a symbolic link")
    if (foreign := foreign_in(path, known)) is not None:
        raise refusal(f"{path} holds {foreign}")
    draft = _parts_of(path)
    delete(draft)
    path.rename(draft)
    sync(path.parent)


def _parts_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")


def file_entry(file: Path) -> dict[str, Any]:
    """The entry of a file in a manifest: size and checksum. The file is synced to disk first."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _finish(draft: Path, path: Path, made_from: Mapping[str, Any], facts: Mapping[str, Any], files: Any) -> None:
    with replacing(draft / MANIFEST) as beside:
        beside.write_text(sealed_manifest(made_from, facts, files), encoding="utf8")
    for folder in draft.rglob("*"):
        if folder.is_dir():
            sync(folder)
    (draft / _PARTS).unlink(missing_ok=True)
    check_folder(path, made_from)
    before = path.with_name(f".{path.name}.draft-before-{os.getpid()}")
    if path.exists():
        path.rename(before)  # Between here and the next line there is none.
    draft.rename(path)
    sync(path.parent)  # Else the name could be lost with the power, though the content is safe.
    shutil.rmtree(before, ignore_errors=True)


def sealed_manifest(made_from: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """The text of a finished folder's manifest, with its checksum.

    Args:
        files: the result of `file_entry` for each file.
    """
    manifest = {"identity": identity(made_from), "made_from": made_from, **facts, "files": files}
    return as_json({**manifest, _SEAL: _seal(manifest)})


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(as_json(manifest).encode()).hexdigest()


def finished(path: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether `path` is a finished folder with the identity of `made_from`."""
    return (path / MANIFEST).is_file() and read_manifest(path)["identity"] == identity(made_from)


def read_manifest(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a finished folder.

    Args:
        verify: also compare every file's size and checksum with it.

    Raises:
        DamagedFolder: no or unreadable manifest, or files that differ from their checksums, which are all named.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf8")
    except FileNotFoundError:
        raise DamagedFolder(f"{path} has no {MANIFEST}, so it was never finished: {_REMEDY}") from None
    except ValueError as error:
        raise DamagedFolder(f"{path / MANIFEST} cannot be read ({first_line(error)}): {_REMEDY}") from None
    manifest = manifest_of(text, path / MANIFEST)
    if verify:
        problems = [_damage(path, name, entry) for name, entry in manifest["files"].items()]
        if any(problems):
            raise DamagedFolder(f"{'; '.join(filter(None, problems))}: {_REMEDY}")
    return manifest


def check_sizes(path: Path) -> None:
    """Check without reading them that a finished folder has all of its files in their sizes.

    Raises:
        DamagedFolder: files are missing or have another size; all are named.
    """
    problems = []
    for name, entry in read_manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{file} has {file.stat().st_size:,} bytes instead of {entry['bytes']:,}")
    if problems:
        raise DamagedFolder(f"{'; '.join(problems)}: {_REMEDY}")


def manifest_of(text: str, where: Path | str) -> dict[str, Any]:
    """Parse the text of a manifest and check its checksum.

    Args:
        where: it was read, for the message.

    Raises:
        DamagedFolder: the text is not what was written.
    """
    try:
        manifest = json.loads(text)
        files, _ = manifest["files"], manifest["identity"]
        as_written = as_json(manifest)
        if text != as_written or manifest.pop(_SEAL) != _seal(manifest):
            raise ValueError("it is not what was written")
        names = list(files.keys())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedFolder(f"{where} cannot be read ({first_line(error)}): {_REMEDY}") from None
    for name in names:
        if not _stays_within(name):
            raise DamagedFolder(f"{where} lists {name!r}, which lies outside the folder: {_REMEDY}")
    return manifest


def _stays_within(name: str) -> bool:
    """Whether a file's name in a manifest is a relative path that stays in the folder, on any system."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not {"\\", "\0"} & set(name)


def damage_under(root: Path) -> tuple[int, list[str]]:
    """The number of finished folders in a run folder, without stale ones, and the problems that were found.

    Symbolic links are followed. A folder without a manifest is a problem where only finished folders belong, and so is
    a file in a finished folder that its manifest does not list, unless an operating system added it.
    """
    n_folders, problems, seen = 0, [], set()
    of_finished = {layout.cells_folder(root), layout.evaluated_folders(root), layout.activations_folder(root)}
    for path, below, files in os.walk(root, followlinks=True):
        folder = Path(path)
        is_new = (real := folder.resolve()) not in seen
        seen.add(real)
        is_finished = MANIFEST in files
        if is_finished or folder.parent in of_finished or folder == layout.cell_folder(root, layout.BASELINES):
            n_folders += is_finished
            try:
                read_manifest(folder, verify=True)
                if (foreign := foreign_in(folder)) is not None:
                    problems.append(f"{folder} holds {foreign}, which posmask did not write or use: move it away")
            except DamagedFolder as error:
                problems.append(str(error))
        below[:] = sorted(name for name in below if is_new and not is_finished and not name.startswith("."))
        if folder == root:
            below[:] = [name for name in below if folder / name != layout.stale_folder(root)]
    return n_folders, problems


def _damage(folder: Path, name: str, entry: Any) -> str | None:
    """The problem of a file that a manifest lists, or None."""
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


def set_aside(path: Path, places: Iterable[Path]) -> Path:
    """Move a folder to the first of these paths that is free; return it.

    Raises:
        BadSetting: as `check_aside`.
    """
    check_aside(path)
    target = next(place for place in places if not os.path.lexists(place))
    target.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(target)
