"""Load a causal language model by name: the embedded model, a hub name, a folder or a GGUF file."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from posmask.data.embedded_models import MODELS, embedded_model
from posmask.data.gguf import converted_folder
from posmask.data.pretrained import import_transformers, load_complete
from posmask.data.sites import SINK_NORM, LanguageModel, Site
from posmask.errors import BadSetting, PosmaskError, first_line
from posmask.kernels import devices
from posmask.kernels.runtime import Precision
from posmask.storage.manifest import file_sha256, identity

__all__ = [
    "is_path",
    "layer_number",
    "load_model",
    "load_outline",
    "load_tokenizer",
    "model_folder",
    "vector_size",
    "weights_identity",
]


def model_folder(name: str, *, local_only: bool = False) -> str:
    """Resolve a model's name to what transformers loads: a folder, or a name on the hub.

    Args:
        local_only: download nothing from the hub.

    Returns:
        The folder of the converted weights for the embedded model and for GGUF files, else `name` itself.

    Raises:
        BadSetting: the GGUF file does not exist.
    """
    if (embedded := embedded_model(name)) is not None:
        return str(embedded.folder())
    return str(converted_folder(_gguf_file(name, local_only))) if name.endswith(".gguf") else name


_GGUF_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+):(.+)")  # OWNER/NAME:FILE


def _gguf_file(name: str, local_only: bool) -> Path:
    if Path(name).is_file():
        return Path(name)
    on_hub = _GGUF_ON_HUB.fullmatch(name)
    if on_hub is None:
        raise BadSetting(
            f"GGUF file {name} does not exist: give the path of a file, OWNER/NAME:FILE.gguf on the hub, a folder, or "
            "a name on the hub"
        )
    return _hub_file(*on_hub.groups(), local_only)


@cache
def _hub_file(repo: str, file: str, local_only: bool) -> Path:
    """A file of a hub repository, in the snapshot folder of its commit.

    Cached, so that a process uses one commit throughout, even if the repository changes meanwhile.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, local_files_only=local_only))
    except hub_errors.RemoteEntryNotFoundError:
        raise BadSetting(
            f"{repo} on the hub has no file {file}: choose a model in the format of transformers, or name a GGUF file "
            "of the repository as OWNER/NAME:FILE.gguf"
        ) from None


@devices.memory_for("loading the model", "set model.precision to 'bfloat16', choose a smaller model, or lower --jobs")
def load_model(
    name: str,
    layer: int,
    precision: Precision,
    *,
    site: Site = "residual_after",
    device: str = "cpu",
    sink_norm: float = SINK_NORM,
    local_only: bool = False,
) -> LanguageModel:
    """Load any causal language model that `AutoModelForCausalLM` of transformers loads.

    Args:
        name: of an embedded model (`embedded_models.MODELS`), a name on the hub, a folder, a GGUF file, or a GGUF file
            on the hub (`OWNER/NAME:FILE.gguf`).
        layer: number of the layer to read, from 1.
        precision: of weights and vectors.
        site: see `LanguageModel`.
        device: see `devices.check_device`.
        sink_norm: see `harvest.sinks`.
        local_only: download nothing from the hub.

    Raises:
        BadSetting: the model does not exist (on this machine, with `local_only`), its files lack weights, the layer or
            device does not exist, or posmask cannot read the model (see `LanguageModel`).
    """
    devices.check_device(device)
    with _loading(name, local_only=local_only) as source:
        model = load_complete(
            f"model {name!r}",
            **source,
            dtype=getattr(torch, precision),
            local_files_only=local_only,
            use_safetensors=True,  # A pickle can run code when it is loaded.
            trust_remote_code=False,
        )
    return LanguageModel(model.eval().to(device), layer, site, sink_norm)


def layer_number(name: str, layer: int | float) -> int:
    """The number of a layer that is given by its number, or (a float) as a fraction of the model's depth.

    >>> layer_number("any", 10)
    10

    Raises:
        BadSetting: the depth is needed, and the model does not exist.
    """
    if isinstance(layer, int):
        return layer
    with _loading(name) as source:
        return max(1, round(layer * _config(**source).get_text_config().num_hidden_layers))


def vector_size(name: str) -> int:
    """The size of a model's vectors in the residual stream.

    Raises:
        BadSetting: the model does not exist.
    """
    if (embedded := embedded_model(name)) is not None:
        return embedded.sizes["hidden_size"]
    with _loading(name) as source:
        return _config(**source).get_text_config().hidden_size


