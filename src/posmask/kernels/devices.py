"""Devices: which one torch can use here, what it multiplies natively, and errors when its memory runs out."""

import contextlib
import re
import warnings
from collections.abc import Iterator

import torch

from posmask.errors import BadSetting, OutOfMemory

__all__ = [
    "LEAST_CAPABILITY",
    "check_device",
    "check_own_gpu",
    "memory_for",
    "multiplies_bfloat16",
    "out_of_memory",
]

LEAST_CAPABILITY = (8, 0)
"""The first CUDA capability with bfloat16 products (Ampere), which the Triton kernels need."""


def check_device(name: str) -> None:
    """Raise an error unless torch can compute on this device.

    Args:
        name: `cpu`, `cuda`, `cuda:<number>` or `mps`.

    Raises:
        BadSetting: posmask does not run on such a device, this machine has none, or its driver does not work.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise BadSetting(f"device = {name!r} is not a device that posmask runs on: use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        _check_cuda(name, device)
    elif device.index:
        raise BadSetting(f"device = {name!r} is not on this machine, which has one {device.type}: use {device.type}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise BadSetting("device = 'mps' is not on this machine: it needs a Mac with an Apple GPU; use cpu")


def _check_cuda(name: str, device: torch.device) -> None:
    if not torch.backends.cuda.is_built():
        raise BadSetting(
            f"device = {name!r}, but torch {torch.__version__} is a build without CUDA: use cpu, or install torch's "
            "build for CUDA"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The product below raises an error with the same reason.
        n_devices = torch.cuda.device_count()
    if 0 < n_devices <= (device.index or 0):
        numbers = "cuda:0" if n_devices == 1 else f"cuda:0 to cuda:{n_devices - 1}"
        raise BadSetting(f"device = {name!r} is not on this machine: use {numbers}, or cpu")
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        raise BadSetting(
            f"device = {name!r} does not work with torch {torch.__version__} ({_reason(error)}): compare the driver, "
            "the GPU and its free memory in nvidia-smi with what this build of torch needs, or use cpu"
        ) from error


def check_own_gpu(name: str, number: int) -> torch.device:
    """Return the GPU of one of several processes that train together on a machine.

    Args:
        name: the device of the study.
        number: of the process on its machine, from 0.

    Raises:
        BadSetting: the study names one GPU for all processes, or the machine has fewer GPUs than processes.
    """
    if name != "cuda":
        raise BadSetting(f"device = {name!r}, but processes that train together use a GPU each: use device=cuda")
    n_devices = torch.cuda.device_count()
    if 0 < n_devices <= number:
        raise BadSetting(f"process {number + 1} of this machine has no GPU: start {n_devices} per node, one per GPU")
    check_device(f"cuda:{number}")
    return torch.device("cuda", number)


def multiplies_bfloat16(device: str) -> bool:
    """Whether a CUDA device multiplies bfloat16 natively; older ones emulate it, which torch reports as support."""
    if not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def out_of_memory(error: BaseException, stage: str, remedy: str) -> OutOfMemory | None:
    """The error that names the stage and the remedy if memory of the CPU or a GPU ran out; None for other errors.

    Args:
        error: torch uses several types and texts.
        stage: what needs the memory, such as "training".
        remedy: the settings to lower, as an imperative.
    """
    if not isinstance(error, MemoryError) and not any(text in str(error) for text in _NO_MEMORY):
        return None
    return OutOfMemory(
        f"memory ran out in {stage} ({_reason(error)}): {remedy}, then repeat the command; it resumes from what is "
        "finished"
    )


@contextlib.contextmanager
def memory_for(stage: str, remedy: str) -> Iterator[None]:
    """Raise an `OutOfMemory` if memory runs out in a stage, see `out_of_memory`; also a decorator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        named = out_of_memory(error, stage, remedy)
        if named is None:
            raise
        raise named from error


def _reason(error: BaseException) -> str:
    """The cause in a few words: torch's messages have several sentences and lines of advice."""
    text = str(error).strip()
    if wanted := re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text):
        return f"it tried to allocate {wanted[1]}"
    return re.split(r"\.\s|\n", text)[0].rstrip(".") or "no reason given"
