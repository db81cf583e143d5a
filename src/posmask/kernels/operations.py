"""The fast ways to do what sae.py says with a batch's active codes, and what the processor must be told for them.

Active codes are entries (token, latent), those of a token together, tokens in order. Products with the dictionary go
through these entries alone, in both directions, so their cost does not grow with d_sae. On the CPU the loops that
torch has no fast operation for are compiled by numba on the user's machine; on other devices the same results come
from torch operations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.kernels import backend
from posmask.kernels.cpu import _centered, _count_sort, _dot_rows, _explain, _sum_rows, _unit_rows

__all__ = ["Grouped", "centered", "dot_rows", "explain", "unit_rows_"]


def centered(vectors: Tensor, order: Tensor | None, center: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(vectors - center) / scale - bias, its rows in the order given (None: as they stand).

    Args:
        vectors: [token d_model], any floating precision and memory order; bias has the result's precision.
        scale: one number.
    """
    vectors, center, scale = (tensor.to(bias.dtype) for tensor in (vectors, center, scale))
    if backend.compiled(vectors):
        out = torch.empty(vectors.shape, dtype=bias.dtype)
        rows = torch.empty(0, dtype=torch.int64) if order is None else order
        given = (vectors.contiguous().numpy(), rows.numpy(), center.contiguous().numpy(), scale.numpy()[()])
        _centered(*given, bias.numpy(), out.numpy())
        return out
    return ((vectors if order is None else vectors[order]) - center) / scale - bias


def unit_rows_(table: Tensor) -> None:
    """Scale each row to unit norm, in place; a row of zeros stays."""
    if backend.compiled(table):
        _unit_rows(table.numpy())
    else:
        norms = table.norm(dim=1, keepdim=True)
        table.div_(norms.masked_fill(norms == 0, 1.0))


def dot_rows(rows: Tensor, row: Tensor, table: Tensor, latent: Tensor) -> Tensor:
    """out[e] = rows[row[e]] . table[latent[e]].

    Args:
        rows, table: [any d]; row, latent: [entry].
    """
    if backend.compiled(rows):
        out = rows.new_empty(len(latent))
        _dot_rows(rows.numpy(), row.numpy(), table.numpy(), latent.numpy(), out.numpy())
        return out
    return torch.einsum("ed,ed->e", rows[row], table[latent])


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
    if backend.compiled(target):
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


class Grouped:
    """Entries put together by a key, to sum what they send to it.

    By latent it sums what tokens send to a latent's parameters, by token it is the sparse decoder's product.

    Args:
        key: [entry], 0 .. n_keys - 1.
    """

    def __init__(self, key: Tensor, n_keys: int) -> None:
        self._key = key
        self._n_keys = n_keys
        if backend.compiled(key):
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
        if backend.compiled(table):
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
