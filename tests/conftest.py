"""What the tests share: a random two-layer model, forty texts, their vectors, and every mask kind at a small size."""

import os

os.environ.setdefault("NUMBA_NUM_THREADS", "2")

from jaxtyping import install_import_hook

# Shapes are checked here and nowhere else. kernels.py is left out: numba compiles its functions.
_CHECKED = [
    "masks",
    "sae",
    "objective",
    "corpus",
    "activations",
    "training",
    "intervals",
    "metrics",
    "probing",
]
install_import_hook([f"posmask.{name}" for name in _CHECKED], "beartype.beartype")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posmask.activations import Activations, harvest
from posmask.corpus import pack
from posmask.masks import make_mask, mask_settings
from posmask.model import LanguageModel
from posmask.sae import SparseAutoencoder, TopK

collect_ignore = ["interop/record_saebench.py"]  # Runs in another environment.

N_POSITIONS = 16
D_MODEL = 12
D_SAE = 32

MASKS = {
    "open": {"kind": "open"},
    "slice": {"kind": "slice", "n_slices": 4},
    "hard": {"kind": "hard", "positions_per_latent": 4},
    "cohort": {"kind": "cohort", "n_cohorts": 8, "positions_per_latent": 4},
    "soft": {"kind": "soft", "low": 0.3, "high": 0.7},
    "importance": {"kind": "importance", "positions_per_latent": 4},
}


def make_sae(kind, apply="forward", *, k=4, d_model=D_MODEL, d_sae=D_SAE, seed=0, dtype=torch.float32):
    """An SAE with random (not only initial) parameters, so that biases and both dictionaries matter."""
    mask = make_mask(mask_settings({**MASKS[kind], "apply": apply}), N_POSITIONS, d_sae, seed)
    if kind == "importance":
        mask.learn(torch.rand(N_POSITIONS, d_sae, generator=torch.Generator().manual_seed(3)))
        mask._keep(4)
    sae = SparseAutoencoder(d_model, TopK(k=k), mask, seed).to(dtype)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias):
            parameter += 0.2 * torch.randn(parameter.shape, generator=random, dtype=dtype)
    return sae


def make_vectors(n_tokens, *, dtype=torch.float32, seed=1):
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n_tokens, D_MODEL, generator=random, dtype=dtype)
    position = torch.sort(torch.randint(1, N_POSITIONS, (n_tokens,), generator=random)).values.to(torch.int32)
    return vectors, position


WORDS = "red blue green old new big small house tree road sea sky bird fish runs flies sleeps sings and or".split()


def make_texts(n_texts, *, seed=0, n_words=30):
    random = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n_words,), generator=random)) for _ in range(n_texts)]


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def causal_lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=D_MODEL,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(causal_lm, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(model_folder):
    from transformers import AutoModelForCausalLM

    return LanguageModel(AutoModelForCausalLM.from_pretrained(model_folder).eval(), layer=2)


@pytest.fixture(scope="session")
def activations(tokenizer, language_model, tmp_path_factory) -> Activations:
    tokens = pack(make_texts(200), tokenizer, N_POSITIONS, 3000)
    return harvest(tokens, language_model, tmp_path_factory.mktemp("run") / "activations", {"what": "test"}, "test")
