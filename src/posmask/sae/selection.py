"""Selection of the active latents: the encoder's product for live latents only, and the choice among its values.

The product is computed in pieces, each for tokens of one live group and small enough to stay in the processor's cache
until the choice is made; the product of a whole batch never exists. Triton kernels take larger pieces, so that the GPU
reads the weights once. `kernels.backend` says whether loops compiled by numba, Triton kernels or torch operations make
the choice.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posmask.kernels import backend, operations, runtime
from posmask.kernels.integers import IntegerProducts
from posmask.masks.groups import LiveGroup

__all__ = [
    "Above",
    "Choice",
    "Entries",
    "GatedEncoder",
    "GroupedInputs",
    "LargestOfBatch",
    "LargestOfToken",
    "choose",
    "in_group_order",
    "pieces",
]


@dataclass(frozen=True)
class LargestOfToken:
    """The k largest positive values of each token."""

    k: int


@dataclass(frozen=True)
class LargestOfBatch:
    """The k * n_tokens largest positive values of the batch."""

    k: int
    near: float = 0.0
    """A guess of the smallest chosen value. It affects only the time: the closer from below, the faster."""


@dataclass(frozen=True)
class Above:
    """All values above a threshold of at least 0."""

    threshold: float


Choice = LargestOfToken | LargestOfBatch | Above


@dataclass(frozen=True)
class Entries:
    """Chosen pairs of token and latent, sorted by token; every tensor is [entry]."""

    token: Tensor
    latent: Tensor
    preactivation: Tensor
    """x . encoder + bias, above 0, before the gate."""
    slots: int | None = None
    """The number of entries of each token if all have the same number. Some of them may be empty, with latent -1 and a
    preactivation that means nothing."""


def in_group_order(groups: Sequence[LiveGroup], mask_row: Tensor) -> tuple[Tensor | None, list[int]]:
    """The order that sorts tokens by live group, and the end of each group in it.

    The order is None if tokens are sorted already.

    Args:
        groups: live groups; each row of the mask's table is in the `positions` of exactly one.
        mask_row: row of the mask's table, [token].
    """
    if len(groups) == 1:
        return None, [len(mask_row)]
    positions = torch.cat([group.positions for group in groups])
    numbers = [torch.full_like(group.positions, number) for number, group in enumerate(groups)]
    group_of_row = torch.empty_like(positions)
    group_of_row[positions] = torch.cat(numbers)
    group_of_token = group_of_row[mask_row]
    ends = operations.counts(group_of_token, len(groups)).cumsum(0)
    is_sorted = (group_of_token[1:] >= group_of_token[:-1]).all()
    *ends, is_sorted = torch.cat([ends, is_sorted[None]]).tolist()  # one transfer from a GPU
    if is_sorted:
        return None, ends
    return torch.sort(group_of_token.to(torch.int16), stable=True).indices, ends


def pieces(
    groups: Sequence[LiveGroup], ends: Sequence[int], numbers: int = 2**20, most_rows: int | None = None
) -> Iterator[tuple[slice, LiveGroup]]:
    """Slices of tokens of one group each, so small that their product with the live latents stays in the cache.

    Args:
        groups: live groups.
        ends: end of each group's tokens (see `in_group_order`).
        numbers: number of values of a product, [token live].
        most_rows: the largest number of tokens in a piece; None for no limit.
    """
    for group, start, end in zip(groups, [0, *ends[:-1]], ends, strict=True):
        step = max(_LEAST_ROWS, numbers // max(group.n_latents, 1) // 64 * 64)
        step = step if most_rows is None else min(step, most_rows)
        for first in range(start, end, step):
            yield slice(first, min(end, first + step)), group


_LEAST_ROWS = 256  # with fewer tokens the product is slower
_GPU_NUMBERS, _GPU_ROWS = 2**28, 4096  # of a piece for Triton kernels: 512 MB of bfloat16


@dataclass(frozen=True)
class GroupedInputs:
    """The encoder's inputs of a batch, with tokens sorted by live group (see `in_group_order`).

    Attributes:
        x: vectors minus the decoder bias, [token d_model].
        mask_row: row of the mask's table, [token].
        ends: end of each group's tokens.
    """

    x: Tensor
    mask_row: Tensor
    ends: Sequence[int]


@dataclass(frozen=True)
class GatedEncoder:
    """An encoder and the mask that gates its latents.

    Attributes:
        weight: [latent d_model].
        bias: [latent].
        groups: live groups; only their latents are computed.
        openness: the mask's table, [row latent].
        low_weight: the weight in bfloat16, which saves the conversion for products in that precision.
    """

    weight: Tensor
    bias: Tensor
    groups: Sequence[LiveGroup]
    openness: Tensor
    low_weight: Tensor | None = None


def choose(
    inputs: GroupedInputs,
    encoder: GatedEncoder,
    choice: Choice,
    *,
    precision: runtime.Precision = "float32",
    among: Tensor | None = None,
    in_slots: bool = False,
) -> Entries:
    """The entries that `choice` selects by openness * relu(x . encoder + bias) among the live latents of each token.

    Ties are broken arbitrarily; there are never more entries than `choice` allows.

    Args:
        inputs: the tokens.
        encoder: the latents.
        choice: what to choose.
        precision: of the product; with bfloat16 the pre-activations of the chosen entries are recomputed in full.
        among: the latents to choose among, [latent] bool; None for all.
        in_slots: whether entries may be in slots, see `Entries.slots`. Finding the empty ones makes the host wait for a
            GPU.
    """
    low = precision == "bfloat16" and inputs.x.dtype == torch.float32
    implementation = backend.implementation(inputs.x)
    candidates = _candidates(choice, inputs, encoder, implementation)
    integers = None
    if not low and backend.multiplies_integers(inputs.x, _products_per_entry(inputs, encoder, choice, among)):
        integers = IntegerProducts(inputs.x, encoder.weight, encoder.bias, float(encoder.openness.max()))
    if integers is not None and integers.finite:
        for piece in _integer_products(inputs, encoder, among, integers):
            candidates.add(piece)
    else:
        with runtime.fast_float32(inputs.x.device):
            for piece in _products(inputs, encoder, among, implementation, low=low):
                candidates.add(piece)
    if isinstance(choice, LargestOfBatch) and choice.near > 0 and candidates.missing:
        lower = replace(choice, near=0.0)
        return choose(inputs, encoder, lower, precision=precision, among=among, in_slots=in_slots)
    entries = _entries(candidates, in_slots)
    if not low:
        return entries
    exact = operations.dot_rows(inputs.x, entries.token, encoder.weight, entries.latent) + encoder.bias[entries.latent]
    return replace(entries, preactivation=exact.clamp(min=torch.finfo(inputs.x.dtype).tiny))


def _entries(candidates: "_LargestOfTokens | _Slots | _Candidates", in_slots: bool) -> Entries:
    token, latent, preactivation = candidates.entries()
    if not isinstance(candidates, _Slots):
        return Entries(token, latent, preactivation)
    if in_slots:
        return Entries(token, latent, preactivation, candidates.k)
    entry = (latent >= 0).nonzero()[:, 0]
    return Entries(token[entry], latent[entry], preactivation[entry])


def _candidates(
    choice: Choice, inputs: GroupedInputs, encoder: GatedEncoder, implementation: backend.Implementation
) -> "_LargestOfTokens | _Slots | _Candidates":
    n_tokens, bias = len(inputs.x), encoder.bias
    if isinstance(choice, LargestOfToken) and implementation == "numba":
        return _LargestOfTokens(choice.k, n_tokens, bias)
    if isinstance(choice, LargestOfToken) and implementation == "triton":
        return _Slots(min(choice.k, len(bias)), n_tokens, bias)
    return _Candidates(choice, n_tokens, bias)


@dataclass(frozen=True)
class _Error:
    """What decides among products with errors.

    Attributes:
        bound: of the errors of each token's products times openness, [token].
        x: [token d_model].
        weight: [latent d_model].
    """

    bound: Tensor
    x: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Piece:
    """Tokens of a live group and their products with its latents.

    Attributes:
        rows: the tokens.
        latents: the live latents that can be chosen, [live].
        bias: [live].
        gate: (openness of all latents by row of the mask's table, that row per token); None if ungated.
        product: x . encoder, in bfloat16 where that selects. It has the tokens and latents of the piece first, and may
            have more rows and columns; it is valid until the next piece.
        error: None if the product is exact.
    """

    rows: slice
    latents: Tensor
    bias: Tensor
    gate: tuple[Tensor, Tensor] | None
    product: Tensor
    error: _Error | None = None

    @property
    def n_rows(self) -> int:
        return self.rows.stop - self.rows.start


def _products(
    inputs: GroupedInputs,
    encoder: GatedEncoder,
    among: Tensor | None,
    implementation: backend.Implementation,
    *,
    low: bool,
) -> Iterator[_Piece]:
    """Pieces whose products are those of torch, in bfloat16 where `low`."""
    x, weight = inputs.x, encoder.weight
    if low:
        x, weight = x.bfloat16(), weight.bfloat16() if encoder.low_weight is None else encoder.low_weight
    buffer = x.new_empty(0)
    last: LiveGroup | None = None
    latents = live_weight = bias = x
    piece_size = (_GPU_NUMBERS, _GPU_ROWS) if implementation == "triton" else ()
    for rows, group in pieces(encoder.groups, inputs.ends, *piece_size):
        if group is not last:
            last, latents = group, _live_latents(len(weight), group, among)
            live_weight, bias = _live_weight(weight, group, latents, among), encoder.bias[latents]
        if not len(latents):
            continue
        # The number of rows is rounded up, with rows of the next group or, at the end, of the one before: oneDNN
        # compiles and keeps a kernel per shape, so there should be few shapes.
        n_rows = min(len(x), -(-(rows.stop - rows.start) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
        start = min(rows.start, len(x) - n_rows)
        if buffer.numel() < n_rows * len(live_weight):
            buffer = x.new_empty(n_rows * len(live_weight))
        product = buffer[: n_rows * len(live_weight)].view(n_rows, len(live_weight))
        torch.mm(x[start : start + n_rows], live_weight.T, out=product)
        yield _Piece(rows, latents, bias, _gate(inputs, encoder, rows, group), product[rows.start - start :])


def _integer_products(
    inputs: GroupedInputs, encoder: GatedEncoder, among: Tensor | None, integers: IntegerProducts
) -> Iterator[_Piece]:
    """Pieces whose products are those of 16-bit integers."""
    last: LiveGroup | None = None
    latents = bias = inputs.x
    for rows, group in pieces(encoder.groups, inputs.ends):
        if group is not last:
            last, latents = group, _live_latents(len(encoder.weight), group, among)
            bias = encoder.bias[latents]
        if len(latents):
            error = _Error(integers.error[rows], inputs.x[rows], encoder.weight)
            gate = _gate(inputs, encoder, rows, group)
            yield _Piece(rows, latents, bias, gate, integers.of(rows, latents), error)


def _products_per_entry(inputs: GroupedInputs, encoder: GatedEncoder, choice: Choice, among: Tensor | None) -> float:
    """The number of products for each entry that is chosen; infinite if the number of entries is unknown."""
    if isinstance(choice, Above):
        return math.inf
    starts, groups = [0, *inputs.ends[:-1]], encoder.groups
    n_products = sum(
        (end - start) * group.n_latents for start, end, group in zip(starts, inputs.ends, groups, strict=True)
    )
    if among is not None:
        n_products = min(n_products, len(inputs.x) * int(among.sum()))
    return n_products / max(choice.k * len(inputs.x), 1)


def _gate(inputs: GroupedInputs, encoder: GatedEncoder, rows: slice, group: LiveGroup) -> tuple[Tensor, Tensor] | None:
    return (encoder.openness, inputs.mask_row[rows]) if group.gated else None


_ROWS_MULTIPLE = 32
_COLUMNS_MULTIPLE = 32


def _live_latents(d_sae: int, group: LiveGroup, among: Tensor | None) -> Tensor:
    """The live latents of a group that can be chosen, [live]."""
    latents = group.latents
    if isinstance(latents, slice):
        latents = torch.arange(latents.start, latents.stop, device=group.positions.device)
    return latents if among is None else latents[among[latents]]


def _live_weight(weight: Tensor, group: LiveGroup, latents: Tensor, among: Tensor | None) -> Tensor:
    """The weights of live latents; gathered rows are padded to a multiple of `_COLUMNS_MULTIPLE`."""
    if among is None and isinstance(group.latents, slice):
        return weight[group.latents]
    padding = latents.new_zeros(-len(latents) % _COLUMNS_MULTIPLE)
    return weight.index_select(0, torch.cat([latents, padding]))


class _LargestOfTokens:
    """The k largest values of each token, written by compiled loops into one table per batch."""

    missing = False

    def __init__(self, k: int, n_tokens: int, bias: Tensor) -> None:
        k = min(k, len(bias))
        self._latent = np.empty((n_tokens, k), np.int64)
        self._preactivation = np.empty((n_tokens, k), bias.numpy().dtype)
        self._count = np.zeros(n_tokens, np.int64)

    def add(self, piece: _Piece) -> None:
        """Choose from a piece."""
        rows = piece.rows
        latent, preactivation, count = self._latent[rows], self._preactivation[rows], self._count[rows]
        k = min(latent.shape[1], len(piece.latents))
        backend.selection_loops().largest_of_rows(*_arrays(piece), k, latent, preactivation, count)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, preactivation)."""
        token, latent, preactivation = backend.selection_loops().join_entries(
            self._latent, self._preactivation, self._count
        )
        return torch.from_numpy(token), torch.from_numpy(latent), torch.from_numpy(preactivation)


class _Slots:
    """The k largest values of each token, written by Triton kernels into slots; the last slots of a token may be empty.

    The table is on the device, and the host does not wait for it.
    """

    missing = False

    def __init__(self, k: int, n_tokens: int, bias: Tensor) -> None:
        self.k = k
        self._latent = torch.full((n_tokens, k), -1, dtype=torch.int64, device=bias.device)
        self._preactivation = bias.new_zeros(n_tokens, k)

    def add(self, piece: _Piece) -> None:
        """Choose from a piece."""
        product, rows = piece.product[: piece.n_rows, : len(piece.latents)], piece.rows
        live = (piece.bias, piece.latents, piece.gate)
        _triton().largest_of_rows(product, *live, self._latent[rows], self._preactivation[rows])

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, preactivation) of all slots."""
        n_tokens, k = self._latent.shape
        token = torch.arange(n_tokens, device=self._latent.device).repeat_interleave(k, output_size=n_tokens * k)
        return token, self._latent.flatten(), self._preactivation.flatten()


def _triton() -> Any:
    """The module of Triton kernels; triton is an optional package."""
    from posmask.kernels import triton_selection

    return triton_selection


class _Candidates:
    """The entries chosen so far, for every choice and device."""

    def __init__(self, choice: Choice, n_tokens: int, bias: Tensor) -> None:
        self._choice = choice
        self._wanted = choice.k * n_tokens if isinstance(choice, LargestOfBatch) else None
        self._floor = choice.threshold if isinstance(choice, Above) else 0.0
        if isinstance(choice, LargestOfBatch):
            self._floor = choice.near
        none = torch.empty(0, dtype=torch.int64, device=bias.device)
        self._entries: list[tuple[Tensor, ...]] = [(none, none, bias.new_empty(0), bias.new_empty(0))]

    def add(self, piece: _Piece) -> None:
        """Choose from a piece."""
        live = (piece.bias, piece.latents, piece.gate)
        match backend.implementation(piece.product):
            case "numba":
                entries = _take_above(piece, self._floor)
            case "triton":
                product = piece.product[: piece.n_rows, : len(piece.latents)]
                entries = _triton().above_floor(product, *live, self._floor)
            case "torch":
                product = piece.product[: piece.n_rows, : len(piece.latents)]
                entries = _take(product, *live, self._choice, self._floor)
        row, *rest = entries
        self._entries.append((row + piece.rows.start, *rest))
        if self._wanted is not None and self._n_entries > 2 * self._wanted:
            self._cut(self._wanted)

    @property
    def _n_entries(self) -> int:
        return sum(len(part[0]) for part in self._entries)

    @property
    def missing(self) -> bool:
        """Whether there are fewer entries than wanted."""
        return self._wanted is not None and self._n_entries < self._wanted

    def _cut(self, wanted: int) -> None:
        """Drop all but the largest entries; smaller ones cannot be among the largest of the batch."""
        joined = tuple(torch.cat(parts) for parts in zip(*self._entries, strict=True))
        value = joined[3]
        if len(value) > wanted:
            self._floor = float(value.kthvalue(len(value) - wanted + 1).values)
            kept = value > self._floor
            ties = (value == self._floor).nonzero()[:, 0]
            kept[ties[: wanted - int(kept.sum())]] = True
            entry = kept.nonzero()[:, 0]
            joined = tuple(part.index_select(0, entry) for part in joined)
        self._entries = [joined]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, preactivation)."""
        if self._wanted is not None:
            self._cut(self._wanted)
        token, latent, preactivation, _ = (torch.cat(parts) for parts in zip(*self._entries, strict=True))
        return token, latent, preactivation


