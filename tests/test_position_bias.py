"""SAEs with a bias per position: its definition, gradients, files and training."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import D_MODEL, D_SAE, MASKS, N_POSITIONS, RULES, batch_of, make_sae, make_vectors
from posmask.auditing.settings import audit_settings
from posmask.auditing.subject import Subject
from posmask.data.activations import training_batches
from posmask.errors import BadSetting, DamagedFolder
from posmask.interop.saelens_files import export_saelens
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_sae, write_sae
from posmask.sae.rules import rule_settings
from posmask.sae.warm_start import renormalize_, warm_start, without_mask
from posmask.storage.layout import WEIGHTS_FILE
from posmask.training.checkpoints import Checkpoints
from posmask.training.fast_loss import fast_gradients
from posmask.training.loop import train
from posmask.training.reference_loss import plain_gradients
from posmask.training.settings import TrainingSettings

every_rule = pytest.mark.parametrize("rule", RULES)
SETTINGS = TrainingSettings(n_steps=15, batch_tokens=240, learning_rate=5e-3, dead_after_eligible_tokens=300, aux_k=4)


def biased(kind="open", gating="forward", *, rule="topk", position_bias="learned", dtype=torch.float32):
    """Return an SAE as it is during training, with a bias per position, and one without that is equal otherwise."""
    plain = make_sae(kind, gating, rule=rule, dtype=dtype)
    sae = SparseAutoencoder(D_MODEL, plain.rule.settings, copy.deepcopy(plain.mask), position_bias=position_bias)
    sae = sae.to(dtype)
    sae.load_state_dict({**sae.state_dict(), **plain.state_dict()})
    sae.center += 0.5
    sae.scale *= 1.7
    with torch.no_grad():
        sae.position_bias.copy_(torch.randn(N_POSITIONS, D_MODEL, generator=torch.Generator().manual_seed(5)))
    return sae, plain


def centered(sae, vectors, position):
    """What an SAE without a bias per position must be given to do the same."""
    return sae.normalize(vectors) - sae.position_bias.detach()[position.long()]


@every_rule
@pytest.mark.parametrize("kind", ["open", "slice", "soft", "switch"])
@pytest.mark.parametrize("position_bias", ["mean", "learned"])
def test_it_equals_a_plain_sae_on_centered_vectors_to_the_last_bit(rule, kind, position_bias):
    sae, plain = biased(kind, rule=rule, position_bias=position_bias)
    vectors, position = make_vectors(60)
    if kind == "switch":  # A router reads vectors before the bias is subtracted.
        sae.mask.router.data.zero_()
        plain.mask.router.data.zero_()
    inputs = centered(sae, vectors, position)
    assert torch.equal(sae.encode(vectors, position), plain.encode(inputs, position))
    codes, expected = sae.sparse_encode(vectors, position), plain.sparse_encode(inputs, position)
    assert torch.equal(codes.dense(), expected.dense())
    of_position = sae.position_bias.detach()[position.long()]
    restored = (plain.sparse_decode(expected) + of_position) * sae.scale + sae.center
    assert torch.equal(sae.sparse_decode(codes, position), restored)
    batch = batch_of(vectors, position, torch.zeros(60))
    assert torch.equal(sae.decode_batch(sae.encode_batch(batch), batch), restored)
    restored = (plain.decode(plain.encode(inputs, position)) + of_position) * sae.scale + sae.center
    assert torch.equal(sae(vectors, position), restored)
    for gradients in (plain_gradients, fast_gradients):
        dead = torch.arange(D_SAE) % 3 == 0
        for each, given in ((sae, vectors), (plain, inputs)):
            each.zero_grad()
            gradients(each, given, position, dead=dead, aux_k=3)
        for name, parameter in plain.named_parameters():
            if name.startswith("mask."):  # The gradient of a router depends on what it reads.
                continue
            ours = sae.get_parameter(name).grad
            assert (ours is None) == (parameter.grad is None)
            assert ours is None or torch.equal(ours, parameter.grad), name
        assert (sae.position_bias.grad is None) == (position_bias == "mean")


@every_rule
@pytest.mark.parametrize(
    ("kind", "gating"), [("open", "forward"), ("slice", "forward"), ("soft", "gradient"), ("switch", "forward")]
)
def test_the_gradient_of_a_learned_bias_equals_that_of_autograd(rule, kind, gating):
    sae, _ = biased(kind, gating, rule=rule, dtype=torch.float64)
    vectors, position = make_vectors(60, dtype=torch.float64)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    vectors, position = vectors[shuffled], position[shuffled]
    dead = torch.arange(D_SAE) % 3 == 0
    plain_gradients(sae, vectors, position, dead=dead, aux_k=3)
    expected = sae.position_bias.grad.clone()
    sae.zero_grad()
    fast_gradients(sae, vectors, position, dead=dead, aux_k=3)
    torch.testing.assert_close(sae.position_bias.grad, expected)
    assert bool((expected[position.long().unique()] != 0).any(1).all())
    assert not bool(expected[0].any())  # no token there


def test_the_gradient_of_a_learned_bias_agrees_with_finite_differences():
    sae, _ = biased(rule="relu", dtype=torch.float64)
    vectors, position = make_vectors(20, dtype=torch.float64)
    plain_gradients(sae, vectors, position)
    coefficient = sae.rule.settings.l1_coefficient

    def loss():
        codes = sae.encode(vectors, position)
        error = (sae.decode(codes, position) - vectors) / sae.scale
        return (error.square().sum(1).mean() + coefficient * codes.sum(1).mean()).item()

    for column in (0, 7):
        entry = sae.position_bias.data[position[3]]
        sides = []
        for step in (1e-6, -2e-6):
            entry[column] += step
            sides.append(loss())
        entry[column] += 1e-6
        slope = (sides[0] - sides[1]) / 2e-6
        assert slope == pytest.approx(float(sae.position_bias.grad[position[3], column]), rel=1e-4)


def test_vectors_that_depend_on_their_position_alone_are_fully_explained(activations):
    sae = SparseAutoencoder(
        D_MODEL, rule_settings(RULES["topk"]), make_mask(mask_settings(MASKS["open"]), N_POSITIONS, D_SAE),
        position_bias="mean",
    )  # fmt: skip
    means = activations.position_means(N_POSITIONS, "context")
    kept = [index for index in range(activations.n_tokens) if activations.keep[index]]
    batch = activations.batch(torch.tensor(kept))
    for number in (1, 7):
        mean = batch.vectors[batch.position == number].double().mean(0)
        torch.testing.assert_close(means[number], mean.float())
    assert bool(means[0].isnan().all())  # only BOS is there
    sae.center, sae.scale = activations.center_and_scale
    sae.start_position_bias_(means)
    assert not bool(sae.position_bias[0].any())
    position = torch.arange(1, N_POSITIONS)
    assert not bool(sae.encode(means[1:], position).gt(1e-5).any())
    torch.testing.assert_close(sae(means[1:], position), means[1:])


def test_other_saes_derived_from_it_keep_the_bias():
    sae, _ = biased("slice", position_bias="mean")
    vectors, position = make_vectors(40)
    bare = without_mask(sae)
    assert torch.equal(bare(vectors, position), sae.decode(sae.encode(vectors, position, use_mask=False), position))
    source, _ = biased("open")
    started = warm_start(source, make_mask(mask_settings(MASKS["slice"]), N_POSITIONS, 4 * D_SAE))
    assert started.position_bias_kind == "learned"
    torch.testing.assert_close(started(vectors, position), source(vectors, position))
    before = source(vectors, position)
    renormalize_(source, torch.full((D_MODEL,), 0.3), torch.tensor(0.8))
    torch.testing.assert_close(source(vectors, position), before, rtol=1e-4, atol=1e-4)


def test_positions_are_required_and_within_the_table():
    sae, _ = biased()
    vectors, position = make_vectors(5)
    codes = sae.sparse_encode(vectors, position)
    for decode in (lambda: sae.sparse_decode(codes), lambda: sae.decode(codes.dense())):
        with pytest.raises(BadSetting, match="codes do not contain positions: pass the positions"):
            decode()
    for call in (sae.encode, sae.sparse_encode):
        with pytest.raises(BadSetting, match="are not all within the 16 positions"):
            call(vectors, position + N_POSITIONS)
    with pytest.raises(BadSetting, match="are not all within the 16 positions"):
        sae.sparse_decode(codes, position + N_POSITIONS)


@pytest.mark.parametrize("position_bias", ["mean", "learned"])
def test_a_written_bias_is_read_back(position_bias, tmp_path):
    sae, plain = biased(position_bias=position_bias)
    write_sae(sae, tmp_path / "sae")
    read = read_sae(tmp_path / "sae")
    vectors, position = make_vectors(30)
    assert read.position_bias_kind == position_bias
    assert read.position_bias.requires_grad == (position_bias == "learned")
    assert torch.equal(read(vectors, position), sae(vectors, position))
    write_sae(plain, tmp_path / "plain")
    assert "position_bias" not in json.loads((tmp_path / "plain" / "sae.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_bias": "median"}, "position_bias = 'median' is unknown: mean or learned"),
        ({"position_bias": None}, "holds no readable SAE"),
        ({"tensor": torch.zeros(3, D_MODEL)}, r"position_bias has the sizes \[3, 12\], not \[16, 12\]"),
        ({"tensor": torch.full((N_POSITIONS, D_MODEL), torch.nan)}, "position_bias holds NaN or infinite numbers"),
        ({"tensor": torch.zeros(N_POSITIONS, D_MODEL, dtype=torch.int64)}, "position_bias holds int64 numbers"),
        ({"tensor": None}, "position_bias"),
    ],
)  # fmt: skip
def test_a_damaged_bias_is_refused(change, message, tmp_path):

    write_sae(biased()[0], tmp_path)
    description = json.loads((tmp_path / "sae.json").read_text())
    if "tensor" in change:
        weights = load_file(tmp_path / WEIGHTS_FILE)
        weights.pop("position_bias")
        tensor = change["tensor"]
        save_file(weights | ({} if tensor is None else {"position_bias": tensor}), tmp_path / WEIGHTS_FILE)
    else:
        (tmp_path / "sae.json").write_text(json.dumps(description | change))
    with pytest.raises(DamagedFolder, match=message):
        read_sae(tmp_path)


@pytest.mark.parametrize("lossy", [False, True])
def test_an_export_to_saelens_is_refused(lossy, tmp_path):
    write_sae(biased()[0], tmp_path / "sae")
    with pytest.raises(BadSetting, match=re.escape("a bias per position (position_bias = 'learned'), which SAELens")):
        export_saelens(tmp_path / "sae", tmp_path / "out", lossy=lossy)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("position_bias", ["mean", "learned"])
def test_an_interrupted_training_resumes_to_the_same_bytes(position_bias, activations, tmp_path):
    def trained(checkpoints=None, stop=None):
        mask = make_mask(mask_settings(MASKS["slice"]), N_POSITIONS, D_SAE)
        sae = SparseAutoencoder(D_MODEL, rule_settings(RULES["topk"]), mask, position_bias=position_bias)
        sae.center, sae.scale = activations.center_and_scale
        sae.start_position_bias_(activations.position_means(N_POSITIONS, "context"))
        start = sae.position_bias.detach().clone()
        done_before = 0 if checkpoints is None else checkpoints.done

        def after_step(done):
            if stop is not None and done > stop:
                raise KeyboardInterrupt
            if checkpoints is not None:
                checkpoints.due = lambda at_end: done == stop

        batches = training_batches(activations, 240, SETTINGS.n_steps - done_before, 0, after=done_before)
        train(sae, batches, SETTINGS, "test", after_step, checkpoints)
        return sae, start

    whole, start = trained()
    assert torch.equal(whole.position_bias, start) == (position_bias == "mean")
    with pytest.raises(KeyboardInterrupt):
        trained(Checkpoints(tmp_path, {}), stop=7)
    resumed, _ = trained(Checkpoints(tmp_path, {}))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_an_audit_stays_within_the_context(monkeypatch):
    """Beyond its table of positions such an SAE has no codes."""
    from posmask.auditing import settings

    monkeypatch.setattr(settings, "_beyond", lambda outline, n_positions: 2 * n_positions)
    sae, plain = biased(position_bias="mean")
    origin = {"model": "embedded:SmolLM2-135M-Instruct", "layer": 2, "site": "residual_after"}
    monkeypatch.setattr(settings, "_is_here", lambda name: False)
    for each, expected in ((sae, None), (plain, 2 * N_POSITIONS)):
        made = audit_settings([Subject("sae", each, origin)], n_tokens=10_000)
        assert made.beyond_positions == expected