def load_outline(
    name: str, layer: int, site: Site = "residual_after", sizes: Mapping[str, Any] | None = None
) -> LanguageModel:
    """Build a model without weights, to read its sizes; it cannot run. Downloads nothing.

    Args:
        name: as in `load_model`.
        layer: number of the layer to read, from 1.
        site: see `LanguageModel`.
        sizes: entries of config.json, including `model_type`, to use instead of the file.

    Raises:
        BadSetting: config.json is not on this machine, or the layer does not exist.
    """
    transformers = import_transformers()
    if (embedded := embedded_model(name)) is not None:
        sizes = embedded.sizes
    try:
        if sizes is not None:
            config = transformers.AutoConfig.for_model(**sizes)
        else:
            config = _config(**_source(name, local_only=True), local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, ImportError):
        raise BadSetting(
            f"model {name!r} has no config.json of a causal language model on this machine, and nothing is downloaded "
            f"for it: give a folder that contains it, or {' or '.join(MODELS)}"
        ) from None
    return LanguageModel(model, layer, site)


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer.

    Args:
        name: as in `load_model`.

    Raises:
        BadSetting: the model does not exist, or has no tokenizer.
    """
    with _loading(name) as source:
        return import_transformers().AutoTokenizer.from_pretrained(**source, trust_remote_code=False)


def weights_identity(name: str) -> str:
    """A string that changes with the model: a checksum of its files, or its name and commit on the hub.

    Of a folder, configuration, weights and tokenizer count; a README, for example, does not.

    Args:
        name: as in `load_model`.

    Raises:
        BadSetting: the model does not exist.
    """
    if (embedded := embedded_model(name)) is not None:
        return identity(embedded.made_from)
    with _loading(name) as source:
        if "revision" in source:
            return f"{name}@{source['revision']}"
        files = sorted(Path(source["pretrained_model_name_or_path"]).iterdir())
        return identity({path.name: file_sha256(path) for path in files if _DECISIVE.fullmatch(path.name)})


_DECISIVE = re.compile(
    r"config\.json|[^.].*\.safetensors(\.index\.json)?"
    r"|(tokenizer|vocab|merges|special_tokens|added_tokens|spiece|sentencepiece)[\w.-]*|[^.].*\.(model|tiktoken)"
)
"""Files of a model's folder that decide its vectors."""


def _config(**options: Any) -> Any:
    return import_transformers().AutoConfig.from_pretrained(trust_remote_code=False, **options)


@contextlib.contextmanager
def _loading(name: str, *, local_only: bool = False) -> Iterator[dict[str, str]]:
    """Yield `_source(name)`; errors of transformers and the hub become one sentence."""
    try:
        yield _source(name, local_only=local_only)
    except (PosmaskError, MemoryError):
        raise
    except Exception as error:  # What transformers raises for a model that it cannot build may be anything.
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise BadSetting(f"model {name!r} cannot be loaded ({_reason(error)}") from error


def is_path(name: str, path: Path | None = None) -> bool:
    """Whether a model's name is a path, and so not a name on the hub.

    `OWNER/NAME` is a path if the folder OWNER exists.

    Args:
        path: where the name leads to, if it is not relative to the current folder.
    """
    starts_like_one = name.startswith(("/", ".", "~"))
    if _GGUF_ON_HUB.fullmatch(name) and not starts_like_one:
        return False
    looks_like_one = starts_like_one or name.endswith("/") or name.count("/") > 1
    return looks_like_one or ("/" in name and (path or Path(name)).parent.is_dir())


def _source(name: str, *, local_only: bool) -> dict[str, str]:
    """Arguments of `from_pretrained`: a folder, or a name on the hub with the commit to load."""
    if is_path(name) and not Path(name).exists():
        siblings = sorted(path.name for path in Path(name).parent.glob("*") if path.is_dir())
        beside = f", and {Path(name).parent} holds {', '.join(siblings[:5])}" if siblings else ""
        raise BadSetting(f"model {name!r} is missing: there is no such folder{beside}; check the path")
    source = {"pretrained_model_name_or_path": model_folder(name, local_only=local_only)}
    folder = Path(source["pretrained_model_name_or_path"])
    if folder.is_dir():
        has_adapter = (folder / _ADAPTER).is_file()
    else:
        try:
            source["revision"] = _hub_file(name, "config.json", local_only).parent.name
        except BadSetting:  # A repository that holds an adapter alone has no config.json.
            if not _has_adapter(name, None, local_only):
                raise
            has_adapter = True
        else:
            has_adapter = _has_adapter(name, source["revision"], local_only)
    if has_adapter:
        raise BadSetting(
            f"model {name!r} holds an adapter ({_ADAPTER}), which posmask does not apply: merge it into its model "
            "(merge_and_unload of peft) and give the merged model, or the model without the adapter"
        )
    return source


_ADAPTER = "adapter_config.json"


@cache
def _has_adapter(repo: str, commit: str | None, local_only: bool) -> bool:
    cached = huggingface_hub.try_to_load_from_cache(repo, _ADAPTER, revision=commit)
    if cached is not None:
        return isinstance(cached, str)  # or the mark of a file that the repository does not have
    try:
        huggingface_hub.hf_hub_download(repo, _ADAPTER, revision=commit, local_files_only=local_only)
    except hub_errors.EntryNotFoundError:
        return False
    return True


def _reason(error: BaseException) -> str:
    """The end of an error message: the cause, a closing parenthesis and the remedy."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for kind, message in _HUB_ERRORS:
        if any(isinstance(cause, kind) for cause in causes):
            return message
    if isinstance(error, ImportError):
        return f"{first_line(error)}): install the package, or choose weights that are not quantized"
    if "backend tokenizer" in str(error):
        return "it has no tokenizer): add tokenizer.json of the model that it was trained from"
    if not isinstance(error, (OSError, ValueError, SafetensorError)):
        return f"{type(error).__name__} in transformers: {first_line(error)}): choose a model of another family"
    return f"{first_line(error)}): give a hub name, a folder, a GGUF file, or {' or '.join(MODELS)}"


_HUB_ERRORS = (
    (
        hub_errors.GatedRepoError,
        "it is gated): accept its terms on its page on the hub, then run `hf auth login` or set HF_TOKEN",
    ),
    (
        hub_errors.RepositoryNotFoundError,
        "no such folder, and the hub has no model of that name that you may read): check the name; for a private model "
        "run `hf auth login` or set HF_TOKEN",
    ),
    (hub_errors.HFValidationError, "no such folder, and names on the hub are OWNER/NAME): check the name"),
    (
        (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError),
        "no such folder, and the hub is unavailable or switched off by HF_HUB_OFFLINE): connect once to download it, "
        "or give a folder that contains it",
    ),
)
