"""The fast ways to do what sae.py says: only live latents are multiplied, only active codes are decoded.

A batch's sparse codes are `n_entries` pairs (latent, value) a token; an entry of value 0 says nothing. Products
with the dictionary go through these entries alone, in both directions, so their cost does not grow with d_sae.
On the CPU the two loops that torch has no fast operation for (`_top_k_rows`, `_dot_rows`) are compiled by numba on
the user's machine; on other devices the same results come from torch operations.
"""

import contextlib
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
    "dot_rows",
    "fast_float32",
    "float32_stays_float32",
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


@numba.njit(parallel=True, cache=True)
def _top_k_rows(product, is_bfloat16, bias, gate, gate_row, k, latent, preactivation):  # pragma: no cover (compiled)
    n_tokens, n_latents = product.shape
    gated = gate.shape[0] > 0
    n_full = n_latents // _N_STRIDES
    for token in numba.prange(n_tokens):
        open_value = np.empty(n_latents, bias.dtype)
        if is_bfloat16:
            # The upper half of a float32's bits: shifting makes the number, and both loops vectorise.
            bits = np.empty(n_latents, np.uint32)
            for j in range(n_latents):
                bits[j] = np.uint32(product[token, j]) << np.uint32(16)
            plain = bits.view(np.float32)
            for j in range(n_latents):
                open_value[j] = plain[j] + bias[j]
        else:
            for j in range(n_latents):
                open_value[j] = product[token, j] + bias[j]
        if gated:
            openness = gate[gate_row[token]]
            value = np.empty(n_latents, bias.dtype)
            for j in range(n_latents):
                value[j] = open_value[j] * openness[j]
        else:
            value = open_value
        # A floor that at least k entries reach: the k-th largest of the maxima over strided subsets.
        maxima = np.zeros(_N_STRIDES, bias.dtype)
        for i in range(n_full):
            start = i * _N_STRIDES
            for s in range(_N_STRIDES):
                maxima[s] = value[start + s] if value[start + s] > maxima[s] else maxima[s]
        for j in range(n_full * _N_STRIDES, n_latents):
            s = j - n_full * _N_STRIDES
            maxima[s] = value[j] if value[j] > maxima[s] else maxima[s]
        floor = np.partition(maxima, _N_STRIDES - k)[_N_STRIDES - k] if k <= _N_STRIDES else bias.dtype.type(0)
        candidate = np.empty(n_latents, np.int64)
        candidate_value = np.empty(n_latents, bias.dtype)
        n_candidates = 0
        for s in range(_N_STRIDES):
            if maxima[s] > 0 and maxima[s] >= floor:
                for j in range(s, n_latents, _N_STRIDES):
                    if value[j] > 0 and value[j] >= floor:
                        candidate[n_candidates] = j
                        candidate_value[n_candidates] = value[j]
                        n_candidates += 1
        n_taken = 0
        if n_candidates <= k:
            for c in range(n_candidates):
                latent[token, c] = candidate[c]
                preactivation[token, c] = open_value[candidate[c]]
            n_taken = n_candidates
        else:
            cut = np.partition(candidate_value[:n_candidates], n_candidates - k)[n_candidates - k]
            for c in range(n_candidates):
                if candidate_value[c] > cut:
                    latent[token, n_taken] = candidate[c]
                    preactivation[token, n_taken] = open_value[candidate[c]]
                    n_taken += 1
            for c in range(n_candidates):
                if n_taken < k and candidate_value[c] == cut:
                    latent[token, n_taken] = candidate[c]
                    preactivation[token, n_taken] = open_value[candidate[c]]
                    n_taken += 1
        for entry in range(n_taken, k):
            latent[token, entry] = 0
            preactivation[token, entry] = 0


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
        flat = latent.reshape(-1)
        ordered, self._order = torch.sort(flat, stable=True)
        self._token = self._order // latent.shape[1]
        self._offsets = torch.searchsorted(ordered, torch.arange(n_latents, device=flat.device))
        self._n_latents = n_latents
        self._flat = flat

    def sum_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """out[j] = sum over entries (t, e) of latent j of weight[t, e] * rows[t]; [latent d]."""
        in_order = weight.reshape(-1)[self._order]
        return F.embedding_bag(self._token, rows, self._offsets, per_sample_weights=in_order, mode="sum")

    def sum(self, weight: Tensor) -> Tensor:
        """out[j] = sum over entries of latent j of weight; [latent]."""
        return weight.new_zeros(self._n_latents).index_add_(0, self._flat, weight.reshape(-1))


