"""Read training texts from files, from a folder, or from a dataset on the Hugging Face hub."""

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard

from posmask.errors import BadSetting, MissingAsset, MissingExtra
from posmask.storage.manifest import file_sha256

__all__ = ["HUB_PREFIX", "content_of", "load_from_hub", "read_texts"]

HUB_PREFIX = "hf:"
_ENDINGS = (".txt", ".jsonl", ".jsonl.zst")


def read_texts(source: str, n_texts: int | None = None) -> Iterator[str]:
    """Read the texts of a source in order.

    Args:
        source: a file or folder, or a dataset on the hub. A `.txt` file is one text. Each line of a `.jsonl` or
            `.jsonl.zst` file is a JSON object with a text in its field `text`. The files of a folder are read in the
            order of their names. `hf:OWNER/NAME`, optionally followed by `:CONFIGURATION` and then `@REVISION`, is
            the column `text` of the split `train`, read as a stream.
        n_texts: maximum number of texts; None reads all.

    Raises:
        BadSetting: the file does not exist or has another ending, or a line has no text.
        MissingAsset: the hub is unavailable, or has no such dataset.
        MissingExtra: the package `datasets` is not installed.
    """
    texts = _from_hub(source) if source.startswith(HUB_PREFIX) else _from_files(source)
    return islice(texts, n_texts)


def content_of(source: str) -> dict[str, str]:
    """The identity of a source's texts: checksums of its files, or a hub dataset's name, configuration and revision.

    Raises:
        BadSetting: the file or folder does not exist or has no files of these kinds.
    """
    if source.startswith(HUB_PREFIX):
        return {"hub": source.removeprefix(HUB_PREFIX)}
    return {path.name: file_sha256(path) for path in _files(source)}


def _files(source: str) -> list[Path]:
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and file.name.endswith(_ENDINGS)]
    if not files:
        raise BadSetting(
            f"corpus.texts = {source!r} is not a file or folder with {', '.join(_ENDINGS)} in it: give one, or "
            f"{HUB_PREFIX}OWNER/NAME for a dataset on the hub"
        )
    return files


def _from_files(source: str) -> Iterator[str]:
    for path in _files(source):
        if path.name.endswith(".txt"):
            yield path.read_text(encoding="utf8")
            continue
        with path.open("rb") as file:
            raw = zstandard.ZstdDecompressor().stream_reader(file) if path.name.endswith(".zst") else file
            with io.TextIOWrapper(raw, encoding="utf8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _text_of(line, path, number)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise BadSetting(f'line {number} of {path} is not a JSON object with a text in "text": correct or remove it')
    return text


def _from_hub(source: str) -> Iterator[str]:
    name, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    path, _, configuration = name.partition(":")
    options = {"name": configuration or None, "revision": revision or None}
    for row in load_from_hub(path, split="train", streaming=True, **options):
        if "text" not in row:
            raise BadSetting(f"{path} has the columns {', '.join(row)}, not text: name a dataset with this column")
        yield row["text"]


def load_from_hub(path: str, **options: Any) -> Any:
    """Call `datasets.load_dataset`. All reads of hub datasets go through this function.

    Args:
        path: name of the dataset on the hub.
        options: further arguments of `load_dataset`.

    Raises:
        MissingAsset: the hub is unavailable, or has no such dataset.
        MissingExtra: the package `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra(f"{path} needs the package `datasets`: pip install 'posmask[hub]'") from None
    try:
        return load_dataset(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MissingAsset(f"{path} could not be loaded ({reason}): check the network and the hub's page") from error
