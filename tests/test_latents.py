"""Written latent data compared with plain loops."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import D_MODEL, D_SAE, N_POSITIONS, batch_of, make_sae, make_vectors
from posmask.evaluation import latents
from posmask.evaluation.latents import LatentFacts, strongest_texts, vocabulary_effects
from posmask.evaluation.retention import PositionMass


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


def test_strongest_texts_equal_a_plain_search(coded):
    _, batch, codes = coded
    dense = torch.zeros(len(batch), D_SAE)
    dense[codes.token, codes.latent] = codes.value
    strongest = strongest_texts(
        *(part.detach().numpy() for part in (codes.token, codes.latent, codes.value)),
        batch.position.numpy(),
        batch.text.numpy(),
        D_SAE,
    )
    for latent in range(D_SAE):
        best = {}
        for token in range(len(batch)):
            value, text = float(dense[token, latent]), int(batch.text[token])
            if value > best.get(text, (0, 0))[0]:
                best[text] = (value, token)
        expected = sorted(best.values(), reverse=True)[: latents.N_TEXTS]
        assert (strongest.start[latent] >= 0).sum() == len(expected)
        for rank, (_, peak) in enumerate(expected):
            shown = list(range(max(0, peak - latents.N_BEFORE), min(len(batch), peak + 1 + latents.N_AFTER)))
            shown = [  # of the same text and context
                token
                for token in shown
                if batch.text[token] == batch.text[peak]
                and int(batch.position[token]) - int(batch.position[peak]) == token - peak
            ]
            assert strongest.start[latent, rank] == shown[0]
            assert strongest.length[latent, rank] == len(shown)
            values = strongest.value[latent, rank, : len(shown)] / 255 * strongest.largest[latent]
            assert np.abs(values - dense[shown, latent].detach().numpy()).max() <= strongest.largest[latent] / 255
            assert (strongest.value[latent, rank, : len(shown)] > 0).tolist() == (dense[shown, latent] > 0).tolist()


def test_written_latent_data_equal_the_added_data(coded, tmp_path):
    _, batch, codes = coded
    facts_of(coded).write(tmp_path, Words())
    arrays = load_file(tmp_path / "latents.safetensors")
    words = json.loads((tmp_path / "latents.json").read_text())
    dense = torch.zeros(len(batch), D_SAE)
    dense[codes.token, codes.latent] = codes.value.detach()
    for position in range(1, N_POSITIONS):
        expected = dense[batch.position == position].mean(0)
        assert arrays["profile"][position] == pytest.approx(expected.numpy(), rel=1e-3)
    assert arrays["firings"].tolist() == (dense > 0).sum(0).tolist()
    assert arrays["probe_latent"].tolist() == [[3, 1]]
    assert words["probes"] == ["class"]
    assert words["words"] == {"0": "<0>"}  # not a complete character, so the token name
    assert words["n_tokens_searched_for_texts"] == 300


def test_strongest_texts_are_searched_up_to_a_limit(coded, tmp_path, monkeypatch):
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
