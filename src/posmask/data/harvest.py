"""Harvest a model's vectors into shards on disk or in a remote store."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor

from posmask.data.activations import _FIELDS, Activations, StorageDtype, finished_activations
from posmask.data.sites import LanguageModel
from posmask.data.tokens import Tokens
from posmask.errors import DamagedFolder, DegenerateResult, NothingToDo
from posmask.progress import announce, progress_bar
from posmask.storage.manifest import MANIFEST, take_apart, write_in_parts
from posmask.storage.remote import StoredFolder

__all__ = ["ComputeShards", "Contexts", "harvest", "shards_here"]

_TOKENS_PER_FORWARD = 4096
_TOKENS_PER_SHARD = 65536

Contexts = list[Int[Tensor, " _"]]
"""The numbers of the contexts of one shard, in pieces that the model sees together."""
ComputeShards = Callable[
    [Tokens, list[Contexts], str, StorageDtype, Callable[[int], None]], Iterator[dict[str, Tensor]]
]
"""Computes shards, wherever it does so, in the order asked for: takes tokens, contexts of each shard, label, precision
and what is to be told how many more kept tokens are done; gives what each file holds."""


def harvest(
    tokens: Tokens,
    model: LanguageModel | None,
    folder: Path | StoredFolder,
    made_from: Mapping[str, Any],
    label: str,
    storage_dtype: StorageDtype = "model",
    compute: ComputeShards | None = None,
) -> Activations:
    """Run the model over the tokens and write their vectors, unless `folder` already holds them.

    Shards that an earlier call wrote before it was stopped are not computed again; of a damaged folder only those
    that are lost.

    Args:
        stored: the vectors' precision in the folder; as int8 they come back as float32.
        made_from: identity of model, layer, precision and tokens.
        model: may be None when the folder is known to be finished, or `compute` is given.
        compute: computes shards elsewhere; None: here, by `model`.

    Raises:
        NothingToDo: no token is kept.
        DegenerateResult: the model gave NaN or infinite vectors.
        BadSetting: `folder` holds something that posmask did not write.
    """
    made_from = {**made_from, "stored": storage_dtype}
    wanted = {f"shard-{number:05d}.safetensors": contexts for number, contexts in enumerate(_shards(tokens))}
    try:
        if (found := finished_activations(folder, made_from)) is not None:
            return found
    except DamagedFolder as error:
        announce(f"{error}.")
        if isinstance(folder, StoredFolder):
            folder.unfinish()
        else:
            take_apart(folder, MANIFEST, *wanted)
    if tokens.n_kept == 0:
        raise NothingToDo(f"none of the {tokens.keep.numel():,} tokens of {label} is kept: give texts with content")
    if compute is None:
        assert model is not None
        compute = partial(shards_here, model)
    with (
        _parts(folder, made_from, kept_tokens=tokens.n_kept) as (there, add),
        progress_bar(f"harvest {label}", tokens.n_kept, "tokens") as advance,
    ):
        missing = {name: contexts for name, contexts in wanted.items() if not there(name)}
        advance(sum(int(tokens.keep[chunk].sum()) for name in wanted.keys() - missing for chunk in wanted[name]))
        computed = compute(tokens, list(missing.values()), label, storage_dtype, advance)
        for name, shard in zip(missing, computed, strict=True):
            add(name, shard)
    return Activations(folder)


@contextmanager
def _parts(
    folder: Path | StoredFolder, made_from: Mapping[str, Any], **facts: Any
) -> Iterator[tuple[Callable[[str], bool], Callable[[str, dict[str, Tensor]], None]]]:
    """Yields (whether a shard is there already, put one there); the folder is finished at the end."""
    if isinstance(folder, Path):
        with write_in_parts(folder, made_from, **facts) as parts:
            yield parts.__contains__, lambda name, shard: parts.add(name, lambda path: save_file(shard, path))
        return
    files = folder.whole_shards()

    def add(name: str, shard: dict[str, Tensor]) -> None:
        files.update(folder.add(name, shard, {field: shard[field] for field in _FIELDS}))

    yield files.__contains__, add
    folder.finish(made_from, facts, files)


def shards_here(
    model: LanguageModel,
    tokens: Tokens,
    wanted: list[Contexts],
    label: str,
    storage_dtype: StorageDtype,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """`ComputeShards` of this process: runs the model."""
    model.check_length(tokens.id.shape[1])
    for contexts in wanted:
        found = [_harvested(tokens, chunk, model, label, storage_dtype, advance) for chunk in contexts]
        yield {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _harvested(
    tokens: Tokens,
    chunk: Int[Tensor, " context"],
    model: LanguageModel,
    label: str,
    storage_dtype: StorageDtype,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """The fields of a few contexts' tokens, as they are stored."""
    length = int(_stored_length(tokens.keep[chunk]).max())
    vectors = model.vectors(tokens.id[chunk, :length])
    keep = tokens.keep[chunk, :length]
    if not bool(torch.isfinite(vectors[keep]).all()):
        raise DegenerateResult(f"the model gave NaN or infinite vectors for {label}: use precision float32")
    there = torch.arange(length) < _stored_length(keep)[:, None]
    counts = torch.int16 if tokens.id.shape[1] < 2**15 else torch.int32
    advance(int(keep.sum()))
    return {
        **_as_stored(vectors[there], storage_dtype),
        "token_id": tokens.id[chunk, :length][there].to(torch.int32),
        "text": tokens.text[chunk, :length][there].to(torch.int32),
        "keep": keep[there],
        **{
            name: getattr(tokens, name)[chunk, :length][there].to(counts)
            for name in ("position", "sentence", "line", "end")
        },
    }


def _shards(tokens: Tokens) -> Iterator[Contexts]:
    """The contexts of each shard, known before any is computed, so that each can be computed by itself."""
    chunks: list[Tensor] = []
    n_tokens = 0
    for chunk in _forward_chunks(tokens):
        chunks.append(chunk)
        n_tokens += int(_stored_length(tokens.keep[chunk]).sum())
        if n_tokens >= _TOKENS_PER_SHARD:
            yield chunks
            chunks, n_tokens = [], 0
    if chunks:
        yield chunks


def _as_stored(vectors: Float[Tensor, "token d_model"], storage_dtype: StorageDtype) -> dict[str, Tensor]:
    if storage_dtype == "int8":
        scale = (vectors.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        whole = (vectors.float() / scale[:, None]).round().to(torch.int8)
        return {"vectors": whole, "scale": scale}
    return {"vectors": vectors if storage_dtype == "model" else vectors.to(getattr(torch, storage_dtype))}


def _stored_length(keep: Bool[Tensor, "context position"]) -> Int[Tensor, " context"]:
    """Position of each context's last kept token + 1; at least 1."""
    return (keep * torch.arange(1, keep.shape[1] + 1)).amax(1).clamp(min=1)


def _forward_chunks(tokens: Tokens) -> Iterator[Int[Tensor, " context"]]:
    """Contexts of similar length together, so that little padding is computed."""
    length = _stored_length(tokens.keep)
    order = torch.sort(length, stable=True).indices
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(length[order[end]]) <= _TOKENS_PER_FORWARD:
            end += 1
        yield order[start:end]
        start = end
