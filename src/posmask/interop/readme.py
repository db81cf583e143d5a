"""Texts about an exported SAE, for its folder's README.md and for the card on the hub, from its cfg.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from posmask.interop.fidelity import Fidelity

__all__ = ["IMPORT_LINE", "folder_readme", "positions_text"]

IMPORT_LINE = "import posmask.interop.saelens"


def folder_readme(cfg: Mapping[str, Any]) -> str:
    """The README.md of an exported folder: how to load it, and what its codes are."""
    return "\n".join((*_loading(cfg), "", positions_text(cfg))) + "\n"


def _loading(cfg: Mapping[str, Any]) -> Iterator[str]:
    metadata = cfg["metadata"]
    of_model = f" of {metadata['model_name']}" if "model_name" in metadata else ""
    site = f" at {metadata['hook_name']}" if "hook_name" in metadata else ""
    yield f"# Sparse autoencoder{of_model}{site}"
    yield ""
    if "posmask_lossy" in metadata:
        yield f"Written by posmask as SAELens's architecture `{cfg['architecture']}`: SAELens loads it without posmask."
        imports = ()
    else:
        yield "Token positions gate the latents of this sparse autoencoder. SAELens loads it after"
        yield f"`pip install 'posmask[saelens]'` and `{IMPORT_LINE}`, which registers the architecture `posmask`."
        imports = (IMPORT_LINE,)
    yield from ("", "```python", *imports, "from sae_lens import SAE", "")
    yield from ('sae = SAE.load_from_disk(".")  # this folder', "```", "")
    scale = f"codes are {metadata['posmask_scale']:.6g} times those of posmask"
    yield f"Vectors are in the model's units, decoder rows have norm 1, and {scale}."


def positions_text(cfg: Mapping[str, Any]) -> str:
    """What positions an exported SAE uses, with its explained variance where positions are fixed."""
    metadata = cfg["metadata"]
    if "posmask_lossy" in metadata:
        return f"Lost: {metadata['posmask_lossy']}.{_fidelity(metadata)}"
    shape = "Positions are 0, 1, .. along the second-to-last axis of [batch, position, d_model]"
    if cfg["unknown_position"] is None:
        return f"{shape}. If they are others, pass them: `sae.encode(x, positions=p)`, or `with sae.at(p):`."
    return (
        f"{shape}, or as given (`sae.encode(x, positions=p)`, `with sae.at(p):`). Vectors whose position is unknown "
        f"are encoded at position {cfg['unknown_position']}.{_fidelity(metadata)}"
    )


def _fidelity(metadata: Mapping[str, Any]) -> str:
    if "posmask_explained_variance" not in metadata:
        return ""  # Codes do not depend on positions.
    measured = metadata["posmask_explained_variance"]
    if measured is None:
        return " Explained variance at that position is not measured: the cell's run folder has no held-out vectors."
    return f" {Fidelity(**measured).sentence()}"
