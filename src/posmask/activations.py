"""Tokens x model -> a folder of vectors that know their token, position and text; the folder -> batches.

Vectors are stored token by token, in shards. Tokens after a context's last kept one (padding) are not stored; BOS is,
with `keep` False. As int8 a vector takes a quarter of float32's room: its numbers over a scale of its own, such that
the largest is 127.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.corpus import Tokens
from posmask.errors import DamagedFolder, DegenerateResult, NothingToDo
from posmask.folders import finished, read_manifest, take_apart, write_in_parts
from posmask.masks import Coordinate
from posmask.model import LanguageModel
from posmask.progress import announce, progress_bar
from posmask.seeds import generator

__all__ = [
    "Activations",
    "Batch",
    "Contexts",
    "Shards",
    "Stored",
    "bytes_a_token",
    "evaluation_batches",
    "harvest",
    "shards_here",
    "training_batches",
]

_TOKENS_PER_FORWARD = 4096
_TOKENS_PER_SHARD = 65536
Stored = Literal["model", "float32", "bfloat16", "int8"]
"""Precision of vectors on disk; `model` is that in which the model computes."""

Contexts = list[Int[Tensor, " context"]]
"""The numbers of the contexts of one shard, in pieces that the model sees together."""
Shards = Callable[[Tokens, list[Contexts], str, Stored, Callable[[int], None]], Iterator[dict[str, Tensor]]]
"""Computes shards, wherever it does so, in the order asked for: takes tokens, contexts of each shard, label, precision
and what is to be told how many more kept tokens are done; gives what each file holds."""

_FIELDS = ("position", "token_id", "text", "keep", "sentence", "line", "end")


def bytes_a_token(d_model: int, stored: Literal["float32", "bfloat16", "int8"]) -> int:
    """On disk, with the fields that say what token it is, in contexts of less than 2^15."""
    scale = 4 if stored == "int8" else 0
    return {"float32": 4, "bfloat16": 2, "int8": 1}[stored] * d_model + scale + 4 + 4 + 1 + 4 * 2


@dataclass(frozen=True)
class Batch:
    """Some tokens' vectors and everything that must travel with them; the fields are those of `Tokens`."""

    vectors: Float[Tensor, "token d_model"]
    position: Int[Tensor, " token"]
    token_id: Int[Tensor, " token"]
    text: Int[Tensor, " token"]
    keep: Bool[Tensor, " token"]
    sentence: Int[Tensor, " token"]
    line: Int[Tensor, " token"]
    end: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.vectors)

    def some(self, which: Bool[Tensor, " token"] | Int[Tensor, " some"]) -> "Batch":
        """Some of the tokens, chosen by truth or by number."""
        return Batch(*(getattr(self, name)[which] for name in ("vectors", *_FIELDS)))

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(getattr(self, name).to(device) for name in ("vectors", *_FIELDS)))

    def counted(self, coordinate: Coordinate) -> Int[Tensor, " token"]:
        """The tokens' positions, counted as a mask's `coordinate` says."""
        return self.position if coordinate == "context" else getattr(self, coordinate)

    def kept(self) -> "Batch":
        """The tokens that count."""
        return self.some(self.keep)


