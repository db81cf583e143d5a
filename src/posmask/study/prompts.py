"""Codes of a text that a reader types: tokens, vectors and codes are those of a run."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from posmask.data.activations import Batch
from posmask.data.harvest import shards_here
from posmask.data.texts import why_unusable
from posmask.data.tokens import count_tokens, pad
from posmask.errors import BadSetting, DamagedFolder, NothingToDo, first_line
from posmask.evaluation.latents import token_text
from posmask.kernels.devices import memory_for
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.files import read_origin, read_sae
from posmask.storage import layout
from posmask.storage.json_file import read_json
from posmask.storage.manifest import read_manifest
from posmask.study.settings import ModelSettings
from posmask.study.source import Source

__all__ = ["Prompts"]

_PER_TOKEN = 10
"""The latents returned are those among the strongest at any token."""


class Prompts:
    """Encodes texts with the SAEs of run folders, as the run that made them does.

    The last model and the last SAE stay in memory. Not for several threads at a time.

    Args:
        roots: the folders of studies or audits.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._source: Source | None = None
        self._sae: tuple[Path, SparseAutoencoder] | None = None

    @memory_for("encoding the text", "close other programs, or choose a smaller model")
    def codes(self, name: str, identity: str, text: str) -> dict[str, Any]:
        """The tokens of a text and the latents that fire on them.

        The text stands after BOS in a context of its own, so its first token is at position 1.

        Args:
            name: folder of the SAE in a root, such as `cells/slice-seed0`.
            identity: of that folder, so that a recomputed cell is not taken for the one that a page shows.
            text: tokens beyond the context are left out.

        Returns:
            Values for JSON. `words`, `position` and `state` have an entry per token; `state` is `encoded`, `sink` or
            `special`. `left_out` is the number of tokens beyond the context. `masks` has the codes with the mask `on`
            and, if that may differ, `lifted`: `token` (an index), `latent` and `value` per active code, of the latents
            that are among the strongest at some token; `active` is the number of all active latents per token.

        Raises:
            BadSetting: there is no such folder, or its model is not the one that it was made with.
            DamagedFolder: the folder differs from what was written.
            NothingToDo: the text has no token that is encoded.
        """
        if (reason := why_unusable(text)) is not None:
            raise BadSetting(f"the text is a value {reason}, which no tokenizer takes: give characters")
        root, folder = self._folder(name, identity)
        made_from = read_manifest(folder).get("made_from", {})
        if not made_from.keys() >= {"model", "corpus"}:
            raise DamagedFolder(f"{folder} does not state its model and contexts: `posmask run` recomputes it")
        sae, source = self._read(folder), self._opened(root, folder, made_from["model"])
        tokens = pad([text], source.tokenizer, made_from["corpus"]["n_positions"])
        if not tokens.n_kept:
            raise NothingToDo("the text has no token but special ones, which are not encoded: type some words")
        context = torch.tensor([0])
        (shard,) = shards_here(source.loaded, tokens, [[context]], "the text", "model", lambda n_kept: None)
        batch = Batch(**{field.name: shard[field.name] for field in fields(Batch)})
        encoded = batch.keep.nonzero()[:, 0] - 1  # indices of tokens, without BOS
        kept = batch.kept()
        masks = {"on": sae.encode_batch(kept)}
        if sae.mask.lifting_matters():
            masks["lifted"] = sae.encode_batch(kept, use_mask=False)
        states = zip(shard["keep"][1:].tolist(), shard["sink"][1:].tolist(), strict=True)
        return {
            "words": [token_text(source.tokenizer, token) for token in batch.token_id[1:].tolist()],
            "position": batch.position[1:].tolist(),
            "state": ["encoded" if keep else "sink" if sink else "special" for keep, sink in states],
            "left_out": count_tokens([text], source.tokenizer, 2**62) - tokens.n_kept,
            "masks": {mask: _listed(codes, encoded, len(batch) - 1) for mask, codes in masks.items()},
        }

    def _folder(self, name: str, identity: str) -> tuple[Path, Path]:
        """The root and the folder of an SAE."""
        kind, _, label = name.partition("/")
        n_other = 0
        for root in self._roots:
            parent = {"cells": layout.cells_folder(root), "evaluated": layout.evaluated_folders(root)}.get(kind)
            if parent is None or not parent.is_dir() or label not in {path.name for path in parent.iterdir()}:
                continue
            if read_manifest(parent / label)["identity"] == identity:
                return root, parent / label
            n_other += 1
        if n_other:
            raise BadSetting(
                f"{name} was made from other settings than the page shows, or is of another study: write the page "
                "again, or serve the folders of all its studies"
            )
        raise BadSetting(
            f"{name} is not in {', '.join(map(str, self._roots))}: if the page is of several studies, give all of "
            "their folders to `posmask serve`"
        )

    def _read(self, folder: Path) -> SparseAutoencoder:
        if self._sae is None or self._sae[0] != folder:
            self._sae = None  # frees it before the next one is read
            self._sae = folder, read_sae(folder, verify=True)
        return self._sae[1]

    def _opened(self, root: Path, folder: Path, made_from: dict[str, Any]) -> Source:
        """The model that the folder's vectors come from, with the settings of the run."""
        if self._source is None or self._source.made_from != made_from:
            self._source = None
            settings = {"site": "residual_after", **made_from}
            weights = settings.pop("weights")
            source = Source(ModelSettings(name=_model_name(root, folder), **settings))
            if source.made_from != made_from:
                raise BadSetting(
                    f"model {source.name!r} is not the one that {folder.name} was made with: its weights are "
                    f"{source.made_from['weights']!r} instead of {weights!r}; put those back, or run the study again"
                )
            _ = source.loaded
            self._source = source
        return self._source


def _model_name(root: Path, folder: Path) -> str:
    """The name under which the run of an SAE loaded its model.

    Raises:
        DamagedFolder: it is not recorded.
    """
    summary = folder / layout.SUMMARY_FILE
    try:
        if summary.is_file():
            return read_json(summary)["model"]
        if folder.parent != layout.cells_folder(root):  # Another tool may have another name for the model.
            for cell in sorted(layout.cells_folder(root).glob("[!.]*")):
                with suppress(DamagedFolder, KeyError):
                    return read_origin(cell)["model"]
        return read_origin(folder)["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFolder(f"{folder} does not state its model ({first_line(error)}): compute it again") from None


def _listed(codes: Codes, encoded: torch.Tensor, n_tokens: int) -> dict[str, list[Any]]:
    """The codes of the latents that are among the strongest at some token, and the number of active ones per token.

    Args:
        encoded: index of each encoded token among all tokens.
        n_tokens: number of all tokens.
    """
    order = torch.sort(codes.value, descending=True, stable=True).indices
    order = order[torch.sort(codes.token[order], stable=True).indices]  # by token, the strongest first
    n_active = torch.bincount(codes.token, minlength=codes.n_tokens)
    rank = torch.arange(len(order)) - (n_active.cumsum(0) - n_active)[codes.token[order]]
    strongest = codes.latent[order[rank < _PER_TOKEN]].unique()
    order = order[torch.isin(codes.latent[order], strongest)]
    active = torch.zeros(n_tokens, dtype=torch.int64)
    active[encoded] = n_active
    return {
        "token": encoded[codes.token[order]].tolist(),
        "latent": codes.latent[order].tolist(),
        "value": codes.value[order].tolist(),
        "active": active.tolist(),
    }
