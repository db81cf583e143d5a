"""Unchanged sae-bench and sae-probes evaluate an exported SAE, with small local models and texts."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from conftest import make_texts
from posmask.interop.saebench import write_eval_output
from posmask.interop.saelens_files import export_saelens
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import write_sae
from posmask.sae.rules import rule_settings
from test_saebench import CONFIG, RUN, eval_output, recorded

PYTHON = os.environ.get("POSMASK_SAEBENCH_PYTHON")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="POSMASK_SAEBENCH_PYTHON is not set to a Python with sae-bench"),
]
HERE = Path(__file__).parent
N_POSITIONS, D_MODEL, D_SAE = 16, 32, 64
PROBES_DATASET = "105_click_bait"


def write_model(folder):
    """Write a GPT-2 with random weights and a byte tokenizer that prepends BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate(["<bos>", "<pad>", *alphabet])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>", "eos_token": "<bos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=1024, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(vocabulary),
        "n_positions": 1024,
        "n_ctx": 1024,
        "n_embd": D_MODEL,
        "n_layer": 3,
        "n_head": 2,
    }
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_texts(folder):
    """Write a dataset with the layout of ag_news whose words show the class, and texts to reconstruct."""
    news = folder / "fancyzhx" / "ag_news"
    news.mkdir(parents=True)
    for split, n in (("train", 60), ("test", 30)):
        lines = [
            {"text": f"{'abcd'[c] * 6} {text}", "label": c} for c in range(4) for text in make_texts(n, seed=n + c)
        ]
        (news / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "texts").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in make_texts(300)]
    (folder / "texts" / "train.jsonl").write_text("".join(lines))


def test_sae_bench_evaluates_an_exported_sae_with_positions(tmp_path):
    write_model(tmp_path / "gpt2")
    write_texts(tmp_path)
    mask = make_mask(mask_settings({"kind": "slice", "n_slices": 4}), N_POSITIONS, D_SAE)
    sae = SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 4}), mask)
    sae.center, sae.scale = torch.linspace(-0.1, 0.1, D_MODEL), torch.tensor(0.5)
    (tmp_path / "cell").mkdir()
    write_sae(sae, tmp_path / "cell", {"model": "gpt2", "layer": 2})
    export_saelens(tmp_path / "cell", tmp_path / "sae")
    export_saelens(tmp_path / "cell", tmp_path / "exported-typical", unknown_position="typical")
    vectors = torch.randn(20, N_POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(0))
    vectors[:, 0] = 0  # as sae-bench excludes BOS
    vectors[::2, 11:] = 0  # and padding
    save_file({"vectors": vectors}, tmp_path / "vectors.safetensors")
    write_eval_output(tmp_path / "ours.json", eval_output(recorded("llm"), recorded("sae"), CONFIG, RUN))
    environment = os.environ | {"JAXTYPING_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"PYTHONPATH": str(HERE.parent.parent / "src"), "WANDB_MODE": "disabled"}
    command = [PYTHON, HERE / "run_on_saebench.py", "ours.json", PROBES_DATASET]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    output = json.loads(result.stdout.splitlines()[-1])

    for metrics in output["read"].values():
        assert 0.4 < metrics["sae_top_1_test_accuracy"] <= 1
    assert output["read"]["theirs"]["sae_test_accuracy"] > 0.7  # The class shows in the first words.
    core = output["core"]
    assert 0 < core["sparsity"]["l0"] <= 4
    assert core["reconstruction_quality"]["explained_variance"] < 1
    assert {"kl_div_score", "kl_div_with_sae"} <= set(core["model_behavior_preservation"])
    (probes,) = output["probes"]
    assert [entry["k"] for entry in probes] == [1, 4]
    assert all(0 <= entry["test_acc"] <= 1 for entry in probes)

    position = torch.arange(N_POSITIONS).expand(20, N_POSITIONS)
    counts = vectors.abs().sum(2) > 0
    codes = sae.scale * sae.encode(vectors, position) * counts[..., None]  # decoder rows of norm 1
    expected = codes.sum(1) / counts.sum(1, keepdim=True)
    torch.testing.assert_close(
        load_file(tmp_path / "pooled.safetensors")["any"], expected.detach(), atol=1e-4, rtol=1e-4
    )
