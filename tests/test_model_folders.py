"""Model folders as users bring them: adapters, quantized weights, no tokenizer, stray files, too many token ids."""

import json

import pytest
import torch
import transformers

from conftest import N_POSITIONS
from posmask.data.harvest import harvest
from posmask.data.models import load_model, load_outline, load_tokenizer, weights_identity
from posmask.data.sites import LanguageModel
from posmask.data.tokens import pad
from posmask.errors import BadSetting
from test_model import GROUPED
from test_model_hub import local_hub  # noqa: F401 (a fixture)

ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "user/base"})
LOADS = {
    "model": lambda name: load_model(name, 1, "float32"),
    "outline": lambda name: load_outline(name, 1),
    "tokenizer": load_tokenizer,
    "identity": weights_identity,
}


@pytest.fixture
def folder(tmp_path, tokenizer):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_adapter_beside_a_model_or_alone_is_refused(load, folder, tmp_path):
    load(str(folder))
    (folder / "adapter_config.json").write_text(ADAPTER)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "adapter_config.json").write_text(ADAPTER)
    for name in (str(folder), str(tmp_path / "alone")):
        with pytest.raises(BadSetting, match=r"holds an adapter \(adapter_config\.json\), .*: merge it into its model"):
            load(name)


def test_an_adapter_on_the_hub_is_refused(local_hub, folder):  # noqa: F811
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    local_hub.files["user/plain"] = files
    local_hub.files["user/beside"] = {**files, "adapter_config.json": ADAPTER.encode()}
    local_hub.files["user/alone"] = {"adapter_config.json": ADAPTER.encode()}
    load_model("user/plain", 1, "float32")
    for name in ("user/beside", "user/alone"):
        with pytest.raises(BadSetting, match=rf"^model '{name}' holds an adapter"):
            load_model(name, 1, "float32")


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["quant_method"],
)
def test_quantized_weights_without_their_package_raise_an_error(settings, package, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(
        BadSetting, match=rf"cannot be loaded \(.*{package}.*\): install the package, or choose"
    ) as caught:
        load_model(str(folder), 1, "float32")
    assert "\n" not in str(caught.value)


def test_a_model_that_transformers_cannot_build_raises_an_error(folder):
    parts = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
    decoder = {"decoder": {"model_type": "musicgen_decoder"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "musicgen", **parts, **decoder}))
    with pytest.raises(
        BadSetting, match=r"cannot be loaded \(AttributeError in transformers: .*: choose a model of an"
    ):
        load_model(str(folder), 1, "float32")
    with pytest.raises(BadSetting, match=r"has no config\.json of a causal language model"):
        load_outline(str(folder), 1)


def test_a_model_without_a_tokenizer_raises_an_error(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    load_model(str(folder), 1, "float32")
    with pytest.raises(BadSetting, match=r"^model .* cannot be loaded \(it has no tokenizer\): add tokenizer\.json"):
        load_tokenizer(str(folder))


def test_the_identity_covers_configuration_weights_and_tokenizer_only(folder):
    before = weights_identity(str(folder))
    for name in ("README.md", ".DS_Store", "._model.safetensors", "notes.txt", "trainer_state.json", "old.bin"):
        (folder / name).write_text("stray")
    (folder / "checkpoint-100").mkdir()
    assert weights_identity(str(folder)) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert weights_identity(str(folder)) != before, name
        (folder / name).write_bytes(content)
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "special_tokens_map.json"):
        (folder / name).write_text("{}")
        assert weights_identity(str(folder)) != before, name
        (folder / name).unlink()


def of_ten_ids():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "vocab_size": 10})).eval()


def test_token_ids_beyond_the_embedding_raise_an_error_before_the_harvest(tokenizer, tmp_path):
    reader = LanguageModel(of_ten_ids(), 2)
    with pytest.raises(BadSetting, match=r"^the tokenizer gave the id 22, but the model's embedding has 10 rows: take"):
        harvest(pad(["red or blue"], tokenizer, N_POSITIONS), reader, tmp_path / "a", {}, "a")
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_tokenizer_with_unused_ids_beyond_the_embedding_works(tokenizer, tmp_path):
    reader = LanguageModel(of_ten_ids(), 2)
    activations = harvest(pad(["red blue"], tokenizer, N_POSITIONS), reader, tmp_path / "a", {}, "a")
    assert activations.n_kept == 2
    assert bool(torch.isfinite(activations.batch(torch.arange(3)).vectors).all())
