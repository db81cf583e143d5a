"""Compile the loops of one module of `posmask.kernels` for all precisions of the tests: `compile_loops.py MODULE`.

Each worker of a parallel test run would otherwise compile the same loops for most of a minute in a fresh clone.
"""

import sys

import torch

from posmask.kernels import operations
from posmask.kernels.integers import IntegerProducts
from posmask.masks.groups import live_groups
from posmask.sae.selection import GatedEncoder, GroupedInputs, LargestOfBatch, LargestOfToken, choose

MODULES = ("cpu", "cpu_selection", "cpu_integers")


def compile_operations(dtype: torch.dtype) -> None:
    """Call the loops of `cpu`."""
    rows, entry = torch.ones(3, 4, dtype=dtype), torch.arange(3)
    value, level = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    operations.centered(rows, None, rows[0], value[0], rows[0])
    operations.unit_rows_(rows)
    operations.dot_rows(rows, entry, rows, entry)
    operations.explain(rows, entry, entry, value, rows, level)
    operations.Grouped(entry, 3).sum_rows(value, rows, entry)


def compile_selection(dtype: torch.dtype) -> None:
    """Call the loops of `cpu_selection`."""
    weight, openness = torch.eye(4, dtype=dtype), torch.ones(1, 4, dtype=dtype)
    groups = live_groups(openness)
    encoder = GatedEncoder(weight, weight[0], groups, openness)
    for choice in (LargestOfToken(2), LargestOfBatch(2)):
        for precision in ("float32", "bfloat16") if dtype == torch.float32 else ("float32",):
            inputs = GroupedInputs(weight, torch.zeros(4, dtype=torch.int64), [4])
            choose(inputs, encoder, choice, precision=precision)


def compile_integers() -> None:
    """Call the loops of `cpu_integers`."""
    rows = torch.eye(4)
    IntegerProducts(rows, rows, rows[0], 1.0).of(slice(0, 2), torch.arange(3))


if __name__ == "__main__":
    if sys.argv[1] == "cpu_integers":
        compile_integers()
        sys.exit()
    for precision_of_values in (torch.float32, torch.float64):
        if sys.argv[1] == "cpu":
            compile_operations(precision_of_values)
        else:
            compile_selection(precision_of_values)
