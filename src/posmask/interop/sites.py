"""Translate sites of a model from and to the names of TransformerLens (used by SAELens) and transformers."""

import re
from typing import Any

from posmask.errors import BadSetting

__all__ = ["canonical", "described", "hook_name", "layer_and_site"]

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


def layer_and_site(hook: Any, model: str | None = None) -> tuple[int, str]:
    """Return the layer and site of a name of TransformerLens or of a module in transformers, in canonical form.

    `blocks.3.hook_resid_post`, `model.layers.3`, `transformer.h.3` and `gpt_neox.layers.3` are the residual stream
    after layer 4.

    Args:
        model: name of the model, which modules inside a layer need: some models have a norm after them.

    Raises:
        BadSetting: the name is of vectors that posmask does not read, such as single attention heads.
    """
    text = hook if isinstance(hook, str) else ""
    if match := re.fullmatch(r"blocks\.([0-9]{1,4})\.(\w+)", text):
        sites = [site for site, name in _HOOKS.items() if name == match[2]]
    elif match := _MODULE.fullmatch(text):
        sites = [_MODULES[match[2]]] if match[2] in _MODULES else []
        if match[2] and sites and (model is None or _NORMS_AFTER.search(model)):
            raise BadSetting(
                f"hook_name = {hook!r} is the output of a module"
                + (", and the model's name is unknown" if model is None else f" that {model} normalizes before adding")
                + ": only vectors that are added to the residual stream can be read; choose an SAE of such a site, or "
                "pass --model-name if the model has no norm after its sublayers"
            )
    else:
        sites = []
    if match is None or not sites:
        raise BadSetting(
            f"hook_name = {hook!r} is not a site that posmask reads: choose an SAE of one of "
            f"{', '.join(_HOOKS.values())}"
        )
    return canonical(int(match[1]) + 1, sites[0])


_MODULE = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h)\.([0-9]{1,4})(?:\.(\w+))?")
_MODULES = {
    None: "residual_after",
    "output": "residual_after",
    "mlp": "mlp",
    "attn": "attention",
    "self_attn": "attention",
    "attention": "attention",
}
_NORMS_AFTER = re.compile(r"gemma-?[23]|olmo-?2|glm-?4", re.IGNORECASE)
"""Models with a norm between a sublayer and the residual stream; posmask's sites are after that norm."""


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
