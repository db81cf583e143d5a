"""Fast operations on the active codes of a batch, and settings of the CPU runtime.

`backend.implementation(tensor)` alone chooses what computes, by the device of the tensor: loops that numba compiles for
tensors on the CPU, Triton kernels for CUDA devices of capability 8.0 or higher, and torch operations for all other
devices and where Triton is not installed. Three modules call it. `operations` computes reconstructions, gradients and
sums; its compiled loops are in `cpu`, its Triton kernels in `triton_rows`. `posmask.sae.selection` selects the active
latents; its compiled loops are in `cpu_selection`, its Triton kernels in `triton_selection`. On processors with AVX2
and without AVX-512 it selects by products of 16-bit integers (`integers`, `cpu_integers`) and computes undecided and
selected ones in float32 again: the result is the same.
`posmask.training.optimizer` updates the parameters. All implementations compute the same results up to rounding, and
the torch operations define what the others compute.

numba compiles a loop at its first call and caches it in `__pycache__` beside the module, or in `NUMBA_CACHE_DIR`; if
neither this folder nor the user's cache can be written to, in a temporary folder that all processes of a run share.
Triton compiles a kernel at its first call and caches it in `~/.triton`, or in `TRITON_CACHE_DIR`. `runtime` sets
threads, precision of products, and the memory allocator; it is independent of this choice.
"""

import os
import tempfile
from pathlib import Path

__all__: list[str] = []


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    return os.access(next(path for path in (folder, *folder.parents) if path.exists()), os.W_OK)


def _users_cache() -> Path | None:
    """The folder of the user's caches; None for a user without a home, as in containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None


_temporary: tempfile.TemporaryDirectory[str] | None = None
"""Removed when this process ends."""
if "NUMBA_CACHE_DIR" not in os.environ:
    _folders = (Path(__file__).parent / "__pycache__", _users_cache())
    if not any(folder is not None and _is_writable(folder) for folder in _folders):
        _temporary = tempfile.TemporaryDirectory(prefix="posmask-numba-")
        os.environ["NUMBA_CACHE_DIR"] = _temporary.name  # Before numba is imported; worker processes inherit it.
