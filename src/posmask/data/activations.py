"""Read a folder of harvested vectors and iterate over it in batches.

Vectors are stored with their token, position and text, in shards on disk or in a remote store (`storage/remote.py`).
Tokens after the last kept token of a context (padding) are not stored; BOS is stored with `keep` False, and so are
attention sinks. An int8 vector takes a quarter of the space of float32: it is divided by a scale such that its largest
number is 127.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from posmask.data.reading import read_ahead
from posmask.errors import BadSetting, DegenerateResult, NothingToDo
from posmask.masks.base import PositionOrigin
from posmask.seeds import generator
from posmask.storage.manifest import finished, read_manifest
from posmask.storage.remote import Shards, StoredFolder

__all__ = [
    "STORED_FIELDS",
    "Activations",
    "Batch",
    "StorageDtype",
    "bytes_per_token",
    "evaluation_batches",
    "finished_activations",
    "training_batches",
]

_SHARDS_PER_WINDOW = 512
_BATCHES_AHEAD = 2
StorageDtype = Literal["model", "float32", "bfloat16", "int8"]
"""Precision of vectors on disk; `model` is the precision in which the model computes."""

_FIELDS = ("position", "token_id", "text", "keep", "sentence", "line", "end", "text_position")
_ROUNDING = {torch.float32: 2.0**-18, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-8, torch.int8: 2.0**-7}
"""Standard deviation of vectors, relative to their norm, that rounding alone may cause, by their precision on disk."""
STORED_FIELDS = (*_FIELDS, "sink")
"""What a shard holds of each token beside its vector."""


def bytes_per_token(d_model: int, stored: Literal["float32", "bfloat16", "int8"]) -> int:
    """Bytes on disk of a vector with its token, position and text, in contexts of fewer than 2^15 positions."""
    scale = 4 if stored == "int8" else 0
    return {"float32": 4, "bfloat16": 2, "int8": 1}[stored] * d_model + scale + 4 + 4 + 2 * 1 + 5 * 2


@dataclass(frozen=True)
class Batch:
    """Vectors of tokens with the fields of their tokens (see `Tokens`)."""

    vectors: Float[Tensor, "token d_model"]
    position: Int[Tensor, " token"]
    token_id: Int[Tensor, " token"]
    text: Int[Tensor, " token"]
    keep: Bool[Tensor, " token"]
    sentence: Int[Tensor, " token"]
    line: Int[Tensor, " token"]
    end: Int[Tensor, " token"]
    text_position: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, which: Bool[Tensor, " token"] | Int[Tensor, " selected"]) -> "Batch":
        """The tokens selected by a mask or by indices."""
        return Batch(*(getattr(self, name)[which] for name in ("vectors", *_FIELDS)))

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in ("vectors", *_FIELDS)))

    def positions(self, position_origin: PositionOrigin) -> Int[Tensor, " token"]:
        """The tokens' positions, counted from a mask's `position_origin`."""
        return getattr(self, {"context": "position", "text": "text_position"}.get(position_origin, position_origin))

    def kept(self) -> "Batch":
        """The tokens with `keep` True."""
        return self.select(self.keep)


@dataclass(frozen=True)
class StoredTokens:
    """Tokens as they are stored, with their vectors in the order of shards.

    Attributes:
        vectors: [token d_model].
        scale: the factor of each vector; None for 1.
        place: the row of each token's vector, in the order of the batch.
        fields: the other fields of a `Batch`, in the order of the batch.
    """

    vectors: Tensor
    scale: Tensor | None
    place: Int[Tensor, " token"]
    fields: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, which orders and scales the vectors."""
        place, *fields = (tensor.to(device, non_blocking=True) for tensor in (self.place, *self.fields))
        vectors = self.vectors.to(device, non_blocking=True)[place]
        if self.scale is not None:
            vectors = vectors * self.scale.to(device, non_blocking=True)[place, None]
        return Batch(vectors, *fields)


