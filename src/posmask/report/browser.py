"""Data of the latent browser, as blocks of bytes that the page decodes on demand.

A block is the gzip of: the length of a JSON header (4 bytes, little endian), the header, and arrays, each at a multiple
of 8 bytes. Each cell has a block; cells share a block with the held-out tokens and the words.
"""

import gzip
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from posmask.errors import DamagedFolder, first_line
from posmask.report.arrays import read_arrays, read_openness_of, read_words
from posmask.report.reading import CellFolder
from posmask.storage.layout import (
    LATENT_TABLE_FILE,
    LATENT_WORDS_FILE,
    LATENTS_FILE,
    OPENNESS_FILE,
    PROFILES_FILE,
    WEIGHTS_FILE,
)

__all__ = ["Browser", "browser", "pack", "shown_text", "shown_word"]

_N_NEAREST = 8  # nearest neighbors per latent
_COPY = 0.7  # cosine of decoder rows above which latents of an SAE are called copies
_N_COPIES = 3  # copies of a latent that are kept with it
_NEAR = 0.4  # cosines below it are between unrelated latents
_LONGEST_WORD = 40
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Browser:
    """Data of the latent browser.

    Attributes:
        blocks: bytes by name.
        cells: of each cell with a block: label, cell, seed, its folder in the run folder and the folder's identity,
            block, number of latents kept (`kept`) and in total (`of`).
    """

    blocks: dict[str, bytes]
    cells: list[dict[str, Any]]


def shown_word(word: str) -> str:
    """Return a token's text for a page: at most 40 characters, control and direction characters made visible.

    >>> shown_word("a\\tb"), shown_word("  "), shown_word("\\u202ex"), len(shown_word("x" * 10_000_000))
    ('a⇥b', '␣␣', '⟨202E⟩x', 41)
    """
    word = shown_text(word if len(word) <= _LONGEST_WORD else word[:_LONGEST_WORD] + "…")
    return word if word.strip() else word.replace(" ", "␣")


