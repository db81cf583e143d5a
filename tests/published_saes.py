"""Small SAEs in the files, names and settings of published releases: what SAELens's list names, with tiny tensors.

Settings have the keys of the published files. SAELens takes some sizes from names; `OVERRIDES` makes these small.
"""

import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from conftest import D_MODEL

EXPANSION = 5
D_SAE = EXPANSION * D_MODEL
LLAMA_FACTOR = 5.91907514450867
"""Factor of the vectors' norm of llama_scope_lxr_8x, layer 15, in SAELens's list."""
OVERRIDES = {"d_in": D_MODEL, "d_sae": D_SAE}


@dataclass(frozen=True)
class Published:
    """One SAE: its names in SAELens's list and on the hub, its files, and what posmask should say about it.

    `files` are by path in the repository. `centered`: SAELens expects vectors without their mean.
    """

    release: str
    sae_id: str
    repo: str
    path: str
    files: dict[str, bytes]
    site: tuple[int, str]
    model: str
    rule: str
    context_size: int | None = None
    needs_overrides: bool = False
    centered: bool = False
    only_listed: bool = False
    """Whether its files alone lack facts of SAELens's list."""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self):
        return f"saelens:{self.release}/{self.sae_id}"

    @property
    def is_pickled(self):
        return any(name.endswith((".pt", ".pth")) for name in self.files)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def decoder(*, unit=True):
    rows = draw(D_SAE, D_MODEL, seed=1)
    return rows / rows.norm(dim=1, keepdim=True) if unit else rows


def standard(**more):
    names = {"W_enc": draw(D_MODEL, D_SAE), "b_enc": draw(D_SAE), "W_dec": decoder(unit=False), "b_dec": draw(D_MODEL)}
    return names | more


def npz(tensors):
    out = io.BytesIO()
    np.savez(out, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return out.getvalue()


def pickled(content):
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def in_folder(folder, files):
    values = {f"{folder}/{name}" if folder else name: value for name, value in files.items()}
    return {name: json.dumps(value).encode() if isinstance(value, dict) else value for name, value in values.items()}


def linear(tensors, encoder="encoder", decoder="decoder", bias=".bias"):
    """The tensors of two linear layers, which have the transposed shapes."""
    names = {f"{encoder}.weight": tensors["W_enc"].T, f"{encoder}.bias": tensors["b_enc"]}
    names |= {f"{decoder}.weight": tensors["W_dec"].T, f"{decoder}{bias}": tensors["b_dec"]}
    return {name: tensor.contiguous() for name, tensor in names.items()}


def gemma_scope():
    path, threshold = "layer_12/width_16k/average_l0_41", draw(D_SAE).abs()
    for repo, site in (("res", "residual_after"), ("mlp", "mlp")):
        ids = {"res": path, "mlp": "layer_12/width_16k/average_l0_44"}
        content = {"params.npz": npz(standard(threshold=threshold))}
        yield Published(
            f"gemma-scope-2b-pt-{repo}",
            ids[repo],
            f"google/gemma-scope-2b-pt-{repo}",
            ids[repo],
            in_folder(ids[repo], content),
            (13, site),
            "google/gemma-2-2b",
            "jumprelu",
            needs_overrides=True,
        )


def gemma_scope_2():
    tensors = {name.lower(): tensor for name, tensor in standard(threshold=draw(D_SAE).abs()).items()}
    for kind, suffix, hook in (
        ("resid_post", "res", "model.layers.12.output"),
        ("mlp_out", "mlp", "model.layers.12.post_feedforward_layernorm.output"),
    ):
        path = f"{kind}/layer_12_width_16k_l0_big"
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": hook}
        yield Published(
            f"gemma-scope-2-270m-pt-{suffix}",
            "layer_12_width_16k_l0_big",
            "google/gemma-scope-2-270m-pt",
            path,
            in_folder(path, {"config.json": config, "params.safetensors": save(tensors)}),
            (13, "residual_after" if suffix == "res" else "mlp"),
            "google/gemma-3-270m",
            "jumprelu",
        )


def llama_scope():
    path = "Llama3_1-8B-Base-L15R-8x"
    settings = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.7,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": D_MODEL**0.5 / LLAMA_FACTOR, "out": 1.0},
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
    }
    weights = {"checkpoints/final.safetensors": save(linear(standard()))}
    yield Published(
        "llama_scope_lxr_8x",
        "l15r_8x",
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        path,
        in_folder(path, {"hyperparams.json": settings, **weights}),
        (16, "residual_after"),
        "meta-llama/Llama-3.1-8B",
        "jumprelu",
    )
    path = "800M-Slimpajama-0-OpenR1-Math-220k/L0R"
    settings = {"d_model": D_MODEL, "expansion_factor": EXPANSION, "hook_point_in": "blocks.0.hook_resid_post"}
    tensors = linear(standard()) | {"log_jumprelu_threshold": draw(D_SAE)}
    yield Published(
        "llama_scope_r1_distill",
        "l0r_800m_slimpajama",
        "fnlp/Llama-Scope-R1-Distill",
        path,
        in_folder(path, {"config.json": settings, "sae_weights.safetensors": save(tensors)}),
        (1, "residual_after"),
        "meta-llama/Llama-3.1-8B",
        "jumprelu",
        only_listed=True,
    )


