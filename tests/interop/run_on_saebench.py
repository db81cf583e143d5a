"""Evaluate an exported SAE with sae-bench and sae-probes, in a folder with gpt2/, fancyzhx/ag_news/, texts/ and sae/.

Runs in sae-bench's environment. Nothing is patched: hub names resolve to folders of that name in the working folder.
"""

import json
import sys
from pathlib import Path

import torch
from run_in_tools import run_example
from sae_bench.evals.core.main import multiple_evals
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
from sae_bench.evals.sparse_probing.main import run_eval
from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations
from sae_lens import SAE
from safetensors.torch import load_file, save_file

import posmask.interop.saelens  # noqa: F401


def main(ours):
    torch.set_num_threads(1)

    def load():
        return SAE.load_from_disk("sae")

    config = SparseProbingEvalConfig(
        random_seed=1,
        dataset_names=["fancyzhx/ag_news"],
        probe_train_set_size=80,
        probe_test_set_size=40,
        context_length=16,
        sae_batch_size=50,
        llm_batch_size=50,
        llm_dtype="float32",
        model_name="gpt2",
        k_values=[1, 5],
    )
    run_eval(config, [("posmask/tiny", load())], "cpu", "probing", artifacts_path="artifacts")
    probing = Path("probing/posmask_tiny_custom_sae_eval_results.json")
    read = {}
    for name, path in (("theirs", probing), ("ours", ours)):
        read[name] = SparseProbingEvalOutput(**json.loads(Path(path).read_text())).eval_result_metrics.sae.__dict__
    core = multiple_evals(
        [("posmask/tiny", load())], 2, 2, eval_batch_size_prompts=4, dataset="texts", context_size=16,
        output_folder="core", device="cpu", compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    pooled = get_sae_meaned_activations({"any": load_file("vectors.safetensors")["vectors"]}, load(), 7)
    save_file(pooled, "pooled.safetensors")
    options = {"reg_type": "l2", "setting": "normal", "ks": [1, 4], "datasets": [sys.argv[2]], "device": "cpu"}
    options |= {"results_path": "sae-probes", "model_cache_path": "probes-cache"}
    run_example("sae-probes", options=options)
    probes = [json.loads(path.read_text()) for path in Path("sae-probes").rglob("*.json")]
    print(json.dumps({"read": read, "core": core[0]["metrics"], "probes": probes}))


if __name__ == "__main__":
    main(sys.argv[1])
