"""The fast ways to do what sae.py says: only live latents are multiplied, only active codes are decoded.

A batch's sparse codes are `n_entries` pairs (latent, value) a token; an entry of value 0 says nothing. Products
with the dictionary go through these entries alone, in both directions, so their cost does not grow with d_sae.
On the CPU the loops that torch has no fast operation for (choosing a row's largest entries, sums and dot products
over scattered rows) are compiled by numba on the user's machine; on other devices the same results come from torch
operations.
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
    "ByLatent",
    "Precision",
    "Selected",
    "add_weighted_entries",
    "dot_rows",
    "fast_float32",
    "float32_stays_float32",
    "keep_freed_memory",
    "place_entries",
    "select_top_k",
    "top_k_rows",
    "weighted_rows",
]

Precision = Literal["float32", "bfloat16"]
"""In which precision the encoder's product is made to choose the k latents; their values are always full precision."""

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
def _dot_rows(rows, table, latent, out):  # pragma: no cover (compiled)
    for token in numba.prange(latent.shape[0]):
        for entry in range(latent.shape[1]):
            row = table[latent[token, entry]]
            total = table.dtype.type(0)
            for column in range(rows.shape[1]):
                total += rows[token, column] * row[column]
            out[token, entry] = total


@numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz"}, cache=True)
def _sum_rows(weight, rows, token, first, out):  # pragma: no cover (compiled)
    for j in numba.prange(out.shape[0]):
        total = out[j]
        total[:] = 0
        for place in range(first[j], first[j + 1]):
            share = weight[place]
            row = rows[token[place]]
            for column in range(total.shape[0]):
                total[column] += share * row[column]


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
def _largest_of_gated_rows(value, gate, gate_row, k, chosen):  # pragma: no cover (compiled)
    for token in numba.prange(value.shape[0]):
        openness = gate[gate_row[token]]
        gated = np.empty(value.shape[1], gate.dtype)
        for j in range(value.shape[1]):
            gated[j] = value[token, j] * openness[j]
        _largest(gated, k, chosen[token])


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


def dot_rows(rows: Tensor, table: Tensor, latent: Tensor) -> Tensor:
    """out[t, e] = rows[t] . table[latent[t, e]].

    Args:
        rows: [token d], table: [latent d], latent: [token entry].
    """
    if rows.device.type == "cpu":
        out = rows.new_empty(latent.shape)
        _dot_rows(rows.numpy(), table.numpy(), latent.numpy(), out.numpy())
        return out
    return torch.einsum("td,ted->te", rows, table[latent])


