import pytest
import torch
from pydantic import ValidationError

from conftest import D_SAE, MASKS, N_POSITIONS
from posmask import masks
from posmask.errors import BadSetting
from posmask.evaluation.retention import mask_measures
from posmask.masks import fixed, make_mask, mask_settings, splitting
from posmask.masks.groups import live_groups


def mask_of(kind, **changes):
    return make_mask(mask_settings({**MASKS[kind], **changes}), N_POSITIONS, D_SAE, seed=0)


def test_every_mask_kind_is_tested():
    assert set(MASKS) == set(masks.MASKS)


@pytest.mark.parametrize("kind", MASKS)
def test_openness_is_between_0_and_1_and_determined_by_the_seed(kind):
    openness = mask_of(kind).openness().detach()
    assert openness.shape == (N_POSITIONS, D_SAE)
    assert bool(((openness >= 0) & (openness <= 1)).all())
    assert torch.equal(openness, mask_of(kind).openness())


def test_slice_opens_block_b_on_positions_of_block_b():
    openness = mask_of("slice").openness()
    for position in range(N_POSITIONS):
        for latent in range(D_SAE):
            assert openness[position, latent] == float(position // 4 == latent // 8)


def test_contiguous_hard_windows_have_adjacent_live_latents():
    mask = mask_of("hard", contiguous=True)
    openness = mask.openness()
    assert openness.sum(0).tolist() == [4] * D_SAE
    first = openness.argmax(0)
    assert bool((openness.gather(0, first + torch.arange(4)[:, None]) == 1).all())
    assert bool((first.diff() >= 0).all())
    assert len(first.unique()) > 8  # of 13 possible starts
    assert all(isinstance(group.latents, slice) for group in mask.groups())


def test_positions_that_share_most_live_latents_are_grouped():
    mask = make_mask(mask_settings({"kind": "hard", "positions_per_latent": 16, "contiguous": True}), 128, 1024, seed=0)
    groups = mask.groups()
    assert 20 < len(groups) < 60
    assert sorted(torch.cat([group.positions for group in groups]).tolist()) == list(range(128))
    for group in groups:
        live = mask.openness()[group.positions] > 0
        inside = live[:, group.latents].sum(1)
        assert torch.equal(inside, live.sum(1))
        assert group.latents.stop - group.latents.start <= 1.25 * int(inside.min())
        assert group.gated == (not bool((mask.openness()[group.positions][:, group.latents] == 1).all()))
    assert len(make_mask(mask_settings({"kind": "slice", "n_slices": 8}), 128, 1024).groups()) == 8


def test_hard_masks_open_exactly_that_many_positions_per_latent():
    openness = mask_of("hard").openness()
    assert openness.sum(0).tolist() == [4] * D_SAE
    assert len(torch.unique(openness, dim=1).T) > D_SAE / 2


def test_cohort_neighbors_share_positions_and_every_position_is_equally_open():
    openness = mask_of("cohort").openness()
    assert openness.sum(0).tolist() == [4] * D_SAE
    assert openness.sum(1).tolist() == [D_SAE * 4 / N_POSITIONS] * N_POSITIONS
    assert torch.equal(openness[:, 0::4], openness[:, 3::4])


def test_soft_starts_uniform_between_low_and_high():
    openness = mask_of("soft").openness().detach()
    assert 0.3 <= float(openness.min()) < 0.35
    assert 0.65 < float(openness.max()) <= 0.7


def test_importance_keeps_the_most_salient_positions():
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
def test_live_groups_contain_every_live_pair_once(kind):
    openness = mask_of(kind).openness().detach()
    seen = torch.zeros_like(openness)
    for group in live_groups(openness):
        latents = torch.arange(D_SAE)[group.latents]
        seen[group.positions[:, None], latents] += 1
        if not group.gated:
            assert bool((openness[group.positions][:, latents] == 1).all())
    assert bool((seen <= 1).all())
    assert bool((seen[openness > 0] == 1).all())


def test_strict_masks_compute_only_live_latents():
    for kind in ("slice", "hard", "cohort"):
        computed = sum(
            len(group.positions) * len(torch.arange(D_SAE)[group.latents]) for group in mask_of(kind).groups()
        )
        assert computed == mask_of(kind).openness().sum()


WIDTHS = [
    ({"kind": "open"}, 32),
    ({"kind": "slice", "n_slices": 4}, 128),
    ({"kind": "slice", "n_slices": 4, "free_fraction": 0.5}, None),
    ({"kind": "cohort", "n_cohorts": 4, "positions_per_latent": 4}, 128),
    ({"kind": "cohort", "n_cohorts": 8, "positions_per_latent": 4, "free_fraction": 0.3}, None),
    ({"kind": "band"}, 7 * 32),
    ({"kind": "band", "growth": 2, "free_fraction": 0.1}, None),
    ({"kind": "split", "start_latents": 32, "max_latents": 100}, 100),
    ({"kind": "switch", "n_experts": 4}, 128),
]


@pytest.mark.parametrize(("values", "width"), WIDTHS)
def test_width_at_equal_compute_keeps_the_number_of_open_latents(values, width):
    settings = mask_settings(values)
    d_sae = masks.MASKS[settings.kind].width_at_equal_compute(settings, N_POSITIONS, 32)
    assert width is None or d_sae == width
    mask = make_mask(settings, N_POSITIONS, d_sae)
    assert set(mask.table().sum(1).tolist()) == {32.0}
    assert abs(mask.n_free / d_sae - settings.free_fraction) < 0.1


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_free_latents_are_open_everywhere_and_others_follow_the_kind(kind, fraction):
    more = {"start_latents": 16} if kind == "split" else {}
    mask = mask_of(kind, free_fraction=fraction, **more)
    # Rounded so that blocks are equal: 7 windows of the band cannot share 24 latents.
    assert mask.n_free == (11 if (kind, fraction) == ("band", 0.25) else fraction * D_SAE)
    assert bool((mask.table()[:, : mask.n_free] == 1).all())
    assert bool(mask.bound_positions()[:, : mask.n_free].all())
    if 0 < mask.n_free < D_SAE:
        bound = mask.table()[:, mask.n_free :].detach()
        assert kind in ("open", "importance") or bool((bound != 1).any())


@pytest.mark.parametrize("kind", ["slice", "hard", "cohort", "band", "importance"])
def test_leak_is_the_minimum_openness(kind):
    strict = mask_of(kind).openness()
    for leak in (0.0, 0.3, 1.0):
        leaky = mask_of(kind, leak=leak)
        torch.testing.assert_close(leaky.openness(), strict.clamp(min=leak))
        assert torch.equal(leaky.bound_positions(), strict > 0)
    assert mask_measures(mask_of(kind, leak=0.3))[1].value == pytest.approx(0.7 if kind != "importance" else 0)


def test_strictness_and_mean_openness_exclude_bos():
    openness, strictness = mask_measures(mask_of("hard"))
    assert openness.value == pytest.approx(float(mask_of("hard").openness()[1:].mean()))
    assert strictness.value == 1
    assert [measure.value for measure in mask_measures(mask_of("open"))] == [1, 0]


def test_bands_start_with_single_positions_and_grow():
    window = fixed.Band.windows(mask_settings({"kind": "band", "growth": 1.5}), 32)
    assert torch.bincount(window).tolist() == [2, 1, 1, 1, 2, 3, 5, 7, 10]
    mask = mask_of("band")
    assert bool((mask.openness().sum(0) == torch.bincount(fixed.Band.windows(mask.settings, 16))[
        torch.arange(D_SAE) * 7 // D_SAE
    ]).all())  # fmt: skip
    assert torch.equal(mask.openness().max(1).values, torch.ones(16))


def test_smooth_bands_decay_on_both_sides():
    mask = mask_of("band", smoothness=1.0)
    strict = mask_of("band").openness()
    assert torch.equal(mask.openness() == 1, strict == 1)
    last = mask.openness()[:, -1]
    assert last.tolist() == sorted(last.tolist())
    assert 0 < float(last[8]) < 1
    assert float(last[1]) == 0
    assert torch.equal(mask.bound_positions(), strict == 1)
    assert len(mask.groups()) > 1  # closed latents are not computed, although openness is fractional


def test_soft_masks_sharpen_and_freeze_on_schedule():
    mask = mask_of("soft", last_temperature=0.01, sharpen_from=0.25, sharpen_to=0.75, freeze_at=0.9)
    temperatures, learns = [], []
    for done in range(101):
        mask.before_step(done, 100)
        temperatures.append(float(mask.temperature))
        learns.append(mask.learns)
    assert temperatures[:26] == [1.0] * 26
    assert temperatures[50] == pytest.approx(0.1)
    assert temperatures[75:] == pytest.approx([0.01] * 26)
    assert learns == [True] * 90 + [False] * 11
    assert mask_measures(mask)[1].value > 0.99  # ends strict


def test_pressure_adds_a_gradient_that_closes_gates():
    mask = mask_of("soft", pressure=2.0)
    mask.learn(torch.zeros(N_POSITIONS, D_SAE))
    openness = mask.openness().detach()
    torch.testing.assert_close(mask.theta.grad, 2.0 * openness * (1 - openness) / openness.numel())


def test_importance_regrows_closed_positions_between_prunings():
    mask = mask_of("importance", regrow=0.5, n_prunings=4)
    salient = torch.rand(N_POSITIONS, D_SAE, generator=torch.Generator().manual_seed(0))
    opened, before = 0, mask.openness().clone()
    for done in range(1, 101):
        mask.learn(salient)
        mask.after_step(done, 100)
        opened += int(((mask.openness() == 1) & (before == 0)).sum())
        before = mask.openness().clone()
    assert opened > D_SAE
    assert mask.openness().sum(0).tolist() == [4.0] * D_SAE


@pytest.mark.parametrize("kind", MASKS)
def test_only_masks_that_learn_or_split_change_during_training(kind):
    assert mask_of(kind).changes_in_training == (kind in ("soft", "importance", "split"))


def test_lifting_matters_only_for_masks_that_gate_codes():
    assert mask_of("slice").lifting_matters()
    assert not mask_of("slice", gating="gradient").lifting_matters()
    assert not mask_of("slice", leak=1.0).lifting_matters()
    assert not mask_of("open").lifting_matters()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hurd"}, r"mask kind 'hurd' is unknown: choose one of open, slice.* \(did you mean 'hard'\?\)"),
        ({"kind": "slice", "n_slices": 17}, "n_slices = 17 is more than the 16 positions"),
        ({"kind": "hard", "positions_per_latent": 20}, "20 is more than the 16 positions"),
        ({"kind": "cohort", "n_cohorts": 5, "positions_per_latent": 4}, "must be a multiple"),
        ({"kind": "soft", "low": 0.7, "high": 0.3}, "low = 0.7 is above high = 0.3"),
        ({"kind": "band", "growth": 1}, None),
        ({"kind": "split", "start_latents": 8, "max_latents": 30}, "max_latents = 30 is not the 32 latents"),
        (
            {"kind": "split", "start_latents": 8, "max_latents": 32, "n_windows": 17},
            "n_windows = 17 is more than the 16 positions",
        ),
        (
            {"kind": "split", "start_latents": 8, "max_latents": 32, "free_fraction": 0.5},
            "are all among the 16 free latents",
        ),
        (
            {"kind": "split", "start_latents": 8, "max_latents": 32, "n_splittings": 1},
            "n_splittings = 1 cannot make 32 latents of 8",
        ),
        ({"kind": "switch", "n_experts": 33}, "n_experts = 33 is more than the 32 latents"),
    ],
)
def test_masks_that_do_not_fit_raise_an_error(values, message):
    if message is None:
        make_mask(mask_settings(values), N_POSITIONS, D_SAE)
        return
    with pytest.raises(BadSetting, match=message):
        make_mask(mask_settings(values), N_POSITIONS, D_SAE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "open", "free_fraction": 1.5}, "less than or equal to 1"),
        ({"kind": "open", "free_fraction": -0.1}, "greater than or equal to 0"),
        ({"kind": "open", "leak": 2}, "less than or equal to 1"),
        ({"kind": "open", "position_origin": "paragraph"}, "'context', 'text', 'sentence', 'line' or 'end'"),
        ({"kind": "split", "start_latents": 9, "max_latents": 8}, "start_latents = 9 is above max_latents = 8"),
        (
            {"kind": "split", "start_latents": 8, "max_latents": 9, "gating": "gradient"},
            "unborn latents must be silent",
        ),
        ({"kind": "split", "start_latents": 8, "max_latents": 9, "leak": 0.1}, "unborn latents must be silent"),
        ({"kind": "switch", "n_experts": 4, "leak": 0.1}, "switch has no positions"),
        ({"kind": "soft", "low": 0.1, "high": 0.2, "sharpen_from": 0.9}, "sharpen_from, sharpen_to = 0.9, 0.8"),
        (
            {"kind": "soft", "low": 0.1, "high": 0.2, "sharpen_from": 0.1, "sharpen_to": 0.1},
            "sharpen_from, sharpen_to = 0.1, 0.1",
        ),
    ],
)
def test_invalid_mask_settings_raise_an_error(values, message):
    with pytest.raises(ValidationError, match=message):
        mask_settings(values)


def test_equal_compute_without_a_fixed_number_of_latents_raises_an_error():
    mask = mask_of("hard")
    with pytest.raises(BadSetting, match="has no equal-compute form"):
        mask.width_at_equal_compute(mask.settings, N_POSITIONS, D_SAE)
    settings = mask_settings({"kind": "split", "start_latents": 8, "max_latents": 64})
    with pytest.raises(BadSetting, match="start_latents = 8 is not the 32 latents that are live"):
        splitting.Split.width_at_equal_compute(settings, N_POSITIONS, D_SAE)
