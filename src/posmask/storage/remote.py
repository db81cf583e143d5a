"""Store harvested activations behind fsspec: s3://, gs://, a network disk, another machine.

A stored folder has the files of a local one and, per shard, a second file with the fields of its tokens, so that a
process can read all tokens without downloading all activations. Shards are downloaded when they are read, compared with
their checksums, and cached in a local folder of bounded size; the least recently used are removed first.
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

from posmask.errors import BadSetting, DamagedFolder, MissingAsset, MissingExtra, first_line
from posmask.progress import announce
from posmask.storage.atomic import move_file, remove_file, scratch_file
from posmask.storage.manifest import MANIFEST, file_entry, file_sha256, identity, manifest_of, sealed_manifest

__all__ = ["Shards", "Store", "StoredFolder"]

_TRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between tries, doubling
_SLOW_SECONDS = 10.0  # per transfer, after which it is reported
_TOKENS = ".tokens.safetensors"
_SHARD_NAME = re.compile(r"shard-\d+(\.tokens)?\.safetensors", re.ASCII)
"""File names that a manifest may list; others are refused, because others may write to the store."""
_PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError)


class Store:
    """Remote storage under a URL, with a local cache.

    Args:
        url: address, such as s3://BUCKET/PATH.
        cache: local folder, which only this class writes to.
        cache_bytes: maximum size of the cache in bytes; processes that share it count together.

    Raises:
        BadSetting: fsspec does not know this kind of URL.
        MissingExtra: a package that this kind of URL needs is not installed.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        try:
            import fsspec
            import tenacity  # noqa: F401

            self._fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(
                f"activations_url = {url!r} needs a package that is not installed ({first_line(error)}): "
                "pip install 'posmask[remote]' for s3://, or the package that it names"
            ) from None
        except ValueError as error:
            raise BadSetting(
                f"activations_url = {url!r} is not a URL that fsspec knows ({first_line(error)}): write s3://BUCKET/PATH"
            ) from None
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")
        self.cache = cache
        self.cache_bytes = cache_bytes

    def folder(self, name: str) -> "StoredFolder":
        """Return a folder of the store, which need not exist."""
        return StoredFolder(self, name)

    def read(self, name: str, target: Path) -> None:
        """Download a file to `target`.

        Raises:
            FileNotFoundError: the store has no such file.
            MissingAsset: every attempt failed.
        """
        self._retry(f"read {name}", lambda: self._fs.get_file(f"{self._root}/{name}", str(target)))

    def write(self, name: str, source: Path) -> None:
        """Upload the file `source`.

        Raises:
            MissingAsset: every attempt failed.
        """

        def put() -> None:
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(source), f"{self._root}/{name}")

        self._retry(f"write {name}", put)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of a folder's shards in bytes; empty if the folder does not exist."""

        def look() -> dict[str, int]:
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
            sizes = {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}
            return {name: size for name, size in sizes.items() if _SHARD_NAME.fullmatch(name)}

        return self._retry(f"list {folder}", look)

    def remove(self, name: str) -> None:
        """Remove a file from the store, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._retry(f"remove {name}", lambda: self._fs.rm_file(f"{self._root}/{name}"))

    def _retry(self, action: str, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, repeated after growing pauses while the store fails."""
        import tenacity

        def report(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            assert state.next_action is not None
            announce(
                f"{self.url} could not {action} ({_short(state.outcome.exception())}): next attempt in "
                f"{state.next_action.sleep:.0f} s, number {state.attempt_number + 1} of {_TRIES}."
            )

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_exponential(_FIRST_WAIT, max=_LONGEST_WAIT),
            retry=tenacity.retry_if_exception(lambda error: not isinstance(error, _PERMANENT)),
            before_sleep=report,
            reraise=True,
        )
        started = time.monotonic()
        try:
            result = retrying(work)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise MissingAsset(
                f"{self.url} could not {action} ({_short(error)}): check the address, your permissions and the "
                "connection, then repeat the command; it resumes from what is finished"
            ) from None
        if (seconds := time.monotonic() - started) > _SLOW_SECONDS:
            announce(f"{self.url} is slow: to {action} took {seconds:.0f} s.")
        return result


def _short(error: BaseException | None) -> str:
    return first_line(f"{type(error).__name__}: {error}")


