"""Harvest of vectors from a model on a CUDA GPU: its passes alone, and with vectors written to disk.

The model has the sizes of gemma-2-2b up to layer 13 and random weights in bfloat16. Vectors are written as they are
and as int8, to the folder of temporary files.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_terms import N_POSITIONS, Bench
from transformers import Gemma2Config, Gemma2ForCausalLM

from posmask.data.harvest import harvest
from posmask.data.sites import LanguageModel
from posmask.data.tokens import Tokens

LAYER = 13
SIZES = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": LAYER,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
TINY_SIZES = {**SIZES, "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TINY_SIZES |= {"num_key_value_heads": 1, "head_dim": 8}
_PASS_TOKENS = 16384
_N_SHARDS = 4  # of 65,536 tokens


def harvests(bench: Bench) -> None:
    """Tokens per second of the passes alone and of harvests, and the share of the former that the latter reach."""
    if bench.is_late(0.93):
        bench.leave_out("harvests: no time")
        return
    torch.manual_seed(0)
    model = _random_model(bench)
    tokens = _random_tokens(8 if bench.rehearsal else _N_SHARDS * 65536 // N_POSITIONS, 40)
    passes = tokens.id.split(_PASS_TOKENS // N_POSITIONS)

    def forward() -> None:
        for ids in passes:
            vectors = model.vectors(ids)
        vectors[:1].cpu()  # waits for the device

    n_tokens, repeats = tokens.id.numel(), 1 if bench.rehearsal else 2
    forward()
    rates = {"bare forward": n_tokens / statistics.median(_seconds(forward) for _ in range(repeats))}
    with tempfile.TemporaryDirectory() as folder:
        for stored in ("model", "int8"):
            to = Path(folder) / stored
            rates[stored] = n_tokens / _seconds(
                lambda stored=stored, to=to: harvest(tokens, model, to, {}, stored, stored)
            )
    bench.results["harvest"] = {
        "tokens/s": rates,
        "share of bare forward": {name: rates[name] / rates["bare forward"] for name in ("model", "int8")},
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _random_model(bench: Bench) -> LanguageModel:
    config = Gemma2Config(**(TINY_SIZES if bench.rehearsal else SIZES))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device:
            model = Gemma2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return LanguageModel(model.eval(), LAYER)


def _random_tokens(n_contexts: int, n_vocabulary: int) -> Tokens:
    ids = torch.randint(n_vocabulary, (n_contexts, N_POSITIONS))
    position = torch.arange(N_POSITIONS).expand_as(ids).contiguous()
    text = torch.arange(n_contexts)[:, None].expand_as(ids).contiguous()
    return Tokens(ids, position, text, position > 0, position, position, position, position)
