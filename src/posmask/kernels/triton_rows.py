"""Reconstructions, gradients, sums and Adam on rows of the dictionary by Triton kernels, for CUDA GPUs.

`posmask.kernels.operations` is the interface and defines the results; `posmask.training.optimizer` calls `adam_rows`.
Entries are active codes: pairs of a token and a latent. An entry with a negative latent, key or index is empty: its
product is 0, and it is part of no sum. Sums have a fixed order and no atomic additions, so equal inputs give equal
bytes.
"""

# The language of kernels has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_SLOTS", "AdamStep", "adam_rows", "dot_rows", "explain_rows", "sum_entries", "sum_rows"]

MOST_SLOTS = 128
"""The largest number of entries per token for which `explain_rows` keeps the decoder rows of a token in registers."""
_CHUNK = 64  # entries of a key that one program adds
_KEYS = 8  # keys of which a program of `sum_entries` adds the numbers
_LAUNCH = {"enable_fp_fusion": True}  # Releases of Triton have different defaults.
_LONGEST_BLOCK = 1024  # columns of a program where a row may be divided
_SHORTEST_BLOCK = 16  # of `sum_rows`, which probes call with a column per task


def explain_rows(target: Tensor, latent: Tensor, value: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract each token's reconstruction from its target, and project the rest on the latents.

    Args:
        target: [token d].
        latent: [token k], k at most `MOST_SLOTS`.
        value: [token k].
        table: [latent d].

    Returns:
        residual [token d], along [token k], which is 0 for empty entries.
    """
    target, latent, value, table = (tensor.contiguous() for tensor in (target, latent, value, table))
    (n_tokens, d), k = target.shape, latent.shape[1]
    residual, along = torch.empty_like(target), torch.empty_like(value)
    slots = triton.next_power_of_2(k)
    if n_tokens:
        with torch.cuda.device_of(target):
            _explain_rows[(n_tokens,)](
                *(target, latent, value, table, residual, along, d, k),
                BLOCK=min(triton.next_power_of_2(d), max(32, 8192 // slots), 256),
                SLOTS=slots,
                num_warps=4 if slots <= 16 else 8,
                **_LAUNCH,
            )
    return residual, along


def dot_rows(rows: Tensor, row: Tensor, table: Tensor, latent: Tensor) -> Tensor:
    """out[e] = rows[row[e]] . table[latent[e]] for each entry e, 0 for empty entries; see `operations.dot_rows`."""
    rows, row, table, latent = (tensor.contiguous() for tensor in (rows, row, table, latent))
    n, d = len(latent), rows.shape[1]
    out = rows.new_empty(n)
    if n:
        with torch.cuda.device_of(rows):
            _dot_rows[(triton.cdiv(n, 16),)](
                *(rows, row, table, latent, out, n, d),
                ENTRIES=16,
                BLOCK=min(triton.next_power_of_2(d), 128),
                **_LAUNCH,
            )
    return out


def sum_rows(
    weight: Tensor,
    table: Tensor,
    index: Tensor,
    order: Tensor,
    key: Tensor,
    first: Tensor,
    out: Tensor,
    add: bool,
) -> None:
    """out[j] = sum of weight[e] * table[index[e]] over the entries e of key j, added to `out` if `add`.

    The entries of a key with more than 64 entries are divided into chunks, whose sums are added in a second pass.

    Args:
        weight: [entry].
        table: [row d].
        index: [entry], rows of the table.
        order: entries sorted by key, [entry].
        key: their keys, [entry].
        first: index of the first entry of each key in `order`, and the end of the last, [key + 1].
        out: [key d].
    """
    weight, table, index = (tensor.contiguous() for tensor in (weight, table, index))
    n, (n_keys, d) = len(order), out.shape
    n_chunks, block = triton.cdiv(n, _CHUNK), min(max(triton.next_power_of_2(d), _SHORTEST_BLOCK), 256)
    partial = table.new_empty(2 * n_chunks, d)
    shape = {"CHUNK": _CHUNK, "BLOCK": block, "STEP": 8, **_LAUNCH}
    with torch.cuda.device_of(table):
        if n > _CHUNK:
            _sum_chunks[(n_chunks, triton.cdiv(d, block))](
                weight, table, index, order, key, first, partial, n, n_keys, d, **shape
            )
        if n_keys:
            _sum_keys[(n_keys, triton.cdiv(d, block))](
                weight, table, index, order, first, partial, out, d, ADD=add, **shape
            )


def sum_entries(weight: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """out[j] = sum of weight[e] over the entries e of key j; arguments as for `sum_rows`."""
    weight, n_keys = weight.contiguous(), len(first) - 1
    out = weight.new_empty(n_keys)
    if n_keys:
        with torch.cuda.device_of(weight):
            _sum_entries[(triton.cdiv(n_keys, _KEYS),)](
                weight, order, first, out, n_keys, KEYS=_KEYS, LANES=32, **_LAUNCH
            )
    return out


@dataclass(frozen=True)
class AdamStep:
    """The numbers of a step of Adam for one parameter: its learning rate and its constants after `n` steps."""

    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    n: int


def adam_rows(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: AdamStep,
    clip: Tensor | None = None,
    *,
    unit_rows: bool = False,
    low: Tensor | None = None,
) -> None:
    """Take a step of Adam on a float32 parameter, in place.

    Args:
        parameter: of any shape, contiguous; [row d] with `unit_rows`.
        gradient: like the parameter.
        mean: moving mean of gradients, like the parameter.
        square: moving mean of their squares, like the parameter.
        step: learning rate and constants.
        clip: a scalar tensor that multiplies the gradient; None for 1.
        unit_rows: scale each row of the parameter to unit norm afterwards; rows of zeros stay zero.
        low: a bfloat16 tensor like the parameter that becomes its copy.
    """
    n = parameter.numel()
    d = parameter.shape[-1] if unit_rows else min(_LONGEST_BLOCK, triton.next_power_of_2(max(n, 1)))
    block = triton.next_power_of_2(d)
    first_beta, second_beta = step.betas
    if n:
        with torch.cuda.device_of(parameter):
            _adam_rows[(triton.cdiv(n, d),)](
                *(parameter, gradient, mean, square, parameter if low is None else low),
                *(parameter if clip is None else clip, n, d),
                step.learning_rate / (1 - first_beta**step.n),
                1 / (1 - second_beta**step.n) ** 0.5,
                *(1 - first_beta, second_beta, 1 - second_beta, step.epsilon),
                CLIP=clip is not None,
                UNIT=unit_rows,
                LOW=low is not None,
                BLOCK=block,
                num_warps=4 if block <= _LONGEST_BLOCK else 8,
                **_LAUNCH,
            )


@triton.jit
def _explain_rows(  # pragma: no cover (compiled)
    target, latent, value, table, residual, along, d, k, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):
    """`explain_rows` of one token; each row of the table is read once."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    row = tl.load(latent + token * k + slot, mask=slot < k, other=-1).to(tl.int64)
    filled = row >= 0
    weight = tl.load(value + token * k + slot, mask=filled, other=0.0)
    total = tl.zeros([SLOTS], table.dtype.element_ty)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        rows = tl.load(table + row[:, None] * d + column[None, :], mask=filled[:, None] & inside[None, :], other=0.0)
        left = tl.load(target + token * d + column, mask=inside, other=0.0) - tl.sum(weight[:, None] * rows, 0)
        tl.store(residual + token * d + column, left, mask=inside)
        total += tl.sum(rows * left[None, :], 1)
    tl.store(along + token * k + slot, total, mask=slot < k)


@triton.jit
def _dot_rows(  # pragma: no cover (compiled)
    rows, row, table, latent, out, n, d, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """`dot_rows` of ENTRIES adjacent entries."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = tl.load(latent + entry, mask=entry < n, other=-1).to(tl.int64)
    filled = there >= 0
    here = tl.load(row + entry, mask=filled, other=0).to(tl.int64)
    total = tl.zeros([ENTRIES], table.dtype.element_ty)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = filled[:, None] & (column < d)
        left = tl.load(rows + here[:, None] * d + column, mask=inside, other=0.0)
        total += tl.sum(left * tl.load(table + there[:, None] * d + column, mask=inside, other=0.0), 1)
    tl.store(out + entry, total, mask=entry < n)


@triton.jit
def _sum(  # pragma: no cover (compiled)
    weight, table, index, order, start, end, column, d, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """Sum of weight[e] * table[index[e]] over the entries e = order[start:end], for a block of columns."""
    total = tl.zeros([BLOCK], table.dtype.element_ty)
    for at in range(start, end, STEP):
        i = at + tl.arange(0, STEP)
        inside = i < end
        entry = tl.load(order + i, mask=inside, other=0)
        factor = tl.load(weight + entry, mask=inside, other=0.0)
        row = tl.load(index + entry, mask=inside, other=0).to(tl.int64)
        inside = (row >= 0)[:, None] & inside[:, None] & (column < d)[None, :]
        rows = tl.load(table + row[:, None] * d + column[None, :], mask=inside, other=0.0)
        total += tl.sum(factor[:, None] * rows, 0)
    return total


@triton.jit
def _sum_chunks(  # pragma: no cover (compiled)
    weight,
    table,
    index,
    order,
    key,
    first,
    partial,
    n,
    n_keys,
    d,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums of the parts of long keys in a chunk of sorted entries; a key is long if it has more than CHUNK entries.

    A chunk contains entries of at most two long keys: partial[2 * chunk] gets the sum of the key of its first entry,
    and partial[2 * chunk + 1] the sum of the key of its last entry if that begins after the first.
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = chunk * CHUNK
    stop = tl.minimum(begin + CHUNK, n)
    for last in tl.static_range(2):
        at = begin
        if last:
            at = stop - 1
        j = tl.load(key + at)
        if (j >= 0) & (j < n_keys):
            start, end = tl.load(first + j), tl.load(first + j + 1)
            is_long = end - start > CHUNK
            if last:
                is_long = is_long & (start > begin)
            if is_long:
                start, end = tl.maximum(start, begin), tl.minimum(end, stop)
                total = _sum(weight, table, index, order, start, end, column, d, BLOCK, STEP)
                tl.store(partial + (2 * chunk + last) * d + column, total, mask=column < d)


@triton.jit
def _sum_keys(  # pragma: no cover (compiled)
    weight,
    table,
    index,
    order,
    first,
    partial,
    out,
    d,
    ADD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sum of one key, of its entries or, if it is long, of the sums of `_sum_chunks`."""
    j = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(first + j), tl.load(first + j + 1)
    if end - start <= CHUNK:
        total = _sum(weight, table, index, order, start, end, column, d, BLOCK, STEP)
    else:
        total = tl.zeros([BLOCK], table.dtype.element_ty)
        for chunk in range(start // CHUNK, (end - 1) // CHUNK + 1):
            at = 2 * chunk + (start > chunk * CHUNK).to(tl.int64)
            total += tl.load(partial + at * d + column, mask=column < d, other=0.0)
    if ADD:
        total += tl.load(out + j * d + column, mask=column < d, other=0.0)
    tl.store(out + j * d + column, total, mask=column < d)


@triton.jit
def _sum_entries(  # pragma: no cover (compiled)
    weight, order, first, out, n_keys, KEYS: tl.constexpr, LANES: tl.constexpr
):
    """`sum_entries` of KEYS adjacent keys."""
    key = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    start = tl.load(first + key, mask=key < n_keys, other=0)
    end = tl.load(first + key + 1, mask=key < n_keys, other=0)
    total = tl.zeros([KEYS, LANES], weight.dtype.element_ty)
    for offset in range(0, tl.max(end - start, 0), LANES):
        at = start[:, None] + offset + tl.arange(0, LANES)[None, :]
        inside = at < end[:, None]
        total += tl.load(weight + tl.load(order + at, mask=inside, other=0), mask=inside, other=0.0)
    tl.store(out + key, tl.sum(total, 1), mask=key < n_keys)


@triton.jit
def _adam_rows(  # pragma: no cover (compiled)
    parameter,
    gradient,
    mean,
    square,
    low,
    clip,
    n,
    d,
    rate,
    square_factor,
    mean_share,
    second_beta,
    square_share,
    epsilon,
    CLIP: tl.constexpr,
    UNIT: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`adam_rows` of d adjacent numbers of a parameter with n numbers."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + column
    inside = (column < d) & (at < n)
    g = tl.load(gradient + at, mask=inside, other=0.0)
    if CLIP:
        g *= tl.load(clip)
    m = tl.load(mean + at, mask=inside, other=0.0)
    m += (g - m) * mean_share
    v = tl.load(square + at, mask=inside, other=0.0) * second_beta + g * g * square_share
    number = tl.load(parameter + at, mask=inside, other=0.0)
    number -= rate * m / (tl.sqrt(v) * square_factor + epsilon)
    if UNIT:
        norm = tl.sqrt(tl.sum(number * number, 0))
        number /= tl.where(norm == 0, 1.0, norm)
    tl.store(parameter + at, number, mask=inside)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    if LOW:
        tl.store(low + at, number.to(tl.bfloat16), mask=inside)
