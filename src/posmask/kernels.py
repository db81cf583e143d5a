"""The fast ways to do what sae.py says: only live latents are multiplied, only active codes are decoded.

A batch's active codes are entries (token, latent), those of a token together, tokens in order. Products with the
dictionary go through these entries alone, in both directions, so their cost does not grow with d_sae. On the CPU the
loops that torch has no fast operation for (choosing the largest of many numbers, sums and dot products over scattered
rows) are compiled by numba on the user's machine; on other devices the same results come from torch operations.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.masks import LiveGroup

__all__ = [
    "Above",
    "Choice",
    "Entries",
    "Grouped",
    "LargestOfBatch",
    "LargestOfToken",
    "Precision",
    "add_weighted_entries",
    "choose",
    "choose_in_rows",
    "dot_rows",
    "fast_float32",
    "float32_stays_float32",
    "keep_freed_memory",
    "place_entries",
    "token_groups",
    "tokens_by_group",
]

Precision = Literal["float32", "bfloat16"]
"""In which precision the encoder's product is made to choose latents; their values are always full precision."""

_N_STRIDES = 128  # Running maxima kept side by side; the k-th largest of them bounds the k-th largest entry.


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Let float32 products take oneDNN's kernels where they are still float32 there.

    torch's default takes MKL's, which on AMD processors run at about half the speed. The setting that changes it
    also permits bfloat16 products on processors with AMX, hence the check of the error, once a process.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if float32_stays_float32() else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next batch; returns whether the C library does so (glibc only).

    By default glibc gives buffers of a batch's size back to the system, and every step pays for having their pages
    zeroed again: about half of a masked step's time.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        settings = ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, 2**25), (_M_TOP_PAD, 2**28))
        return all(library.mallopt(*setting) == 1 for setting in settings)
    except (OSError, AttributeError):
        return False


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h; 2**25 is the largest allowed


@cache
def float32_stays_float32() -> bool:
    """Whether torch's "medium" float32 product errs by less than 1e-5 of its largest entry here."""
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(128, 576, generator=random), torch.randn(576, 256, generator=random)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    product = left @ right
    torch.set_float32_matmul_precision(before)
    exact = left.double() @ right.double()
    return bool((product - exact).abs().max() < 1e-5 * exact.abs().max())


@numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz"}, cache=True)
def _dot_rows(rows, row, table, latent, out):  # pragma: no cover (compiled)
    for entry in numba.prange(len(latent)):
        left, right = rows[row[entry]], table[latent[entry]]
        total = table.dtype.type(0)
        for column in range(rows.shape[1]):
            total += left[column] * right[column]
        out[entry] = total


@numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz"}, cache=True)
def _sum_rows(weight, table, index, order, first, out):  # pragma: no cover (compiled)
    for key in numba.prange(out.shape[0]):
        total = out[key]
        total[:] = 0
        for place in range(first[key], first[key + 1]):
            entry = order[place]
            share, row = weight[entry], table[index[entry]]
            for column in range(total.shape[0]):
                total[column] += share * row[column]


@numba.njit(cache=True)
def _count_sort(key, n_keys):  # pragma: no cover (compiled)
    """(order, first): entries in the order of their keys, those of key j at order[first[j] : first[j + 1]]."""
    first = np.zeros(n_keys + 1, np.int64)
    for entry in range(len(key)):
        first[key[entry] + 1] += 1
    for j in range(n_keys):
        first[j + 1] += first[j]
    place, order = first[:-1].copy(), np.empty(len(key), np.int64)
    for entry in range(len(key)):
        order[place[key[entry]]] = entry
        place[key[entry]] += 1
    return order, first


