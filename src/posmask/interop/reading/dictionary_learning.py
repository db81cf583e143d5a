"""Read SAEs that dictionary_learning trained, such as those of SAEBench: config.json and ae.pt.

Source: dictionary_learning (saprmarks), dictionary.py and trainers/; sae-lens 6.54.12.
"""

import re
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting
from posmask.interop.reading.form import Form, path_words, read_json
from posmask.interop.weights import Weights, pickle_file

__all__ = ["read_dictionary_learning"]

_ARCHITECTURES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
}
"""Architecture of SAELens by class of dictionary_learning; at inference, BatchTopK is JumpReLU with one threshold."""
_ENCODES_WITHOUT_BIAS = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes that do not subtract the decoder's bias from the vectors."""
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
_OF_TRAINING = ("k", "group_sizes", "active_groups")


def read_dictionary_learning(path: Path, *, allow_pickle: bool) -> Form:
    """Read config.json and ae.pt.

    Raises:
        BadSetting: its class is not supported, or it is a transcoder.
    """
    config = read_json(path / "config.json")
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    name = trainer["dict_class"]
    if name not in _ARCHITECTURES:
        raise BadSetting(f"dict_class = {name!r} is not supported: choose an SAE of {', '.join(_ARCHITECTURES)}")
    if buffer.get("io", "out") != "out":
        raise BadSetting(f"io = {buffer['io']!r} in config.json: not an SAE of a module's output; choose another")
    architecture = _ARCHITECTURES[name]
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": trainer["activation_dim"],
        "d_sae": trainer["dict_size"],
        "apply_b_dec_to_input": name not in _ENCODES_WITHOUT_BIAS,
        "metadata": {
            "model_name": trainer["lm_name"],
            "hook_name": _hook(trainer, path),
            "context_size": buffer.get("ctx_len"),
            **({"exclude_special_tokens": True} if buffer.get("remove_bos") else {}),
        },
    }
    if architecture == "topk":
        cfg["k"] = trainer["k"]
    weights = _weights(pickle_file(path / "ae.pt", allow_pickle=allow_pickle), architecture)
    return Form(cfg, weights, needs_site=True)


def _hook(trainer: dict[str, Any], path: Path) -> str | None:
    for word in (str(trainer.get("submodule_name") or ""), *path_words(path)):
        if match := re.search(r"(resid_post|mlp_out|attn_out|attention_out|resid_mid)_layer_?([0-9]+)", word):
            return f"blocks.{match[2]}.{_SITES.get(match[1], match[1])}"
    return None


def _weights(weights: Weights, architecture: str) -> Weights:
    weights = weights.renamed(_NAMES, ("encoder.weight", "decoder.weight"))
    unused = [name for name in _OF_TRAINING if name in weights.shapes]
    if architecture == "topk" and "threshold" in weights.shapes:
        unused.append("threshold")  # of inference by threshold; the class itself takes the k largest
    weights = weights.without(unused)
    if weights.shapes.get("threshold") in ((), (1,)):
        shape = weights.shapes.get("b_enc", ())
        weights = weights.derived("threshold", shape, lambda tensors: tensors["threshold"].double().expand(shape))
    return weights
