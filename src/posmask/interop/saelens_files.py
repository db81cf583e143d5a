"""Export SAEs as SAELens folders (cfg.json and sae_weights.safetensors), without SAELens; `reading` reads them.

SAELens's tensors are in the model's units: W_dec = scale * decoder,
b_dec = scale * decoder_bias + center and W_enc = encoder / scale keep the codes and need no centering or scaling.
Source: sae-lens 6.54.12, saes/*.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from posmask.errors import BadSetting
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
    "saelens_form",
    "without_constants",
]

ARCHITECTURE = "posmask"
SAELENS_VERSION = "6.54.12"
CFG_FILE = "cfg.json"
SAELENS_WEIGHTS_FILE = "sae_weights.safetensors"
LOSSY_FILE = "LOSSY.md"
_EMBEDDED_ON_THE_HUB = {"embedded:SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}

Tensors = dict[str, Tensor]
Form = tuple[dict[str, Any], Tensors]
"""Content of cfg.json, and the tensors by their names in the weights file."""


def without_constants(sae: SparseAutoencoder) -> Tensors:
    """Return an SAE's tensors for vectors that are neither centered nor scaled, in SAELens's names and shapes.

    Products are computed in float64 and rounded once.
    """
    wide = {name: tensor.detach().double() for name, tensor in sae.state_dict().items() if tensor.is_floating_point()}
    scale, center = wide["scale"], wide["center"]
    tensors = {
        "W_enc": wide["encoder"].T / scale,
        "b_enc": wide["encoder_bias"],
        "W_dec": wide["decoder"] * scale,
        "b_dec": wide["decoder_bias"] * scale + center,
    }
    if sae.mask.reads_vectors:
        tensors["mask.router"] = wide["mask.router"] / scale
        tensors["mask.router_bias"] = wide["mask.router_bias"] * scale + center
    kept = {name: tensor for name, tensor in sae.state_dict().items() if name.startswith(("rule.", "mask."))}
    narrow = {name: tensor.to(sae.encoder.dtype) for name, tensor in tensors.items()}
    return {name: tensor.detach().contiguous() for name, tensor in (kept | narrow).items()}


def _metadata(sae: SparseAutoencoder, origin: Mapping[str, Any], model_name: str | None) -> dict[str, Any]:
    name = model_name or origin.get("model")
    metadata: dict[str, Any] = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "context_size": sae.mask.n_positions,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "training_tokens": origin.get("training_tokens"),
    }
    if name is not None:
        metadata["model_name"] = _EMBEDDED_ON_THE_HUB.get(name, name)
    if "layer" in origin:
        metadata["hook_name"] = hook_name(origin["layer"], origin.get("site", "residual_after"))
    return metadata


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
    sae: SparseAutoencoder, origin: Mapping[str, Any] | None = None, model_name: str | None = None
) -> Form:
    """Convert an SAE with its mask to SAELens's architecture `posmask`, registered by `posmask.interop.saelens`.

    Args:
        sae: the SAE.
        origin: facts about its training, see `write_sae`.
        model_name: name of the model in TransformerLens; None for the name in `origin`.
    """
    cfg = _base(sae, ARCHITECTURE, _metadata(sae, origin or {}, model_name))
    cfg |= {
        "n_positions": sae.mask.n_positions,
        "rule": sae.rule.settings.model_dump(mode="json"),
        "mask": sae.mask.settings.model_dump(mode="json"),
    }
    return cfg, without_constants(sae)


def lossy_saelens_form(
    sae: SparseAutoencoder, origin: Mapping[str, Any] | None = None, model_name: str | None = None
) -> Form:
    """Convert an SAE to a built-in architecture of SAELens with its mask lifted, as `encode(use_mask=False)`.

    `metadata.posmask_lossy` describes the loss. For the arguments see `saelens_form`.

    Raises:
        BadSetting: the mask is a router, which these architectures cannot represent.
    """
    mask = sae.mask
    if mask.reads_vectors:
        raise BadSetting(
            f"a {mask.settings.kind!r} mask chooses latents by a router, which SAELens's own architectures cannot "
            "represent: export it as saelens"
        )
    tensors = without_constants(sae)
    kind, exported = sae.rule.settings.kind, {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    extra: dict[str, Any] = {}
    if kind == "gated":
        gate, log_ratio = exported.pop("b_enc"), tensors["rule.magnitude"]
        magnitude = tensors["rule.magnitude_bias"] + log_ratio.exp() * gate
        exported |= {"b_gate": gate, "r_mag": log_ratio, "b_mag": magnitude}
        architecture = "gated"
    elif kind == "relu":
        architecture = "standard"
    elif isinstance(choice := sae.rule.choice(), LargestOfToken):
        architecture, extra = "topk", {"k": choice.k, "rescale_acts_by_decoder_norm": False}
    else:  # jumprelu has one threshold per latent, batchtopk one for all
        architecture = "jumprelu"
        exported["threshold"] = tensors["rule.threshold"].expand(sae.d_sae).contiguous()
    lost = (
        f"the position mask ({mask.settings.kind}) is lifted: every latent is open everywhere, so codes and "
        "reconstructions are not those of the SAE that was trained and measured"
        if mask.lifting_matters()
        else "nothing: every latent's code is open everywhere in the SAE that was trained, too"
    )
    metadata = _metadata(sae, origin or {}, model_name) | {"posmask_lossy": lost}
    return _base(sae, architecture, metadata) | extra, exported


def export_saelens(cell: Path, folder: Path, *, lossy: bool = False, model_name: str | None = None) -> dict[str, Any]:
    """Write the SAE of a cell as a SAELens folder.

    Args:
        cell: folder of the cell.
        folder: folder to write.
        lossy: lift the mask, see `lossy_saelens_form`.
        model_name: name of the model in TransformerLens; None for the name in the SAE's origin.

    Returns:
        The content of its cfg.json.

    Raises:
        BadSetting: the folder exists and is not empty, or the mask cannot be lifted.
        DamagedFolder: the cell holds no SAE, or its files differ from its manifest.
    """
    sae, origin = read_sae(cell, verify=True), read_origin(cell)
    cfg, tensors = (lossy_saelens_form if lossy else saelens_form)(sae, origin, model_name)
    check_new_folder(folder)
    made_from = {"what": "saelens", "lossy": lossy, "sae": file_sha256(cell / WEIGHTS_FILE), "cfg": cfg}
    with write_folder(folder, made_from) as draft:
        header = {"posmask_lossy": cfg["metadata"]["posmask_lossy"]} if lossy else None
        save_file(tensors, draft / SAELENS_WEIGHTS_FILE, metadata=header)
        (draft / CFG_FILE).write_text(as_json(cfg), encoding="utf8")
        if lossy:
            lost = cfg["metadata"]["posmask_lossy"]
            (draft / LOSSY_FILE).write_text(f"# Lossy export of an SAE of posmask\n\nLost: {lost}.\n", encoding="utf8")
    return cfg
