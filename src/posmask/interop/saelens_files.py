"""SAELens's folders: our SAE -> cfg.json and sae_weights.safetensors, and such a folder -> an open SAE of ours.

Neither needs SAELens. Its tensors are in the model's own units: with W_dec = scale * decoder and
b_dec = scale * decoder_bias + center, and W_enc = encoder / scale, codes stay what they were, so no constants remain.
Source: sae-lens 6.54.12, saes/*.py and loading/pretrained_sae_loaders.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.choosing import LargestOfToken
from posmask.errors import BadSetting, DamagedFolder
from posmask.folders import as_json, file_sha256, write_folder
from posmask.interop.sites import gemma_scope_hook, hook_name, layer_and_site
from posmask.mask_kinds import make_mask, mask_settings
from posmask.masks import PositionMask
from posmask.rules import RULES, RuleSettings, rule_settings
from posmask.sae import WEIGHTS_FILE, SparseAutoencoder, read_origin, read_sae, write_sae

__all__ = [
    "ARCHITECTURE",
    "export_saelens",
    "import_saelens",
    "lossy_saelens_form",
    "read_saelens",
    "saelens_form",
    "without_constants",
]

ARCHITECTURE = "posmask"
SAELENS_VERSION = "6.54.12"
CFG_FILE = "cfg.json"
SAELENS_WEIGHTS_FILE = "sae_weights.safetensors"
GEMMA_SCOPE_FILE = "params.npz"
LOSSY_FILE = "LOSSY.md"
_EMBEDDED_ON_THE_HUB = {"embedded:SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}

Tensors = dict[str, Tensor]
Form = tuple[dict[str, Any], Tensors]
"""What stands in cfg.json, and the tensors by their names in the weights file."""


def without_constants(sae: SparseAutoencoder) -> Tensors:
    """The tensors of an SAE whose vectors are neither centred nor scaled, in SAELens's names and shapes.

    The products are taken in float64 and rounded once.
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
    own = {name: tensor for name, tensor in sae.state_dict().items() if name.startswith(("rule.", "mask."))}
    narrow = {name: tensor.to(sae.encoder.dtype) for name, tensor in tensors.items()}
    return {name: tensor.detach().contiguous() for name, tensor in (own | narrow).items()}


