"""A study that runs in seconds: a random three-layer model, toy texts, and masks that change during training."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posmask.data import embedded, tokens
from posmask.probing import datasets, order_tasks
from study_toml import tiny_study

STUDY = tiny_study(
    """
[[cells]]
name = "open"
mask = { kind = "open" }
[[cells]]
name = "importance"
mask = { kind = "importance", positions_per_latent = 4, regrow = 0.2 }
[[cells]]
name = "split"
mask = { kind = "split", start_latents = 32, max_latents = 48, n_windows = 4, n_splittings = 3, watch_steps = 8 }
budget = "compute"
""",
    training_tokens="training_tokens = 3000",
    n_steps="n_steps = 60",
    learning_rate="learning_rate = 5e-3\ndead_after_eligible_tokens = 2000",
    shift_texts="shift_texts = 20",
    ks="ks = [1, 5]",
)
WORDS = "red blue green old new big small house tree road sea sky bird fish runs flies sleeps sings and or".split()


def put_toy_texts() -> None:
    """Replace the embedded texts by toy texts; add a toy dataset and a toy order task made from them."""
    random = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (14,), generator=random)) for _ in range(1600)]
    table = [(text, str(number % 2)) for number, text in enumerate(texts)]
    embedded.read_table = lambda name: table
    datasets.DATASETS["toy"] = {"even": ("words", "0"), "odd": ("words", "1")}

    def swapped(random, split):
        groups = []
        for text, _ in table:
            words = text.split()
            if tokens.split_of(text) == split and words[0] != words[-1]:
                groups.append((text, " ".join([words[-1], *words[1:-1], words[0]])))
        return iter(groups[:100]), iter(groups[100:])

    order_tasks.ORDER_TASKS["toy_order"] = order_tasks.OrderRecipe(
        swapped, "Which end is first?", ("swapped", "intact"), "text", (), "local"
    )


def write_tiny_model(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
