"""Run SAEBench's evaluations on each SAE in saes/, as it is and folded: `run_saebench_evals.py OUT.json [NAME..]`.

Runs in sae-bench's environment, in a folder that `stand_ins` wrote, where hub names resolve to folders. Replaced are:
- absorption: the folders of its caches, which are in the package's own folder and do not tell models apart, and the
  order of the vocabulary, from which it draws examples: it differs from one tokenizer to the next.
- unlearning: its model (only gemma-2 is accepted) and its questions, which no small model answers. Its choice of
  latents and its hook run, on local texts.
- RAVEL: model and data set. Its hook runs; transformers 5 returns no tuples from layers, which RAVEL 0.6.0 requires.
- automatic interpretation: the judge.
"""

import json
import random
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import sae_bench.evals.absorption.common as absorption_common
import sae_bench.evals.absorption.feature_absorption as feature_absorption
import sae_bench.evals.absorption.main as absorption
import sae_bench.evals.autointerp.main as autointerp
import sae_bench.evals.scr_and_tpp.main as scr_and_tpp
import sae_bench.evals.sparse_probing.main as sparse_probing
import sae_bench.evals.unlearning.utils.feature_activation as unlearning
import torch
from run_in_tools import run_example
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
from sae_bench.evals.core.main import multiple_evals
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.mdbm import MDBM
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.unlearning.utils.metrics import modify_model
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from transformer_lens import HookedTransformer

import posmask.interop.saelens  # noqa: F401

MODEL = {"model_name": "gpt2", "llm_dtype": "float32", "random_seed": 1}
TOP = 8


def at(sae, positions):
    """Positions within a tool's call; SAELens's own architectures need none."""
    return sae.at(positions) if hasattr(sae, "at") else nullcontext(sae)


def run_core(name, sae):
    (result,) = multiple_evals(
        [(name, sae)], 2, 2, eval_batch_size_prompts=4, dataset="texts", context_size=64, output_folder="core",
        device="cpu", dtype="float32", compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True, force_rerun=True,
    )  # fmt: skip
    return result["metrics"]


def run_sparse_probing(name, sae):
    config = SparseProbingEvalConfig(
        **MODEL, dataset_names=["fancyzhx/ag_news"], probe_train_set_size=80, probe_test_set_size=40,
        context_length=32, sae_batch_size=50, llm_batch_size=50, k_values=[1, 5],
    )  # fmt: skip
    results = sparse_probing.run_eval(config, [(name, sae)], "cpu", "probing", True, artifacts_path="artifacts")
    return results[f"{name}_custom_sae"]["eval_result_metrics"]["sae"]


def run_scr_and_tpp(name, sae, *, perform_scr):
    data_set = "LabHC/bias_in_bios_class_set1"
    config = ScrAndTppEvalConfig(
        **MODEL, dataset_names=[data_set], perform_scr=perform_scr, train_set_size=80, test_set_size=40,
        context_length=32, sae_batch_size=50, llm_batch_size=50, n_values=[2, 10], probe_epochs=10, probe_lr=0.03,
        column1_vals_lookup={data_set: [("professor", "nurse")]},
    )  # fmt: skip
    results = scr_and_tpp.run_eval(config, [(name, sae)], "cpu", "scr_and_tpp", True, artifacts_path="artifacts")
    return results[f"{name}_custom_sae"]["eval_result_metrics"]


def run_absorption(name, sae):
    config = AbsorptionEvalConfig(
        **MODEL, min_feats_for_eval=3, min_GT_probe_f1=0.3, max_k_value=2, k_sparse_probe_num_epochs=10,
        precalc_k_sparse_probe_sae_acts=True,
    )  # fmt: skip
    Path("absorption").mkdir(exist_ok=True)  # It does not make the folder itself.
    if hasattr(sae, "at"):
        model = HookedTransformer.from_pretrained_no_processing("gpt2", device="cpu")
        results = run_example("absorption", config=config, model=model, sae=sae, name=name)["results"]
    else:
        results = absorption.run_eval(config, [(name, sae)], "cpu", "absorption", True)
    return results[f"{name}_custom_sae"]["eval_result_metrics"]["mean"]


