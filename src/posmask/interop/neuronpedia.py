"""Write the latents of a cell as batches of SAEDashboard, which Neuronpedia's converter makes pages from.

Nothing is measured: all numbers are in the cell's folder. Keys are those of SAEDashboard.
Source: sae-dashboard 0.8.0, neuronpedia/neuronpedia_dashboard.py and neuronpedia_converter.py.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from posmask.errors import BadSetting, DamagedFolder, first_line
from posmask.interop.saelens_files import model_name_of
from posmask.interop.sites import hook_name
from posmask.sae.files import read_origin
from posmask.storage.atomic import check_new_folder
from posmask.storage.json_file import read_json
from posmask.storage.layout import LATENT_WORDS_FILE, LATENTS_FILE, WEIGHTS_FILE
from posmask.storage.manifest import file_sha256, read_manifest, write_folder

__all__ = ["NeuronpediaExport", "export_neuronpedia"]

_LATENTS_PER_BATCH = 512
_TOP = -1
"""What SAEDashboard has as the lower end and the share of the bin of a latent's strongest activations."""
_NOT_MEASURED = (
    *(f"neuron_alignment_{part}" for part in ("indices", "values", "l1")),
    *(f"correlated_{kind}_{part}" for kind in ("neurons", "features") for part in ("indices", "l1", "pearson")),
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""Keys that are empty: the cell's folder does not have these numbers, and the weights are exported by `saelens`."""


@dataclass(frozen=True)
class NeuronpediaExport:
    """What was written.

    Attributes:
        model_name: of the model.
        hook: the site in TransformerLens's words.
        n_latents: latents in the batches.
        n_silent: latents that never fired on held-out tokens, which are left out as SAEDashboard does.
        n_contexts: contexts of held-out tokens.
        n_positions: tokens per context.
    """

    model_name: str
    hook: str
    n_latents: int
    n_silent: int
    n_contexts: int
    n_positions: int


def export_neuronpedia(cell: Path, folder: Path, *, model_name: str | None = None) -> NeuronpediaExport:
    """Write the latents of a cell as `batch-N.json`.

    Activations are in the units of the folder that `export_saelens` writes.

    Args:
        cell: folder of the cell.
        folder: folder to write.
        model_name: name of the model in Neuronpedia; None for the name in the SAE's origin.

    Raises:
        BadSetting: the folder exists and is not empty, or model or site are unknown.
        DamagedFolder: the cell has no data of latents, or its files differ from its manifest.
    """
    made_from = read_manifest(cell, verify=True).get("made_from", {})
    origin = read_origin(cell)
    name = model_name or model_name_of(origin)
    if name is None or "layer" not in origin:
        lacking, remedy = ("layer", "export an SAE that a study trained") if name else ("model", "give --model-name")
        raise BadSetting(f"the SAE in {cell} does not state its {lacking}, which Neuronpedia needs: {remedy}")
    hook = hook_name(origin["layer"], origin.get("site", "residual_after"))
    cell_latents = _read(cell)
    firing = np.flatnonzero(cell_latents.arrays["firings"]).tolist()
    shared = {
        "n_prompts_total": cell_latents.n_contexts,
        "n_tokens_in_prompt": cell_latents.n_positions,
        # A dataset on the hub; other texts have no address.
        "dataset": made_from.get("texts", {}).get("own", {}).get("hub", ""),
    }
    batch = {"model_id": name, "layer": int(hook.split(".")[1]), "sae_set": cell.resolve().name, "sae_id_suffix": None}
    check_new_folder(folder)
    facts = {"what": "neuronpedia", "sae": file_sha256(cell / WEIGHTS_FILE), "batch": batch}
    with write_folder(folder, facts) as draft:
        for number, start in enumerate(range(0, len(firing), _LATENTS_PER_BATCH)):
            features = [cell_latents.feature(at) | shared for at in firing[start : start + _LATENTS_PER_BATCH]]
            text = json.dumps(batch | {"features": features}, allow_nan=False)
            (draft / f"batch-{number}.json").write_text(text, encoding="utf8")
    n_silent = len(cell_latents.arrays["firings"]) - len(firing)
    return NeuronpediaExport(name, hook, len(firing), n_silent, cell_latents.n_contexts, cell_latents.n_positions)


def _read(cell: Path) -> "_Latents":
    """Read the data of a cell's latents.

    Raises:
        DamagedFolder: they are missing or unreadable.
    """
    try:
        about = read_json(cell / LATENT_WORDS_FILE)
        with safe_open(cell / WEIGHTS_FILE, framework="pt") as weights:
            scale = float(weights.get_tensor("scale"))
        arrays = load_file(cell / LATENTS_FILE)
        missing = {"histogram", "text_peak", "tokens_by_position"} - arrays.keys()
        if missing:
            raise ValueError(f"they lack {', '.join(sorted(missing))}, as in earlier versions")
        latents = _Latents(arrays, about, scale)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedFolder(
            f"{cell} has no data of latents to export ({first_line(error)}): `posmask run` writes them for each cell"
        ) from None
    return latents


class _Latents:
    """What a cell's folder has of its latents.

    Args:
        arrays: of `latents.safetensors`.
        about: `latents.json`.
        scale: factor of activations.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], scale: float) -> None:
        self.arrays, self._scale = arrays, scale
        self._words = {int(token): word for token, word in about["words"].items()}
        self._n_tokens, self._n_strongest = int(about["n_tokens"]), int(about["excerpts"]["strongest"])

    @property
    def n_positions(self) -> int:
        """Tokens per context, with BOS."""
        return len(self.arrays["tokens_by_position"])

    @property
    def n_contexts(self) -> int:
        """Contexts of held-out tokens: as many as have a kept token at the position where most have one."""
        return int(self.arrays["tokens_by_position"].max())

    def feature(self, latent: int) -> dict[str, Any]:
        """A latent as SAEDashboard describes it, without what all latents share."""
        arrays = self.arrays
        heights = arrays["histogram"][latent]
        edges = np.linspace(0, float(arrays["largest"][latent]) * self._scale, len(heights) + 1)
        values: dict[str, Any] = {name: [] for name in _NOT_MEASURED}
        for name, effect in (("pos", "promoted"), ("neg", "suppressed")):
            values[f"{name}_str"] = [self._words[token] for token in arrays[effect][latent].tolist()]
            values[f"{name}_values"] = _rounded(arrays[f"{effect}_logit"][latent])
        return values | {
            "feature_index": latent,
            "frac_nonzero": float(arrays["firings"][latent]) / self._n_tokens,
            "freq_hist_data_bar_heights": heights.tolist(),
            "freq_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
            "activations": list(self._activations(latent, heights / max(1, heights.sum()), edges)),
        }

    def _activations(self, latent: int, shares: np.ndarray, edges: np.ndarray) -> Iterator[dict[str, Any]]:
        """The excerpts: the strongest, then those at quantiles and by position, in the bin of their marked token."""
        arrays, ends = self.arrays, _rounded(edges)
        columns = (arrays[f"text_{part}"][latent] for part in ("start", "length", "peak", "value"))
        for number, (start, length, peak, shown) in enumerate(zip(*columns, strict=True)):
            if start < 0:
                continue
            values = shown[:length] / 255 * edges[-1]
            bin = min(len(shares) - 1, int(np.searchsorted(edges, values[peak], side="left")) - 1)
            is_strongest = number < self._n_strongest
            yield {
                "bin_min": _TOP if is_strongest else ends[bin],
                "bin_max": ends[-1] if is_strongest else ends[bin + 1],
                "bin_contains": _TOP if is_strongest else float(shares[bin]),
                "tokens": [self._words[token] for token in arrays["token_id"][start : start + length].tolist()],
                "values": _rounded(values),
                "qualifying_token_index": int(peak),
            }


def _rounded(values: np.ndarray) -> list[float]:
    """Numbers with four significant digits; activations in excerpts are known to 1/255 of a latent's largest."""
    return [float(f"{value:.4g}") for value in values.tolist()]
