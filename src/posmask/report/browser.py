"""What the latent browser shows, as blocks of bytes that are decoded only when looked at.

A block is gzip over: the length of a JSON header (4 bytes, little endian), the header, and its arrays, each at a
multiple of 8 bytes. One block for each cell; the held-out tokens and the words stand once, in a block that cells share.
"""

import gzip
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from posmask.report.reading import CellFolder

__all__ = ["Browser", "browser", "pack", "shown_word"]

_FILE, _WORDS, _WEIGHTS = "latents.safetensors", "latents.json", "sae.safetensors"
_N_NEAREST = 8
_TWIN = 0.7  # Cosine of decoder rows above which two latents count as the same feature.
_LONGEST_WORD = 40
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Browser:
    """`blocks` by name; `cells`: what the page needs to offer them: label, block, number of latents kept and in all."""

    blocks: dict[str, bytes]
    cells: list[dict[str, Any]]


def shown_word(word: str) -> str:
    """A token's text as it may stand on a page: control and direction characters visible, 40 characters at most.

    >>> shown_word("a\\tb"), shown_word("\\u202ex"), len(shown_word("x" * 10_000_000))
    ('a⇥b', '⟨202E⟩x', 41)
    """
    word = word if len(word) <= _LONGEST_WORD else word[:_LONGEST_WORD] + "…"
    word = word.replace("\n", "↵").replace("\t", "⇥")
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(f"⟨{ord(one):X}⟩" if unicodedata.category(one) in hidden else one for one in word)


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """One block."""
    places, body = {}, b""
    for name, array in arrays.items():
        body += b"\0" * (-len(body) % 8)
        places[name] = {"type": array.dtype.name, "shape": list(array.shape), "at": len(body)}
        body += np.ascontiguousarray(array).tobytes()
    text = json.dumps({**header, "arrays": places}, ensure_ascii=True, allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return gzip.compress(len(text).to_bytes(4, "little") + text + body, 6, mtime=0)


def browser(
    shown: Sequence[CellFolder], every: Sequence[CellFolder], n_kept: int | None, warnings: list[str]
) -> Browser:
    """Everything that is to be looked at.

    Args:
        shown: the cells whose latents can be looked at.
        every: all cells, of all seeds, in which the same latents are looked for.
        n_kept: how many latents of each cell, the most telling ones; None keeps all.
    """
    found = []
    for cell in shown:
        if not (cell.path / _FILE).is_file():
            continue
        try:
            arrays = load_file(cell.path / _FILE)
            words = json.loads((cell.path / _WORDS).read_text(encoding="utf8"))
            openness = load_file(cell.path / "openness.safetensors")["openness"]
            found.append((cell, arrays, words, openness, _telling(arrays, n_kept)))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            warnings.append(f"the latents of {cell.label} cannot be read ({type(error).__name__}: {str(error)[:120]}).")
    without = [cell.cell for cell in shown if not (cell.path / _FILE).is_file()]
    if without:
        warnings.append(
            f"{len(without)} cells have no data for the latent browser ({', '.join(without[:4])}"
            f"{' …' if len(without) > 4 else ''})."
        )
    nearest = _nearest([(cell, kept) for cell, _, _, _, kept in found], every, warnings)
    blocks: dict[str, bytes] = {}
    cells, streams = [], {}
    for number, (cell, arrays, words, openness, kept) in enumerate(found):
        key = (arrays["token_id"].tobytes(), arrays["token_position"].tobytes())
        stream = streams.setdefault(key, _Stream(f"texts-{len(streams)}", arrays, words["words"]))
        name = f"cell-{number}"
        seeds, near = nearest.get(cell, ([], {}))
        about = {
            "cell": cell.cell,
            "seed": cell.seed,
            "other_seeds": seeds,
            "texts": stream.name,
            "probes": words["probes"],
            "position_origin": words["position_origin"],
            "tokens": words["n_tokens"],
            "searched": words["n_tokens_searched_for_texts"],
            "identity": cell.manifest["identity"],
        }
        blocks[name] = pack(about, _cell_arrays(arrays, openness, kept, stream, words["words"]) | near)
        cells.append(
            {
                "label": cell.label,
                "cell": cell.cell,
                "seed": cell.seed,
                "block": name,
                "kept": len(kept),
                "of": len(arrays["firings"]),
            }
        )
    blocks |= {stream.name: stream.block() for stream in streams.values()}
    return Browser(blocks, cells)


class _Stream:
    """The held-out tokens that cells of one study share, and every word that one of them names."""

    def __init__(self, name: str, arrays: dict[str, np.ndarray], words: dict[str, str]) -> None:
        self.name = name
        self._ids, self._token = np.unique(arrays["token_id"], return_inverse=True)
        self._place = {int(one): number for number, one in enumerate(self._ids)}
        self._position = arrays["token_position"].astype(np.uint16)
        self._words = [shown_word(words[str(one)]) for one in self._ids]

    def places(self, ids: np.ndarray, words: dict[str, str]) -> np.ndarray:
        """Where these tokens' words stand; those that are new are added."""
        for one in np.unique(ids).tolist():
            if one not in self._place:
                self._place[one] = len(self._words)
                self._words.append(shown_word(words[str(one)]))
        return np.vectorize(self._place.__getitem__, otypes=[np.int32])(ids)

    def block(self) -> bytes:
        return pack({"words": self._words}, {"token": self._token.astype(np.int32), "position": self._position})


def _telling(arrays: dict[str, np.ndarray], n_kept: int | None) -> np.ndarray:
    """The latents to keep, in their order.

    Half of the places go to latents that probes chose, first choices first; the others to those whose firing says most
    of position. What is left goes to those that fire most.
    """
    n_latents = len(arrays["firings"])
    if n_kept is None or n_kept >= n_latents:
        return np.arange(n_latents)
    chosen = [int(one) for one in arrays["probe_latent"].T.ravel() if one >= 0]
    probed = list(dict.fromkeys(chosen))[: n_kept // 2]
    by_position = np.argsort(-np.nan_to_num(arrays["position_information"], nan=-1), kind="stable")
    by_firing = np.argsort(-arrays["firings"], kind="stable")
    n_positional = (n_kept - len(probed)) * 3 // 4
    kept = list(dict.fromkeys([*probed, *by_position[:n_positional].tolist()]))
    return np.sort(list(dict.fromkeys([*kept, *by_firing.tolist()]))[:n_kept])


def _cell_arrays(
    arrays: dict[str, np.ndarray], openness: np.ndarray, kept: np.ndarray, stream: _Stream, words: dict[str, str]
) -> dict[str, np.ndarray]:
    profile = arrays["profile"][:, kept].T.astype(np.float32)
    highest = profile.max(1)
    known = {
        "latent": kept.astype(np.int32),
        "profile": np.round(255 * profile / np.maximum(highest, 1e-30)[:, None]).astype(np.uint8),
        "highest": highest,
        "openness": np.round(255 * openness[:, kept].T.clip(0, 1)).astype(np.uint8),
        "probe_latent": arrays["probe_latent"],
        "probe_weight": arrays["probe_weight"],
    }
    for name in ("firings", "position_information", "retention", "retention_chance", "largest"):
        known[name] = arrays[name][kept]
    for name in ("text_start", "text_length", "text_value"):
        known[name] = arrays[name][kept]
    for name in ("promoted", "suppressed"):
        known[name] = stream.places(arrays[name][kept], words)
        known[f"{name}_logit"] = arrays[f"{name}_logit"][kept].astype(np.float32).round(1)
    return known


def _nearest(
    found: Sequence[tuple[CellFolder, np.ndarray]], every: Sequence[CellFolder], warnings: list[str]
) -> dict[CellFolder, tuple[list[int], dict[str, np.ndarray]]]:
    """The latents whose decoder rows point most nearly the same way, for those kept of each cell.

    In the same cell: `near_own` [latent near] with `near_own_cosine`, and `twins`, how many others have a cosine above
    0.7. In the other cells that are shown, of the same seed where there is one: `near_cell`, `near_latent` and
    `near_cosine` [latent near], the nearest one of each, the nearest cells first. In the same cell of other seeds,
    shown or not: their numbers, and `seed_latent` and `seed_cosine` [latent seed], the nearest one of each. One cell's
    weights are in memory at a time, and the rows of those kept.
    """
    rows: dict[CellFolder, np.ndarray] = {}
    place = {cell: number for number, (cell, _) in enumerate(found)}
    kept_of = dict(found)
    for cell, kept in found:
        decoder = _decoder(cell, warnings)
        if decoder is not None:
            rows[cell] = decoder[kept]
    by_seed: dict[str, dict[int, CellFolder]] = {}
    for cell in rows:
        by_seed.setdefault(cell.cell, {})[cell.seed] = cell

    def looked_at_by(cell: CellFolder, other: CellFolder) -> bool:
        if cell.cell == other.cell:
            return True
        seeds = by_seed.get(other.cell, {})
        return seeds.get(cell.seed, next(iter(seeds.values()), None)) is other

    own: dict[CellFolder, dict[str, np.ndarray]] = {}
    in_cells: dict[CellFolder, list[tuple[int, np.ndarray, np.ndarray]]] = {cell: [] for cell in rows}
    in_seeds: dict[CellFolder, list[tuple[int, np.ndarray, np.ndarray]]] = {cell: [] for cell in rows}
    for other in every:
        asking = [cell for cell in rows if looked_at_by(cell, other)]
        decoder = _decoder(other, [] if other in place else warnings) if asking else None
        if decoder is None:
            continue
        for cell in asking:
            if rows[cell].shape[1] != decoder.shape[1]:  # of a study of another model
                continue
            if cell is other:
                own[cell] = _nearest_own(rows[cell], kept_of[cell], decoder)
                continue
            best, cosine = _nearest_one(rows[cell], decoder)
            if cell.cell == other.cell:
                in_seeds[cell].append((other.seed, best, cosine))
            else:
                in_cells[cell].append((place[other], best, cosine))
    return {cell: _joined(own[cell], in_cells[cell], in_seeds[cell]) for cell in own}


def _joined(
    own: dict[str, np.ndarray],
    in_cells: list[tuple[int, np.ndarray, np.ndarray]],
    in_seeds: list[tuple[int, np.ndarray, np.ndarray]],
) -> tuple[list[int], dict[str, np.ndarray]]:
    made = dict(own)
    if in_cells:
        cosine = np.stack([found for _, _, found in in_cells], 1)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :_N_NEAREST]
        latent = np.stack([found for _, found, _ in in_cells], 1)
        made["near_cell"] = np.array([number for number, _, _ in in_cells], np.int32)[order]
        made["near_latent"] = np.take_along_axis(latent, order, 1)
        made["near_cosine"] = np.take_along_axis(cosine, order, 1).round(3)
    in_seeds = sorted(in_seeds, key=lambda found: found[0])
    if in_seeds:
        made["seed_latent"] = np.stack([found for _, found, _ in in_seeds], 1)
        made["seed_cosine"] = np.stack([found for _, _, found in in_seeds], 1).round(3)
    return [seed for seed, _, _ in in_seeds], made


def _nearest_one(rows: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the decoder row of largest cosine, and that."""
    best, value = [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        cosine = rows[start : start + _ROWS_AT_ONCE] @ decoder.T
        best.append(cosine.argmax(1).astype(np.int32))
        value.append(cosine.max(1))
    return np.concatenate(best), np.concatenate(value)


def _nearest_own(rows: np.ndarray, kept: np.ndarray, decoder: np.ndarray) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {"near_own": [], "near_own_cosine": [], "twins": []}
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
        parts["twins"].append((cosine > _TWIN).sum(1).astype(np.int32))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _decoder(cell: CellFolder, warnings: list[str]) -> np.ndarray | None:
    """[latent d_model], rows of length 1; None where it cannot be read."""
    try:
        with safe_open(cell.path / _WEIGHTS, framework="numpy") as file:
            decoder = file.get_tensor("decoder").astype(np.float32)
    except (OSError, KeyError, SafetensorError) as error:
        warnings.append(f"the weights of {cell.label} cannot be read ({str(error)[:120]}).")
        return None
    return decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-12)
