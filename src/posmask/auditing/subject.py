"""The SAE of an audit: read from wherever it is, with its name, model, site and context length."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting
from posmask.interop import reading
from posmask.interop.sites import layer_and_site
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae
from posmask.storage.layout import SAE_FILE

__all__ = ["Subject", "hub_model", "named_saes", "read_subject"]


@dataclass(frozen=True)
class Subject:
    """An SAE to audit.

    Attributes:
        name: of its folder of results.
        sae: on the CPU.
        origin: what is known of its training, as in `write_sae`.
    """

    name: str
    sae: SparseAutoencoder
    origin: dict[str, Any]

    @property
    def model(self) -> str | None:
        """The model's name on the hub, or the embedded model; None if its files do not state it."""
        return hub_model(self.origin["model"]) if "model" in self.origin else None

    @property
    def site(self) -> tuple[int, str] | None:
        """Layer and site; None if its files do not state them."""
        return (self.origin["layer"], self.origin["site"]) if "layer" in self.origin else None

    def sha256(self) -> str:
        """A checksum of the SAE's tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.sae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def named_saes(words: Sequence[str]) -> list[str]:
    """The SAEs that the words of a command line name: paths and names with a prefix, or a release and an id.

    Raises:
        BadSetting: a release has no id after it.
    """
    sources, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith(("hf:", reading.SAELENS_PREFIX)) or Path(word).exists() or word.startswith((".", "/", "~")):
            sources.append(word)
        elif rest and not Path(rest[0]).exists():
            sources.append(f"{reading.SAELENS_PREFIX}{word}/{rest.pop(0)}")
        else:
            raise BadSetting(
                f"{word!r} is neither a path nor followed by the id of an SAE: give a folder or file, hf:USER/NAME, "
                "or a release of SAELens's list and an id, such as gemma-scope-2b-pt-res layer_12/width_16k/canonical"
            )
    return sources


def read_subject(
    source: Any,
    *,
    context: int | None = None,
    model: str | None = None,
    hook: str | None = None,
    allow_pickle: bool = False,
) -> Subject:
    """Read the SAE of an audit.

    Args:
        source: a name as in `interop.reading.read_external`, the folder of a cell or of an import, or a loaded SAE of
            posmask or SAELens.
        context: tokens per context; None for the length that its files state.
        model: the model; None for the one that its files state.
        hook: the site in TransformerLens's words; None for the one that its files state.
        allow_pickle: read pickled weights (.pt), in a process with limited memory.

    Raises:
        BadSetting: it is not an SAE that posmask reads, or its context length is unknown.
        DamagedFolder: files are missing or damaged.
    """
    if isinstance(source, SparseAutoencoder):
        sae, origin, name = source, {}, "sae"
    elif not isinstance(source, str | Path):
        sae, origin = reading.read_external(source, n_positions=context, model_name=model, hook_name=hook)
        name = str(origin.get("metadata", {}).get("neuronpedia_id") or "sae")
    elif (Path(source) / SAE_FILE).is_file():
        path = Path(source)
        sae, origin, name = read_sae(path, verify=True), read_origin(path), path.resolve().name
    else:
        sae, origin = reading.read_external(
            source, n_positions=context, model_name=model, hook_name=hook, allow_pickle=allow_pickle
        )
        plain = Path(source).resolve().as_posix() if Path(source).exists() else re.sub("^[a-z]+:", "", str(source))
        name = "-".join(plain.split("/")[-2:])
    if model is not None:
        origin = {**origin, "model": model}
    if hook is not None:
        origin["layer"], origin["site"] = layer_and_site(hook, origin.get("model"))
    if context is not None and context != sae.mask.n_positions:
        raise BadSetting(
            f"--context {context} is not the {sae.mask.n_positions} positions of {source}: leave it out; an SAE of "
            "posmask states its context"
        )
    return Subject(re.sub(r"[^\w.-]+", "-", name)[-80:].strip("-.") or "sae", sae, dict(origin))


_OWNERS = (
    (r"gpt2-small", "openai-community/gpt2"),
    (r"gpt2(-medium|-large|-xl)?", r"openai-community/\g<0>"),
    (r"gemma-.*", r"google/\g<0>"),
    (r"pythia-.*", r"EleutherAI/\g<0>"),
    (r"(Meta-)?Llama-.*", r"meta-llama/\g<0>"),
    (r"mistral-7b", "mistralai/Mistral-7B-v0.1"),
    (r"Qwen.*", r"Qwen/\g<0>"),
    (r"SmolLM2?-.*", r"HuggingFaceTB/\g<0>"),
)


def hub_model(name: str) -> str:
    """The name on the hub of a model of TransformerLens; other names stay as they are.

    >>> hub_model("gpt2-small"), hub_model("gemma-2-2b"), hub_model("me/my-model")
    ('openai-community/gpt2', 'google/gemma-2-2b', 'me/my-model')
    """
    for pattern, replacement in _OWNERS:
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            return match.expand(replacement)
    return name
