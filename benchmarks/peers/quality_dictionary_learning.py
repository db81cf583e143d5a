"""dictionary-learning on given vectors: `quality_dictionary_learning.py VECTORS.safetensors RESULTS.jsonl [STEPS]`.

In its environment: dictionary_learning.txt. The terms, the file of vectors and the lines written: quality_terms.py.
Runs whose line is already there are not repeated. Each step is its trainers' own `update`. One thread.
"""

import os
import time
import warnings
from importlib.metadata import version

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from quality_terms import (
    BETAS,
    D_SAE,
    DEAD_AFTER_TOKENS,
    PREFIXES,
    K,
    Run,
    Trained,
    Vectors,
    decay_steps,
    perform_all,
    warm_up_steps,
)

# Of the L1 loss, so that the held-out L0 lies below, at and above 32. jumprelu aims at an L0 of 32 by itself; its
# coefficient is the default `sparsity_penalty`.
COEFFICIENTS = {
    "standard": {3e-3: (2.0, 2.2, 2.5)},
    "jumprelu": {3e-3: (1.0,)},
    "gated": {3e-3: (2.0, 4.4, 5.0)},
}


def untrained(run: Run, d_in: int):
    """Its trainer; what is not given is its default, and what counts steps is as short as the run.

    Its defaults are a warm-up of 1000 steps, twice that for the sparsity loss, and the threshold tracked after the
    warm-up as a mean over the last 1 / (1 - 0.999) steps: never in 600 steps, and BatchTopK without a threshold keeps
    every positive latent. Here both warm-ups keep their proportion, and the mean is over 100 steps, as SAELens has it.
    """
    ramp = warm_up_steps(run.steps)
    common = {
        "steps": run.steps,
        "activation_dim": d_in,
        "dict_size": D_SAE,
        "layer": 0,
        "lm_name": "none",
        "lr": run.learning_rate,
        "warmup_steps": ramp,
        "decay_start": run.steps - decay_steps(run.steps),
        "seed": run.seed,
        "device": "cpu",
    }
    with_k = {"k": run.k, "threshold_start_step": ramp, "threshold_beta": 0.99}
    match run.architecture:
        case "topk":
            return TopKTrainer(**common, **with_k)
        case "batchtopk":
            return BatchTopKTrainer(**common, **with_k)
        case "matryoshka_batchtopk":
            widths = [end - start for start, end in zip((0, *PREFIXES), PREFIXES, strict=False)]
            return MatryoshkaBatchTopKTrainer(**common, **with_k, group_fractions=[width / D_SAE for width in widths])
        case "standard":
            return StandardTrainer(**common, l1_penalty=run.coefficient, sparsity_warmup_steps=2 * ramp)
        case "jumprelu":
            return JumpReluTrainer(
                **common, sparsity_penalty=run.coefficient, target_l0=float(K), sparsity_warmup_steps=2 * ramp
            )
        case "gated":
            return GatedSAETrainer(**common, l1_penalty=run.coefficient, sparsity_warmup_steps=2 * ramp)
    raise ValueError(run.architecture)


def train(run: Run, vectors: Vectors) -> Trained:
    """All but jumprelu on the vectors as they are; that one at a mean squared norm of 1, and back after decoding.

    1 is what its own `normalize_activations` makes of vectors, and jumprelu's bandwidth of 0.001 is made for it: at a
    mean squared norm of 576 hardly a value falls into the band, and in 600 steps its thresholds do not rise to where
    the L0 is 32 (it was 112 at a penalty of 576, which is 1 in those units, and 135 at ten times that).
    """
    torch.manual_seed(run.seed)  # Its jumprelu takes a seed but does not set it.
    scale = vectors.d_in**-0.5 if run.architecture == "jumprelu" else 1.0
    trainer = untrained(run, vectors.d_in)
    trainer.dead_feature_threshold = DEAD_AFTER_TOKENS  # In tokens; no argument sets it.
    for group in trainer.optimizer.param_groups:
        group["betas"] = BETAS  # jumprelu and gated have (0, 0.999), which no argument changes.
    started = time.perf_counter()
    for step, batch in enumerate(vectors.batches(run.steps)):
        trainer.update(step, batch * scale)
    seconds = time.perf_counter() - started
    encode, decode = trainer.ae.encode, trainer.ae.decode
    return Trained(lambda x: encode(x * scale), lambda latents: decode(latents) / scale, seconds)


def main() -> None:
    warnings.simplefilter("ignore")
    perform_all("dictionary-learning", version("dictionary-learning"), train, COEFFICIENTS)


if __name__ == "__main__":
    main()
