"""Loops over active codes, compiled by numba for the CPU.

Arguments are numpy arrays, and results are written into the arrays `out`, `total` and the like that the caller
allocates. Entries are active codes: pairs of a token and a latent. `operations` is the interface with tensors.
"""

from pathlib import Path

import numba
import numpy as np

__all__ = [
    "add_weighted_entries",
    "centered",
    "count_sort",
    "dot_rows",
    "explain",
    "loops_are_compiled",
    "normalize_rows",
    "place_entries",
    "sum_rows",
]

_FAST = {"contract", "reassoc", "nsz"}  # Sums in any order; NaN and infinity keep their meaning.


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def centered(vectors, order, center, scale, bias, out):  # pragma: no cover (compiled)
    """out[row] = (vectors[order[row]] - center) / scale - bias; an empty `order` keeps the order of `vectors`."""
    for row in numba.prange(len(out)):
        vector, to = vectors[order[row] if len(order) else np.int64(row)], out[row]
        for column in range(len(center)):
            to[column] = (vector[column] - center[column]) / scale - bias[column]


@numba.njit(parallel=True, cache=True)
def normalize_rows(table):  # pragma: no cover (compiled)
    """Scale each row of the table to unit norm, in place; rows of zeros stay zero."""
    for index in numba.prange(len(table)):
        row = table[index]
        norm = np.sqrt(_dot(row, row))
        if norm != 0:
            row /= norm


@numba.njit(fastmath=_FAST, cache=True)
def _dot(left, right):  # pragma: no cover (compiled)
    """The scalar product of two vectors."""
    total = left.dtype.type(0)
    for column in range(len(left)):
        total += left[column] * right[column]
    return total


@numba.njit(fastmath=_FAST, cache=True)
def _add_rows(weight, table, index, entry, start, end, sign, total):  # pragma: no cover (compiled)
    """Add sign * sum of weight[e] * table[index[e]] to `total`, over the entries e = entry[start:end].

    An empty `entry` stands for the entries start:end themselves. The loop takes eight entries per pass, which reads and
    writes `total` an eighth as often.
    """
    n, listed = len(total), len(entry) > 0
    entries = np.empty(8, np.int64)
    i = start
    while i + 8 <= end:
        for j in range(8):
            entries[j] = entry[i + j] if listed else i + j
        a, b, c, d = (
            table[index[entries[0]]],
            table[index[entries[1]]],
            table[index[entries[2]]],
            table[index[entries[3]]],
        )
        f, g, h, k = (
            table[index[entries[4]]],
            table[index[entries[5]]],
            table[index[entries[6]]],
            table[index[entries[7]]],
        )
        s, t, u, v = weight[entries[0]], weight[entries[1]], weight[entries[2]], weight[entries[3]]
        w, x, y, z = weight[entries[4]], weight[entries[5]], weight[entries[6]], weight[entries[7]]
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
    """out[e] = vector . table[index[e]] for e in start:end, four per pass to read `vector` a fourth as often."""
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
def dot_rows(rows, row, table, latent, out):  # pragma: no cover (compiled)
    """out[e] = rows[row[e]] . table[latent[e]] for each entry e."""
    for entry in numba.prange(len(latent)):
        out[entry] = _dot(rows[row[entry]], table[latent[entry]])


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def explain(target, first, latent, value, table, level, left, along):  # pragma: no cover (compiled)
    """Subtract the entries from the target, see `operations.explain`; token t has the entries first[t] : first[t + 1].

    `left` [part token d] and `along` [entry] are the results; `level` is empty if there is one part.
    """
    n_parts, n_tokens = left.shape[:2]
    all_entries = np.empty(0, np.int64)
    sign = target.dtype.type(-1)
    for token in numba.prange(n_tokens):
        start, end = first[token], first[token + 1]
        if n_parts == 1:
            left[0, token] = target[token]
            _add_rows(value, table, latent, all_entries, start, end, sign, left[0, token])
            _dots(left[0, token], table, latent, start, end, along)
        else:
            left[0, token] = target[token]
            for part in range(1, n_parts):  # numba compiles assignments to several rows for seconds
                left[part, token] = 0
            for e in range(start, end):
                _add_rows(value, table, latent, all_entries, e, e + 1, sign, left[level[latent[e]], token])
            for part in range(1, n_parts):
                left[part, token] += left[part - 1, token]
            for part in range(n_parts - 2, -1, -1):
                left[part, token] += left[part + 1, token]
            for e in range(start, end):
                along[e] = _dot(left[level[latent[e]], token], table[latent[e]])


@numba.njit(cache=True)
def count_sort(key, n_keys):  # pragma: no cover (compiled)
    """Sort entries by key, stably: returns (order, first); key j has the entries order[first[j] : first[j + 1]]."""
    first = np.zeros(n_keys + 1, np.int64)
    for entry in range(len(key)):
        first[key[entry] + 1] += 1
    for j in range(n_keys):
        first[j + 1] += first[j]
    next_slot, order = first[:-1].copy(), np.empty(len(key), np.int64)
    for entry in range(len(key)):
        order[next_slot[key[entry]]] = entry
        next_slot[key[entry]] += 1
    return order, first


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def sum_rows(weight, table, index, order, first, out, fresh):  # pragma: no cover (compiled)
    """out[j] += sum of weight[e] * table[index[e]] over the entries e of key j, from 0 if `fresh`.

    `order` and `first` are those of `count_sort`.
    """
    for key in numba.prange(len(out)):
        if fresh:
            out[key] = 0
        _add_rows(weight, table, index, order, first[key], first[key + 1], weight.dtype.type(1), out[key])


@numba.njit(cache=True)
def add_weighted_entries(row, column, value, first, which, weight, sums):  # pragma: no cover (compiled)
    """sums[w, column[e]] += weight[row[e], w] * value[e] for each entry e of a sparse table and each w; in place.

    Entries of a row are adjacent. The weights are sparse too: row r has weight[first[r] : first[r + 1]], for the same
    slice of `which`, which holds the w of each.
    """
    start = 0
    while start < len(row):
        end = start + 1
        while end < len(row) and row[end] == row[start]:
            end += 1
        for w in range(first[row[start]], first[row[start] + 1]):
            total, share = sums[which[w]], weight[w]
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


def loops_are_compiled() -> bool:
    """Whether numba has already compiled the loops of a training step on this machine, which takes about 20 s."""
    cache = explain.stats.cache_path
    return bool(explain.signatures) or (cache is not None and any(Path(cache).glob("cpu.explain-*.nbi")))
