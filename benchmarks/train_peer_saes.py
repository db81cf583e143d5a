"""Train SAEs with other tools on the vectors of a finished study, for audits beside posmask's own.

    python benchmarks/train_peer_saes.py vectors runs/quick vectors.safetensors
    python benchmarks/train_peer_saes.py saelens vectors.safetensors peers/saelens
    python benchmarks/train_peer_saes.py dictionary_learning vectors.safetensors peers/dictionary_learning

The last command needs dictionary_learning 0.1.0 (tests/interop/dictionary_learning.txt), neither SAELens nor posmask.
Settings are each tool's defaults but for the sizes, which are those of the quick study: 2,304 latents, k = 32.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL, HOOK, LAYER, N_POSITIONS = "embedded:SmolLM2-135M-Instruct", "blocks.4.hook_resid_post", 5, 128
D_SAE, K, BATCH, STEPS = 2304, 32, 1024, 400


def write_vectors(root: Path, path: Path) -> None:
    """Write the kept training vectors of a study as one file."""
    from posmask.data.activations import Activations, evaluation_batches

    (folder,) = (root / "activations").glob("training-*")
    batches = evaluation_batches(Activations(folder))
    save_file({"vectors": torch.cat([batch.kept().vectors.float() for batch in batches])}, path)


def batches_of(path: Path):
    """Random batches without end."""
    vectors, random = load_file(path)["vectors"], torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(vectors), generator=random).split(BATCH)[:-1]:
            yield vectors[index]


def train_with_saelens(path: Path, out: Path) -> None:
    """Train a top-k SAE with SAELens's trainer."""
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_in = load_file(path)["vectors"].shape[1]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=D_SAE, k=K))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = MODEL, HOOK
    sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = N_POSITIONS, True
    logger = LoggingConfig(log_to_wandb=False)
    config = SAETrainerConfig(STEPS * BATCH, BATCH, lr=1e-3, lr_end=1e-4, n_batches_for_norm_estimate=10, logger=logger)
    SAETrainer(config, sae, batches_of(path)).fit()
    sae.save_inference_model(str(out))


def train_with_dictionary_learning(path: Path, out: Path) -> None:
    """Train a top-k SAE with dictionary_learning's trainer."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    config = {
        "trainer": TopKTrainer,
        "dict_class": AutoEncoderTopK,
        "steps": STEPS,
        "activation_dim": load_file(path)["vectors"].shape[1],
        "dict_size": D_SAE,
        "k": K,
        "layer": LAYER - 1,
        "lm_name": MODEL,
        "device": "cpu",
        "warmup_steps": 20,
        "submodule_name": f"model.layers.{LAYER - 1}",
        "seed": 0,
    }
    trainSAE(batches_of(path), [config], steps=STEPS, save_dir=str(out), device="cpu", autocast_dtype=torch.float32)
    settings = json.loads((out / "trainer_0" / "config.json").read_text())
    settings.setdefault("buffer", {"ctx_len": N_POSITIONS})
    (out / "trainer_0" / "config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    action, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {
        "vectors": write_vectors,
        "saelens": train_with_saelens,
        "dictionary_learning": train_with_dictionary_learning,
    }[action](source, target)
