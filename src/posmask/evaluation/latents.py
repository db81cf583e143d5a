"""What one must know of a latent to look at it: where it speaks, on what texts, what it says, which probes it serves.

Gathered while a trained SAE is evaluated, from codes that are there anyway, and written beside its rows:
`latents.safetensors` (arrays, a column or row a latent) and `latents.json` (names of probes, the text of tokens).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.numpy import save_file
from torch import Tensor

from posmask.data.activations import Batch
from posmask.data.sites import LanguageModel
from posmask.evaluation.retention import PositionMass
from posmask.sae.autoencoder import Codes, SparseAutoencoder

__all__ = ["LATENTS_FILE", "LATENT_WORDS_FILE", "LatentFacts", "Strongest", "strongest_texts", "vocabulary_effects"]

LATENTS_FILE = "latents.safetensors"
LATENT_WORDS_FILE = "latents.json"
N_TEXTS = 6
N_BEFORE, N_AFTER = 15, 8  # tokens shown around the strongest one
N_WORDS = 10
MOST_TOKENS = 200_000
MOST_CODES = 16_000_000  # 200 MB while they are gathered
MOST_PROBED = 20  # A probe on more latents says little of each.
_LATENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Strongest:
    """Each latent's strongest texts, strongest first; a text of the held-out ones stands there at most once.

    `start` [latent text] is the number of the first token shown, -1 where there is no such text; `length` how many are
    shown; `value` [latent text token] the latent's activation on them, as 0 .. 255 of `largest` [latent].
    """

    start: np.ndarray
    length: np.ndarray
    value: np.ndarray
    largest: np.ndarray


class LatentFacts:
    """Gathers them. Held-out tokens are read in their order, the first 200,000 of them at most (fewer where more than
    16 million codes are active on them): strongest texts come from these, everything else from all tokens."""

    def __init__(self, d_sae: int) -> None:
        self._d_sae = d_sae
        self._tokens: list[tuple[Tensor, Tensor, Tensor]] = []
        self._codes: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_tokens, self._n_codes, self._full = 0, 0, False
        self._arrays: dict[str, np.ndarray] = {}
        self._probes: list[str] = []
        self._probed: list[tuple[Tensor, Tensor]] = []
        self._position_origin = "context"

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept held-out tokens (`batch.kept()`) and their codes."""
        self._full |= self._n_tokens + len(batch) > MOST_TOKENS or self._n_codes + len(codes.value) > MOST_CODES
        if self._full:
            return
        self._tokens.append((batch.token_id, batch.position, batch.text))
        self._codes.append((codes.token + self._n_tokens, codes.latent.int(), codes.value.detach()))
        self._n_tokens += len(batch)
        self._n_codes += len(codes.value)

    def add_positions(
        self,
        used: PositionMass,
        information: Float[Tensor, " latent"],
        retained: Float[Tensor, " latent"],
        chance: Float[Tensor, " latent"],
        position_origin: str,
    ) -> None:
        """
        Args:
            used: where latents speak, mask in place.
            information: what firing says of position, less its null, as in `position_information`; NaN: fires too
                seldom.
            retained: the share of a latent's mass at its positions with the mask lifted; NaN: fires too seldom.
        """
        tokens = used.tokens.sum(0)
        profile = used.mass.sum(0) / tokens.clamp(min=1)[:, None]
        self._position_origin = position_origin
        self._arrays |= {
            "profile": profile.half().numpy(),
            "firings": used.firings.sum((0, 1)).int().numpy(),
            "tokens_by_position": tokens.int().numpy(),
            "position_information": information.float().numpy(),
            "retention": retained.float().numpy(),
            "retention_chance": chance.float().numpy(),
        }

    def add_probe(self, name: str, latents: Int[Tensor, " chosen"], weights: Float[Tensor, " chosen"]) -> None:
        """The latents that a probe on mean-pooled codes chose, first choice first, and its weights."""
        self._probes.append(name)
        self._probed.append((latents.int(), weights.float()))

    def add_effects(self, promoted: tuple[Tensor, Tensor], suppressed: tuple[Tensor, Tensor]) -> None:
        """What `vocabulary_effects` gave."""
        for name, (ids, logits) in (("promoted", promoted), ("suppressed", suppressed)):
            self._arrays[name] = ids.int().numpy()
            self._arrays[f"{name}_logit"] = logits.half().numpy()

    def write(self, folder: Path, tokenizer: Any) -> None:
        token_id, position, text = (torch.cat(part).int().numpy() for part in zip(*self._tokens, strict=True))
        token, latent, value = (torch.cat(part).numpy() for part in zip(*self._codes, strict=True))
        strongest = strongest_texts(token, latent, value, position, text, self._d_sae)
        arrays = {
            **self._arrays,
            "token_id": token_id,
            "token_position": position.astype(np.uint16),
            "text_start": strongest.start,
            "text_length": strongest.length,
            "text_value": strongest.value,
            "largest": strongest.largest,
        }
        n_chosen = max((len(latents) for latents, _ in self._probed), default=0)
        chosen = np.full((len(self._probes), n_chosen), -1, np.int32)
        weights = np.zeros((len(self._probes), n_chosen), np.float32)
        for number, (latents, own) in enumerate(self._probed):
            chosen[number, : len(latents)], weights[number, : len(own)] = latents.numpy(), own.numpy()
        save_file({**arrays, "probe_latent": chosen, "probe_weight": weights}, folder / LATENTS_FILE)
        named = np.unique(np.concatenate([arrays[name].ravel() for name in ("token_id", "promoted", "suppressed")]))
        words: dict[str, Any] = {
            "probes": self._probes,
            "position_origin": self._position_origin,
            "n_tokens": int(self._arrays["tokens_by_position"].sum()),
            "n_tokens_searched_for_texts": self._n_tokens,
            "words": {int(one): _word(tokenizer, int(one)) for one in named},
        }
        (folder / LATENT_WORDS_FILE).write_text(json.dumps(words, ensure_ascii=False), encoding="utf8")


