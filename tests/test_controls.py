"""Controls of masked SAEs: what a mask gives without training."""

import copy

import pytest
import torch

from conftest import D_MODEL, batch_of
from posmask.evaluation.controls import controls_of, retied
from posmask.evaluation.settings import may_have_controls
from posmask.masks import MASKS, make_mask, mask_settings
from posmask.probing.pooling import Pooling
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.sae.warm_start import warm_start

N_POSITIONS, D_SAE = 16, 24
RULES = [
    {"kind": "topk", "k": 4},
    {"kind": "batchtopk", "k": 4},
    {"kind": "relu", "l1_coefficient": 0.1},
    {"kind": "jumprelu", "l0_coefficient": 0.1},
    {"kind": "gated", "l1_coefficient": 0.1},
    {"kind": "matryoshka", "k": 4, "parts": (0.25, 0.5, 1.0)},
]
PARTITIONS = [
    {"kind": "slice", "n_slices": 4},
    {"kind": "windows", "cuts": [[], [4], [3, 9]]},
    {"kind": "slice", "n_slices": 4, "position_origin": "text"},
]


def unmasked(rule, position_origin="context"):
    mask = make_mask(mask_settings({"kind": "open", "position_origin": position_origin}), N_POSITIONS, D_SAE)
    sae = SparseAutoencoder(D_MODEL, rule_settings(rule), mask, seed=3)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        sae.encoder_bias.copy_(0.1 * torch.randn(D_SAE, generator=random))
        sae.decoder_bias.copy_(0.1 * torch.randn(D_MODEL, generator=random))
        sae.encoder.mul_(1 + 0.1 * torch.rand(D_SAE, 1, generator=random))
    return sae


def masked(settings, rule, like=None):
    settings = mask_settings(settings)
    width = MASKS[settings.kind].width_at_equal_compute(settings, N_POSITIONS, D_SAE)
    mask = make_mask(settings, N_POSITIONS, width)
    return SparseAutoencoder(D_MODEL, rule_settings(rule), mask, seed=1) if like is None else warm_start(like, mask)


def some_tokens(n_texts=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    position = torch.arange(1, N_POSITIONS).repeat(n_texts)
    text = torch.arange(n_texts).repeat_interleave(N_POSITIONS - 1)
    return batch_of(torch.randn(len(position), D_MODEL, generator=random), position, text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["kind"])
@pytest.mark.parametrize("settings", PARTITIONS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_mask_without_training_is_pooling_by_its_windows(settings, rule):
    """The proposition of `evaluation/controls.py`, to the last bit."""
    start = unmasked(rule, settings.get("position_origin", "context"))
    controls = controls_of(masked(settings, rule), start)
    batch = some_tokens()
    zero_step, matched = (controls[name].encode(batch).dense() for name in ("zero-step", "matched"))
    assert float(matched.abs().sum()) > 0
    assert torch.equal(zero_step, matched)
    codes = start.encode_batch(batch)
    sae = controls["zero-step"].sae
    torch.testing.assert_close(sae.sparse_decode(sae.encode_batch(batch)), start.sparse_decode(codes))
    # Pooled over texts: the unmasked codes within each copy's window, divided by all tokens of the text.
    pooling = Pooling("mean", 12, sae.d_sae, N_POSITIONS)
    pooling.update(batch, controls["matched"].encode(batch))
    openness, dense = sae.mask.openness(), codes.dense()
    family = sae.mask.copied_from.unique(return_inverse=True)[1]
    position = batch.positions(settings.get("position_origin", "context")).long()
    for latent in range(0, sae.d_sae, 7):
        by_token = dense[:, family[latent]] * openness[position, latent]
        expected = torch.zeros(12).index_add_(0, batch.text, by_token) / (N_POSITIONS - 1)
        torch.testing.assert_close(pooling.texts.columns(torch.tensor([latent]))[:, 0], expected)


def test_matched_codes_are_weighted_by_a_soft_mask():
    rule = RULES[0]
    start = unmasked(rule)
    mask = make_mask(mask_settings({"kind": "soft", "low": 0.2, "high": 0.8}), N_POSITIONS, D_SAE)
    sae = SparseAutoencoder(D_MODEL, rule_settings(rule), mask)
    controls = controls_of(sae, start)
    batch = some_tokens()
    expected = start.encode_batch(batch).dense() * mask.openness()[batch.position.long()]
    torch.testing.assert_close(controls["matched"].encode(batch).dense(), expected)
    assert not torch.allclose(controls["zero-step"].encode(batch).dense(), expected)  # it selects with the mask on
    assert "re-tied" not in controls


def test_retied_copies_have_the_mean_of_their_weights():
    rule = RULES[0]
    start = unmasked(rule)
    sae = masked(PARTITIONS[1], rule, start)
    torch.testing.assert_close(retied(sae).encode_batch(some_tokens()).dense(), sae.encode_batch(some_tokens()).dense())
    with torch.no_grad():
        sae.encoder.add_(0.3 * torch.randn(sae.encoder.shape, generator=torch.Generator().manual_seed(1)))
        sae.encoder_bias.add_(torch.arange(sae.d_sae) * 0.01)
    before = copy.deepcopy(sae.state_dict())
    tied = retied(sae)
    _, family = sae.mask.copied_from.unique(return_inverse=True)
    for number in range(int(family.max()) + 1):
        members = (family == number).nonzero()[:, 0]
        for name in ("encoder", "encoder_bias"):
            mean = before[name][members].mean(0)
            for member in members:
                torch.testing.assert_close(tied.state_dict()[name][member], mean)
    torch.testing.assert_close(tied.decoder.norm(dim=1), torch.ones(sae.d_sae))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())  # the SAE is unchanged


def test_controls_need_a_mask_of_positions_and_as_many_latents():
    rule = RULES[0]
    start = unmasked(rule)
    assert controls_of(start, start) == {}
    gradient = masked({"kind": "slice", "n_slices": 4, "gating": "gradient"}, rule)
    assert controls_of(gradient, start) == {}
    assert not may_have_controls(mask_settings({"kind": "switch", "n_experts": 2}))
    at_width = SparseAutoencoder(
        D_MODEL, rule_settings(rule), make_mask(mask_settings(PARTITIONS[0]), N_POSITIONS, D_SAE)
    )
    assert list(controls_of(at_width, start)) == ["zero-step", "matched"]
    assert list(controls_of(at_width, None)) == []
    # Copies of fewer latents than the unmasked SAE has say nothing about it.
    mask = make_mask(mask_settings(PARTITIONS[1]), N_POSITIONS, D_SAE)
    of_fewer = SparseAutoencoder(D_MODEL, rule_settings(rule), mask)
    assert list(controls_of(of_fewer, start)) == ["re-tied"]
