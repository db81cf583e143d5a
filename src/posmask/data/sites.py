"""Run a causal language model up to a site, or continue from replaced vectors at the site.

A model is checked when it is opened: with its own vectors in place of its own vectors it must compute its own logits.
So a family that posmask does not know works or is refused, before anything is harvested.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.kernels.runtime import fast_float32
from posmask.seeds import generator

__all__ = ["SINK_NORM", "LanguageModel", "Site"]

Site = Literal["residual_after", "residual_before", "attention", "mlp"]
SINK_NORM = 10.0
"""The default multiple of the median norm above which a vector belongs to an attention sink."""


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
        sink_norm: see `harvest.sinks`.

    Raises:
        BadSetting: the layer does not exist, or the model fails a check (see `_check`). A model without weights, which
            cannot run, is not checked.
    """

    def __init__(self, model: Any, layer: int, site: Site = "residual_after", sink_norm: float = SINK_NORM) -> None:
        self._model = model
        with _refused(f"{type(model).__name__} has no decoder that posmask can read"):
            self._body = model.get_decoder()  # without the head, which costs as much as several layers
            self._config = model.config.get_text_config()
            layers = _decoder_layers(model, self._body, self._config.num_hidden_layers)
            self.d_model = int(self._config.hidden_size)
        if not 1 <= layer <= len(layers):
            raise BadSetting(
                f"layer = {layer} does not exist: the model has {len(layers)} layers, choose 1 to {len(layers)}"
            )
        self.layer = layer
        self.site: Site = site
        self.sink_norm = sink_norm
        self._longest = getattr(self._config, "max_position_embeddings", None)
        self._hooked: nn.Module = layers[layer - 1]
        self._below = list(layers)[: layer - (site == "residual_before")]
        # Replaced vectors of a sublayer do not replace the residual stream, so the layers below still have to run.
        self._skipped = self._below if site.startswith("residual") else []
        if self.device.type == "meta":
            return
        self._top = self if layer == len(layers) and site == "residual_after" else LanguageModel(model, len(layers))
        ids = self._random_ids()
        with torch.inference_mode(), fast_float32(self.device):
            if not site.startswith("residual"):
                with _refused(f"{type(model).__name__} cannot run on token ids alone"):
                    attention, mlp = _sublayers(self._body, self._hooked, ids[:1])
                self._hooked = attention if site == "attention" else mlp
            self._check(ids)

    def _random_ids(self) -> Int[Tensor, "context position"]:
        """Two short contexts from the middle of the vocabulary: ids at its ends may stand for images or padding."""
        n = self.n_vocabulary
        return torch.randint(n // 4, n // 2, (2, 8), generator=generator(0, "self-check")).to(self.device)

    def _check(self, ids: Int[Tensor, "context position"]) -> None:
        """Compare what the model computes with what it computes from its own vectors at the site.

        Without the layers below the site first; they run if the layers above need more of them than the stream.

        Raises:
            BadSetting: the model cannot run on token ids alone, vectors depend on later tokens or have another shape,
                or replacing the vectors gives other logits or has no effect.
        """
        name, later = type(self._model).__name__, ids.clone()
        later[:, -1] += 1
        where = f"{self.site} of layer {self.layer} of {name}"
        with _refused(f"{name} cannot run on token ids alone"):
            expected = self._model(input_ids=ids, use_cache=False).logits
            vectors, moved = self._read(ids), self._read(later)
        if vectors.shape != (shape := (*ids.shape, self.d_model)):
            raise BadSetting(
                f"{where} has vectors of shape {list(vectors.shape)} instead of {list(shape)}, not one residual "
                f"stream: {_OTHER}"
            )
        if (change := _distance(moved[:, :-1], vectors[:, :-1])) > _MAX_DISTANCE:
            raise BadSetting(
                f"{name} is not causal: vectors change by {change:.2g} of their norm with a later token: choose a "
                "decoder"
            )
        if self._skipped and not self._round_trip(ids, vectors, expected) <= _MAX_DISTANCE:
            self._skipped = []
        with _refused(f"{where} cannot be replaced"):
            distance = _distance(self.logits(ids, vectors), expected)
            effect = _distance(self.logits(ids, -vectors), expected)
        if not distance <= _MAX_DISTANCE:
            raise BadSetting(
                f"{where} does not determine what follows: its own vectors give logits that differ by {distance:.2g} "
                f"of their norm: {_OTHER}"
            )
        if not effect > 0:
            raise BadSetting(f"{where} has no effect on the logits: {_OTHER}")

    def _round_trip(self, ids: Tensor, vectors: Tensor, expected: Tensor) -> float:
        try:
            return _distance(self.logits(ids, vectors), expected)
        except Exception:  # A layer above may not find what one below should have left.
            return math.inf

    @contextlib.contextmanager
    def _at_site(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the block the model goes on with what `change` makes of the vectors at the site."""

        def at_output(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, (tuple, list)):
                return type(output)([change(output[0]), *output[1:]])
            return change(output)

        def at_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        if self.site == "residual_before":
            hook = self._hooked.register_forward_pre_hook(at_input, with_kwargs=True)
        else:
            hook = self._hooked.register_forward_hook(at_output)
        try:
            yield
        finally:
            hook.remove()

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(self._body.parameters()).device

    def direct_logits(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocabulary"]:
        """The logits that the model computes from directions after its last layer, minus those from zeros.

        They include all that follows the layers: final norm, projections, head, scaling, soft-capping.
        """
        inputs = torch.cat([torch.zeros_like(rows[:1]), rows])[:, None]
        ids = self._random_ids()[0, :1].expand(len(inputs), 1)
        logits = self._top.logits(ids, inputs)[:, 0].float()
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

    def check_ids(self, ids: Int[Tensor, "context position"]) -> None:
        """Raise an error if the model's embedding lacks token ids.

        Raises:
            BadSetting: an id is not below the number of its rows.
        """
        n_rows = len(self._model.get_input_embeddings().weight)
        if (largest := int(ids.max())) >= n_rows:
            raise BadSetting(
                f"the tokenizer gave the id {largest}, but the model's embedding has {n_rows} rows: take tokenizer and "
                "model from the same source"
            )

    @torch.inference_mode()
    def vectors(self, ids: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """The vectors at the site, in the model's precision and on its device.

        Later positions do not affect earlier ones.

        Args:
            ids: token ids, without padding on the left.
        """
        return self._read(ids)

    def _read(self, ids: Tensor) -> Tensor:
        """The vectors at the site, of whatever shape."""
        caught: list[Tensor] = []

        def catch(vectors: Tensor) -> Tensor:
            caught.append(vectors)
            raise _Stop

        with contextlib.suppress(_Stop), fast_float32(self.device), self._at_site(catch):
            self._body(input_ids=ids.to(self.device), use_cache=False)
        return caught[0]

    @torch.inference_mode()
    def logits(
        self, ids: Int[Tensor, "context position"], vectors: Float[Tensor, "context position d_model"]
    ) -> Float[Tensor, "context position vocabulary"]:
        """Next-token logits with `vectors` in place of the vectors at the site, on the model's device.

        If the site is the residual stream, the layers below it do not run, unless those above need more of them.
        """

        def replaced(there: Tensor) -> Tensor:
            return vectors.to(there, copy=True)  # A layer may add to its input in place.

        with fast_float32(self.device), self._at_site(replaced):
            for block in self._skipped:
                block.forward = _pass_on
            try:
                return self._model(input_ids=ids.to(self.device), use_cache=False).logits
            finally:
                for block in self._skipped:
                    del block.forward  # removes the instance attribute, so that the class's method applies again


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


class _Stop(Exception):
    """Raised by a hook to stop the forward pass after the site."""


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Errors of a model that does not fit become one sentence; lack of memory stays what it is."""
    try:
        yield
    except (BadSetting, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadSetting(f"{what} ({type(error).__name__}: {reason}): {_OTHER}") from error


def _distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of the expected values."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


_OTHER = "choose another site, layer or model"
_MAX_DISTANCE = 0.01  # rounding in bfloat16; what is wrong differs by far more


def _decoder_layers(model: nn.Module, body: nn.Module, n_layers: int) -> nn.ModuleList:
    def lists_in(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.ModuleList]:
        lists: dict[str, nn.ModuleList] = {}
        for name, module in modules:
            is_inside = any(name.startswith(f"{outer}.") for outer in lists)  # such as the experts of a layer
            if isinstance(module, nn.ModuleList) and len(module) == n_layers and not is_inside:
                lists[name] = module
        return lists

    lists = lists_in(body.named_children()) or lists_in(body.named_modules())
    if len(lists) != 1:
        raise BadSetting(
            f"{type(model).__name__} does not hold its {n_layers} layers in one list, so posmask cannot read it: "
            "choose another model"
        )
    return next(iter(lists.values()))


def _sublayers(body: nn.Module, layer: nn.Module, ids: Int[Tensor, "context position"]) -> tuple[nn.Module, nn.Module]:
    """(attention, MLP) of a layer: the two modules whose outputs add up to the layer's output minus its input.

    If norms follow the sublayers, the modules are these norms. Attention runs before the MLP in all known families.

    Raises:
        BadSetting: no two modules add up, for example because a sublayer adds the residual stream itself.
    """
    stream: list[Tensor] = []
    parts: list[tuple[nn.Module, Tensor]] = []

    def at_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream.append((args[0] if args else kwargs["hidden_states"]).clone())  # Layers may add to it in place.

    def at_output(module: nn.Module, inputs: Any, output: Any) -> None:
        vectors = output[0] if isinstance(output, (tuple, list)) else output
        if module is layer:
            stream.append(vectors)
            raise _Stop
        if isinstance(vectors, Tensor) and vectors.shape == stream[0].shape:
            parts.append((module, vectors.clone()))

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
