"""Selection of the largest pre-activations of each token, compiled by numba for the CPU.

The definition of what these loops compute is `_take` in `posmask.sae.selection`. A product is a row of
x . encoder per token; where `low` it holds bfloat16 numbers as int16, which numba does not know. A product may also be
approximate, with a known error (see `cpu_integers`): numbers that the error leaves undecided are computed exactly.
"""

import numba
import numpy as np

__all__ = ["above_floor", "join_entries", "largest_of_rows"]

_LANES, _DEPTH = 128, 4
"""Column c of a row belongs to lane c % _LANES. Maxima are kept per lane, and per cell of _DEPTH numbers of a lane."""
_SEGMENT = _LANES * _DEPTH
_BLOCK = 32  # columns that are compared with the floor in one pass


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def _gated_part(  # pragma: no cover (compiled)
    row, low, bias, latents, openness, start, end, bits, value
):
    """value[c] = openness * (product + bias) for columns start:end, at most a segment.

    `bits` is scratch space for the bits of bfloat16 numbers; an empty `openness` stands for 1.
    """
    part, offset = value[start:end], bias[start:end]
    n = len(part)
    if low:
        raw, wide = row[start:end], bits[:n]
        for c in range(n):
            wide[c] = np.int32(raw[c]) << 16
        number = wide.view(np.float32)
        for c in range(n):
            part[c] = number[c] + offset[c]
    else:
        product = row[start:end]
        for c in range(n):
            part[c] = product[c] + offset[c]
    if len(openness):
        which = latents[start:end]
        if which[n - 1] - which[0] == n - 1:
            gate = openness[which[0] : which[0] + n]
            for c in range(n):
                part[c] *= gate[c]
        else:
            for c in range(n):
                part[c] *= openness[which[c]]


@numba.njit(cache=True)
def _preactivation(row, low, bias, bits, c):  # pragma: no cover (compiled)
    """product + bias of column c of a row."""
    if low:
        bits[0] = np.int32(row[c]) << 16
        return bits.view(np.float32)[0] + bias[c]
    return row[c] + bias[c]


