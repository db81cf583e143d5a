"""sparsify's training, step by step: `steps_sparsify.py topk SHAPE THREADS [tuned]`, in its environment (sparsify.txt).

Its own Trainer with Adam, hooked to a model of one module that puts out the given vectors and costs nothing. `tuned`
adds what a user can: bfloat16 autocast around the model, which the hooks then run under.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = sys.argv[3]
os.environ["TQDM_DISABLE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from steps_terms import BATCH_TOKENS, N_POSITIONS, K, on_demand, sizes, use_threads
from torch import Tensor


class Source(torch.nn.Module):
    """What Trainer takes for a model: whatever the tokens, its one layer puts out the next batch of vectors."""

    def __init__(
        self,
        d_in: int,
        batches: Iterator[Tensor],
        *,
        n_tokens: int = BATCH_TOKENS,
        device: torch.device | None = None,
        tuned: bool = False,
    ) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = device or torch.device("cpu")
        self.dtype = torch.float32
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        self.n_positions = min(N_POSITIONS, n_tokens)
        self.n_contexts = n_tokens // self.n_positions
        self._d_in, self._tuned, self._batches = d_in, tuned, batches

    @property
    def base_model(self) -> "Source":
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.numel() != self.n_contexts * self.n_positions:  # Trainer only asks how wide the layer is.
            return self.layer(torch.zeros(*input_ids.shape, self._d_in, device=self.device))
        vectors = next(self._batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._tuned):
            return self.layer(vectors.view(self.n_contexts, self.n_positions, -1))


class Contexts(torch.utils.data.Dataset):
    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return 10_000 * self._source.n_contexts

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(self._source.n_positions, dtype=torch.int64)}


def fit(source: Source, d_sae: int, k: int) -> None:
    """Train on the batches of the source, one context after the other."""
    config = TrainConfig(
        SaeConfig(num_latents=d_sae, k=k),
        batch_size=source.n_contexts,
        hookpoints=["layer"],
        optimizer="adam",
        lr=1e-3,
        auxk_alpha=1 / 32,
        log_to_wandb=False,
        save_every=10**9,
    )
    Trainer(config, Contexts(source), source).fit()


def main(work: str, shape: str, n_threads: int, tuned: bool) -> None:
    assert work == "topk"
    warnings.simplefilter("ignore")
    use_threads(n_threads)
    d_in, d_sae = sizes(shape)
    sys.stdout = sys.stderr  # It prints; the answers go to the true standard output.
    fit(Source(d_in, on_demand(d_in), tuned=tuned), d_sae, K)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), "tuned" in sys.argv[4:])
