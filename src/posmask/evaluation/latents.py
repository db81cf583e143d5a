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
from posmask.evaluation.stored_codes import StoredCodes
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.storage.json_file import read_json
from posmask.storage.layout import LATENT_TABLE_FILE, LATENT_WORDS_FILE, LATENTS_FILE, PROFILES_FILE

__all__ = [
    "LATENTS_FILE",
    "LATENT_WORDS_FILE",
    "Excerpts",
    "LatentFacts",
    "ShiftStrips",
    "excerpts",
    "position_ranges",
    "shift_strips",
    "token_text",
    "vocabulary_effects",
]

N_TEXTS = 6
QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
"""Quantiles of a latent's activations where it fires, at each of which one of its excerpts is."""
N_HISTOGRAM_BINS = 20
N_STRIP_TOKENS = 24
N_BEFORE, N_AFTER = 15, 8  # tokens shown around the strongest one
N_WORDS = 10
MOST_TOKENS = 200_000
MOST_CODES = 16_000_000  # 200 MB while they are gathered
MOST_PROBED = 20  # Larger probes are not recorded, because each of their latents contributes little.
_LATENTS_AT_ONCE = 256
_PROBE_ARRAYS = ("probe_latent", "probe_weight")


@dataclass(frozen=True)
class Excerpts:
    """Excerpts of the held-out texts for each latent: N_TEXTS strongest, then QUANTILES, then `position_ranges`.

    Args:
        start: [latent excerpt] index of the first token shown; -1 if the latent has no such excerpt.
        length: [latent excerpt] number of tokens shown.
        peak: [latent excerpt] which of the tokens shown the excerpt was chosen for.
        value: [latent excerpt token] activation on these tokens, as 0 .. 255 of `largest`.
        largest: [latent] largest activation.
        histogram: [latent bin] number of activations in bins of equal width from 0 to `largest`.
    """

    start: np.ndarray
    length: np.ndarray
    peak: np.ndarray
    value: np.ndarray
    largest: np.ndarray
    histogram: np.ndarray


@dataclass(frozen=True)
class ShiftStrips:
    """The piece of the shift design on which each latent is most active, in every window that it was seen in.

    Args:
        token_id: [piece token] tokens of the pieces; -1 for content that is an attention sink in a window.
        piece: [latent] index of the piece; -1 if the latent fires nowhere in the design.
        start: [latent] offset in the piece of the first token shown.
        value: [latent window token] activations, as 0 .. 255 of `largest`.
        largest: [latent] largest activation.
    """

    token_id: np.ndarray
    piece: np.ndarray
    start: np.ndarray
    value: np.ndarray
    largest: np.ndarray


class LatentFacts:
    """Collects the data of the latent browser and writes it.

    Excerpts and histograms come from the first held-out tokens: at most 200,000 tokens and 16 million active codes.
    Everything else comes from all tokens.

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
        self._shift_windows: list[list[int]] = []
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
        words = read_json(self._earlier / LATENT_WORDS_FILE)
        self._position_origin, self._n_tokens = words["position_origin"], words["n_tokens_searched_for_texts"]
        self._shift_windows = words.get("shift_windows", [])

    def keep_probes(self, name: str) -> None:
        """Take the probes of an order task or dataset from the earlier evaluation."""
        assert self._earlier is not None
        words = read_json(self._earlier / LATENT_WORDS_FILE)
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

    def add_shift(self, codes: StoredCodes, n_windows: int, length: int) -> None:
        """Add the result of `shift_strips`.

        Args:
            codes: of the shift design.
            n_windows: windows per piece.
            length: tokens per window.
        """
        strips = shift_strips(codes, n_windows, length)
        self._arrays |= {f"shift_{name}": array for name, array in vars(strips).items()}
        self._shift_windows = [[1 + (w + 1) * length, (w + 2) * length] for w in range(n_windows)]

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
        n_positions = len(self._arrays["tokens_by_position"])
        arrays = self._arrays | profiles | (self._texts(n_positions) if self._tokens else {})
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
        of_words = ("token_id", "promoted", "suppressed", "shift_token_id")
        shown = np.unique(np.concatenate([arrays[name].ravel() for name in of_words if name in arrays]))
        words: dict[str, Any] = {
            "probes": self._probes,
            "position_origin": self._position_origin,
            "n_tokens": int(self._arrays["tokens_by_position"].sum()),
            "n_tokens_searched_for_texts": self._n_tokens,
            "excerpts": {"strongest": N_TEXTS, "quantiles": QUANTILES, "positions": position_ranges(n_positions)},
            "shift_windows": self._shift_windows,
            "words": {int(token_id): token_text(tokenizer, int(token_id)) for token_id in shown if token_id >= 0},
        }
        (folder / LATENT_WORDS_FILE).write_text(json.dumps(words, ensure_ascii=False), encoding="utf8")

    def _texts(self, n_positions: int) -> dict[str, np.ndarray]:
        """The excerpts of each latent, and the tokens that they are excerpts of."""
        token_id, position, text = (torch.cat(part).int().numpy() for part in zip(*self._tokens, strict=True))
        token, latent, value = (torch.cat(part).numpy() for part in zip(*self._codes, strict=True))
        found = excerpts(token, latent, value, position, text, self._d_sae, n_positions)
        return {
            "token_id": token_id,
            "token_position": position.astype(np.uint16),
            "text_start": found.start,
            "text_length": found.length,
            "text_peak": found.peak,
            "text_value": found.value,
            "largest": found.largest,
            "histogram": found.histogram,
        }


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text, or the tokenizer's name of the token if its bytes are not complete characters."""
    word = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens([token])[0]) if "\ufffd" in word or not word else word