@numba.njit(cache=True)
def _largest(value, k, chosen):  # pragma: no cover (compiled)
    """Write the places of the k largest positive entries of `value` into `chosen`, -1 where there are fewer."""
    n_full = len(value) // _N_STRIDES
    zero = value.dtype.type(0)
    # A floor that at least k entries reach: the k-th largest of the maxima over strided subsets.
    maxima = np.zeros(_N_STRIDES, value.dtype)
    for i in range(n_full):
        start = i * _N_STRIDES
        for s in range(_N_STRIDES):
            maxima[s] = value[start + s] if value[start + s] > maxima[s] else maxima[s]
    for j in range(n_full * _N_STRIDES, len(value)):
        s = j - n_full * _N_STRIDES
        maxima[s] = value[j] if value[j] > maxima[s] else maxima[s]
    floor = np.partition(maxima, _N_STRIDES - k)[_N_STRIDES - k] if k <= _N_STRIDES else zero
    place = np.empty(len(value), np.int64)
    candidate = np.empty(len(value), value.dtype)
    n_candidates = 0
    for s in range(_N_STRIDES):
        if maxima[s] > zero and maxima[s] >= floor:
            for j in range(s, len(value), _N_STRIDES):
                if value[j] > zero and value[j] >= floor:
                    place[n_candidates] = j
                    candidate[n_candidates] = value[j]
                    n_candidates += 1
    cut = zero
    if n_candidates > k:
        cut = np.partition(candidate[:n_candidates], n_candidates - k)[n_candidates - k]
    n_chosen = 0
    for c in range(n_candidates):
        if candidate[c] > cut:
            chosen[n_chosen] = place[c]
            n_chosen += 1
    for c in range(n_candidates):
        if n_chosen < k and candidate[c] == cut:
            chosen[n_chosen] = place[c]
            n_chosen += 1
    chosen[n_chosen:] = -1


@numba.njit(parallel=True, cache=True)
def _largest_of_rows(value, k, chosen):  # pragma: no cover (compiled)
    for token in numba.prange(value.shape[0]):
        _largest(value[token], k, chosen[token])


@numba.njit(parallel=True, cache=True)
def _rows_above(value, cut, n_ties):  # pragma: no cover (compiled)
    """(row, column) of the entries above `cut`, and of the first `n_ties` that equal it, row by row."""
    n_rows = len(value)
    above, equal = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64)
    for r in numba.prange(n_rows):
        for c in range(value.shape[1]):
            above[r] += value[r, c] > cut
            equal[r] += value[r, c] == cut
    first, left = np.zeros(n_rows + 1, np.int64), n_ties
    for r in range(n_rows):
        equal[r] = min(equal[r], left)
        left -= equal[r]
        first[r + 1] = first[r] + above[r] + equal[r]
    row, column = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
    for r in numba.prange(n_rows):
        place, ties = first[r], equal[r]
        for c in range(value.shape[1]):
            if value[r, c] > cut or (value[r, c] == cut and ties > 0):
                ties -= value[r, c] == cut
                row[place], column[place] = r, c
                place += 1
    return row, column


@numba.njit(parallel=True, cache=True)
def _count_high_bits(bits, shift, n_parts):  # pragma: no cover (compiled)
    """How often each value of the high 15 bits occurs among positive numbers; counted in parts, side by side."""
    counts = np.zeros((n_parts, 2**15), np.int64)
    for part in numba.prange(n_parts):
        for r in range(part, len(bits), n_parts):
            for c in range(bits.shape[1]):
                if bits[r, c] > 0:
                    counts[part, bits[r, c] >> shift] += 1
    return counts.sum(0)


@numba.njit(parallel=True, cache=True)
def _gate_rows(product, table, place, latent_of, group, out):  # pragma: no cover (compiled)
    for token in numba.prange(len(product)):
        openness, latents = table[place[token]], latent_of[group[token]]
        for c in range(product.shape[1]):
            # Columns that only fill up hold -inf: 0 times that is no number.
            gate = openness[latents[c]]
            out[token, c] = product[token, c] * gate if gate > 0 else 0


@numba.njit(cache=True)
def add_weighted_entries(row, column, value, first, which, weight, sums):  # pragma: no cover (compiled)
    """sums[w, column[e]] += weight[row[e], w] * value[e] for each entry e of a sparse table and each w; in place.

    Entries of a row stand together. The weights are sparse too: those of row r are weight[first[r] : first[r + 1]],
    for the w in `which`.
    """
    start = 0
    while start < len(row):
        end = start + 1
        while end < len(row) and row[end] == row[start]:
            end += 1
        for place in range(first[row[start]], first[row[start] + 1]):
            total, share = sums[which[place]], weight[place]
            for entry in range(start, end):
                total[column[entry]] += share * value[entry]
        start = end


@numba.njit(cache=True)
def place_entries(row, column, value, row_slot, column_slot, out):  # pragma: no cover (compiled)
    """out[row_slot[row[e]], column_slot[column[e]]] = value[e] for each entry e whose slots are not negative."""
    for entry in range(len(row)):
        y, x = row_slot[row[entry]], column_slot[column[entry]]
        if y >= 0 and x >= 0:
            out[y, x] = value[entry]


