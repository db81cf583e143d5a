"""Reading and replacing vectors gives the right result in every family of decoder models."""

import copy
import functools
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
import transformers
from torch import nn

from posmask.data import embedded, models
from posmask.data.embedded_models import DEFAULT_MODEL, MODELS
from posmask.data.models import layer_number, load_model, load_outline
from posmask.data.sites import LanguageModel
from posmask.errors import BadSetting
from posmask.kernels.devices import check_device
from reliability.gguf_model import write_tiny_gguf
from test_model_hub import local_hub, use_hub  # noqa: F401 (a fixture)

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
BODY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED = {**BODY, "num_key_value_heads": 1, "max_position_embeddings": 32, **SIZES}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 4}  # a window shorter than the contexts below
TINY = {
    "gpt2": transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=4, n_head=2, **SIZES),
    "neox": transformers.GPTNeoXConfig(**BODY, **SIZES),
    "neox, sequential": transformers.GPTNeoXConfig(**BODY, **SIZES, use_parallel_residual=False),
    "llama": transformers.LlamaConfig(**GROUPED),
    "gemma 2": transformers.Gemma2Config(**GEMMA, query_pre_attn_scalar=8),
    "gemma 3": transformers.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=8),
    "gemma 3 with vision": transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=8).to_dict(),
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    ),
    "qwen 2": transformers.Qwen2Config(**GROUPED),
    "qwen 3": transformers.Qwen3Config(**GROUPED, head_dim=8),
}
# Modules whose outputs each family adds to its residual stream, and its final norm.
ADDED = {
    "gpt2": ("attn", "mlp", "ln_f"),
    "neox": ("attention", "mlp", "final_layer_norm"),
    "llama": ("self_attn", "mlp", "norm"),
    "gemma": ("post_attention_layernorm", "post_feedforward_layernorm", "norm"),
    "qwen": ("self_attn", "mlp", "norm"),
}
IDS = torch.randint(2, 50, (3, 8), generator=torch.Generator().manual_seed(0))
SITES = ("residual_after", "residual_before", "attention", "mlp")


@functools.cache
def _tiny(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(TINY[family])
    with torch.no_grad():
        for parameter in model.parameters():  # Norms of 1 and biases of 0 would hide errors.
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny(family, dtype=torch.float32):
    """Return a new copy of a model, which is made once."""
    return copy.deepcopy(_tiny(family)).to(dtype)


def added(family):
    return next(names for name, names in ADDED.items() if family.startswith(name))


def module_output(model, module):
    """Return the output of a module, captured by a forward hook."""
    caught = []
    hook = module.register_forward_hook(lambda m, inputs, output: caught.append(output))
    with torch.inference_mode():
        model(IDS)
    hook.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]


