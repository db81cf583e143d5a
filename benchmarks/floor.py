"""The encoder's product alone, in float32 as fast as torch does it here: `floor.py SHAPE`; see peers/steps_terms.py."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from steps_terms import on_demand, sizes, use_threads

from posmask.kernels import runtime


def main(shape: str) -> None:
    use_threads(1)
    d_model, d_sae = sizes(shape)
    weights = torch.randn(d_sae, d_model)
    out = torch.empty(256, d_sae)
    with runtime.fast_float32():
        for vectors in on_demand(d_model):
            for rows in vectors.split(256):
                torch.mm(rows, weights.T, out=out)


if __name__ == "__main__":
    main(sys.argv[1])
