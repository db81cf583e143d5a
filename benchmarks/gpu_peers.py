"""Training steps of other packages on a CUDA GPU, on the vectors of gpu.py.

eai-sparsify with Adam, and SAELens in float32 and with bfloat16 autocast, as in the comparison on the CPU (peers/). A
package that is not installed is left out.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_terms import SHAPES, TINY, Bench, Marks, repeated
from torch import Tensor

sys.path.insert(0, str(Path(__file__).with_name("peers")))

PEERS = {"sparsify": "sparsify", "SAELens": "sae_lens", "SAELens-bf16": "sae_lens"}
_N_STEPS = 11  # of which the last 8 are timed


def peers(bench: Bench) -> None:
    """Time of a step of each peer at four shapes."""
    shapes = TINY if bench.rehearsal else [SHAPES[number] for number in (2, 1, 0, 5)]
    for name, package in PEERS.items():
        if importlib.util.find_spec(package) is None:
            bench.leave_out(f"{name}: the package {package} is not installed")
            continue
        for shape in shapes:
            if bench.is_late(0.8):
                bench.leave_out(f"{name} from {shape} on: no time")
                break
            try:
                row = _row(bench, name, shape)
            except Exception as error:
                bench.leave_out(f"{name} at {shape}: {type(error).__name__}: {error}")
                continue
            finally:
                torch.set_float32_matmul_precision("highest")  # sparsify allows TF32.
                if not bench.rehearsal:
                    torch.cuda.empty_cache()
            bench.results["peers"].append({"peer": name, "shape": shape, **row})
            bench.save()


class _Enough(Exception):
    """Raised by the batches to end a training."""


def _row(bench: Bench, name: str, shape: tuple[int, int, int, int]) -> dict[str, float]:
    n_tokens, d_model, *_ = shape
    marks = Marks(bench)
    n_steps = 2 if bench.rehearsal else _N_STEPS

    def batches() -> Iterator[Tensor]:
        for batch in repeated(bench, n_tokens, d_model, n_steps):
            marks()
            yield batch.vectors
        marks()
        raise _Enough

    fit = _fit_of(name, shape, bench.device)
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(batches())
    except _Enough:
        pass
    finally:
        sys.stdout = output
    return marks.row(1 if bench.rehearsal else 8)


def _fit_of(name: str, shape: tuple[int, int, int, int], device: torch.device) -> Callable[[Iterator[Tensor]], None]:
    """The training of a peer, which takes batches until they end."""
    n_tokens, d_model, d_sae, k = shape
    if name == "sparsify":
        import steps_sparsify

        return lambda batches: steps_sparsify.fit(
            steps_sparsify.Source(d_model, batches, n_tokens=n_tokens, device=device), d_sae, k
        )
    import steps_sae_lens

    tuned = name == "SAELens-bf16"
    return lambda batches: steps_sae_lens.fit(
        steps_sae_lens.untrained("topk", d_model, d_sae, k), batches, n_tokens, tuned=tuned, device=device
    )
