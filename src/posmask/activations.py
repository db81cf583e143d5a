"""Tokens x model -> a folder of vectors that know their token, position and text; the folder -> batches.

Vectors are stored token by token, in shards, on the disk or in a store (`store.py`). Tokens after a context's last kept
one (padding) are not stored; BOS is, with `keep` False. As int8 a vector takes a quarter of float32's room: its numbers
over a scale of its own, such that the largest is 127.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from posmask.corpus import Tokens
from posmask.errors import BadSetting, DamagedFolder, DegenerateResult, NothingToDo
from posmask.folders import MANIFEST, finished, read_manifest, take_apart, write_in_parts
from posmask.masks import Coordinate
from posmask.model import LanguageModel
from posmask.progress import announce, progress_bar
from posmask.seeds import generator
from posmask.store import Shards, StoredFolder

__all__ = [
    "Activations",
    "Batch",
    "ComputeShards",
    "Contexts",
    "Stored",
    "bytes_a_token",
    "evaluation_batches",
    "finished_activations",
    "harvest",
    "shards_here",
    "training_batches",
]

_TOKENS_PER_FORWARD = 4096
_TOKENS_PER_SHARD = 65536
_SHARDS_PER_WINDOW = 512
Stored = Literal["model", "float32", "bfloat16", "int8"]
"""Precision of vectors on disk; `model` is that in which the model computes."""

Contexts = list[Int[Tensor, " _"]]
"""The numbers of the contexts of one shard, in pieces that the model sees together."""
ComputeShards = Callable[[Tokens, list[Contexts], str, Stored, Callable[[int], None]], Iterator[dict[str, Tensor]]]
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
    """A finished folder of vectors; the small per-token fields are read at once.

    Shards are mapped into memory, or brought here from a store as they are needed.

    Args:
        manifest: of a folder in a store, where it was read already.
    """

    def __init__(self, folder: Path | StoredFolder, manifest: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._shards: Sequence[dict[str, Tensor]] | Shards
        if isinstance(folder, StoredFolder):
            manifest = manifest or folder.manifest()
            assert manifest is not None
            self._shards = Shards(folder, manifest)
            tokens = self._shards.tokens()
        else:
            manifest = read_manifest(folder, verify=True)
            self._shards = tokens = [load_file(folder / name) for name in sorted(manifest["files"])]
        self.made_from: dict[str, Any] = manifest["made_from"]
        fields = [torch.cat([shard[name] for shard in tokens]) for name in _FIELDS]
        fields = [field.int() if field.dtype == torch.int16 else field for field in fields]
        self.position, self.token_id, self.text, self.keep, self.sentence, self.line, self.end = fields
        sizes = torch.tensor([len(shard["position"]) for shard in tokens])
        self._ends = sizes.cumsum(0)
        self._starts = self._ends - sizes
        first = self._shards[0]["vectors"]
        self.d_model: int = first.shape[1]
        self._stored = first.dtype

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
        stored = self._stored
        vectors = torch.empty(len(index), self.d_model, dtype=torch.float32 if stored == torch.int8 else stored)
        for number in shard_of.unique().tolist():
            rows = (shard_of == number).nonzero()[:, 0]
            place, shard = index[rows] - self._starts[number], self._shards[number]
            found = shard["vectors"][place]
            vectors[rows] = found * shard["scale"][place, None] if stored == torch.int8 else found
        return Batch(vectors, *(getattr(self, name)[index] for name in _FIELDS))

    def shuffled(self, kept: Int[Tensor, " token"], random: torch.Generator) -> Int[Tensor, " token"]:
        """These tokens (numbers in order) as an epoch takes them: see `training_batches`."""
        n_shards = len(self._shards)
        if n_shards <= _SHARDS_PER_WINDOW:
            return kept[torch.randperm(len(kept), generator=random)]
        ends = torch.searchsorted(kept, self._ends)
        of_shard = kept.tensor_split(ends[:-1])
        order = []
        for numbers in torch.randperm(n_shards, generator=random).split(_SHARDS_PER_WINDOW):
            some = torch.cat([of_shard[number] for number in numbers.tolist()])
            order.append(some[torch.randperm(len(some), generator=random)])
        return torch.cat(order)

    def check_room(self) -> None:
        """
        Raises:
            BadSetting: random batches out of a store would bring the same shards here again and again.
        """
        shards = self._shards
        if not isinstance(shards, Shards):
            return
        needed = sum(sorted(shards.bytes_of(number) for number in range(len(shards)))[-_SHARDS_PER_WINDOW - 1 :])
        if needed > shards.cache_bytes:
            raise BadSetting(
                f"activations_cache_gb allows {shards.cache_bytes / 1e9:.3g} GB here, but random batches are drawn "
                f"from {needed / 1e9:.3g} GB at a time: raise it"
            )


def harvest(
    tokens: Tokens,
    model: LanguageModel | None,
    folder: Path | StoredFolder,
    made_from: Mapping[str, Any],
    label: str,
    stored: Stored = "model",
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
    made_from = {**made_from, "stored": stored}
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
        for name, shard in zip(missing, compute(tokens, list(missing.values()), label, stored, advance), strict=True):
            add(name, shard)
    return Activations(folder)


def finished_activations(folder: Path | StoredFolder, made_from: Mapping[str, Any]) -> Activations | None:
    """The vectors, where the folder is finished and made from exactly this.

    Raises:
        DamagedFolder: it is not what was written.
    """
    if isinstance(folder, StoredFolder):
        manifest = folder.finished(made_from)
        return None if manifest is None else Activations(folder, manifest)
    return Activations(folder) if finished(folder, made_from) else None


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
    stored: Stored,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """`ComputeShards` of this process: runs the model."""
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

    What is left of an epoch after its last whole batch is not used in it. Of more than 512 shards (33 million tokens)
    an epoch goes through windows of so many, shards in a new order each epoch, tokens of a window in random order, so
    that never more need be at hand.

    Within a batch tokens stand by position, which changes no loss and lets masks work on runs of tokens.

    Args:
        after: go on where so many batches end.
        mine: from a batch's positions, the numbers of the tokens to read, where several processes share it.

    Raises:
        NothingToDo: fewer kept tokens than one batch.
        BadSetting: what may lie here of a store is less than a window.
    """
    activations.check_room()
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
            order = activations.shuffled(kept, random)
        if number < after:
            continue
        index = order[place * batch_tokens : (place + 1) * batch_tokens]
        index = index[torch.sort(activations.position[index], stable=True).indices]
        yield activations.batch(index if mine is None else index[mine(activations.position[index])])
