"""Harvested vectors in a store that fsspec reaches: s3://, gs://, a network disk, another machine.

A folder there holds what a local one does, and for each shard a second file with its tokens' fields alone, so that a
process knows all tokens without having all vectors. Shards come here when they are read, are compared with their
checksums, and lie in a local folder of bounded size, of which the longest unused goes first.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder, MissingAsset, MissingExtra
from posmask.progress import announce
from posmask.storage.manifest import (
    MANIFEST,
    file_entry,
    identity,
    manifest_of,
    move_file,
    remove_file,
    scratch_file,
    sealed_manifest,
)

__all__ = ["Shards", "Store", "StoredFolder"]

_TRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between tries, doubling
_SLOW_SECONDS = 10.0  # of one transfer, after which it is said
_TOKENS = ".tokens.safetensors"
_SHARD_NAME = re.compile(r"shard-\d+(\.tokens)?\.safetensors", re.ASCII)
"""What a folder may list beside its manifest: names come from a store that others may write to."""
_PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError)


class Store:
    """A place under a URL, and the local folder in which what is read from it lies.

    Args:
        cache: the local folder; its files are this class's own.
        cache_bytes: how much may lie there. Processes that share it count together.

    Raises:
        BadSetting: no such kind of URL.
        MissingExtra: a package that this kind needs is not installed.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        try:
            import fsspec
            import tenacity  # noqa: F401

            self._fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(
                f"activations_url = {url!r} needs a package that is not installed ({error}): "
                "pip install 'posmask[remote]' for s3://, or the package that it names"
            ) from None
        except ValueError as error:
            raise BadSetting(
                f"activations_url = {url!r} is no place that fsspec knows ({error}): write s3://BUCKET/PATH or the like"
            ) from None
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        self.cache = cache
        self.cache_bytes = cache_bytes

    def folder(self, name: str) -> "StoredFolder":
        return StoredFolder(self, name)

    def read(self, name: str, target: Path) -> None:
        """Bring a file here.

        Raises:
            FileNotFoundError: there is none.
            MissingAsset: the store failed in every try.
        """
        self._tried(f"read {name}", lambda: self._fs.get_file(f"{self._root}/{name}", str(target)))

    def write(self, name: str, source: Path) -> None:
        def put() -> None:
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(source), f"{self._root}/{name}")

        self._tried(f"write {name}", put)

    def sizes(self, folder: str) -> dict[str, int]:
        """The shards of a folder and their bytes; none where there is no folder."""

        def look() -> dict[str, int]:
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
            sizes = {one["name"].rpartition("/")[2]: one["size"] for one in found if one["type"] == "file"}
            return {name: size for name, size in sizes.items() if _SHARD_NAME.fullmatch(name)}

        return self._tried(f"list {folder}", look)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried(f"remove {name}", lambda: self._fs.rm_file(f"{self._root}/{name}"))

    def _tried(self, what: str, work: Callable[[], Any]) -> Any:
        """The outcome of `work`, tried again with growing pauses while the store fails."""
        import tenacity

        def again(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            assert state.next_action is not None
            announce(
                f"{self.url} could not {what} ({_short(state.outcome.exception())}): once more in "
                f"{state.next_action.sleep:.0f} s, try {state.attempt_number + 1} of {_TRIES}."
            )

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_exponential(_FIRST_WAIT, max=_LONGEST_WAIT),
            retry=tenacity.retry_if_exception(lambda error: not isinstance(error, _PERMANENT)),
            before_sleep=again,
            reraise=True,
        )
        started = time.monotonic()
        try:
            found = retrying(work)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise MissingAsset(
                f"{self.url} could not {what} ({_short(error)}): check the address, your rights there and the "
                "connection; what is finished stays, and the same command goes on from there"
            ) from None
        if (seconds := time.monotonic() - started) > _SLOW_SECONDS:
            announce(f"{self.url} is slow: to {what} took {seconds:.0f} s.")
        return found


