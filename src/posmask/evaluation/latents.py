"""Data of the latent browser: where each latent fires, its strongest texts, its vocabulary effects and its probes.

Collected during the evaluation of a trained SAE from the codes that the evaluation computes, and written beside its
rows: `latents.safetensors` (arrays with one column or row per latent), `latents.json` (names of probes, texts of
tokens), `latents.parquet` (the table of latents) and `profiles.parquet` (where each of them fires).
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor

from posmask.data.activations import Batch
from posmask.data.sites import LanguageModel
from posmask.evaluation.latent_table import LatentTable, write_tables
from posmask.evaluation.retention import PositionMass
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.storage.layout import LATENT_TABLE_FILE, LATENT_WORDS_FILE, LATENTS_FILE, PROFILES_FILE

__all__ = ["LATENTS_FILE", "LATENT_WORDS_FILE", "LatentFacts", "Strongest", "strongest_texts", "vocabulary_effects"]

N_TEXTS = 6
N_BEFORE, N_AFTER = 15, 8  # tokens shown around the strongest one
N_WORDS = 10
MOST_TOKENS = 200_000
MOST_CODES = 16_000_000  # 200 MB while they are gathered
MOST_PROBED = 20  # Larger probes are not recorded, because each of their latents contributes little.
_LATENTS_AT_ONCE = 256
_PROBE_ARRAYS = ("probe_latent", "probe_weight")


@dataclass(frozen=True)
class Strongest:
    """The strongest excerpts of each latent, strongest first, at most one per held-out text.

    Args:
        start: [latent text] index of the first token shown; -1 if the latent has fewer texts.
        length: [latent text] number of tokens shown.
        value: [latent text token] activation on these tokens, as 0 .. 255 of `largest`.
        largest: [latent] largest activation.
    """

    start: np.ndarray
    length: np.ndarray
    value: np.ndarray
    largest: np.ndarray


class LatentFacts:
    """Collects the data of the latent browser and writes it.

    Strongest texts come from the first held-out tokens: at most 200,000 tokens and 16 million active codes. Everything
    else comes from all tokens.

    Args:
        d_sae: number of latents.
        earlier: folder with the data of an earlier evaluation of the same SAE, for `keep_heldout` and `keep_probes`.
    """

    def __init__(self, d_sae: int, earlier: Path | None = None) -> None:
        self._d_sae = d_sae
        self._earlier = earlier
        self._tokens: list[tuple[Tensor, Tensor, Tensor]] = []
        self._codes: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_tokens, self._n_codes, self._full = 0, 0, False
        self._arrays: dict[str, np.ndarray] = {}
        self._blocks: list[dict[str, np.ndarray]] = []
        self._probes: list[str] = []
        self._probed: list[tuple[Tensor, Tensor]] = []
        self._position_origin = "context"
        self.tables: dict[str, LatentTable] = {}
        """The table of latents with the mask `on` and, where that differs, `lifted`; empty: that of `earlier`."""

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept held-out tokens (`batch.kept()`) and their codes."""
        self._full |= self._n_tokens + len(batch) > MOST_TOKENS or self._n_codes + len(codes.value) > MOST_CODES
        if self._full:
            return
        self._tokens.append((batch.token_id.cpu(), batch.position.cpu(), batch.text.cpu()))
        parts = codes.token + self._n_tokens, codes.latent.int(), codes.value.detach()
        self._codes.append((parts[0].cpu(), parts[1].cpu(), parts[2].cpu()))
        self._n_tokens += len(batch)
        self._n_codes += len(codes.value)

    def keep_heldout(self) -> None:
        """Take everything but the probes from the earlier evaluation."""
        assert self._earlier is not None
        arrays = load_file(self._earlier / LATENTS_FILE)
        self._arrays = {name: array for name, array in arrays.items() if name not in _PROBE_ARRAYS}
        words = json.loads((self._earlier / LATENT_WORDS_FILE).read_text(encoding="utf8"))
        self._position_origin, self._n_tokens = words["position_origin"], words["n_tokens_searched_for_texts"]

    def keep_probes(self, name: str) -> None:
        """Take the probes of an order task or dataset from the earlier evaluation."""
        assert self._earlier is not None
        words = json.loads((self._earlier / LATENT_WORDS_FILE).read_text(encoding="utf8"))
        arrays = load_file(self._earlier / LATENTS_FILE)
        for probe, *parts in zip(words["probes"], *(arrays[part] for part in _PROBE_ARRAYS), strict=True):
            if probe == name or probe.startswith(f"{name}: "):
                latents, weights = (torch.from_numpy(part) for part in parts)
                is_chosen = latents >= 0
                self.add_probe(probe, latents[is_chosen], weights[is_chosen])

    def add_positions(
        self,
        used: PositionMass,
        information: Float[Tensor, " latent"],
        retained: Float[Tensor, " latent"],
        chance: Float[Tensor, " latent"],
        position_origin: str,
    ) -> None:
        """Add a block of latents: their profiles over positions.

        Args:
            used: activation mass with the mask.
            information: information of firing about position minus its null, as in `position_information`; NaN for
                latents with too few firings.
            retained: share of a latent's mass at its positions with the mask lifted; NaN for latents with too few
                firings.
            chance: the value of `retained` for a latent that fires independently of position.
            position_origin: from where the positions are counted.
        """
        tokens = used.tokens.sum(0)
        profile = used.mass.sum(0) / tokens.clamp(min=1)[:, None]
        self._position_origin = position_origin
        tensors = {
            "profile": profile.half(),
            "firings": used.firings.sum((0, 1)).int(),
            "position_information": information.float(),
            "retention": retained.float(),
            "retention_chance": chance.float(),
        }
        self._arrays["tokens_by_position"] = tokens.int().cpu().numpy()
        self._blocks.append({name: tensor.cpu().numpy() for name, tensor in tensors.items()})

    def add_probe(self, name: str, latents: Int[Tensor, " chosen"], weights: Float[Tensor, " chosen"]) -> None:
        """Add the latents that a probe on mean-pooled codes chose, in the order of choice, and its weights."""
        self._probes.append(name)
        self._probed.append((latents.int().cpu(), weights.float().cpu()))

    def add_effects(self, promoted: tuple[Tensor, Tensor], suppressed: tuple[Tensor, Tensor]) -> None:
        """Add the result of `vocabulary_effects`."""
        for name, (ids, logits) in (("promoted", promoted), ("suppressed", suppressed)):
            self._arrays[name] = ids.int().cpu().numpy()
            self._arrays[f"{name}_logit"] = logits.half().cpu().numpy()

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Write `latents.safetensors` and `latents.json` into `folder`."""
        names = self._blocks[0] if self._blocks else ()
        profiles = {name: np.concatenate([block[name] for block in self._blocks], axis=-1) for name in names}
        arrays = self._arrays | profiles | (self._texts() if self._tokens else {})
        n_chosen = max((len(latents) for latents, _ in self._probed), default=0)
        chosen = np.full((len(self._probes), n_chosen), -1, np.int32)
        weights = np.zeros((len(self._probes), n_chosen), np.float32)
        for number, (latents, weight) in enumerate(self._probed):
            chosen[number, : len(latents)], weights[number, : len(weight)] = latents.numpy(), weight.numpy()
        save_file({**arrays, "probe_latent": chosen, "probe_weight": weights}, folder / LATENTS_FILE)
        if self.tables:
            write_tables(self.tables, folder)
        elif self._earlier is not None:
            for name in (LATENT_TABLE_FILE, PROFILES_FILE):
                if (self._earlier / name).is_file():
                    shutil.copyfile(self._earlier / name, folder / name)
        shown = np.unique(np.concatenate([arrays[name].ravel() for name in ("token_id", "promoted", "suppressed")]))
        words: dict[str, Any] = {
            "probes": self._probes,
            "position_origin": self._position_origin,
            "n_tokens": int(self._arrays["tokens_by_position"].sum()),
            "n_tokens_searched_for_texts": self._n_tokens,
            "words": {int(token_id): _word(tokenizer, int(token_id)) for token_id in shown},
        }
        (folder / LATENT_WORDS_FILE).write_text(json.dumps(words, ensure_ascii=False), encoding="utf8")

    def _texts(self) -> dict[str, np.ndarray]:
        """The strongest texts of each latent, and the tokens that they are excerpts of."""
        token_id, position, text = (torch.cat(part).int().numpy() for part in zip(*self._tokens, strict=True))
        token, latent, value = (torch.cat(part).numpy() for part in zip(*self._codes, strict=True))
        strongest = strongest_texts(token, latent, value, position, text, self._d_sae)
        return {
            "token_id": token_id,
            "token_position": position.astype(np.uint16),
            "text_start": strongest.start,
            "text_length": strongest.length,
            "text_value": strongest.value,
            "largest": strongest.largest,
        }


def _word(tokenizer: Any, token: int) -> str:
    """A token's text, or the tokenizer's name of the token if its bytes are not complete characters."""
    word = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens([token])[0]) if "\ufffd" in word or not word else word


def strongest_texts(
    token: Int[np.ndarray, " code"],
    latent: Int[np.ndarray, " code"],
    value: Float[np.ndarray, " code"],
    position: Int[np.ndarray, " token"],
    text: Int[np.ndarray, " token"],
    d_sae: int,
) -> Strongest:
    """The excerpts on which each latent is most active, with its activations on them.

    An excerpt is the token of the largest activation with up to 15 tokens before it and 8 after it, from the same text
    and context.

    Args:
        token: index of each code's token, in ascending order.
        latent: latent of each code.
        value: activation of each code.
        position: of each token.
        text: index of each token's text.
    """
    n_tokens, width = len(position), N_BEFORE + 1 + N_AFTER
    by_latent = np.argsort(latent, kind="stable")  # within each latent tokens stay in order
    key = latent[by_latent].astype(np.int64) * n_tokens + token[by_latent]
    # Sorting by descending value within pairs of latent and text puts the strongest token of each pair first.
    pair = latent.astype(np.int64) * (int(text.max(initial=0)) + 1) + text[token]
    order = np.lexsort((-value, pair))
    first = order[np.flatnonzero(np.diff(pair[order], prepend=-1))]
    first = first[np.lexsort((-value[first], latent[first]))]
    latent_of = latent[first]
    rank = np.arange(len(first)) - np.searchsorted(latent_of, latent_of)
    first, latent_of, rank = (part[rank < N_TEXTS] for part in (first, latent_of, rank))
    # Runs of adjacent tokens of the same text and context.
    breaks = (np.diff(text, prepend=-1) != 0) | (np.diff(position.astype(np.int64), prepend=-9) != 1)
    run = np.cumsum(breaks) - 1
    run_start = np.flatnonzero(breaks)
    run_end = np.append(run_start[1:], n_tokens)
    peak = token[first]
    start = np.maximum(peak - N_BEFORE, run_start[run[peak]])
    end = np.minimum(peak + 1 + N_AFTER, run_end[run[peak]])
    around = start[:, None] + np.arange(width)
    wanted = latent_of[:, None].astype(np.int64) * n_tokens + around
    index = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    activation = np.where((key[index] == wanted) & (around < end[:, None]), value[by_latent][index], 0)
    largest = np.zeros(d_sae, np.float32)
    np.maximum.at(largest, latent_of, value[first])
    # Rounding up keeps every active token above 0.
    share = np.ceil(255 * activation / largest[latent_of, None]).clip(max=255)
    starts = np.full((d_sae, N_TEXTS), -1, np.int32)
    lengths = np.zeros((d_sae, N_TEXTS), np.uint8)
    values = np.zeros((d_sae, N_TEXTS, width), np.uint8)
    starts[latent_of, rank], lengths[latent_of, rank] = start, end - start
    values[latent_of, rank] = share.astype(np.uint8)
    return Strongest(starts, lengths, values, largest)


@torch.no_grad()
def vocabulary_effects(
    sae: SparseAutoencoder, model: LanguageModel
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The tokens that each decoder direction promotes and suppresses most.

    Logits are those that the model's final norm and unembedding give to the decoder direction, minus those of a vector
    of zeros, minus their mean over the vocabulary. They include the norm's weights, and their sizes are those of a
    residual stream that consists of this direction. The layers between are skipped (direct path only).

    Returns:
        (ids, logits) of the promoted tokens and (ids, logits) of the suppressed tokens, each [latent word], strongest
        first.
    """
    parts: list[tuple[Tensor, ...]] = []
    for rows in sae.decoder.detach().split(_LATENTS_AT_ONCE):
        logits = model.direct_logits(rows)
        logits -= logits.mean(1, keepdim=True)
        n_words = min(N_WORDS, math.ceil(logits.shape[1] / 2))
        up, down = logits.topk(n_words), logits.topk(n_words, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    ids, up, low_ids, down = (torch.cat(part) for part in zip(*parts, strict=True))
    return (ids, up), (low_ids, down)
