"""sparsify's training, step by step: `steps_sparsify.py topk SHAPE THREADS [tuned]`, in its environment (sparsify.txt).

Its own Trainer with Adam, hooked to a model of one module that puts out the given vectors and costs nothing. `tuned`
adds what a user can: bfloat16 autocast around the model, which the hooks then run under.
"""

import os
import sys
import warnings
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = sys.argv[3]
os.environ["TQDM_DISABLE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from steps_terms import BATCH_TOKENS, N_POSITIONS, K, on_demand, sizes, use_threads

N_CONTEXTS = BATCH_TOKENS // N_POSITIONS


class Source(torch.nn.Module):
    """What Trainer takes for a model: whatever the tokens, its one layer puts out the next batch of vectors."""

    def __init__(self, d_in: int, tuned: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        self._d_in, self._tuned = d_in, tuned
        self._vectors = on_demand(d_in)

    @property
    def base_model(self) -> "Source":
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.numel() != BATCH_TOKENS:  # Trainer only asks how wide the layer is.
            return self.layer(torch.zeros(*input_ids.shape, self._d_in))
        vectors = next(self._vectors)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._tuned):
            return self.layer(vectors.view(N_CONTEXTS, N_POSITIONS, -1))


class Contexts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10_000 * N_CONTEXTS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(N_POSITIONS, dtype=torch.int64)}


def main(work: str, shape: str, n_threads: int, tuned: bool) -> None:
    assert work == "topk"
    warnings.simplefilter("ignore")
    use_threads(n_threads)
    d_in, d_sae = sizes(shape)
    config = TrainConfig(
        SaeConfig(num_latents=d_sae, k=K),
        batch_size=N_CONTEXTS,
        hookpoints=["layer"],
        optimizer="adam",
        lr=1e-3,
        auxk_alpha=1 / 32,
        log_to_wandb=False,
        save_every=10**9,
    )
    sys.stdout = sys.stderr  # It prints; the answers go to the true standard output.
    Trainer(config, Contexts(), Source(d_in, tuned)).fit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), "tuned" in sys.argv[4:])
