"""Read Llama Scope (hyperparams.json) and Llama Scope R1 (config.json).

Source: sae-lens 6.54.12, loading/pretrained_sae_loaders.py.
"""

from pathlib import Path
from typing import Any

import torch

from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.reading.form import Form, read_json
from posmask.interop.saelens_files import SAELENS_WEIGHTS_FILE
from posmask.interop.weights import safetensors_file

__all__ = ["read_llama_scope", "read_llama_scope_r1"]

_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
_MODEL = "meta-llama/Llama-3.1-8B"


def read_llama_scope(path: Path, *, allow_pickle: bool) -> Form:
    """Read hyperparams.json and checkpoints/final.safetensors.

    Vectors are scaled to a mean norm of sqrt(d_model), and all latents have one threshold, in units of the model.
    """
    settings = read_json(path / "hyperparams.json")
    cfg, d_sae = _cfg(settings), settings["d_sae"]
    norm = float(settings["dataset_average_activation_norm"]["in"])
    if not 1e-30 < norm < 1e30:
        raise DamagedFolder(
            f"{path / 'hyperparams.json'} has dataset_average_activation_norm = {norm:g}, which is no norm of vectors: "
            "download it again"
        )
    factor = settings["d_model"] ** 0.5 / norm
    threshold = float(settings["jump_relu_threshold"]) * factor
    weights = safetensors_file(path / "checkpoints" / "final.safetensors").renamed(_NAMES, _NAMES)
    weights = weights.derived(
        "threshold", (d_sae,), lambda tensors: torch.full((d_sae,), threshold, dtype=torch.float64)
    )
    return Form({**cfg, "d_sae": d_sae, "norm_scaling_factor": factor}, weights)


def read_llama_scope_r1(path: Path, *, allow_pickle: bool) -> Form:
    """Read config.json and sae_weights.safetensors; the factor of the vectors' norm is in SAELens's list only."""
    settings = read_json(path / "config.json")
    weights = safetensors_file(path / SAELENS_WEIGHTS_FILE).renamed(_NAMES, _NAMES)
    logarithm = "log_jumprelu_threshold"
    if logarithm in weights.shapes:
        shape = weights.shapes[logarithm]
        weights = weights.derived("threshold", shape, lambda tensors: tensors[logarithm].exp(), replaces=logarithm)
    return Form({**_cfg(settings), "d_sae": settings["d_model"] * settings["expansion_factor"]}, weights)


def _cfg(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("use_glu_encoder"):
        raise BadSetting("use_glu_encoder = True multiplies two encoders, which posmask cannot do: choose another SAE")
    site, out = settings["hook_point_in"], settings.get("hook_point_out")
    return {
        "architecture": "jumprelu",
        "d_in": settings["d_model"],
        "apply_b_dec_to_input": bool(settings.get("apply_decoder_bias_to_pre_encoder", False)),
        "normalize_activations": "expected_average_only_in",
        "metadata": {"model_name": _MODEL, "hook_name": site, "hook_name_out": out},
    }
