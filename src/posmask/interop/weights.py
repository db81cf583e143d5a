"""Read weights files of other tools. Shapes come from the headers, before any tensor is loaded."""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from posmask.errors import DamagedFolder

__all__ = ["WeightsFile", "npz_file", "safetensors_file"]

Tensors = dict[str, Tensor]
_LARGEST_EXPANSION = 8
"""Weights hardly compress: an npz that unpacks to more than this many times its size does not hold an SAE."""
_ALWAYS_ALLOWED = 2**20  # bytes


@dataclass(frozen=True)
class WeightsFile:
    """A readable weights file and the shapes of its tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    def read(self) -> Tensors:
        """Load all tensors in float64."""
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in self.shapes}
        else:
            tensors = load_file(self.path)
        return {name: tensor.double() for name, tensor in tensors.items()}


def safetensors_file(path: Path) -> WeightsFile:
    """Read the header of a safetensors file.

    Raises:
        DamagedFolder: it is not a complete safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return WeightsFile(path, {name: tuple(file.get_slice(name).get_shape()) for name in names})
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFolder(f"{path} cannot be read ({error}): fetch it again") from None


def npz_file(path: Path) -> WeightsFile:
    """Read the headers of the arrays in an npz file.

    Raises:
        DamagedFolder: it is not an npz file of numbers, or it unpacks to much more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            unpacked, limit = sum(member.file_size for member in members), _LARGEST_EXPANSION * path.stat().st_size
            if unpacked > limit + _ALWAYS_ALLOWED:
                raise ValueError(
                    f"its arrays unpack to {unpacked:,} bytes, more than {_LARGEST_EXPANSION} times its size"
                )
            return WeightsFile(
                path, {member.filename.removesuffix(".npy"): _shape(archive, member) for member in members}
            )
    except Exception as error:  # numpy and zipfile raise errors of many kinds.
        raise DamagedFolder(f"{path} cannot be read ({error}): fetch GemmaScope's own {path.name} again") from None


def _shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[int, ...]:
    """Read the shape of an array from its header.

    Raises:
        ValueError: it does not hold numbers, or fewer than its header states.
    """
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
    if dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {'pickled objects, which are never read' if dtype.hasobject else dtype}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{name} has the shape {list(shape)} in its header, but only {member.file_size:,} bytes")
    return shape
