"""A folder in which hub names resolve to local stand-ins: a GPT-2 of 26 x 12 words, data sets, and trained SAEs.

The first letter of a word is in its embedding, so probes for it exist as in a large model. A prompt of SAEBench's
absorption evaluation has the same number of tokens for every word.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import posmask
from conftest import RULES
from posmask.interop.saelens_files import export_saelens
from posmask.sae.files import write_sae

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te")
WORDS = [letter + syllable + "n" for letter in LETTERS for syllable in SYLLABLES]
FRAME = ["has", "the", "first", "letter", ":", ".", "he", "she", *LETTERS.upper()]
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
N_POSITIONS, D_MODEL, D_SAE, LAYER = 128, 64, 256, 2
MASKS = {
    "open": {"kind": "open"},
    "windows": {"kind": "windows", "cuts": [[], [24], [16, 32], [12, 24, 48]], "gradient_sharing": 0.9},
}


def write_model(folder: Path) -> None:
    """Write the GPT-2 and its tokenizer, which prepends BOS and pads on the left, as Gemma's does."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *FRAME, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    sides = {"model_max_length": 256, "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **sides, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(vocabulary),
        "n_positions": 256,
        "n_ctx": 256,
        "n_embd": D_MODEL,
        "n_layer": 3,
        "n_head": 2,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    letters = torch.nn.functional.normalize(torch.randn(26, D_MODEL), dim=1)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 0.15)
        model.transformer.wpe.weight.normal_(0, 0.05)
        model.transformer.wte.weight[-len(WORDS) :] += 1.5 * letters.repeat_interleave(len(SYLLABLES), 0)
    model.save_pretrained(folder)


def make_texts(n_texts: int, seed: int = 0) -> list[str]:
    """Half lines of first letters, as in absorption's prompts, half random words."""
    choose, texts = random.Random(seed), []
    for number in range(n_texts):
        words = choose.choices(WORDS, k=40)
        lines = [f"{word} has the first letter: {word[0].upper()}" for word in words]
        texts.append("\n".join(lines) if number % 2 else " ".join(words) + " .")
    return texts


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def write_data_sets(folder: Path) -> None:
    """Write data sets of the hub's names and columns: the words of a text show its class."""
    write_lines(folder / "texts" / "train.jsonl", [{"text": text} for text in make_texts(300, seed=1)])
    choose = random.Random(2)

    def text_of(letter: str, subject: str) -> str:
        own = [word for word in WORDS if word[0] == letter]
        return " ".join([subject, *choose.choices(own, k=2), *choose.choices(WORDS, k=10), "."])

    for split, n_texts in (("train", 60), ("test", 30)):
        news = [{"text": text_of("abcd"[i % 4], "the"), "label": i % 4} for i in range(4 * n_texts)]
        write_lines(folder / "fancyzhx" / "ag_news" / f"{split}.jsonl", news)
        bios = [
            {"hard_text": text_of(LETTERS[job % 26], ("he", "she")[gender]), "profession": job, "gender": gender}
            for job in range(28)
            for gender in (0, 1)
            for _ in range(n_texts)
        ]
        write_lines(folder / "LabHC" / "bias_in_bios" / f"{split}.jsonl", bios)


def write_saes(folder: Path) -> None:
    """Train an SAE per mask, and one per other rule for a few steps, on the vectors of the model in `folder`.

    Write each as SAELens folders `saes/MASK`, `saes/MASK-lossy`, `saes-of-rules/RULE` and `saes-of-rules/RULE-lossy`.
    """
    vectors = posmask.read_vectors(
        make_texts(400), str(folder / "gpt2"), LAYER, folder / "vectors", n_tokens=40_000, precision="float32"
    )
    cases = [("saes", name, mask, {"kind": "topk", "k": 8}, 200) for name, mask in MASKS.items()]
    cases += [("saes-of-rules", rule, MASKS["windows"], RULES[rule], 30) for rule in RULES if rule != "topk"]
    for kind, name, mask, rule, n_steps in cases:
        sae = posmask.make_sae(vectors, D_SAE, mask=mask, rule=rule, budget="compute", n_positions=N_POSITIONS)
        posmask.fit(sae, vectors, n_steps=n_steps, batch_tokens=1024)
        cell = folder / "cells" / name
        cell.mkdir(parents=True)
        write_sae(sae, cell, {"model": "gpt2", "layer": LAYER})
        export_saelens(cell, folder / kind / name)
        export_saelens(cell, folder / kind / f"{name}-lossy", lossy=True)
