"""Selection of the active latents: the encoder's product for live latents only, and the choice among its values.

The product is computed in pieces, each for tokens of one live group and small enough to stay in the processor's cache
until the choice is made; the product of a whole batch never exists. Triton kernels take larger pieces, so that the GPU
reads the weights once. `kernels.backend` says whether loops compiled by numba, Triton kernels or torch operations make
the choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posmask.kernels import backend, operations, runtime
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
        live = group.latents.stop - group.latents.start if isinstance(group.latents, slice) else len(group.latents)
        step = max(_LEAST_ROWS, numbers // max(live, 1) // 64 * 64)
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
    with runtime.fast_float32(inputs.x.device):
        for rows, live, product in _products(inputs, encoder, among, implementation, low=low):
            gate = (encoder.openness, inputs.mask_row[rows]) if live.gated else None
            candidates.add(product, rows, live.bias, live.latents, gate)
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
class _LiveLatents:
    """The live latents of a group that can be chosen."""

    latents: Tensor  # indices, [live]
    weight: Tensor  # may have more rows than `latents`, [row d_model]
    bias: Tensor  # [live]
    gated: bool


def _products(
    inputs: GroupedInputs,
    encoder: GatedEncoder,
    among: Tensor | None,
    implementation: backend.Implementation,
    *,
    low: bool,
) -> Iterator[tuple[slice, _LiveLatents, Tensor]]:
    """The tokens, the live latents and the product x . encoder of each piece, in bfloat16 where `low`.

    A product may have more rows and columns than the piece, and is valid until the next one is computed.
    """
    x, weight = inputs.x, encoder.weight
    if low:
        x, weight = x.bfloat16(), weight.bfloat16() if encoder.low_weight is None else encoder.low_weight
    buffer = x.new_empty(0)
    last: LiveGroup | None = None
    live: _LiveLatents | None = None
    piece_size = (_GPU_NUMBERS, _GPU_ROWS) if implementation == "triton" else ()
    for rows, group in pieces(encoder.groups, inputs.ends, *piece_size):
        if live is None or group is not last:
            live, last = _live_latents(weight, encoder.bias, group, among), group
        if not len(live.latents):
            continue
        # The number of rows is rounded up, with rows of the next group or, at the end, of the one before: oneDNN
        # compiles and keeps a kernel per shape, so there should be few shapes.
        n_rows = min(len(x), -(-(rows.stop - rows.start) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
        start = min(rows.start, len(x) - n_rows)
        if buffer.numel() < n_rows * len(live.weight):
            buffer = x.new_empty(n_rows * len(live.weight))
        product = buffer[: n_rows * len(live.weight)].view(n_rows, len(live.weight))
        torch.mm(x[start : start + n_rows], live.weight.T, out=product)
        yield rows, live, product[rows.start - start :]


_ROWS_MULTIPLE = 32
_COLUMNS_MULTIPLE = 32


def _live_latents(weight: Tensor, bias: Tensor, group: LiveGroup, among: Tensor | None) -> _LiveLatents:
    """The live latents of a group; gathered rows are padded to a multiple of `_COLUMNS_MULTIPLE`."""
    latents = torch.arange(len(weight), device=weight.device)[group.latents]
    if among is not None:
        latents = latents[among[latents]]
    elif isinstance(group.latents, slice):
        return _LiveLatents(latents, weight[group.latents], bias[latents], group.gated)
    padding = latents.new_zeros(-len(latents) % _COLUMNS_MULTIPLE)
    gathered = weight.index_select(0, torch.cat([latents, padding]))
    return _LiveLatents(latents, gathered, bias[latents], group.gated)


class _LargestOfTokens:
    """The k largest values of each token, written by compiled loops into one table per batch."""

    missing = False

    def __init__(self, k: int, n_tokens: int, bias: Tensor) -> None:
        k = min(k, len(bias))
        self._latent = np.empty((n_tokens, k), np.int64)
        self._preactivation = np.empty((n_tokens, k), bias.numpy().dtype)
        self._count = np.zeros(n_tokens, np.int64)

    def add(
        self, product: Tensor, rows: slice, bias: Tensor, latents: Tensor, gate: tuple[Tensor, Tensor] | None
    ) -> None:
        """Choose from a piece; arguments as in `_Candidates.add`."""
        latent, preactivation, count = self._latent[rows], self._preactivation[rows], self._count[rows]
        k = min(latent.shape[1], len(bias))
        backend.selection_loops().largest_of_rows(
            *_arrays(product, bias, latents, gate, len(count)), k, latent, preactivation, count
        )

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

    def add(
        self, product: Tensor, rows: slice, bias: Tensor, latents: Tensor, gate: tuple[Tensor, Tensor] | None
    ) -> None:
        """Choose from a piece; arguments as in `_Candidates.add`."""
        product = product[: rows.stop - rows.start, : len(latents)]
        _triton().largest_of_rows(product, bias, latents, gate, self._latent[rows], self._preactivation[rows])

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

    def add(
        self, product: Tensor, rows: slice, bias: Tensor, latents: Tensor, gate: tuple[Tensor, Tensor] | None
    ) -> None:
        """Choose from a piece.

        Args:
            product: x . encoder of the live latents, [token live]; may have more rows and columns.
            rows: the tokens of the piece.
            bias: [live].
            latents: indices of the live latents, [live].
            gate: (openness of all latents by row of the mask's table, that row per token); None if ungated.
        """
        n_rows = rows.stop - rows.start
        match backend.implementation(product):
            case "numba":
                entries = _take_above(product, n_rows, bias, latents, gate, self._floor)
            case "triton":
                live = product[:n_rows, : len(latents)]
                entries = _triton().above_floor(live, bias, latents, gate, self._floor)
            case "torch":
                entries = _take(product[:n_rows, : len(latents)], bias, latents, gate, self._choice, self._floor)
        row, *rest = entries
        self._entries.append((row + rows.start, *rest))
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


def _take_above(
    product: Tensor, n_rows: int, bias: Tensor, latents: Tensor, gate: tuple[Tensor, Tensor] | None, floor: float
) -> tuple[Tensor, ...]:
    """`_take` of all values above a floor, by compiled loops."""
    latent = np.empty((n_rows, len(latents)), np.int64)
    preactivation, value = np.empty(latent.shape, bias.numpy().dtype), np.empty(latent.shape, bias.numpy().dtype)
    count = np.empty(n_rows, np.int64)
    arrays = _arrays(product, bias, latents, gate, n_rows)
    backend.selection_loops().above_floor(*arrays, value.dtype.type(floor), latent, preactivation, value, count)
    *_, values = backend.selection_loops().join_entries(latent, value, count)
    entries = (*backend.selection_loops().join_entries(latent, preactivation, count), values)
    return tuple(torch.from_numpy(array) for array in entries)


def _arrays(
    product: Tensor, bias: Tensor, latents: Tensor, gate: tuple[Tensor, Tensor] | None, n_rows: int
) -> tuple[Any, Any, Any, Any, Any, Any, int]:
    """The first arguments of the compiled loops."""
    low = product.dtype == torch.bfloat16
    numbers = product.view(torch.int16).numpy() if low else product.numpy()
    table, mask_row = gate if gate is not None else (bias.new_empty(0, 0), latents[:0])
    n_parts = min(n_rows, 8 * runtime.loop_threads())  # each with its own buffer
    return numbers, low, bias.numpy(), latents.numpy(), table.numpy(), mask_row.numpy(), n_parts
