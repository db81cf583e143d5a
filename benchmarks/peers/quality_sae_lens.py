"""SAELens on given vectors: `quality_sae_lens.py VECTORS.safetensors RESULTS.jsonl [STEPS]`, in its environment.

The environment: sae_lens.txt. The terms, the file of vectors and the lines written: quality_terms.py. Runs whose line
is already there are not repeated. Its own SAETrainer takes the batches; measured is the SAE that it saves for
inference. One thread.
"""

import os
import tempfile
import time
import warnings
from importlib.metadata import version

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from quality_terms import (
    BETAS,
    D_SAE,
    DEAD_AFTER_TOKENS,
    PREFIXES,
    Run,
    Trained,
    Vectors,
    decay_steps,
    perform_all,
    warm_up_steps,
)
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

# Of the L1 or L0 loss, so that the held-out L0 lies below, at and above 32.
COEFFICIENTS = {
    "standard": {3e-3: (1.7, 1.85, 2.0)},
    "jumprelu": {3e-3: (4.0, 6.0, 10.0)},
    "gated": {3e-3: (2.0, 2.25, 2.6)},
}


def untrained(run: Run, d_in: int):
    """Its training class, all else at its defaults.

    The sparsity loss warms up over 5 % of the run, as its tutorials do; the default of its classes is no warm-up.
    """
    sizes = {"d_in": d_in, "d_sae": D_SAE}
    ramp = warm_up_steps(run.steps)
    match run.architecture:
        case "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=run.k))
        case "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=run.k))
        case "matryoshka_batchtopk":
            config = MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=run.k, matryoshka_widths=list(PREFIXES))
            return MatryoshkaBatchTopKTrainingSAE(config)
        case "standard":
            config = StandardTrainingSAEConfig(**sizes, l1_coefficient=run.coefficient, l1_warm_up_steps=ramp)
            return StandardTrainingSAE(config)
        case "jumprelu":
            config = JumpReLUTrainingSAEConfig(**sizes, l0_coefficient=run.coefficient, l0_warm_up_steps=ramp)
            return JumpReLUTrainingSAE(config)
        case "gated":
            config = GatedTrainingSAEConfig(**sizes, l1_coefficient=run.coefficient, l1_warm_up_steps=ramp)
            return GatedTrainingSAE(config)
    raise ValueError(run.architecture)


def train(run: Run, vectors: Vectors) -> Trained:
    torch.manual_seed(run.seed)
    sae = untrained(run, vectors.d_in)
    config = SAETrainerConfig(
        total_training_samples=run.steps * vectors.batch_tokens,
        train_batch_size_samples=vectors.batch_tokens,
        lr=run.learning_rate,
        lr_end=run.learning_rate,  # Must be given; a constant schedule with decay does not read it.
        lr_warm_up_steps=warm_up_steps(run.steps),
        lr_decay_steps=decay_steps(run.steps),
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        dead_feature_window=DEAD_AFTER_TOKENS // vectors.batch_tokens,  # In steps.
    )
    started = time.perf_counter()
    SAETrainer(config, sae, vectors.batches(run.steps)).fit()
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder)
    return Trained(saved.encode, saved.decode, seconds)


def main() -> None:
    warnings.simplefilter("ignore")
    perform_all("sae-lens", version("sae-lens"), train, COEFFICIENTS)


if __name__ == "__main__":
    main()