def position_ranges(n_positions: int) -> list[list[int]]:
    """The ranges of positions after BOS, first and last, from each of which a latent has its strongest excerpt.

    >>> position_ranges(40)
    [[1, 3], [4, 7], [8, 15], [16, 31], [32, 39]]
    """
    starts = [1, *(2**power for power in range(2, math.ceil(math.log2(max(n_positions, 2)))))]
    return [[start, min(end, n_positions) - 1] for start, end in zip(starts, [*starts[1:], n_positions], strict=True)]


def excerpts(
    token: Int[np.ndarray, " code"],
    latent: Int[np.ndarray, " code"],
    value: Float[np.ndarray, " code"],
    position: Int[np.ndarray, " token"],
    text: Int[np.ndarray, " token"],
    d_sae: int,
    n_positions: int,
) -> Excerpts:
    """The excerpts on which each latent is most active, at quantiles of its activations, and by range of positions.

    The strongest excerpts are at most one per text. An excerpt is the token that it was chosen for with up to 15 tokens
    before it and 8 after it, from the same text and context.

    Args:
        token: index of each code's token, in ascending order.
        latent: latent of each code.
        value: activation of each code.
        position: of each token.
        text: index of each token's text.
    """
    n_tokens, width, ranges = len(position), N_BEFORE + 1 + N_AFTER, position_ranges(n_positions)
    chosen = [
        _strongest_by_text(token, latent, value, text),
        _at_quantiles(latent, value, d_sae),
        _strongest_by_range(latent, value, position[token], [start for start, _ in ranges], d_sae),
    ]
    first_columns = (0, N_TEXTS, N_TEXTS + len(QUANTILES))
    n_excerpts = first_columns[-1] + len(ranges)
    code = np.concatenate([codes for codes, _ in chosen])
    column = np.concatenate([part + first for (_, part), first in zip(chosen, first_columns, strict=True)])
    latent_of, peak = latent[code], token[code]
    # Runs of adjacent tokens of the same text and context.
    breaks = (np.diff(text, prepend=-1) != 0) | (np.diff(position.astype(np.int64), prepend=-9) != 1)
    run = np.cumsum(breaks) - 1
    run_start = np.flatnonzero(breaks)
    run_end = np.append(run_start[1:], n_tokens)
    start = np.maximum(peak - N_BEFORE, run_start[run[peak]])
    end = np.minimum(peak + 1 + N_AFTER, run_end[run[peak]])
    by_latent = np.argsort(latent, kind="stable")  # within each latent tokens stay in order
    key = latent[by_latent].astype(np.int64) * n_tokens + token[by_latent]
    around = start[:, None] + np.arange(width)
    wanted = latent_of[:, None].astype(np.int64) * n_tokens + around
    index = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    activation = np.where((key[index] == wanted) & (around < end[:, None]), value[by_latent][index], 0)
    largest = np.zeros(d_sae, np.float32)
    np.maximum.at(largest, latent, value)
    # Rounding up keeps every active token above 0.
    share = np.ceil(255 * activation / largest[latent_of, None]).clip(max=255)
    bin = np.ceil(N_HISTOGRAM_BINS * value / largest[latent]).astype(np.int64).clip(1, N_HISTOGRAM_BINS) - 1
    counts = np.bincount(latent.astype(np.int64) * N_HISTOGRAM_BINS + bin, minlength=d_sae * N_HISTOGRAM_BINS)
    starts = np.full((d_sae, n_excerpts), -1, np.int32)
    lengths, peaks = np.zeros((2, d_sae, n_excerpts), np.uint8)
    values = np.zeros((d_sae, n_excerpts, width), np.uint8)
    starts[latent_of, column], lengths[latent_of, column] = start, end - start
    peaks[latent_of, column], values[latent_of, column] = peak - start, share.astype(np.uint8)
    return Excerpts(starts, lengths, peaks, values, largest, counts.reshape(d_sae, -1).astype(np.int32))


