"""Convert an SAE in the common form to a `SparseAutoencoder`.

Folded into the weights, so that codes and reconstructions stay the same: biases that the encoder subtracts or not, a
constant factor of the vectors (`expected_average_only_in`), norms of decoder rows, and centered vectors
(`center_writing_weights`). What cannot be folded is an error that says what would be lost.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from posmask.errors import BadSetting, DamagedFolder, first_line
from posmask.interop.reading.form import Form
from posmask.interop.saelens_files import ARCHITECTURE, CFG_FILE
from posmask.interop.sites import layer_and_site
from posmask.interop.weights import Weights
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder, check_sizes, check_table
from posmask.sae.files import flaw_of
from posmask.sae.rules import RULES, RuleSettings, rule_settings
from posmask.storage.manifest import file_sha256

__all__ = ["converted"]

Tensors = dict[str, Tensor]
Origin = dict[str, Any]

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
_NOT_FOLDED = {
    "layer_norm": "each vector's mean and standard deviation, which differ from vector to vector",
    "constant_norm_rescale": "each vector's norm, which differs from vector to vector",
    "covariance_whitening": "the mean and covariance of the training vectors, which are not among these files",
}
"""What posmask would lose if it read an SAE without this normalization."""
_KEPT_METADATA = (
    "prepend_bos",
    "context_size",
    "seqpos_slice",
    "exclude_special_tokens",
    "exclude_tokens",
    "model_from_pretrained_kwargs",
    "dataset_path",
    "neuronpedia_id",
    "hf_hook_name",
)
"""Facts about the training that stay in the SAE's origin, by SAELens's names."""
_OTHER_VECTORS = {
    "hook_head_index": "an SAE of one attention head",
    "hook_name_out": "a transcoder",
    "hook_head_index_out": "a transcoder",
}


def converted(
    form: Form, *, n_positions: int | None = None, model_name: str | None = None, hook_name: str | None = None
) -> tuple[SparseAutoencoder, Origin]:
    """Make the SAE and its origin; for the arguments and errors see `read_external`."""
    cfg, weights = form.cfg, _with_our_case(form.weights)
    try:
        metadata = {**(cfg.get("metadata") or {})}
        if model_name is not None:
            metadata["model_name"] = model_name
        length = metadata.get("context_size") if n_positions is None else n_positions
        sae = _unfilled(cfg, length, weights.shapes)
        origin = _origin(form, metadata, hook_name)
        tensors = weights.read()
        _check_finite(tensors)
        _check_unknown(cfg, tensors, _names(cfg, sae).values())
        _fold_(cfg, origin, tensors)
        if "b_mag" in tensors:  # SAELens: e^r (x W) + b_mag; posmask: e^r (x W + b_gate) + b_mag.
            tensors["b_mag"] = tensors["b_mag"] - tensors["r_mag"].exp() * tensors["b_gate"]
        tensors = {_OUR_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        if not cfg.get("apply_b_dec_to_input", True):
            tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
        _fill_(sae, tensors, _scale(cfg, tensors["W_dec"], sae.rule.settings))
    except (BadSetting, DamagedFolder) as error:
        raise type(error)(f"{form.place}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{CFG_FILE} lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise BadSetting(f"{form.place}: {reason}: fetch an SAE with complete settings") from None
    origin["imported"] = {"architecture": cfg["architecture"]}
    if form.centering_unstated and _WITH_LAYER_NORM.search(origin.get("model", "")):
        origin["imported"]["centering"] = "unstated"
    if weights.path is not None:
        origin["imported"]["sha256"] = file_sha256(weights.path)
    return sae, origin


def _with_our_case(weights: Weights) -> Weights:
    return weights.renamed({f"w_{part}": f"W_{part}" for part in ("enc", "dec") if f"W_{part}" not in weights.shapes})


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
    normalize = cfg.get("normalize_activations") or "none"
    if normalize in _NOT_FOLDED:
        raise BadSetting(
            f"normalize_activations = {normalize!r} uses {_NOT_FOLDED[normalize]}; read without it, the SAE would "
            "have other codes: choose an SAE without it"
        )
    if normalize not in ("none", "expected_average_only_in"):
        raise BadSetting(f"normalize_activations = {normalize!r} is unknown: choose an SAE without it")
    if (reshape := cfg.get("reshape_activations", "none")) != "none":
        raise BadSetting(
            f"reshape_activations = {reshape!r} reads attention heads, not a residual stream: choose another"
        )
    return rule_settings(_RULES[architecture](cfg))


def _origin(form: Form, metadata: Mapping[str, Any], hook_name: str | None) -> Origin:
    """Return the model, site and number of tokens that an SAE was trained on, as far as they are known.

    Raises:
        BadSetting: it was trained on vectors that posmask does not read, is a transcoder, or its site is unknown.
    """
    origin: Origin = {}
    if metadata.get("training_tokens"):
        origin["training_tokens"] = int(metadata["training_tokens"])
    if metadata.get("model_name"):
        origin["model"] = str(metadata["model_name"])
    stated = {**form.cfg, **metadata}
    for name, reason in _OTHER_VECTORS.items():
        if stated.get(name) is not None and stated[name] != stated.get("hook_name"):
            raise BadSetting(f"{name} = {stated[name]!r}: {reason}, which posmask does not read: choose another SAE")
    site = None if stated.get("hook_name") is None else layer_and_site(stated["hook_name"], origin.get("model"))
    if hook_name is not None:
        given = layer_and_site(hook_name, origin.get("model"))
        if site is not None and site != given:
            raise BadSetting(
                f"its files say {stated['hook_name']!r}, not hook_name = {hook_name!r}: leave out --hook-name"
            )
        site = given
    if site is None and form.needs_site:
        raise BadSetting(
            "neither its files nor the names of its folders say which site it was trained on, and files of this format "
            "may be of sites that posmask does not read: keep the names of the repository's folders in the path, or "
            "pass --hook-name (--site in an audit), such as blocks.12.hook_resid_post"
        )
    if site is not None:
        origin["layer"], origin["site"] = site
    kept = {name: metadata[name] for name in _KEPT_METADATA if metadata.get(name) not in (None, {}, [])}
    if str(metadata.get("hook_name")).startswith("blocks."):  # of TransformerLens, so that it can be exported again
        kept["hook_name"] = metadata["hook_name"]
    return {**origin, **({"metadata": kept} if kept else {})}


def _check_finite(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.startswith("mask."):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DamagedFolder(f"{name} holds {kind} numbers, which are no weights: fetch the SAE again")
        if not bool(tensor.isfinite().all()):
            raise DamagedFolder(f"{name} holds NaN or infinite numbers: choose another SAE")


def _check_unknown(cfg: Mapping[str, Any], tensors: Tensors, names: Iterable[str]) -> None:
    """
    Raises:
        BadSetting: there are tensors that the architecture does not have.
    """
    if unknown := sorted(tensors.keys() - set(names)):
        raise BadSetting(
            f"an SAE of architecture {cfg['architecture']!r} has no tensor {', '.join(unknown[:3])}, so this one "
            "computes something else: choose another SAE"
        )


def _fold_(cfg: Mapping[str, Any], origin: Origin, tensors: Tensors) -> None:
    """Fold a factor of the vectors and the centering of the model's weights into the tensors.

    Raises:
        BadSetting: the factor is unknown, or whether vectors were centered.
    """
    if cfg.get("normalize_activations") == "expected_average_only_in":
        factor = cfg.get("norm_scaling_factor")
        if factor is None:
            raise BadSetting(
                "normalize_activations = 'expected_average_only_in' multiplies vectors by a factor that is in none of "
                "its files: read the SAE by its name in SAELens's list (saelens:RELEASE/ID), which may have it, or "
                "fold it with SAELens"
            )
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise BadSetting(f"the factor of the vectors' norm is {factor!r}, not a number above 0: choose another SAE")
        tensors["W_enc"] = tensors["W_enc"] * factor
        tensors["W_dec"] = tensors["W_dec"] / factor
        tensors["b_dec"] = tensors["b_dec"] / factor
    if _was_centered(origin):
        # The mean of v over d_model is 0 for (v - mean(v)) W = v (W - mean(W)); b_dec is not centered.
        mean = tensors["W_enc"].mean(dim=0)
        tensors["W_enc"] = tensors["W_enc"] - mean
        if cfg.get("apply_b_dec_to_input", True):
            shift = -tensors["b_dec"].sum() * mean
            gain = {"b_enc": 1.0, "b_gate": 1.0, "b_mag": tensors["r_mag"].exp() if "r_mag" in tensors else 1.0}
            tensors |= {name: tensors[name] + by * shift for name, by in gain.items() if name in tensors}


_WITH_LAYER_NORM = re.compile(r"gpt2|gpt-neo|gpt-j|pythia|opt-|bloom", re.IGNORECASE)


def _was_centered(origin: Origin) -> bool:
    """Whether TransformerLens subtracted the mean over d_model from each vector (`center_writing_weights`).

    It does so for models with LayerNorm, which subtracts it anyway.

    Raises:
        BadSetting: the model is not known to have LayerNorm.
    """
    arguments = origin.get("metadata", {}).get("model_from_pretrained_kwargs", {})
    if not isinstance(arguments, dict):
        raise BadSetting(f"model_from_pretrained_kwargs = {arguments!r} is not a table: fetch the settings again")
    if not arguments.get("center_writing_weights"):
        return False
    model = origin.get("model", "")
    if not _WITH_LAYER_NORM.search(model):
        raise BadSetting(
            f"center_writing_weights = True: the SAE was trained on vectors without their mean over d_model, which can "
            f"be folded for models with LayerNorm only (gpt2, pythia, ..), not for {model or 'an unknown model'}: pass "
            "--model-name if it is one of them, or choose another SAE"
        )
    return True


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
