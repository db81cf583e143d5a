"""Read arrays and JSON of cells for the page, with their shapes and types checked.

Checksums find accidents; a file that was forged with a matching manifest is found here, or changes nothing but what it
says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from posmask.errors import DamagedFolder, first_line
from posmask.storage.json_file import read_json

__all__ = ["read_arrays", "read_openness_of", "read_words"]


def read_arrays(
    path: Path, shapes: Mapping[str, str], may_be_absent: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Read a safetensors file, and check that its arrays fit together.

    Args:
        path: the file.
        shapes: the dimensions of each array that is needed, such as `{"openness": "position latent"}`. Dimensions of
            one name have one size, and none is 0 but those that end in `?`. Whole numbers and booleans have a colon
            and their kind after the dimensions, as in `"latent:i"`; others are floating-point.
        may_be_absent: the same for arrays that are checked and returned only if they are there.

    Raises:
        DamagedFolder: the file is unreadable, lacks an array, or an array has another shape or kind.
    """
    try:
        arrays = load_file(path)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DamagedFolder(f"{path.name} cannot be read ({first_line(error)}): `posmask run` recomputes it") from None
    sizes: dict[str, int] = {}
    further = {name: described for name, described in (may_be_absent or {}).items() if name in arrays}
    for name, described in (dict(shapes) | further).items():
        dimensions, _, kinds = described.partition(":")
        array = arrays.get(name)
        names = dimensions.split()
        fits = array is not None and array.ndim == len(names) and array.dtype.kind in (kinds or "f")
        if array is not None and fits:
            for dimension, size in zip(names, array.shape, strict=True):
                fits = fits and sizes.setdefault(dimension, size) == size and (size > 0 or dimension.endswith("?"))
        if array is None or not fits:
            what = "no such array" if array is None else f"{array.dtype} {list(array.shape)}"
            raise DamagedFolder(
                f"{path.name} holds {what} for {name} [{dimensions}]: `posmask run` recomputes the cell if removed"
            )
    return {name: arrays[name] for name in (*shapes, *further)}


def read_openness_of(path: Path) -> np.ndarray:
    """Read a mask's openness [position latent].

    Raises:
        DamagedFolder: it is unreadable, or not within 0 and 1.
    """
    openness = read_arrays(path, {"openness": "position latent"})["openness"]
    if not bool(((openness >= 0) & (openness <= 1)).all()):
        raise DamagedFolder(f"{path.name} holds openness outside 0 to 1: `posmask run` recomputes the cell if removed")
    return openness


def read_words(path: Path) -> dict[str, Any]:
    """Read `latents.json`: names of probes, numbers of tokens, and the text of each token id.

    Raises:
        DamagedFolder: it is unreadable, or has values of other types.
    """
    kinds = {"probes": list, "position_origin": str, "n_tokens": int, "n_tokens_searched_for_texts": int, "words": dict}
    try:
        about = read_json(path)
        for name, kind in kinds.items():
            if not isinstance(about[name], kind):
                raise TypeError(f"{name} is a {type(about[name]).__name__}")
        if not all(isinstance(text, str) for text in (*about["probes"], *about["words"].values())):
            raise TypeError("probes and words must be text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFolder(f"{path.name} cannot be read ({first_line(error)}): `posmask run` recomputes it") from None
    return about
