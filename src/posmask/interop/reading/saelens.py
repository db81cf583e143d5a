"""Read folders that SAELens wrote, of version 6 and of earlier ones.

Source: sae-lens 6.54.12, loading/pretrained_sae_loaders.py, and the settings of versions 0 to 5.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.reading.form import Form, read_json
from posmask.interop.saelens_files import CFG_FILE, SAELENS_WEIGHTS_FILE
from posmask.interop.weights import Weights, safetensors_file

__all__ = ["modernized", "read_saelens"]

_SCALER_FILE = "activation_scaler.json"  # in checkpoints of SAELens 6


def read_saelens(path: Path, *, allow_pickle: bool) -> Form:
    """Read cfg.json and sae_weights.safetensors."""
    cfg, weights = read_json(path / CFG_FILE), safetensors_file(path / SAELENS_WEIGHTS_FILE)
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DamagedFolder(f"metadata in {path / CFG_FILE} is not a table: fetch the folder again")
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    is_old = not re.match(r"([6-9]|\d\d)\.", version)
    if is_old:
        cfg = modernized(cfg)
    if (path / _SCALER_FILE).is_file():
        cfg["norm_scaling_factor"] = read_json(path / _SCALER_FILE).get("scaling_factor")
    unstated = is_old and "model_from_pretrained_kwargs" not in cfg["metadata"]
    return Form(cfg, _with_finetuned_scale(cfg, weights), centering_unstated=unstated)


_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_OF_THE_SAE = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "finetuning_scaling_factor",
    "rescale_acts_by_decoder_norm",
    "k",
}


def modernized(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings of SAELens before 6.0, in which facts about the model are beside those of the SAE.

    Raises:
        BadSetting: the activation function is not relu or topk.
    """
    old = {_RENAMED.get(name, name): value for name, value in cfg.items()}
    new = {name: value for name, value in old.items() if name in _OF_THE_SAE}
    new["architecture"] = new.get("architecture") or "standard"
    activation, arguments = old.get("activation_fn") or "relu", old.get("activation_fn_kwargs") or {}
    if activation not in ("relu", "topk"):
        raise BadSetting(
            f"activation_fn = {activation!r} is not supported: choose an SAE whose activation function is relu or topk"
        )
    if activation == "topk":
        new |= {"architecture": "topk", "k": arguments.get("k", old.get("k"))}
        if arguments.get("signed"):
            raise BadSetting("activation_fn_kwargs has signed = True, which makes codes negative: choose another SAE")
    normalize = old.get("normalize_activations")
    if isinstance(normalize, bool):
        normalize = "expected_average_only_in" if normalize else None
    new["normalize_activations"] = normalize or "none"
    hook = old.get("hook_name")
    if isinstance(hook, str):
        old["hook_name"] = hook = hook.replace("{layer}", str(old.get("hook_layer")))
    new.setdefault("reshape_activations", "hook_z" if isinstance(hook, str) and "hook_z" in hook else "none")
    new["metadata"] = (old.get("metadata") or {}) | {
        name: value for name, value in old.items() if name not in {*_OF_THE_SAE, "metadata"}
    }
    return new


def _with_finetuned_scale(cfg: Mapping[str, Any], weights: Weights) -> Weights:
    """Multiply decoder rows by the factors that fine-tuning gave to the codes, if it did.

    Raises:
        BadSetting: there are factors other than 1, and the settings do not say that they apply.
    """
    name = next((name for name in ("scaling_factor", "finetuning_scaling_factor") if name in weights.shapes), None)
    if name is None:
        return weights
    applies = bool(cfg.get("finetuning_scaling_factor"))

    def decoder(tensors: dict[str, Any]) -> Any:
        factor = tensors[name]
        if applies:
            return tensors["W_dec"].double() * factor.double()[:, None]
        if not bool((factor == 1).all()):  # Some versions wrote factors of 1, which have no effect.
            raise BadSetting(
                f"there is a tensor {name} other than 1, but finetuning_scaling_factor is off: choose another SAE"
            )
        return tensors["W_dec"]

    return weights.derived("W_dec", weights.shapes.get("W_dec", ()), decoder, replaces=name)
