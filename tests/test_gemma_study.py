"""The Gemma study from texts to report with a tiny random Gemma 2 and local copies of the hub datasets."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from conftest import make_texts
from posmask import report
from posmask.probing import saebench_datasets
from posmask.results import rows
from posmask.study import run
from posmask.study.study_file import read_study
from test_hub import hub_datasets, hub_folder  # noqa: F401 (fixtures)

GEMMA = Path(__file__).parent.parent / "studies" / "gemma-2-2b.toml"


@pytest.fixture
def gemma(tmp_path, hub_datasets):  # noqa: F811
    """Write a tiny random Gemma 2 and a tokenizer with every word of the datasets."""
    every = [
        text
        for name in saebench_datasets.HUB_DATASETS
        for sides in saebench_datasets.read_hub_texts(name, 40, 10, 42).values()
        for side in sides
        for text in side
    ]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=400, special_tokens=["<unk>", "<bos>", "<eos>"])
    words.train_from_iterator([*every, *make_texts(100)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=64, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    folder = tmp_path / "gemma"
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_study_runs_on_a_tiny_model_of_the_same_family(gemma, tmp_path):
    lines = (json.dumps({"text": text, "meta": {}}) for text in make_texts(800, n_words=60))
    (tmp_path / "pile.jsonl").write_text("\n".join(lines))
    changes = [
        f"model.name={gemma}", "model.layer=2", "model.precision=float32", "device=cpu", "seeds=[0]",
        f"corpus.texts={tmp_path / 'pile.jsonl'}", "corpus.training_tokens=8000", "corpus.heldout_tokens=8000",
        "sae.d_sae=64", "sae.rule.k=6", "training.n_steps=25", "training.batch_tokens=512",
        "training.learning_rate=1e-2", "evaluation.shift_texts=30", "evaluation.model_contexts=8",
        "evaluation.order_tasks=[]", "comparisons=[]", "evaluation.probe_train=40", "evaluation.probe_test=10",
    ]  # fmt: skip
    settings = read_study(GEMMA, changes)
    root = tmp_path / "run"
    results = run.run_study(settings, root, say=lambda words: None)
    by_cell = {(row.cell, row.metric, row.slice): row.value for row in results}
    for cell in settings.cells:
        assert by_cell[cell.name, "explained_variance", ""] > 0
        assert (cell.name, "ce_recovered", "") in by_cell
        for name in saebench_datasets.HUB_DATASETS:
            where = f"dataset={name};k=20;source=sae;pooling=mean;protocol=saebench;train=40"
            assert (cell.name, "probe_accuracy", where) in by_cell
    assert {row.cell for row in rows.read_rows(root / "results.csv")} == {
        "llm",
        *(cell.name for cell in settings.cells),
    }
    saebench_output = json.loads((root / "cells" / "hard-seed0" / "saebench.json").read_text())
    assert [f"{name}_results" for name in saebench_datasets.HUB_DATASETS] == [
        detail["dataset_name"] for detail in saebench_output["eval_result_details"]
    ]
    assert report.write_report(root).exists()
