import math

import numpy as np
import pytest
import torch

from conftest import D_SAE, N_POSITIONS, make_sae, make_vectors
from posmask.activations import Batch
from posmask.errors import DegenerateResult
from posmask.metrics.reconstruction import Reconstruction, dead_share
from posmask.metrics.specialization import PositionMass, profile_fidelity, retention
from posmask.sae import Codes


def make_batch(n_tokens, n_texts=40):
    vectors, position = make_vectors(n_tokens)
    text = torch.arange(n_tokens, dtype=torch.int32) % n_texts
    return Batch(vectors, position, torch.zeros(n_tokens, dtype=torch.int32), text, torch.ones(n_tokens).bool())


def by_slice(measures, metric):
    return {tuple((m.slice or {}).items()): m for m in measures if m.metric == metric}


def test_explained_variance_and_l0_equal_their_formulas():
    sae, batch = make_sae("open"), make_batch(400)
    codes = sae.sparse_encode(batch.vectors, batch.position)
    noise = torch.randn(batch.vectors.shape, generator=torch.Generator().manual_seed(9))
    reconstruction = batch.vectors + 0.3 * noise
    metric = Reconstruction(N_POSITIONS, 40, batch.vectors.mean(0))
    for part in (slice(0, 150), slice(150, 400)):  # streaming changes nothing
        some = Batch(*(getattr(batch, f)[part] for f in ("vectors", "position", "token_id", "text", "keep")))
        metric.update(some, Codes(codes.latent[part], codes.value[part], D_SAE), reconstruction[part])
    v, v_hat, p = batch.vectors.double().numpy(), reconstruction.double().numpy(), batch.position.numpy()
    explained = by_slice(metric.measures(), "explained_variance")
    expected = 1 - ((v - v_hat) ** 2).sum() / ((v - v.mean(0)) ** 2).sum()
    assert explained[()].value == pytest.approx(expected, rel=1e-5)
    assert explained[()].low < explained[()].value < explained[()].high
    assert explained[()].n == 400
    for place in range(1, N_POSITIONS):
        at = p == place
        expected = 1 - ((v - v_hat)[at] ** 2).sum() / ((v[at] - v[at].mean(0)) ** 2).sum()
        assert explained[(("position", place),)].value == pytest.approx(expected, rel=1e-4)
    l0 = by_slice(metric.measures(), "l0")
    assert l0[()].value == pytest.approx(float((codes.value > 0).sum(1).float().mean()))


def test_equal_vectors_at_a_position_are_nan_never_a_number():
    """As the vectors of BOS are: what is left of their variance is rounding, whatever it is divided by."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 576, generator=random) * 100
    vectors[:20] = vectors[0].clone()
    position = torch.cat([torch.zeros(20), torch.ones(380)]).to(torch.int32)
    text = torch.arange(400, dtype=torch.int32) % 40
    batch = Batch(vectors, position, position, text, torch.ones(400).bool())
    metric = Reconstruction(2, 40, vectors.mean(0))
    codes = Codes(torch.zeros(400, 1, dtype=torch.int64), torch.ones(400, 1), 4)
    metric.update(batch, codes, vectors + torch.randn(400, 576, generator=random))
    explained = by_slice(metric.measures(), "explained_variance")
    assert math.isnan(explained[(("position", 0),)].value)
    assert 0.99 < explained[(("position", 1),)].value < 1


def test_an_sae_of_zeros_gets_no_numbers():
    sae, batch = make_sae("open"), make_batch(100)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias):
            parameter.zero_()
    codes = sae.sparse_encode(batch.vectors, batch.position)
    metric = Reconstruction(N_POSITIONS, 40, batch.vectors.mean(0))
    metric.update(batch, codes, sae.sparse_decode(codes))
    with pytest.raises(DegenerateResult, match=r"the SAE codes 0 latents a token .* train it first"):
        metric.measures()


def test_dead_share_by_position_counts_the_latents_open_there():
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:4] = True
    found = by_slice(dead_share(make_sae("slice"), dead), "dead_share")
    assert found[()].value == 4 / D_SAE
    assert found[(("position", 0),)].value == 0.5
    assert found[(("position", 0),)].n == 8
    assert found[(("position", 15),)].value == 0.0


def mass_of(rate, n_texts=200, seed=0):
    """Latents that fire at random with probability rate[position, latent], one code a token and latent."""
    random = torch.Generator().manual_seed(seed)
    mass = PositionMass(*rate.shape)
    position = torch.arange(rate.shape[0]).repeat(n_texts).to(torch.int32)
    text = torch.arange(n_texts).repeat_interleave(rate.shape[0]).to(torch.int32)
    n = len(position)
    fires = torch.rand(n, rate.shape[1], generator=random) < rate[position.long()]
    value = fires * (1 + torch.rand(n, rate.shape[1], generator=random))
    latent = torch.arange(rate.shape[1]).expand(n, -1).contiguous()
    batch = Batch(torch.zeros(n, 1), position, position, text, torch.ones(n).bool())
    mass.update(batch, Codes(latent, value, rate.shape[1]))
    return mass


def test_retention_is_1_where_latents_stay_and_chance_where_they_do_not():
    openness = make_sae("hard").mask.openness()
    stays = retention(mass_of(0.8 * openness), openness > 0, 4)
    assert stays[0].value == pytest.approx(1.0)
    assert stays[1].value == pytest.approx(4 / N_POSITIONS)
    roams = retention(mass_of(torch.full_like(openness, 0.5)), openness > 0, 4)
    assert roams[0].value == pytest.approx(4 / N_POSITIONS, abs=0.01)
    assert roams[0].low < roams[0].value < roams[0].high
    # With positions chosen from the data the half-split keeps noise from looking like specialisation.
    chosen = retention(mass_of(torch.full_like(openness, 0.5)), None, 4)
    assert chosen[0].value == pytest.approx(4 / N_POSITIONS, abs=0.01)
    found = retention(mass_of(0.8 * openness), None, 4)
    assert found[0].value == pytest.approx(1.0)


def test_retention_leaves_out_latents_that_hardly_fire():
    rate = torch.full((N_POSITIONS, 8), 0.5)
    rate[:, 3] = 0.001
    assert retention(mass_of(rate), None, 4)[0].n == 7
    with pytest.raises(DegenerateResult, match="no latent fires 20 times"):
        retention(mass_of(torch.zeros(N_POSITIONS, 8)), None, 4)


def test_profile_fidelity_is_the_overlap_of_two_distributions():
    openness = make_sae("hard").mask.openness()
    assert profile_fidelity(mass_of(0.9 * openness, 2000), openness)[0].value > 0.97
    even = profile_fidelity(mass_of(torch.full_like(openness, 0.9), 2000), openness)[0]
    assert even.value == pytest.approx(4 / N_POSITIONS, abs=0.01)
    flat = profile_fidelity(mass_of(torch.full_like(openness, 0.9), 2000), torch.ones_like(openness))[0]
    assert flat.value > 0.97
    assert np.isfinite([flat.low, flat.high]).all()