@dataclass(frozen=True)
class Selected:
    """The latents that a top-k rule chose for each token.

    `preactivation` is relu((x - b_dec) W_enc + b_enc) before the gate, and 0 in entries that say nothing.
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

    Args:
        x: [token d_model] with the decoder bias already taken off; position: [token].
        encoder: [latent d_model]; bias: [latent]; openness: [position latent].
        groups: which latents are live where; nothing else is computed.
        among: [latent] bool, to choose among these only.
    """
    if len(groups) == 1:
        return _select_block(x, position, encoder, bias, groups[0], openness, k, precision, among)
    group_of_position = torch.empty(openness.shape[0], dtype=torch.int16, device=x.device)
    for number, group in enumerate(groups):
        group_of_position[group.positions] = number
    ordered, order = torch.sort(group_of_position[position.long()], stable=True)
    counts = torch.bincount(ordered.long(), minlength=len(groups)).tolist()
    x, position = x[order], position[order]
    latent = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    preactivation = x.new_zeros(len(x), k)
    start = 0
    for group, count in zip(groups, counts, strict=True):
        rows = slice(start, start + count)
        start += count
        if count:
            block = _select_block(x[rows], position[rows], encoder, bias, group, openness, k, precision, among)
            latent[order[rows]] = block.latent
            preactivation[order[rows]] = block.preactivation
    return Selected(latent, preactivation)


def _select_block(
    x: Tensor,
    position: Tensor,
    encoder: Tensor,
    bias: Tensor,
    group: LiveGroup,
    openness: Tensor,
    k: int,
    precision: Precision,
    among: Tensor | None,
) -> Selected:
    latents = group.latents
    if among is not None:
        in_group = torch.arange(len(bias), device=bias.device)[latents]
        latents = in_group[among[in_group]]
    low = precision == "bfloat16" and x.dtype == torch.float32
    weights = encoder[latents] if isinstance(latents, slice) else encoder.index_select(0, latents)
    product = x.bfloat16() @ weights.bfloat16().T if low else x @ weights.T
    gate = openness[:, latents].contiguous() if group.gated else None
    chosen = top_k_rows(product, bias[latents], gate, position, k)
    latent, preactivation = chosen.latent, chosen.preactivation
    empty = preactivation <= 0
    latent = latent + latents.start if isinstance(latents, slice) else _look_up(latents, latent)
    if product.dtype != x.dtype:
        preactivation = (dot_rows(x, encoder, latent) + bias[latent]).clamp(min=0).masked_fill(empty, 0)
    return Selected(latent.masked_fill(empty, 0), preactivation)


def _look_up(latents: Tensor, index: Tensor) -> Tensor:
    return latents[index] if len(latents) else index


def top_k_rows(product: Tensor, bias: Tensor, gate: Tensor | None, gate_row: Tensor, k: int) -> Selected:
    """The k entries of each row with the largest gate * relu(product + bias), in no particular order.

    Rows with fewer than k positive entries are filled up with entries of preactivation 0.

    Args:
        product: [token latent], float32, float64 or bfloat16; bias: [latent].
        gate: [position latent] or None for 1; gate_row: [token], the row of `gate` for each token.
    """
    if product.device.type == "cpu":
        latent = torch.empty(len(product), k, dtype=torch.int64)
        preactivation = bias.new_empty(len(product), k)
        is_bfloat16 = product.dtype == torch.bfloat16
        _top_k_rows(
            (product.view(torch.uint16) if is_bfloat16 else product).numpy(),
            is_bfloat16,
            bias.numpy(),
            (bias.new_empty(0, 0) if gate is None else gate).numpy(),
            gate_row.numpy(),
            k,
            latent.numpy(),
            preactivation.numpy(),
        )
        return Selected(latent, preactivation)
    preactivation = (product.to(bias.dtype) + bias).clamp(min=0)
    value = preactivation if gate is None else preactivation * gate[gate_row.long()]
    top = value.topk(min(k, value.shape[1]), dim=1)
    fill = k - top.indices.shape[1]
    chosen = preactivation.gather(1, top.indices).masked_fill(top.values <= 0, 0)
    return Selected(F.pad(top.indices, (0, fill)), F.pad(chosen, (0, fill)))