def _word(tokenizer: Any, token: int) -> str:
    """A token's text; where its bytes are no whole characters, the tokenizer's own name for it."""
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
    """Where each latent is most active, and how active it is around there.

    Shown are the 15 tokens before the strongest one and the 8 after it, as far as they belong to the same text and
    context.

    Args:
        token: the codes' tokens, in order; tokens are those that `position` and `text` describe.
    """
    n_tokens, width = len(position), N_BEFORE + 1 + N_AFTER
    by_place = np.argsort(latent, kind="stable")  # latent by latent, tokens in order
    key = latent[by_place].astype(np.int64) * n_tokens + token[by_place]
    # A latent's strongest token in each text: values down within pairs of latent and text, the first of each.
    pair = latent.astype(np.int64) * (int(text.max(initial=0)) + 1) + text[token]
    order = np.lexsort((-value, pair))
    first = order[np.flatnonzero(np.diff(pair[order], prepend=-1))]
    first = first[np.lexsort((-value[first], latent[first]))]
    own = latent[first]
    rank = np.arange(len(first)) - np.searchsorted(own, own)
    first, own, rank = (part[rank < N_TEXTS] for part in (first, own, rank))
    # Runs of neighboring tokens: the same text, in the same context.
    breaks = (np.diff(text, prepend=-1) != 0) | (np.diff(position.astype(np.int64), prepend=-9) != 1)
    run = np.cumsum(breaks) - 1
    run_start = np.flatnonzero(breaks)
    run_end = np.append(run_start[1:], n_tokens)
    peak = token[first]
    start = np.maximum(peak - N_BEFORE, run_start[run[peak]])
    end = np.minimum(peak + 1 + N_AFTER, run_end[run[peak]])
    around = start[:, None] + np.arange(width)
    wanted = own[:, None].astype(np.int64) * n_tokens + around
    place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    found = np.where((key[place] == wanted) & (around < end[:, None]), value[by_place][place], 0)
    largest = np.zeros(d_sae, np.float32)
    np.maximum.at(largest, own, value[first])
    share = np.ceil(255 * found / largest[own, None]).clip(max=255)  # up: what is active is never shown as silent
    starts = np.full((d_sae, N_TEXTS), -1, np.int32)
    lengths = np.zeros((d_sae, N_TEXTS), np.uint8)
    values = np.zeros((d_sae, N_TEXTS, width), np.uint8)
    starts[own, rank], lengths[own, rank], values[own, rank] = start, end - start, share.astype(np.uint8)
    return Strongest(starts, lengths, values, largest)


@torch.no_grad()
def vocabulary_effects(
    sae: SparseAutoencoder, model: LanguageModel
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The tokens that each decoder row promotes most and suppresses most: ids [latent word] and logits, ends first.

    The logits that the model's own final norm and unembedding give to the row, less those they give to a vector of
    zeros, with their mean over the vocabulary taken off. So the norm's weights are folded in, and sizes are those of a
    residual stream that holds nothing but this row. Only the direct path: layers between are left out.
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