class Activations:
    """A finished folder of vectors.

    The fields per token are read when the object is created. Vectors are mapped into memory, or fetched from a remote
    store shard by shard.

    Args:
        folder: on disk or in a remote store.
        manifest: of the remote folder, if it was already read.

    Raises:
        DamagedFolder: the folder differs from what was written.
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
        self.facts: Mapping[str, Any] = manifest
        fields = [torch.cat([shard[name] for shard in tokens]) for name in STORED_FIELDS]
        fields = [field.int() if field.dtype == torch.int16 else field for field in fields]
        self.position, self.token_id, self.text, self.keep, *counts, self.sink = fields
        self.sentence, self.line, self.end, self.text_position = counts
        sizes = torch.tensor([len(shard["position"]) for shard in tokens])
        self._ends = sizes.cumsum(0)
        self._starts = self._ends - sizes
        first = self._shards[0]["vectors"]
        self.d_model: int = first.shape[1]
        self._stored = first.dtype

    @property
    def n_tokens(self) -> int:
        """Number of stored tokens, including those that are not kept."""
        return len(self.position)

    @property
    def n_kept(self) -> int:
        """Number of kept tokens."""
        return int(self.keep.sum())

    @property
    def kept_positions(self) -> Int[Tensor, " position"]:
        """The positions that have kept tokens, ascending."""
        return self.position[self.keep].unique().long()

    @property
    def sinks(self) -> Batch:
        """The attention sinks: tokens that would be kept if their vectors had the norms of others."""
        return self.batch(self.sink.nonzero()[:, 0])

    @property
    def n_texts(self) -> int:
        """Number of texts: the largest text index + 1."""
        return int(self.text.max()) + 1

    @cached_property
    def center_and_scale(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
        """The mean of the kept vectors, and the scale with mean |x - mean|^2 = d_model * scale^2.

        Raises:
            DegenerateResult: all vectors are equal, exactly or up to rounding.
        """
        total = torch.zeros(self.d_model, dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        for batch in evaluation_batches(self):
            vectors = batch.kept().vectors.double()
            total += vectors.sum(0)
            squares += vectors.square().sum()
        mean = total / self.n_kept
        variance = squares / self.n_kept - mean.square().sum()
        if not float(variance) > _ROUNDING[self._stored] ** 2 * float(squares / self.n_kept):
            raise DegenerateResult(
                "all vectors are equal up to rounding, so there is nothing to encode: check model, layer and texts"
            )
        return mean.float(), (variance / self.d_model).sqrt().float()

    def position_means(self, n_positions: int, position_origin: PositionOrigin) -> Float[Tensor, "position d_model"]:
        """The mean of the kept vectors at each position, counted from a mask's origin; NaN where no token is kept."""
        total = torch.zeros(n_positions, self.d_model, dtype=torch.float64)
        n = torch.zeros(n_positions, dtype=torch.float64)
        for stored in evaluation_batches(self):
            batch = stored.kept()
            position = batch.positions(position_origin).long()
            total.index_add_(0, position, batch.vectors.double())
            n += torch.bincount(position, minlength=n_positions)
        return (total / n[:, None]).float()

    def batch(self, index: Int[Tensor, " token"]) -> Batch:
        """The tokens with these indices, in this order."""
        return self.read(index).to(torch.device("cpu"))

    def read(self, index: Int[Tensor, " token"], *, pin_memory: bool = False) -> "StoredTokens":
        """Read the tokens with these indices as they are stored, shard by shard.

        Args:
            pin_memory: read into page-locked memory, which a GPU copies while the host goes on.
        """
        shard_of = torch.searchsorted(self._ends, index, right=True)
        order = torch.sort(shard_of, stable=True).indices
        vectors = torch.empty(len(index), self.d_model, dtype=self._stored, pin_memory=pin_memory)
        scale = torch.empty(len(index), pin_memory=pin_memory) if self._stored == torch.int8 else None
        end = 0
        for number, count in zip(*(part.tolist() for part in shard_of.unique(return_counts=True)), strict=True):
            start, end = end, end + count
            offset, shard = index[order[start:end]] - self._starts[number], self._shards[number]
            torch.index_select(shard["vectors"], 0, offset, out=vectors[start:end])
            if scale is not None:
                scale[start:end] = shard["scale"][offset]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        fields = [getattr(self, name)[index] for name in _FIELDS]
        if pin_memory:
            place, *fields = (tensor.pin_memory() for tensor in (place, *fields))
        return StoredTokens(vectors, scale, place, tuple(fields))

    def shuffled(self, kept: Int[Tensor, " token"], random: torch.Generator) -> Int[Tensor, " token"]:
        """The order of one epoch over the tokens with these sorted indices; see `training_batches`."""
        n_shards = len(self._shards)
        if n_shards <= _SHARDS_PER_WINDOW:
            return kept[torch.randperm(len(kept), generator=random)]
        ends = torch.searchsorted(kept, self._ends)
        of_shard = kept.tensor_split(ends[:-1])
        order = []
        for numbers in torch.randperm(n_shards, generator=random).split(_SHARDS_PER_WINDOW):
            window = torch.cat([of_shard[number] for number in numbers.tolist()])
            order.append(window[torch.randperm(len(window), generator=random)])
        return torch.cat(order)

    def check_room(self) -> None:
        """Raise an error if random batches would fetch the same shards from a remote store repeatedly.

        Raises:
            BadSetting: the cache is smaller than a window of shards.
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


def finished_activations(folder: Path | StoredFolder, made_from: Mapping[str, Any]) -> Activations | None:
    """The vectors of a folder, or None if it is unfinished or was made from other settings.

    Raises:
        DamagedFolder: the folder differs from what was written.
    """
    if isinstance(folder, StoredFolder):
        manifest = folder.finished(made_from)
        return None if manifest is None else Activations(folder, manifest)
    return Activations(folder) if finished(folder, made_from) else None


def evaluation_batches(
    activations: Activations, batch_tokens: int = 4096, device: torch.device | None = None
) -> Iterator[Batch]:
    """Iterate over all stored tokens in order, in whole contexts: as many as fit into `batch_tokens`, at least one.

    Args:
        device: of the batches, as in `training_batches`.
    """

    def indices() -> Iterator[Int[Tensor, " index"]]:
        ends = [*(activations.position == 0).nonzero()[1:, 0].tolist(), activations.n_tokens]
        start = end = 0
        for next_end in ends:
            if next_end - start > batch_tokens and end > start:
                yield torch.arange(start, end)
                start = end
            end = next_end
        yield torch.arange(start, end)

    return _batches(activations, indices(), device)


def training_batches(
    activations: Activations,
    batch_tokens: int,
    n_batches: int,
    seed: int,
    *,
    after: int = 0,
    token_indices: Callable[[Int[Tensor, " token"]], Int[Tensor, " selected"]] | None = None,
    pairs: bool = False,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Iterate over random batches of kept tokens: each token at most once per epoch, in a new order each epoch.

    Tokens left over after the last full batch of an epoch are skipped in that epoch. With more than 512 shards (33
    million tokens) an epoch goes through windows of 512 shards: the shards are drawn in a new order each epoch, and the
    tokens of a window are in random order. So at most one window has to be available at a time.

    Within a batch tokens are sorted by position, which does not change losses and lets masks work on runs of tokens.

    Args:
        batch_tokens: tokens per batch.
        n_batches: number of batches to yield.
        seed: of the order of the tokens.
        after: number of batches to skip.
        token_indices: given the positions of a batch's tokens, returns the indices of the tokens to read, for
            processes that share each batch; None reads all.
        pairs: draw pairs of neighboring tokens of a text in a context. The first half of a batch holds the later token
            of each, sorted by position, the second half the earlier ones. Each epoch divides the tokens into other
            pairs, with each token in at most one of them.
        device: of the batches. For a CUDA device a thread reads two batches ahead into page-locked memory.

    Raises:
        NothingToDo: there are fewer kept tokens, or tokens in pairs, than one batch.
        BadSetting: the cache of a remote store is smaller than a window of shards, or `batch_tokens` is odd with pairs.
    """
    activations.check_room()
    kept = activations.keep.nonzero()[:, 0]
    if len(kept) < batch_tokens:
        raise NothingToDo(
            f"batch_tokens = {batch_tokens:,} is more than the {len(kept):,} kept tokens: lower it, or harvest more"
        )
    numbers = range(after, after + n_batches)
    if pairs:
        indices = _pair_indices(activations, kept, batch_tokens, numbers, seed)
    else:
        indices = _batch_indices(activations, kept, batch_tokens, numbers, seed)
    if token_indices is not None:
        indices = (index[token_indices(activations.position[index])] for index in indices)
    yield from _batches(activations, indices, device)


