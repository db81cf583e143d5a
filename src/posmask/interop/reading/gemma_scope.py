"""Read GemmaScope (params.npz) and Gemma Scope 2 (params.safetensors).

The files of residual streams, MLP outputs, attention heads and transcoders have the same names and tensors. What an SAE
is of is in the names of its folders: gemma-scope-2b-pt-res/layer_12/.., gemma-scope-2-4b-pt/resid_post/layer_9_...
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.reading.form import Form, path_words, read_json
from posmask.interop.weights import Weights, npz_file, safetensors_file

__all__ = [
    "GEMMA_SCOPE_2_FILE",
    "GEMMA_SCOPE_FILE",
    "check_names",
    "check_names_2",
    "read_gemma_scope",
    "read_gemma_scope_2",
]

GEMMA_SCOPE_FILE = "params.npz"
GEMMA_SCOPE_2_FILE = "params.safetensors"
_CONFIG_FILE = "config.json"
_HEADS = "SAEs of attention heads before they are joined (hook_z)"
_REFUSED = {"att": _HEADS, "attn_out": _HEADS, "transcoder": "transcoders", "clt": "transcoders"}
_MODEL = re.compile(r"gemma-scope-(\d+b)-(pt|it)-", re.IGNORECASE)
_KIND = re.compile(r"-(res|mlp|att|transcoder)s?(?=-|$)", re.IGNORECASE)
_KIND_2 = re.compile(r"(resid_post|mlp_out|attn_out|transcoder|clt)(_all)?", re.IGNORECASE)
_MODEL_2 = re.compile(r"gemma-scope-2-(\d+[bm])-(pt|it)", re.IGNORECASE)


def read_gemma_scope(path: Path, *, allow_pickle: bool) -> Form:
    """Read GemmaScope's five arrays, with the site from the names of the folders."""
    weights = npz_file(path / GEMMA_SCOPE_FILE)
    words = path_words(path)
    metadata: dict[str, Any] = {}
    repository, kind = check_names(words)
    if kind is not None:
        if match := _MODEL.search(repository):
            metadata["model_name"] = f"google/gemma-2-{match[1].lower()}{'-it' if match[2].lower() == 'it' else ''}"
        layer = _layer(words)
        if "embedding" in words:
            metadata["hook_name"] = "hook_embed"
        elif layer is not None:
            metadata["hook_name"] = f"blocks.{layer}.{'hook_resid_post' if kind == 'res' else 'hook_mlp_out'}"
    return Form(_cfg(weights, metadata), weights, needs_site=True)


def check_names(words: Sequence[str]) -> tuple[str, str | None]:
    """The repository's name and what its SAEs are of, from the names of folders, innermost first.

    Raises:
        BadSetting: posmask does not read SAEs of this repository.
    """
    for word in words:
        is_repository = "gemma-scope" in word.lower() or word.startswith("models--")
        if is_repository and (kinds := _KIND.findall(word)):
            _refuse(kinds[-1].lower(), word)
            return word, kinds[-1].lower()
    return "", None


def check_names_2(words: Sequence[str]) -> str | None:
    """What the SAE is of, from the names of folders, innermost first; None if they do not say.

    Raises:
        BadSetting: posmask does not read such an SAE.
    """
    for word in words:
        if match := _KIND_2.fullmatch(word):
            _refuse(match[1].lower(), word)
            return match[1].lower()
    return None


def _refuse(kind: str, where: str) -> None:
    if kind in _REFUSED:
        raise BadSetting(
            f"{where} holds {_REFUSED[kind]}, which posmask does not read: choose an SAE of the residual stream or of "
            "the MLP output"
        )


def _layer(words: list[str]) -> str | None:
    return next((match[1] for word in words if (match := re.match(r"layer_([0-9]+)(?=_|$)", word))), None)


def _cfg(weights: Weights, metadata: dict[str, Any]) -> dict[str, Any]:
    decoder = next((shape for name, shape in weights.shapes.items() if name.lower() == "w_dec"), ())
    if len(decoder) != 2:
        raise DamagedFolder(f"{weights.path} holds no matrix W_dec: fetch GemmaScope's own file again")
    cfg: dict[str, Any] = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    cfg["d_sae"], cfg["d_in"] = decoder
    return {**cfg, "metadata": metadata}


def read_gemma_scope_2(path: Path, *, allow_pickle: bool) -> Form:
    """Read Gemma Scope 2's five tensors. Folder names and config.json, if it is there, must agree on the site.

    Raises:
        BadSetting: they do not, or it is an SAE of attention heads or a transcoder.
    """
    words = path_words(path)
    config = read_json(path / _CONFIG_FILE) if (path / _CONFIG_FILE).is_file() else {}
    stated = _kind_of(config)
    kind = check_names_2(words) or stated
    if kind is not None:
        _refuse(kind, str(path))
    layer, stated_layer = _layer(words), re.search(r"layers\.(\d+)\.", str(config.get("hf_hook_point_in")))
    if (stated is not None and kind != stated) or (stated_layer and layer not in (None, stated_layer[1])):
        raise BadSetting(
            f"{path} is named {kind} of layer {layer}, but its {_CONFIG_FILE} says {stated} (hf_hook_point_in = "
            f"{config.get('hf_hook_point_in')!r}): fetch settings and weights of one SAE"
        )
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise BadSetting(f"architecture {config['architecture']!r} in {path / _CONFIG_FILE} is not jump_relu")
    metadata: dict[str, Any] = {}
    if match := next(filter(None, map(_MODEL_2.search, words)), None):
        size, suffix = match[1].lower(), match[2].lower()
        metadata["model_name"] = f"google/gemma-3-{size}" + ("" if (size, suffix) == ("270m", "pt") else f"-{suffix}")
    if kind is not None and layer is not None:
        metadata["hook_name"] = f"blocks.{layer}.{'hook_resid_post' if kind == 'resid_post' else 'hook_mlp_out'}"
    weights = safetensors_file(path / GEMMA_SCOPE_2_FILE).renamed({"affine_skip_connection": "W_skip"})
    return Form(_cfg(weights, metadata), weights, needs_site=True)


def _kind_of(config: dict[str, Any]) -> str | None:
    """What config.json says the SAE is of: the site of its input, and a transcoder if it has another output."""
    site, out = str(config.get("hf_hook_point_in") or ""), config.get("hf_hook_point_out")
    if not site:
        return None
    if out and out != site:
        return "transcoder"
    if re.search(r"layers\.\d+\.output$", site):
        return "resid_post"
    if "post_feedforward_layernorm" in site:
        return "mlp_out"
    return "attn_out" if "self_attn" in site else None
