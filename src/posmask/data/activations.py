"""Tokens x model -> a folder of vectors that know their token, position and text; the folder -> batches.

Vectors are stored token by token, in shards, on the disk or in a store (`store.py`). Tokens after a context's last kept
one (padding) are not stored; BOS is, with `keep` False. As int8 a vector takes a quarter of float32's room: its numbers
over a scale of its own, such that the largest is 127.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from posmask.errors import BadSetting, DegenerateResult, NothingToDo
from posmask.masks.base import PositionOrigin
from posmask.seeds import generator
from posmask.storage.manifest import finished, read_manifest
from posmask.storage.remote import Shards, StoredFolder

__all__ = [
    "Activations",
    "Batch",
    "StorageDtype",
    "bytes_a_token",
    "evaluation_batches",
    "finished_activations",
    "training_batches",
]

_SHARDS_PER_WINDOW = 512
StorageDtype = Literal["model", "float32", "bfloat16", "int8"]
"""Precision of vectors on disk; `model` is that in which the model computes."""

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

    def select(self, which: Bool[Tensor, " token"] | Int[Tensor, " some"]) -> "Batch":
        """Some of the tokens, chosen by truth or by number."""
        return Batch(*(getattr(self, name)[which] for name in ("vectors", *_FIELDS)))

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(getattr(self, name).to(device) for name in ("vectors", *_FIELDS)))

    def positions(self, position_origin: PositionOrigin) -> Int[Tensor, " token"]:
        """The tokens' positions, counted as a mask's `position_origin` says."""
        return self.position if position_origin == "context" else getattr(self, position_origin)

    def kept(self) -> "Batch":
        """The tokens that count."""
        return self.select(self.keep)


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
    def center_and_scale(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
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


def finished_activations(folder: Path | StoredFolder, made_from: Mapping[str, Any]) -> Activations | None:
    """The vectors, where the folder is finished and made from exactly this.

    Raises:
        DamagedFolder: it is not what was written.
    """
    if isinstance(folder, StoredFolder):
        manifest = folder.finished(made_from)
        return None if manifest is None else Activations(folder, manifest)
    return Activations(folder) if finished(folder, made_from) else None


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
