"""Export SAEs as SAELens folders (cfg.json and sae_weights.safetensors) and import SAELens and GemmaScope SAEs.

Neither needs SAELens. SAELens's tensors are in the model's units and need no centering or scaling: W_enc = encoder,
b_enc = scale * encoder_bias, W_dec = decoder and b_dec = scale * decoder_bias + center. Rows of W_dec keep norm 1,
because tools multiply directions by their norms; codes are `scale` times as large.
Source: sae-lens 6.54.12, saes/*.py and loading/pretrained_sae_loaders.py.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.fidelity import measured_fidelity
from posmask.interop.positions import check_position, typical_position
from posmask.interop.readme import IMPORT_LINE, folder_readme, positions_text
from posmask.interop.sites import gemma_scope_hook, hook_name, layer_and_site
from posmask.interop.weights import WeightsFile, npz_file, safetensors_file
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder, check_sizes, check_table
from posmask.sae.files import WEIGHTS_FILE, flaw_of, read_origin, read_sae, write_sae
from posmask.sae.rules import RULES, RuleSettings, rule_settings
from posmask.sae.selection import LargestOfToken
from posmask.storage.layout import SAE_FILE
from posmask.storage.manifest import as_json, file_sha256, write_folder

__all__ = [
    "ARCHITECTURE",
    "export_saelens",
    "import_saelens",
    "is_foreign",
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
README_FILE = "README.md"
_EMBEDDED_ON_THE_HUB = {"embedded:SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}

Tensors = dict[str, Tensor]
Form = tuple[dict[str, Any], Tensors]
"""Content of cfg.json, and the tensors by their names in the weights file."""
UnknownPosition = int | Literal["typical"]
"""A position for vectors of unknown position; `typical` is `positions.typical_position`."""


def without_constants(sae: SparseAutoencoder) -> Tensors:
    """Return an SAE's tensors for vectors that are neither centered nor scaled, in SAELens's names and shapes.

    Codes are `sae.scale` times as large, so the rule's thresholds are, too. Products are computed in float64 and
    rounded once.
    """
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


def _metadata(sae: SparseAutoencoder, origin: Mapping[str, Any], model_name: str | None) -> dict[str, Any]:
    """Return the metadata of cfg.json: what an imported SAE stated (`origin["metadata"]`), else what posmask does."""
    name = model_name or origin.get("model")
    metadata: dict[str, Any] = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "context_size": sae.mask.n_positions,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "seqpos_slice": [None],  # Positions are counted from the first token, so tools must not cut it off.
        "hook_head_index": None,
        "model_from_pretrained_kwargs": {},  # The model's weights as they are: from_pretrained_no_processing.
        "training_tokens": origin.get("training_tokens"),
    }
    if "layer" in origin:
        metadata["hook_name"] = hook_name(origin["layer"], origin.get("site", "residual_after"))
    metadata |= origin.get("metadata", {})
    metadata["posmask_scale"] = float(sae.scale)  # The factor of codes with respect to this SAE's.
    if name is not None:
        metadata["model_name"] = _EMBEDDED_ON_THE_HUB.get(name, name)
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
    _must_be_new(folder)
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


def is_foreign(source: Path) -> bool:
    """Whether a path holds an SAE of SAELens or GemmaScope, and none of posmask."""
    files = (source / CFG_FILE, source / GEMMA_SCOPE_FILE)
    return source.name == GEMMA_SCOPE_FILE or (
        not (source / SAE_FILE).is_file() and any(file.is_file() for file in files)
    )


def import_saelens(source: Path, folder: Path, *, n_positions: int | None = None) -> SparseAutoencoder:
    """Convert an SAE with `read_saelens`, write it as a folder of posmask, and return it.

    Raises:
        BadSetting: the folder exists and is not empty, or `read_saelens` raises it.
        DamagedFolder: `read_saelens` raises it.
    """
    _must_be_new(folder)
    sae, origin = read_saelens(source, n_positions=n_positions)
    with write_folder(folder, {"what": "import", "n_positions": sae.mask.n_positions, **origin["imported"]}) as draft:
        write_sae(sae, draft, origin)
    return sae


def read_saelens(source: Path, *, n_positions: int | None = None) -> tuple[SparseAutoencoder, dict[str, Any]]:
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
    """Return the divisor of the vectors and, if decoder rows have norm 1, of the codes.

    An export of posmask states it. Otherwise it is the norm of the decoder rows if they share one, which keeps the
    codes.
    """
    norms, compares = decoder.norm(dim=1), RULES[rule.kind].compares_latents
    rescales = bool(cfg.get("rescale_acts_by_decoder_norm"))
    # A latent whose decoder row is zero only matters if it could be chosen instead of another.
    counted = norms if compares else norms[norms > 0]
    share_norm = len(counted) > 0 and bool(((counted / counted.mean() - 1).abs() < 1e-3).all())
    if compares and not rescales and not share_norm:
        raise BadSetting(
            f"decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g} that {rule.kind} does "
            "not account for (rescale_acts_by_decoder_norm is off), so with rows of norm 1 other latents would be "
            "chosen: choose another SAE"
        )
    if (stated := (cfg.get("metadata") or {}).get("posmask_scale")) is not None:
        return float(stated)
    return float(counted.mean()) if share_norm and not rescales else 1.0
