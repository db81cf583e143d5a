"""Train a small GPT-2 on the embedded training texts: a second architecture for studies, `make second-model`.

GPT-2 has learned absolute positions and LayerNorm where the embedded Llama has rotary positions and RMSNorm. The folder
it is written to (runs/gpt2) is an ordinary Hugging Face model with its tokenizer. Training goes on from its last
checkpoint, and sees only texts of the training split, so that what is measured on stays unseen by model and SAE alike.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from posmask.data import embedded, tokens
from posmask.kernels.runtime import fast_precision, keep_freed_memory
from posmask.progress import progress_bar
from posmask.seeds import generator

N_POSITIONS = 128
VOCABULARY = 8192
CONTEXTS_A_STEP = 16
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
CHECKPOINT_STEPS = 100
MAX_CHARACTERS = 2000  # of a text
CHECKPOINT = "checkpoint.safetensors"
END = "<|endoftext|>"


def training_texts() -> list[str]:
    texts = (text for name in embedded.table_names() for text, _ in embedded.read_table(name))
    return [text[:MAX_CHARACTERS] for text in tokens.unique_texts(texts, "training")]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; END begins contexts and ends texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * step / n_steps))


def train(folder: Path, n_tokens: int, seed: int) -> None:
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    texts = training_texts()
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = make_tokenizer(texts)
        tokenizer.save_pretrained(folder)
    ids = tokens.pack(texts, tokenizer, N_POSITIONS, n_tokens).id
    n_steps = len(ids) // CONTEXTS_A_STEP
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=N_POSITIONS,
            n_embd=256,
            n_layer=8,
            n_head=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    done = restore(folder / CHECKPOINT, model, optimizer)
    order = torch.randperm(len(ids), generator=generator(seed, "contexts"))
    bfloat16 = fast_precision() == "bfloat16"
    with progress_bar("train GPT-2", n_steps * CONTEXTS_A_STEP * N_POSITIONS, "tokens") as advance:
        advance(done * CONTEXTS_A_STEP * N_POSITIONS)
        for step in range(done, n_steps):
            batch = ids[order[step * CONTEXTS_A_STEP : (step + 1) * CONTEXTS_A_STEP]]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            advance(batch.numel())
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == n_steps:
                save(folder / CHECKPOINT, model, optimizer, step + 1)
                print(f"{time.strftime('%H:%M:%S')} step {step + 1} of {n_steps}: loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder)
    (folder / CHECKPOINT).unlink()


def save(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, step: int) -> None:
    """Everything the training needs to go on, beside its place and then moved there."""
    found = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        found[f"model.{name}"] = parameter.detach()
        found |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    draft = path.with_suffix(".draft")
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, draft)
    draft.replace(path)


def restore(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.AdamW) -> int:
    """Load a checkpoint, if there is one; returns the steps it has behind it."""
    if not path.exists():
        return 0
    found = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[f"model.{name}"])
            optimizer.state[parameter] = {
                key: found[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(found["step"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model, such as runs/gpt2")
    parser.add_argument(
        "--tokens", type=int, default=4_500_000, help="tokens to train on, each seen once; the texts have 4.8 M"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.folder, given.tokens, given.seed)