def _with_constants(tensors: Tensors, scale: float, rule: RuleSettings, mask: PositionMask) -> SparseAutoencoder:
    """The inverse of `without_constants`, with decoder rows of norm 1 and the center in the decoder's bias."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    norms = wide["W_dec"].norm(dim=1).clamp(min=1e-8)
    factor = norms / scale
    state = {
        "encoder": wide["W_enc"].T * norms[:, None],
        "encoder_bias": wide["b_enc"] * factor,
        "decoder": wide["W_dec"] / norms[:, None],
        "decoder_bias": wide["b_dec"] / scale,
        "center": torch.zeros(len(wide["b_dec"])),
        "scale": torch.tensor(scale),
    } | {name: tensor for name, tensor in tensors.items() if name.startswith(("rule.", "mask."))}
    if mask.reads_vectors:
        state["mask.router"] = wide["mask.router"] * scale
        state["mask.router_bias"] = wide["mask.router_bias"] / scale
    sae = SparseAutoencoder(len(wide["b_dec"]), rule, mask)
    sae.load_state_dict(sae.state_dict() | state)
    sae.rule.rescale_(factor.to(sae.encoder.dtype))
    return sae


def _metadata(sae: SparseAutoencoder, origin: Mapping[str, Any], model_name: str | None) -> dict[str, Any]:
    name = model_name or origin.get("model")
    found: dict[str, Any] = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "context_size": sae.mask.n_positions,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "training_tokens": origin.get("training_tokens"),
    }
    if name is not None:
        found["model_name"] = _EMBEDDED_ON_THE_HUB.get(name, name)
    if "layer" in origin:
        found["hook_name"] = hook_name(origin["layer"], origin.get("site", "residual_after"))
    return found


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
    """An SAE with its mask as SAELens's architecture `posmask`, which `posmask.interop.saelens` registers.

    Args:
        origin: as `write_sae` takes it.
        model_name: of the model as SAELens calls it; None: what the origin says.
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
    """An SAE as one of SAELens's own architectures, its mask lifted: codes are those of `encode(lift=True)`.

    What is lost stands in `metadata.posmask_lossy`.

    Raises:
        BadSetting: a switch, whose router has no place there.
    """
    mask = sae.mask
    if mask.reads_vectors:
        raise BadSetting(
            f"a {mask.settings.kind!r} chooses latents by a router, for which SAELens's own architectures have no "
            "place: export it as saelens"
        )
    tensors = without_constants(sae)
    kind, own = sae.rule.settings.kind, {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    extra: dict[str, Any] = {}
    if kind == "gated":
        gate, loudness = own.pop("b_enc"), tensors["rule.magnitude"]
        magnitude = tensors["rule.magnitude_bias"] + loudness.exp() * gate
        own |= {"b_gate": gate, "r_mag": loudness, "b_mag": magnitude}
        architecture = "gated"
    elif kind == "relu":
        architecture = "standard"
    elif isinstance(choice := sae.rule.choice(), LargestOfToken):
        architecture, extra = "topk", {"k": choice.k, "rescale_acts_by_decoder_norm": False}
    else:  # jumprelu's threshold of each latent, or batchtopk's of all
        architecture = "jumprelu"
        own["threshold"] = tensors["rule.threshold"].expand(sae.d_sae).contiguous()
    gates = mask.gates_code() and not bool((mask.table() == 1).all())
    lost = (
        f"the position mask ({mask.settings.kind}) is lifted: every latent is open everywhere, so codes and "
        "reconstructions are not those of the SAE that was trained and measured"
        if gates
        else "nothing: every latent's code is open everywhere in the SAE that was trained, too"
    )
    metadata = _metadata(sae, origin or {}, model_name) | {"posmask_lossy": lost}
    return _base(sae, architecture, metadata) | extra, own


def export_saelens(cell: Path, folder: Path, *, lossy: bool = False, model_name: str | None = None) -> dict[str, Any]:
    """Write the SAE in a cell's folder as a SAELens folder; returns what stands in its cfg.json.

    Raises:
        BadSetting: the folder exists and is not empty, or as `lossy_saelens_form`.
        DamagedFolder: the cell holds no SAE.
    """
    sae, origin = read_sae(cell), read_origin(cell)
    cfg, tensors = (lossy_saelens_form if lossy else saelens_form)(sae, origin, model_name)
    _must_be_new(folder)
    made_from = {"what": "saelens", "lossy": lossy, "sae": file_sha256(cell / WEIGHTS_FILE), "cfg": cfg}
    with write_folder(folder, made_from) as draft:
        header = {"posmask_lossy": cfg["metadata"]["posmask_lossy"]} if lossy else None
        save_file(tensors, draft / SAELENS_WEIGHTS_FILE, metadata=header)
        (draft / CFG_FILE).write_text(as_json(cfg), encoding="utf8")
        if lossy:
            lost = cfg["metadata"]["posmask_lossy"]
            (draft / LOSSY_FILE).write_text(f"# A lossy export of posmask\n\nLost is {lost}.\n", encoding="utf8")
    return cfg


def _must_be_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadSetting(f"{folder} exists and is not empty: name a new folder, or remove that one")


_RULES = {
    "standard": lambda cfg: {"kind": "relu", "l1_coefficient": 0.0},
    "topk": lambda cfg: {"kind": "topk", "k": cfg["k"]},
    "jumprelu": lambda cfg: {"kind": "jumprelu", "l0_coefficient": 0.0},
    "gated": lambda cfg: {"kind": "gated", "l1_coefficient": 0.0},
}
_OUR_NAMES = {
    "b_gate": "b_enc",
    "threshold": "rule.threshold",
    "r_mag": "rule.magnitude",
    "b_mag": "rule.magnitude_bias",
}


def import_saelens(source: Path, folder: Path, *, n_positions: int | None = None) -> SparseAutoencoder:
    """Write what `read_saelens` returns as a folder of ours, and return it.

    Raises:
        BadSetting: the folder exists and is not empty; or as `read_saelens`, as DamagedFolder.
    """
    _must_be_new(folder)
    sae, origin = read_saelens(source, n_positions=n_positions)
    with write_folder(folder, {"what": "import", "n_positions": sae.mask.n_positions, **origin["imported"]}) as draft:
        write_sae(sae, draft, origin)
    return sae


def read_saelens(source: Path, *, n_positions: int | None = None) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE in a SAELens folder, or in GemmaScope's params.npz, as one of ours, and its origin.

    One of ours comes back with its mask. Others are open everywhere. Reconstructions stay what they were; codes too
    where all decoder rows have one norm, else they take it on, as by SAELens's `fold_W_dec_norm`. Coefficients that
    only training knows are 0.

    Args:
        n_positions: of the contexts it will see; None: `metadata.context_size` of the folder.

    Raises:
        BadSetting: an architecture, a version, a site or a normalisation that cannot be taken over; no context length.
        DamagedFolder: files are missing, or tensors are missing, misshapen, not finite, or pickled.
    """
    gemma_scope = source if source.name == GEMMA_SCOPE_FILE else source / GEMMA_SCOPE_FILE
    if gemma_scope.is_file():
        weights_file, (cfg, tensors) = gemma_scope, _read_gemma_scope(gemma_scope)
    else:
        weights_file, (cfg, tensors) = source / SAELENS_WEIGHTS_FILE, _read_folder(source)
    metadata = cfg.get("metadata") or {}
    try:
        rule = _rule_of(cfg)
        mask = _mask_of(cfg, n_positions or metadata.get("context_size"))
        _check(cfg, tensors, rule, mask)
        origin = _origin(cfg, metadata)
        if "b_mag" in tensors:  # SAELens adds it to e^r (x W), we add ours to e^r (x W + b_gate).
            tensors["b_mag"] -= tensors["r_mag"].exp() * tensors["b_gate"]
        tensors = {_OUR_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        if not cfg.get("apply_b_dec_to_input", True):
            tensors["b_enc"] += tensors["b_dec"] @ tensors["W_enc"]
        sae = _with_constants(tensors, _scale(cfg, tensors["W_dec"], rule), rule, mask)
    except (BadSetting, DamagedFolder) as error:
        raise type(error)(f"{weights_file.parent}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{CFG_FILE} lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise BadSetting(f"{weights_file.parent}: {reason}: fetch an SAE whose settings are whole") from None
    origin["imported"] = {"architecture": cfg["architecture"], "sha256": file_sha256(weights_file)}
    return sae, origin


def _read_folder(source: Path) -> Form:
    if not (source / CFG_FILE).is_file():
        raise DamagedFolder(f"{source} holds no {CFG_FILE}: give a folder that SAELens's save_model wrote")
    try:
        cfg = json.loads((source / CFG_FILE).read_text(encoding="utf8"))
        metadata = cfg.get("metadata") or {}
        version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    except (ValueError, AttributeError) as error:
        raise DamagedFolder(f"{source / CFG_FILE} is not readable JSON ({error}): fetch the folder again") from None
    if not re.match(r"([6-9]|\d\d)\.", version):
        raise BadSetting(
            f"{source} was written by SAELens {version or 'before 6.0'}, whose settings meant other things: load it "
            "with SAELens 6 and save it again (SAE.load_from_disk, save_model)"
        )
    if not (source / SAELENS_WEIGHTS_FILE).is_file():
        pickled = [path.name for path in source.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
        if pickled:
            raise DamagedFolder(
                f"{source} holds its weights pickled ({pickled[0]}), which could run any code and is never read: ask "
                f"for {SAELENS_WEIGHTS_FILE}, or load it where you trust it and save_model it"
            )
        raise DamagedFolder(f"{source} holds no {SAELENS_WEIGHTS_FILE}: fetch the folder again")
    try:
        return cfg, _wide(load_file(source / SAELENS_WEIGHTS_FILE))
    except (SafetensorError, ValueError) as error:
        raise DamagedFolder(f"{source / SAELENS_WEIGHTS_FILE} cannot be read ({error}): fetch it again") from None


def _wide(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _read_gemma_scope(path: Path) -> Form:
    """GemmaScope keeps five arrays and no settings: JumpReLU on vectors as they come; its folders say the site."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = _wide({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    except Exception as error:  # numpy and zipfile raise what they will
        raise DamagedFolder(
            f"{path} cannot be read without unpickling ({error}): fetch GemmaScope's own {GEMMA_SCOPE_FILE} again"
        ) from None
    cfg: dict[str, Any] = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "metadata": {}}
    if (hook := gemma_scope_hook(path)) is not None:
        cfg["metadata"]["hook_name"] = hook
    if "W_dec" not in tensors or tensors["W_dec"].dim() != 2:
        raise DamagedFolder(f"{path} holds no matrix W_dec: fetch GemmaScope's own {GEMMA_SCOPE_FILE} again")
    cfg["d_sae"], cfg["d_in"] = tensors["W_dec"].shape
    return cfg, tensors


