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
from posmask.kernels.devices import memory_for
from posmask.progress import announce, progress_bar
from posmask.storage.manifest import MANIFEST, take_apart, write_in_parts
from posmask.storage.remote import StoredFolder

__all__ = ["ComputeShards", "Contexts", "harvest", "shards_here"]

_TOKENS_PER_FORWARD = 4096
_TOKENS_PER_SHARD = 65536

Contexts = list[Int[Tensor, " _"]]
"""Indices of the contexts of one shard, in chunks that run through the model together."""
ComputeShards = Callable[
    [Tokens, list[Contexts], str, StorageDtype, Callable[[int], None]], Iterator[dict[str, Tensor]]
]
"""Computes the tensors of shards, in this process or elsewhere, and yields them in the given order.

Takes the tokens, the contexts of each shard, a label, the precision on disk, and a callback that receives the number of
kept tokens finished since its last call."""


@memory_for("the harvest", "set model.precision to 'bfloat16', or lower corpus.n_positions or --jobs")
def harvest(
    tokens: Tokens,
    model: LanguageModel | None,
    folder: Path | StoredFolder,
    made_from: Mapping[str, Any],
    label: str,
    storage_dtype: StorageDtype = "model",
    compute: ComputeShards | None = None,
) -> Activations:
    """Run the model over the tokens and write their vectors, unless `folder` already has them.

    Shards that an interrupted call wrote are not recomputed. In a damaged folder only the damaged shards are.

    Args:
        model: may be None if the folder is known to be finished or `compute` is given.
        folder: on disk or in a remote store.
        made_from: identity of model, layer, precision and tokens.
        label: name of the texts, for the progress bar and messages.
        storage_dtype: precision of the vectors in the folder; int8 vectors are read back as float32.
        compute: computes shards elsewhere; None computes them in this process with `model`.

    Raises:
        NothingToDo: no token is kept.
        DegenerateResult: the model gave NaN or infinite vectors.
        BadSetting: `folder` contains files that posmask did not write.
        OutOfMemory: the model needs more memory than there is.
    """
    made_from = {**made_from, "stored": storage_dtype}
    shards = {f"shard-{number:05d}.safetensors": contexts for number, contexts in enumerate(_shards(tokens))}
    try:
        if (activations := finished_activations(folder, made_from)) is not None:
            return activations
    except DamagedFolder as error:
        announce(f"{error}.")
        if isinstance(folder, StoredFolder):
            folder.unfinish()
        else:
            take_apart(folder, MANIFEST, *shards)
    if tokens.n_kept == 0:
        raise NothingToDo(f"none of the {tokens.keep.numel():,} tokens of {label} is kept: give texts with content")
    if compute is None:
        assert model is not None
        compute = partial(shards_here, model)
    with (
        _parts(folder, made_from, kept_tokens=tokens.n_kept) as (is_written, add),
        progress_bar(f"harvest {label}", tokens.n_kept, "tokens") as advance,
    ):
        missing = {name: contexts for name, contexts in shards.items() if not is_written(name)}
        advance(sum(int(tokens.keep[chunk].sum()) for name in shards.keys() - missing for chunk in shards[name]))
        computed = compute(tokens, list(missing.values()), label, storage_dtype, advance)
        for name, shard in zip(missing, computed, strict=True):
            add(name, shard)
    return Activations(folder)


@contextmanager
def _parts(
    folder: Path | StoredFolder, made_from: Mapping[str, Any], **facts: Any
) -> Iterator[tuple[Callable[[str], bool], Callable[[str, dict[str, Tensor]], None]]]:
    """Yield (function that checks whether a shard is written, function that writes it), then finish the folder."""
    if isinstance(folder, Path):
        with write_in_parts(folder, made_from, **facts) as parts:
            yield parts.__contains__, lambda name, shard: parts.add(name, lambda path: save_file(shard, path))
        return
    files = folder.complete_shards()

    def add(name: str, shard: dict[str, Tensor]) -> None:
        files.update(folder.add(name, shard, {field: shard[field] for field in _FIELDS}))

    yield files.__contains__, add
    folder.finish(made_from, facts, files)


def shards_here(
    model: LanguageModel,
    tokens: Tokens,
    shards: list[Contexts],
    label: str,
    storage_dtype: StorageDtype,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """Run the model in this process: `ComputeShards` after its first argument.

    Raises:
        BadSetting: contexts are longer than the model allows.
        DegenerateResult: the model gave NaN or infinite vectors.
    """
    model.check_length(tokens.id.shape[1])
    for contexts in shards:
        chunks = [_harvested(tokens, chunk, model, label, storage_dtype, advance) for chunk in contexts]
        yield {name: torch.cat([fields[name] for fields in chunks]) for name in chunks[0]}


def _harvested(
    tokens: Tokens,
    chunk: Int[Tensor, " context"],
    model: LanguageModel,
    label: str,
    storage_dtype: StorageDtype,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """The stored fields of the tokens of one chunk of contexts, by name."""
    length = int(_stored_length(tokens.keep[chunk]).max())
    vectors = model.vectors(tokens.id[chunk, :length])
    keep = tokens.keep[chunk, :length]
    if not bool(torch.isfinite(vectors[keep]).all()):
        raise DegenerateResult(f"the model gave NaN or infinite vectors for {label}: use precision float32")
    is_stored = torch.arange(length) < _stored_length(keep)[:, None]
    counts = torch.int16 if tokens.id.shape[1] < 2**15 else torch.int32
    advance(int(keep.sum()))
    return {
        **_as_stored(vectors[is_stored], storage_dtype),
        "token_id": tokens.id[chunk, :length][is_stored].to(torch.int32),
        "text": tokens.text[chunk, :length][is_stored].to(torch.int32),
        "keep": keep[is_stored],
        **{
            name: getattr(tokens, name)[chunk, :length][is_stored].to(counts)
            for name in ("position", "sentence", "line", "end")
        },
    }


def _shards(tokens: Tokens) -> Iterator[Contexts]:
    """The contexts of each shard. They depend on the tokens alone, so each shard can be computed separately."""
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
        rounded = (vectors.float() / scale[:, None]).round().to(torch.int8)
        return {"vectors": rounded, "scale": scale}
    return {"vectors": vectors if storage_dtype == "model" else vectors.to(getattr(torch, storage_dtype))}


def _stored_length(keep: Bool[Tensor, "context position"]) -> Int[Tensor, " context"]:
    """Position of the last kept token of each context + 1; at least 1."""
    return (keep * torch.arange(1, keep.shape[1] + 1)).amax(1).clamp(min=1)


def _forward_chunks(tokens: Tokens) -> Iterator[Int[Tensor, " context"]]:
    """Group contexts of similar length, so that little padding is computed."""
    length = _stored_length(tokens.keep)
    order = torch.sort(length, stable=True).indices
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(length[order[end]]) <= _TOKENS_PER_FORWARD:
            end += 1
        yield order[start:end]
        start = end