def _short(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


class StoredFolder:
    """One folder of a store, finished when its manifest is there."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name
        self.url = f"{store.url}/{name}"
        self.local = store.cache / name

    def manifest(self) -> dict[str, Any] | None:
        """What it was finished with; None where it was not.

        Raises:
            DamagedFolder: the manifest is not what was written, or a file has not the size that it says.
        """
        with scratch_file(self.local / MANIFEST) as beside:
            try:
                self._store.read(f"{self.name}/{MANIFEST}", beside)
            except FileNotFoundError:
                return None
            manifest = manifest_of(beside.read_text(encoding="utf8"), f"{self.url}/{MANIFEST}")
        if strange := [name for name in manifest["files"] if not _SHARD_NAME.fullmatch(name)]:
            raise DamagedFolder(
                f"{self.url}/{MANIFEST} lists {strange[0]!r}, which is not the name of a shard: `posmask run` writes "
                "the folder again"
            )
        there = self._store.sizes(self.name)
        lost = [name for name, entry in manifest["files"].items() if there.get(name) != entry["bytes"]]
        if lost:
            raise DamagedFolder(
                f"{self.url}: {', '.join(lost[:3])}{' and others' if len(lost) > 3 else ''} missing or not of the size "
                "written: `posmask run` makes anew what is lost"
            )
        return manifest

    def finished(self, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest, where it is that of a folder made from exactly this."""
        manifest = self.manifest()
        return manifest if manifest is not None and manifest["identity"] == identity(made_from) else None

    def whole_shards(self) -> dict[str, dict[str, Any]]:
        """Entries for a manifest of shards that are in the store, whole, with the files of their tokens."""
        there = self._store.sizes(self.name)
        found: dict[str, dict[str, Any]] = {}
        for name in sorted(there):
            shard = name.removesuffix(_TOKENS) + ".safetensors"
            if not name.endswith(_TOKENS) or shard not in there:
                continue
            with scratch_file(self.local / name) as beside:
                self._store.read(f"{self.name}/{name}", beside)
                try:
                    with safe_open(beside, framework="pt") as file:
                        said = file.metadata() or {}
                except SafetensorError:
                    continue
                if said.get("bytes") == str(there[shard]):
                    found[shard] = {"bytes": there[shard], "sha256": said["sha256"]}
                    found[name] = file_entry(beside)
        return found

    def add(self, name: str, shard: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Put a shard there, and what its tokens are, last; returns their entries for the manifest."""
        with scratch_file(self.local / name) as beside:
            save_file(dict(shard), beside)
            entry = file_entry(beside)
            self._store.write(f"{self.name}/{name}", beside)
        about = name.removesuffix(".safetensors") + _TOKENS
        with scratch_file(self.local / about) as beside:
            said = {"bytes": str(entry["bytes"]), "sha256": entry["sha256"]}
            save_file(dict(tokens), beside, said)
            self._store.write(f"{self.name}/{about}", beside)
            return {name: entry, about: file_entry(beside)}

    def finish(self, made_from: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        with scratch_file(self.local / MANIFEST) as beside:
            beside.write_text(sealed_manifest(made_from, facts, dict(sorted(files.items()))), encoding="utf8")
            self._store.write(f"{self.name}/{MANIFEST}", beside)

    def unfinish(self) -> None:
        """Take the manifest away, so that what is lost is made anew."""
        self._store.remove(f"{self.name}/{MANIFEST}")

    def fetched(self, name: str, entry: Mapping[str, Any]) -> Path:
        """A file of the folder, here and as it was written.

        Raises:
            DamagedFolder: the store has another, which is removed there, so that the next run makes it anew.
        """
        path = self.local / name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == entry["bytes"]:  # It was compared when it came.
                os.utime(path)
                return path
        self._make_room(entry["bytes"])
        for _ in range(2):  # It may have been damaged on its way.
            with scratch_file(path) as beside:
                try:
                    self._store.read(f"{self.name}/{name}", beside)
                except FileNotFoundError:
                    break
                if file_entry(beside) == entry:
                    move_file(beside, path)
                    return path
        self._store.remove(f"{self.name}/{name}")
        raise DamagedFolder(
            f"{self.url}/{name} is missing or not what was written (its checksum differs, read twice): it is removed; "
            "`posmask run` makes it anew"
        )

    def _make_room(self, n_bytes: int) -> None:
        """Remove what was not used for longest until so much fits; what another process removed is gone already."""
        lying = []
        for path in self._store.cache.rglob("*.safetensors"):
            if not _SHARD_NAME.fullmatch(path.name) or path.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                lying.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in lying)
        for _, size, path in sorted(lying):
            if total + n_bytes <= self._store.cache_bytes:
                return
            remove_file(path)
            total -= size


class Shards:
    """The shards of a finished folder in a store, each brought here when it is asked for."""

    def __init__(self, folder: StoredFolder, manifest: Mapping[str, Any]) -> None:
        files = manifest["files"]
        self._folder = folder
        self._entries = [(name, files[name]) for name in sorted(files) if not name.endswith(_TOKENS)]
        self._about = [(name, files[name]) for name in sorted(files) if name.endswith(_TOKENS)]
        self._open: dict[int, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def cache_bytes(self) -> int:
        return self._folder._store.cache_bytes

    def bytes_of(self, number: int) -> int:
        return self._entries[number][1]["bytes"]

    def tokens(self) -> list[dict[str, Tensor]]:
        """The fields of each shard's tokens, in memory."""
        found = []
        for name, entry in self._about:
            path = self._folder.fetched(name, entry)
            found.append({name: tensor.clone() for name, tensor in load_file(path).items()})
            remove_file(path)
        return found

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        name, entry = self._entries[number]
        with self._lock:
            path = self._folder.fetched(name, entry)
            if number not in self._open:
                # What was removed to make room is let go of too, else the disk would not have it back.
                self._open = {
                    other: shard
                    for other, shard in self._open.items()
                    if (self._folder.local / self._entries[other][0]).exists()
                }
                self._open[number] = load_file(path)
            return self._open[number]
