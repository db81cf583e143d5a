"""Translate sites of a model from and to the names of TransformerLens (used by SAELens) and GemmaScope."""

import re
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting

__all__ = ["canonical", "described", "gemma_scope_hook", "hook_name", "layer_and_site"]

_HOOKS = {
    "residual_after": "hook_resid_post",
    "residual_before": "hook_resid_pre",
    "attention": "hook_attn_out",
    "mlp": "hook_mlp_out",
}
_WORDS = {
    "residual_after": "the residual stream after layer",
    "residual_before": "the residual stream before layer",
    "attention": "the attention output of layer",
    "mlp": "the MLP output of layer",
}


def hook_name(layer: int, site: str) -> str:
    """Return TransformerLens's name of a site, whose blocks count from 0.

    Raises:
        BadSetting: as `canonical`.
    """
    _check(layer, site)
    return f"blocks.{layer - 1}.{_HOOKS[site]}"


def layer_and_site(hook: Any) -> tuple[int, str]:
    """Return the layer and site of TransformerLens's name, in canonical form; the inverse of `hook_name`.

    Raises:
        BadSetting: the name is of vectors that posmask does not read, such as single attention heads.
    """
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.(\w+)", hook) if isinstance(hook, str) else None
    sites = [site for site, name in _HOOKS.items() if match and name == match[2]]
    if not match or not sites:
        raise BadSetting(
            f"hook_name = {hook!r} is not a site that posmask reads: choose an SAE of one of "
            f"{', '.join(_HOOKS.values())}"
        )
    return canonical(int(match[1]) + 1, sites[0])


def canonical(layer: Any, site: Any) -> tuple[int, str]:
    """Return the one name per site: the residual stream before layer n + 1 is the residual stream after layer n.

    Raises:
        BadSetting: no model has such a site.
    """
    _check(layer, site)
    return (layer - 1, "residual_after") if site == "residual_before" and layer > 1 else (layer, site)


def _check(layer: Any, site: Any) -> None:
    if type(layer) is not int or layer < 1 or site not in list(_HOOKS):
        raise BadSetting(
            f"layer {layer!r} and site {site!r} are not a site of a model: layers count from 1, sites are "
            f"{', '.join(_HOOKS)}"
        )


def described(layer: int, site: str) -> str:
    """Describe a site in words, such as "the MLP output of layer 2".

    Raises:
        BadSetting: as `canonical`.
    """
    _check(layer, site)
    return f"{_WORDS[site]} {layer}"


def gemma_scope_hook(path: Path) -> str | None:
    """Return the hook of the SAE in a GemmaScope file, taken from the names of its folders; None if they lack it.

    The repositories gemma-scope-2b-pt-res, -mlp, -att and -transcoders have the same folder names and arrays, so only
    the name of the repository tells them apart.

    Raises:
        BadSetting: the name is that of transcoders or of SAEs of single attention heads.
    """
    for parts in (path.absolute().parts, path.parent.resolve().parts):
        for part in reversed(parts):
            kinds = re.findall(r"-(res|mlp|att|transcoder)s?(?=-|$)", part)
            if kinds and ("gemma-scope" in part or part.startswith("models--")):
                return _hook_of(kinds[-1], part, parts)
    return None


def _hook_of(kind: str, repository: str, parts: tuple[str, ...]) -> str | None:
    refused = {"att": "SAEs of attention heads before they are joined (hook_z)", "transcoder": "transcoders"}
    if kind in refused:
        raise BadSetting(
            f"{repository} holds {refused[kind]}, which posmask does not read: choose an SAE of a -res or -mlp "
            "repository"
        )
    if "embedding" in parts:
        return "hook_embed"
    layers = [match[1] for part in parts if (match := re.fullmatch(r"layer_([0-9]+)", part))]
    return f"blocks.{layers[-1]}.{_HOOKS['residual_after' if kind == 'res' else 'mlp']}" if layers else None
