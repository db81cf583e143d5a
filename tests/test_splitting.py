"""Adaptive splitting: a split keeps the function and the cost, and training recovers planted positions."""

import pytest
import torch

from conftest import D_MODEL, N_POSITIONS, make_vectors, train_on
from posmask.masks import make_mask, mask_settings
from posmask.masks.base import Observed
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.sae.warm_start import copy_latents_, warm_start
from posmask.training.loop import share_gradients_
from posmask.training.settings import TrainingSettings
from test_training import write_activations

SPLIT = {"kind": "split", "start_latents": 8, "max_latents": 32, "n_windows": 8, "n_splittings": 4, "watch_steps": 5}
SETTINGS = TrainingSettings(n_steps=40, batch_tokens=128, learning_rate=5e-3)


def split_sae(d_sae=32, **changes):
    mask = make_mask(mask_settings({**SPLIT, "max_latents": d_sae, **changes}), N_POSITIONS, d_sae)
    return SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 4}), mask)


def watch(sae, n_tokens=400, seed=0):
    """Let the mask observe a batch, and return the observation."""
    vectors, position = make_vectors(n_tokens, seed=seed)
    codes = sae.sparse_encode(vectors, position)
    residual = (vectors - sae.sparse_decode(codes)) / sae.scale
    seen = Observed(position.long(), codes.token, codes.latent, codes.value, residual)
    sae.mask.observe(seen)
    return seen


def families(sae, parents):
    """Return the initial latent from which each latent descends."""
    root = torch.arange(sae.d_sae)
    for copies in parents:
        root[copies.target] = root[copies.source]
    return root


def test_a_split_does_not_change_the_function():
    sae = split_sae()
    vectors, position = make_vectors(300, seed=5)
    parents = []
    for n_births in (3, 8, 13):
        before = sae.encode(vectors, position)
        watch(sae)
        parents.append(sae.mask._split(n_births))
        assert len(parents[-1].source) == n_births
        copy_latents_(sae, parents[-1])
        after = sae.encode(vectors, position)
        root = families(sae, parents)
        by_family = [torch.zeros(300, 32).index_add(1, root, codes.detach()) for codes in (before, after)]
        assert torch.equal(by_family[0], by_family[1])
        assert torch.equal(sae.decoder, sae.decoder[root])  # before further training, all copies are equal
        torch.testing.assert_close(sae(vectors, position), sae.decode(before))


def test_the_number_of_live_latents_per_position_is_constant(activations):
    sae = split_sae()
    live = []
    train_on(sae, activations, SETTINGS, after_step=lambda done: live.append(sae.mask.live().sum(1).unique().tolist()))
    assert live == [[8.0]] * 40
    assert int((sae.mask.openness().amax(0) > 0).sum()) > 20  # latents have split
    for group in sae.mask.groups():  # closed latents are not computed
        assert len(torch.arange(32)[group.latents]) == 8