def dictionary_learning():
    """SAEBench's and andyrdt's releases; the classes of dictionary_learning name tensors differently."""
    threshold = torch.tensor(0.4)
    gated = {"encoder.weight": draw(D_SAE, D_MODEL), "decoder.weight": decoder().T.contiguous()}
    gated |= {"decoder_bias": draw(D_MODEL), "gate_bias": draw(D_SAE), "mag_bias": draw(D_SAE)}
    batch_topk = linear(standard(), bias=".bias")
    batch_topk["b_dec"] = batch_topk.pop("decoder.bias")
    topk = {**batch_topk, "decoder.weight": decoder().T.contiguous()}
    relu = linear(standard())
    relu["bias"] = relu.pop("decoder.bias")
    counts = {"k": torch.tensor(4), "threshold": threshold}
    classes = {
        "AutoEncoder": ("relu", relu),
        "GatedAutoEncoder": ("gated", gated | {"r_mag": 0.3 * draw(D_SAE)}),
        "JumpReluAutoEncoder": ("jumprelu", standard(threshold=draw(D_SAE).abs())),
        "AutoEncoderTopK": ("topk", topk | counts),
        "BatchTopKSAE": ("jumprelu", batch_topk | counts),
        "MatryoshkaBatchTopKSAE": ("jumprelu", standard(**counts)),
    }
    at = {
        "AutoEncoder": ("sae_bench_pythia70m_sweep_standard_ctx128_0712", "blocks.3.hook_resid_post__trainer_10"),
        "GatedAutoEncoder": ("sae_bench_pythia70m_sweep_gated_ctx128_0730", "blocks.3.hook_resid_post__trainer_0"),
        "JumpReluAutoEncoder": (
            "sae_bench_pythia70m_sweep_panneal_ctx128_0730",
            "blocks.3.hook_resid_post__trainer_16",
        ),
        "AutoEncoderTopK": ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.12.hook_resid_post__trainer_0"),
        "BatchTopKSAE": ("llama-3.1-8b-instruct-andyrdt", "resid_post_layer_3_trainer_1"),
        "MatryoshkaBatchTopKSAE": (
            "saebench_gemma-2-2b_width-2pow12_date-0108",
            "blocks.12.hook_resid_post__trainer_0",
        ),
    }
    places = {
        "AutoEncoder": ("canrager/lm_sae", "pythia70m_sweep_standard_ctx128_0712/resid_post_layer_3/trainer_10"),
        "GatedAutoEncoder": ("canrager/lm_sae", "pythia70m_sweep_gated_ctx128_0730/resid_post_layer_3/trainer_0"),
        "JumpReluAutoEncoder": ("canrager/lm_sae", "pythia70m_sweep_panneal_ctx128_0730/resid_post_layer_3/trainer_16"),
        "AutoEncoderTopK": (
            "canrager/saebench_gemma-2-2b_width-2pow12_date-1109",
            "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_12/trainer_0",
        ),
        "BatchTopKSAE": ("andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_3/trainer_1"),
        "MatryoshkaBatchTopKSAE": (
            "adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108",
            "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_0",
        ),
    }
    for name, (rule, tensors) in classes.items():
        (release, sae_id), (repo, path) = at[name], places[name]
        layer = 12 if "layer_12" in path else 3
        trainer = {"dict_class": name, "activation_dim": D_MODEL, "dict_size": D_SAE, "layer": layer, "k": 4}
        trainer |= {"lm_name": "org/the-model", "submodule_name": f"resid_post_layer_{layer}", "seed": 0}
        config = {"trainer": trainer, "buffer": {"d_submodule": D_MODEL, "io": "out", "ctx_len": 128}}
        files = in_folder(path, {"config.json": config, "ae.pt": pickled(tensors)})
        yield Published(
            release,
            sae_id,
            repo,
            path,
            files,
            (layer + 1, "residual_after"),
            "org/the-model",
            rule,
            context_size=128,
        )


