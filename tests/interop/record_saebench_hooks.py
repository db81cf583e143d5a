"""Record what SAEBench computes from an exported SAE, in its environment: `record_saebench_hooks.py OUT.json`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.mdbm import MDBM
from sae_bench.evals.unlearning.utils.intervention import anthropic_clamp_resid_SAE_features
from small_sae import CLAMPED, MULTIPLIER, POSITION, make_sae, make_vectors

from posmask.interop.saelens import as_saelens


def absorption(sae, vectors):
    """Score two words, whose vectors are those at one position; only the model is replaced."""
    model = SimpleNamespace(
        run_with_cache=lambda prompts, names_filter: (None, {names_filter[0]: vectors}),
        to_tokens=lambda prompt: torch.zeros(1, vectors.shape[1]),
    )
    calculator = FeatureAbsorptionCalculator(model, ["ab", "cd", "ef"], 1, word_token_pos=POSITION, topk_feats=3)
    direction = vectors[:, POSITION].sum(0)
    with sae.at(POSITION):
        results = calculator.calculate_absorption(sae, ["gh", "ij"], direction, [11], layer=1, show_progress=False)
    return [
        {
            "features": [score.feature_id for score in word.top_projection_feature_scores],
            "projections": [score.probe_projection for score in word.top_projection_feature_scores],
            "absorption_fraction": float(word.absorption_fraction),
        }
        for word in results.word_results
    ]


def main(path):
    sae, vectors = as_saelens(make_sae(), {"layer": 2, "model": "tiny"}), make_vectors()
    sae.cfg.hook_layer = 1
    unlearned = anthropic_clamp_resid_SAE_features(vectors, None, sae, CLAMPED, MULTIPLIER)
    method = MDBM(SimpleNamespace(device="cpu"), None, RAVELEvalConfig(llm_batch_size=2), sae)
    method.binary_mask.data[::2] = 1
    with torch.no_grad(), sae.at(POSITION):
        hook = method.create_intervention_hook(vectors[:, 1], torch.tensor([POSITION, POSITION]))
        (exchanged,) = hook(None, None, (vectors.clone(),))
    recorded = {
        "version": version("sae-bench"),
        "unlearning": unlearned.tolist(),
        "ravel": exchanged[:, POSITION].tolist(),
        "absorption": absorption(sae, vectors),
    }
    path.write_text(json.dumps(recorded) + "\n", encoding="utf8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