def _mask_of(cfg: Mapping[str, Any], n_positions: int | None) -> PositionMask:
    if cfg.get("architecture") == ARCHITECTURE:
        return make_mask(mask_settings(cfg["mask"]), cfg["n_positions"], cfg["d_sae"])
    if not n_positions:
        raise BadSetting("no context_size is named: give the contexts' length with --n-positions")
    return make_mask(mask_settings({"kind": "open"}), int(n_positions), cfg["d_sae"])


def _rule_of(cfg: Mapping[str, Any]) -> RuleSettings:
    architecture = cfg.get("architecture")
    if architecture == ARCHITECTURE:
        return rule_settings(cfg["rule"])
    if architecture not in _RULES:
        raise BadSetting(
            f"architecture {architecture!r} has no rule here: choose an SAE that is one of {', '.join(_RULES)}"
        )
    if (normalise := cfg.get("normalize_activations", "none")) != "none":
        raise BadSetting(
            f"normalize_activations = {normalise!r} is not in the weights: fold it into them with SAELens first"
        )
    if (reshape := cfg.get("reshape_activations", "none")) != "none":
        raise BadSetting(
            f"reshape_activations = {reshape!r} reads attention heads, not a residual stream: choose another"
        )
    return rule_settings(_RULES[architecture](cfg))