_Chosen = tuple[np.ndarray, np.ndarray]  # indices of codes, and the columns that they are for


def _strongest_by_text(token: np.ndarray, latent: np.ndarray, value: np.ndarray, text: np.ndarray) -> _Chosen:
    # Sorting by descending value within pairs of latent and text puts the strongest token of each pair first.
    pair = latent.astype(np.int64) * (int(text.max(initial=0)) + 1) + text[token]
    order = np.lexsort((-value, pair))
    first = order[np.flatnonzero(np.diff(pair[order], prepend=-1))]
    first = first[np.lexsort((-value[first], latent[first]))]
    rank = np.arange(len(first)) - np.searchsorted(latent[first], latent[first])
    return first[rank < N_TEXTS], rank[rank < N_TEXTS]


def _at_quantiles(latent: np.ndarray, value: np.ndarray, d_sae: int) -> _Chosen:
    """The firing at each quantile of a latent's activations; latents with fewer firings than quantiles have none."""
    order = np.lexsort((value, latent))
    count = np.bincount(latent, minlength=d_sae)
    first = np.cumsum(count) - count
    (fires,) = np.nonzero(count >= len(QUANTILES))
    ranks = np.round(np.array(QUANTILES) * (count[fires, None] - 1)).astype(np.int64)
    return order[(first[fires, None] + ranks).ravel()], np.tile(np.arange(len(QUANTILES)), len(fires))


def _strongest_by_range(
    latent: np.ndarray, value: np.ndarray, position: np.ndarray, starts: list[int], d_sae: int
) -> _Chosen:
    key = latent.astype(np.int64) * len(starts) + np.searchsorted(starts, position, side="right") - 1
    most = np.zeros(d_sae * len(starts), value.dtype)
    np.maximum.at(most, key, value)
    strongest = np.flatnonzero(value == most[key])
    strongest = strongest[np.unique(key[strongest], return_index=True)[1]]
    return strongest, key[strongest] % len(starts)


def shift_strips(codes: StoredCodes, n_windows: int, length: int) -> ShiftStrips:
    """The piece of the shift design on which each latent is most active, around its strongest token.

    Args:
        codes: of the shift design.
        n_windows: windows per piece.
        length: tokens per window; at most N_STRIP_TOKENS of them are shown.
    """
    batch, width = codes.batch, min(length, N_STRIP_TOKENS)
    text, offset = batch.text.long().numpy(), batch.position.long().numpy() - 1
    window, within = offset // length - 1, offset % length
    token_id = np.full((int(text.max()) + 1, length), -1, np.int32)
    token_id[text, within] = batch.token_id.numpy()
    pieces, starts = np.full(codes.d_sae, -1, np.int32), np.zeros(codes.d_sae, np.int32)
    values = np.zeros((codes.d_sae, n_windows, width), np.uint8)
    largest = np.zeros(codes.d_sae, np.float32)
    for latents, of_block in codes.blocks():
        token, latent, value = (part.numpy() for part in (of_block.token, of_block.latent, of_block.value))
        peak = np.lexsort((-value, latent))
        peak = peak[np.flatnonzero(np.diff(latent[peak], prepend=-1))]
        n_latents = latents.stop - latents.start
        piece, first, most = np.full(n_latents, -1), np.zeros(n_latents, np.int64), np.ones(n_latents, np.float32)
        piece[latent[peak]], most[latent[peak]] = text[token[peak]], value[peak]
        first[latent[peak]] = (within[token[peak]] - width * 2 // 3).clip(0, length - width)
        at = within[token] - first[latent]
        shown = (text[token] == piece[latent]) & (at >= 0) & (at < width)
        token, latent, at, value = token[shown], latent[shown], at[shown], value[shown]
        values[latents][latent, window[token], at] = np.ceil(255 * value / most[latent]).clip(max=255)
        pieces[latents], starts[latents] = piece, first
        largest[latents] = np.where(piece >= 0, most, 0)
    return ShiftStrips(token_id, pieces, starts, values, largest)


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