class Activations:
    """A finished folder of vectors, mapped into memory; the small per-token fields are read at once."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder, verify=True)
        self.folder = folder
        self.made_from: dict[str, Any] = manifest["made_from"]
        self._shards = [load_file(folder / name) for name in sorted(manifest["files"])]
        fields = [torch.cat([shard[name] for shard in self._shards]) for name in _FIELDS]
        fields = [field.int() if field.dtype == torch.int16 else field for field in fields]
        self.position, self.token_id, self.text, self.keep, self.sentence, self.line, self.end = fields
        sizes = torch.tensor([len(shard["vectors"]) for shard in self._shards])
        self._ends = sizes.cumsum(0)
        self._starts = self._ends - sizes

    @property
    def d_model(self) -> int:
        return self._shards[0]["vectors"].shape[1]

    @property
    def n_tokens(self) -> int:
        return len(self.position)

    @property
    def n_kept(self) -> int:
        return int(self.keep.sum())

    @property
    def n_texts(self) -> int:
        return int(self.text.max()) + 1

    @cached_property
    def centre_and_scale(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
        """The mean of the kept vectors, and the scale that makes the mean of |x - mean|^2 equal d_model * scale^2."""
        total = torch.zeros(self.d_model, dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        for batch in evaluation_batches(self):
            vectors = batch.kept().vectors.double()
            total += vectors.sum(0)
            squares += vectors.square().sum()
        mean = total / self.n_kept
        variance = squares / self.n_kept - mean.square().sum()
        if not float(variance) > 0:
            raise DegenerateResult("all vectors are equal, so there is nothing to encode: check model, layer and texts")
        return mean.float(), (variance / self.d_model).sqrt().float()

    def batch(self, index: Int[Tensor, " token"]) -> Batch:
        """The tokens of these numbers, in this order."""
        shard_of = torch.searchsorted(self._ends, index, right=True)
        stored = self._shards[0]["vectors"].dtype
        vectors = torch.empty(len(index), self.d_model, dtype=torch.float32 if stored == torch.int8 else stored)
        for number in shard_of.unique().tolist():
            rows = (shard_of == number).nonzero()[:, 0]
            place, shard = index[rows] - self._starts[number], self._shards[number]
            found = shard["vectors"][place]
            vectors[rows] = found * shard["scale"][place, None] if stored == torch.int8 else found
        return Batch(vectors, *(getattr(self, name)[index] for name in _FIELDS))


def harvest(
    tokens: Tokens,
    model: LanguageModel | None,
    folder: Path,
    made_from: Mapping[str, Any],
    label: str,
    stored: Stored = "model",
    shards: Shards | None = None,
) -> Activations:
    """Run the model over the tokens and write their vectors, unless `folder` already holds them.

    Shards that an earlier call wrote before it was stopped are not computed again; of a damaged folder only those
    that are lost.

    Args:
        stored: the vectors' precision in the folder; as int8 they come back as float32.
        made_from: identity of model, layer, precision and tokens.
        model: may be None when the folder is known to be finished, or `shards` is given.
        shards: computes them elsewhere; None: here, by `model`.

    Raises:
        NothingToDo: no token is kept.
        DegenerateResult: the model gave NaN or infinite vectors.
    """
    made_from = {**made_from, "stored": stored}
    try:
        if finished(folder, made_from):
            return Activations(folder)
    except DamagedFolder as error:
        announce(f"{error}.")
        take_apart(folder)
    if tokens.n_kept == 0:
        raise NothingToDo(f"none of the {tokens.keep.numel():,} tokens of {label} is kept: give texts with content")
    if shards is None:
        assert model is not None
        shards = partial(shards_here, model)
    wanted = {f"shard-{number:05d}.safetensors": contexts for number, contexts in enumerate(_shards(tokens))}
    with (
        write_in_parts(folder, made_from, kept_tokens=tokens.n_kept) as parts,
        progress_bar(f"harvest {label}", tokens.n_kept, "tokens") as advance,
    ):
        missing = {name: contexts for name, contexts in wanted.items() if name not in parts}
        advance(sum(int(tokens.keep[chunk].sum()) for name in wanted.keys() - missing for chunk in wanted[name]))
        for name, shard in zip(missing, shards(tokens, list(missing.values()), label, stored, advance), strict=True):
            parts.add(name, lambda path, shard=shard: save_file(shard, path))
    return Activations(folder)


def shards_here(
    model: LanguageModel,
    tokens: Tokens,
    wanted: list[Contexts],
    label: str,
    stored: Stored,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """`Shards` of this process: runs the model."""
    model.check_length(tokens.id.shape[1])
    for contexts in wanted:
        found = [_harvested(tokens, chunk, model, label, stored, advance) for chunk in contexts]
        yield {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _harvested(
    tokens: Tokens,
    chunk: Int[Tensor, " context"],
    model: LanguageModel,
    label: str,
    stored: Stored,
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
        **_as_stored(vectors[there], stored),
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


def _as_stored(vectors: Float[Tensor, "token d_model"], stored: Stored) -> dict[str, Tensor]:
    if stored == "int8":
        scale = (vectors.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        whole = (vectors.float() / scale[:, None]).round().to(torch.int8)
        return {"vectors": whole, "scale": scale}
    return {"vectors": vectors if stored == "model" else vectors.to(getattr(torch, stored))}


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


def evaluation_batches(activations: Activations, batch_tokens: int = 4096) -> Iterator[Batch]:
    """Every stored token once, in order; whole contexts, as many as fit into `batch_tokens` (at least one)."""
    ends = [*(activations.position == 0).nonzero()[1:, 0].tolist(), activations.n_tokens]
    start = end = 0
    for next_end in ends:
        if next_end - start > batch_tokens and end > start:
            yield activations.batch(torch.arange(start, end))
            start = end
        end = next_end
    yield activations.batch(torch.arange(start, end))


def training_batches(
    activations: Activations,
    batch_tokens: int,
    n_batches: int,
    seed: int,
    *,
    after: int = 0,
    mine: Callable[[Int[Tensor, " token"]], Int[Tensor, " some"]] | None = None,
) -> Iterator[Batch]:
    """Random batches of kept tokens: each token at most once an epoch, in a new order each epoch.

    What is left of an epoch after its last whole batch is not used in it.

    Within a batch tokens stand by position, which changes no loss and lets masks work on runs of tokens.

    Args:
        after: go on where so many batches end.
        mine: from a batch's positions, the numbers of the tokens to read, where several processes share it.

    Raises:
        NothingToDo: fewer kept tokens than one batch.
    """
    kept = activations.keep.nonzero()[:, 0]
    if len(kept) < batch_tokens:
        raise NothingToDo(
            f"batch_tokens = {batch_tokens:,} is more than the {len(kept):,} kept tokens: lower it, or harvest more"
        )
    random = generator(seed, "batches")
    batches_per_epoch = len(kept) // batch_tokens
    order = kept
    for number in range(after + n_batches):
        place = number % batches_per_epoch
        if place == 0:
            order = kept[torch.randperm(len(kept), generator=random)]
        if number < after:
            continue
        index = order[place * batch_tokens : (place + 1) * batch_tokens]
        index = index[torch.sort(activations.position[index], stable=True).indices]
        yield activations.batch(index if mine is None else index[mine(activations.position[index])])
