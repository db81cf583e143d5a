"""The common form of SAEs of all formats: settings and tensors as SAELens 6 names them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posmask.errors import DamagedFolder, first_line
from posmask.interop.weights import Weights
from posmask.storage import json_file

__all__ = ["Form", "path_words", "read_json"]

_LARGEST_JSON = 2**24  # bytes


@dataclass(frozen=True)
class Form:
    """An SAE of another tool.

    Attributes:
        cfg: what SAELens 6 would write to cfg.json, as far as the format states it; `norm_scaling_factor` is the factor
            of `normalize_activations = "expected_average_only_in"`, if it is known.
        weights: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, threshold, b_gate, b_mag, r_mag.
        needs_site: whether files of this format may be of sites that posmask does not read, so that an unknown site
            is an error.
        centering_unstated: whether the settings are of versions that may have trained on centered vectors without
            saying so (`center_writing_weights`).
    """

    cfg: dict[str, Any]
    weights: Weights
    needs_site: bool = False
    centering_unstated: bool = False

    @property
    def place(self) -> str:
        """Where the SAE is, for messages."""
        return "this SAE" if self.weights.path is None else str(self.weights.path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        DamagedFolder: the file is missing, larger than 16 MiB or not an object in JSON.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are not settings")
        values = json_file.read_json(path)
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}, not settings by name")
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFolder(f"{path} is not readable JSON ({first_line(error)}): fetch the folder again") from None
    return values


def path_words(path: Path) -> list[str]:
    """The names of a path's folders and file, innermost first, as given and then with links resolved.

    They include the folder models--OWNER--NAME of huggingface_hub's cache.
    """
    folder = path if path.is_dir() else path.parent
    return [*reversed(path.absolute().parts), *reversed(folder.resolve().parts)]
