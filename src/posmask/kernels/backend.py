"""The choice between compiled CPU loops, Triton kernels and torch operations."""

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from posmask.kernels.devices import LEAST_CAPABILITY
from posmask.progress import announce

__all__ = ["Implementation", "implementation", "loops", "multiplies_integers", "selection_loops", "use"]

Implementation = Literal["numba", "triton", "torch"]

_forced: Implementation | None = None
_integers: bool | None = None


def implementation(tensor: Tensor) -> Implementation:
    """What computes on this tensor: "numba" on the CPU, "triton" on a CUDA device if possible, else "torch"."""
    if _forced is not None:
        return _forced
    if tensor.device.type == "cpu":
        return "numba"
    if tensor.device.type == "cuda" and _triton_runs_on(tensor.get_device()):
        return "triton"
    return "torch"


def multiplies_integers(tensor: Tensor, products_per_entry: float) -> bool:
    """Whether entries are selected by products of 16-bit integers (see `cpu_integers`) with this tensor.

    CPU features decide, not a timing, so that it is the same in every run on a machine.

    Args:
        tensor: the vectors.
        products_per_entry: computed products for each selected entry, whose product is computed twice.
    """
    if implementation(tensor) != "numba" or tensor.dtype != torch.float32:
        return False
    if _integers is not None:
        return _integers
    return products_per_entry >= _LEAST_PRODUCTS and _integers_are_faster()


_LEAST_PRODUCTS = 16


@contextlib.contextmanager
def use(name: Implementation, integers: bool | None = None) -> Iterator[None]:
    """Use one implementation for all tensors, and products of integers or not, for tests.

    Triton kernels run on CPU tensors only if TRITON_INTERPRET=1 was set before they were imported.
    """
    global _forced, _integers
    before = _forced, _integers
    _forced, _integers = name, integers
    try:
        yield
    finally:
        _forced, _integers = before


@cache
def _integers_are_faster() -> bool:
    """Whether this is a processor with AVX2 and without AVX-512, whose float32 products are as fast."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return bool(features.get("avx2")) and not features.get("avx512f")


def loops() -> Any:
    """The module of compiled loops for the CPU. It is imported on first use, because numba takes half a second."""
    from posmask.kernels import cpu

    return cpu


def selection_loops() -> Any:
    """The module of compiled loops that select latents, as `loops`."""
    from posmask.kernels import cpu_selection

    return cpu_selection


@cache
def _triton_runs_on(index: int) -> bool:
    """Whether the Triton kernels run on a CUDA device; the reason if not is printed once."""
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None:
        reason = "the Triton kernels are not tested on AMD GPUs"
    elif capability < LEAST_CAPABILITY:
        reason = (
            f"the Triton kernels need CUDA capability {_text(LEAST_CAPABILITY)}, and cuda:{index} has "
            f"{_text(capability)}"
        )
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed: pip install 'posmask[gpu]'"
    else:
        return True
    announce(f"cuda:{index} uses torch operations, which are slower than Triton kernels: {reason}.")
    return False


def _text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
