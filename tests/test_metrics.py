import math

import numpy as np
import pytest
import torch

from conftest import D_SAE, N_POSITIONS, batch_of, codes_of, make_sae, make_vectors
from posmask.errors import DegenerateResult
from posmask.evaluation.position import PositionInformation, ShiftDesign
from posmask.evaluation.reconstruction import Reconstruction, dead_share, stream_measures
from posmask.evaluation.retention import PositionMass, profile_fidelity, retention, special_positions


def make_batch(n_tokens, n_texts=40):
    vectors, position = make_vectors(n_tokens)
    return batch_of(vectors, position, torch.arange(n_tokens) % n_texts)


def by_slice(measures, metric):
    return {tuple((m.slice or {}).items()): m for m in measures if m.metric == metric}


def test_explained_variance_and_l0_equal_their_formulas():
    sae, batch = make_sae("open"), make_batch(400)
    codes = sae.sparse_encode(batch.vectors, batch.position)
    noise = torch.randn(batch.vectors.shape, generator=torch.Generator().manual_seed(9))
    reconstruction = batch.vectors + 0.3 * noise
    metric = Reconstruction(N_POSITIONS, 40, batch.vectors.mean(0))
    for part in torch.arange(400).split([150, 250]):  # streaming changes nothing
        metric.update(batch.select(part), codes.select(part), reconstruction[part])
    v, v_hat, p = batch.vectors.double().numpy(), reconstruction.double().numpy(), batch.position.numpy()
    explained = by_slice(metric.measures(), "explained_variance")
    expected = 1 - ((v - v_hat) ** 2).sum() / ((v - v.mean(0)) ** 2).sum()
    assert explained[()].value == pytest.approx(expected, rel=1e-5)
    assert explained[()].ci_low < explained[()].value < explained[()].ci_high
    assert explained[()].n == 400
    for position in range(1, N_POSITIONS):
        selected = p == position
        expected = 1 - ((v - v_hat)[selected] ** 2).sum() / ((v[selected] - v[selected].mean(0)) ** 2).sum()
        assert explained[(("position", position),)].value == pytest.approx(expected, rel=1e-4)
    of_all = by_slice(metric.measures(), "explained_variance_of_all")
    squares = {position: ((v[p == position] - v.mean(0)) ** 2).sum() for position in range(1, N_POSITIONS)}
    weighted = sum(of_all[(("position", position),)].value * squares[position] for position in squares)
    assert weighted / sum(squares.values()) == pytest.approx(explained[()].value, rel=1e-5)
    l0 = by_slice(metric.measures(), "l0")
    assert l0[()].value == pytest.approx(len(codes.value) / 400)


