"""What fewer bits cost in quality: `precision.py STUDY.toml FOLDER RESULTS.jsonl`.

SAEs trained on vectors of the float32 model kept as float32, bfloat16 or int8, and on those of the bfloat16 model; and
with bfloat16 choosing the latents; all measured on the same held-out vectors of the float32 model. Training texts,
widths and steps are the study's, tokens N_TOKENS. Three seeds. What FOLDER and RESULTS hold is not redone.
"""

import json
import statistics
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from posmask.data import embedded, models
from posmask.data.activations import Activations, StorageDtype, evaluation_batches, training_batches
from posmask.data.harvest import _as_stored, harvest
from posmask.data.tokens import Split, pack, unique_texts
from posmask.kernels import runtime
from posmask.kernels.runtime import Precision
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.storage import manifest
from posmask.study.settings import StudySettings
from posmask.study.study_file import read_study
from posmask.training.loop import train

N_TOKENS = {"training": 120_000, "evaluation": 30_000}
SEEDS = (0, 1, 2)
MASKS = {"open": {"kind": "open"}}
# (precision of the model, of the stored vectors, of the product that chooses)
VARIANTS: list[tuple[Precision, StorageDtype, Precision]] = [
    ("float32", "float32", "float32"),
    ("float32", "float32", "bfloat16"),
    ("float32", "bfloat16", "float32"),
    ("float32", "int8", "float32"),
    ("bfloat16", "bfloat16", "float32"),
]


def harvested(study: StudySettings, split: Split, precision: Precision, folder: Path) -> Activations:
    to = folder / f"{split}-{precision}"
    made_from = {"split": split, "precision": precision, "tokens": N_TOKENS[split]}
    if manifest.finished(to, made_from):
        return Activations(to)
    found = unique_texts((text for name in study.corpus.tables for text, _ in embedded.read_table(name)), split)
    texts = [text[: study.corpus.max_characters] for text in found]
    tokens = pack(texts, models.load_tokenizer(study.model.name), study.corpus.n_positions, N_TOKENS[split])
    return harvest(tokens, models.load_model(study.model.name, study.model.layer, precision), to, made_from, to.name)


def stored_as(activations: Activations, storage_dtype: StorageDtype, folder: Path) -> Activations:
    """The same vectors in another precision."""
    if storage_dtype == activations.made_from["precision"]:
        return activations
    to, made_from = (
        folder / f"{activations.folder.name}-{storage_dtype}",
        {**activations.made_from, "storage_dtype": storage_dtype},
    )
    if not manifest.finished(to, made_from):
        with manifest.write_folder(to, made_from) as draft:
            for shard in sorted(activations.folder.glob("*.safetensors")):
                tensors = load_file(shard)
                save_file({**tensors, **_as_stored(tensors["vectors"], storage_dtype)}, draft / shard.name)
    return Activations(to)


def explained_variance(sae: SparseAutoencoder, heldout: Activations) -> float:
    mean, _ = heldout.center_and_scale
    error = variance = 0.0
    for batch in evaluation_batches(heldout):
        kept = batch.kept()
        v_hat = sae.sparse_decode(sae.sparse_encode(kept.vectors, kept.position))
        error += float((v_hat - kept.vectors).double().square().sum())
        variance += float((kept.vectors.double() - mean).square().sum())
    return 1 - error / variance


def relative_error(found: Activations, exact: Activations) -> float:
    """|found - exact|^2 over the variance of the exact vectors, all kept tokens."""
    error = 0.0
    for one, other in zip(evaluation_batches(found), evaluation_batches(exact), strict=True):
        error += float((one.kept().vectors.double() - other.kept().vectors.double()).square().sum())
    _, scale = exact.center_and_scale
    return error / (float(scale) ** 2 * exact.d_model * exact.n_kept)


def main(study_file: Path, folder: Path, results: Path) -> None:
    runtime.keep_freed_memory()
    study = read_study(study_file)
    exact, heldout = (harvested(study, split, "float32", folder) for split in ("training", "evaluation"))
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for precision, storage_dtype, selection in VARIANTS:
        training = stored_as(harvested(study, "training", precision, folder), storage_dtype, folder)
        head = {"model": precision, "stored": storage_dtype, "selection": selection}
        error = relative_error(training, exact)
        for mask, values in MASKS.items():
            for seed in SEEDS:
                run = {**head, "mask": mask, "seed": seed}
                if any(run.items() <= line.items() for line in lines):
                    continue
                mask_of = make_mask(mask_settings(values), study.corpus.n_positions, study.sae.d_sae, seed)
                sae = SparseAutoencoder(training.d_model, study.sae.rule, mask_of, seed)
                sae.center, sae.scale = training.center_and_scale
                settings = study.training.model_copy(update={"precision": selection})
                batches = training_batches(training, settings.batch_tokens, settings.n_steps, seed)
                train(
                    sae, batches, settings, f"{mask} {seed}: {precision} model, {storage_dtype}, {selection} choosing"
                )
                value = round(explained_variance(sae, heldout), 5)
                lines.append({**run, "vector_error": error, "explained_variance": value})
                with results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print("| model | stored | choosing | error of vectors | explained variance |\n" + "| --- " * 5 + "|")
    for precision, storage_dtype, selection in VARIANTS:
        head = {"model": precision, "stored": storage_dtype, "selection": selection}
        own = [line for line in lines if head.items() <= line.items()]
        values = {mask: [line["explained_variance"] for line in own if line["mask"] == mask] for mask in MASKS}
        cells = [f"{statistics.mean(some):.4f} ({min(some):.4f}–{max(some):.4f})" for some in values.values()]
        print(f"| {precision} | {storage_dtype} | {selection} | {own[0]['vector_error']:.1e} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