def test_gains_equal_brute_force_least_squares():
    """A gain is the reduction of the squared error if the two parts of a latent's tokens get optimal decoder rows."""
    sae = split_sae()
    observed = watch(sae, n_tokens=600)
    gains, _ = sae.mask.gains()
    assert gains.shape == (7, 32)
    window = observed.mask_row * 8 // N_POSITIONS
    compared = 0
    for latent in range(8):
        entries = (observed.latent == latent).nonzero()[:, 0]
        if len(entries) < 10:
            continue
        value = observed.value[entries].double()[:, None]
        target = observed.residual[observed.token[entries]].double() + value * sae.decoder.detach()[latent].double()

        def error(selected, value=value, target=target):
            if not bool(selected.any()):
                return 0.0
            row = torch.linalg.lstsq(value[selected], target[selected]).solution
            return float((target[selected] - value[selected] @ row).square().sum())

        token_window = window[observed.token[entries]]
        error_together = error(torch.ones_like(token_window).bool())
        for cut in range(7):
            expected = error_together - error(token_window <= cut) - error(token_window > cut)
            assert float(gains[cut, latent]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
            compared += 1
    assert compared >= 35
    assert bool((gains[:, 8:] == -torch.inf).all())  # unborn latents


def test_latents_with_the_largest_gain_split_at_their_best_cut():
    sae = split_sae()
    watch(sae)
    gains, _ = sae.mask.gains()
    best = gains.max(0)
    copies = sae.mask._split(3)
    assert copies.source.tolist() == best.values.topk(3).indices.tolist()
    assert copies.target.tolist() == [8, 9, 10]
    for parent, child in zip(copies.source.tolist(), copies.target.tolist(), strict=True):
        late = torch.arange(N_POSITIONS) * 8 // N_POSITIONS > int(best.indices[parent])
        assert torch.equal(sae.mask.openness()[:, child] == 1, late)
        assert torch.equal(sae.mask.openness()[:, parent] == 1, ~late)


def test_a_cut_before_all_firings_has_no_gain():
    sae = split_sae()
    mask_row = torch.arange(8, 16)
    token, latent = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    sae.mask.observe(Observed(mask_row, token, latent, torch.ones(8), torch.ones(8, D_MODEL)))
    gains, _ = sae.mask.gains()
    assert gains[:4, 0].tolist() == pytest.approx([0.0] * 4, abs=1e-4)
    assert bool(gains[:, :8].isfinite().all())


def test_copies_inherit_adam_moments_and_eligible_tokens(activations, monkeypatch):
    from posmask.training import loop as training

    seen = {}
    original = training._copy_moments_

    def spy(optimizer, sae, copies):
        original(optimizer, sae, copies)
        moments = optimizer.state[sae.encoder]["exp_avg"]
        seen["equal"] = torch.equal(moments[copies.target], moments[copies.source])
        seen["bias"] = optimizer.state[sae.decoder_bias]["exp_avg"].clone()

    monkeypatch.setattr(training, "_copy_moments_", spy)
    train_on(split_sae(), activations, SETTINGS)
    assert seen["equal"]


@pytest.mark.parametrize("start", ["from scratch", "from an open SAE"])
def test_training_recovers_planted_positions(tmp_path, start):
    """Two features share a direction, one in each half of the context, so that splitting must cut in the middle."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=random)).Q
    n_texts = 800
    position = torch.arange(N_POSITIONS).repeat(n_texts)
    text = torch.arange(n_texts).repeat_interleave(N_POSITIONS)
    active = (torch.rand(len(position), 6, generator=random) < 0.25) * (
        1 + torch.rand(len(position), 6, generator=random)
    )
    shared = basis[:6] + 0.0
    vectors = active @ shared
    side = torch.where(position < 8, 1.0, -1.0)[:, None]
    vectors += side * (active[:, :3] @ basis[8:11])  # the first three differ between early and late positions
    vectors += 0.01 * torch.randn(vectors.shape, generator=random)
    activations = write_activations(tmp_path / "planted", vectors, position, text)
    settings = TrainingSettings(n_steps=300, batch_tokens=512, learning_rate=3e-3, aux_k=0)
    values = {**SPLIT, "start_latents": 6, "max_latents": 9, "n_splittings": 1, "first_splitting": 0.5,
              "last_splitting": 0.5, "watch_steps": 30}  # fmt: skip
    mask = make_mask(mask_settings(values), N_POSITIONS, 9)
    rule = rule_settings({"kind": "topk", "k": 3})
    if start == "from scratch":
        sae = SparseAutoencoder(16, rule, mask)
        with torch.no_grad():
            rows = torch.nn.functional.normalize(shared + 0.2 * torch.randn(6, 16, generator=random), dim=1)
            sae.encoder[:6], sae.decoder[:6] = rows, rows
    else:
        source = SparseAutoencoder(16, rule, make_mask(mask_settings({"kind": "open"}), N_POSITIONS, 6))
        with torch.no_grad():
            rows = torch.nn.functional.normalize(shared + 0.2 * torch.randn(6, 16, generator=random), dim=1)
            source.encoder.copy_(rows)
            source.decoder.copy_(rows)
        train_on(source, activations, settings)
        sae = warm_start(source, mask)
    train_on(sae, activations, settings)
    openness = sae.mask.openness()
    halves = [openness[:, latent] for latent in range(9) if not bool((openness[:, latent] == 1).all())]
    assert len(halves) == 6
    early = (torch.arange(N_POSITIONS) < 8).float()
    assert all(torch.equal(half, early) or torch.equal(half, 1 - early) for half in halves)


def trained(tie, activations, **mask):
    """Train an SAE of 4 slices that starts from a trained open SAE."""
    source = SparseAutoencoder(
        D_MODEL, rule_settings({"kind": "topk", "k": 4}), make_mask(mask_settings({"kind": "open"}), N_POSITIONS, 8)
    )
    train_on(source, activations, SETTINGS)
    start = make_mask(mask_settings({"kind": "slice", "n_slices": 4, "gradient_sharing": tie}), N_POSITIONS, 32)
    sae = warm_start(source, start)
    train_on(sae, activations, SETTINGS)
    return sae


def mean_distance(sae):
    """Return the mean distance of the copies of a latent from their mean."""
    copies = sae.decoder.detach().view(4, 8, D_MODEL)
    return float((copies - copies.mean(0)).norm(dim=2).mean())


def test_gradient_sharing_keeps_copies_close_and_equal_at_1(activations):
    distances = [mean_distance(trained(tie, activations)) for tie in (0.0, 0.7, 1.0)]
    assert distances[0] > 1.5 * distances[1] > 0
    assert distances[2] < 1e-6


def test_gradient_sharing_mixes_gradients_of_copies_only():
    sae = split_sae(gradient_sharing=0.25)
    watch(sae)
    copies = sae.mask._split(8)  # each of the 8 latents has a copy
    for parameter in sae.latent_parameters():
        parameter.grad = torch.rand_like(parameter)
    before = [parameter.grad.clone() for parameter in sae.latent_parameters()]
    share_gradients_(sae)
    for parameter, original in zip(sae.latent_parameters(), before, strict=True):
        mean = (original[copies.source] + original[copies.target]) / 2
        for side in (copies.source, copies.target):
            torch.testing.assert_close(parameter.grad[side], 0.75 * original[side] + 0.25 * mean)
        assert torch.equal(parameter.grad[16:], original[16:])  # unborn latents are no copies
