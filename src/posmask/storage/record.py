"""`study.json` in a run folder: which study it belongs to, its baseline, and the identity of each of its folders.

Every reader that joins folders compares them with it, so that results of different settings are never mixed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, DamagedFolder, first_line
from posmask.storage import layout
from posmask.storage.atomic import claim, refusal, replacing
from posmask.storage.json_file import read_json
from posmask.storage.layout import STUDY_FILE
from posmask.storage.manifest import as_json, file_sha256, identity, read_manifest

__all__ = [
    "RECORD_MARK",
    "StudyRecord",
    "check_identity",
    "check_links",
    "check_listed",
    "check_record",
    "check_sha256",
    "claim_of",
    "misplaced",
    "read_record",
    "write_record",
]

RECORD_MARK = b'{\n "study": '
"""The first bytes of the file, by which posmask recognizes its own."""


@dataclass(frozen=True)
class StudyRecord:
    """What a run folder holds.

    `baseline` is the cell that all others are compared with, or None. `folders` maps the label
    of each folder (`baselines`, `CELL-seedN`) to the identity that it must have.
    """

    study: str
    baseline: str | None
    folders: Mapping[str, str]


def write_record(root: Path, record: StudyRecord) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with replacing(root / STUDY_FILE, RECORD_MARK) as beside:
        beside.write_text(as_json(asdict(record)), encoding="utf8")


def read_record(root: Path) -> StudyRecord | None:
    """The record of a run folder; None where there is none.

    Raises:
        DamagedFolder: it is not what `write_record` writes.
    """
    path = root / STUDY_FILE
    try:
        values = read_json(path)
        record = StudyRecord(**values)
        names = [record.study, *record.folders.keys(), *record.folders.values()]
        if not all(isinstance(name, str) for name in names) or not isinstance(record.baseline, str | None):
            raise TypeError("names and identities must be text")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedFolder(
            f"{path} cannot be read ({first_line(error)}): move it away, `posmask run` writes it again"
        ) from None
    return record


@contextmanager
def claim_of(root: Path, path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file or folder in a run folder; see `atomic.claim`."""
    name = "-".join(path.relative_to(root).parts)
    with claim(layout.locks_folder(root), name, wait=wait) as claimed:
        yield claimed


def check_links(root: Path) -> None:
    """Refuse a run folder in which folders are symbolic links: work would leave it. The root itself may be one.

    Raises:
        BadSetting: a folder is a symbolic link.
    """
    for folder in layout.folders(root):
        if folder.is_symlink():
            raise refusal(f"{folder} is a symbolic link")


def check_listed(root: Path, label: str, made_from: Mapping[str, Any]) -> None:
    """
    Raises:
        BadSetting: the run folder no longer belongs to the study that this folder is made for.
    """
    record = read_record(root)
    if record is None or record.folders.get(label) != identity(made_from):
        raise _overtaken(root, f"stops at {label}")


def check_record(root: Path, expected: StudyRecord) -> None:
    """
    Raises:
        BadSetting: the run folder no longer belongs to the study of this record.
    """
    if read_record(root) != expected:
        raise _overtaken(root, "writes no results")


def _overtaken(root: Path, end: str) -> BadSetting:
    return BadSetting(
        f"{root} now belongs to a run with other settings than this one, which started first and {end}: give each "
        "study a folder of its own with --root"
    )


def check_identity(folder: Path, expected: str) -> None:
    """
    Raises:
        BadSetting: a finished folder was made from other settings than expected.
        DamagedFolder: it is not what was written.
    """
    if read_manifest(folder, verify=True)["identity"] != expected:
        raise BadSetting(
            f"{folder} was replaced during this run by one that was made from other settings: give each study a folder "
            "of its own with --root, then run both again"
        )


def check_sha256(file: Path, expected: str) -> None:
    """
    Raises:
        BadSetting: a file from outside the run folder is no longer what this run began with.
    """
    if file_sha256(file) != expected:
        raise BadSetting(f"{file} was changed during this run: run again, with the file that is meant")


def misplaced(root: Path) -> list[str]:
    """Problems of folders that the record lists: swapped, made from other settings, or without a manifest."""
    record = read_record(root)
    if record is None:
        return []
    problems = []
    for label, expected in record.folders.items():
        folder = layout.cell_folder(root, label)
        if not folder.exists():
            continue
        try:
            actual = read_manifest(folder)["identity"]
        except DamagedFolder as error:
            problems.append(str(error))
            continue
        if actual != expected:
            problems.append(
                f"{folder} is not the folder that {STUDY_FILE} lists: it was swapped or made from other settings; "
                "`posmask run` recomputes it"
            )
    return problems