class StoredFolder:
    """One folder of a store. It is finished if it has a manifest."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name
        self.url = f"{store.url}/{name}"
        self.local = store.cache / name
        self._compared: set[str] = set()
        """Names of cached files whose checksums this process has compared."""

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of a finished folder; None for others.

        Raises:
            DamagedFolder: the manifest is damaged, or a file does not have the size that it lists.
        """
        with scratch_file(self.local / MANIFEST) as beside:
            try:
                self._store.read(f"{self.name}/{MANIFEST}", beside)
            except FileNotFoundError:
                return None
            manifest = manifest_of(beside.read_text(encoding="utf8"), f"{self.url}/{MANIFEST}")
        if unknown := [name for name in manifest["files"] if not _SHARD_NAME.fullmatch(name)]:
            raise DamagedFolder(
                f"{self.url}/{MANIFEST} lists {unknown[0]!r}, which is not the name of a shard: `posmask run` writes "
                "the folder again"
            )
        sizes = self._store.sizes(self.name)
        lost = [name for name, entry in manifest["files"].items() if sizes.get(name) != entry["bytes"]]
        if lost:
            raise DamagedFolder(
                f"{self.url}: {', '.join(lost[:3])}{' and others' if len(lost) > 3 else ''} missing or not of the size "
                "written: `posmask run` recomputes them"
            )
        return manifest

    def finished(self, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the manifest if the folder is finished and was made from exactly these settings, else None."""
        manifest = self.manifest()
        return manifest if manifest is not None and manifest["identity"] == identity(made_from) else None

    def complete_shards(self) -> dict[str, dict[str, Any]]:
        """Return manifest entries of the complete shards in the store and of the files of their tokens."""
        sizes = self._store.sizes(self.name)
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(sizes):
            shard = name.removesuffix(_TOKENS) + ".safetensors"
            if not name.endswith(_TOKENS) or shard not in sizes:
                continue
            with scratch_file(self.local / name) as beside:
                self._store.read(f"{self.name}/{name}", beside)
                try:
                    with safe_open(beside, framework="pt") as file:
                        metadata = file.metadata() or {}
                except SafetensorError:
                    continue
                if metadata.get("bytes") == str(sizes[shard]):
                    entries[shard] = {"bytes": sizes[shard], "sha256": metadata["sha256"]}
                    entries[name] = file_entry(beside)
        return entries

    def add(self, name: str, shard: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Upload a shard, then the file of its tokens; return their entries for the manifest."""
        with scratch_file(self.local / name) as beside:
            save_file(dict(shard), beside)
            entry = file_entry(beside)
            self._store.write(f"{self.name}/{name}", beside)
        tokens_name = name.removesuffix(".safetensors") + _TOKENS
        with scratch_file(self.local / tokens_name) as beside:
            metadata = {"bytes": str(entry["bytes"]), "sha256": entry["sha256"]}
            save_file(dict(tokens), beside, metadata)
            self._store.write(f"{self.name}/{tokens_name}", beside)
            return {name: entry, tokens_name: file_entry(beside)}

    def finish(self, made_from: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Upload the manifest, which finishes the folder."""
        with scratch_file(self.local / MANIFEST) as beside:
            beside.write_text(sealed_manifest(made_from, facts, dict(sorted(files.items()))), encoding="utf8")
            self._store.write(f"{self.name}/{MANIFEST}", beside)

    def unfinish(self) -> None:
        """Remove the manifest, so that lost shards are recomputed."""
        self._store.remove(f"{self.name}/{MANIFEST}")

    def fetched(self, name: str, entry: Mapping[str, Any]) -> Path:
        """Return the local path of a file of the folder, downloaded unless it is in the cache.

        Raises:
            DamagedFolder: the stored file is missing or damaged; it is removed, so that the next run recomputes it.
        """
        path = self.local / name
        with contextlib.suppress(FileNotFoundError):
            if self._is_intact(path, entry):
                os.utime(path)
                return path
        self._make_room(entry["bytes"])
        for _ in range(2):  # The first transfer may have damaged it.
            with scratch_file(path) as beside:
                try:
                    self._store.read(f"{self.name}/{name}", beside)
                except FileNotFoundError:
                    break
                if file_entry(beside) == entry:
                    move_file(beside, path)
                    self._compared.add(name)
                    return path
        self._store.remove(f"{self.name}/{name}")
        raise DamagedFolder(
            f"{self.url}/{name} is missing or damaged (its checksum differs, read twice): it is removed; `posmask run` "
            "recomputes it"
        )

    def _is_intact(self, path: Path, entry: Mapping[str, Any]) -> bool:
        """Whether a cached file is what was written; its checksum is compared once per process."""
        if path.stat().st_size != entry["bytes"]:
            return False
        if path.name not in self._compared:
            if file_sha256(path) != entry["sha256"]:
                return False
            self._compared.add(path.name)
        return True

    def _make_room(self, n_bytes: int) -> None:
        """Remove the least recently used files until `n_bytes` fit; other processes may remove files meanwhile."""
        cached = []
        for path in self._store.cache.rglob("*.safetensors"):
            if not _SHARD_NAME.fullmatch(path.name) or path.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                cached.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in cached)
        for _, size, path in sorted(cached):
            if total + n_bytes <= self._store.cache_bytes:
                return
            remove_file(path)
            total -= size


class Shards:
    """Sequence of the shards of a finished folder in a store, each downloaded on access."""

    def __init__(self, folder: StoredFolder, manifest: Mapping[str, Any]) -> None:
        files = manifest["files"]
        self._folder = folder
        self._entries = [(name, files[name]) for name in sorted(files) if not name.endswith(_TOKENS)]
        self._token_files = [(name, files[name]) for name in sorted(files) if name.endswith(_TOKENS)]
        self._open: dict[int, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def cache_bytes(self) -> int:
        """Maximum size of the local cache in bytes."""
        return self._folder._store.cache_bytes

    def bytes_of(self, number: int) -> int:
        """Return the size of a shard in bytes."""
        return self._entries[number][1]["bytes"]

    def tokens(self) -> list[dict[str, Tensor]]:
        """Load the token fields of each shard."""
        shards = []
        for name, entry in self._token_files:
            path = self._folder.fetched(name, entry)
            shards.append({name: tensor.clone() for name, tensor in load_file(path).items()})
            remove_file(path)
        return shards

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        name, entry = self._entries[number]
        with self._lock:
            path = self._folder.fetched(name, entry)
            if number not in self._open:
                # Close shards that left the cache: the disk keeps the space of a removed file until it is closed.
                self._open = {
                    other: shard
                    for other, shard in self._open.items()
                    if (self._folder.local / self._entries[other][0]).exists()
                }
                self._open[number] = load_file(path)
            return self._open[number]
