"""Every causal family of transformers gives its own logits from its own vectors, or is refused with a sentence."""

import re

import pytest
import torch
import transformers

from causal_families import CLASS_NAMES, IDS, documented, outcome, table, tiny_model
from posmask.data.sites import LanguageModel
from posmask.errors import BadSetting

# Each of these differs from Llama in a way that a reader of vectors may get wrong.
CHOSEN = {
    "bloom": "tuples, sublayers that add the stream",
    "cohere2": "parallel sublayers, scaled logits, sliding windows",
    "falcon": "tuples",
    "gemma2": "soft-capped logits, norms after sublayers",
    "gemma4_text": "keys shared between layers, embeddings in each layer",
    "gpt_oss": "attention sinks, experts",
    "granite": "scaled contributions and logits",
    "jamba": "recurrent hybrid, experts",
    "mamba": "recurrent, no sublayers",
    "mixtral": "experts",
    "opt": "learned positions with an offset",
    "recurrent_gemma": "recurrent hybrid",
    "rwkv": "tuples, recurrent",
    "zamba2": "embeddings passed to later layers",
    "bert": "refused: not causal",
    "gemma3n_text": "refused: four streams",
}


def documented_line(model_type):
    (line,) = (line for line in documented() if f"`{model_type}`" in line)
    return line


IN_BFLOAT16 = ("bloom", "gemma2", "jamba", "rwkv")  # in `make test`; the others run in `make test-all`


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        *((model_type, torch.float32) for model_type in CHOSEN),
        *(
            pytest.param(model_type, torch.bfloat16, marks=[] if model_type in IN_BFLOAT16 else [pytest.mark.slow])
            for model_type in CHOSEN
        ),
    ],
)
def test_a_family_does_what_the_documentation_says(model_type, dtype):
    sites, reason = outcome(model_type, dtype)
    line = documented_line(model_type)
    if not sites:
        assert f"| none: {reason} |" in line
    elif len(sites) == 4:
        assert line.startswith("| all four |")
    else:
        assert re.findall(r"`(\w+)`", line.split("|")[1]) == list(sites)


def test_the_documentation_names_every_family_once():
    names = [name for line in documented() for name in re.findall(r"`([\w-]+)`", line.split("|")[2])]
    assert sorted(names) == sorted(CLASS_NAMES)


@pytest.mark.slow  # about 190 families
def test_the_table_of_families_is_what_posmask_does():
    assert documented() == table({model_type: outcome(model_type) for model_type in CLASS_NAMES})


def test_a_projection_between_layers_and_head_is_part_of_the_logits():
    model = tiny_model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)  # like OPT-350m
    reader = LanguageModel(model, 2)
    with torch.inference_mode():
        expected = model(IDS).logits
        vectors = LanguageModel(model, 4).vectors(IDS)
    assert torch.equal(reader.logits(IDS, reader.vectors(IDS)), expected)
    zeros = LanguageModel(model, 4).logits(IDS, torch.zeros_like(vectors))
    torch.testing.assert_close(reader.direct_logits(vectors[0]), expected[0] - zeros[0])


@pytest.mark.parametrize(("model_type", "name"), [("cohere2", "logit_scale"), ("granite", "logits_scaling")])
def test_direct_logits_are_scaled_like_the_model_s(model_type, name):
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    once, twice = (
        LanguageModel(tiny_model(model_type, **{name: scale}), 2).direct_logits(rows) for scale in (0.5, 1.0)
    )
    torch.testing.assert_close(twice, once * (2 if name == "logit_scale" else 0.5))


def test_direct_logits_are_capped_like_the_model_s():
    rows = 100 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    model = tiny_model("gemma2", final_logit_softcapping=0.5)
    assert float(LanguageModel(model, 2).direct_logits(rows).abs().max()) <= 1.0


def test_a_layer_that_adds_in_place_leaves_the_callers_vectors():
    class InPlace(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states += attention
            hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states

    def model():
        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.__class__ = InPlace
        return model

    with torch.inference_mode():
        expected = tiny_model("llama")(IDS).logits
    for site in ("residual_after", "residual_before", "attention", "mlp"):
        reader = LanguageModel(model(), 2, site)
        vectors = reader.vectors(IDS)
        assert torch.equal(vectors, LanguageModel(tiny_model("llama"), 2, site).vectors(IDS))
        before = vectors.clone()
        assert torch.equal(reader.logits(IDS, vectors), expected)
        assert torch.equal(vectors, before)


def test_layers_may_return_lists():
    model = tiny_model("bloom")
    with torch.inference_mode():
        expected = model(IDS).logits
    for layer in model.transformer.h:
        layer.register_forward_hook(lambda module, inputs, output: list(output))
    reader = LanguageModel(model, 2)
    assert torch.equal(reader.logits(IDS, reader.vectors(IDS)), expected)


def test_bidirectional_models_are_refused_and_their_decoders_work():
    with pytest.raises(BadSetting, match=r"BertLMHeadModel is not causal: vectors change by 0\.0\d+ of their norm"):
        LanguageModel(tiny_model("bert"), 2)
    model = tiny_model("bert", is_decoder=True)
    with torch.inference_mode():
        expected = model(IDS).logits
    reader = LanguageModel(model, 2)
    assert torch.equal(reader.logits(IDS, reader.vectors(IDS)), expected)


def carry_half_beside_the_stream(model):
    """Let each layer pass on half of its output in another way than the stream."""
    carried = []

    def join(module, args, kwargs):
        return ((args[0] + carried.pop(), *args[1:]), kwargs) if carried else None

    def split(module, inputs, output):
        carried[:] = [output / 2]
        return output / 2

    for number, layer in enumerate(model.model.layers):
        if number:
            layer.register_forward_pre_hook(join, with_kwargs=True)
        layer.register_forward_hook(split)


def test_layers_below_run_if_those_above_need_more_than_the_stream():
    model = tiny_model("llama")
    carry_half_beside_the_stream(model)
    with torch.inference_mode():
        expected = model(IDS).logits
    reader = LanguageModel(model, 2)
    vectors = reader.vectors(IDS)
    assert torch.equal(reader.logits(IDS, vectors), expected)
    assert not torch.allclose(reader.logits(IDS, 2 * vectors), expected, atol=1e-3)


def test_a_model_that_computes_other_logits_each_time_is_refused():
    model, calls = tiny_model("llama"), []
    model.model.norm.register_forward_hook(lambda module, inputs, output: calls.append(0) or output * len(calls))
    with pytest.raises(BadSetting, match=r"^residual_after of layer 4 of LlamaForCausalLM does not determine what fol"):
        LanguageModel(model, 2)


def test_a_site_without_effect_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    LanguageModel(model, 3)
    with pytest.raises(BadSetting, match=r"^residual_after of layer 2 of LlamaForCausalLM has no effect on the logits"):
        LanguageModel(model, 2)