@numba.njit(cache=True)
def _maxima(value, start, cell, lane):  # pragma: no cover (compiled)
    """Set `cell` to the maxima of the segment that begins at `start`, and raise the maxima of `lane` to them."""
    top = cell[start // _DEPTH : start // _DEPTH + _LANES]
    a, b = value[start : start + _LANES], value[start + _LANES : start + 2 * _LANES]
    start += 2 * _LANES
    c, d = value[start : start + _LANES], value[start + _LANES : start + 2 * _LANES]
    for s in range(_LANES):
        left, right = a[s] if a[s] > b[s] else b[s], c[s] if c[s] > d[s] else d[s]
        top[s] = left if left > right else right
        lane[s] = top[s] if top[s] > lane[s] else lane[s]


@numba.njit(cache=True)
def _kth_largest(number, n, k, room):  # pragma: no cover (compiled)
    """The k-th largest of the first n numbers, without NaN; `room` is scratch space of at least n numbers.

    numba needs ten seconds to compile np.partition.
    """
    for i in range(n):
        room[i] = number[i]
    first, last, rank = 0, n - 1, n - k
    while first < last:
        pivot = room[(first + last) // 2]
        i, j = first, last
        while i <= j:
            while room[i] < pivot:
                i += 1
            while room[j] > pivot:
                j -= 1
            if i <= j:
                room[i], room[j] = room[j], room[i]
                i += 1
                j -= 1
        if rank <= j:
            last = j
        elif rank >= i:
            first = i
        else:
            break
    return room[rank]


@numba.njit(cache=True)
def _floor_of_largest(k, cell, n_cells, lane, room):  # pragma: no cover (compiled)
    """A number that at least k numbers of the row reach, or 0, from the maxima of cells and lanes.

    `room` is scratch space of at least `n_cells` numbers.
    """
    zero = lane.dtype.type(0)
    if k > _LANES:
        if k > n_cells:
            return zero
        floor = _kth_largest(cell, n_cells, k, room)
        return floor if floor > zero else zero
    low, high = zero, zero
    for s in range(_LANES):
        high = lane[s] if lane[s] > high else high
    for _ in range(7):
        middle = (low + high) * lane.dtype.type(0.5)
        n_above = np.int32(0)
        for s in range(_LANES):
            n_above += np.int32(lane[s] >= middle)
        if n_above >= k:
            low = middle
        else:
            high = middle
    return low


@numba.njit(cache=True)
def _candidates(value, floor, least, cell, n_cells, lane, column, number):  # pragma: no cover (compiled)
    """Write the numbers of the row that reach `floor` and exceed `least`, and their columns; returns their count.

    There are no branches, which the processor could not predict: a rejected number is overwritten by the next.
    """
    n = 0
    lanes, n_lanes = np.empty(_LANES, np.int32), 0
    for s in range(_LANES):
        lanes[n_lanes] = s
        n_lanes += lane[s] >= floor
    cells, n_hit = np.empty(n_cells + 1, np.int32), 0
    for first in range(0, n_cells, _LANES):
        for i in range(n_lanes):
            cells[n_hit] = first + lanes[i]
            n_hit += cell[first + lanes[i]] >= floor
    for i in range(n_hit):
        first = cells[i] // _LANES * _SEGMENT + cells[i] % _LANES
        for depth in range(_DEPTH):
            c = first + depth * _LANES
            column[n], number[n] = c, value[c]
            n += (value[c] >= floor) & (value[c] > least)
    for c in range(n_cells * _DEPTH, len(value)):
        column[n], number[n] = c, value[c]
        n += (value[c] >= floor) & (value[c] > least)
    return n


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz", "nnan"})
def _cut_of_largest(number, n, k, room):  # pragma: no cover (compiled)
    """The k-th largest of the first n numbers, for n > k and no NaN; `room` is scratch space.

    The result may be smaller if infinities are among the numbers.
    """
    if n - k > 32:
        return _kth_largest(number, n, k, room)
    # Few numbers exceed k: removing the smallest one by one is faster than a partition.
    most = number.dtype.type(np.finfo(np.float32).max)
    for i in range(n):
        room[i] = number[i]
    n_gone = 0
    while True:
        least = most
        for i in range(n):
            least = room[i] if room[i] < least else least
        n_least = np.int32(0)
        for i in range(n):
            n_least += np.int32(room[i] == least)
            room[i] = most if room[i] == least else room[i]
        n_gone += n_least
        if n_gone > n - k or n_least == 0:
            return least


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def _dot(left, right):  # pragma: no cover (compiled)
    """The scalar product of two vectors."""
    total = left.dtype.type(0)
    for column in range(len(left)):
        total += left[column] * right[column]
    return total


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def _exact(x, weight, latents, column, n, out):  # pragma: no cover (compiled)
    """out[i] = x . weight[latents[column[i]]] for the first n columns; passes over four rows hide their loading."""
    i = 0
    while i + 4 <= n:
        a, b = weight[latents[column[i]]], weight[latents[column[i + 1]]]
        c, d = weight[latents[column[i + 2]]], weight[latents[column[i + 3]]]
        s = t = u = v = x.dtype.type(0)
        for j in range(len(x)):
            s += x[j] * a[j]
            t += x[j] * b[j]
            u += x[j] * c[j]
            v += x[j] * d[j]
        out[i], out[i + 1], out[i + 2], out[i + 3] = s, t, u, v
        i += 4
    while i < n:
        out[i] = _dot(x, weight[latents[column[i]]])
        i += 1


@numba.njit(cache=True)
def _undecided(  # pragma: no cover (compiled)
    x, weight, bias, latents, openness, k, slack, n, column, number, room, value
):
    """Keep the candidates that may be among the k largest, with their exact numbers; returns their count.

    The first n numbers differ from openness * (x . weight + bias) by at most `slack`. `value` is set to the exact
    pre-activation of the columns that are kept.
    """
    cut, n_near = -slack - slack, 0
    if n > k:
        cut += _cut_of_largest(number, n, k, room)
    for i in range(n):
        column[n_near] = column[i]
        n_near += n <= k or number[i] >= cut
    _exact(x, weight, latents, column, n_near, room)
    n_kept = 0
    for i in range(n_near):
        c = column[i]
        value[c] = room[i] + bias[c]
        exact = value[c] * openness[latents[c]] if len(openness) else value[c]
        if exact > 0:
            column[n_kept], number[n_kept] = c, exact
            n_kept += 1
    return n_kept


@numba.njit(parallel=True, cache=True)
def largest_of_rows(  # pragma: no cover (compiled)
    product, low, bias, latents, table, mask_row, n_parts, slack, x, weight, k, latent, preactivation, count
):
    """Write the k largest positive numbers of each row of openness * (product + bias), in no particular order.

    `latents` are the latents of the columns. `table` [mask_row latent] is the openness, with the row of each token in
    `mask_row`, which is empty if nothing is gated. Rows are divided into `n_parts` parallel parts. `slack` [row] is the
    largest error of the numbers where the product is approximate, and empty where it is not; the exact product is that
    of `x` [row d] and `weight` [latent d]. The results are `latent` and `preactivation` [row k], of which the first
    `count` [row] are set.
    """
    n_rows, n = len(count), len(bias)
    n_cells = n // _SEGMENT * _LANES
    for part in numba.prange(n_parts):
        bits, value = np.empty(_SEGMENT, np.int32), np.empty(n, bias.dtype)
        cell, lane = np.empty(n_cells, bias.dtype), np.empty(_LANES, bias.dtype)
        column, number = np.empty(n + 1, np.int32), np.empty((2, n + 1), bias.dtype)
        for t in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
            openness = table[mask_row[t]] if len(mask_row) else bias[:0]
            lane[:] = 0
            for start in range(0, n_cells * _DEPTH, _SEGMENT):
                _gated_part(product[t], low, bias, latents, openness, start, start + _SEGMENT, bits, value)
                _maxima(value, start, cell, lane)
            if n_cells * _DEPTH < n:
                _gated_part(product[t], low, bias, latents, openness, n_cells * _DEPTH, n, bits, value)
                for c in range(n_cells * _DEPTH, n):
                    s = c % _LANES
                    lane[s] = value[c] if value[c] > lane[s] else lane[s]
            floor, error = _floor_of_largest(k, cell, n_cells, lane, number[1]), value.dtype.type(0)
            if len(slack):
                error = slack[t]
            n_candidates = _candidates(value, floor - error - error, -error, cell, n_cells, lane, column, number[0])
            if len(slack):
                n_candidates = _undecided(
                    x[t], weight, bias, latents, openness, k, error, n_candidates, column, number[0], number[1], value
                )
            cut, n_above = value.dtype.type(0), n_candidates
            if n_candidates > k:
                cut = _cut_of_largest(number[0], n_candidates, k, number[1])
                n_above = 0
                for i in range(n_candidates):
                    n_above += number[0, i] > cut
            n_ties, n_taken = k - n_above, 0
            for i in range(n_candidates):
                if n_taken < k and (number[0, i] > cut or (number[0, i] == cut and n_ties > 0)):
                    n_ties -= number[0, i] == cut
                    c = column[i]
                    latent[t, n_taken] = latents[c]
                    preactivation[t, n_taken] = value[c]
                    if not len(slack):
                        preactivation[t, n_taken] = _preactivation(product[t], low, bias, bits, c)
                    n_taken += 1
            count[t] = n_taken


@numba.njit(parallel=True, cache=True)
def above_floor(  # pragma: no cover (compiled)
    product, low, bias, latents, table, mask_row, n_parts, slack, x, weight, floor, latent, preactivation, taken, count
):
    """Write all positive numbers of openness * (product + bias) above `floor`; arguments as for `largest_of_rows`.

    `taken` [row column] is the gated number itself.
    """
    n_rows, n, zero = len(count), len(bias), bias.dtype.type(0)
    for part in numba.prange(n_parts):
        bits, value = np.empty(_SEGMENT, np.int32), np.empty(n, bias.dtype)
        for t in range(part * n_rows // n_parts, (part + 1) * n_rows // n_parts):
            openness = table[mask_row[t]] if len(mask_row) else bias[:0]
            for start in range(0, n, _SEGMENT):
                end = min(n, start + _SEGMENT)
                _gated_part(product[t], low, bias, latents, openness, start, end, bits, value)
            lowered = floor if floor > zero else zero
            if len(slack):
                lowered -= slack[t]
            n_taken = 0
            for start in range(0, n, _BLOCK):
                block = value[start : start + _BLOCK]
                n_above = np.int32(0)
                for c in range(len(block)):
                    n_above += np.int32(block[c] > lowered)
                if n_above:
                    for c in range(start, start + len(block)):
                        if value[c] <= lowered:
                            continue
                        if len(slack):
                            exact = _dot(x[t], weight[latents[c]]) + bias[c]
                            taken[t, n_taken] = exact * openness[latents[c]] if len(openness) else exact
                        else:
                            exact = _preactivation(product[t], low, bias, bits, c)
                            taken[t, n_taken] = value[c]
                        if taken[t, n_taken] > floor and taken[t, n_taken] > zero:
                            latent[t, n_taken], preactivation[t, n_taken] = latents[c], exact
                            n_taken += 1
            count[t] = n_taken


@numba.njit(cache=True)
def join_entries(latent, value, count):  # pragma: no cover (compiled)
    """Flatten the first count[t] entries of each row t: returns (row, latent, value)."""
    n = count.sum()
    row, latents, values = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, value.dtype)
    e = 0
    for t in range(len(count)):
        for i in range(count[t]):
            row[e], latents[e], values[e] = t, latent[t, i], value[t, i]
            e += 1
    return row, latents, values
