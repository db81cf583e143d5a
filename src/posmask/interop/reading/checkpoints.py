"""Read SAEs that are published as one file of `torch.save`, whose name has model and layer.

    Qwen Scope       Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt   (k is in the repository's name)
    Goodfire         Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth
    qresearch        qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt

Source: sae-lens 6.54.12, loading/pretrained_sae_loaders.py.
"""

import re
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.reading.form import Form, path_words
from posmask.interop.weights import Weights, pickle_file

__all__ = ["NAMED_FILE", "QWEN_SCOPE_FILE", "read_named_file", "read_qwen_scope"]

QWEN_SCOPE_FILE = r"layer([0-9]+)\.sae\.pt"
NAMED_FILE = r"((?:Llama|DeepSeek)-[\w.-]+)-SAE-l([0-9]+)\.pth?"
_OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}
_QWEN_REPOSITORY = re.compile(r"SAE-Res-(.+)-W([0-9]+)K-L0_([0-9]+)")
_PREFIXES = ("encoder_linear", "encoder"), ("decoder_linear", "decoder")


def read_qwen_scope(path: Path, *, allow_pickle: bool) -> Form:
    """Read a layer's file. The folder must have the name of its repository, which has k.

    Raises:
        BadSetting: it has another name.
    """
    repository = next(filter(None, map(_QWEN_REPOSITORY.search, path_words(path))), None)
    layer = re.fullmatch(QWEN_SCOPE_FILE, path.name)
    if repository is None or layer is None:
        raise BadSetting(
            f"{path} does not say its k: keep the name of its repository in the path, such as "
            "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt"
        )
    weights = pickle_file(path, allow_pickle=allow_pickle).renamed({}, ("W_enc", "W_dec"))
    cfg = _cfg(weights, "topk", f"Qwen/{repository[1]}", int(layer[1]))
    return Form({**cfg, "k": int(repository[3])}, weights)


def read_named_file(path: Path, *, allow_pickle: bool) -> Form:
    """Read a ReLU SAE of Goodfire or qresearch."""
    match = re.fullmatch(NAMED_FILE, path.name)
    assert match is not None, path
    names = {
        f"{prefix}.{part}": f"{letter}_{end}"
        for prefixes, end in zip(_PREFIXES, ("enc", "dec"), strict=True)
        for prefix in prefixes
        for part, letter in (("weight", "W"), ("bias", "b"))
    }
    weights = pickle_file(path, allow_pickle=allow_pickle).renamed(names, names)
    owner = _OWNERS[match[1].partition("-")[0]]
    return Form(_cfg(weights, "standard", f"{owner}/{match[1]}", int(match[2])), weights)


def _cfg(weights: Weights, architecture: str, model: str, layer: int) -> dict[str, Any]:
    encoder = weights.shapes.get("W_enc", ())
    if len(encoder) != 2:
        raise DamagedFolder(f"{weights.path} holds no encoder matrix: fetch the SAE again")
    return {
        "architecture": architecture,
        "d_in": encoder[0],
        "d_sae": encoder[1],
        "apply_b_dec_to_input": False,
        "metadata": {"model_name": model, "hook_name": f"blocks.{layer}.hook_resid_post"},
    }
