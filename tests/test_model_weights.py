"""Models with missing weights raise an error; complete models load the same weights every time."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from posmask.data.gguf import convert_gguf
from posmask.data.models import load_model
from posmask.errors import BadSetting, MissingAsset
from reliability.gguf_model import write_tiny_gguf
from test_model import GROUPED, IDS, TINY

LLAMA = transformers.LlamaConfig(**GROUPED)
TIED = transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)


def save(folder, config=LLAMA, edit=None, **options):
    """Write a random model; `edit` maps its tensors to the stored ones."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    if edit is not None:
        edit_tensors(folder / "model.safetensors", edit)
    return str(folder)


def edit_tensors(path, edit):
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def assert_loads_the_same_twice(name):
    first, second = (load_model(name, 3, "float32") for _ in range(2))
    vectors = first.vectors(IDS)
    assert torch.equal(second.vectors(IDS), vectors)
    assert torch.equal(second.logits(IDS, vectors), first.logits(IDS, vectors))


@pytest.mark.parametrize("family", TINY)
def test_complete_models_of_all_families_load_silently(family, tmp_path, capsys):
    name = save(tmp_path, TINY[family])
    capsys.readouterr()
    assert_loads_the_same_twice(name)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors,
        lambda tensors: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()},
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    ],
    ids=["embedding alone", "head alone", "both"],
)
def test_a_tied_head_need_not_be_stored(edit, tmp_path):
    assert_loads_the_same_twice(save(tmp_path, TIED, edit))


def test_sharded_models_and_those_without_a_base_prefix_load(tmp_path):
    assert_loads_the_same_twice(save(tmp_path / "sharded", max_shard_size="10KB"))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    bare = save(tmp_path / "bare", edit=lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    assert_loads_the_same_twice(bare)


@pytest.mark.parametrize(
    ("config", "edit", "message"),
    [
        (
            LLAMA,
            without("layers.1.mlp"),
            r"lacks 3 weights of LlamaForCausalLM \(model\.layers\.1\.mlp\.down_proj\.weight, .*up_proj\.weight\), "
            "which would be random: get all of its files",
        ),
        (LLAMA, without("layers.2."), r"lacks 9 weights .*, \.\.\.\), which would be random"),
        (LLAMA, without("lm_head"), r"lacks 1 weights of LlamaForCausalLM \(lm_head\.weight\)"),
        (TIED, without("embed_tokens"), r"lacks 2 weights of LlamaForCausalLM \(lm_head\.weight, model\.embed_tokens"),
        (
            LLAMA,
            lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
            r"lacks 39 weights .* but has 39 other tensors \(module\.lm_head\.weight, .*\): rename these",
        ),
        (
            LLAMA,
            lambda tensors: {**tensors, "model.norm.weight": torch.ones(8)},
            r"has 1 weights that do not fit its configuration \(model\.norm\.weight of shape \[8\] instead of \[16\]\)",
        ),
        (
            transformers.MixtralConfig(**GROUPED, num_local_experts=2),
            without("layers.1.block_sparse_moe.experts.1."),
            "that do not fit its configuration",
        ),
        (
            transformers.MixtralConfig(**GROUPED, num_local_experts=2),
            without("layers.1.block_sparse_moe.experts.1.w1"),
            "do not combine into its layers",
        ),
    ],
    ids=["sublayer", "layer", "head", "tied head", "prefixed", "shape", "expert", "part of an expert"],
)
def test_missing_weights_raise_an_error(config, edit, message, tmp_path):
    name = save(tmp_path, config, edit)
    with pytest.raises(BadSetting, match=message) as caught:
        load_model(name, 1, "float32")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_shards_raise_an_error(tmp_path):
    save(tmp_path / "complete", max_shard_size="10KB")
    for case in ("tensor", "entry", "file", "end"):
        shutil.copytree(tmp_path / "complete", tmp_path / case)
    dropped = "model.layers.0.mlp.up_proj.weight"
    index = json.loads((tmp_path / "complete" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][dropped]
    edit_tensors(tmp_path / "tensor" / shard, without(dropped))
    del index["weight_map"][dropped]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
    (tmp_path / "entry" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "entry" / shard).unlink()
    (tmp_path / "file" / shard).unlink()
    (tmp_path / "end" / shard).write_bytes((tmp_path / "complete" / shard).read_bytes()[:-100])
    for case, message in (
        ("tensor", rf"lacks 1 weights of LlamaForCausalLM \({dropped}\)"),
        ("entry", r"lacks \d+ weights of LlamaForCausalLM"),
        ("file", rf"cannot be loaded \(No such file or directory: .*{shard}\)"),
        ("end", r"cannot be loaded \(Error while deserializing header: .*\)"),
    ):
        with pytest.raises(BadSetting, match=message):
            load_model(str(tmp_path / case), 1, "float32")


def test_ignored_tensors_are_reported_in_a_single_line(tmp_path, capsys):
    name = save(
        tmp_path, edit=lambda tensors: {**tensors, "vision.weight": torch.ones(2), "vision.bias": torch.ones(2)}
    )
    capsys.readouterr()
    load_model(name, 1, "float32")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"Ignoring 2 tensors of model {name!r} that LlamaForCausalLM does not have (vision.bias, vision.weight)."
    )


def write_gguf(path, monkeypatch, dropped=None, **options):
    """Write the tiny GGUF model without the tensors whose name contains `dropped`."""

    class Writer(gguf.GGUFWriter):
        def __init__(self, path, architecture):
            super().__init__(path, architecture, **options)

        def add_tensor(self, name, tensor):
            if dropped is None or dropped not in name:
                super().add_tensor(name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_tiny_gguf(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("dropped", "missing"),
    [
        ("blk.1.ffn_up", r"1 weights of LlamaForCausalLM \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        ("blk.1.", r"9 weights of LlamaForCausalLM \(model\.layers\.1\.input_layernorm\.weight, .*, \.\.\.\)"),
        ("token_embd", r"1 weights of LlamaForCausalLM \(model\.embed_tokens\.weight\)"),
    ],
)
def test_a_gguf_file_with_missing_tensors_raises_an_error(dropped, missing, cache, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, monkeypatch, dropped)
    for _ in range(2):
        with pytest.raises(BadSetting, match=rf"tiny\.gguf lacks {missing}, which would be random: get all"):
            load_model(str(path), 1, "float32")
    assert not list(cache.glob("models/*/config.json"))


def test_parts_of_a_split_gguf_file_raise_an_error(cache, tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", monkeypatch, split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in parts:
        with pytest.raises(BadSetting, match=rf"{path.name} is one of 3 parts .*: merge them with `llama-gguf-split"):
            load_model(str(path), 1, "float32")


def test_a_truncated_gguf_file_raises_an_error(cache, tmp_path):
    complete, truncated = tmp_path / "complete.gguf", tmp_path / "truncated.gguf"
    write_tiny_gguf(complete)
    content = complete.read_bytes()
    for n_bytes in (0, 10, 200, 1000, len(content) // 2, len(content) - 40):
        truncated.write_bytes(content[:n_bytes])
        with pytest.raises(MissingAsset, match=r"truncated\.gguf cannot be read as GGUF \(.*\): fetch it again"):
            load_model(str(truncated), 1, "float32")


def test_a_gguf_file_converts_to_the_same_weights_each_time(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, monkeypatch, dropped=None)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        convert_gguf(path, tmp_path / folder)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name].float(), second[name].float()) for name in first)
