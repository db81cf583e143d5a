"""Read and write SAEs: weights, mask and settings in one folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder
from posmask.masks import MASKS, make_mask, mask_settings
from posmask.masks.base import PositionMask
from posmask.sae.autoencoder import SparseAutoencoder, check_sizes, check_table
from posmask.sae.rules import rule_settings
from posmask.storage.manifest import MANIFEST, check_file, read_manifest

__all__ = ["flaw_of", "read_origin", "read_sae", "write_sae"]

WEIGHTS_FILE = "sae.safetensors"
SETTINGS_FILE = "sae.json"
OPENNESS_FILE = "openness.safetensors"


def write_sae(sae: SparseAutoencoder, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write weights, mask tensors and constants as safetensors, and what they mean as JSON beside them.

    Args:
        origin: what the SAE was trained on: name (`model`), `weights`, `layer` and `site` of the model,
            `training_tokens`.

    Raises:
        BadSetting: the folder is a finished one, or holds files of these names that are not an SAE of posmask's.
    """
    if (folder / MANIFEST).exists():
        raise BadSetting(f"{folder} is finished, its {MANIFEST} says what it holds: choose another folder")
    marks = {WEIGHTS_FILE: b'"encoder":', OPENNESS_FILE: b'"openness":', SETTINGS_FILE: b'"d_sae":'}
    for name, mark in marks.items():
        check_file(folder / name, mark)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, folder / WEIGHTS_FILE)
    # What the mask ended as, whatever its kind keeps: for those who only want to look.
    save_file({"openness": sae.mask.openness().detach().contiguous()}, folder / OPENNESS_FILE)
    description = {
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "n_positions": sae.mask.n_positions,
        "rule": sae.rule.settings.model_dump(),
        "mask": sae.mask.settings.model_dump(),
        "origin": dict(origin or {}),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(description, indent=1), encoding="utf8")


def read_sae(folder: Path, *, verify: bool = False) -> SparseAutoencoder:
    """The SAE that `write_sae` wrote, with the same codes to the last bit.

    Args:
        verify: also compare the folder's files with its manifest, if it has one: an SAE that a user brings may not.

    Raises:
        DamagedFolder: a file is missing, or its tensors are not those that its description asks for, are not finite or
            make no sense.
    """
    if verify and (folder / MANIFEST).exists():
        read_manifest(folder, verify=True)
    try:
        description = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        settings = mask_settings(description["mask"])
        _check_sizes(description, tensors, MASKS[settings.kind])
        mask = make_mask(settings, description["n_positions"], description["d_sae"])
        sae = SparseAutoencoder(description["d_model"], rule_settings(description["rule"]), mask)
        sae.load_state_dict(tensors)
        if (flaw := flaw_of(sae)) is not None:
            raise ValueError(flaw)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DamagedFolder(f"{folder} holds no readable SAE ({error}): train it again") from error
    return sae


def _check_sizes(description: Any, tensors: Mapping[str, Tensor], kind: type[PositionMask]) -> None:
    """That a description asks for no larger an SAE than its tensors make, before any is made.

    Raises:
        ValueError: it does.
    """
    said = {name: description[name] for name in ("d_sae", "d_model", "n_positions")}
    check_sizes(**said)
    found: dict[str, int] = dict(zip(("d_sae", "d_model"), tensors["encoder"].shape, strict=True))
    tables = [tensors[name] for name in ("mask.fixed_openness", "mask.theta") if name in tensors]
    found["n_positions"] = len(tables[0])
    if kind.reads_vectors:  # a router, whose table has a row per expert
        found["n_positions"] = said["n_positions"]
    if said != found:
        raise ValueError(f"its description asks for {said}, its tensors are of {found}")
    check_table(said["d_model"], said["d_sae"], said["n_positions"])


def flaw_of(sae: SparseAutoencoder) -> str | None:
    """What makes an SAE's numbers useless; None: nothing does."""
    for name, tensor in sae.state_dict().items():
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinite numbers"
    if not float(sae.scale) > 0:
        return f"scale = {float(sae.scale):g} is not above 0"
    table = sae.mask.table().detach()
    if not bool(((table >= 0) & (table <= 1)).all()):
        return "openness is not within 0 and 1"
    return None


def read_origin(folder: Path) -> dict[str, Any]:
    """What `write_sae` was told of the SAE's training; empty where it was told nothing.

    Raises:
        DamagedFolder: there is no readable description.
    """
    try:
        return dict(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf8"))["origin"])
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFolder(f"{folder / SETTINGS_FILE} cannot be read ({error}): give the folder of an SAE") from error
