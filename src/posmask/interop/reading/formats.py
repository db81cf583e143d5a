"""The formats of SAEs that posmask reads: their files, their readers, and SAELens's names for them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from posmask.interop.reading.checkpoints import NAMED_FILE, QWEN_SCOPE_FILE, read_named_file, read_qwen_scope
from posmask.interop.reading.dictionary_learning import read_dictionary_learning
from posmask.interop.reading.form import Form
from posmask.interop.reading.gemma_scope import (
    GEMMA_SCOPE_2_FILE,
    GEMMA_SCOPE_FILE,
    check_names,
    check_names_2,
    read_gemma_scope,
    read_gemma_scope_2,
)
from posmask.interop.reading.llama_scope import read_llama_scope, read_llama_scope_r1
from posmask.interop.reading.saelens import read_saelens
from posmask.interop.reading.sparsify import SPARSIFY_FILE, read_sparsify
from posmask.interop.saelens_files import CFG_FILE, SAELENS_WEIGHTS_FILE
from posmask.interop.weights import PICKLES

__all__ = ["FORMATS", "UNREADABLE_CONVERSIONS", "Format", "Has", "folder_of", "recognized"]

Has = Callable[[str], bool]
"""Whether a file is there, by its path with slashes."""


class Reader(Protocol):
    """Read the SAE in a folder, or in the one file of its format."""

    def __call__(self, path: Path, *, allow_pickle: bool) -> Form: ...


@dataclass(frozen=True)
class Format:
    """A layout of files.

    Attributes:
        name: for people.
        conversions: SAELens's names of its loaders for this format; None is its name of its own format.
        read: the reader.
        files: files of the SAE's folder, which identify the format; the last holds the weights.
        more_files: files that are read if they are there, relative to the folder.
        one_file: regular expression of the name of the one file that is the SAE, for formats without a folder.
        check_names: raises `BadSetting` if the names of an SAE's folders, innermost first, say that it cannot be read.
    """

    name: str
    conversions: tuple[str | None, ...]
    read: Reader
    files: tuple[str, ...] = ()
    more_files: tuple[str, ...] = ()
    one_file: str = ""
    check_names: Callable[[Sequence[str]], object] = tuple

    @property
    def is_pickled(self) -> bool:
        """Whether the weights are pickled."""
        return bool(self.one_file) or self.files[-1].endswith(PICKLES)

    def files_of(self, path: str, has: Has) -> list[str]:
        """The files to read of an SAE of this format, by their paths."""
        if self.one_file:
            return [path]
        more = [_joined(path, name) for name in self.more_files]
        return [*(_joined(path, name) for name in self.files), *filter(has, more)]


FORMATS = (
    Format("SAELens", (None,), read_saelens, (CFG_FILE, SAELENS_WEIGHTS_FILE), ("activation_scaler.json",)),
    Format("sparsify", ("sparsify",), read_sparsify, (CFG_FILE, SPARSIFY_FILE), ("../config.json",)),
    Format("GemmaScope", ("gemma_2",), read_gemma_scope, (GEMMA_SCOPE_FILE,), check_names=check_names),
    Format(
        "Gemma Scope 2",
        ("gemma_3",),
        read_gemma_scope_2,
        (GEMMA_SCOPE_2_FILE,),
        ("config.json",),
        check_names=check_names_2,
    ),
    Format("Llama Scope", ("llama_scope",), read_llama_scope, ("hyperparams.json", "checkpoints/final.safetensors")),
    Format("Llama Scope R1", ("llama_scope_r1_distill",), read_llama_scope_r1, ("config.json", SAELENS_WEIGHTS_FILE)),
    Format("dictionary_learning", ("dictionary_learning_1",), read_dictionary_learning, ("config.json", "ae.pt")),
    Format("Qwen Scope", ("qwen_scope",), read_qwen_scope, one_file=QWEN_SCOPE_FILE),
    Format("Goodfire, qresearch", ("goodfire", "deepseek_r1"), read_named_file, one_file=NAMED_FILE),
)
UNREADABLE_CONVERSIONS = {
    "gemma_2_transcoder": "transcoders",
    "mwhanna_transcoder": "transcoders",
    "mntss_clt_layer_transcoder": "cross-layer transcoders",
    "connor_rob_hook_z": "SAEs of attention heads before they are joined (hook_z)",
    "temporal": "SAEs whose codes depend on earlier tokens by attention",
}
"""SAELens's names of loaders for what posmask does not read, and what that is."""


def recognized(path: str, has: Has) -> Format | None:
    """The format of the SAE at a path, in a folder or in a file; None if it is of none."""
    name = PurePosixPath(path).name
    for format in FORMATS:
        if format.one_file:
            if re.fullmatch(format.one_file, name) and has(path):
                return format
        elif all(has(_joined(path, file)) for file in format.files):
            return format
    return None


def folder_of(path: str) -> str:
    """The folder of an SAE that is named by one of its files; other paths stay."""
    for format in FORMATS:
        for file in format.files:
            if path == file or path.endswith(f"/{file}"):
                return path.removesuffix(file).rstrip("/") or ("/" if path.startswith("/") else "")
    return path


def _joined(folder: str, name: str) -> str:
    while name.startswith("../"):
        folder, name = folder.rpartition("/")[0], name.removeprefix("../")
    return f"{folder}/{name}" if folder else name
