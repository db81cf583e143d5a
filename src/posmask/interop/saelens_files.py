"""Export SAEs as SAELens folders (cfg.json and sae_weights.safetensors), without SAELens; `reading` reads them.

SAELens's tensors are in the model's units and need no centering or scaling: W_enc = encoder,
b_enc = scale * encoder_bias, W_dec = decoder and b_dec = scale * decoder_bias + center. Rows of W_dec keep norm 1,
because tools multiply directions by their norms; codes are `scale` times as large.
Source: sae-lens 6.54.12, saes/*.py.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from posmask.data.embedded_models import MODELS
from posmask.errors import BadSetting
from posmask.interop.fidelity import measured_fidelity
from posmask.interop.positions import check_position, typical_position
from posmask.interop.readme import IMPORT_LINE, folder_readme, positions_text
from posmask.interop.sites import hook_name
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import WEIGHTS_FILE, read_origin, read_sae
from posmask.sae.selection import LargestOfToken
from posmask.storage.atomic import check_new_folder
from posmask.storage.manifest import as_json, file_sha256, write_folder

__all__ = [
    "ARCHITECTURE",
    "export_saelens",
    "lossy_saelens_form",
    "model_name_of",
    "saelens_form",
    "without_constants",
]

ARCHITECTURE = "posmask"
SAELENS_VERSION = "6.54.12"
CFG_FILE = "cfg.json"
SAELENS_WEIGHTS_FILE = "sae_weights.safetensors"
LOSSY_FILE = "LOSSY.md"
README_FILE = "README.md"

Tensors = dict[str, Tensor]
Form = tuple[dict[str, Any], Tensors]
"""Content of cfg.json, and the tensors by their names in the weights file."""
UnknownPosition = int | Literal["typical"]
"""A position for vectors of unknown position; `typical` is `positions.typical_position`."""


def without_constants(sae: SparseAutoencoder) -> Tensors:
    """Return an SAE's tensors for vectors that are neither centered nor scaled, in SAELens's names and shapes.

    Codes are `sae.scale` times as large, so the rule's thresholds are, too. Products are computed in float64 and
    rounded once.

    Raises:
        BadSetting: the SAE has a bias per position.
    """
    if sae.position_bias is not None:
        raise BadSetting(
            f"this SAE has a bias per position (position_bias = {sae.position_bias_kind!r}), which SAELens's files "
            "cannot hold: use the folder as it is, with posmask"
        )
    wide = {name: tensor.detach().double() for name, tensor in sae.state_dict().items() if tensor.is_floating_point()}
    scale, center = wide["scale"], wide["center"]
    rule = copy.deepcopy(sae.rule).double()
    rule.rescale_(scale.expand(sae.d_sae))
    tensors = {
        "W_enc": wide["encoder"].T,
        "b_enc": wide["encoder_bias"] * scale,
        "W_dec": wide["decoder"],
        "b_dec": wide["decoder_bias"] * scale + center,
        **{f"rule.{name}": tensor for name, tensor in rule.state_dict().items()},
    }
    if sae.mask.reads_vectors:
        tensors["mask.router"] = wide["mask.router"] / scale
        tensors["mask.router_bias"] = wide["mask.router_bias"] * scale + center
    mask = {name: tensor for name, tensor in sae.state_dict().items() if name.startswith("mask.")}
    narrow = {
        name: tensor.to(sae.encoder.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    return {name: tensor.detach().contiguous() for name, tensor in (mask | narrow).items()}


def _metadata(sae: SparseAutoencoder, origin: Mapping[str, Any], model_name: str | None) -> dict[str, Any]:
    """Return the metadata of cfg.json: what an imported SAE stated (`origin["metadata"]`), else what posmask does."""
    name = model_name or model_name_of(origin)
    metadata: dict[str, Any] = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "context_size": sae.mask.n_positions,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "seqpos_slice": [None],  # Positions are counted from the first token, so tools must not cut it off.
        "hook_head_index": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},  # Else from_pretrained changes vectors.
        "training_tokens": origin.get("training_tokens"),
    }
    if "layer" in origin:
        metadata["hook_name"] = hook_name(origin["layer"], origin.get("site", "residual_after"))
    metadata |= origin.get("metadata", {})
    metadata["posmask_scale"] = float(sae.scale)  # The factor of codes with respect to this SAE's.
    if name is not None:
        metadata["model_name"] = name
    return metadata


def model_name_of(origin: Mapping[str, Any]) -> str | None:
    """The name of the model that an SAE's origin states; the embedded model has its name on the hub."""
    name = origin.get("model")
    return None if name is None else MODELS[name].on_hub if name in MODELS else name


