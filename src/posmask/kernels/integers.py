"""Products of float32 rows from 16-bit integers, with a bound of their error; on the CPU.

`cpu_integers` has the compiled loops and the bound's proof.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IntegerProducts"]


@dataclass(frozen=True)
class _Rounded:
    """Rows as integers times a step: `code` [row pair] holds pairs of 16-bit integers in 32 bits, the rest is [row]."""

    code: Tensor
    step: Tensor
    norm: Tensor
    error: Tensor


class IntegerProducts:
    """Products of vectors with the rows of a table.

    Attributes:
        error: a bound of the difference of a token's openness * (product + bias) from that in float32, [token].
        finite: whether all bounds are finite; if not, products mean nothing.

    Args:
        x: float32 vectors, [token d].
        weight: float32 table, [row d].
        bias: added to the products, [row].
        most_openness: the largest factor of a sum.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, most_openness: float) -> None:
        from posmask.kernels import cpu_integers

        self._loops = cpu_integers
        self._x, self._weight = self._rounded(x, cpu_integers.ROWS - 1), self._rounded(weight, 0)
        self._buffer = x.new_empty(0)
        size, x_size = (self._weight.norm + self._weight.error).max(), self._x.norm + self._x.error
        error = (self._x.error * size + self._x.norm * self._weight.error.max()) * _BOUND_ROUNDING
        error += _FLOAT_ROUNDING * (x_size * size + bias.abs().max())
        self.error = error[: len(x)] * max(most_openness, 1.0)
        self.finite = bool(self.error.isfinite().all())

    def of(self, tokens: slice, rows: Tensor) -> Tensor:
        """The products of some tokens with some rows of the table, [token row], with more rows and columns at the end.

        They are valid until the next call.
        """
        loops = self._loops
        n_rows = -(-(tokens.stop - tokens.start) // loops.ROWS) * loops.ROWS
        n_columns = -(-len(rows) // loops.COLUMNS) * loops.COLUMNS
        if self._buffer.numel() < n_rows * n_columns:
            self._buffer = self._buffer.new_empty(n_rows * n_columns)
        out = self._buffer[: n_rows * n_columns].view(n_rows, n_columns)
        x, weight = self._x, self._weight
        arrays = (weight.code.numpy(), weight.step.numpy(), rows.numpy(), out.numpy())
        loops.product(x.code.numpy(), x.step.numpy(), tokens.start, tokens.stop, *arrays)
        return out

    def _rounded(self, table: Tensor, n_more: int) -> _Rounded:
        """The table as integers, with some more rows of zeros."""
        n_rows, d = table.shape
        code = torch.zeros(n_rows + n_more, d + d % 2, dtype=torch.int16)
        step, norm, error = torch.zeros(3, n_rows + n_more)
        arrays = (code, step, norm, error)
        self._loops.quantize(table.contiguous().numpy(), *(array.numpy() for array in arrays))
        return _Rounded(code.view(torch.int32), step, norm, error)


_BOUND_ROUNDING = 1.001  # that of the bound itself
_FLOAT_ROUNDING = 2e-6  # of a sum in float32 and of the steps, relative to the product of the norms and to the bias
