"""Read weights files of other tools. Shapes come from the headers, before any tensor is loaded."""

import dataclasses
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder, first_line

__all__ = ["PICKLES", "Weights", "check_pickle_allowed", "npz_file", "pickle_file", "safetensors_file"]

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
"""Endings of files that hold pickles."""

Tensors = dict[str, Tensor]
_LARGEST_EXPANSION = 8
"""Weights hardly compress: an npz that unpacks to more than this many times its size does not hold an SAE."""
_ALWAYS_ALLOWED = 2**20  # bytes
_UNPICKLING_SECONDS = 600


@dataclass(frozen=True)
class Weights:
    """Tensors that are not loaded yet, and their shapes.

    Attributes:
        path: their file; None for tensors in memory.
        shapes: by name.
        load: returns the tensors, which the caller may change.
    """

    path: Path | None
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[], Tensors]

    def read(self) -> Tensors:
        """Load all tensors in float64."""
        return {name: tensor.detach().cpu().double() for name, tensor in self.load().items()}

    def renamed(self, names: Mapping[str, str], transposed: Collection[str] = ()) -> "Weights":
        """The same tensors under other names; those without one keep theirs.

        Args:
            names: new name by old name; names that do not occur are ignored.
            transposed: old names of matrices to transpose.
        """
        shapes = {
            names.get(name, name): tuple(reversed(shape)) if name in transposed else shape
            for name, shape in self.shapes.items()
        }

        def load() -> Tensors:
            return {
                names.get(name, name): tensor.T if name in transposed and tensor.dim() == 2 else tensor
                for name, tensor in self.load().items()
            }

        return dataclasses.replace(self, shapes=shapes, load=load)

    def without(self, names: Collection[str]) -> "Weights":
        """The other tensors."""
        shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        return dataclasses.replace(
            self, shapes=shapes, load=lambda: {name: t for name, t in self.load().items() if name in shapes}
        )

    def derived(
        self, name: str, shape: tuple[int, ...], compute: Callable[[Tensors], Tensor], *, replaces: str | None = None
    ) -> "Weights":
        """These tensors and one that is computed from them.

        Args:
            replaces: a tensor that is dropped.
        """
        shapes = {other: of_other for other, of_other in self.shapes.items() if other != replaces} | {name: shape}

        def load() -> Tensors:
            tensors = self.load()
            new = compute(tensors)
            if replaces is not None:
                del tensors[replaces]
            return {**tensors, name: new}

        return dataclasses.replace(self, shapes=shapes, load=load)


def safetensors_file(path: Path) -> Weights:
    """Read the header of a safetensors file.

    Raises:
        DamagedFolder: it is not a complete safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFolder(f"{path} cannot be read ({first_line(error)}): fetch it again") from None
    return Weights(path, shapes, lambda: load_file(path))


def npz_file(path: Path) -> Weights:
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
            shapes = {member.filename.removesuffix(".npy"): _shape(archive, member) for member in members}
    except Exception as error:  # numpy and zipfile raise errors of many kinds.
        raise DamagedFolder(
            f"{path} cannot be read ({first_line(error)}): fetch GemmaScope's own {path.name} again"
        ) from None

    def load() -> Tensors:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in shapes}

    return Weights(path, shapes, load)


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


def check_pickle_allowed(what: object, *, allow_pickle: bool) -> None:
    """
    Args:
        what: the pickle's path.

    Raises:
        BadSetting: the user has not allowed pickles.
    """
    if not allow_pickle:
        raise BadSetting(
            f"{what} is a pickle, which can run code when it is loaded: pass --allow-pickle "
            "(allow_pickle=True in Python) to read its tensors with torch.load(weights_only=True) in a process "
            "with limited memory, or get safetensors"
        )


def pickle_file(path: Path, *, allow_pickle: bool) -> Weights:
    """Read the tensors of a file that `torch.save` wrote, in another process.

    That process uses `torch.load(weights_only=True)`, which creates tensors and containers only, with little more
    memory than the file's size (the limit holds on Linux).

    Args:
        allow_pickle: whether the user allows it.

    Raises:
        BadSetting: it is not allowed.
        DamagedFolder: it holds something other than tensors by name, or needs more memory than its size justifies.
    """
    check_pickle_allowed(path, allow_pickle=allow_pickle)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "tensors.safetensors"
        script = Path(__file__).with_name("unpickle.py")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(script), str(path), str(converted)],
                check=False,
                capture_output=True,
                text=True,
                timeout=_UNPICKLING_SECONDS,
            )
            reason = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"it took more than {_UNPICKLING_SECONDS} seconds"
        if reason or not converted.is_file():
            raise DamagedFolder(
                f"{path} cannot be read ({reason or 'its process ended early'}): fetch it again, or get safetensors"
            )
        tensors = load_file(converted)
    return Weights(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda: dict(tensors))