def _base(sae: SparseAutoencoder, architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": str(sae.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": dict(metadata),
    }


def saelens_form(
    sae: SparseAutoencoder,
    origin: Mapping[str, Any] | None = None,
    model_name: str | None = None,
    unknown_position: UnknownPosition | None = None,
) -> Form:
    """Convert an SAE with its mask to SAELens's architecture `posmask`, registered by `posmask.interop.saelens`.

    Args:
        sae: the SAE.
        origin: facts about its training, see `write_sae`. `metadata` in it is what SAELens's metadata stated.
        model_name: name of the model in TransformerLens; None for the name in `origin`.
        unknown_position: the position of vectors whose position a tool does not give; None: they are an error.

    Raises:
        BadSetting: `unknown_position` is not a position of the mask.
    """
    metadata = _metadata(sae, origin or {}, model_name) | {"posmask_import": IMPORT_LINE}
    cfg = _base(sae, ARCHITECTURE, metadata)
    cfg |= {
        "n_positions": sae.mask.n_positions,
        "rule": sae.rule.settings.model_dump(mode="json"),
        "mask": sae.mask.settings.model_dump(mode="json"),
        "unknown_position": _resolved(sae, unknown_position),
    }
    return cfg, without_constants(sae)


def _resolved(sae: SparseAutoencoder, position: UnknownPosition | None) -> int | None:
    if position == "typical":
        return typical_position(sae.mask)
    check_position(position, sae.mask.n_positions)
    return position


