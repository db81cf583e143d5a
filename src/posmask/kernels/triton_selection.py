"""Selection of the active latents by Triton kernels, for CUDA GPUs.

The definition of what these kernels compute is `_take` in `posmask.sae.selection`. A product is a row of x . encoder
per token, in bfloat16, float32 or float64; biases, openness and results are all float32 or all float64. Each program of
a kernel processes one row. NaN and numbers that are not positive are never chosen. Of equal numbers the one of the
lower column is chosen, so equal inputs give equal results.
"""

# The language of kernels has types of its own.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["above_floor", "largest_of_rows"]

_LANES = 2048  # numbers of a row that a program reads in one pass
_LEAST_LANES = 128  # Fewer would need a compilation for each small number of dead latents.
_LEAST_ROOM = 64  # candidates per row
_LAUNCH = {"enable_fp_fusion": True}  # Releases of Triton have different defaults.


def largest_of_rows(
    product: Tensor,
    bias: Tensor,
    latents: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    latent: Tensor,
    preactivation: Tensor,
) -> None:
    """Write the k largest positive numbers of each row of openness * (product + bias), in the order of columns.

    Args:
        product: x . encoder of the live latents, [row live], with adjacent columns.
        bias: [live].
        latents: indices of the live latents, [live].
        gate: (openness [mask_row latent], mask row of each row); None if ungated.
        latent: the chosen latents, [row k]; slots that stay empty are not written.
        preactivation: product + bias of the chosen latents, [row k].
    """
    n_rows, n = product.shape
    k = latent.shape[1]
    if not n_rows or not n or not k:
        return
    table, mask_row = (bias, latents) if gate is None else (gate[0].contiguous(), gate[1].contiguous())
    room = max(_LEAST_ROOM, triton.next_power_of_2(4 * k))
    column = torch.empty(n_rows, room, dtype=torch.int32, device=bias.device)
    value, n_candidates = bias.new_empty(n_rows, room), torch.empty(n_rows, dtype=torch.int32, device=bias.device)
    lanes = min(_LANES, max(_LEAST_LANES, triton.next_power_of_2(n)))
    with torch.cuda.device_of(product):
        choose_rows[(n_rows,)](
            *(product, bias, latents, table, mask_row, column, value, n_candidates),
            *(n, product.stride(0), table.shape[-1], k),
            GATED=gate is not None,
            LANES=lanes,
            ROOM=room,
            num_warps=8 if lanes >= 2048 else 4,
            **_LAUNCH,
        )
        cut_rows[(n_rows,)](
            *(product, bias, latents, column, value, n_candidates, latent, preactivation),
            *(product.stride(0), latent.stride(0), k),
            ROOM=room,
            num_warps=1 if room <= 256 else 4,
            **_LAUNCH,
        )


