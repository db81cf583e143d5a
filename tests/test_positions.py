"""Positions follow a model's KV cache and padding, so that generated and padded tokens get the codes of a full pass."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from causal_families import N_LAYERS, tiny_model
from conftest import N_POSITIONS, make_sae
from posmask.errors import BadSetting
from posmask.interop.positions import positions_of

LENGTH, NEW, D_MODEL = 7, 6, 32
PROMPT = torch.randint(16, 32, (2, LENGTH), generator=torch.Generator().manual_seed(1))
PADDING = 3
PADDED = torch.cat([torch.zeros(2, PADDING, dtype=torch.int64), PROMPT], 1)
ATTENTION = (PADDED > 0).long()
FAMILIES = ["llama", "gpt2", "gemma3_text", "bloom"]
"""Rotary and absolute positions, sliding windows shorter than the text, and no positions in the inputs."""


@pytest.fixture(scope="module")
def sae():
    """An SAE of few latents per position, in SAELens if it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sae_lens", reason="SAELens is not installed: pip install -e '.[saelens]'")
        from posmask.interop.saelens import as_saelens
    return as_saelens(make_sae("slice", rule="relu", d_model=D_MODEL, n_slices=8))


@contextmanager
def codes_of_passes(model, sae):
    """Encode the residual stream after the second layer in each pass; yields the codes of all tokens so far."""
    (layers,) = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == N_LAYERS)
    codes = []

    def encode(module, inputs, output):
        codes.append(sae.encode(output[0] if isinstance(output, tuple) else output))

    handle = layers[1].register_forward_hook(encode)
    try:
        yield codes
    finally:
        handle.remove()


def full_pass(model, sae, ids):
    """The codes of a pass over whole texts without padding, whose positions the shape shows."""
    with codes_of_passes(model, sae) as codes, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return codes[0]


def generate(model, ids, **inputs):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, **inputs, **options)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "lfm2"])  # lfm2: convolutions, too
def test_generation_gives_the_codes_of_a_full_pass(sae, family, cached):
    model = tiny_model(family)
    with codes_of_passes(model, sae) as codes, positions_of(model) as positions, sae.at(positions):
        ids = generate(model, PROMPT, attention_mask=torch.ones_like(PROMPT), use_cache=cached)
    assert codes[1].shape[1] == (1 if cached else LENGTH + 1)
    expected = full_pass(model, sae, ids[:, :-1])
    made = torch.cat(codes, 1) if cached else codes[-1]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert expected.count_nonzero() > 30


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_count(sae, family):
    model = tiny_model(family)
    with codes_of_passes(model, sae) as codes, positions_of(model) as positions, sae.at(positions):
        ids = generate(model, PADDED, attention_mask=ATTENTION)
    expected = full_pass(model, sae, ids[:, PADDING:-1])
    torch.testing.assert_close(torch.cat(codes, 1)[:, PADDING:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_a_cache_without_a_length_is_an_error(family):
    model = tiny_model(family)
    with positions_of(model) as positions, torch.no_grad():
        state = model(input_ids=PROMPT, use_cache=True)
        model(input_ids=PROMPT[:, :1], **{name: state[name] for name in ("cache_params", "state") if name in state})
        with pytest.raises(BadSetting, match=r"a pass of 1 tokens with .* does not show their positions"):
            positions()


def test_texts_of_several_lengths_are_padded_on_the_left(sae):
    model = tiny_model("llama")
    ids = PROMPT.clone()
    ids[1, :PADDING] = 0
    with codes_of_passes(model, sae) as codes, positions_of(model) as positions, sae.at(positions), torch.no_grad():
        model(input_ids=ids, attention_mask=(ids > 0).long())
        assert positions().tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 2, 3]]
    torch.testing.assert_close(codes[0][:1], full_pass(model, sae, ids[:1]), atol=1e-4, rtol=1e-4)
    shorter = full_pass(model, sae, ids[1:, PADDING:])
    torch.testing.assert_close(codes[0][1:, PADDING:], shorter, atol=1e-4, rtol=1e-4)


