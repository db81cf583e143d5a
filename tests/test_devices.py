"""An emulated second device instead of a GPU: its tensors report another device and cannot be mixed with CPU tensors.

The emulation raises where torch would on a GPU: for operations on tensors of both devices (except scalars and indices)
and for NumPy views of tensors that are not on the CPU. So these tests prove that tensors are moved to the right device,
not that GPU kernels are correct. The device is named `meta`, which torch supports without a driver.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from conftest import D_MODEL, D_SAE, MASKS, N_POSITIONS, RULES, make_texts, train_on
from posmask.data import sites
from posmask.data.activations import training_batches
from posmask.data.harvest import harvest
from posmask.data.tokens import Tokens, pad, shifted
from posmask.errors import DegenerateResult
from posmask.evaluation import suite
from posmask.evaluation.settings import EvaluationSettings
from posmask.kernels import backend
from posmask.masks import make_mask, mask_settings
from posmask.probing.datasets import ProbeDataset
from posmask.probing.order_probes import order_tokens
from posmask.probing.order_tasks import OrderTask
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.storage.layout import LATENTS_FILE
from posmask.training.loop import train
from posmask.training.reference_loss import StepLoss
from posmask.training.settings import TrainingSettings

HERE, THERE = torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten


class Elsewhere(torch.Tensor):
    """A tensor of the other device whose values are stored in a CPU tensor."""

    @staticmethod
    def __new__(cls, kept, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, kept.shape, strides=kept.stride(), dtype=kept.dtype, device=THERE, requires_grad=requires_grad
        )

    def __init__(self, kept, requires_grad=False):
        self.kept = kept

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.kept.tolist()

    def repeat_interleave(self, repeats):  # for meta tensors, torch assumes that there are no values
        return Elsewhere(self.kept.repeat_interleave(repeats.kept))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


MAY_MIX = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.copy_.default)


def call(func, args, kwargs):
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    device = kwargs.get("device", next((arg for arg in args if isinstance(arg, torch.device)), None))
    if func not in MAY_MIX and any(isinstance(tensor, Elsewhere) for tensor in tensors):
        cpu_tensors = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
        assert not cpu_tensors, f"{func} mixes devices"
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors[:1] or tensors)
    if device is not None:
        there = torch.device(device) == THERE
        args = tuple(HERE if isinstance(arg, torch.device) else arg for arg in args)
        kwargs = {**kwargs, "device": HERE} if "device" in kwargs else kwargs
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.kept, (args, kwargs))
    result = func(*args, **kwargs)
    inputs = {id(tensor.kept): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor) or not there:
            return leaf
        return inputs[id(leaf)] if id(leaf) in inputs else Elsewhere(leaf)

    return tree_map(wrap, result)


class Device(TorchDispatchMode):
    """Run every operation, including tensor creation, with support for the other device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