@pytest.mark.parametrize("family", TINY)
def test_residual_vectors_are_the_hidden_states(family):
    model = tiny(family)
    with torch.inference_mode():
        states = model(IDS, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        assert torch.equal(LanguageModel(tiny(family), layer).vectors(IDS), states[layer])
        assert torch.equal(LanguageModel(tiny(family), layer, "residual_before").vectors(IDS), states[layer - 1])
    last = LanguageModel(tiny(family), 4).vectors(IDS)  # the last of hidden_states includes the final norm
    assert not torch.allclose(last, states[4])
    with torch.inference_mode():
        assert torch.equal(getattr(model.get_decoder(), added(family)[2])(last), states[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_sublayer_vectors_are_the_outputs_added_to_the_residual_stream(family, dtype):
    *names, _ = added(family)
    for layer in (1, 3):
        model = tiny(family, dtype)
        block = next(c for c in model.get_decoder().children() if isinstance(c, nn.ModuleList))[layer - 1]
        sublayers = [LanguageModel(tiny(family, dtype), layer, site).vectors(IDS) for site in ("attention", "mlp")]
        for vectors, name in zip(sublayers, names, strict=True):
            assert vectors.dtype == dtype
            assert torch.equal(vectors, module_output(model, getattr(block, name)))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", TINY)
def test_replacing_vectors_by_themselves_does_not_change_logits(family, site):
    model = tiny(family)
    with torch.inference_mode():
        logits = model(IDS).logits
    for layer in (1, 3):
        reader = LanguageModel(tiny(family), layer, site)
        vectors = reader.vectors(IDS)
        assert torch.equal(reader.logits(IDS, vectors), logits)
        moved = reader.logits(IDS, vectors + torch.randn(16, generator=torch.Generator().manual_seed(0)))
        assert not torch.allclose(moved, logits, atol=1e-3)
        assert torch.equal(reader.vectors(IDS), vectors)  # the replacement leaves no state
        fresh_reader = LanguageModel(tiny(family), layer, site)
        assert torch.equal(fresh_reader.logits(IDS, vectors), logits)  # no earlier call is needed


def test_sublayers_of_a_layer_that_does_not_add_them_raise_an_error():
    config = transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SIZES)
    assert LanguageModel(transformers.BloomForCausalLM(config).eval(), 1).vectors(IDS).shape == (3, 8, 16)
    with pytest.raises(BadSetting, match=r"BloomBlock is not the sum .*: read residual_after"):
        LanguageModel(transformers.BloomForCausalLM(config).eval(), 1, "mlp").vectors(IDS)


def test_parameter_counts_exclude_layers_that_a_site_skips():
    all_layers, head = LanguageModel(tiny("llama"), 4).n_parameters()
    below, above = LanguageModel(tiny("llama"), 2).n_parameters()
    assert (below, above) == (all_layers // 2, all_layers // 2 + head)
    assert LanguageModel(tiny("llama"), 2, "residual_before").n_parameters() == (
        all_layers // 4,
        all_layers * 3 // 4 + head,
    )
    assert LanguageModel(tiny("llama"), 2, "mlp").n_parameters() == (all_layers // 2, all_layers + head)


def test_a_layer_may_be_a_fraction_of_the_depth(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    assert [layer_number(str(tmp_path), layer) for layer in (3, 0.5, 0.01, 0.9)] == [3, 2, 1, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device = 'gpu' is not a device that posmask runs on: use cpu, cuda, cuda:1 or mps"),
        ("meta", "device = 'meta' is not a device"),
        ("cuda:99", "device = 'cuda:99'"),
    ],
)
def test_unavailable_devices_raise_an_error(name, message):
    check_device("cpu")
    with pytest.raises(BadSetting, match=message):
        load_model("unused", 1, "float32", device=name)


class Hub(BaseHTTPRequestHandler):
    """Answers like the hub for missing and for gated repositories (error codes of huggingface_hub)."""

    def do_GET(self):
        code, kind = (403, "GatedRepo") if "gated/" in self.path else (401, "RepoNotFound")
        self.send_response(code)
        self.send_header("X-Error-Code", kind)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOADS = (
    lambda name: load_model(name, 1, "float32"),
    models.load_tokenizer,
    models.weights_identity,
    lambda name: layer_number(name, 0.5),
)


@pytest.mark.parametrize(
    ("name", "offline", "message"),
    [
        ("gated/model", False, "it is gated): accept its terms on its page on the hub, then run `hf auth login`"),
        ("no/such", False, "the hub has no model of that name that you may read): check the name"),
        ("no/such", True, "switched off by HF_HUB_OFFLINE): connect once to download it"),
    ],
)
def test_hub_errors_are_reported_with_a_remedy(hub, tmp_path, name, offline, message, monkeypatch):
    use_hub(hub, tmp_path, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    for load in LOADS:
        with pytest.raises(BadSetting, match=re.escape(message)) as raised:
            load(name)
        assert str(raised.value).startswith(f"model '{name}' cannot be loaded (")


@pytest.mark.slow  # huggingface_hub retries for half a minute.
def test_an_unreachable_hub_is_reported_with_a_remedy(tmp_path, monkeypatch):
    use_hub("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(BadSetting, match=r"^model 'no/such' cannot be loaded \(.*the hub is unavailable"):
        load_model("no/such", 1, "float32")


@pytest.mark.slow
@pytest.mark.embedded
def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    model = MODELS[DEFAULT_MODEL]
    ((carrier, member),) = model.parts
    gguf = embedded.joined([(embedded.wheel_path(carrier), member)], model.gguf_sha256, tmp_path / "model.gguf")
    expected = load_model(DEFAULT_MODEL, 2, "float32").vectors(IDS)
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path / "cache"))
    assert torch.equal(load_model(str(gguf), 2, "float32").vectors(IDS), expected)
    (converted,) = (tmp_path / "cache" / "models").iterdir()
    before = converted.stat().st_mtime_ns
    assert models.load_tokenizer(str(gguf)).bos_token_id is not None
    assert models.weights_identity(str(gguf)) == models.weights_identity(str(converted))
    assert converted.stat().st_mtime_ns == before


def test_a_gguf_file_loads_equally_from_a_folder_and_the_hub(local_hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "models" / "tiny.gguf"
    gguf.parent.mkdir()
    write_tiny_gguf(gguf)
    local_hub.files["user/tiny"] = {"q4/tiny.gguf": gguf.read_bytes()}
    ids = torch.arange(12).view(2, 6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    with torch.inference_mode():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = theirs(ids, output_hidden_states=True).hidden_states[1]
    name = "user/tiny:q4/tiny.gguf"
    with pytest.raises(BadSetting, match="nothing is downloaded for it"):
        load_outline(name, 1)
    assert not local_hub.storage
    for source in (str(gguf), name):
        assert torch.equal(load_model(source, 1, "float32").vectors(ids), expected)
        assert models.load_tokenizer(source)("ab")["input_ids"] == [11]
    assert models.weights_identity(str(gguf)) == models.weights_identity(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_outline(name, 1).d_model == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "none.gguf",
            r"^GGUF file none\.gguf does not exist: give the path of a file, OWNER/NAME:FILE\.gguf on the hub",
        ),
        ("user/tiny:none.gguf", r"^user/tiny on the hub has no file none\.gguf: choose a model in the format"),
        (
            "user/none:tiny.gguf",
            r"^model 'user/none:tiny\.gguf' cannot be loaded \(no such folder, and the hub has no ",
        ),
        ("user/gated:tiny.gguf", r"^model 'user/gated:tiny\.gguf' cannot be loaded \(it is gated\): accept its terms"),
    ],
)
def test_a_missing_gguf_file_raises_an_error(local_hub, name, message):  # noqa: F811
    local_hub.files["user/tiny"] = {}
    with pytest.raises(BadSetting, match=message):
        load_model(name, 1, "float32")
