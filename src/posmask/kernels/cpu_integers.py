"""Products of 16-bit integers with a proven error, compiled by numba for the CPU.

A processor with AVX2 and without AVX-512 multiplies 16-bit integers about 1.6 times as fast as float32 numbers. Rows of
vectors and of the encoder are rounded to integers times a step of their own. If the rounding errors have the norms e_x
and e_w, the product of the rounded rows s q_x and s' q_w differs from that of the rows by at most

    e_x |w| + |s q_x| e_w        (Cauchy-Schwarz).

So all pre-activations that may be among the largest lie within twice this bound below the k-th largest product. They
are computed again in float32, and selected by these values. The result is that of float32 products up to the order of
their sums, which decides only between numbers that differ by rounding.

No sum overflows: the integers of a row have a norm of at most `_MOST_NORM`, and so, by the same inequality, every
partial sum is below 2^31.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["COLUMNS", "ROWS", "product", "quantize"]

ROWS, _VECTORS, _LANES = 6, 2, 8
"""A tile is the product of ROWS tokens with _VECTORS * _LANES latents: twelve registers of AVX2 hold its sums."""
COLUMNS = _VECTORS * _LANES
_PAIRS = 384  # of columns that are multiplied at a time: a panel of latents stays in the first cache
_MOST, _MOST_NORM = np.float32(32767), np.float32(46000)
_LEAST = np.float32(1e-30)
_FAST = {"contract", "reassoc", "nsz"}


@numba.njit(parallel=True, fastmath=_FAST, cache=True)
def quantize(table, code, step, norm, error):  # pragma: no cover (compiled)
    """Round rows to integers: table[row] = step[row] * code[row] + a rest of norm error[row].

    `code` may have a column more, which stays 0. `norm` is that of step * code. Rows whose entries are below 1e-30
    become 0. The errors of rows that are not finite are not finite.
    """
    for row in numba.prange(len(table)):
        vector, to = table[row], code[row]
        most = np.float32(0)
        for column in range(len(vector)):
            size = abs(vector[column])
            most = size if size > most else most
        unit = np.float32(1) / most if most > _LEAST else np.float32(0)
        square = np.float32(0)
        for column in range(len(vector)):
            share = vector[column] * unit
            square += share * share
        length = np.sqrt(square) / _MOST_NORM
        step[row] = most * (length if length > 1 / _MOST else 1 / _MOST)
        inverse = np.float32(1) / step[row] if most > _LEAST else np.float32(0)
        rest, total = np.float32(0), np.float32(0)
        for column in range(len(vector)):
            number = np.rint(vector[column] * inverse)
            to[column] = np.int16(number)
            left = (vector[column] - number * step[row]) * unit
            rest += left * left
            total += number * number
        norm[row], error[row] = step[row] * np.sqrt(total), most * np.sqrt(rest)
        if most <= _LEAST:
            error[row] += most * np.float32(np.sqrt(len(vector)))  # NaN stays


def _constant(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), number)


def _shuffled(builder: Any, vector: Any, index: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(index)), index)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _repeated(builder: Any, number: Any) -> Any:
    """A vector of `_LANES` equal numbers."""
    one = ir.Constant(ir.VectorType(number.type, _LANES), ir.Undefined)
    return _shuffled(builder, builder.insert_element(one, number, ir.Constant(ir.IntType(32), 0)), [0] * _LANES)


def _sums_of_pairs(builder: Any, left: Any, right: Any) -> Any:
    """left[2i] * right[2i] + left[2i + 1] * right[2i + 1]: one instruction (pmaddwd) on x86."""
    wide = ir.VectorType(ir.IntType(32), 2 * _LANES)
    both = builder.mul(builder.sext(left, wide), builder.sext(right, wide), flags=["nsw"])
    even, odd = list(range(0, 2 * _LANES, 2)), list(range(1, 2 * _LANES, 2))
    return builder.add(_shuffled(builder, both, even), _shuffled(builder, both, odd))


def _loaded(builder: Any, pointer: Any, vector: ir.VectorType) -> Any:
    load = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    load.align = 4
    return load


@intrinsic
def _tile(typing, code, token, pair, n_pairs, panel, step, panel_step, out, out_row, out_column, add):
    """Write (or `add`) a tile: ROWS tokens times the latents of a panel, for some pairs of columns.

    code [token pair] and panel [pair * COLUMNS] hold pairs of 16-bit integers in 32 bits; step [token] and panel_step
    [COLUMNS] are the steps of the integers, out [row column] is float32. numba would not keep the sums in registers.
    """
    integer = types.int64
    arguments = (code, integer, integer, integer, panel, step, panel_step, out, integer, integer, types.boolean)
    numbers = ir.VectorType(ir.FloatType(), _LANES)
    sums = ir.VectorType(ir.IntType(32), _LANES)
    halves = ir.VectorType(ir.IntType(16), 2 * _LANES)

    def write(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code, token, pair, n_pairs, panel, step, panel_step, out, out_row, out_column, add = values
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, values, strict=True)
            if isinstance(kind, types.Array)
        ]
        code, panel, step, panel_step, out = arrays
        width = cgutils.unpack_tuple(builder, code.shape)[1]
        out_width = cgutils.unpack_tuple(builder, out.shape)[1]
        first = builder.add(builder.mul(token, width), pair)
        rows = [builder.gep(code.data, [builder.add(first, builder.mul(width, _constant(r)))]) for r in range(ROWS)]
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(ir.IntType(64))
        index.add_incoming(_constant(0), before)
        totals = [[builder.phi(sums) for _ in range(_VECTORS)] for _ in range(ROWS)]
        panel_at = builder.mul(index, _constant(COLUMNS))
        of_panel = [
            _loaded(builder, builder.gep(panel.data, [builder.add(panel_at, _constant(v * _LANES))]), halves)
            for v in range(_VECTORS)
        ]
        grown = []
        for row_totals, row in zip(totals, rows, strict=True):
            of_row = builder.bitcast(_repeated(builder, builder.load(builder.gep(row, [index]))), halves)
            grown.append(
                [
                    builder.add(total, _sums_of_pairs(builder, of_row, part))
                    for total, part in zip(row_totals, of_panel, strict=True)
                ]
            )
            for total, larger in zip(row_totals, grown[-1], strict=True):
                total.add_incoming(ir.Constant(sums, [0] * _LANES), before)
                total.add_incoming(larger, loop)
        following = builder.add(index, _constant(1))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, n_pairs), loop, after)
        builder.position_at_end(after)
        for r in range(ROWS):
            scale = _repeated(builder, builder.load(builder.gep(step.data, [builder.add(token, _constant(r))])))
            to = builder.add(builder.mul(builder.add(out_row, _constant(r)), out_width), out_column)
            for v in range(_VECTORS):
                at = _constant(v * _LANES)
                factor = builder.fmul(scale, _loaded(builder, builder.gep(panel_step.data, [at]), numbers))
                number = builder.fmul(builder.sitofp(grown[r][v], numbers), factor)
                pointer = builder.gep(out.data, [builder.add(to, at)])
                present = builder.select(add, _loaded(builder, pointer, numbers), ir.Constant(numbers, [0.0] * _LANES))
                store = builder.store(builder.fadd(present, number), builder.bitcast(pointer, numbers.as_pointer()))
                store.align = 4
        return context.get_dummy_value()

    return types.void(*arguments), write


@numba.njit(cache=True)
def _multiply(  # pragma: no cover (compiled)
    code, step, start, end, row_code, row_step, latents, out, column, panel, panel_step
):
    """out[t - start, column + j] = product of token t with latents[j], for t in start:end and a panel of latents.

    `code` [token pair] and `row_code` [latent pair] hold pairs of 16-bit integers in 32 bits. `panel` and `panel_step`
    are scratch space.
    """
    n_pairs, last = code.shape[1], len(latents) - 1
    for lane in range(COLUMNS):
        panel_step[lane] = row_step[latents[min(lane, last)]]
    for pair in range(0, n_pairs, _PAIRS):
        n = min(_PAIRS, n_pairs - pair)
        for lane in range(COLUMNS):
            row = row_code[latents[min(lane, last)]]
            for p in range(n):
                panel[p * COLUMNS + lane] = row[pair + p]
        for token in range(start, end, ROWS):
            # numba passes the first argument
            _tile(  # pyright: ignore[reportCallIssue]
                code, token, pair, n, panel, step, panel_step, out, token - start, column, pair > 0
            )


@numba.njit(parallel=True, cache=True)
def product(code, step, start, end, row_code, row_step, latents, out):  # pragma: no cover (compiled)
    """out[t - start, j] = product of token t with latents[j], for t in start:end, from integers; see `_multiply`.

    The tables of integers must have ROWS - 1 more tokens, and `out` as many more rows, and columns up to a multiple of
    COLUMNS.
    """
    for part in numba.prange((len(latents) + COLUMNS - 1) // COLUMNS):
        panel, panel_step = np.empty(_PAIRS * COLUMNS, np.int32), np.empty(COLUMNS, np.float32)
        column = part * COLUMNS
        some = latents[column : column + COLUMNS]
        _multiply(code, step, start, end, row_code, row_step, some, out, column, panel, panel_step)