def _take(
    product: Tensor,
    bias: Tensor,
    latents: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    choice: Choice,
    floor: float,
) -> tuple[Tensor, ...]:
    """(row, latent, preactivation, value) of the chosen entries: the definition of the compiled loops."""
    preactivation = product.to(bias.dtype) + bias
    value = preactivation
    if gate is not None:
        value = value * gate[0][gate[1][:, None], latents]
    if isinstance(choice, LargestOfToken):
        top = value.topk(min(choice.k, value.shape[1]), dim=1)
        row, entry = (top.values > 0).nonzero(as_tuple=True)
        column = top.indices[row, entry]
    else:
        row, column = ((value > floor) & (value > 0)).nonzero(as_tuple=True)
    return row, latents[column], preactivation[row, column], value[row, column]


def _take_above(piece: _Piece, floor: float) -> tuple[Tensor, ...]:
    """`_take` of all values above a floor, by compiled loops."""
    latent = np.empty((piece.n_rows, len(piece.latents)), np.int64)
    dtype = piece.bias.numpy().dtype
    preactivation, value = np.empty(latent.shape, dtype), np.empty(latent.shape, dtype)
    count = np.empty(piece.n_rows, np.int64)
    loops = backend.selection_loops()
    loops.above_floor(*_arrays(piece), dtype.type(floor), latent, preactivation, value, count)
    *_, values = loops.join_entries(latent, value, count)
    entries = (*loops.join_entries(latent, preactivation, count), values)
    return tuple(torch.from_numpy(array) for array in entries)


def _arrays(piece: _Piece) -> tuple[Any, ...]:
    """The first arguments of the compiled loops."""
    low = piece.product.dtype == torch.bfloat16
    numbers = piece.product.view(torch.int16) if low else piece.product
    table, mask_row = piece.gate if piece.gate is not None else (piece.bias.new_empty(0, 0), piece.latents[:0])
    error = piece.error or _Error(piece.bias[:0], piece.bias.new_empty(0, 0), piece.bias.new_empty(0, 0))
    n_parts = min(piece.n_rows, 8 * runtime.loop_threads())  # each with its own buffer
    tensors = (piece.bias, piece.latents, table, mask_row)
    exact = (error.bound, error.x, error.weight)
    return numbers.numpy(), low, *(t.numpy() for t in tensors), n_parts, *(t.numpy() for t in exact)
