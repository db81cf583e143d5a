"""Reading and replacing vectors is the same in every family of decoders; nothing knows which model it is."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from posmask.model import LanguageModel, layer_number

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
TINY = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=4, n_head=2, **SIZES)),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, **SIZES)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, **SIZES)
    ),
}


@pytest.mark.parametrize("family", TINY)
def test_vectors_are_the_hidden_states_and_putting_them_back_changes_nothing(family):
    model = TINY[family]().eval()
    ids = torch.randint(2, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
    for layer in (1, 3):
        reader = LanguageModel(TINY[family]().eval(), layer)
        reader._model.load_state_dict(model.state_dict())
        vectors = reader.vectors(ids)
        assert torch.equal(vectors, whole.hidden_states[layer])
        torch.testing.assert_close(reader.logits(ids, vectors), whole.logits)
        assert not torch.allclose(reader.logits(ids, vectors + 1), whole.logits)


def test_a_layer_may_be_a_share_of_the_depth(tmp_path):
    TINY["gpt2"]().save_pretrained(tmp_path)
    assert [layer_number(str(tmp_path), layer) for layer in (3, 0.5, 0.01, 0.9)] == [3, 2, 1, 4]
