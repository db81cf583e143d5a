"""Read training texts from files, from a folder, or from a dataset on the Hugging Face hub."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, MissingAsset, MissingExtra, PosmaskError, first_line
from posmask.progress import announce
from posmask.storage.compressed import unpacked
from posmask.storage.manifest import file_sha256

__all__ = ["HUB_PREFIX", "content_of", "load_from_hub", "read_texts", "why_unusable"]

HUB_PREFIX = "hf:"
_ENDINGS = (".txt", ".jsonl", ".jsonl.zst")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 starts with one of them, too.


def read_texts(source: str, n_texts: int | None = None) -> Iterator[str]:
    """Read the texts of a source in order.

    Rows whose text is null or contains lone surrogates (halves of a UTF-16 pair) are skipped, counted and reported.

    Args:
        source: a file or folder, or a dataset on the hub. Files are UTF-8. A `.txt` file is one text. Each line of a
            `.jsonl` or `.jsonl.zst` file is a JSON object with a text in its field `text`. The files of a folder are
            read in the order of their names. `hf:OWNER/NAME`, optionally followed by `:CONFIGURATION` and then
            `@REVISION`, is the column `text` of the split `train`, read as a stream.
        n_texts: maximum number of texts; None reads all.

    Raises:
        BadSetting: the file does not exist, has another ending or encoding or is damaged, or a line has no text.
        MissingAsset: the hub is unavailable, or has no such dataset.
        MissingExtra: the package `datasets` is not installed.
    """
    rows = _from_hub(source) if source.startswith(HUB_PREFIX) else _from_files(source)
    skipped: Counter[str] = Counter()
    yield from islice(_usable(rows, skipped), n_texts)
    if skipped:
        reasons = " and ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        announce(f"Skipped {skipped.total():,} rows of {source} without a usable text: {reasons}.")


def _usable(rows: Iterator[tuple[str, Any]], skipped: Counter[str]) -> Iterator[str]:
    """The texts of rows (place, value of the field `text`); counts the rows that are skipped."""
    for place, value in rows:
        if value is not None and not isinstance(value, str):
            raise BadSetting(
                f'{place} has a value of type {type(value).__name__} in "text" instead of a string: write each text as '
                "one string (a chat as its messages joined by the model's chat template)"
            )
        reason = why_unusable(value)
        if isinstance(value, str) and reason is None:
            yield value
        else:
            skipped[str(reason)] += 1


def why_unusable(value: object) -> str | None:
    """The reason why a value is not a text that a tokenizer takes; None if it is one.

    >>> why_unusable(None), why_unusable("a \\ud800"), why_unusable("a")
    ('with null', 'with lone surrogates', None)
    """
    if not isinstance(value, str):
        return "with null" if value is None else f"of type {type(value).__name__}"
    try:
        value.encode("utf8")
    except UnicodeEncodeError:
        return "with lone surrogates"
    return None


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
    if not path.exists():
        raise BadSetting(
            f"corpus.texts = {source!r} does not exist: give a file or folder, or {HUB_PREFIX}OWNER/NAME for a dataset "
            "on the hub"
        )
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and file.name.endswith(_ENDINGS)]
    if not files:
        raise BadSetting(
            f"corpus.texts = {source!r} is not a file or folder with {', '.join(_ENDINGS)} in it: give one, or "
            f"{HUB_PREFIX}OWNER/NAME for a dataset on the hub"
        )
    return files


def _from_files(source: str) -> Iterator[tuple[str, Any]]:
    for path in _files(source):
        if path.name.endswith(".txt"):
            text = _decoded(path.read_bytes(), path, 1)
            yield str(path), text.replace("\r\n", "\n").replace("\r", "\n")
            continue
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield f"line {number} of {path}", _text_of(_decoded(line, path, number), path, number)


def _lines(path: Path) -> Iterator[bytes]:
    if not path.name.endswith(".zst"):
        with path.open("rb") as file:
            yield from file
        return
    started: list[bytes] = []
    try:
        for part in unpacked(path):
            first, *more = part.split(b"\n")
            started.append(first)
            if more:
                yield b"".join(started)
                *complete, last = more
                yield from complete
                started = [last]
    except ValueError as error:
        raise BadSetting(
            f"{path} is damaged ({first_line(error)}): copy or compress it again, or unpack it with `zstd -d`"
        ) from None
    yield b"".join(started)


def _decoded(content: bytes, path: Path, number: int) -> str:
    """The characters of a file or line in UTF-8, without a byte order mark.

    `number` is the number of the line, 1 for a whole file.
    """
    if number == 1 and content.startswith(_UTF16_MARKS):
        raise BadSetting(f"{path} is encoded in UTF-16 or UTF-32: convert it, as in `iconv -f UTF-16 -t UTF-8`")
    if b"\0" in content:
        line = number + content[: content.index(b"\0")].count(b"\n")
        raise BadSetting(
            f"line {line} of {path} has NUL characters, so it is binary or UTF-16 without a mark: convert it to UTF-8"
        )
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + content[: error.start].count(b"\n")
        raise BadSetting(
            f"line {line} of {path} is not UTF-8 (byte 0x{content[error.start]:02x}): convert the file, as in `iconv "
            "-f LATIN1 -t UTF-8` if it is Latin-1"
        ) from None


def _text_of(line: str, path: Path, number: int) -> Any:
    """The value of the field `text`."""
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        columns = ""
        if isinstance(error, KeyError):
            columns = f" (it has {', '.join(sorted(json.loads(line))) or 'no fields'})"
        raise BadSetting(
            f'line {number} of {path} is not a JSON object with a text in "text"{columns}: correct or remove it'
        ) from None


def _from_hub(source: str) -> Iterator[tuple[str, Any]]:
    name, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    path, _, configuration = name.partition(":")
    options = {"name": configuration or None, "revision": revision or None}
    rows = load_from_hub(path, split="train", streaming=True, **options)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if "text" not in row:
                raise BadSetting(f"{path} has the columns {', '.join(row)}, not text: name a dataset with this column")
            yield f"row {number} of {path}", row["text"]
    except PosmaskError:
        raise
    except Exception as error:  # The readers of `datasets` have no common base of their errors.
        raise MissingAsset(
            f"{path} could not be read after row {number:,} ({first_line(error)}): check the network and repeat the "
            "command"
        ) from error


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
        raise MissingAsset(
            f"{path} could not be loaded ({first_line(error)}): check the network and the hub's page"
        ) from error
