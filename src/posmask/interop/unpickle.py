"""Copy the tensors of a file that `torch.save` wrote to safetensors: `python -I unpickle.py FILE OUT`.

Runs in a process of its own, so that neither memory nor a crash can reach the caller. The last line of stderr is the
reason for a failure.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SPARE_BYTES = 2**30


def main(path: Path, out: Path) -> None:
    """Convert a file with limited memory, and exit with the reason for a failure."""
    _limit_memory(3 * path.stat().st_size + _SPARE_BYTES)  # its content, a contiguous copy, and the file to write
    try:
        convert(path, out)
    except Exception as error:  # Damaged and hostile files raise errors of any kind.
        sys.exit(f"\n{_reason(error)}")


def convert(path: Path, out: Path) -> None:
    """
    Raises:
        TypeError, ValueError: the file holds no dense tensors by name, or more than its size.
    """
    tensors = dict(_tensors(torch.load(path, map_location="cpu", weights_only=True)))
    if not tensors:
        raise ValueError("it holds no tensors by name")
    n_bytes, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if n_bytes > size:
        raise ValueError(f"its tensors have {n_bytes:,} bytes, the file {size:,}")
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, out)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return "it needs more memory than its size justifies"
    if "Weights only load failed" in str(error):
        return "it holds more than tensors and containers, which could run code"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name; those of nested dicts have dotted names, other values are left out."""
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise TypeError(f"{prefix}{name} is not a dense tensor")
            yield f"{prefix}{name}", value


def _limit_memory(more: int) -> None:
    """Limit this process to so many bytes of address space more than it has now, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
