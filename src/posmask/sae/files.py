"""Read and write SAEs: weights, mask and settings in one folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder, first_line
from posmask.masks import MASKS, make_mask, mask_settings
from posmask.masks.base import PositionMask
from posmask.sae.autoencoder import PositionBias, SparseAutoencoder, check_sizes, check_table
from posmask.sae.rules import rule_settings
from posmask.storage.atomic import check_file
from posmask.storage.json_file import read_json
from posmask.storage.layout import OPENNESS_FILE, ROWS_FILE, SAE_FILE, SETTINGS_FILE, WEIGHTS_FILE
from posmask.storage.manifest import MANIFEST, read_manifest

__all__ = ["flaw_of", "read_origin", "read_sae", "read_width", "write_sae"]


def write_sae(sae: SparseAutoencoder, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write weights, mask tensors and constants as safetensors, and their description as JSON.

    Args:
        sae: the SAE to write.
        folder: is created if it does not exist.
        origin: what the SAE was trained on: `model` (name), `weights`, `layer`, `site`, `training_tokens`; of an
            imported SAE also `metadata`, by SAELens's names.

    Raises:
        BadSetting: the folder has a manifest, or files of these names that posmask did not write.
    """
    if (folder / MANIFEST).exists():
        raise BadSetting(f"{folder} is finished, because it has a {MANIFEST}: choose another folder")
    marks = {WEIGHTS_FILE: b'"encoder":', OPENNESS_FILE: b'"openness":', SAE_FILE: b'"d_sae":'}
    for name, mark in marks.items():
        check_file(folder / name, mark)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, folder / WEIGHTS_FILE)
    # The final openness, whatever buffers the kind has, for readers without posmask.
    save_file({"openness": sae.mask.openness().detach().contiguous()}, folder / OPENNESS_FILE)
    description = {
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "n_positions": sae.mask.n_positions,
        "rule": sae.rule.settings.model_dump(),
        "mask": sae.mask.settings.model_dump(),
        "origin": dict(origin or {}),
    }
    if sae.position_bias_kind is not None:
        description["position_bias"] = sae.position_bias_kind
    (folder / SAE_FILE).write_text(json.dumps(description, indent=1), encoding="utf8")


def read_sae(folder: Path, *, verify: bool = False) -> SparseAutoencoder:
    """Read an SAE that `write_sae` wrote; its codes are equal bit for bit.

    Args:
        folder: the folder of the SAE.
        verify: also compare the folder's files with its manifest. Only a folder that holds nothing but an SAE, as
            `write_sae` leaves it, needs none.

    Raises:
        BadSetting: the kind of its mask or rule is unknown.
        DamagedFolder: a file is missing, or its tensors do not match the description, are not finite or are out of
            range.
    """
    if verify and any((folder / name).exists() for name in (MANIFEST, SETTINGS_FILE, ROWS_FILE)):
        read_manifest(folder, verify=True)
    try:
        description = read_json(folder / SAE_FILE)
        tensors = load_file(folder / WEIGHTS_FILE)
        settings = mask_settings(description["mask"])
        _check_sizes(description, tensors, MASKS[settings.kind])
        mask = make_mask(settings, description["n_positions"], description["d_sae"])
        position_bias = _checked_position_bias(description, tensors)
        rule = rule_settings(description["rule"])
        sae = SparseAutoencoder(description["d_model"], rule, mask, position_bias=position_bias)
        _check_kinds(sae, tensors)
        sae.load_state_dict(tensors)
        if (flaw := flaw_of(sae)) is not None:
            raise ValueError(flaw)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DamagedFolder(
            f"{folder} holds no readable SAE ({first_line(error)}): give the folder of an SAE, or train it again"
        ) from error
    return sae


def _check_sizes(description: Any, tensors: Mapping[str, Tensor], kind: type[PositionMask]) -> None:
    """Check, before anything is allocated, that the sizes in a description are those of its tensors.

    Raises:
        ValueError: they differ, or the mask's table would be too large.
    """
    described = {name: description[name] for name in ("d_sae", "d_model", "n_positions")}
    check_sizes(**described)
    actual: dict[str, int] = dict(zip(("d_sae", "d_model"), tensors["encoder"].shape, strict=True))
    table = next((tensors[name] for name in ("mask.fixed_openness", "mask.theta") if name in tensors), None)
    if table is None:
        raise ValueError("its tensors lack the openness of the mask")
    # The table of a router has a row per expert.
    actual["n_positions"] = described["n_positions"] if kind.reads_vectors else len(table)
    if described != actual:
        raise ValueError(f"its description has the sizes {described}, its tensors {actual}")
    check_table(described["d_model"], described["d_sae"], described["n_positions"])


def _checked_position_bias(description: Any, tensors: Mapping[str, Tensor]) -> PositionBias | None:
    """The kind of the bias per position, with the tensor that a description names; checked before it is allocated.

    Raises:
        ValueError: the kind is unknown, or the tensor is missing or has other sizes.
    """
    kind = description.get("position_bias")
    if kind is not None and kind not in get_args(PositionBias):
        raise ValueError(f"position_bias = {kind!r} is unknown: {' or '.join(get_args(PositionBias))}")
    shape = [description["n_positions"], description["d_model"]]
    if kind is not None and list(tensors["position_bias"].shape) != shape:
        raise ValueError(f"position_bias has the sizes {list(tensors['position_bias'].shape)}, not {shape}")
    return kind


def _check_kinds(sae: SparseAutoencoder, tensors: Mapping[str, Tensor]) -> None:
    """Check that numbers are stored as the kind that they are, which `load_state_dict` would convert.

    Raises:
        ValueError: whole numbers or booleans in place of weights, or the reverse.
    """
    for name, ours in sae.state_dict().items():
        theirs = tensors.get(name)
        if theirs is not None and theirs.is_floating_point() != ours.is_floating_point():
            raise ValueError(f"{name} holds {str(theirs.dtype).removeprefix('torch.')} numbers")


def flaw_of(sae: SparseAutoencoder) -> str | None:
    """Why an SAE is unusable (NaN or infinite numbers, scale or openness out of range); None if it is usable."""
    for name, tensor in sae.state_dict().items():
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinite numbers"
    if not float(sae.scale) > 0:
        return f"scale = {float(sae.scale):g} is not above 0"
    table = sae.mask.table().detach()
    if not bool(((table >= 0) & (table <= 1)).all()):
        return "openness is not within 0 and 1"
    level, n_parts = sae.rule.level, len(getattr(sae.rule.settings, "parts", ()))
    if level is not None and not bool(((level >= 0) & (level < n_parts)).all()):
        return "level names nested parts that do not exist"
    return None


def read_origin(folder: Path) -> dict[str, Any]:
    """The `origin` that was passed to `write_sae`; may be empty.

    Raises:
        DamagedFolder: the description is missing or unreadable.
    """
    return _described(folder, "origin", dict)


def read_width(folder: Path) -> int:
    """The size of the vectors that an SAE codes, without reading its weights.

    Raises:
        DamagedFolder: the description is missing or unreadable.
    """
    return _described(folder, "d_model", int)


def _described(folder: Path, key: str, kind: type) -> Any:
    try:
        return kind(read_json(folder / SAE_FILE)[key])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DamagedFolder(
            f"{folder / SAE_FILE} cannot be read ({first_line(error)}): give the folder of an SAE"
        ) from error
