"""posmask writing activations to disk, or the bare forward: `harvest_posmask.py WORK MODEL THREADS PRECISION`.

WORK is `harvest`, or `forward` for the same model over the same contexts, stopped at the layer and nothing kept.
Answers each request as peers/steps_terms.py says.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = sys.argv[3]

import torch
from steps_terms import HARVEST_LAYER, N_POSITIONS, harvest_ids, serve, use_threads

from posmask.data.harvest import harvest
from posmask.data.models import load_model
from posmask.data.tokens import Tokens
from posmask.kernels import runtime


def main(work: str, model_name: str, n_threads: int, precision: str) -> None:
    use_threads(n_threads)
    runtime.keep_freed_memory()
    model = load_model(model_name, HARVEST_LAYER, precision)
    ids = harvest_ids()
    position = torch.arange(N_POSITIONS).expand_as(ids).contiguous()
    text = torch.arange(len(ids))[:, None].expand_as(ids).contiguous()
    tokens = Tokens(ids, position, text, torch.ones_like(ids, dtype=torch.bool), position, position, position, position)
    number = 0
    with tempfile.TemporaryDirectory() as folder:

        def run() -> dict:
            nonlocal number
            number += 1
            if work == "forward":
                model.vectors(ids)
                return {"tokens": ids.numel()}
            to = Path(folder) / str(number)
            harvest(tokens, model, to, {"number": number}, "benchmark")
            return {
                "tokens": ids.numel(),
                "bytes": sum(path.stat().st_size for path in to.rglob("*") if path.is_file()),
            }

        with contextlib.redirect_stderr(io.StringIO()):  # progress
            serve(run)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
