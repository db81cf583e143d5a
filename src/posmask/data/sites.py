"""Run a causal language model up to a site, or continue from replaced vectors at the site."""

import contextlib
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.kernels.runtime import fast_float32

__all__ = ["LanguageModel", "Site"]

Site = Literal["residual_after", "residual_before", "attention", "mlp"]


class LanguageModel:
    """A loaded model that reads vectors at one site and continues from replaced vectors there.

    Independent of model families: the layers are the decoder's only list of that length, and the sublayers of a layer
    are the two modules whose outputs add up to its effect (see `_sublayers`).

    Args:
        model: of transformers.
        layer: number of the layer, from 1.
        site: where in the layer. `residual_after`: the residual stream after the layer, `hidden_states[layer]` of
            transformers and `blocks.{layer - 1}.hook_resid_post` of TransformerLens; after the last layer it is taken
            before the final norm, unlike in `hidden_states`. `residual_before`: the residual stream before the layer,
            `hidden_states[layer - 1]`. `attention`, `mlp`: the sublayer's contribution to the residual stream, after a
            norm that follows the sublayer.

    Raises:
        BadSetting: the layer does not exist, or the decoder does not have its layers in one list.
    """

    def __init__(self, model: Any, layer: int, site: Site = "residual_after") -> None:
        self._model = model
        self._body = model.get_decoder()  # without the head, which costs as much as several layers
        self._config = model.config.get_text_config()
        layers = _decoder_layers(self._body, self._config.num_hidden_layers)
        if not 1 <= layer <= len(layers):
            raise BadSetting(
                f"layer = {layer} does not exist: the model has {len(layers)} layers, choose 1 to {len(layers)}"
            )
        self.layer = layer
        self.site: Site = site
        self.d_model = int(self._config.hidden_size)
        self._longest = getattr(self._config, "max_position_embeddings", None)
        self._caught: Tensor | None = None
        self._replacement: Tensor | None = None
        self._layer = layers[layer - 1]
        self._below = list(layers)[: layer - (site == "residual_before")]
        # Replaced vectors of a sublayer do not replace the residual stream, so the layers below still have to run.
        self._skipped = self._below if site.startswith("residual") else []
        self._is_hooked = site.startswith("residual")
        if site == "residual_after":
            self._layer.register_forward_hook(self._at_output)
        elif site == "residual_before":
            self._layer.register_forward_pre_hook(self._at_input, with_kwargs=True)

    def _at_output(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._at_site(output[0]), *output[1:])
        return self._at_site(output)

    def _at_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (self._at_site(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._at_site(kwargs["hidden_states"])}

    def _at_site(self, vectors: Tensor) -> Tensor:
        if self._replacement is not None:
            return self._replacement.to(vectors.dtype)
        self._caught = vectors
        raise _Stop

    def _hook_sublayer(self, ids: Int[Tensor, "context position"]) -> None:
        if not self._is_hooked:
            attention, mlp = _sublayers(self._body, self._layer, ids[:1])
            (attention if self.site == "attention" else mlp).register_forward_hook(self._at_output)
            self._is_hooked = True

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(self._body.parameters()).device

    @torch.no_grad()
    def direct_logits(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocabulary"]:
        """The logits that the final norm and head give to directions, minus the logits of a vector of zeros."""
        sizes = [self.d_model]
        norms = [
            child
            for child in self._body.children()
            if [list(parameter.shape) for parameter in child.parameters()][:1] == [sizes]
        ]
        head = self._model.get_output_embeddings()
        inputs = torch.cat([torch.zeros_like(rows[:1]), rows]).to(head.weight)
        for norm in norms[-1:]:  # Some models have no final norm.
            inputs = norm(inputs)
        with fast_float32(inputs.device):
            logits = head(inputs).float()
        return logits[1:] - logits[:1]

    @property
    def n_vocabulary(self) -> int:
        """Number of token ids in the model's vocabulary."""
        return int(self._config.vocab_size)

    def n_parameters(self) -> tuple[int, int]:
        """Parameters that multiply a token's vector up to the site, and from the site to the logits.

        Embeddings are looked up and do not count.
        """
        below, skipped = (
            sum(parameter.numel() for block in blocks for parameter in block.parameters())
            for blocks in (self._below, self._skipped)
        )
        total = sum(parameter.numel() for parameter in self._body.parameters())
        head = self._model.get_output_embeddings()
        above = total - skipped - self._body.get_input_embeddings().weight.numel()
        return below, above + (0 if head is None else head.weight.numel())

    def check_length(self, n_positions: int) -> None:
        """Raise an error if contexts of `n_positions` tokens are longer than the model supports.

        Raises:
            BadSetting: they are longer than the configuration's `max_position_embeddings`.
        """
        if self._longest is not None and n_positions > self._longest:
            raise BadSetting(
                f"n_positions = {n_positions} is more than the {self._longest} positions of the model: lower it"
            )

    @torch.inference_mode()
    def vectors(self, ids: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """The vectors at the site, in the model's precision and on its device.

        Later positions do not affect earlier ones.

        Args:
            ids: token ids, without padding on the left.

        Raises:
            BadSetting: the site is a sublayer, and the layer is not the sum of its input and two of its parts.
        """
        ids = ids.to(self.device)
        with contextlib.suppress(_Stop), fast_float32(self.device):
            self._hook_sublayer(ids)
            self._body(input_ids=ids, use_cache=False)
        assert self._caught is not None
        caught, self._caught = self._caught, None
        return caught

    @torch.inference_mode()
    def logits(
        self, ids: Int[Tensor, "context position"], vectors: Float[Tensor, "context position d_model"]
    ) -> Float[Tensor, "context position vocabulary"]:
        """Next-token logits with `vectors` in place of the vectors at the site, on the model's device.

        If the site is the residual stream, the layers below it do not run.

        Raises:
            BadSetting: as `vectors`.
        """
        ids = ids.to(self.device)
        with fast_float32(self.device):
            self._hook_sublayer(ids)
            self._replacement = vectors.to(self.device)
            for block in self._skipped:
                block.forward = _pass_on
            try:
                return self._model(input_ids=ids, use_cache=False).logits
            finally:
                self._replacement = None
                for block in self._skipped:
                    del block.forward  # removes the instance attribute, so that the class's method applies again


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


class _Stop(Exception):
    """Raised by a hook to stop the forward pass after the site."""


def _decoder_layers(body: nn.Module, n_layers: int) -> nn.ModuleList:
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child) == n_layers]
    if len(lists) != 1:
        raise BadSetting(f"{type(body).__name__} does not hold its {n_layers} layers in one list: not supported")
    return lists[0]


def _sublayers(body: nn.Module, layer: nn.Module, ids: Int[Tensor, "context position"]) -> tuple[nn.Module, nn.Module]:
    """(attention, MLP) of a layer: the two modules whose outputs add up to the layer's output minus its input.

    If norms follow the sublayers, the modules are these norms. Attention runs before the MLP in all known families.

    Raises:
        BadSetting: no two modules add up, for example because a sublayer adds the residual stream itself.
    """
    stream: list[Tensor] = []
    parts: list[tuple[nn.Module, Tensor]] = []

    def at_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream.append(args[0] if args else kwargs["hidden_states"])

    def at_output(module: nn.Module, inputs: Any, output: Any) -> None:
        vectors = output[0] if isinstance(output, tuple) else output
        if module is layer:
            stream.append(vectors)
            raise _Stop
        if isinstance(vectors, Tensor) and vectors.shape == stream[0].shape:
            parts.append((module, vectors))

    hooks = [layer.register_forward_pre_hook(at_input, with_kwargs=True)]
    hooks += [module.register_forward_hook(at_output) for module in (layer, *layer.children())]
    with contextlib.suppress(_Stop):
        body(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    before, after = (vectors.float() for vectors in stream)
    added = after - before
    misses = {
        (i, j): float((parts[i][1].float() + parts[j][1].float() - added).norm() / added.norm())
        for i in range(len(parts))
        for j in range(i + 1, len(parts))
    }
    best = min(misses, key=misses.__getitem__, default=None)
    if best is None or not misses[best] < _MAX_MISS:
        raise BadSetting(
            f"{type(layer).__name__} is not the sum of its input and of two of its parts, so posmask cannot identify "
            "its sublayers: read residual_after or residual_before"
        )
    return parts[best[0]][0], parts[best[1]][0]


# The stream's norm may far exceed that of a layer's contribution, and rounding errors scale with the stream. Wrong
# parts miss by about 1.
_MAX_MISS = 0.2
