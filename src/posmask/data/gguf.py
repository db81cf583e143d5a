"""Convert GGUF files to folders that transformers loads."""

import contextlib
import io
import struct
from pathlib import Path

import torch

from posmask.data import embedded
from posmask.data.pretrained import import_transformers, load_complete
from posmask.errors import BadSetting, MissingAsset, first_line
from posmask.progress import announce
from posmask.storage.manifest import file_sha256, finished, identity, write_folder

__all__ = ["convert_gguf", "converted_folder"]


def converted_folder(gguf: Path) -> Path:
    """The folder of a GGUF file's model in the cache, converted on first use.

    Raises:
        MissingAsset: the file is damaged.
        BadSetting: it is one part of a split file, or lacks weights.
    """
    made_from = {"gguf": file_sha256(gguf), "converter": 2}  # Converter 1 filled missing tensors with random numbers.
    folder = embedded.cache_folder() / "models" / f"{gguf.stem}-{identity(made_from)}"
    if not finished(folder, made_from):
        announce(f"Converting {gguf}, once per user.")
        with write_folder(folder, made_from) as draft:
            convert_gguf(gguf, draft)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model (as bfloat16 safetensors) and tokenizer into `folder`.

    Takes about 20 seconds for a model of 135 million parameters.

    Raises:
        MissingAsset: the file is damaged.
        BadSetting: it is one part of a split file, or lacks weights.
    """
    transformers = import_transformers()
    try:
        _check_not_split(gguf)
        with contextlib.redirect_stderr(io.StringIO()):  # the only way to hide the progress bar of this conversion
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            options = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            model = load_complete(str(gguf), **options, dtype=torch.bfloat16)
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise MissingAsset(f"{gguf} cannot be read as GGUF ({first_line(error)}): fetch it again") from error
    # The weights are no longer quantized, but transformers refuses to save a model that is marked as quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_not_split(gguf: Path) -> None:
    """Check that a file is not one part of a split model.

    Raises:
        BadSetting: the file holds one part of a model's tensors; transformers reads no others.
    """
    from gguf import GGUFReader  # takes a quarter of a second

    field = GGUFReader(gguf).get_field("split.count")
    if field is not None and (n_parts := field.contents()) > 1:
        raise BadSetting(
            f"{gguf} is one of {n_parts} parts of a split GGUF file, which transformers cannot load: merge them with "
            "`llama-gguf-split --merge FIRST_PART OUTPUT.gguf` and name the result"
        )
