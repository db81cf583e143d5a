"""The fast ways to do what sae.py says with a batch's active codes, and what the processor must be told for them.

Active codes are entries (token, latent), those of a token together, tokens in order. Products with the dictionary go
through these entries alone, in both directions, so their cost does not grow with d_sae. On the CPU the loops that
torch has no fast operation for are compiled by numba on the user's machine; on other devices the same results come
from torch operations.
"""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Grouped",
    "Precision",
    "add_weighted_entries",
    "bfloat16_slowdown",
    "centred",
    "compiled",
    "dot_rows",
    "explain",
    "fast_float32",
    "fast_precision",
    "float32_stays_float32",
    "give_back_freed_memory",
    "keep_freed_memory",
    "place_entries",
    "product_rate",
    "threads",
    "unit_rows_",
]

Precision = Literal["float32", "bfloat16"]
"""Precision of the products in a model or with a dictionary."""


def compiled(tensor: Tensor) -> bool:
    """Whether the compiled loops can work on a tensor; where not, torch operations do the same."""
    return tensor.device.type == "cpu"


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


def give_back_freed_memory() -> None:
    """Give what a stage has freed back to the system, before a stage that needs other sizes (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def threads(n_threads: int) -> Iterator[None]:
    """Let torch and the compiled loops use so many threads."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(n_threads)
    numba.set_num_threads(min(n_threads, before[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


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


def fast_precision(device: str = "cpu") -> Precision:
    """bfloat16 where the CPU or the device multiplies it natively, else float32.

    Decided by the CPU's features, not by a timing, so that it is the same in every run on one machine.
    """
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    if device != "cpu":
        return "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def bfloat16_slowdown() -> float:
    """How many times longer a bfloat16 product takes than a float32 product on this CPU; measured in under a second."""
    return product_rate("float32", n_rows=256) / product_rate("bfloat16", n_rows=256)


def product_rate(precision: str, n_rows: int = 2048) -> float:
    """Floating-point operations per second, the best of five products [n_rows 576] x [576 2304] after a warm-up."""
    left = torch.ones(n_rows, 576, dtype=getattr(torch, precision))
    right = torch.ones(2304, 576, dtype=left.dtype)
    seconds = []
    with fast_float32():
        for _ in range(6):
            started = time.perf_counter()
            _ = left @ right.T
            seconds.append(time.perf_counter() - started)
    return 2 * n_rows * 576 * 2304 / min(seconds[1:])


_FAST = {"contract", "reassoc", "nsz"}  # Sums may be taken in any order; NaN and infinity stay what they are.


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def _centred(vectors, order, center, scale, bias, out):  # pragma: no cover (compiled)
    for row in numba.prange(len(out)):
        vector, to = vectors[order[row] if len(order) else np.int64(row)], out[row]
        for column in range(len(center)):
            to[column] = (vector[column] - center[column]) / scale - bias[column]


def centred(vectors: Tensor, order: Tensor | None, center: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(vectors - center) / scale - bias, its rows in the order given (None: as they stand).

    Args:
        vectors: [token d_model], any floating precision and memory order; bias has the result's precision.
        scale: one number.
    """
    vectors, center, scale = (tensor.to(bias.dtype) for tensor in (vectors, center, scale))
    if compiled(vectors):
        out = torch.empty(vectors.shape, dtype=bias.dtype)
        rows = torch.empty(0, dtype=torch.int64) if order is None else order
        given = (vectors.contiguous().numpy(), rows.numpy(), center.contiguous().numpy(), scale.numpy()[()])
        _centred(*given, bias.numpy(), out.numpy())
        return out
    return ((vectors if order is None else vectors[order]) - center) / scale - bias


@numba.njit(parallel=True, cache=True)
def _unit_rows(table):  # pragma: no cover (compiled)
    for row in numba.prange(len(table)):
        one = table[row]
        norm = np.sqrt(_dot(one, one))
        if norm != 0:
            one /= norm


def unit_rows_(table: Tensor) -> None:
    """Scale each row to unit norm, in place; a row of zeros stays."""
    if compiled(table):
        _unit_rows(table.numpy())
    else:
        norms = table.norm(dim=1, keepdim=True)
        table.div_(norms.masked_fill(norms == 0, 1.0))


@numba.njit(fastmath=_FAST, cache=True)
def _dot(left, right):  # pragma: no cover (compiled)
    total = left.dtype.type(0)
    for column in range(len(left)):
        total += left[column] * right[column]
    return total


@numba.njit(fastmath=_FAST, cache=True)
def _add_rows(weight, table, index, entry, start, end, sign, total):  # pragma: no cover (compiled)
    """total += sign * sum of weight[e] * table[index[e]] over e = entry[start:end], or start:end where it is empty.

    Eight at a time, so that the total is read and written an eighth as often.
    """
    n, listed = len(total), len(entry) > 0
    some = np.empty(8, np.int64)
    i = start
    while i + 8 <= end:
        for j in range(8):
            some[j] = entry[i + j] if listed else i + j
        a, b, c, d = table[index[some[0]]], table[index[some[1]]], table[index[some[2]]], table[index[some[3]]]
        f, g, h, k = table[index[some[4]]], table[index[some[5]]], table[index[some[6]]], table[index[some[7]]]
        s, t, u, v = weight[some[0]], weight[some[1]], weight[some[2]], weight[some[3]]
        w, x, y, z = weight[some[4]], weight[some[5]], weight[some[6]], weight[some[7]]
        for column in range(n):
            left = s * a[column] + t * b[column] + u * c[column] + v * d[column]
            right = w * f[column] + x * g[column] + y * h[column] + z * k[column]
            total[column] += sign * (left + right)
        i += 8
    while i < end:
        e, f = entry[i] if listed else i, entry[min(i + 1, end - 1)] if listed else min(i + 1, end - 1)
        a, b, s, t = table[index[e]], table[index[f]], weight[e], weight[f] * (i + 1 < end)
        for column in range(n):
            total[column] += sign * (s * a[column] + t * b[column])
        i += 2


@numba.njit(fastmath=_FAST, cache=True)
def _dots(vector, table, index, start, end, out):  # pragma: no cover (compiled)
    """out[e] = vector . table[index[e]] for e = start .. end; four at a time, so that it is read a fourth as often."""
    e = start
    while e + 4 <= end:
        a, b, c, d = table[index[e]], table[index[e + 1]], table[index[e + 2]], table[index[e + 3]]
        s = t = u = v = vector.dtype.type(0)
        for column in range(len(vector)):
            number = vector[column]
            s += number * a[column]
            t += number * b[column]
            u += number * c[column]
            v += number * d[column]
        out[e], out[e + 1], out[e + 2], out[e + 3] = s, t, u, v
        e += 4
    while e < end:
        out[e] = _dot(vector, table[index[e]])
        e += 1


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def _dot_rows(rows, row, table, latent, out):  # pragma: no cover (compiled)
    for entry in numba.prange(len(latent)):
        out[entry] = _dot(rows[row[entry]], table[latent[entry]])


def dot_rows(rows: Tensor, row: Tensor, table: Tensor, latent: Tensor) -> Tensor:
    """out[e] = rows[row[e]] . table[latent[e]].

    Args:
        rows, table: [any d]; row, latent: [entry].
    """
    if compiled(rows):
        out = rows.new_empty(len(latent))
        _dot_rows(rows.numpy(), row.numpy(), table.numpy(), latent.numpy(), out.numpy())
        return out
    return torch.einsum("ed,ed->e", rows[row], table[latent])


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def _explain(target, first, latent, value, table, level, left, along):  # pragma: no cover (compiled)
    n_parts, n_tokens = left.shape[:2]
    nothing = np.empty(0, np.int64)
    sign = target.dtype.type(-1)
    for token in numba.prange(n_tokens):
        start, end = first[token], first[token + 1]
        if n_parts == 1:
            left[0, token] = target[token]
            _add_rows(value, table, latent, nothing, start, end, sign, left[0, token])
            _dots(left[0, token], table, latent, start, end, along)
        else:
            left[:, token] = 0
            left[0, token] = target[token]
            for e in range(start, end):
                _add_rows(value, table, latent, nothing, e, e + 1, sign, left[level[latent[e]], token])
            for part in range(1, n_parts):
                left[part, token] += left[part - 1, token]
            for part in range(n_parts - 2, -1, -1):
                left[part, token] += left[part + 1, token]
            for e in range(start, end):
                along[e] = _dot(left[level[latent[e]], token], table[latent[e]])


def explain(
    target: Tensor, token: Tensor, latent: Tensor, value: Tensor, table: Tensor, level: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What entries leave of a target, and how far each entry's latent points that way.

    Without `level`: left[0, t] = target[t] - sum of value * table[latent] over t's entries, and
    along[e] = left[0, token of e] . table[latent of e].

    With it, part m's own remainder takes only entries of latents of level <= m; left[m] is the sum of the remainders
    of part m and all later ones (so the last is that of all entries), and an entry's `along` is taken with left[level].

    Args:
        target: [token d]; token, latent, value: [entry], tokens in order; table: [latent d]; level: [latent].

    Returns:
        left [part token d], along [entry].
    """
    n_parts = 1 if level is None else int(level.max()) + 1
    if compiled(target):
        left, along = target.new_empty(n_parts, *target.shape), target.new_empty(len(latent))
        first = _first_of_each(token, len(target))
        levels = latent[:0] if level is None else level
        given = (target, first, latent, value, table, levels, left, along)
        _explain(*(tensor.numpy() for tensor in given))
        return left, along
    row = token if level is None else level[latent] * len(target) + token
    own = Grouped(row, n_parts * len(target)).sum_rows(-value, table, latent).view(n_parts, *target.shape)
    own[0] += target
    left = own.cumsum(0).flip(0).cumsum(0).flip(0)
    return left, dot_rows(left.flatten(0, 1), row, table, latent)


def _first_of_each(key: Tensor, n_keys: int) -> Tensor:
    """Where in an ordered list of keys each begins, and the end; [key + 1]."""
    return torch.searchsorted(key, torch.arange(n_keys + 1, device=key.device))


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


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def _sum_rows(weight, table, index, order, first, out, fresh):  # pragma: no cover (compiled)
    for key in numba.prange(len(out)):
        if fresh:
            out[key] = 0
        _add_rows(weight, table, index, order, first[key], first[key + 1], weight.dtype.type(1), out[key])


class Grouped:
    """Entries put together by a key, to sum what they send to it.

    By latent it sums what tokens send to a latent's parameters, by token it is the sparse decoder's product.

    Args:
        key: [entry], 0 .. n_keys - 1.
    """

    def __init__(self, key: Tensor, n_keys: int) -> None:
        self._key = key
        self._n_keys = n_keys
        if compiled(key):
            order, first = _count_sort(key.numpy(), n_keys)
            self.order, self._first = torch.from_numpy(order), torch.from_numpy(first)
        else:
            ordered, self.order = torch.sort(key, stable=True)
            self._first = _first_of_each(ordered, n_keys)

    def sum_rows(
        self, weight: Tensor, table: Tensor, index: Tensor, out: Tensor | None = None, *, add: bool = False
    ) -> Tensor:
        """out[j] = sum over entries e of key j of weight[e] * table[index[e]]; [key d].

        Args:
            weight, index: [entry]; table: [any d].
            out: a tensor of the result's shape to write it into, which spares allocating it.
            add: add to what `out` holds.
        """
        if out is None:
            out = table.new_empty(self._n_keys, table.shape[1])
        if compiled(table):
            arrays = (weight.numpy(), table.numpy(), index.numpy(), self.order.numpy(), self._first.numpy())
            _sum_rows(*arrays, out.numpy(), not add)
            return out
        total = F.embedding_bag(
            index[self.order], table, self._first[:-1], per_sample_weights=weight[self.order], mode="sum"
        )
        return out.add_(total) if add else out.copy_(total)

    def sum(self, weight: Tensor) -> Tensor:
        """out[j] = sum over entries of key j of weight; [key]."""
        return weight.new_zeros(self._n_keys).index_add_(0, self._key, weight)


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
