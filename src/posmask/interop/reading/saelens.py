"""Read SAEs that other tools wrote: SAELens folders and GemmaScope's params.npz, without SAELens.

Source: sae-lens 6.54.12, saes/*.py and loading/pretrained_sae_loaders.py.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.saelens_files import ARCHITECTURE, CFG_FILE, SAELENS_WEIGHTS_FILE
from posmask.interop.sites import gemma_scope_hook, layer_and_site
from posmask.interop.weights import WeightsFile, npz_file, safetensors_file
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder, check_sizes, check_table
from posmask.sae.files import flaw_of, write_sae
from posmask.sae.rules import RULES, RuleSettings, rule_settings
from posmask.storage.atomic import check_new_folder
from posmask.storage.layout import SAE_FILE
from posmask.storage.manifest import file_sha256, write_folder

__all__ = ["GEMMA_SCOPE_FILE", "import_sae", "is_external", "read_external"]

GEMMA_SCOPE_FILE = "params.npz"

Tensors = dict[str, Tensor]


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


def is_external(source: Path) -> bool:
    """Whether a path holds an SAE of SAELens or GemmaScope, and none of posmask."""
    files = (source / CFG_FILE, source / GEMMA_SCOPE_FILE)
    return source.name == GEMMA_SCOPE_FILE or (
        not (source / SAE_FILE).is_file() and any(file.is_file() for file in files)
    )


def import_sae(source: Path, folder: Path, *, n_positions: int | None = None) -> SparseAutoencoder:
    """Convert an SAE with `read_external`, write it as a folder of posmask, and return it.

    Raises:
        BadSetting: the folder exists and is not empty, or `read_external` raises it.
        DamagedFolder: `read_external` raises it.
    """
    check_new_folder(folder)
    sae, origin = read_external(source, n_positions=n_positions)
    with write_folder(folder, {"what": "import", "n_positions": sae.mask.n_positions, **origin["imported"]}) as draft:
        write_sae(sae, draft, origin)
    return sae


def read_external(source: Path, *, n_positions: int | None = None) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Read the SAE in a SAELens folder or in GemmaScope's params.npz, and its origin.

    An SAE of architecture `posmask` keeps its mask; others are open at every position. Reconstructions stay the same.
    Codes stay the same if all decoder rows have one norm; otherwise they are multiplied by the norms, as SAELens's
    `fold_W_dec_norm` does. Coefficients that only matter in training are 0.

    Args:
        source: the folder, or the params.npz.
        n_positions: tokens per context; None for `metadata.context_size` of the folder.

    Raises:
        BadSetting: the architecture, version, site or normalization is not supported, or the context length is unknown.
        DamagedFolder: files are missing, or tensors are missing, misshapen, not finite, or pickled.
    """
    gemma_scope = source if source.name == GEMMA_SCOPE_FILE else source / GEMMA_SCOPE_FILE
    cfg, weights = _read_gemma_scope(gemma_scope) if gemma_scope.is_file() else _read_folder(source)
    metadata = cfg.get("metadata") or {}
    try:
        sae = _unfilled(cfg, metadata.get("context_size") if n_positions is None else n_positions, weights.shapes)
        origin = _origin(cfg, metadata)
        tensors = weights.read()
        _check_finite(tensors)
        _check_unknown(cfg, tensors, _names(cfg, sae).values())
        if "b_mag" in tensors:  # SAELens: e^r (x W) + b_mag; posmask: e^r (x W + b_gate) + b_mag.
            tensors["b_mag"] -= tensors["r_mag"].exp() * tensors["b_gate"]
        tensors = {_OUR_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        if not cfg.get("apply_b_dec_to_input", True):
            tensors["b_enc"] += tensors["b_dec"] @ tensors["W_enc"]
        _fill_(sae, tensors, _scale(cfg, tensors["W_dec"], sae.rule.settings))
    except (BadSetting, DamagedFolder) as error:
        raise type(error)(f"{weights.path.parent}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{CFG_FILE} lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise BadSetting(f"{weights.path.parent}: {reason}: fetch an SAE with complete settings") from None
    origin["imported"] = {"architecture": cfg["architecture"], "sha256": file_sha256(weights.path)}
    return sae, origin


def _read_folder(source: Path) -> tuple[dict[str, Any], WeightsFile]:
    if not (source / CFG_FILE).is_file():
        raise DamagedFolder(f"{source} holds no {CFG_FILE}: give a folder that SAELens's save_model wrote")
    try:
        cfg = json.loads((source / CFG_FILE).read_text(encoding="utf8"))
        metadata = cfg.get("metadata") or {}
        version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFolder(f"{source / CFG_FILE} is not readable JSON ({error}): fetch the folder again") from None
    if not re.match(r"([6-9]|\d\d)\.", version):
        raise BadSetting(
            f"{source} was written by SAELens {version or 'before 6.0'}, whose settings have other meanings: load it "
            "with SAELens 6 and save it again (SAE.load_from_disk, save_model)"
        )
    if not (source / SAELENS_WEIGHTS_FILE).is_file():
        pickled = [path.name for path in source.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
        if pickled:
            raise DamagedFolder(
                f"{source} holds its weights pickled ({pickled[0]}), which could run any code and are never read: get "
                f"{SAELENS_WEIGHTS_FILE}, or load them with SAELens if you trust them and save them with save_model"
            )
        raise DamagedFolder(f"{source} holds no {SAELENS_WEIGHTS_FILE}: fetch the folder again")
    return cfg, safetensors_file(source / SAELENS_WEIGHTS_FILE)


def _read_gemma_scope(path: Path) -> tuple[dict[str, Any], WeightsFile]:
    """Read GemmaScope's five arrays. It has no settings: the rule is JumpReLU, the folder names give the site."""
    weights = npz_file(path)
    cfg: dict[str, Any] = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "metadata": {}}
    if (hook := gemma_scope_hook(path)) is not None:
        cfg["metadata"]["hook_name"] = hook
    if len(weights.shapes.get("W_dec", ())) != 2:
        raise DamagedFolder(f"{path} holds no matrix W_dec: fetch GemmaScope's own {GEMMA_SCOPE_FILE} again")
    cfg["d_sae"], cfg["d_in"] = weights.shapes["W_dec"]
    return cfg, weights


def _unfilled(cfg: Mapping[str, Any], context_size: Any, shapes: Mapping[str, tuple[int, ...]]) -> SparseAutoencoder:
    """Make an SAE of the sizes in the settings, after checking that the weights have these sizes.

    Raises:
        BadSetting, ValueError: the settings are not possible.
        DamagedFolder: weights have another shape.
    """
    rule = _rule_of(cfg)
    ours = cfg["architecture"] == ARCHITECTURE
    settings = mask_settings(cfg["mask"] if ours else {"kind": "open"})
    if context_size is None and not ours:
        raise BadSetting("metadata has no context_size: pass the length of the contexts with --n-positions")
    n_positions: Any = cfg["n_positions"] if ours else context_size
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    check_sizes(d_in=d_in, d_sae=d_sae, n_positions=n_positions)
    _check_shape("W_enc", (d_in, d_sae), cfg, shapes)
    check_table(d_in, d_sae, n_positions)
    sae = SparseAutoencoder(d_in, rule, make_mask(settings, n_positions, d_sae))
    named = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    wanted = named | {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    for our_name, name in _names(cfg, sae).items():
        _check_shape(name, wanted[our_name], cfg, shapes)
    return sae


def _names(cfg: Mapping[str, Any], sae: SparseAutoencoder) -> dict[str, str]:
    """Map the names of `without_constants` to the tensors that a folder of this architecture holds."""
    kept = [name for name in sae.state_dict() if name.startswith(("rule.", "mask."))]
    wanted = ["W_enc", "b_enc", "W_dec", "b_dec", *kept]
    if cfg["architecture"] == ARCHITECTURE:
        return {name: name for name in wanted}
    theirs = {ours: name for name, ours in _OUR_NAMES.items() if name != "b_gate" or cfg["architecture"] == "gated"}
    return {name: theirs.get(name, name) for name in wanted if not name.startswith("mask.")}


def _check_shape(
    name: str, wanted: tuple[int, ...], cfg: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if name not in shapes:
        raise DamagedFolder(f"the weights lack {name}, which {cfg['architecture']!r} has: fetch them again")
    if shapes[name] != wanted:
        raise DamagedFolder(
            f"{name} has the shape {list(shapes[name])}, not {list(wanted)} as d_in = {cfg['d_in']} and d_sae = "
            f"{cfg['d_sae']} require: fetch cfg and weights of one SAE"
        )


def _rule_of(cfg: Mapping[str, Any]) -> RuleSettings:
    architecture = cfg.get("architecture")
    if architecture == ARCHITECTURE:
        return rule_settings(cfg["rule"])
    if architecture not in _RULES:
        raise BadSetting(f"architecture {architecture!r} is not supported: choose an SAE of one of {', '.join(_RULES)}")
    if (normalize := cfg.get("normalize_activations", "none")) != "none":
        raise BadSetting(
            f"normalize_activations = {normalize!r} is not in the weights: fold it into them with SAELens first"
        )
    if (reshape := cfg.get("reshape_activations", "none")) != "none":
        raise BadSetting(
            f"reshape_activations = {reshape!r} reads attention heads, not a residual stream: choose another"
        )
    return rule_settings(_RULES[architecture](cfg))


def _origin(cfg: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model, site and number of tokens that an SAE was trained on, as far as its settings state them.

    Raises:
        BadSetting: it was trained on vectors that posmask does not read, or is a transcoder.
    """
    origin: dict[str, Any] = {}
    if metadata.get("training_tokens"):
        origin["training_tokens"] = int(metadata["training_tokens"])
    if metadata.get("model_name"):
        origin["model"] = metadata["model_name"]
    stated = {**cfg, **metadata}
    for name, reason in _NOT_AN_SAE_OF_A_SITE.items():
        if stated.get(name) is not None and stated[name] != stated.get("hook_name"):
            raise BadSetting(f"{name} = {stated[name]!r}: {reason}, which posmask does not read: choose another SAE")
    if stated.get("hook_name") is not None:
        origin["layer"], origin["site"] = layer_and_site(stated["hook_name"])
    return origin


_NOT_AN_SAE_OF_A_SITE = {
    "hook_head_index": "an SAE of one attention head",
    "hook_name_out": "a transcoder",
    "hook_head_index_out": "a transcoder",
}


def _check_finite(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DamagedFolder(f"{name} holds NaN or infinite numbers: choose another SAE")


def _check_unknown(cfg: Mapping[str, Any], tensors: Tensors, names: Iterable[str]) -> None:
    """Drop tensors without effect and refuse unknown ones.

    Raises:
        BadSetting: there are tensors that the architecture does not have.
    """
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]  # Some versions of SAELens write it; it has no effect if it is 1.
    if unknown := sorted(tensors.keys() - set(names)):
        raise BadSetting(
            f"an SAE of architecture {cfg['architecture']!r} has no tensor {', '.join(unknown[:3])}, so this one "
            "computes something else: choose another SAE"
        )


def _scale(cfg: Mapping[str, Any], decoder: Tensor, rule: RuleSettings) -> float:
    """Return the divisor of the vectors: the norm of the decoder rows if they share one, which keeps the codes."""
    norms, compares = decoder.norm(dim=1), RULES[rule.kind].compares_latents
    if cfg.get("rescale_acts_by_decoder_norm"):
        return 1.0
    # A latent whose decoder row is zero only matters if it could be chosen instead of another.
    counted = norms if compares else norms[norms > 0]
    if len(counted) and bool(((counted / counted.mean() - 1).abs() < 1e-3).all()):
        return float(counted.mean())
    if compares:
        raise BadSetting(
            f"decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g} that {rule.kind} does "
            "not account for (rescale_acts_by_decoder_norm is off), so with rows of norm 1 other latents would be "
            "chosen: choose another SAE"
        )
    return 1.0


def _fill_(sae: SparseAutoencoder, tensors: Tensors, scale: float) -> None:
    """Fill an SAE with the inverse of `without_constants`: decoder rows of norm 1, center in the decoder's bias.

    A decoder row of zeros becomes any unit row, and its latent never fires: the reconstruction is the same.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    norms = wide["W_dec"].norm(dim=1)
    silent = norms == 0
    norms[silent] = scale
    factor = norms / scale
    state = {
        "encoder": (wide["W_enc"].T * norms[:, None]).masked_fill(silent[:, None], 0.0),
        "encoder_bias": (wide["b_enc"] * factor).masked_fill(silent, 0.0),
        "decoder": wide["W_dec"] / norms[:, None],
        "decoder_bias": wide["b_dec"] / scale,
        "center": torch.zeros(sae.d_model),
        "scale": torch.tensor(scale),
    } | {name: tensor for name, tensor in tensors.items() if name.startswith(("rule.", "mask."))}
    state["decoder"][silent, 0] = 1.0
    if sae.mask.reads_vectors:
        state["mask.router"] = wide["mask.router"] * scale
        state["mask.router_bias"] = wide["mask.router_bias"] / scale
    sae.load_state_dict(sae.state_dict() | state)
    sae.rule.rescale_(factor.to(sae.encoder.dtype))
    if (flaw := flaw_of(sae)) is not None:
        raise DamagedFolder(f"{flaw} when decoder rows have norm 1: choose another SAE")