def test_positions_are_those_of_the_inputs():
    model = tiny_model("llama")
    cache = model(input_ids=PROMPT).past_key_values
    with positions_of(model) as positions, torch.no_grad():
        with pytest.raises(BadSetting, match="the model has made no pass yet"):
            positions()
        model(PROMPT)
        assert positions().tolist() == [list(range(LENGTH))] * 2
        model(inputs_embeds=model.get_input_embeddings()(PROMPT), position_ids=torch.arange(3, 3 + LENGTH)[None])
        assert positions().tolist() == [list(range(3, 3 + LENGTH))] * 2
        model.model(input_ids=PROMPT[:, :2], past_key_values=cache)  # the model without its head
        assert positions().tolist() == [[LENGTH, LENGTH + 1]] * 2
        mask = torch.zeros(2, 1, LENGTH, LENGTH)
        model(PROMPT, attention_mask=mask)
        with pytest.raises(BadSetting, match=r"a pass of 7 tokens with an attention mask \[2, 1, 7, 7\] .* not show"):
            positions()
    before = positions._latest
    model(PROMPT)
    assert positions._latest is before  # The model is not followed any more.


HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_a_hooked_transformer_is_followed_too(sae, padded, local):
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache

    torch.manual_seed(0)
    settings = {"n_layers": 3, "d_model": D_MODEL, "n_ctx": 32, "d_head": 8, "n_heads": 4, "d_vocab": 64}
    settings |= {"act_fn": "gelu", "positional_embedding_type": "rotary", "rotary_dim": 8, "device": "cpu"}
    if local:
        settings |= {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global", "local"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**settings)).eval()
    ids = torch.cat([PROMPT, PROMPT], 1)
    expected = sae.encode(model.run_with_cache(ids, names_filter=HOOK)[1][HOOK])
    codes = []

    def encode(vectors, hook):
        codes.append(sae.encode(vectors))

    cache = Cache.init_cache(model.cfg, "cpu", 2)
    parts = torch.cat([PADDED, PROMPT], 1) if padded else ids
    hooks = [(HOOK, encode)]
    with positions_of(model) as positions, sae.at(positions), model.hooks(fwd_hooks=hooks), torch.no_grad():
        for part in parts.split([9, 1, parts.shape[1] - 10], 1):
            model(part, past_kv_cache=cache, attention_mask=(part > 0).long())
    made = torch.cat(codes, 1)[:, PADDING if padded else 0 :]
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert N_POSITIONS >= 2 * LENGTH


def test_a_transformer_bridge_is_followed_too(model_folder):
    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransformerBridge.boot_transformers(str(model_folder))
    seen = []
    ids = torch.tensor([[0, 0, 1, 5, 6], [1, 7, 8, 9, 10]])
    hooks = [("blocks.1.hook_out", lambda vectors, hook: seen.append(positions().tolist()))]
    with positions_of(model) as positions, model.hooks(fwd_hooks=hooks), torch.no_grad():
        model(ids, attention_mask=(ids > 0).long())
        model.generate(ids[1:], max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert seen == [[[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]], [[5]], [[6]]]


def test_a_mask_that_counts_from_elsewhere_is_not_followed(sae):
    from posmask.interop.saelens import as_saelens

    counts_sentences = as_saelens(make_sae("slice", d_model=D_MODEL, position_origin="sentence"))
    model = tiny_model("llama")
    with positions_of(model) as positions, counts_sentences.at(positions), torch.no_grad():
        vectors = model(PROMPT, output_hidden_states=True).hidden_states[1]
        with pytest.raises(BadSetting, match="counts positions from the sentence, which a model's inputs do not show"):
            counts_sentences.encode(vectors)


def test_other_models_are_refused():
    with pytest.raises(BadSetting, match="a Linear cannot be followed: give a model of"), positions_of(nn.Linear(2, 2)):
        pass