def dot_rows(rows: Tensor, row: Tensor, table: Tensor, latent: Tensor) -> Tensor:
    """out[e] = rows[row[e]] . table[latent[e]].

    Args:
        rows, table: [any d]; row, latent: [entry].
    """
    if rows.device.type == "cpu":
        out = rows.new_empty(len(latent))
        _dot_rows(rows.numpy(), row.numpy(), table.numpy(), latent.numpy(), out.numpy())
        return out
    return torch.einsum("ed,ed->e", rows[row], table[latent])


class Grouped:
    """Entries put together by a key, to sum what they send to it.

    By latent it sums what tokens send to a latent's parameters, by token it is the sparse decoder's product.

    Args:
        key: [entry], 0 .. n_keys - 1.
    """

    def __init__(self, key: Tensor, n_keys: int) -> None:
        self._key = key
        self._n_keys = n_keys
        if key.device.type == "cpu":
            order, first = _count_sort(key.numpy(), n_keys)
            self._order, self._first = torch.from_numpy(order), torch.from_numpy(first)
        else:
            ordered, self._order = torch.sort(key, stable=True)
            self._first = torch.searchsorted(ordered, torch.arange(n_keys + 1, device=key.device))

    def sum_rows(self, weight: Tensor, table: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
        """out[j] = sum over entries e of key j of weight[e] * table[index[e]]; [key d].

        Args:
            weight, index: [entry]; table: [any d].
            out: a tensor of the result's shape to write it into (on the CPU), which spares allocating it.
        """
        if table.device.type == "cpu":
            out = table.new_empty(self._n_keys, table.shape[1]) if out is None else out
            _sum_rows(*(array.numpy() for array in (weight, table, index, self._order, self._first, out)))
            return out
        return F.embedding_bag(
            index[self._order], table, self._first[:-1], per_sample_weights=weight[self._order], mode="sum"
        )

    def sum(self, weight: Tensor) -> Tensor:
        """out[j] = sum over entries of key j of weight; [key]."""
        return weight.new_zeros(self._n_keys).index_add_(0, self._key, weight)


@dataclass(frozen=True)
class LargestOfToken:
    """The k largest positive numbers of each token."""

    k: int


@dataclass(frozen=True)
class LargestOfBatch:
    """The largest positive numbers of the batch, k times as many as it has tokens."""

    k: int


@dataclass(frozen=True)
class Above:
    """All numbers above a threshold of at least 0."""

    threshold: float


Choice = LargestOfToken | LargestOfBatch | Above


@dataclass(frozen=True)
class Entries:
    """Chosen pairs of token and latent, those of a token together, tokens in order.

    `preactivation` is x . encoder + bias, above 0, before the gate.
    """

    token: Tensor  # [entry]
    latent: Tensor  # [entry]
    preactivation: Tensor  # [entry]


def choose(
    x: Tensor,
    place: Tensor,
    encoder: Tensor,
    bias: Tensor,
    groups: Sequence[LiveGroup],
    openness: Tensor,
    choice: Choice,
    *,
    precision: Precision = "float32",
    among: Tensor | None = None,
) -> Entries:
    """The entries that `choice` takes by openness * relu(x . encoder + bias), among those live at each token's place.

    One product for each group of places with the same live latents, then one choice for the whole batch.

    Args:
        x: [token d_model] with the decoder bias already taken off; place: [token], a row of `openness`.
        encoder: [latent d_model]; bias: [latent]; openness: [place latent].
        groups: which latents are live where; nothing else is computed.
        among: [latent] bool, to choose among these only.
    """
    low = precision == "bfloat16" and x.dtype == torch.float32
    inputs, weights, offset = (part.bfloat16() if low else part for part in (x, encoder, bias))
    live = [_live(group.latents, len(bias), among, x.device) for group in groups]
    if len(groups) == 1:
        (latents,) = live
        order = None
        group_of_row = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        latent_of = _numbers(latents, x.device)[None]
        product = _product(inputs, weights, offset, latents)
    else:
        order, group_of_row, ends = token_groups(groups, place)
        product, latent_of = _grouped_product(inputs[order], weights, offset, live, ends)
    value = product
    if any(group.gated for group in groups):
        value = _gated(product, openness, place if order is None else place[order], latent_of, group_of_row)
    row, column = choose_in_rows(value, choice)
    latent, preactivation = latent_of[group_of_row[row], column], product[row, column].to(bias.dtype)
    token = row if order is None else order[row]
    if order is not None:
        in_order = torch.argsort(token, stable=True)
        token, latent, preactivation = token[in_order], latent[in_order], preactivation[in_order]
    if low:
        preactivation = (dot_rows(x, token, encoder, latent) + bias[latent]).clamp(min=torch.finfo(x.dtype).tiny)
    return Entries(token, latent, preactivation)


def token_groups(groups: Sequence[LiveGroup], place: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens in the order of the groups that their places belong to.

    Returns:
        order [row], the group of each row, and where in that order each group ends.
    """
    n_places = sum(len(group.positions) for group in groups)
    group_of_place = torch.empty(n_places, dtype=torch.int16, device=place.device)
    for number, group in enumerate(groups):
        group_of_place[group.positions] = number
    ordered, order = torch.sort(group_of_place[place], stable=True)
    ordered = ordered.long()
    return order, ordered, torch.bincount(ordered, minlength=len(groups)).cumsum(0).tolist()


def tokens_by_group(groups: Sequence[LiveGroup], place: Tensor) -> Iterator[tuple[Tensor, LiveGroup]]:
    """The tokens of each group that has any."""
    order, _, ends = token_groups(groups, place)
    for group, start, end in zip(groups, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            yield order[start:end], group


def _live(latents: slice | Tensor, d_sae: int, among: Tensor | None, device: torch.device) -> slice | Tensor:
    if among is None:
        return latents
    numbers = torch.arange(d_sae, device=device)[latents]
    return numbers[among[numbers]]


def _numbers(latents: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(latents.start, latents.stop, device=device) if isinstance(latents, slice) else latents


def _rows(table: Tensor, latents: slice | Tensor) -> Tensor:
    return table[latents] if isinstance(latents, slice) else table.index_select(0, latents)


def _product(inputs: Tensor, weights: Tensor, offset: Tensor, latents: slice | Tensor) -> Tensor:
    return torch.addmm(_rows(offset, latents), inputs, _rows(weights, latents).T)


def _grouped_product(
    inputs: Tensor, weights: Tensor, offset: Tensor, live: list[slice | Tensor], ends: list[int]
) -> tuple[Tensor, Tensor]:
    """(product, latent_of): rows of group g hold the products with its live latents, latent_of[g], then -inf.

    Row and column counts are rounded up, so that the library meets few shapes: it compiles a kernel for each.

    Args:
        inputs: [token d_model] in the order of groups; group g's rows end before row ends[g].
    """
    numbers = [_numbers(latents, inputs.device) for latents in live]
    widths = torch.tensor([len(some) for some in numbers], device=inputs.device)
    widest = _round_up(int(widths.max()), 16)
    latent_of = torch.zeros(len(live), widest, dtype=torch.int64, device=inputs.device)
    for number, some in enumerate(numbers):
        latent_of[number, : len(some)] = some
    product = inputs.new_full((len(inputs), widest), -torch.inf)
    starts = [0, *ends[:-1]]
    if all(isinstance(latents, slice) for latents in live):
        for latents, start, end in zip(live, starts, ends, strict=True):
            if end > start:
                rows = inputs[start : start + _round_up(end - start, 64)]
                part = _product(rows, weights, offset, latents)
                product[start:end, : part.shape[1]] = part[: end - start]
        return product, latent_of
    closed = torch.arange(widest, device=inputs.device) >= widths[:, None]
    most_rows = _round_up(max(end - start for start, end in zip(starts, ends, strict=True)), 16)
    step = max(1, _GATHERED_ELEMENTS // max(1, widest * weights.shape[1]))
    for first in range(0, len(live), step):
        some = latent_of[first : first + step]
        gathered = weights.index_select(0, some.reshape(-1)).view(*some.shape, -1)
        padded = inputs.new_zeros(len(some), most_rows, inputs.shape[1])
        places = range(first, first + len(some))
        for place, number in enumerate(places):
            padded[place, : ends[number] - starts[number]] = inputs[starts[number] : ends[number]]
        block = torch.baddbmm(offset[some][:, None], padded, gathered.transpose(1, 2))
        block.masked_fill_(closed[first : first + step, None], -torch.inf)
        for place, number in enumerate(places):
            product[starts[number] : ends[number]] = block[place, : ends[number] - starts[number]]
    return product, latent_of


_GATHERED_ELEMENTS = 2**24  # Weights gathered at a time: 32 MB in bfloat16.


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _gated(product: Tensor, openness: Tensor, place: Tensor, latent_of: Tensor, group: Tensor) -> Tensor:
    """product * openness of each entry's latent at its token's place, in the openness's precision."""
    if product.device.type == "cpu":
        out = openness.new_empty(product.shape)
        arrays = (product.to(openness.dtype), openness, place, latent_of, group, out)
        _gate_rows(*(array.numpy() for array in arrays))
        return out
    gate = openness[place[:, None], latent_of[group]]
    return torch.where(gate > 0, product.to(openness.dtype) * gate, 0)


def choose_in_rows(value: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """(row, column) of the entries that `choice` takes; rows in order, only numbers above 0.

    Of equal numbers any may be taken, but never more than `choice` allows.

    Args:
        value: [token column], float32, float64 or bfloat16.
    """
    if isinstance(choice, Above):
        return _above(value, choice.threshold, 0)
    if isinstance(choice, LargestOfToken):
        if value.device.type == "cpu":
            column = torch.empty(len(value), choice.k, dtype=torch.int64)
            _largest_of_rows(_ordered(value).numpy(), choice.k, column.numpy())
            row, entry = (column >= 0).nonzero(as_tuple=True)
            return row, column[row, entry]
        top = value.topk(min(choice.k, value.shape[1]), dim=1)
        row, entry = (top.values > 0).nonzero(as_tuple=True)
        return row, top.indices[row, entry]
    count = choice.k * len(value)
    if value.device.type == "cpu" and value.dtype != torch.float64:
        return _above(value, *_cut_by_bits(value, count))
    positive = value[value > 0]
    if len(positive) <= count:
        return _above(value, 0.0, 0)
    top = positive.topk(count).values
    return _above(value, float(top[-1]), int((top == top[-1]).sum()))


def _ordered(value: Tensor) -> Tensor:
    """Numbers in the same order that numba can read.

    As integers, the bits of positive bfloat16 numbers are in the same order, and negative ones stay below 0.
    """
    return value.view(torch.int16) if value.dtype == torch.bfloat16 else value


def _cut_by_bits(value: Tensor, count: int) -> tuple[float, int]:
    """The `count`-th largest positive number of a table, and how many that equal it are among those; (0, 0) if none.

    Counts how often each pattern of high bits occurs, then sorts only the numbers that share the decisive pattern.
    """
    low = value.dtype == torch.bfloat16
    bits = value.view(torch.int16 if low else torch.int32)
    counts = torch.from_numpy(_count_high_bits(bits.numpy(), 0 if low else 16, numba.get_num_threads()))
    at_least = counts.flip(0).cumsum(0).flip(0)
    if int(at_least[0]) <= count:
        return 0.0, 0
    pattern = int((at_least >= count).sum()) - 1
    wanted = count - int(at_least[pattern] - counts[pattern])
    if low:
        return float(torch.tensor(pattern, dtype=torch.int16).view(torch.bfloat16)), wanted
    edges = torch.tensor([pattern << 16, (pattern << 16) + 0xFFFF], dtype=torch.int32).view(torch.float32)
    row, column = _above(value, float(edges[0]), int(counts[pattern]))
    alike = value[row, column]
    top = alike[alike <= edges[1]].topk(wanted).values
    return float(top[-1]), int((top == top[-1]).sum())


def _above(value: Tensor, cut: float, n_ties: int) -> tuple[Tensor, Tensor]:
    """(row, column) of the numbers above `cut`, and of the first `n_ties` that equal it."""
    if value.device.type == "cpu":
        if value.dtype == torch.bfloat16:
            at = int(torch.tensor(cut, dtype=torch.bfloat16).view(torch.int16))
        else:
            at = np.dtype(str(value.dtype).removeprefix("torch.")).type(cut)
        row, column = _rows_above(_ordered(value).numpy(), at, n_ties)
        return torch.from_numpy(row), torch.from_numpy(column)
    taken = value > cut
    if n_ties:
        row, column = (value == cut).nonzero(as_tuple=True)
        taken[row[:n_ties], column[:n_ties]] = True
    row, column = taken.nonzero(as_tuple=True)
    return row, column