def _batches(
    activations: Activations, indices: Iterable[Int[Tensor, " index"]], device: torch.device | None
) -> Iterator[Batch]:
    """The tokens with these indices, batch by batch, on a device; see `training_batches`."""
    if device is None or device.type != "cuda":
        batches = (activations.batch(index) for index in indices)
        yield from batches if device is None else (batch.to(device) for batch in batches)
        return
    for tokens in read_ahead((activations.read(index, pin_memory=True) for index in indices), _BATCHES_AHEAD):
        yield tokens.to(device)


def _batch_indices(
    activations: Activations, kept: Int[Tensor, " token"], batch_tokens: int, numbers: range, seed: int
) -> Iterator[Int[Tensor, " index"]]:
    """The token indices of the batches with these numbers, see `training_batches`."""
    random = generator(seed, "batches")
    batches_per_epoch = len(kept) // batch_tokens
    order = kept
    for number in range(numbers.stop):
        batch_in_epoch = number % batches_per_epoch
        if batch_in_epoch == 0:
            order = activations.shuffled(kept, random)
        if number < numbers.start:
            continue
        index = order[batch_in_epoch * batch_tokens : (batch_in_epoch + 1) * batch_tokens]
        yield index[torch.sort(activations.position[index], stable=True).indices]


def _pair_indices(
    activations: Activations, kept: Int[Tensor, " token"], batch_tokens: int, numbers: range, seed: int
) -> Iterator[Int[Tensor, " index"]]:
    """The token indices of the batches of pairs with these numbers, see `training_batches`."""
    if batch_tokens % 2:
        raise BadSetting(f"batch_tokens = {batch_tokens} is odd, so it does not consist of pairs: make it even")
    random = generator(seed, "batches")
    run, place = _runs(activations, kept)
    length = torch.bincount(run)
    n_pairs = int(torch.where(length == 2, 1, (length - 1) // 2).sum())  # at least, in any epoch
    if n_pairs < batch_tokens // 2:
        raise NothingToDo(
            f"batch_tokens = {batch_tokens:,} is more than the {2 * n_pairs:,} kept tokens that have neighbors in "
            "their text and context: lower it, harvest more, or take longer contexts"
        )
    number = 0
    while number < numbers.stop:
        # An epoch leaves out the first token of some runs, but of none that has just one pair.
        skipped = (torch.randint(2, length.shape, generator=random) * (length > 2))[run]
        later = kept[(place > skipped) & ((place - skipped) % 2 == 1)]
        order = activations.shuffled(later, random)
        for index in order[: len(order) // (batch_tokens // 2) * (batch_tokens // 2)].split(batch_tokens // 2):
            if number in numbers:
                index = index[torch.sort(activations.position[index], stable=True).indices]
                yield torch.cat([index, index - 1])
            number += 1


def _runs(activations: Activations, kept: Int[Tensor, " token"]) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Number the runs of neighboring kept tokens of a text in a context; return each token's run and place in it."""
    position, text = activations.position[kept], activations.text[kept]
    follows = (kept.diff() == 1) & (position.diff() == 1) & (text.diff() == 0)
    starts = torch.cat([torch.ones(1, dtype=torch.bool), ~follows])
    run = starts.cumsum(0) - 1
    return run, torch.arange(len(kept)) - starts.nonzero()[:, 0][run]
