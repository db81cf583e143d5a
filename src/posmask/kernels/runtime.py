"""CPU runtime: precision of products, threads, memory allocator."""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from posmask.kernels.devices import multiplies_bfloat16

__all__ = [
    "Precision",
    "bfloat16_slowdown",
    "fast_float32",
    "fast_precision",
    "float32_stays_float32",
    "give_back_freed_memory",
    "keep_freed_memory",
    "loop_threads",
    "product_rate",
    "threads",
]

Precision = Literal["float32", "bfloat16"]
"""Precision of the products in a model or with a dictionary."""


@contextlib.contextmanager
def fast_float32(device: torch.device | str = "cpu") -> Iterator[None]:
    """Use the fastest kernels that keep float32 precision for float32 products on a device.

    On the CPU these are oneDNN's, if they keep it. On other devices they are torch's default kernels: the setting that
    chooses oneDNN's kernels also permits TF32 on CUDA, which rounds to 10 bits.

    torch uses MKL's kernels by default, which run at about half the speed on AMD processors. The setting that changes
    this also permits bfloat16 products on processors with AMX, so the error is checked once per process.
    """
    before = torch.get_float32_matmul_precision()
    on_cpu = torch.device(device).type == "cpu"
    torch.set_float32_matmul_precision("medium" if on_cpu and float32_stays_float32() else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next batch; returns whether the C library supports it (glibc only).

    By default glibc returns buffers of the size of a batch to the system, and every step waits until their pages are
    zeroed again: about half of a masked step's time.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        settings = ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, 2**25), (_M_TOP_PAD, 2**28))
        return all(library.mallopt(*setting) == 1 for setting in settings)
    except (OSError, AttributeError):
        return False


def give_back_freed_memory() -> None:
    """Return freed memory to the system, before a stage that allocates other sizes (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def loop_threads() -> int:
    """The number of threads of the compiled loops."""
    import numba

    return numba.get_num_threads()


@contextlib.contextmanager
def threads(n_threads: int) -> Iterator[None]:
    """Set the number of threads of torch and the compiled loops; numba never gets more threads than it had before."""
    import numba

    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(n_threads)
    numba.set_num_threads(min(n_threads, before[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h; M_MMAP_THRESHOLD is at most 2**25


@cache
def float32_stays_float32() -> bool:
    """Whether torch's "medium" float32 product has an error below 1e-5 of its largest entry on this CPU."""
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(128, 576, generator=random), torch.randn(576, 256, generator=random)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    product = left @ right
    torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    return bool((product - exact).abs().max() < 1e-5 * exact.abs().max())


def fast_precision(device: str = "cpu") -> Precision:
    """bfloat16 if the device multiplies it natively, else float32.

    CPU features decide, not a timing, so that the precision is the same in every run on a machine.
    """
    if device.startswith("cuda"):
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    if device != "cpu":
        return "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def bfloat16_slowdown() -> float:
    """The time of a bfloat16 product relative to a float32 product on this CPU, measured in less than a second."""
    return product_rate("float32", n_rows=256) / product_rate("bfloat16", n_rows=256)


def product_rate(precision: str, n_rows: int = 2048) -> float:
    """Floating-point operations per second: the best of five products [n_rows 576] x [576 2304] after a warm-up."""
    left = torch.ones(n_rows, 576, dtype=getattr(torch, precision))
    right = torch.ones(2304, 576, dtype=left.dtype)
    seconds = []
    with fast_float32():
        for _ in range(6):
            started = time.perf_counter()
            _ = left @ right.T
            seconds.append(time.perf_counter() - started)
    return 2 * n_rows * 576 * 2304 / min(seconds[1:])