def lossy_saelens_form(
    sae: SparseAutoencoder,
    origin: Mapping[str, Any] | None = None,
    model_name: str | None = None,
    unknown_position: UnknownPosition | Literal["lifted"] = "typical",
) -> Form:
    """Convert an SAE to a built-in architecture of SAELens, which has no positions.

    The openness at one position is folded into the encoder, so codes are those of `encode` at that position and
    latents that are closed there never fire. `metadata.posmask_lossy` describes the loss.

    Args:
        sae: the SAE.
        origin: see `saelens_form`.
        model_name: see `saelens_form`.
        unknown_position: the position; `lifted` opens every latent instead, as `encode(use_mask=False)`.

    Raises:
        BadSetting: the mask is a router, which these architectures cannot represent, or no latent is open at the
            position.
    """
    if sae.mask.reads_vectors:
        raise BadSetting(
            f"a {sae.mask.settings.kind!r} mask chooses latents by a router, which SAELens's own architectures cannot "
            "represent: export it as saelens"
        )
    position = None if unknown_position == "lifted" else _resolved(sae, unknown_position)
    openness = _openness_at(sae, position)
    tensors = without_constants(sae)
    kind, exported = sae.rule.settings.kind, {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    extra: dict[str, Any] = {}
    is_open = openness > 0
    if kind == "gated":  # The openness multiplies the magnitude; the gate of a closed latent, 0 > 0, is off.
        gate, log_ratio = exported.pop("b_enc"), tensors["rule.magnitude"]
        magnitude = (tensors["rule.magnitude_bias"] + log_ratio.exp() * gate) * openness
        exported["W_enc"] = exported["W_enc"] * is_open
        log_ratio = torch.where(is_open, log_ratio + openness.log(), 0.0)
        exported |= {"b_gate": gate * is_open, "r_mag": log_ratio, "b_mag": magnitude}
        architecture = "gated"
    else:  # M relu(pre) = relu(M pre), and a value of 0 is never active.
        exported |= {"W_enc": exported["W_enc"] * openness, "b_enc": exported["b_enc"] * openness}
        if kind == "relu":
            architecture = "standard"
        elif isinstance(choice := sae.rule.choice(), LargestOfToken):
            architecture, extra = "topk", {"k": choice.k, "rescale_acts_by_decoder_norm": True}
        else:  # jumprelu has one threshold per latent, batchtopk one for all
            architecture = "jumprelu"
            exported["threshold"] = tensors["rule.threshold"].expand(sae.d_sae).contiguous()
    metadata = _metadata(sae, origin or {}, model_name)
    metadata |= {"posmask_lossy": _lost(sae, position), "posmask_position": position}
    return _base(sae, architecture, metadata) | extra, exported


def _openness_at(sae: SparseAutoencoder, position: int | None) -> Tensor:
    """Return what multiplies each latent's code at a position, [latent]; 1 if the mask is lifted."""
    table = sae.mask.table().detach()
    if position is None or not sae.mask.gates_code():
        return torch.ones_like(table[0])
    if not bool((table[position] > 0).any()):
        raise BadSetting(f"no latent is open at position {position}, so the SAE would be silent: choose another")
    return table[position].to(sae.encoder.dtype)


def _lost(sae: SparseAutoencoder, position: int | None) -> str:
    kind, table = sae.mask.settings.kind, sae.mask.table()
    if not sae.mask.lifting_matters() or (position is not None and bool((table == table[position]).all())):
        return "nothing: codes do not depend on the position in the SAE that was trained either"
    if position is None:
        return (
            f"the position mask ({kind}) is lifted: every latent is open everywhere, so codes and reconstructions are "
            "not those of the SAE that was trained and measured"
        )
    n_open = int((table[position] > 0).sum())
    return (
        f"the position mask ({kind}) is fixed at position {position}: every token is encoded as if it were there, with "
        f"the {n_open:,} of {sae.d_sae:,} latents that are open there; the others never fire"
    )


def export_saelens(
    cell: Path,
    folder: Path,
    *,
    lossy: bool = False,
    model_name: str | None = None,
    unknown_position: UnknownPosition | Literal["lifted"] | None = None,
) -> dict[str, Any]:
    """Write the SAE of a cell as a SAELens folder, with a README.md that says how to load it.

    If the folder encodes vectors at a fixed position, its explained variance is measured, see `measured_fidelity`.

    Args:
        cell: folder of the cell.
        folder: folder to write.
        lossy: write one of SAELens's own architectures, see `lossy_saelens_form`.
        model_name: name of the model in TransformerLens; None for the name in the SAE's origin.
        unknown_position: see `saelens_form` and, if lossy, `lossy_saelens_form`, where None is `typical`.

    Returns:
        The content of its cfg.json.

    Raises:
        BadSetting: the folder exists and is not empty, or the form cannot represent the mask or the position.
        DamagedFolder: the cell holds no SAE, or its files differ from its manifest.
    """
    sae, origin = read_sae(cell, verify=True), read_origin(cell)
    if lossy:
        position = "typical" if unknown_position is None else unknown_position
        cfg, tensors = lossy_saelens_form(sae, origin, model_name, position)
    elif unknown_position == "lifted":
        raise BadSetting(
            "unknown_position = 'lifted' is only for the lossy export: with the mask, lift it where the SAE is used "
            "(`with sae.without_mask():`)"
        )
    else:
        cfg, tensors = saelens_form(sae, origin, model_name, unknown_position)
    check_new_folder(folder)
    metadata = cfg["metadata"]
    if (lossy or unknown_position is not None) and sae.mask.lifting_matters():
        fixed = metadata["posmask_position"] if lossy else cfg["unknown_position"]
        fidelity = measured_fidelity(cell, sae, typical_position(sae.mask) if fixed is None else fixed)
        metadata["posmask_explained_variance"] = None if fidelity is None else fidelity.as_metadata()
    made_from = {"what": "saelens", "lossy": lossy, "sae": file_sha256(cell / WEIGHTS_FILE), "cfg": cfg}
    with write_folder(folder, made_from) as draft:
        header = {"posmask_lossy": metadata["posmask_lossy"]} if lossy else None
        save_file(tensors, draft / SAELENS_WEIGHTS_FILE, metadata=header)
        (draft / CFG_FILE).write_text(as_json(cfg), encoding="utf8")
        (draft / README_FILE).write_text(folder_readme(cfg), encoding="utf8")
        if lossy:
            text = f"# Lossy export of an SAE of posmask\n\n{positions_text(cfg)}\n"
            (draft / LOSSY_FILE).write_text(text, encoding="utf8")
    return cfg
