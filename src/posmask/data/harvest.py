"""Harvest a model's vectors into shards on disk or in a remote store."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.data.activations import STORED_FIELDS, Activations, StorageDtype, finished_activations
from posmask.data.sites import LanguageModel
from posmask.data.tokens import Tokens
from posmask.errors import DamagedFolder, DegenerateResult, NothingToDo
from posmask.kernels.devices import memory_for
from posmask.progress import announce, progress_bar, stage_label
from posmask.storage.manifest import MANIFEST, take_apart, write_in_parts
from posmask.storage.remote import Shards, StoredFolder

__all__ = ["ComputeShards", "Contexts", "harvest", "shards_here", "sink_sentence", "sinks"]

_TOKENS_PER_FORWARD = 4096
_TOKENS_PER_SHARD = 65536
_WRITERS = 3  # saving and hashing a shard may take longer than a GPU takes to compute it
_JOINED_TOKENS = {"cuda": 16384}  # of a pass, by device; other devices are not faster with more
_NAMED_POSITIONS = 5

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
        _parts(folder, made_from) as (is_written, add),
        progress_bar(stage_label("harvest", label), tokens.n_kept, "tokens") as advance,
    ):
        missing = {name: contexts for name, contexts in shards.items() if not is_written(name)}
        advance(sum(int(tokens.keep[chunk].sum()) for name in shards.keys() - missing for chunk in shards[name]))
        computed = compute(tokens, list(missing.values()), label, storage_dtype, advance)
        _write_behind(add, missing, computed, 1 if isinstance(folder, StoredFolder) else _WRITERS)
    activations = Activations(folder)
    if (sentence := sink_sentence(label, activations.facts)) is not None:
        announce(sentence)
    return activations


def _write_behind(
    add: Callable[[str, dict[str, Tensor]], None],
    names: Iterable[str],
    shards: Iterable[dict[str, Tensor]],
    n_writers: int,
) -> None:
    """Write shards in threads, at most `n_writers` of them while the next one is computed.

    If computing fails, the shards before are written completely. If writing fails, the shard that is being computed is
    not written.
    """
    with ThreadPoolExecutor(n_writers, "write shards") as threads:
        writing: deque[Future[None]] = deque()
        for name, shard in zip(names, shards, strict=True):
            while writing and (len(writing) == n_writers or writing[0].done()):
                writing.popleft().result()
            writing.append(threads.submit(add, name, shard))
        for written in writing:
            written.result()


@contextmanager
def _parts(
    folder: Path | StoredFolder, made_from: Mapping[str, Any]
) -> Iterator[tuple[Callable[[str], bool], Callable[[str, dict[str, Tensor]], None]]]:
    """Yield (function that checks whether a shard is written, function that writes it), then finish the folder."""
    if isinstance(folder, Path):
        with write_in_parts(folder, made_from) as parts:
            yield parts.__contains__, lambda name, shard: parts.add(name, lambda path: save_file(shard, path))
            parts.facts = _facts([load_file(parts.path(name)) for name in parts.files])
        return
    files = folder.complete_shards()

    def add(name: str, shard: dict[str, Tensor]) -> None:
        files.update(folder.add(name, shard, {field: shard[field] for field in STORED_FIELDS}))

    yield files.__contains__, add
    folder.finish(made_from, _facts(Shards(folder, {"files": files}).tokens()), files)


def _facts(shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The number of kept tokens, and of attention sinks by position."""
    position = torch.cat([shard["position"][shard["sink"]] for shard in shards])
    counts = zip(*(part.tolist() for part in position.unique(return_counts=True)), strict=True)
    n_kept = sum(int(shard["keep"].sum()) for shard in shards)
    return {"kept_tokens": n_kept, "sink_tokens": {str(number): count for number, count in counts}}


