"""Tiny random models of every family that transformers' AutoModelForCausalLM maps to a class.

`python tests/causal_families.py` writes the table of families in docs/models.md.
"""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import get_args

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASS_NAMES

from posmask.data.sites import LanguageModel, Site
from posmask.errors import BadSetting

__all__ = ["CLASS_NAMES", "IDS", "PAGE", "documented", "outcome", "table", "tiny_config", "tiny_model"]

N_LAYERS = 4
LAYER = 3
IDS = torch.randint(16, 32, (3, 8), generator=torch.Generator().manual_seed(1))
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


_VALUES = (
    ("hidden_size d_model n_embd dim emb_dim model_dim embed_dim word_embed_proj_dim attention_hidden_size", 32),
    ("lru_width out_hidden_size hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size", 32),
    ("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers", N_LAYERS),
    ("depth n_shared_experts n_group topk_group num_expert_group n_groups", 1),
    ("mamba_n_groups mamba_ngroups bos_token_id", 1),
    ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    ("num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads mamba_num_heads mamba_dt_rank", 4),
    ("num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank laurel_rank index_topk", 4),
    ("sliding_window local_attention window_size attention_chunk_size sliding_window_size", 4),  # shorter than contexts
    ("patch_size mm_tokens_per_image zero_expert_num", 4),
    ("num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k index_n_heads linear_num_key_heads", 2),
    ("linear_num_value_heads n_mamba_heads mamba_expand num_kv_shared_layers eos_token_id", 2),
    ("head_dim attention_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim", 8),
    ("linear_key_head_dim linear_value_head_dim linear_head_dim ssm_state_size state_size mamba_d_state", 8),
    ("chunk_size mamba_chunk_size attention_window_size hidden_size_per_layer_input image_size dim_head", 8),
    ("swa_head_dim rel_extent index_block_size", 8),
    ("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size feed_forward_size", 48),
    ("dff d_ff dim_ff dense_intermediate_size shared_intermediate_size expert_ffn_hidden_size", 48),
    ("moe_intermediate_size shared_expert_intermediate_size qk_head_dim index_head_dim mamba_d_head", 16),
    ("mamba_head_dim embedding_size", 16),
    ("max_position_embeddings n_positions n_ctx max_seq_len context_length seq_length max_sequence_length", 64),
    ("vocab_size vocab_size_per_layer_input", 64),
    ("pad_token_id", 0),
    ("num_channels", 3),
    ("image_token_id", 60),
    ("audio_token_id", 61),
    ("video_token_id", 62),
)
_SIZES = {name: value for names, value in _VALUES for name in names.split()}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS = {"head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8}
_DOTS |= {"swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
_DRAFTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
_DRAFT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": N_LAYERS, **_MIXED}
_INDEXED = {"indexer_budget": 8, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1}
_INDEXED |= {"indexer_head_dim": 8}
_CHANGES = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "dots3_note": {"text_config": _DOTS, "vision_config": {"mlp_layer_types": ["dense"] * N_LAYERS}},
    "dots3_note_text": _DOTS,
    "falcon_h1": {"mamba_d_ssm": None},
    "gemma4": {"text_config": _MIXED},
    "gemma4_text": _MIXED,
    "gemma4_unified": {"text_config": _MIXED},
    "gemma4_unified_text": _MIXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 16},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type):
    """The configuration of a family with small sizes and two to four layers of each kind."""
    if model_type in _DRAFTS:
        return CONFIG_MAPPING[model_type](text_config=_tiny(CONFIG_MAPPING[_DRAFTS[model_type]], _DRAFT))
    return _tiny(CONFIG_MAPPING[model_type], _CHANGES.get(model_type, {}))


def _tiny(kind, changes):
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in _SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # Latent attention has no fewer heads of keys and values.
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "qk_rope_head_dim" in names:
        values.pop("head_dim", None)
    if "rotary_dim" in names:
        values["rotary_dim"] = 4
    default = kind()
    for name in names:
        with contextlib.suppress(Exception):  # Some attributes exist per layer only.
            if isinstance(part := getattr(default, name, None), transformers.PreTrainedConfig):
                values[name] = _tiny(type(part), changes.get(name, {}))
    parts = {name: value for name, value in changes.items() if name not in values or not isinstance(value, dict)}
    return kind(**{**values, **parts})


def tiny_model(model_type, dtype=torch.float32, **changes):
    """A random model of a family; `changes` are set in its configuration."""
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # Norms of 1 and biases of 0 would hide errors.
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def outcome(model_type, dtype=torch.float32):
    """The sites of a family at which its own vectors give its own logits; or why there are none.

    Raises:
        AssertionError: posmask offers a site at which they do not.
    """
    sites, refusals = [], []
    try:
        model = tiny_model(model_type, dtype)
    except Exception:
        return (), "transformers does not build it, or needs other packages to"
    for site in get_args(Site):
        try:
            reader = LanguageModel(model, LAYER, site)
        except BadSetting as error:
            refusals.append(str(error))
            continue
        with torch.inference_mode():
            expected = model(input_ids=IDS, use_cache=False).logits
        vectors = reader.vectors(IDS)
        before = vectors.clone()
        error = (reader.logits(IDS, vectors) - expected).norm() / expected.norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 5e-3), f"{model_type}: other logits at {site}"
        assert torch.equal(vectors, before), f"{model_type}: replaced vectors are changed at {site}"
        assert reader.direct_logits(vectors[0].float()).shape == (8, expected.shape[-1])
        assert min(reader.n_parameters()) > 0
        sites.append(site)
    return tuple(sites), "" if sites else _in_short(refusals[0])


_REASONS = {
    "is not causal": "vectors depend on later tokens (unless `is_decoder` is set in its config.json)",
    "not one residual stream": "its layers pass on several streams, or vectors of another shape",
    "layers in one list": "its layers are not in one list",
    "cannot run on token ids alone": "it needs more inputs than token ids",
    "no decoder that posmask can read": "it has no list of layers",
    "cannot be replaced": "its layers return more than a stream",
}


def _in_short(message):
    reasons = [reason for words, reason in _REASONS.items() if words in message]
    assert reasons, message
    return reasons[0]


def table(outcomes):
    """The lines of the table of families, from the outcome of each."""
    families = {}
    for model_type, result in outcomes.items():
        families.setdefault(result, []).append(f"`{model_type}`")
    lines = ["| sites | families |", "|---|---|"]
    for sites, reason in sorted(families, key=lambda result: (-len(result[0]), result[1])):
        words = "all four" if len(sites) == N_SITES else ", ".join(f"`{site}`" for site in sites)
        lines.append(f"| {words or f'none: {reason}'} | {', '.join(families[sites, reason])} |")
    return lines


N_SITES = len(get_args(Site))
_TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end of families -->)", re.DOTALL)


def documented():
    """The lines of the table in docs/models.md."""
    return _TABLE.search(PAGE.read_text())[0].split("\n")[:-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = table({model_type: outcome(model_type) for model_type in CLASS_NAMES})
    PAGE.write_text(_TABLE.sub("".join(f"{line}\n" for line in lines), PAGE.read_text()))
