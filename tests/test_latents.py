"""Written latent data compared with plain loops."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import D_MODEL, D_SAE, N_POSITIONS, batch_of, make_sae, make_vectors
from posmask.evaluation import latents
from posmask.evaluation.latents import LatentFacts, excerpts, position_ranges, shift_strips, vocabulary_effects
from posmask.evaluation.retention import PositionMass
from posmask.evaluation.stored_codes import StoredCodes


class Words:
    def decode(self, ids):
        return f" {ids[0]}" if ids[0] else "\ufffd"

    def convert_ids_to_tokens(self, ids):
        return [f"<{ids[0]}>"]


@pytest.fixture
def coded():
    sae = make_sae("slice")
    vectors, _ = make_vectors(300)
    position = torch.arange(300, dtype=torch.int32) % (N_POSITIONS - 1) + 1
    text = torch.arange(300) // 40
    return sae, batch_of(vectors, position, text), sae.sparse_encode(vectors, position)


def facts_of(coded):
    sae, batch, codes = coded
    facts, used = LatentFacts(sae.d_sae), PositionMass(N_POSITIONS, sae.d_sae)
    half = torch.arange(len(batch)) < 150
    for part in (half, ~half):  # in two batches
        facts.update(batch.select(part), codes.select(part))
        used.update(batch.select(part), codes.select(part))
    zeros = torch.zeros(sae.d_sae)
    facts.add_positions(used, zeros, zeros, zeros, "context")
    facts.add_probe("class", torch.tensor([3, 1]), torch.tensor([0.5, -1.0]))
    effects = torch.zeros(sae.d_sae, 2).long(), torch.zeros(sae.d_sae, 2)
    facts.add_effects(effects, effects)
    return facts


@pytest.fixture
def dense(coded):
    """Activations [token latent]."""
    _, batch, codes = coded
    dense = torch.zeros(len(batch), D_SAE)
    dense[codes.token, codes.latent] = codes.value.detach()
    return dense.numpy()


def excerpts_of(coded):
    _, batch, codes = coded
    of_codes = (part.detach().numpy() for part in (codes.token, codes.latent, codes.value))
    return excerpts(*of_codes, batch.position.numpy(), batch.text.numpy(), D_SAE, N_POSITIONS)


def test_excerpts_are_chosen_as_in_a_plain_search(coded, dense):
    """Strongest, at most one per text; at quantiles of the activations; strongest in each range of positions."""
    _, batch, _ = coded
    found = excerpts_of(coded)
    position, text = batch.position.numpy(), batch.text.numpy()
    for latent, z in enumerate(dense.T):
        peak = np.where(found.start[latent] < 0, -1, found.start[latent] + found.peak[latent].astype(int))
        best = [max(np.flatnonzero(text == number), key=lambda token: z[token]) for number in range(text.max() + 1)]
        expected = sorted((token for token in best if z[token] > 0), key=lambda token: -z[token])[: latents.N_TEXTS]
        strongest = peak[: latents.N_TEXTS]
        assert strongest[strongest >= 0].tolist() == expected
        at_quantile = peak[latents.N_TEXTS :][: len(latents.QUANTILES)]
        fires = np.sort(z[z > 0])
        if len(fires) < len(latents.QUANTILES):
            assert (at_quantile == -1).all()
        else:
            assert z[at_quantile].tolist() == [fires[round(q * (len(fires) - 1))] for q in latents.QUANTILES]
        ranges = position_ranges(N_POSITIONS)
        for token, (first, last) in zip(peak[latents.N_TEXTS + len(latents.QUANTILES) :], ranges, strict=True):
            inside = np.where((position >= first) & (position <= last), z, 0)
            assert token == (inside.argmax() if inside.max() > 0 else -1)


def test_excerpts_show_the_tokens_around_their_peak_with_their_activations(coded, dense):
    _, batch, _ = coded
    found = excerpts_of(coded)
    n_checked = 0
    for latent, excerpt in zip(*np.nonzero(found.start >= 0), strict=True):
        start, length = int(found.start[latent, excerpt]), int(found.length[latent, excerpt])
        peak = start + int(found.peak[latent, excerpt])
        shown = [  # of the same text and context
            token
            for token in range(max(0, peak - latents.N_BEFORE), min(len(batch), peak + 1 + latents.N_AFTER))
            if batch.text[token] == batch.text[peak]
            and int(batch.position[token]) - int(batch.position[peak]) == token - peak
        ]
        assert [start, length] == [shown[0], len(shown)]
        values = found.value[latent, excerpt] / 255 * found.largest[latent]
        assert np.abs(values[:length] - dense[shown, latent]).max() <= found.largest[latent] / 255
        assert (values[:length] > 0).tolist() == (dense[shown, latent] > 0).tolist()
        assert not values[length:].any()
        n_checked += 1
    assert n_checked > 100


def test_histograms_count_every_activation(coded, dense):
    found = excerpts_of(coded)
    assert found.largest.tolist() == dense.max(0).tolist()
    for latent, z in enumerate(dense.T):
        bins = np.ceil(latents.N_HISTOGRAM_BINS * z[z > 0] / max(z.max(), 1e-9)).clip(max=latents.N_HISTOGRAM_BINS)
        assert found.histogram[latent].tolist() == [(bins == n + 1).sum() for n in range(latents.N_HISTOGRAM_BINS)]


def test_ranges_of_positions_cover_each_position_once():
    for n_positions in range(3, 140):
        covered = [p for first, last in position_ranges(n_positions) for p in range(first, last + 1)]
        assert covered == list(range(1, n_positions))


@pytest.mark.parametrize("width", [2, 24])
def test_shift_strips_show_the_strongest_piece_in_every_window(monkeypatch, width):
    monkeypatch.setattr(latents, "N_STRIP_TOKENS", width)
    sae, n_texts, n_windows, length = make_sae("slice"), 4, 3, 3
    assert (n_windows + 1) * length + 1 <= N_POSITIONS
    position = 1 + length + torch.arange(n_windows * length, dtype=torch.int32).repeat(n_texts)
    text = torch.arange(n_texts).repeat_interleave(n_windows * length)
    batch = batch_of(make_vectors(len(position))[0], position, text)
    batch.token_id[:] = text * 100 + (position - 1) % length
    is_seen = ~((text == 1) & ((position - 1) % length == 2))  # an attention sink
    batch = batch.select(is_seen)
    codes, stored = sae.sparse_encode(batch.vectors, batch.position), StoredCodes(sae.d_sae)
    stored.add(batch, codes)
    strips = shift_strips(stored, n_windows, length)
    assert strips.token_id.tolist() == [
        [-1 if (piece, at) == (1, 2) else piece * 100 + at for at in range(length)] for piece in range(n_texts)
    ]
    z = np.zeros((n_texts, n_windows, length, D_SAE))
    window, at = (batch.position.numpy() - 1) // length - 1, (batch.position.numpy() - 1) % length
    token, latent = codes.token.numpy(), codes.latent.numpy()
    z[batch.text.numpy()[token], window[token], at[token], latent] = codes.value.detach().numpy()
    assert (strips.piece >= 0).tolist() == (z.max((0, 1, 2)) > 0).tolist()
    assert strips.value.shape == (D_SAE, n_windows, min(width, length))
    for latent in np.flatnonzero(strips.piece >= 0):
        most, start = z[..., latent].max(), strips.start[latent]
        assert strips.largest[latent] == np.float32(most)
        shown = z[strips.piece[latent], :, start : start + width, latent]
        assert shown.max() == most
        assert np.abs(strips.value[latent] / 255 * most - shown).max() <= most / 255


def test_written_latent_data_equal_the_added_data(coded, dense, tmp_path):
    _, batch, _ = coded
    dense = torch.from_numpy(dense)
    facts_of(coded).write(tmp_path, Words())
    arrays = load_file(tmp_path / "latents.safetensors")
    words = json.loads((tmp_path / "latents.json").read_text())
    for position in range(1, N_POSITIONS):
        expected = dense[batch.position == position].mean(0)
        assert arrays["profile"][position] == pytest.approx(expected.numpy(), rel=1e-3)
    assert arrays["firings"].tolist() == (dense > 0).sum(0).tolist()
    assert arrays["probe_latent"].tolist() == [[3, 1]]
    assert words["probes"] == ["class"]
    assert words["words"] == {"0": "<0>"}  # not a complete character, so the token name
    assert words["excerpts"]["positions"] == position_ranges(N_POSITIONS)
    assert words["n_tokens_searched_for_texts"] == 300


def test_texts_are_searched_up_to_a_limit(coded, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "MOST_TOKENS", 200)
    facts_of(coded).write(tmp_path, Words())
    assert json.loads((tmp_path / "latents.json").read_text())["n_tokens_searched_for_texts"] == 150
    assert load_file(tmp_path / "latents.safetensors")["firings"].sum() == len(coded[2].value)


def test_vocabulary_effects_equal_the_models_norm_and_head(language_model, causal_lm):
    sae = make_sae("open", d_model=D_MODEL)
    row = sae.decoder.detach()[5]
    norm = causal_lm.model.norm.weight.detach() * row / (row.square().mean() + causal_lm.config.rms_norm_eps).sqrt()
    expected = causal_lm.lm_head.weight.detach() @ norm
    expected = expected - expected.mean()
    (ids, up), (low, down) = vocabulary_effects(sae, language_model)
    assert ids[5].tolist() == expected.topk(len(ids[5])).indices.tolist()
    assert up[5].numpy() == pytest.approx(expected[ids[5]].numpy(), abs=1e-5)
    assert low[5].tolist() == expected.topk(len(low[5]), largest=False).indices.tolist()
    assert down[5].numpy() == pytest.approx(expected[low[5]].numpy(), abs=1e-5)