def weighted_rows(latent: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """out[t] = sum over e of weight[t, e] * table[latent[t, e]]: the sparse decoder's product, [token d]."""
    return F.embedding_bag(latent, table, per_sample_weights=weight, mode="sum")


class ByLatent:
    """The entries of a batch's codes sorted by latent, to sum what their tokens send to each latent.

    Args:
        latent: [token entry]; n_latents: rows of the sums.
    """

    def __init__(self, latent: Tensor, n_latents: int) -> None:
        self._flat = latent.reshape(-1)
        ordered, self._order = torch.sort(self._flat, stable=True)
        self._token = self._order // latent.shape[1]
        self._first = torch.searchsorted(ordered, torch.arange(n_latents + 1, device=latent.device))
        self._n_latents = n_latents

    def sum_rows(self, weight: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """out[j] = sum over entries (t, e) of latent j of weight[t, e] * rows[t]; [latent d].

        Args:
            out: a tensor of the result's shape to write it into (on the CPU), which spares allocating it.
        """
        in_order = weight.reshape(-1)[self._order]
        if rows.device.type == "cpu":
            out = rows.new_empty(self._n_latents, rows.shape[1]) if out is None else out
            _sum_rows(*(array.numpy() for array in (in_order, rows, self._token, self._first, out)))
            return out
        return F.embedding_bag(self._token, rows, self._first[:-1], per_sample_weights=in_order, mode="sum")

    def sum(self, weight: Tensor) -> Tensor:
        """out[j] = sum over entries of latent j of weight; [latent]."""
        return weight.new_zeros(self._n_latents).index_add_(0, self._flat, weight.reshape(-1))


@dataclass(frozen=True)
class Selected:
    """The latents that a top-k rule chose for each token.

    `preactivation` is relu(x . encoder + bias) before the gate, and 0 in entries that say nothing.
    """

    latent: Tensor  # [token entry]
    preactivation: Tensor  # [token entry]


def select_top_k(
    x: Tensor,
    position: Tensor,
    encoder: Tensor,
    bias: Tensor,
    groups: Sequence[LiveGroup],
    openness: Tensor,
    k: int,
    *,
    precision: Precision = "float32",
    among: Tensor | None = None,
) -> Selected:
    """The k latents with the largest openness * relu(x . encoder + bias) among those live at each token's position.

    One product for each group of positions with the same live latents, then one selection for the whole batch.

    Args:
        x: [token d_model] with the decoder bias already taken off; position: [token].
        encoder: [latent d_model]; bias: [latent]; openness: [position latent].
        groups: which latents are live where; nothing else is computed.
        among: [latent] bool, to choose among these only.
    """
    low = precision == "bfloat16" and x.dtype == torch.float32
    inputs, weights, offset = (part.bfloat16() if low else part for part in (x, encoder, bias))
    live = [_live(group.latents, len(bias), among, x.device) for group in groups]
    if len(groups) == 1:
        (latents,), (group,) = live, groups
        product = _product(inputs, weights, offset, latents)
        gate = _rows(openness.T, latents).T.contiguous() if group.gated else None
        chosen = top_k_rows(product, gate, position, k, bias.dtype)
        latent = _look_up(latents, chosen.latent)
    else:
        group_of_position = torch.empty(openness.shape[0], dtype=torch.int16, device=x.device)
        for number, group in enumerate(groups):
            group_of_position[group.positions] = number
        ordered, order = torch.sort(group_of_position[position], stable=True)
        ends = torch.bincount(ordered.long(), minlength=len(groups)).cumsum(0).tolist()
        product, latent_of = _grouped_product(inputs[order], weights, offset, live, ends)
        chosen = top_k_rows(product, None, position, k, bias.dtype)
        latent = torch.empty_like(chosen.latent)
        latent[order] = latent_of[ordered.long()[:, None], chosen.latent]
        chosen = Selected(latent, torch.empty_like(chosen.preactivation).index_copy_(0, order, chosen.preactivation))
    empty = chosen.preactivation <= 0
    preactivation = chosen.preactivation
    if low:
        preactivation = (dot_rows(x, encoder, latent) + bias[latent]).clamp(min=0).masked_fill(empty, 0)
    return Selected(latent.masked_fill(empty, 0), preactivation)


def _live(latents: slice | Tensor, d_sae: int, among: Tensor | None, device: torch.device) -> slice | Tensor:
    if among is None:
        return latents
    numbers = torch.arange(d_sae, device=device)[latents]
    return numbers[among[numbers]]


def _width(latents: slice | Tensor) -> int:
    return latents.stop - latents.start if isinstance(latents, slice) else len(latents)


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
    widths = torch.tensor([_width(latents) for latents in live], device=inputs.device)
    widest = _round_up(int(widths.max()), 16)
    latent_of = torch.zeros(len(live), widest, dtype=torch.int64, device=inputs.device)
    for number, latents in enumerate(live):
        numbers = torch.arange(latents.start, latents.stop) if isinstance(latents, slice) else latents
        latent_of[number, : len(numbers)] = numbers
    product = inputs.new_full((len(inputs), widest), -torch.inf)
    starts = [0, *ends[:-1]]
    if all(isinstance(latents, slice) for latents in live):
        for latents, start, end in zip(live, starts, ends, strict=True):
            if end > start:
                rows = inputs[start : start + _round_up(end - start, 64)]
                product[start:end, : _width(latents)] = _product(rows, weights, offset, latents)[: end - start]
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


def _look_up(latents: slice | Tensor, index: Tensor) -> Tensor:
    """The latents that stand at these places of the live ones."""
    if isinstance(latents, slice):
        return index + latents.start
    return latents[index] if len(latents) else index


def top_k_rows(product: Tensor, gate: Tensor | None, gate_row: Tensor, k: int, dtype: torch.dtype) -> Selected:
    """The k entries of each row with the largest gate * relu(product), in no particular order.

    Rows with fewer than k positive entries are filled up with entries of preactivation 0.

    Args:
        product: [token latent], float32, float64 or bfloat16.
        gate: [position latent] or None for 1; gate_row: [token], the row of `gate` for each token.
        dtype: of the pre-activations returned, and of the gate.
    """
    if product.device.type == "cpu":
        latent = torch.empty(len(product), k, dtype=torch.int64)
        if gate is not None:
            _largest_of_gated_rows(product.to(dtype).numpy(), gate.numpy(), gate_row.numpy(), k, latent.numpy())
        else:
            # As integers, the bits of positive bfloat16 numbers are in the same order, and negative ones stay below 0.
            value = product.view(torch.int16) if product.dtype == torch.bfloat16 else product
            _largest_of_rows(value.numpy(), k, latent.numpy())
        empty = latent < 0
        latent = latent.masked_fill_(empty, 0)
        return Selected(latent, product.gather(1, latent).to(dtype).masked_fill_(empty, 0))
    relu = product.to(dtype).clamp(min=0)
    value = relu if gate is None else relu * gate[gate_row]
    top = value.topk(min(k, value.shape[1]), dim=1)
    fill = k - top.indices.shape[1]
    chosen = relu.gather(1, top.indices).masked_fill(top.values <= 0, 0)
    return Selected(F.pad(top.indices, (0, fill)), F.pad(chosen, (0, fill)))