def checkpoints():
    tensors = standard(W_dec=decoder())
    qwen = {**tensors, "W_enc": tensors["W_enc"].T.contiguous(), "W_dec": tensors["W_dec"].T.contiguous()}
    yield Published(
        "qwen-scope-3-1.7b-base-w32k-l50",
        "layer0",
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
        "layer0.sae.pt",
        {"layer0.sae.pt": pickled(qwen)},
        (1, "residual_after"),
        "Qwen/Qwen3-1.7B-Base",
        "topk",
        needs_overrides=True,
    )
    goodfire = linear(standard(), "encoder_linear", "decoder_linear")
    yield Published(
        "goodfire-llama-3.1-8b-instruct",
        "layer_19",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        {"Llama-3.1-8B-Instruct-SAE-l19.pth": pickled(goodfire)},
        (20, "residual_after"),
        "meta-llama/Llama-3.1-8B-Instruct",
        "relu",
        needs_overrides=True,
    )
    yield Published(
        "deepseek-r1-distill-llama-8b-qresearch",
        "blocks.19.hook_resid_post",
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        {"DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": pickled(linear(standard()))},
        (20, "residual_after"),
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "relu",
        needs_overrides=True,
    )


def saelens():
    """SAELens's own folders: of version 6 (matryoshka), and of versions before with settings of many names."""
    path = "standard/blocks.0.hook_resid_post"
    cfg = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    cfg["metadata"] = {
        "sae_lens_version": "6.0.0",
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.0.hook_resid_post",
        "hook_head_index": None,
        "context_size": 1024,
        "prepend_bos": True,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
    }
    tensors = standard(threshold=draw(D_SAE).abs())
    yield Published(
        "gemma-2-2b-res-matryoshka-dc",
        "blocks.0.hook_resid_post",
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
        path,
        in_folder(path, {"cfg.json": cfg, "sae_weights.safetensors": save(tensors)}),
        (1, "residual_after"),
        "gemma-2-2b",
        "jumprelu",
        context_size=1024,
    )
    old = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "expansion_factor": 32,
        "l1_coefficient": 8e-05,
        "lr": 0.0004,
        "device": "mps",
    }
    path = "blocks.8.hook_resid_pre"
    weights = standard(scaling_factor=torch.ones(D_SAE))
    yield Published(
        "gpt2-small-res-jb",
        "blocks.8.hook_resid_pre",
        "jbloom/GPT2-Small-SAEs-Reformatted",
        path,
        in_folder(path, {"cfg.json": old, "sae_weights.safetensors": save(weights)}),
        (8, "residual_after"),
        "gpt2-small",
        "relu",
        context_size=128,
        centered=True,
        only_listed=True,
        metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}},
    )
    topk = {**old, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "sae_lens_version": "4.3.1"}
    topk |= {"model_name": "pythia-70m-deduped", "prepend_bos": False, "normalize_activations": False}
    path = "0-mlp-sm"
    topk["hook_name"] = "blocks.0.hook_mlp_out"
    del topk["hook_point"]
    yield Published(
        "pythia-70m-deduped-mlp-sm",
        "blocks.0.hook_mlp_out",
        "ctigges/pythia-70m-deduped__mlp-sm_processed",
        path,
        in_folder(path, {"cfg.json": topk, "sae_weights.safetensors": save(standard(W_dec=decoder()))}),
        (1, "mlp"),
        "pythia-70m-deduped",
        "topk",
        context_size=128,
        metadata={"prepend_bos": False},
    )
    scaled = {**old, "hook_point": "blocks.3.hook_mlp_out", "normalize_activations": "expected_average_only_in"}
    path = "sae_group_gpt2_blocks.3.hook_mlp_out_24576:v0"
    yield Published(
        "gpt2-small-mlp-tm",
        "blocks.3.hook_mlp_out",
        "tommmcgrath/gpt2-small-mlp-out-saes",
        path,
        in_folder(path, {"cfg.json": scaled, "sae_weights.safetensors": save(standard())}),
        (4, "mlp"),
        "gpt2-small",
        "relu",
        context_size=128,
        centered=True,
        only_listed=True,
    )


PUBLISHED = [
    *gemma_scope(),
    *gemma_scope_2(),
    *llama_scope(),
    *dictionary_learning(),
    *checkpoints(),
    *saelens(),
]
