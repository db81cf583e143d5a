"""SAELens writing activations to disk: `harvest_sae_lens.py MODEL THREADS PRECISION`, in its environment.

The environment: sae_lens.txt. For each request its CacheActivationsRunner runs over the same 32 contexts and writes an
arrow dataset. MODEL is a folder that transformers loads.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = sys.argv[2]
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from steps_terms import HARVEST_LAYER, N_POSITIONS, harvest_ids, serve, use_threads

D_IN = 576


def main(model: str, n_threads: int, precision: str) -> None:
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    use_threads(n_threads)
    ids = harvest_ids()
    # More contexts than one run takes: the store goes on where it is in them.
    dataset = datasets.Dataset.from_dict({"input_ids": ids.repeat(20, 1).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        config = CacheActivationsRunnerConfig(
            dataset_path="given",
            model_name=model,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=len(ids),
            hook_name=f"model.layers.{HARVEST_LAYER - 1}",
            d_in=D_IN,
            training_tokens=ids.numel(),
            context_size=N_POSITIONS,
            new_cached_activations_path=f"{folder}/0",
            shuffle=False,
            dtype="float32",  # arrow has no bfloat16
            # Room for one forward's tokens: a run is one buffer, and takes no more than it is asked for.
            buffer_size_gb=1.1e-9 * ids.numel() * D_IN * torch.float32.itemsize,
            device="cpu",
            model_from_pretrained_kwargs={"dtype": getattr(torch, precision)},
            prepend_bos=False,
            streaming=False,
        )
        runner = CacheActivationsRunner(config, override_dataset=dataset)
        number = 0

        def run() -> dict:
            nonlocal number
            number += 1
            runner.cfg.new_cached_activations_path = f"{folder}/{number}"
            rows = len(runner.run())
            written = sum(path.stat().st_size for path in Path(f"{folder}/{number}").rglob("*") if path.is_file())
            return {"tokens": rows * N_POSITIONS, "bytes": written}

        serve(run)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