def _origin(cfg: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the SAE was trained on, as far as it says.

    Raises:
        BadSetting: vectors that posmask does not read, or a transcoder.
    """
    origin: dict[str, Any] = {}
    if metadata.get("training_tokens"):
        origin["training_tokens"] = int(metadata["training_tokens"])
    if metadata.get("model_name"):
        origin["model"] = metadata["model_name"]
    said = {**cfg, **metadata}
    for name, reason in _NOT_AN_SAE_OF_A_SITE.items():
        if said.get(name) is not None and said[name] != said.get("hook_name"):
            raise BadSetting(f"{name} = {said[name]!r}: {reason}, which posmask does not read: choose another SAE")
    if said.get("hook_name") is not None:
        origin["layer"], origin["site"] = layer_and_site(said["hook_name"])
    return origin


_NOT_AN_SAE_OF_A_SITE = {
    "hook_head_index": "an SAE of one attention head",
    "hook_name_out": "a transcoder",
    "hook_head_index_out": "a transcoder",
}


def _check(cfg: Mapping[str, Any], tensors: Tensors, rule: RuleSettings, mask: PositionMask) -> None:
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    wanted = without_constants(SparseAutoencoder(d_in, rule, mask))
    if cfg["architecture"] == ARCHITECTURE:
        names = {name: name for name in wanted}
    else:
        theirs = {
            ours: name
            for name, ours in _OUR_NAMES.items()
            if ours in wanted and (name != "b_gate" or rule.kind == "gated")
        }
        names = {name: theirs.get(name, name) for name in wanted if not name.startswith("mask.")}
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]  # SAELens wrote it for a while, and drops it where it is 1.
    if unknown := sorted(tensors.keys() - set(names.values())):
        raise BadSetting(
            f"an SAE of architecture {cfg['architecture']!r} has no tensor {', '.join(unknown[:3])}, so this one "
            "computes something else: choose another SAE"
        )
    for ours, name in names.items():
        if name not in tensors:
            raise DamagedFolder(f"the weights lack {name}, which {cfg['architecture']!r} has: fetch them again")
        if tensors[name].shape != wanted[ours].shape:
            raise DamagedFolder(
                f"{name} has the shape {list(tensors[name].shape)}, not {list(wanted[ours].shape)} as d_in = {d_in} "
                f"and d_sae = {d_sae} ask: fetch cfg and weights of one SAE"
            )
        if not bool(tensors[name].isfinite().all()):
            raise DamagedFolder(f"{name} holds NaN or infinite numbers: choose another SAE")


def _scale(cfg: Mapping[str, Any], decoder: Tensor, rule: RuleSettings) -> float:
    """What the vectors are divided by: the norm of the decoder rows where they share one, so that codes stay."""
    norms = decoder.norm(dim=1)
    if cfg.get("rescale_acts_by_decoder_norm"):
        return 1.0
    if bool(((norms / norms.mean() - 1).abs() < 1e-3).all()):
        return float(norms.mean())
    if RULES[rule.kind].compares_latents:
        raise BadSetting(
            f"decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g} that {rule.kind} does "
            "not reckon with (rescale_acts_by_decoder_norm is off), so with rows of norm 1 other latents would be "
            "chosen: choose another SAE"
        )
    return 1.0
