"""Read folders of EleutherAI's sparsify, of version 1.3: cfg.json and sae.safetensors.

Source: eai-sparsify 1.3.3, sparse_coder.py.
"""

from pathlib import Path
from typing import Any

import torch

from posmask.errors import BadSetting
from posmask.interop.reading.form import Form, read_json
from posmask.interop.saelens_files import CFG_FILE
from posmask.interop.weights import safetensors_file

__all__ = ["SPARSIFY_FILE", "read_sparsify"]

SPARSIFY_FILE = "sae.safetensors"
_UNSUPPORTED = {
    "transcode": "a transcoder",
    "skip_connection": "a sparse coder with a linear skip connection",
    "signed": "an SAE whose codes may be negative",
}


def read_sparsify(path: Path, *, allow_pickle: bool) -> Form:
    """Read a folder whose name is the module that the SAE was trained on, such as layers.5 or layers.5.mlp.

    The run's config.json, in the folder above, has the model and the length of its contexts.

    Raises:
        BadSetting: it is a transcoder, or its activation function is not top-k.
    """
    settings = read_json(path / CFG_FILE)
    for name, what in _UNSUPPORTED.items():
        if settings.get(name):
            raise BadSetting(f"{name} = {settings[name]!r}: {what}, which posmask does not read: choose another SAE")
    if (activation := settings.get("activation", "topk")) != "topk":
        raise BadSetting(f"activation = {activation!r} takes one latent per group, which no rule does: choose topk")
    run_file = path.absolute().parent / "config.json"
    run: dict[str, Any] = read_json(run_file) if run_file.is_file() else {}
    d_in = settings["d_in"]
    weights = safetensors_file(path / SPARSIFY_FILE).renamed(
        {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}, ("encoder.weight",)
    )
    d_sae = settings.get("num_latents") or d_in * settings["expansion_factor"]
    if "b_enc" not in weights.shapes:
        weights = weights.derived("b_enc", (d_sae,), lambda tensors: torch.zeros(d_sae))
    module = path.absolute().name
    cfg = {
        "architecture": "topk",
        "k": settings["k"],
        "d_in": d_in,
        "d_sae": d_sae,
        "metadata": {
            "model_name": run.get("model"),
            "hook_name": None if "." not in module and module != "embed_tokens" else module,
            "context_size": run.get("ctx_len"),
            "exclude_tokens": run.get("exclude_tokens"),
            "model_from_pretrained_kwargs": {"revision": run["revision"]} if run.get("revision") else {},
        },
    }
    return Form(cfg, weights, needs_site=True)
