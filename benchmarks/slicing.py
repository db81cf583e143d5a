"""Static slicing both ways on a study's harvest: `slicing.py STUDY.toml STUDY_FOLDER`.

One SAE with a slice mask, and one separate SAE for each window of positions, trained on the same batches from the same
weights: with the decoder bias held fixed they must agree, and what it makes of them when it learns is measured.
"""

import sys
from pathlib import Path

import torch

from posmask.data.activations import Activations, evaluation_batches, training_batches
from posmask.kernels import runtime
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.study.settings import StudySettings
from posmask.study.study_file import read_study
from posmask.training.loop import train

N_SLICES = 8


def start(study: StudySettings, activations: Activations, mask: dict, d_sae: int) -> SparseAutoencoder:
    mask_of = make_mask(mask_settings(mask), study.corpus.n_positions, d_sae)
    sae = SparseAutoencoder(activations.d_model, study.sae.rule, mask_of)
    sae.center, sae.scale = activations.center_and_scale
    return sae


def explained_variance(saes: list[SparseAutoencoder], heldout: Activations) -> float:
    """Of held-out tokens, each coded by the SAE of its window (or by the only one)."""
    mean, _ = heldout.center_and_scale
    error = variance = 0.0
    for batch in evaluation_batches(heldout):
        kept = batch.kept()
        window = kept.position.long() * len(saes) // saes[0].mask.n_positions
        for number, sae in enumerate(saes):
            some = kept.select(window == number)
            v_hat = sae.sparse_decode(sae.sparse_encode(some.vectors, some.position))
            error += float((v_hat - some.vectors).double().square().sum())
            variance += float((some.vectors.double() - mean).square().sum())
    return 1 - error / variance


def main(study_file: Path, root: Path) -> None:
    runtime.keep_freed_memory()
    study = read_study(study_file)
    training, heldout = (
        Activations(next((root / "activations").glob(f"{name}-*"))) for name in ("training", "evaluation")
    )
    settings = study.training.model_copy(update={"precision": "float32", "aux_k": 0, "max_gradient_norm": None})
    for bias_learns in (False, True):
        sliced = start(study, training, {"kind": "slice", "n_slices": N_SLICES}, study.sae.d_sae)
        first = {name: getattr(sliced, name).detach().clone() for name in ("encoder", "decoder")}
        sliced.decoder_bias.requires_grad_(bias_learns)
        batches = training_batches(training, settings.batch_tokens, settings.n_steps, 0)
        train(sliced, batches, settings, "slice mask")
        separate, width = [], study.sae.d_sae // N_SLICES
        for number in range(N_SLICES):
            sae = start(study, training, {"kind": "open"}, width)
            with torch.no_grad():
                for name, rows in first.items():
                    getattr(sae, name).copy_(rows[number * width : (number + 1) * width])
            sae.decoder_bias.requires_grad_(bias_learns)
            batches = training_batches(training, settings.batch_tokens, settings.n_steps, 0)
            windows = (
                batch.select(batch.position.long() * N_SLICES // study.corpus.n_positions == number)
                for batch in batches
            )
            train(sae, windows, settings, f"window {number}")
            separate.append(sae)
        rows = torch.cat([sae.decoder.detach() for sae in separate])
        far = float((rows - sliced.decoder.detach()).abs().max())
        alike = float((rows * sliced.decoder.detach()).sum(1).mean())
        print(
            f"shared bias {'learned' if bias_learns else 'fixed'}: decoder rows differ by at most {far:.2e} (mean "
            f"cosine {alike:.4f}); explained variance {explained_variance([sliced], heldout):.4f} in one SAE, "
            f"{explained_variance(separate, heldout):.4f} in {N_SLICES}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