def run_unlearning(name, sae):
    load_and_format_sae(name, sae, "cpu")
    model = HookedTransformer.from_pretrained_no_processing("gpt2", device="cpu")
    torch.manual_seed(0)
    lines = [json.loads(line)["text"] for line in Path("texts/train.jsonl").read_text().splitlines()]
    forget, retain = lines[1:80:2], lines[0:80:2]
    tokens = [
        unlearning.dataset_utils.tokenize_and_concat_dataset(model.tokenizer, part, seq_len=64)
        for part in (forget, retain)
    ]
    sparsities = unlearning.calculate_sparsity(model, sae, *tokens, batch_size=8)
    latents = unlearning.get_top_features(*sparsities, retain_threshold=0.05)[:TOP]
    following = f"blocks.{sae.cfg.hook_layer + 1}.hook_resid_pre"
    _, before = model.run_with_cache(tokens[0], names_filter=following)
    modify_model(
        model, sae, intervention_method="clamp_feature_activation", features_to_ablate=latents.copy(), multiplier=25
    )
    _, after = model.run_with_cache(tokens[0], names_filter=following)
    change = (after[following] - before[following]).norm(dim=-1).mean()
    return {"latents": latents.tolist(), "change": float(change)}


def run_ravel(name, sae):
    load_and_format_sae(name, sae, "cpu")
    generator = torch.Generator().manual_seed(0)
    vectors = 0.5 * torch.randn(4, 20, sae.cfg.d_in, generator=generator)
    sources, base_position = 0.5 * torch.randn(4, sae.cfg.d_in, generator=generator), torch.tensor([-3, -4, -3, -6])
    config = RAVELEvalConfig(llm_batch_size=4)
    method = MDBM(SimpleNamespace(device="cpu", dtype=torch.float32), None, config, sae)
    method.binary_mask.data[: sae.cfg.d_sae // 2] = 1
    with torch.no_grad(), at(sae, 12):
        (changed,) = method.create_intervention_hook(sources, base_position)(None, None, (vectors.clone(),))
    return {"change": float((changed - vectors).norm())}


def run_autointerp(name, sae):
    config = AutoInterpEvalConfig(
        **MODEL, n_latents=6, dead_latent_threshold=5, dataset_name="texts", llm_context_size=64, llm_batch_size=8,
        total_tokens=4000,
    )  # fmt: skip
    autointerp.AutoInterp.get_api_response = lambda self, messages, max_tokens, n_completions=1: (["1, 2, 3"], "log")
    results = autointerp.run_eval(config, [(name, sae)], "cpu", "no key", "autointerp", True)
    result = results[f"{name}_custom_sae"]
    return result["eval_result_metrics"]["autointerp"] | {"latents": sorted(result["eval_result_unstructured"])}


EVALUATIONS = {
    "core": run_core,
    "sparse_probing": run_sparse_probing,
    "scr": partial(run_scr_and_tpp, perform_scr=True),
    "tpp": partial(run_scr_and_tpp, perform_scr=False),
    "absorption": run_absorption,
    "unlearning": run_unlearning,
    "ravel": run_ravel,
    "autointerp": run_autointerp,
}


def main(out, names):
    torch.set_num_threads(1)
    words_of = feature_absorption.get_alpha_tokens
    for module in (absorption_common, feature_absorption):
        module.get_alpha_tokens = lambda tokenizer: sorted(words_of(tokenizer))
    caches = Path("absorption-caches").absolute()
    for function in ("run_k_sparse_probing_experiment", "run_feature_absortion_experiment"):
        folders = {"probes_dir": caches / "probes", "experiment_dir": caches / function}
        if function == "run_feature_absortion_experiment":
            folders["sparse_probing_experiment_dir"] = caches / "run_k_sparse_probing_experiment"
        setattr(absorption, function, partial(getattr(absorption, function), **folders))
    tokenizer = HookedTransformer.from_pretrained_no_processing("gpt2", device="cpu").tokenizer
    results = {"padding_side": [tokenizer.padding_side]}
    run_example("padding")
    tokenizer = HookedTransformer.from_pretrained_no_processing("gpt2", device="cpu").tokenizer
    results["padding_side"].append(tokenizer.padding_side)
    folders = sorted(Path("saes").iterdir())
    for evaluation in names or EVALUATIONS:  # Without its caches, an evaluation draws other random numbers.
        EVALUATIONS[evaluation]("first", SAE.load_from_disk(folders[0]))
    for folder in folders:
        for name, fold in ((folder.name, False), (f"{folder.name}-folded", True)):
            results[name] = {}
            for evaluation in names or EVALUATIONS:
                torch.manual_seed(0)
                random.seed(0)
                sae = SAE.load_from_disk(folder)
                try:
                    if fold:
                        sae.fold_W_dec_norm()
                    results[name][evaluation] = EVALUATIONS[evaluation](name, sae)
                except Exception as error:
                    results[name][evaluation] = f"{type(error).__name__}: {error}"
    Path(out).write_text(json.dumps(results, indent=1, default=float))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
