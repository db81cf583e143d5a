"""What the names on a page mean: masks, kinds of order, poolings and controls."""

import re
from collections.abc import Iterable, Mapping, Sequence

from posmask.results.rows import CONTROLS, Row

__all__ = ["MASKS", "terms", "variants"]

MASKS = {
    "open": "every latent is open at every position: the unmasked baseline",
    "slice": "each block of latents is open in one block of positions",
    "band": "each block of latents is open in one window of positions; later windows are wider",
    "windows": "copies of a latent share the positions: each is open in a window of its own",
    "hard": "each latent is open at a few positions drawn at random",
    "cohort": "groups of latents are open at the same positions, drawn at random",
    "soft": "how open a latent is at each position is learned, between 0 and 1",
    "importance": "each latent stays open at the positions where training needs it most",
    "split": "a latent splits into two, for earlier and for later positions, where that lowers the error",
    "switch": "no positions: a learned router sends each token to one block of latents",
}
"""Kinds of masks: what they do."""
_ORDER = {
    "block": "probes tell where passages of a text stand, from codes pooled over the text",
    "local": "probes tell in which order neighboring words or sentences stand",
}
"""Kinds of order."""
_VARIANTS = {
    "segments": "codes pooled by position: the sum in each of n equal segments of the context, divided by all tokens",
    "growing": "the same for segments that double in length",
    "parts": "codes pooled in each of n equal parts of the text, counted in the text's own tokens",
    "moment": "the mean, and the first moment over the text: how much earlier or later than its middle a latent fires",
    "max": "the largest activation in the text instead of the mean",
    "binary": "whether a latent fires in the text",
    "last": "the last token of the text",
    "attention": "an attention probe on the codes of all latents at every token, which learns how to pool",
    "chosen": "for each task and number of latents, the pooling that is best on a part of the training texts",
    "fair": "the sum divided by the number of tokens at which the latent is open",
    **CONTROLS,
}
"""What follows the + in a row's name, by how it begins."""


def terms(rows: Sequence[Row], labels: Iterable[str]) -> dict[str, str]:
    """Return what a reader must know at the head of the page: the masks of the cells, and the kinds of order.

    Args:
        rows: rows of one or several studies.
        labels: names of columns, of which those of block and local order are explained.
    """
    cells: dict[str, list[str]] = {}
    for row in rows:
        if row.mask in MASKS and row.cell not in (of_kind := cells.setdefault(row.mask, [])):
            of_kind.append(row.cell)
    explained = {_names(cells[kind]): meaning for kind, meaning in MASKS.items() if kind in cells}
    kinds = {label.partition(" k=")[0] for label in labels}
    return explained | {f"{kind} order": meaning for kind, meaning in _ORDER.items() if kind in kinds}


def _names(cells: Sequence[str]) -> str:
    """The first two cells of a kind, and how many more there are."""
    more = f" and {len(cells) - 2} more" if len(cells) > 2 else ""
    return ", ".join(cells[:2]) + more


def variants(labels: Iterable[str]) -> Mapping[str, str]:
    """Return what the poolings and controls in labels are, by name.

    >>> variants(["open", "open + max"])
    {'max': 'the largest activation in the text instead of the mean'}
    """
    names = dict.fromkeys(label.partition(" + ")[2] for label in labels if " + " in label)
    meanings = {}
    for name in names:
        meaning = next((text for start, text in _VARIANTS.items() if name.startswith(start)), "")
        if name.endswith("-mean"):
            meaning = f"{meaning.removesuffix(', divided by all tokens')}, divided by the tokens in it"
        if number := re.search(r"\d+", name):
            meaning = meaning.replace(" n ", f" {number[0]} ")
        if meaning:
            meanings[name] = meaning
    return meanings
