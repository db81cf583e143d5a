"""Operations on the active codes of a batch: reconstruction, gradients and sums.

Active codes are entries (token, latent), grouped by token in the order of tokens. Products with the dictionary in both
directions use these entries alone, so their cost does not grow with d_sae. Each function runs the compiled loops of
`cpu`, the Triton kernels of `triton_rows` or torch operations, as `backend.implementation` says.

Triton kernels also take empty entries, whose latent is -1: they are part of no sum, and their products are 0.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.kernels import backend

__all__ = [
    "Grouped",
    "add_at_",
    "centered",
    "count_at_",
    "counts",
    "dense_part",
    "dot_rows",
    "explain",
    "unit_rows_",
    "weighted_sums",
]

Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Entries of a sparse table on the host: row, column and value, [entry] each. Entries of a row are adjacent."""


def centered(vectors: Tensor, order: Tensor | None, center: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(vectors - center) / scale - bias, in the precision of `bias`.

    Args:
        vectors: [token d_model], of any floating precision and memory order.
        order: [token] indices of the rows of the result in `vectors`; None keeps their order.
        center: [d_model].
        scale: a scalar tensor.
        bias: [d_model].
    """
    vectors, center, scale = (tensor.to(bias.dtype) for tensor in (vectors, center, scale))
    if backend.implementation(vectors) == "numba":
        out = torch.empty(vectors.shape, dtype=bias.dtype)
        rows = torch.empty(0, dtype=torch.int64) if order is None else order
        arrays = (vectors.contiguous().numpy(), rows.numpy(), center.contiguous().numpy(), scale.numpy()[()])
        backend.loops().centered(*arrays, bias.numpy(), out.numpy())
        return out
    return ((vectors if order is None else vectors[order]) - center) / scale - bias


def unit_rows_(table: Tensor) -> None:
    """Scale each row to unit norm, in place; rows of zeros stay zero."""
    if backend.implementation(table) == "numba":
        backend.loops().normalize_rows(table.numpy())
    else:
        norms = table.norm(dim=1, keepdim=True)
        table.div_(norms.masked_fill(norms == 0, 1.0))


def dot_rows(rows: Tensor, row: Tensor, table: Tensor, latent: Tensor) -> Tensor:
    """out[e] = rows[row[e]] . table[latent[e]] for each entry e.

    Args:
        rows: [row d].
        row: [entry].
        table: [latent d].
        latent: [entry].
    """
    match backend.implementation(rows):
        case "numba":
            out = rows.new_empty(len(latent))
            backend.loops().dot_rows(rows.numpy(), row.numpy(), table.numpy(), latent.numpy(), out.numpy())
            return out
        case "triton":
            return _triton().dot_rows(rows, row, table, latent)
    return torch.einsum("ed,ed->e", rows[row], table[latent])


def counts(key: Tensor, n_keys: int) -> Tensor:
    """The number of entries of each key; [key]. Unlike `torch.bincount` it does not make the host wait for a GPU.

    Args:
        key: [entry], each in 0 .. n_keys - 1.
        n_keys: the number of keys.
    """
    if key.device.type == "cpu":
        return torch.bincount(key, minlength=n_keys)
    return key.new_zeros(n_keys).index_add_(0, key, torch.ones_like(key))


def add_at_(total: Tensor, index: Tensor, value: Tensor) -> None:
    """total[index[e]] += value[e] for each entry e, in place, in an order that is the same in every run.

    Args:
        total: [n] or [n column].
        index: [entry].
        value: [entry] or [entry column].
    """
    if total.device.type == "cpu":
        total.index_add_(0, index, value)
    else:  # index_add_ of CUDA adds in any order.
        total.index_put_((index,), value, accumulate=True)


def count_at_(total: Tensor, index: Tensor) -> None:
    """total[index[e]] += 1 for each entry e, in place; exact in any order if the counts are below 2^24.

    Args:
        total: [n], of a floating type.
        index: [entry].
    """
    total.index_add_(0, index, torch.ones(len(index), dtype=total.dtype, device=total.device))


def weighted_sums(blocks: Iterable[Block], weight: Tensor, n_columns: int) -> Tensor:
    """out[w, c] = sum over rows r of weight[r, w] * table[r, c], in float64 and on the device of `weight`; [w column].

    Args:
        blocks: the entries of the table.
        weight: [row w], mostly zeros, in float64.
        n_columns: the number of columns.
    """
    if backend.implementation(weight) == "numba":
        sums = np.zeros((weight.shape[1], n_columns))
        sparse = scipy.sparse.csr_matrix(weight.numpy())
        for row, column, value in blocks:
            backend.loops().add_weighted_entries(row, column, value, sparse.indptr, sparse.indices, sparse.data, sums)
        return torch.from_numpy(sums)
    total = weight.new_zeros(n_columns, weight.shape[1])
    for block in blocks:
        row, column, value = _on_device(block, weight.device)
        Grouped(column, n_columns).sum_rows(value.double(), weight, row, out=total, add=True)
    return total.T.contiguous()


def dense_part(blocks: Iterable[Block], row_slot: Tensor, column_slot: Tensor) -> Tensor:
    """out[row_slot[r], column_slot[c]] = table[r, c] for the entries whose slots are not negative, in float32.

    The result is on the device of the slots.

    Args:
        blocks: the entries of the table.
        row_slot: [row], each slot at most once.
        column_slot: [column], each slot at most once.
    """
    shape = int(row_slot.max()) + 1, int(column_slot.max()) + 1
    out = torch.zeros(shape, device=row_slot.device)
    for block in blocks:
        if backend.implementation(out) == "numba":
            backend.loops().place_entries(*block, row_slot.numpy(), column_slot.numpy(), out.numpy())
            continue
        row, column, value = _on_device(block, out.device)
        y, x = row_slot[row], column_slot[column]
        inside = (y >= 0) & (x >= 0)
        out[y[inside], x[inside]] = value[inside]
    return out


def _on_device(block: Block, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    row, column, value = (torch.from_numpy(np.array(array)).to(device) for array in block)
    return row.long(), column.long(), value


def explain(
    target: Tensor,
    token: Tensor,
    latent: Tensor,
    value: Tensor,
    table: Tensor,
    level: Tensor | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Subtract the reconstruction by the entries from a target, and project the rest on each entry's latent.

    Without `level`: left[0, t] = target[t] - sum of value * table[latent] over the entries of token t, and
    along[e] = left[0, token[e]] . table[latent[e]].

    With `level`, the remainder of part m uses only entries of latents of level <= m. left[m] is the sum of the
    remainders of part m and all later parts, so the last one is the remainder of all entries, and
    along[e] = left[level[latent[e]], token[e]] . table[latent[e]].

    Args:
        target: [token d].
        token: [entry], in ascending order.
        latent: [entry].
        value: [entry].
        table: [latent d].
        level: [latent], the number of the first part that has the latent.
        slots: the number of entries of each token if all tokens have the same number; Triton kernels use it.

    Returns:
        left [part token d], along [entry].
    """
    n_parts = 1 if level is None else int(level.max()) + 1
    chosen = backend.implementation(target)
    if chosen == "numba":
        left, along = target.new_empty(n_parts, *target.shape), target.new_empty(len(latent))
        first = _first_of_each(token, len(target))
        levels = latent[:0] if level is None else level
        tensors = (target, first, latent, value, table, levels, left, along)
        backend.loops().explain(*(tensor.numpy() for tensor in tensors))
        return left, along
    if chosen == "triton" and level is None and slots is not None and slots <= _triton().MOST_SLOTS:
        left, along = _triton().explain_rows(target, latent.view(-1, slots), value.view(-1, slots), table)
        return left[None], along.flatten()
    row = token if level is None else level[latent] * len(target) + token
    by_level = Grouped(row, n_parts * len(target)).sum_rows(-value, table, latent).view(n_parts, *target.shape)
    by_level[0] += target
    left = by_level.cumsum(0).flip(0).cumsum(0).flip(0)
    return left, dot_rows(left.flatten(0, 1), row, table, latent)


def _triton() -> Any:
    """The module of Triton kernels; triton is an optional package."""
    from posmask.kernels import triton_rows

    return triton_rows


def _first_of_each(key: Tensor, n_keys: int) -> Tensor:
    """The index of the first entry of each key in an ascending list, and its length; [key + 1]."""
    return torch.searchsorted(key, torch.arange(n_keys + 1, device=key.device))


class Grouped:
    """Entries grouped by a key, for sums per key.

    Grouped by latent it sums gradients of a latent's parameters; grouped by token it is the sparse decoder product.

    Attributes:
        order: [entry] indices of the entries, sorted stably by key.

    Args:
        key: [entry], each in 0 .. n_keys - 1, or -1 for empty entries.
        n_keys: the number of keys.
    """

    def __init__(self, key: Tensor, n_keys: int) -> None:
        self._key = key
        self._n_keys = n_keys
        self._implementation = backend.implementation(key)
        if self._implementation == "numba":
            order, first = backend.loops().count_sort(key.numpy(), n_keys)
            self.order, self._first = torch.from_numpy(order), torch.from_numpy(first)
        else:
            self._ordered, self.order = torch.sort(key, stable=True)
            self._first = _first_of_each(self._ordered, n_keys)

    def sum_rows(
        self, weight: Tensor, table: Tensor, index: Tensor, out: Tensor | None = None, *, add: bool = False
    ) -> Tensor:
        """out[j] = sum of weight[e] * table[index[e]] over the entries e of key j; [key d].

        Args:
            weight: [entry].
            table: [row d].
            index: [entry], rows of the table.
            out: [key d], a tensor for the result, which saves its allocation.
            add: add to the content of `out`.
        """
        if out is None:
            out = table.new_empty(self._n_keys, table.shape[1])
        if self._implementation == "triton":
            _triton().sum_rows(weight, table, index, self.order, self._ordered, self._first, out, add)
            return out
        if self._implementation == "numba":
            arrays = (weight.numpy(), table.numpy(), index.numpy(), self.order.numpy(), self._first.numpy())
            backend.loops().sum_rows(*arrays, out.numpy(), not add)
            return out
        total = F.embedding_bag(
            index[self.order], table, self._first[:-1], per_sample_weights=weight[self.order], mode="sum"
        )
        return out.add_(total) if add else out.copy_(total)

    def sum(self, weight: Tensor) -> Tensor:
        """out[j] = sum of weight[e] over the entries e of key j; [key].

        Args:
            weight: [entry].
        """
        if self._implementation == "triton":
            return _triton().sum_entries(weight, self.order, self._first)
        total = weight.new_zeros(self._n_keys)
        add_at_(total, self._key, weight)
        return total