def sink_sentence(label: str, facts: Mapping[str, Any]) -> str | None:
    """How many tokens of a harvest are attention sinks, and where; None if none is.

    Args:
        facts: of the harvest's manifest.
    """
    by_position: Mapping[str, int] = facts["sink_tokens"]
    if not by_position:
        return None
    most = sorted(by_position, key=lambda position: (-by_position[position], int(position)))[:_NAMED_POSITIONS]
    where = ", ".join(f"{position} ({by_position[position]:,})" for position in most)
    n = sum(by_position.values())
    return (
        f"{label}: {n:,} of {n + facts['kept_tokens']:,} tokens are attention sinks and do not count, at position "
        f"{where}{' and others' if len(most) < len(by_position) else ''}."
    )


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
        BadSetting: contexts are longer than the model allows, or have ids that it does not know.
        DegenerateResult: the model gave NaN or infinite vectors.
    """
    model.check_length(tokens.id.shape[1])
    model.check_ids(tokens.id)
    most_tokens = _JOINED_TOKENS.get(model.device.type, 0)
    for contexts in shards:
        yield _shard(model, tokens, list(_joined(tokens, contexts, most_tokens)), label, storage_dtype, advance)


def _shard(
    model: LanguageModel,
    tokens: Tokens,
    contexts: Contexts,
    label: str,
    storage_dtype: StorageDtype,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """The stored fields of a shard by name. The host prepares each pass while the model's device computes the last."""
    fields: list[dict[str, Tensor]] = []
    vectors: dict[str, Tensor] = {}
    are_finite, end = [], 0
    n_stored = sum(int(_stored_length(tokens.keep[chunk]).sum()) for chunk in contexts)
    for chunk in contexts:
        length = int(_stored_length(tokens.keep[chunk]).max())
        keep = tokens.keep[chunk, :length]
        is_stored = torch.arange(length) < _stored_length(keep)[:, None]
        fields.append(_token_fields(tokens, chunk, is_stored))
        # Copies to the device come before the pass, because the host waits for the end of what is before a copy.
        index = is_stored.flatten().nonzero()[:, 0].to(model.device)
        is_left_out = ~fields[-1]["keep"].to(model.device)
        computed = model.vectors(tokens.id[chunk, :length]).flatten(0, 1)[index]
        are_finite.append((torch.isfinite(computed).all(1) | is_left_out).all())
        start, end = end, end + len(index)
        stored = {**_as_stored(computed, storage_dtype), "norm": computed.float().norm(dim=1)}
        for name, part in stored.items():
            if name not in vectors:
                # A GPU copies to page-locked memory while the host goes on.
                shape = n_stored, *part.shape[1:]
                vectors[name] = torch.empty(shape, dtype=part.dtype, pin_memory=part.is_cuda)
            vectors[name][start:end].copy_(part, non_blocking=True)
        advance(int(keep.sum()))
    if not bool(torch.stack(are_finite).all()):  # Reading this also waits for the copies before it.
        raise DegenerateResult(f"the model gave NaN or infinite vectors for {label}: use precision float32")
    norm = vectors.pop("norm")
    shard = {**vectors, **{name: torch.cat([part[name] for part in fields]) for name in fields[0]}}
    sink = sinks(norm, shard["keep"], model.sink_norm)
    return {**shard, "keep": shard["keep"] & ~sink, "sink": sink}


def _token_fields(
    tokens: Tokens, chunk: Int[Tensor, " context"], is_stored: Bool[Tensor, "context position"]
) -> dict[str, Tensor]:
    """The fields besides vectors of the stored tokens of some contexts, by name."""
    counts = torch.int16 if tokens.id.shape[1] < 2**15 else torch.int32
    dtypes = {"id": torch.int32, "text": torch.int32, "keep": torch.bool}
    dtypes |= dict.fromkeys(("position", "sentence", "line", "end", "text_position"), counts)
    length = is_stored.shape[1]
    return {
        "token_id" if name == "id" else name: getattr(tokens, name)[chunk, :length][is_stored].to(dtype)
        for name, dtype in dtypes.items()
    }


def _joined(tokens: Tokens, contexts: Contexts, most_tokens: int) -> Iterator[Int[Tensor, " context"]]:
    """Join successive chunks while they have at most `most_tokens` tokens, padding included."""
    joined: list[Tensor] = []
    for chunk in contexts:
        n_contexts = sum(map(len, joined)) + len(chunk)
        if joined and n_contexts * int(_stored_length(tokens.keep[chunk]).max()) > most_tokens:
            yield torch.cat(joined)
            joined = []
        joined.append(chunk)
    yield torch.cat(joined)


def sinks(norms: Float[Tensor, " token"], keep: Bool[Tensor, " token"], sink_norm: float) -> Bool[Tensor, " token"]:
    """Which kept tokens are attention sinks: those with a norm above `sink_norm` times the median of the kept tokens.

    Args:
        norms: of the vectors of a whole shard, so that a few short texts do not set the median.
        sink_norm: 0: no token is a sink.
    """
    if not sink_norm or not bool(keep.any()):
        return torch.zeros_like(keep)
    return keep & (norms > sink_norm * norms[keep].median())


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