def test_explained_variance_of_equal_vectors_is_nan():
    """As for BOS, whose vectors are equal: the remaining variance is rounding error."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 576, generator=random) * 100
    vectors[:20] = vectors[0].clone()
    position = torch.cat([torch.zeros(20), torch.ones(380)]).to(torch.int32)
    batch = batch_of(vectors, position, torch.arange(400) % 40)
    metric = Reconstruction(2, 40, vectors.mean(0))
    codes = codes_of(torch.tensor([1.0, 0, 0, 0]).expand(400, -1))
    metric.update(batch, codes, vectors + torch.randn(400, 576, generator=random))
    explained = by_slice(metric.measures(), "explained_variance")
    assert math.isnan(explained[(("position", 0),)].value)
    assert 0.99 < explained[(("position", 1),)].value < 1


def test_an_sae_of_zeros_raises_an_error():
    sae, batch = make_sae("open"), make_batch(100)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias):
            parameter.zero_()
    codes = sae.sparse_encode(batch.vectors, batch.position)
    metric = Reconstruction(N_POSITIONS, 40, batch.vectors.mean(0))
    metric.update(batch, codes, sae.sparse_decode(codes))
    with pytest.raises(DegenerateResult, match=r"the SAE has 0 active latents per token .* train it first"):
        metric.measures()


def test_norm_of_the_stream_and_concentration_of_its_variance():
    batch = make_batch(400)
    batch.vectors[7] *= 30
    v, p, mean = batch.vectors.double().numpy(), batch.position.numpy(), batch.vectors.double().mean(0)
    parts = (batch.select(part) for part in torch.arange(400).split([150, 250]))
    measures = stream_measures(parts, mean, N_POSITIONS)
    norms = by_slice(measures, "stream_norm")
    assert set(norms) == {(("position", position),) for position in np.unique(p)}
    for position in np.unique(p):
        at = norms[(("position", position),)]
        assert at.value == pytest.approx(np.linalg.norm(v[p == position], axis=1).mean())
        assert at.n == (p == position).sum()
    squares = np.sort(((v - mean.numpy()) ** 2).sum(1))
    (share,) = by_slice(measures, "top_variance_share").values()
    assert share.value == pytest.approx(squares[-4:].sum() / squares.sum())
    assert share.value > 0.4


def test_dead_share_by_position_counts_the_latents_open_at_the_position():
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:4] = True
    shares = by_slice(dead_share(make_sae("slice"), dead), "dead_share")
    assert shares[()].value == 4 / D_SAE
    assert shares[(("position", 0),)].value == 0.5
    assert shares[(("position", 0),)].n == 8
    assert shares[(("position", 15),)].value == 0.0


def fired(rate, n_texts=200, seed=0):
    """Return a batch and codes of latents that fire at random with probability rate[position, latent]."""
    random = torch.Generator().manual_seed(seed)
    position = torch.arange(rate.shape[0]).repeat(n_texts).to(torch.int32)
    text = torch.arange(n_texts).repeat_interleave(rate.shape[0]).to(torch.int32)
    n = len(position)
    fires = torch.rand(n, rate.shape[1], generator=random) < rate[position.long()]
    value = fires * (1 + torch.rand(n, rate.shape[1], generator=random))
    batch = batch_of(torch.zeros(n, 1), position, text, position > 0)
    return batch.kept(), codes_of(value[batch.keep])


def mass_of(rate, n_texts=200, seed=0):
    mass = PositionMass(*rate.shape)
    mass.update(*fired(rate, n_texts, seed))
    return mass


def retained(rate, bound, n_top=4):
    lifted = mass_of(rate)
    return retention(lifted, special_positions(lifted, unbound(rate) if bound is None else bound, n_top))


def unbound(rate):
    return torch.ones_like(rate).bool()


def test_retention_is_1_for_specialized_latents_and_chance_for_others():
    openness = make_sae("slice").mask.openness()
    openness = openness[:, openness[0] == 0]  # position 0 is never kept
    chance = 4 / (N_POSITIONS - 1)
    stays = retained(0.8 * openness, openness > 0)
    assert stays[0].value == pytest.approx(1.0)
    assert stays[1].value == pytest.approx(chance)
    roams = retained(torch.full_like(openness, 0.5), openness > 0)
    assert roams[0].value == pytest.approx(chance, abs=0.01)
    assert roams[0].ci_low < roams[0].value < roams[0].ci_high
    # With positions chosen from the data, the half-split prevents noise from looking like specialization.
    chosen = retained(torch.full_like(openness, 0.5), None)
    assert chosen[0].value == pytest.approx(chance, abs=0.01)
    assert retained(0.8 * openness, None)[0].value == pytest.approx(1.0)


def test_retention_excludes_latents_with_few_firings():
    rate = torch.full((N_POSITIONS, 8), 0.5)
    rate[:, 3] = 0.001
    assert retained(rate, None)[0].n == 7
    with pytest.raises(
        DegenerateResult, match=r"no latent fires 20 times in each half .* \([\d,]+ and [\d,]+ tokens\)"
    ):
        retained(torch.zeros(N_POSITIONS, 8), None)


def test_retention_after_more_training_uses_the_initial_positions():
    early, late = torch.zeros(2, N_POSITIONS, 6)
    early[1:5], late[8:12] = 0.8, 0.8
    special = special_positions(mass_of(early), unbound(early), 4)
    assert retention(mass_of(early), special, after=0.0)[0].value == pytest.approx(1.0)
    moved = retention(mass_of(late), special, after=0.5)[0]
    assert moved.value == 0
    assert moved.slice == {"after": "0.5"}


def test_retention_intervals_cover_the_planted_value():
    """Every latent fires twice as often at its 4 positions, in 100 samples of 64 texts."""
    bound = torch.zeros(N_POSITIONS, 20).bool()
    bound[1:5] = True
    rate = torch.where(bound, 0.4, 0.2)
    truth = 4 * 0.4 / (4 * 0.4 + 11 * 0.2)
    covered = 0
    for seed in range(100):
        lifted = mass_of(rate, n_texts=64, seed=seed)
        estimate = retention(lifted, special_positions(lifted, bound, 4))[0]
        covered += estimate.ci_low <= truth <= estimate.ci_high
    assert covered >= 88


def information(rate, **options):
    batch, codes = fired(rate, **options)
    metric = PositionInformation(*rate.shape, 200, torch.arange(1, len(rate)))
    used = PositionMass(*rate.shape)
    for part in torch.arange(len(batch)).split([900, len(batch) - 900]):  # streaming changes nothing
        metric.update(batch.select(part), codes.select(part))
        used.update(batch.select(part), codes.select(part))
    return {measure.metric: measure for measure in metric.measures(used)}


def test_position_information_equals_the_planted_value_and_is_0_without_position_effect():
    even = information(torch.full((N_POSITIONS, 200), 0.2))
    assert even["position_information_null"].value > 0.002  # from the finite sample alone
    assert abs(even["position_information"].value) < 0.0005
    assert even["position_bound_share"].value == pytest.approx(0.05, abs=0.05)
    assert even["position_information"].ci_low < 0 < even["position_information"].ci_high

    rate = torch.full((N_POSITIONS, 50), 0.1)
    rate[1:6] = 0.7
    p = rate[1:, 0].double().numpy()

    def entropy(p):
        return -(p * np.log(p) + (1 - p) * np.log(1 - p))

    truth = 1 - entropy(p).mean() / entropy(p.mean())
    bound = information(rate)
    assert bound["position_information"].value == pytest.approx(truth, abs=0.01)
    assert bound["position_information"].ci_low < truth < bound["position_information"].ci_high
    assert bound["position_bound_share"].value == 1.0


def test_runs_of_firings_give_no_position_information():
    """A latent that fires in runs that start anywhere carries no position information, even with few texts."""
    batch, codes = fired(torch.ones(N_POSITIONS, 40), n_texts=60)
    fires = torch.rand(60, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    length = torch.randint(4, N_POSITIONS, (60, 40), generator=torch.Generator().manual_seed(2))
    start = torch.randint(N_POSITIONS - 1, (60, 40), generator=torch.Generator().manual_seed(3))
    text, offset = batch.text.long(), batch.position.long()[:, None] - 1
    runs = fires[text] & ((offset - start[text]) % (N_POSITIONS - 1) < length[text])
    codes = codes_of(codes.dense() * runs)
    metric, used = PositionInformation(N_POSITIONS, 40, 60, torch.arange(1, N_POSITIONS)), PositionMass(N_POSITIONS, 40)
    metric.update(batch, codes)
    used.update(batch, codes)
    values = {measure.metric: measure.value for measure in metric.measures(used)}
    assert values["position_bound_share"] < 0.25
    assert abs(values["position_information"]) < 0.5 * values["position_information_null"]


def shift_design(activation, *, mask="on"):
    """Return the three variance shares of activation[text, token, window, latent]."""
    n_texts, length, n_windows, d_sae = activation.shape
    text, token, window = (part.reshape(-1) for part in torch.meshgrid(
        torch.arange(n_texts), torch.arange(length), torch.arange(n_windows), indexing="ij"
    ))  # fmt: skip
    position = (1 + (window + 1) * length + token).to(torch.int32)
    batch = batch_of(torch.zeros(len(text), 1), position, text)
    design = ShiftDesign(n_texts, length, n_windows, d_sae)
    for part in torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).split(500):
        value = activation[text[part], token[part], window[part]]
        design.update(batch.select(part), codes_of(value))
    return {measure.metric.removeprefix("shift_"): measure for measure in design.measures(mask)}


def random_of(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_shift_design_separates_its_three_shares():
    ones = torch.ones(40, 6, 5, 8)
    content = shift_design(random_of(40, 6, 1, 8) * ones)
    assert content["content"].value == pytest.approx(1.0)
    position = shift_design(random_of(1, 1, 5, 8) * ones)
    assert position["position"].value == pytest.approx(1.0)
    noise = shift_design(random_of(40, 6, 5, 8))
    assert noise["interaction"].value > 0.97
    both = shift_design(random_of(40, 6, 1, 8) + random_of(1, 1, 5, 8, seed=1))
    assert both["interaction"].value == pytest.approx(0, abs=1e-6)
    for shares in (content, position, noise, both):
        assert sum(measure.value for measure in shares.values()) == pytest.approx(1.0)


def test_effects_of_the_preceding_text_do_not_count_as_position():
    """All tokens of a piece share an effect of text and window, so that windows have the same mean."""
    position_shares = []
    for seed in range(20):
        shared = random_of(40, 1, 5, 50, seed=seed) + 0.2 * random_of(40, 6, 5, 50, seed=100 + seed)
        position_shares.append(shift_design(shared)["position"])
    mean = sum(measure.value for measure in position_shares) / 20
    assert abs(mean) < 0.002
    assert sum(measure.ci_low <= 0 <= measure.ci_high for measure in position_shares) >= 16


def test_position_information_excludes_latents_that_always_fire():
    rate = torch.full((N_POSITIONS, 10), 0.2)
    rate[:, 4] = 1.1
    measures = information(rate)
    assert measures["position_information"].n == 9
    assert measures["position_information"].value == pytest.approx(0, abs=0.01)


def test_a_mask_alone_does_not_raise_the_position_share():
    """The activity of a rarely firing latent that is open in one window only is interaction, not position."""
    fires = (random_of(100, 20, 1, 8) < 0.03) * random_of(100, 20, 1, 8, seed=1)
    open_in = torch.zeros(5, 8)
    open_in[torch.arange(8) % 5, torch.arange(8)] = 1.0
    shares = shift_design(fires * open_in)
    assert shares["position"].value < 0.04
    assert shares["interaction"].value > 0.9


def test_content_missing_from_a_window_raises_an_error():
    batch = batch_of(torch.zeros(1, 1), torch.tensor([4]), torch.tensor([0]))
    design = ShiftDesign(2, 3, 5, 8)
    design.update(batch, codes_of(torch.tensor([[1.0] + [0] * 7])))
    with pytest.raises(AssertionError, match="not seen in every window"):
        design.measures("on")


def test_profile_fidelity_is_the_overlap_of_two_distributions():
    openness = make_sae("hard").mask.openness()
    openness = openness[:, openness[0] == 0]  # position 0 is never kept
    assert profile_fidelity(mass_of(0.9 * openness, 2000), openness)[0].value > 0.97
    even = profile_fidelity(mass_of(torch.full_like(openness, 0.9), 2000), openness)[0]
    assert even.value == pytest.approx(4 / (N_POSITIONS - 1), abs=0.01)
    flat = profile_fidelity(mass_of(torch.full_like(openness, 0.9), 2000), torch.ones_like(openness))[0]
    assert flat.value > 0.97
    assert np.isfinite([flat.ci_low, flat.ci_high]).all()
