import pytest
import torch

from conftest import D_SAE, MASKS, N_POSITIONS
from posmask import masks
from posmask.errors import BadSetting
from posmask.masks import live_groups, make_mask, mask_settings


def mask_of(kind, **changes):
    return make_mask(mask_settings({**MASKS[kind], **changes}), N_POSITIONS, D_SAE, seed=0)


def test_every_kind_is_under_these_tests():
    assert set(MASKS) == set(masks.MASKS)


@pytest.mark.parametrize("kind", MASKS)
def test_openness_lies_between_0_and_1_and_repeats_with_the_seed(kind):
    openness = mask_of(kind).openness().detach()
    assert openness.shape == (N_POSITIONS, D_SAE)
    assert bool(((openness >= 0) & (openness <= 1)).all())
    assert torch.equal(openness, mask_of(kind).openness())


def test_slice_opens_block_b_on_positions_of_block_b():
    openness = mask_of("slice").openness()
    for position in range(N_POSITIONS):
        for latent in range(D_SAE):
            assert openness[position, latent] == float(position // 4 == latent // 8)


def test_hard_opens_exactly_that_many_positions_differently_by_latent():
    openness = mask_of("hard").openness()
    assert openness.sum(0).tolist() == [4] * D_SAE
    assert len(torch.unique(openness, dim=1).T) > D_SAE / 2


def test_cohort_neighbours_share_positions_and_every_position_is_equally_open():
    openness = mask_of("cohort").openness()
    assert openness.sum(0).tolist() == [4] * D_SAE
    assert openness.sum(1).tolist() == [D_SAE * 4 / N_POSITIONS] * N_POSITIONS
    assert torch.equal(openness[:, 0::4], openness[:, 3::4])


def test_soft_starts_uniform_between_low_and_high():
    openness = mask_of("soft").openness().detach()
    assert 0.3 <= float(openness.min()) < 0.35
    assert 0.65 < float(openness.max()) <= 0.7


def test_importance_keeps_the_most_salient_positions_in_the_end():
    mask = mask_of("importance")
    important = torch.zeros(N_POSITIONS, D_SAE)
    for latent in range(D_SAE):
        important[(latent + torch.arange(4)) % N_POSITIONS, latent] = 1.0
    for done in range(1, 101):
        mask.learn(important + 0.01)
        mask.after_step(done, 100)
    assert torch.equal(mask.openness(), important)
    assert mask.pruning_steps(100)[-1] == 60


@pytest.mark.parametrize("kind", MASKS)
def test_live_groups_hold_every_live_pair_once(kind):
    openness = mask_of(kind).openness().detach()
    seen = torch.zeros_like(openness)
    for group in live_groups(openness):
        latents = torch.arange(D_SAE)[group.latents]
        seen[group.positions[:, None], latents] += 1
        if not group.gated:
            assert bool((openness[group.positions][:, latents] == 1).all())
    assert bool((seen <= 1).all())
    assert bool((seen[openness > 0] == 1).all())


def test_strict_masks_compute_only_what_is_live():
    for kind in ("slice", "hard", "cohort"):
        computed = sum(
            len(group.positions) * len(torch.arange(D_SAE)[group.latents]) for group in mask_of(kind).groups()
        )
        assert computed == mask_of(kind).openness().sum()


def test_width_at_equal_compute_leaves_as_many_latents_open_as_unmasked():
    for kind in ("slice", "cohort", "open"):
        settings = mask_settings(MASKS[kind])
        width = type(mask_of(kind)).width_at_equal_compute(settings, N_POSITIONS, D_SAE)
        if kind == "cohort":
            settings = settings.model_copy(update={"n_cohorts": 4})
        openness = make_mask(settings, N_POSITIONS, width).openness()
        assert openness.sum(1).tolist() == [D_SAE] * N_POSITIONS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hurd"}, "mask kind 'hurd' is unknown: choose one of open, slice"),
        ({"kind": "slice", "n_slices": 17}, "n_slices = 17 is more than the 16 positions"),
        ({"kind": "hard", "positions_per_latent": 20}, "20 is more than the 16 positions"),
        ({"kind": "cohort", "n_cohorts": 5, "positions_per_latent": 4}, "must be a multiple"),
        ({"kind": "soft", "low": 0.7, "high": 0.3}, "low = 0.7 is above high = 0.3"),
    ],
)
def test_masks_that_do_not_fit_say_why(values, message):
    with pytest.raises(BadSetting, match=message):
        make_mask(mask_settings(values), N_POSITIONS, D_SAE)


def test_equal_compute_is_refused_where_a_position_has_no_fixed_number_of_latents():
    mask = mask_of("hard")
    with pytest.raises(BadSetting, match="has no equal-compute form"):
        mask.width_at_equal_compute(mask.settings, N_POSITIONS, D_SAE)
