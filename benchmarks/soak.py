"""Harvests and trains over and over, and watches that memory, open files and threads do not grow.

    python benchmarks/soak.py --minutes 120 --out benchmarks/soak.jsonl

Each round harvests 20,000 tokens of a random model, trains an SAE on them with checkpoints, saves it and reads it
again. Counted after the first quarter, when every buffer has had its largest size once. What was seen so far is added
to the file every few minutes, so that a soak that was stopped has its figures too; the last line is that of the whole.
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posmask.data.activations import training_batches
from posmask.data.harvest import harvest
from posmask.data.sites import LanguageModel
from posmask.data.tokens import Tokens
from posmask.kernels import runtime
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_sae, write_sae
from posmask.sae.rules import rule_settings
from posmask.training.checkpoints import Checkpoints
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

N_POSITIONS, D_MODEL, D_SAE = 64, 128, 1024
MINUTES_BETWEEN_LINES = 3
MASKS = (
    {"kind": "open"},
    {"kind": "slice", "n_slices": 8},
    {"kind": "importance", "positions_per_latent": 8},
    {"kind": "soft", "low": 0.3, "high": 0.7},
    {"kind": "split", "start_latents": 512, "max_latents": D_SAE},
)


def one_round(number: int, model: LanguageModel, folder: Path) -> None:
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 500, (320, N_POSITIONS), generator=random)
    position = torch.arange(N_POSITIONS).expand_as(ids)
    text = torch.arange(len(ids))[:, None].expand_as(ids)
    tokens = Tokens(ids, position, text, position > 0, position, position, position, position)
    vectors = harvest(tokens, model, folder / "vectors", {"round": number}, "soak")
    mask = make_mask(mask_settings(MASKS[number % len(MASKS)]), N_POSITIONS, D_SAE, number)
    sae = SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 16}), mask, number)
    sae.center, sae.scale = vectors.center_and_scale
    settings = TrainingSettings(n_steps=60, batch_tokens=1024, learning_rate=1e-3)
    checkpoints = Checkpoints(folder / "checkpoints", {"round": number}, every_seconds=1)
    train(sae, training_batches(vectors, 1024, 60, number), settings, "soak", checkpoints=checkpoints)
    write_sae(sae, folder)
    read_sae(folder)
    shutil.rmtree(folder / "vectors")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    runtime.give_back_freed_memory()  # as a study does after each cell


def figures(seen: list[tuple[float, float, int, int]]) -> dict[str, object]:
    """Of rounds (hours since the start, MiB resident, open files, threads), the first quarter left out."""
    hours, memory, files, threads = np.array(seen[len(seen) // 4 :]).T
    slope = np.polyfit(hours, memory, 1)[0] if len(hours) > 1 else float("nan")
    return {
        "minutes": round(60 * seen[-1][0], 1),
        "rounds": len(seen),
        "rss_mib": [round(float(value), 1) for value in (memory[0], memory.max(), memory[-1])],
        "rss_mib_per_hour": round(float(slope), 2),
        "files": [int(files.min()), int(files.max())],
        "threads": [int(threads.min()), int(threads.max())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines to add to")
    asked = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LanguageModel(LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval(), 2)
    process, started, seen, told = psutil.Process(), time.monotonic(), [], 0.0
    with tempfile.TemporaryDirectory() as folder, asked.out.open("a", encoding="utf8") as out:
        for number in itertools.count():
            one_round(number, model, Path(folder))
            hours = (time.monotonic() - started) / 3600
            seen.append((hours, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
            over = hours * 60 >= asked.minutes
            if over or hours - told >= MINUTES_BETWEEN_LINES / 60:
                told = hours
                print(json.dumps(figures(seen)), file=out, flush=True)
            if over:
                break


if __name__ == "__main__":
    main()