def shown_text(text: str) -> str:
    """Return a text for a page, with control and direction characters made visible."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(f"⟨{ord(char):X}⟩" if unicodedata.category(char) in hidden else char for char in text)


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """Return a block of a JSON header and arrays."""
    index, body = {}, b""
    for name, array in arrays.items():
        body += b"\0" * (-len(body) % 8)
        index[name] = {"type": array.dtype.name, "shape": list(array.shape), "at": len(body)}
        body += np.ascontiguousarray(array).tobytes()
    text = json.dumps({**header, "arrays": index}, ensure_ascii=True, allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return gzip.compress(len(text).to_bytes(4, "little") + text + body, 6, mtime=0)


def browser(
    shown: Sequence[CellFolder], all_cells: Sequence[CellFolder], n_kept: int | None, warnings: list[str]
) -> Browser:
    """Return the data of the latent browser.

    Args:
        shown: the cells whose latents can be browsed.
        all_cells: all cells of all seeds, in which nearest neighbors are searched.
        n_kept: number of latents to keep per cell, the most informative ones; None keeps all.
        warnings: unreadable files are added to it.
    """
    loaded = []
    for cell in shown:
        if cell.has(LATENTS_FILE):
            facts = _read_facts(cell, n_kept, warnings)
            loaded += [facts] if facts is not None else []
    without = [cell.cell for cell in shown if not cell.has(LATENTS_FILE)]
    if without:
        warnings.append(
            f"{len(without)} cells have no data for the latent browser ({', '.join(without[:4])}"
            f"{' …' if len(without) > 4 else ''})."
        )
    nearest = _nearest([(facts.cell, facts.kept) for facts in loaded], all_cells, warnings)
    blocks: dict[str, bytes] = {}
    cells, streams = [], {}
    for number, facts in enumerate(loaded):
        key = (facts.arrays["token_id"].tobytes(), facts.arrays["token_position"].tobytes())
        stream = streams.setdefault(key, _Stream(f"texts-{len(streams)}", facts.arrays, facts.words))
        seeds, neighbors = nearest.get(facts.cell, ([], {}))
        name = f"cell-{number}"
        header = facts.header | {"other_seeds": seeds, "texts": stream.name}
        blocks[name] = pack(header, _cell_arrays(facts, stream) | neighbors)
        cells.append(
            {
                "label": facts.cell.label,
                "cell": facts.cell.cell,
                "seed": facts.cell.seed,
                "folder": "/".join(facts.cell.path.parts[-2:]),
                "identity": facts.cell.manifest["identity"],
                "block": name,
                "kept": len(facts.kept),
                "of": len(facts.arrays["firings"]),
            }
        )
    blocks |= {stream.name: stream.block() for stream in streams.values()}
    return Browser(blocks, cells)


@dataclass(frozen=True)
class _Facts:
    """What a cell folder has of its latents."""

    cell: CellFolder
    arrays: dict[str, np.ndarray]
    words: dict[str, str]  # by token id
    header: dict[str, Any]
    openness: np.ndarray  # [position latent]
    kept: np.ndarray  # latents to keep
    table: dict[str, np.ndarray]  # of the kept latents, from the table of latents and that of profiles


def _read_facts(cell: CellFolder, n_kept: int | None, warnings: list[str]) -> _Facts | None:
    try:
        arrays = _read_latents(cell.path / LATENTS_FILE)
        about = read_words(cell.path / LATENT_WORDS_FILE)
        openness = read_openness_of(cell.path / OPENNESS_FILE)
        if openness.shape != arrays["profile"].shape or len(about["probes"]) != len(arrays["probe_latent"]):
            raise DamagedFolder(f"{LATENTS_FILE} does not fit {OPENNESS_FILE} and {LATENT_WORDS_FILE}: recompute it")
        if lost := {str(id) for name in _IDS for id in np.unique(arrays[name]).tolist()} - about["words"].keys():
            raise DamagedFolder(f"{LATENT_WORDS_FILE} lacks the token {min(lost)}: recompute it")
        header = {
            "cell": cell.cell,
            "seed": cell.seed,
            "probes": about["probes"],
            "position_origin": about["position_origin"],
            "tokens": about["n_tokens"],
            "searched": about["n_tokens_searched_for_texts"],
            "excerpts": about.get("excerpts", {"strongest": arrays["text_start"].shape[1]}),
            "shift_windows": about.get("shift_windows", []),
            "near": _NEAR,
            "copy": _COPY,
        }
        kept = _kept(cell, arrays, n_kept)
        table, more = _read_table(cell, arrays, kept)
        return _Facts(cell, arrays, about["words"], header | more, openness, kept, table)
    except (DamagedFolder, OSError, KeyError, ValueError) as error:
        reason = str(error) if isinstance(error, DamagedFolder) else f"{type(error).__name__}: {error}"
        warnings.append(f"The latents of {cell.label} cannot be read ({reason[:120]}).")
        return None


_TABLE_COLUMNS = (
    "position_share_low",
    "position_share_high",
    "shift_position",
    "shift_content",
    "shift_interaction",
    "q_value",
    "peak_position",
)
_ENDS = ("", "_low", "_high")


def _read_table(
    cell: CellFolder, arrays: dict[str, np.ndarray], kept: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns of the kept latents from the tables of latents and profiles, and what a header has of them.

    `rate` [latent bin] is the firing rate by bin of positions as 0 .. 65,535 of `rate_top` [latent], with the prefix
    `lifted_` with the mask lifted. A cell without these tables has its mean activation at each position as `rate`.
    """
    latents_file, profiles_file = cell.path / LATENT_TABLE_FILE, cell.path / PROFILES_FILE
    if not (latents_file.is_file() and profiles_file.is_file()):
        (seen,) = np.nonzero(arrays["tokens_by_position"])
        columns = _quantized({"rate": arrays["profile"][seen][:, kept].T.astype(np.float32)})
        bins = {"bin_start": seen.astype(np.int32), "bin_end": seen.astype(np.int32)}
        return columns | bins, {"profiled": "mean activation"}
    import pandas as pd

    latents = pd.read_parquet(latents_file).set_index("latent").loc[kept]
    columns = {name: latents[name].to_numpy(np.float32) for name in _TABLE_COLUMNS}
    header: dict[str, Any] = {"profiled": "firing rate"}
    for name in ("class", "kind", "lifted_class"):
        if name in latents:
            codes, header[f"{name}_names"] = pd.factorize(latents[name].fillna(""), sort=True)
            columns[name] = codes.astype(np.uint8)
            header[f"{name}_names"] = header[f"{name}_names"].tolist()
    profiles = pd.read_parquet(profiles_file)
    starts, first = np.unique(profiles["first_position"].to_numpy(), return_index=True)
    ends = profiles["last_position"].to_numpy()[first]
    columns |= {"bin_start": starts.astype(np.int32), "bin_end": ends.astype(np.int32)}
    rates, row_of = {}, np.full(len(arrays["firings"]), -1)
    row_of[kept] = np.arange(len(kept))
    for mask in profiles["mask"].unique():
        of_mask = profiles[(profiles["mask"] == mask) & (row_of[profiles["latent"]] >= 0)]
        place = row_of[of_mask["latent"]], np.searchsorted(starts, of_mask["first_position"])
        for end in _ENDS:
            rate = rates[f"{'' if mask == 'on' else f'{mask}_'}rate{end}"] = np.zeros((len(kept), len(starts)), "f4")
            rate[place] = of_mask[f"firing_rate{end}"]
    return columns | _quantized(rates), header


