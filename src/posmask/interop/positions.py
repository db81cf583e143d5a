"""Positions for SAEs in other tools: follow a model's passes, and the position for vectors whose position is unknown.

with positions_of(model) as positions, sae.at(positions):
    model.generate(**inputs)  # hooks that call `sae` get codes at the right positions
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.masks.base import PositionMask

__all__ = ["Positions", "check_position", "positions_of", "typical_position"]

_TYPICAL_IN_SENTENCE = 10
_CACHES = ("past_key_values", "cache_params", "state")
"""Inputs of transformers' models that hold what earlier passes computed."""


def typical_position(mask: PositionMask) -> int:
    """The position that stands for unknown ones: the middle of the context, or 10 where positions start again often.

    The middle is as close as possible to all positions of the context and never BOS. A mask that counts from the
    sentence or the line has few tokens at the middle of the context, so its latents there are hardly trained; 10 is
    about the middle of a sentence.
    """
    middle = mask.n_positions // 2
    return min(middle, _TYPICAL_IN_SENTENCE) if mask.settings.position_origin in ("sentence", "line") else middle


def check_position(position: Any, n_positions: int) -> None:
    """Check a position that stands for unknown ones; None is allowed.

    Raises:
        BadSetting: it is not a position of the context.
    """
    if position is not None and (type(position) is not int or not 0 <= position < n_positions):
        raise BadSetting(
            f"unknown_position = {position!r} is not a position of the mask: choose 0 to {n_positions - 1}, or "
            "'typical'"
        )


class Positions:
    """The positions of the tokens in the latest pass of a model; see `positions_of`."""

    def __init__(self) -> None:
        self._latest: Tensor | str = "the model has made no pass yet: call it within `with positions_of(model)`"

    def __call__(self) -> Int[Tensor, "batch token"]:
        """Return the positions of the tokens in the latest pass, counted from 0 without padding.

        Raises:
            BadSetting: there was no pass yet, or the model's cache does not state its length.
        """
        if isinstance(self._latest, str):
            raise BadSetting(self._latest)
        return self._latest

    def _follow(self, inputs: Mapping[str, Any]) -> None:
        """Compute the positions of a pass from its inputs."""
        vectors, cache = _first(inputs, "input_ids", "inputs_embeds"), _first(inputs, *_CACHES)
        n_texts, length = vectors.shape[:2]
        mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
        past = _past_length(cache)
        if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
            self._latest = position_ids.long().expand(n_texts, length)
        elif mask is None and past is not None:
            self._latest = torch.arange(past, past + length, device=vectors.device).expand(n_texts, length)
        elif isinstance(mask, Tensor) and mask.dim() == 2 and past is not None and mask.shape[1] >= past + length:
            self._latest = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past : past + length]
        else:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            self._latest = (
                f"a pass of {length} tokens with an attention mask {shape} and a cache {type(cache).__name__} does not "
                "show their positions: give the model position_ids, or a mask [batch, all tokens]"
            )


@contextmanager
def positions_of(model: nn.Module) -> Iterator[Positions]:
    """Follow the passes of a model, so that vectors are encoded at their positions with a KV cache and with padding.

    Positions come from the model's inputs: `position_ids`, else the attention mask (left padding is not counted, and
    padding itself is at position 0), else the length of the KV cache. Use it for masks that count from the start of
    the context, with contexts that start at the model's first token.

    Args:
        model: a model of transformers, a HookedTransformer (or HookedSAETransformer), or a TransformerBridge.

    Yields:
        A function that returns the positions of the latest pass, [batch token]; `PosmaskSAE.at` accepts it.

    Raises:
        BadSetting: the model is of another kind.
    """
    positions = Positions()
    module, inputs_of = _followed(model)
    signature = inspect.signature(type(module).forward)  # Tools such as nnsight replace the module's own.

    def before_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(module, *args, **kwargs).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        positions._follow(inputs_of(given))

    handle = module.register_forward_pre_hook(before_pass, with_kwargs=True)
    try:
        yield positions
    finally:
        handle.remove()


def _followed(model: nn.Module) -> tuple[nn.Module, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Return the module whose inputs show the positions, and what translates them to names of transformers."""
    original = getattr(model, "original_model", model)  # of a TransformerBridge
    base = getattr(original, "base_model", original)
    if isinstance(base, nn.Module) and "input_ids" in inspect.signature(base.forward).parameters:
        return base, dict
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList) and "past_kv_cache_entry" in inspect.signature(blocks[0].forward).parameters:
        return blocks[0], _of_transformer_lens
    raise BadSetting(
        f"a {type(model).__name__} cannot be followed: give a model of transformers or TransformerLens, or the "
        "positions themselves with `with sae.at(p):`"
    )


def _of_transformer_lens(given: dict[str, Any]) -> dict[str, Any]:
    """The first block of a HookedTransformer is called with the cache and the mask of the whole text."""
    cache = given.get("past_kv_cache_entry")
    return {
        "inputs_embeds": given["resid_pre"],
        "attention_mask": given.get("attention_mask"),
        "past_key_values": None if cache is None else cache.past_keys.shape[1],
    }


def _first(inputs: Mapping[str, Any], *names: str) -> Any:
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def _past_length(cache: Any) -> int | None:
    """The number of tokens in a KV cache; None if it does not state it."""
    if cache is None or isinstance(cache, int):
        return cache or 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # the cache of a model without attention
        return None
