"""Read files that zstandard compressed, within stated limits.

A small file may unpack to any size. Tables of posmask unpack to 13 times their size and texts to less than 20 times, so
a file that unpacks to more than 200 times its size, and more than 64 MiB, is refused.
"""

from collections.abc import Iterator
from pathlib import Path

import zstandard

__all__ = ["ALWAYS_ALLOWED", "MOST_TIMES", "unpacked"]

MOST_TIMES = 200
ALWAYS_ALLOWED = 2**26
"""Bytes that any file may unpack to."""
_PACKED_BYTES = 1024
"""A block of 4 bytes may unpack to 128 KiB, so pieces are small: each unpacks to at most 32 MiB."""


def unpacked(path: Path) -> Iterator[bytes]:
    """Yield the contents of a compressed file of one or several frames, piece by piece.

    Raises:
        ValueError: it is damaged, or unpacks to too much for its size.
    """
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    limit = max(ALWAYS_ALLOWED, MOST_TIMES * size)
    total = 0
    frame: zstandard.ZstdDecompressionObj | None = None  # Only this class reports a frame that ends too early.
    try:
        with path.open("rb") as file:
            while packed := file.read(_PACKED_BYTES):
                while packed:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    piece = frame.decompress(packed)
                    packed = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
                    total += len(piece)
                    if total > limit:
                        raise ValueError(f"its {size:,} bytes unpack to more than {limit:,}, the limit for this size")
                    yield piece
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if frame is not None:
        raise ValueError("it ends in the middle of a frame")