def _quantized(rates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    top = np.max([rate.max(1) for rate in rates.values()], axis=0)
    scale = 65_535 / np.maximum(top, 1e-30)[:, None]
    return {"rate_top": top} | {name: np.round(scale * rate).astype(np.uint16) for name, rate in rates.items()}


_IDS = ("token_id", "promoted", "suppressed")
_FINITE = ("largest", "profile", "promoted_logit", "suppressed_logit", "probe_weight")
_SHAPES = {
    "firings": "latent:i",
    **dict.fromkeys(("largest", "position_information", "retention", "retention_chance"), "latent"),
    "probe_latent": "probe? choice?:i",
    "probe_weight": "probe? choice?",
    "profile": "position latent",
    **dict.fromkeys(("promoted", "suppressed"), "latent word:i"),
    **dict.fromkeys(("promoted_logit", "suppressed_logit"), "latent word"),
    "text_start": "latent text:i",
    "text_length": "latent text:u",
    "text_value": "latent text shown:u",
    "token_id": "token:i",
    "token_position": "token:u",
}
_SHAPES_OF_LATER_VERSIONS = {
    "tokens_by_position": "position:i",
    "text_peak": "latent text:u",
    "histogram": "latent bar:iu",
    "shift_token_id": "piece offset:i",
    **dict.fromkeys(("shift_piece", "shift_start"), "latent:iu"),
    "shift_value": "latent window column:u",
    "shift_largest": "latent",
}
"""Arrays that cells of earlier versions lack."""


def _read_latents(path: Path) -> dict[str, np.ndarray]:
    """Read `latents.safetensors`, with indices checked.

    Raises:
        DamagedFolder: its arrays do not fit together, or indices are out of range.
    """
    arrays = read_arrays(path, _SHAPES, _SHAPES_OF_LATER_VERSIONS)
    start, length, tokens = arrays["text_start"].astype(np.int64), arrays["text_length"], arrays["token_id"]
    chosen, n_latents, shown = arrays["probe_latent"], len(arrays["firings"]), arrays["text_value"].shape[2]
    texts_exist = (start >= -1) & (length <= shown) & (start + length <= len(tokens))
    if not bool(texts_exist.all()) or not bool(((chosen >= -1) & (chosen < n_latents)).all()):
        raise DamagedFolder(f"{path.name} names latents or tokens that do not exist: `posmask run` recomputes the cell")
    if name := next((name for name in _FINITE if not bool(np.isfinite(arrays[name]).all())), None):
        raise DamagedFolder(f"{path.name} holds NaN or infinite numbers for {name}: `posmask run` recomputes the cell")
    return arrays


class _Stream:
    """The held-out tokens that cells of a study share, and every word that a cell refers to."""

    def __init__(self, name: str, arrays: dict[str, np.ndarray], words: dict[str, str]) -> None:
        self.name = name
        ids, self._token = np.unique(arrays["token_id"], return_inverse=True)
        self._index = {int(token_id): index for index, token_id in enumerate(ids)}
        self._position = arrays["token_position"].astype(np.uint16)
        self._words = [shown_word(words[str(token_id)]) for token_id in ids]

    def indices(self, ids: np.ndarray, words: dict[str, str]) -> np.ndarray:
        """Return the indices of the tokens' words, -1 for the token -1; new words are added."""
        self._index[-1] = -1
        for token_id in np.unique(ids).tolist():
            if token_id not in self._index:
                self._index[token_id] = len(self._words)
                self._words.append(shown_word(words[str(token_id)]))
        return np.vectorize(self._index.__getitem__, otypes=[np.int32])(ids)

    def block(self) -> bytes:
        """Return the block of the words and the tokens."""
        return pack({"words": self._words}, {"token": self._token.astype(np.int32), "position": self._position})


def _kept(cell: CellFolder, arrays: dict[str, np.ndarray], n_kept: int | None) -> np.ndarray:
    """The latents to keep, sorted: the most informative ones, each with the nearest of its copies in the same SAE."""
    n_latents = len(arrays["firings"])
    if n_kept is None or n_kept >= n_latents:
        return np.arange(n_latents)
    ranked = _most_informative(cell, arrays, n_kept)
    decoder = _decoder(cell, [])
    if decoder is None:
        return np.sort(ranked)
    near = _nearest_in_cell(decoder[ranked], np.array(ranked), decoder)
    kept: dict[int, None] = {}
    for latent, others, cosines in zip(ranked, near["near_own"], near["near_own_cosine"], strict=True):
        copies = others[:_N_COPIES][cosines[:_N_COPIES] > _COPY]
        kept |= dict.fromkeys([latent, *copies.tolist()])
    return np.sort(list(kept)[:n_kept])


def _most_informative(cell: CellFolder, arrays: dict[str, np.ndarray], n_kept: int) -> list[int]:
    """The most informative latents.

    Half are latents that probes selected, first choices first. Three quarters of the others have the highest position
    information, or the highest share of position in the shift design; the rest fire most often.
    """
    of_position = arrays["position_information"]
    if (cell.path / LATENT_TABLE_FILE).is_file():
        import pandas as pd

        of_position = np.fmax(of_position, pd.read_parquet(cell.path / LATENT_TABLE_FILE)["shift_position"])
    selected = [int(latent) for latent in arrays["probe_latent"].T.ravel() if latent >= 0]
    probed = list(dict.fromkeys(selected))[: n_kept // 2]
    by_position = np.argsort(-np.nan_to_num(of_position, nan=-1), kind="stable")
    by_firing = np.argsort(-arrays["firings"], kind="stable")
    n_positional = (n_kept - len(probed)) * 3 // 4
    ranked = dict.fromkeys([*probed, *by_position[:n_positional].tolist()])
    return list(dict.fromkeys([*ranked, *by_firing.tolist()]))[:n_kept]


def _cell_arrays(facts: _Facts, stream: _Stream) -> dict[str, np.ndarray]:
    arrays, kept = facts.arrays, facts.kept
    profile = arrays["profile"][:, kept].T.astype(np.float32)
    highest = profile.max(1)
    packed = {
        "latent": kept.astype(np.int32),
        "profile": np.round(255 * profile / np.maximum(highest, 1e-30)[:, None]).astype(np.uint8),
        "highest": highest,
        "openness": np.round(255 * facts.openness[:, kept].T.clip(0, 1)).astype(np.uint8),
        "probe_latent": arrays["probe_latent"],
        "probe_weight": arrays["probe_weight"],
    }
    for name in ("firings", "position_information", "retention", "retention_chance", "largest"):
        packed[name] = arrays[name][kept]
    packed |= facts.table
    per_latent = ("text_start", "text_length", "text_peak", "text_value", "histogram")
    for name in (*per_latent, "shift_piece", "shift_start", "shift_value", "shift_largest"):
        if name in arrays:
            packed[name] = arrays[name][kept]
    if "shift_token_id" in arrays:
        packed["shift_token"] = stream.indices(arrays["shift_token_id"], facts.words)
    for name in ("promoted", "suppressed"):
        packed[name] = stream.indices(arrays[name][kept], facts.words)
        packed[f"{name}_logit"] = arrays[f"{name}_logit"][kept].astype(np.float32).round(1)
    return packed


_Neighbors = tuple[int, np.ndarray, np.ndarray]  # a cell's index or a seed; nearest latents and their cosines


def _nearest(
    loaded: Sequence[tuple[CellFolder, np.ndarray]], all_cells: Sequence[CellFolder], warnings: list[str]
) -> dict[CellFolder, tuple[list[int], dict[str, np.ndarray]]]:
    """Other seeds and nearest neighbors by cosine of decoder rows, for the kept latents of each loaded cell.

    Arrays of the neighbors:
        near_own, near_own_cosine [latent neighbor]: in the same SAE.
        copies [latent]: number of other latents of the same SAE with a cosine above 0.7.
        near_cell, near_latent, near_cosine [latent neighbor]: the nearest latent of each other loaded cell, of the same
            seed if the cell has it; the nearest cells first.
        seed_latent, seed_cosine [latent seed]: the nearest latent of each other seed of the cell, loaded or not.

    Only one cell's weights and the rows of kept latents are in memory at a time.
    """
    rows: dict[CellFolder, np.ndarray] = {}
    index = {cell: number for number, (cell, _) in enumerate(loaded)}
    kept_of = dict(loaded)
    for cell, kept in loaded:
        decoder = _decoder(cell, warnings)
        if decoder is not None and len(decoder) > kept.max(initial=-1):
            rows[cell] = decoder[kept]
    by_seed: dict[str, dict[int, CellFolder]] = {}
    for cell in rows:
        by_seed.setdefault(cell.cell, {})[cell.seed] = cell

    def compares(cell: CellFolder, other: CellFolder) -> bool:
        if cell.cell == other.cell:
            return True
        seeds = by_seed.get(other.cell, {})
        return seeds.get(cell.seed, next(iter(seeds.values()), None)) is other

    within: dict[CellFolder, dict[str, np.ndarray]] = {}
    in_cells: dict[CellFolder, list[_Neighbors]] = {cell: [] for cell in rows}
    in_seeds: dict[CellFolder, list[_Neighbors]] = {cell: [] for cell in rows}
    for other in all_cells:
        comparing = [cell for cell in rows if compares(cell, other)]
        decoder = _decoder(other, [] if other in index else warnings) if comparing else None
        if decoder is None:
            continue
        for cell in comparing:
            if rows[cell].shape[1] != decoder.shape[1]:  # a study of another model
                continue
            if cell is other:
                within[cell] = _nearest_in_cell(rows[cell], kept_of[cell], decoder)
                continue
            latents, cosines = _nearest_row(rows[cell], decoder)
            if cell.cell == other.cell:
                in_seeds[cell].append((other.seed, latents, cosines))
            else:
                in_cells[cell].append((index[other], latents, cosines))
    return {cell: _joined(within[cell], in_cells[cell], in_seeds[cell]) for cell in within}


def _joined(
    within: dict[str, np.ndarray], in_cells: list[_Neighbors], in_seeds: list[_Neighbors]
) -> tuple[list[int], dict[str, np.ndarray]]:
    arrays = dict(within)
    if in_cells:
        cosine = np.stack([cosines for _, _, cosines in in_cells], 1)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :_N_NEAREST]
        latent = np.stack([latents for _, latents, _ in in_cells], 1)
        arrays["near_cell"] = np.array([cell for cell, _, _ in in_cells], np.int32)[order]
        arrays["near_latent"] = np.take_along_axis(latent, order, 1)
        arrays["near_cosine"] = np.take_along_axis(cosine, order, 1).round(3)
    in_seeds = sorted(in_seeds, key=lambda neighbors: neighbors[0])
    if in_seeds:
        arrays["seed_latent"] = np.stack([latents for _, latents, _ in in_seeds], 1)
        arrays["seed_cosine"] = np.stack([cosines for _, _, cosines in in_seeds], 1).round(3)
    return [seed for seed, _, _ in in_seeds], arrays


def _nearest_row(rows: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the decoder row with the largest cosine, and the cosine."""
    latents, cosines = [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        cosine = rows[start : start + _ROWS_AT_ONCE] @ decoder.T
        latents.append(cosine.argmax(1).astype(np.int32))
        cosines.append(cosine.max(1))
    return np.concatenate(latents), np.concatenate(cosines)


def _nearest_in_cell(rows: np.ndarray, kept: np.ndarray, decoder: np.ndarray) -> dict[str, np.ndarray]:
    """For each row, the other decoder rows with the largest cosines, and the number of copies."""
    parts: dict[str, list[np.ndarray]] = {"near_own": [], "near_own_cosine": [], "copies": []}
    n_near = min(_N_NEAREST, len(decoder) - 1)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cosine = rows[part] @ decoder.T
        itself = np.arange(len(cosine))
        cosine[itself, kept[part]] = -1
        near = np.argpartition(-cosine, n_near - 1, axis=1)[:, :n_near] if n_near else itself[:, None][:, :0]
        value = np.take_along_axis(cosine, near, 1)
        order = np.argsort(-value, axis=1, kind="stable")
        parts["near_own"].append(np.take_along_axis(near, order, 1).astype(np.int32))
        parts["near_own_cosine"].append(np.take_along_axis(value, order, 1).astype(np.float32))
        parts["copies"].append((cosine > _COPY).sum(1).astype(np.int32))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _decoder(cell: CellFolder, warnings: list[str]) -> np.ndarray | None:
    """Decoder with rows of length 1 [latent d_model]; None if it cannot be read."""
    try:
        with safe_open(cell.path / WEIGHTS_FILE, framework="numpy") as file:
            decoder = file.get_tensor("decoder").astype(np.float32)
        norms = np.linalg.norm(decoder.astype(np.float64), axis=-1, keepdims=True)
        if decoder.ndim != 2 or not decoder.size or not np.isfinite(norms).all():
            raise ValueError(f"its decoder has the shape {list(decoder.shape)}, or is not finite")
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        warnings.append(f"The weights of {cell.label} cannot be read ({first_line(error)[:120]}).")
        return None
    return (decoder / np.maximum(norms, 1e-12)).astype(np.float32)