@pytest.fixture
def other_device(monkeypatch):
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    make = torch.tensor  # it creates meta tensors without a dispatch

    def tensor(data, *, device=None, **options):
        made = make(data, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    with Device():
        yield THERE


def test_the_emulated_device_rejects_mixed_operations(other_device):
    here, there = torch.ones(3), torch.ones(3, device=THERE)
    assert there.device == here.to(THERE).device == THERE
    assert (there + 1).cpu().tolist() == [2, 2, 2]
    with pytest.raises(AssertionError, match="mixes devices"):
        here + there


SETTINGS = TrainingSettings(
    n_steps=12,
    batch_tokens=256,
    learning_rate=5e-3,
    dead_after_eligible_tokens=300,
    aux_k=4,
    mask_learning_rate=0.05,
    precision="float32",  # auto would differ between the devices
)


CASES = [*((kind, "topk") for kind in MASKS), *(("slice", rule) for rule in RULES if rule != "topk")]


def fresh_sae(kind, rule):
    mask = make_mask(mask_settings(MASKS[kind]), N_POSITIONS, D_SAE, 1)
    return SparseAutoencoder(D_MODEL, rule_settings(RULES[rule]), mask, 1)


@pytest.fixture
def torch_operations():
    with backend.use("torch"):
        yield


@pytest.mark.parametrize(("kind", "rule"), CASES)
def test_training_on_another_device_gives_the_same_sae(kind, rule, activations, torch_operations, other_device):
    here, there = (fresh_sae(kind, rule) for _ in range(2))
    settings = SETTINGS.model_copy(update={"n_steps": 6})
    expected = train_on(here, activations, settings)
    there.center, there.scale = activations.center_and_scale
    batches = training_batches(activations, 256, 6, 0, pairs=there.rule.pairs_tokens)
    trained = train(there.to(THERE), batches, settings, "test")
    assert there.encoder.device == THERE
    assert [point.loss for point in trained.curve] == pytest.approx([point.loss for point in expected.curve])
    torch.testing.assert_close(there.decoder.detach().cpu(), here.decoder.detach())
    batch = activations.batch(torch.arange(200)).kept()
    codes = there.sparse_encode(batch.vectors, batch.position)
    assert codes.value.device == HERE
    expected = here.sparse_decode(here.sparse_encode(batch.vectors, batch.position))
    torch.testing.assert_close(there.sparse_decode(codes), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(("rule", "n_read"), [("topk", 3), ("relu", 3), ("batchtopk", 12)])
def test_numbers_of_a_step_are_read_from_a_device_with_the_curve(
    rule, n_read, activations, torch_operations, other_device, monkeypatch
):
    read, numbers = [], StepLoss.numbers.func
    monkeypatch.setattr(StepLoss, "numbers", property(lambda step: (read.append(step), numbers(step))[1]))
    there = fresh_sae("slice", rule)
    there.center, there.scale = activations.center_and_scale
    trained = train(there.to(THERE), training_batches(activations, 256, SETTINGS.n_steps, 0), SETTINGS, "test")
    assert [point.step for point in trained.curve] == [1, 10, 12]
    assert len(set(map(id, read))) == n_read


@pytest.mark.parametrize("aux_k", [0, 4])
def test_a_loss_that_is_not_finite_raises_an_error_with_the_curve(aux_k, activations, torch_operations, other_device):
    there = fresh_sae("slice", "topk").to(THERE)
    batches = list(training_batches(activations, 256, SETTINGS.n_steps, 0))
    batches[3].vectors[5] = torch.nan
    with pytest.raises(DegenerateResult, match="the loss of test is nan at step 10"):
        train(there, batches, SETTINGS.model_copy(update={"aux_k": aux_k}), "test")


class ToyLayer(torch.nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.attention, self.mlp = (torch.nn.Linear(d_model, d_model) for _ in range(2))

    def forward(self, stream):
        stream = stream + self.attention(stream.cumsum(1))
        return stream + self.mlp(stream)


class ToyModel(torch.nn.Module):
    def __init__(self, d_model=6, n_vocabulary=20):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(n_vocabulary, d_model), torch.nn.Linear(d_model, n_vocabulary)
        self.layers = torch.nn.ModuleList(ToyLayer(d_model) for _ in range(3))
        self.config = SimpleNamespace(num_hidden_layers=3, hidden_size=d_model, vocab_size=n_vocabulary)
        self.config.get_text_config = lambda: self.config

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        stream = self.embed(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return SimpleNamespace(logits=self.head(stream))


def moved(language_model, model):
    """Move a model after it was opened, because a model on torch's `meta` is not checked when it is opened."""
    model.to(THERE)
    return language_model


@pytest.mark.parametrize("site", ["residual_after", "residual_before", "mlp"])
def test_a_model_on_another_device_gives_the_same_vectors_and_logits(site, other_device):
    torch.manual_seed(0)
    toy = ToyModel()
    ids = torch.randint(20, (3, N_POSITIONS))
    here = sites.LanguageModel(copy.deepcopy(toy), 2, site)
    there = moved(sites.LanguageModel(toy, 2, site), toy)
    vectors = here.vectors(ids)
    assert there.vectors(ids).device == THERE
    torch.testing.assert_close(there.vectors(ids).cpu(), vectors)
    assert there.logits(ids, vectors + 1).device == there.device == THERE
    torch.testing.assert_close(there.logits(ids, vectors + 1).cpu(), here.logits(ids, vectors + 1))


@pytest.mark.parametrize("stored", ["model", "bfloat16", "int8"])
def test_a_harvest_on_another_device_copies_only_what_is_stored(stored, tmp_path, other_device, monkeypatch):
    torch.manual_seed(0)
    toy = ToyModel()
    ids = torch.randint(20, (6, N_POSITIONS))
    keep = (ids > 2) & (torch.arange(N_POSITIONS) < torch.arange(6, 12)[:, None])
    position = torch.arange(N_POSITIONS).expand_as(ids).contiguous()
    tokens = Tokens(ids, position, torch.zeros_like(ids), keep, position, position, position, position)
    here = harvest(tokens, sites.LanguageModel(copy.deepcopy(toy), 2), tmp_path / "here", {}, "here", stored)
    there = moved(sites.LanguageModel(toy, 2), toy)
    copied = []
    copy_ = torch.Tensor.copy_

    def noted(to, source, **options):
        if isinstance(source, Elsewhere):
            copied.append((to.dtype, source.dtype, len(source)))
        return copy_(to, source, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    harvest(tokens, there, tmp_path / "there", {}, "there", stored)
    dtypes = {"model": [torch.float32], "bfloat16": [torch.bfloat16], "int8": [torch.int8, torch.float32]}[stored]
    dtypes.append(torch.float32)  # norms, which show attention sinks
    assert copied == [(dtype, dtype, here.n_tokens) for dtype in dtypes]
    for shard in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("kind", ["slice", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("open", "soft"))])
def test_an_sae_on_another_device_has_the_same_measures(
    kind, activations, language_model, tokenizer, tmp_path, other_device, monkeypatch
):
    encode = SparseAutoencoder.encode_batch

    def encode_there(sae, batch, **options):
        assert batch.vectors.device == sae.encoder.device
        codes = encode(sae, batch, **options)
        assert codes.value.device == sae.encoder.device
        return codes

    monkeypatch.setattr(SparseAutoencoder, "encode_batch", encode_there)
    tokens = shifted(make_texts(200, n_words=5), tokenizer, N_POSITIONS, 20, 4)
    shift = harvest(tokens, language_model, tmp_path / "shift", {}, "shift")
    evaluation_settings = EvaluationSettings(
        retention_positions=4, shift_texts=20, shift_windows=4, model_contexts=8, order_tasks=(), order_train_groups=8,
        order_test_groups=4, probe_datasets=(), probe_train=20, probe_test=10, ks=(1, 5),
        probe_protocol="saebench" if kind == "open" else "default",
    )  # fmt: skip
    probed = probed_texts(evaluation_settings, language_model, tokenizer, tmp_path)
    torch.manual_seed(0)
    toy = ToyModel(D_MODEL, len(tokenizer))
    models = sites.LanguageModel(copy.deepcopy(toy), 2), moved(sites.LanguageModel(toy, 2), toy)
    at = [
        suite.EvaluationData(
            lambda: activations,
            activations,
            shift,
            *probed,
            tokenizer,
            N_POSITIONS,
            evaluation_settings,
            lambda m=model: m,
        )
        for model in models
    ]
    here = fresh_sae(kind, "topk")
    train_on(here, activations, SETTINGS)
    saes = here, copy.deepcopy(here).to(THERE)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    measures, folders = [], [tmp_path / "latents-here", tmp_path / "latents-there"]
    for sae, data, folder in zip(saes, at, folders, strict=True):
        parts, facts = suite.evaluate(sae, dead.to(sae.encoder.device), data, "test")
        found = [measure for part in parts.values() for measure in part]
        measures.append(found + (suite.baselines(data) if kind == "open" else []))
        folder.mkdir()
        facts.write(folder, tokenizer)
        if kind == "slice":
            measures[-1] += suite.forgetting(sae, data, SETTINGS, 0, "test")
    names = [[(measure.metric, measure.slice) for measure in side] for side in measures]
    assert names[1] == names[0]
    assert {"probe_accuracy", "order_accuracy", "retention", "ce_recovered"} <= {name for name, _ in names[0]}
    for here, there in zip(*measures, strict=True):
        # Rounding may move a text across a probe's boundary.
        tolerance = 1e-2 if here.metric.startswith(("probe_", "order_")) else 1e-3
        for attribute in ("value", "ci_low", "ci_high"):
            expected = pytest.approx(getattr(here, attribute), rel=tolerance, abs=tolerance, nan_ok=True)
            assert getattr(there, attribute) == expected, (here.metric, here.slice, attribute)
    arrays = [load_file(folder / LATENTS_FILE) for folder in folders]
    assert arrays[1].keys() == arrays[0].keys()
    torch.testing.assert_close(arrays[1]["profile"], arrays[0]["profile"], rtol=1e-3, atol=1e-3)


def test_statistics_are_computed_where_there_is_float64():
    assert [suite._statistics_device(torch.device(name)).type for name in ("cpu", "cuda", "mps")] == [
        "cpu",
        "cuda",
        "cpu",
    ]


def probed_texts(evaluation_settings, language_model, tokenizer, folder):
    """Order tasks and probe datasets of toy texts with their vectors."""
    n_train, n_test = evaluation_settings.order_train_groups, evaluation_settings.order_test_groups
    texts = []
    for text in make_texts(n_train + n_test, n_words=6):
        words = text.split()
        texts += [text, " ".join([words[-1], *words[1:-1], words[0]])]
    task = OrderTask("toy_order", 2, tuple(texts), n_train, n_test, "block")
    order = harvest(order_tokens(task, tokenizer, N_POSITIONS), language_model, folder / "order", {}, "order")
    texts = make_texts(60, n_words=8)
    label = torch.tensor([text.count("red") % 2 for text in texts])
    dataset = ProbeDataset("toy", ("even", "odd"), tuple(texts), label, torch.arange(60) < 40)
    probes = harvest(pad(texts, tokenizer, N_POSITIONS), language_model, folder / "probes", {}, "probes")
    return {"toy_order": (task, order)}, {"toy": (dataset, probes)}