def above_floor(
    product: Tensor, bias: Tensor, latents: Tensor, gate: tuple[Tensor, Tensor] | None, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All positive numbers of openness * (product + bias) above `floor`; arguments as for `largest_of_rows`.

    Returns:
        row, latent, preactivation and value of each, [entry], sorted by row and column.
    """
    n_rows, n = product.shape
    table, mask_row = (bias, latents) if gate is None else (gate[0].contiguous(), gate[1].contiguous())
    count = torch.zeros(n_rows + 1, dtype=torch.int64, device=bias.device)
    threshold = torch.full((1,), floor, dtype=bias.dtype, device=bias.device)
    lanes = min(_LANES, max(_LEAST_LANES, triton.next_power_of_2(n)))

    def run(first: Tensor, latent: Tensor, preactivation: Tensor, value: Tensor, write: bool) -> None:
        if n_rows and n:
            with torch.cuda.device_of(product):
                above_rows[(n_rows,)](
                    *(product, bias, latents, table, mask_row, threshold, first, latent, preactivation, value),
                    *(n, product.stride(0), table.shape[-1]),
                    GATED=gate is not None,
                    WRITE=write,
                    LANES=lanes,
                    **_LAUNCH,
                )

    run(count, count, bias, bias, False)
    first = count.cumsum(0)
    n_entries = int(first[-1])
    latent = torch.empty(n_entries, dtype=torch.int64, device=bias.device)
    preactivation, value = bias.new_empty(n_entries), bias.new_empty(n_entries)
    run(first, latent, preactivation, value, True)
    rows = torch.arange(n_rows, device=bias.device)
    row = rows.repeat_interleave(count[1:], output_size=n_entries)
    return row, latent, preactivation, value


@triton.jit
def _bits(number):  # pragma: no cover (compiled)
    """The bits of numbers that are not negative: integers in the same order."""
    if number.dtype == tl.float64:
        return number.to(tl.int64, bitcast=True)
    else:
        return number.to(tl.int32, bitcast=True)


@triton.jit
def _preactivation(product, bias, column, inside):  # pragma: no cover (compiled)
    """product + bias of some columns of a row."""
    offset = tl.load(bias + column, mask=inside, other=0.0)
    return tl.load(product + column, mask=inside, other=0.0).to(offset.dtype) + offset


@triton.jit
def _positive(
    product, bias, latents, openness, start, n, GATED: tl.constexpr, LANES: tl.constexpr
):  # pragma: no cover (compiled)
    """openness * (product + bias) of LANES columns of a row from `start` on; 0 for what cannot be chosen."""
    column = start + tl.arange(0, LANES)
    inside = column < n
    value = _preactivation(product, bias, column, inside)
    if GATED:
        value *= tl.load(openness + tl.load(latents + column, mask=inside, other=0), mask=inside, other=0.0)
    return tl.where(value > 0, value, 0.0)


@triton.jit
def _cut(bits, k):  # pragma: no cover (compiled)
    """Bounds of the k-th largest of some bits that are not negative: (low, high).

    At least k bits are low or larger, and fewer than k are high or larger; there are exactly k of the former, or low is
    the k-th largest and high is low + 1. If fewer than k are above 0, low is 0 and high is 1.
    """
    low = tl.min(bits, 0) * 0
    high = tl.max(bits, 0) + 1
    n_reached = tl.full((), 0, tl.int32)
    while (high - low > 1) & (n_reached != k):
        middle = low + (high - low) // 2
        n_reached = tl.sum((bits >= middle).to(tl.int32), 0)
        low = tl.where(n_reached >= k, middle, low)
        high = tl.where(n_reached >= k, high, middle)
    return low, high


@triton.jit
def _cut_of_row(  # pragma: no cover (compiled)
    product, bias, latents, openness, low, high, n, k, GATED: tl.constexpr, LANES: tl.constexpr
):
    """The bounds of `_cut` for a whole row, from bounds that at least k and fewer than k numbers reach."""
    n_reached = tl.full((), 0, tl.int32)
    while (high - low > 1) & (n_reached != k):
        middle = low + (high - low) // 2
        n_reached = tl.full((), 0, tl.int32)
        for start in range(0, n, LANES):
            number = _positive(product, bias, latents, openness, start, n, GATED, LANES)
            n_reached += tl.sum((_bits(number) >= middle).to(tl.int32), 0)
        low = tl.where(n_reached >= k, middle, low)
        high = tl.where(n_reached >= k, high, middle)
    return low, high


@triton.jit
def _chosen(bits, low, high, n_ties):  # pragma: no cover (compiled)
    """Which bits are above the bounds of `_cut`, or are among the first `n_ties` between them; number of the latter."""
    tie = (bits >= low) & (bits < high) & (bits > 0)
    rank = tl.cumsum(tie.to(tl.int32), 0)
    return (bits >= high) | (tie & (rank <= n_ties)), tl.minimum(tl.sum(tie.to(tl.int32), 0), n_ties)


@triton.jit
def choose_rows(  # pragma: no cover (compiled)
    product,
    bias,
    latents,
    openness,
    mask_row,
    column,
    value,
    n_candidates,
    n,
    stride,
    d_sae,
    k,
    GATED: tl.constexpr,
    LANES: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Write at most ROOM candidates per row, which include its k largest positive numbers; 2 k is at most ROOM.

    Column c of a row belongs to lane c % LANES. The k-th largest of the lanes' maxima is a floor that at least k
    numbers of the row reach; a second pass, for which the row is in the L2 cache, writes all numbers that reach it. If
    these are more than ROOM, bisection over the row finds the exact cut, and fewer than 2 k numbers are written.
    """
    row = tl.program_id(0).to(tl.int64)
    product += row * stride
    column += row * ROOM
    value += row * ROOM
    if GATED:
        openness += tl.load(mask_row + row).to(tl.int64) * d_sae
    lane = tl.zeros([LANES], bias.dtype.element_ty)
    for start in range(0, n, LANES):
        lane = tl.maximum(lane, _positive(product, bias, latents, openness, start, n, GATED, LANES))
    floor, _ = _cut(_bits(lane), k)
    n_found = tl.full((), 0, tl.int32)
    for start in range(0, n, LANES):
        number = _positive(product, bias, latents, openness, start, n, GATED, LANES)
        chosen = (_bits(number) >= floor) & (number > 0)
        n_chosen = tl.sum(chosen.to(tl.int32), 0)
        if n_chosen > 0:
            slot = n_found + tl.cumsum(chosen.to(tl.int32), 0) - 1
            chosen = chosen & (slot < ROOM)
            tl.store(column + slot, start + tl.arange(0, LANES), mask=chosen)
            tl.store(value + slot, number, mask=chosen)
            n_found += n_chosen
    if n_found > ROOM:
        high = tl.max(_bits(lane), 0) + 1
        low, high = _cut_of_row(product, bias, latents, openness, floor, high, n, k, GATED, LANES)
        tl.debug_barrier()  # What is written above must not arrive after what is written below.
        n_ties = k  # With fewer than k numbers above them these fit in ROOM; cut_rows drops those too many.
        n_found = tl.full((), 0, tl.int32)
        for start in range(0, n, LANES):
            number = _positive(product, bias, latents, openness, start, n, GATED, LANES)
            chosen, n_new_ties = _chosen(_bits(number), low, high, n_ties)
            slot = n_found + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(column + slot, start + tl.arange(0, LANES), mask=chosen)
            tl.store(value + slot, number, mask=chosen)
            n_found += tl.sum(chosen.to(tl.int32), 0)
            n_ties -= n_new_ties
    tl.store(n_candidates + row, n_found)


@triton.jit
def cut_rows(  # pragma: no cover (compiled)
    product,
    bias,
    latents,
    column,
    value,
    n_candidates,
    latent,
    preactivation,
    stride,
    stride_out,
    k,
    ROOM: tl.constexpr,
):
    """Write the k largest candidates of each row to its slots, packed in front, in the order of columns."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROOM)
    inside = i < tl.load(n_candidates + row)
    bits = _bits(tl.load(value + row * ROOM + i, mask=inside, other=0.0))
    low, high = _cut(bits, k)
    chosen, _ = _chosen(bits, low, high, k - tl.sum((bits >= high).to(tl.int32), 0))
    slot = row * stride_out + tl.cumsum(chosen.to(tl.int32), 0) - 1
    c = tl.load(column + row * ROOM + i, mask=chosen, other=0)
    tl.store(latent + slot, tl.load(latents + c, mask=chosen, other=0), mask=chosen)
    tl.store(preactivation + slot, _preactivation(product + row * stride, bias, c, chosen), mask=chosen)


@triton.jit
def above_rows(  # pragma: no cover (compiled)
    product,
    bias,
    latents,
    openness,
    mask_row,
    floor,
    first,
    latent,
    preactivation,
    value,
    n,
    stride,
    d_sae,
    GATED: tl.constexpr,
    WRITE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count the numbers of each row above the floor in first[row + 1], or write them from entry first[row] on."""
    row = tl.program_id(0).to(tl.int64)
    product += row * stride
    if GATED:
        openness += tl.load(mask_row + row).to(tl.int64) * d_sae
    threshold = tl.load(floor)
    n_found = tl.full((), 0, tl.int64)
    if WRITE:
        n_found = tl.load(first + row)
    for start in range(0, n, LANES):
        number = _positive(product, bias, latents, openness, start, n, GATED, LANES)
        chosen = (number > threshold) & (number > 0)
        n_chosen = tl.sum(chosen.to(tl.int32), 0)
        if WRITE:  # noqa: SIM102 (known when compiled)
            if n_chosen > 0:
                entry = n_found + tl.cumsum(chosen.to(tl.int32), 0) - 1
                c = start + tl.arange(0, LANES)
                tl.store(latent + entry, tl.load(latents + c, mask=chosen, other=0), mask=chosen)
                tl.store(preactivation + entry, _preactivation(product, bias, c, chosen), mask=chosen)
                tl.store(value + entry, number, mask=chosen)
        n_found += n_chosen
    if not WRITE:
        tl.store(first + row + 1, n_found)
