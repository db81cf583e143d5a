"""The table of latents: planted truth, false discoveries, and its parts against their definitions."""

import numpy as np
import pytest
import torch

from posmask.evaluation import latent_table as table_module
from posmask.evaluation import stored_codes
from posmask.evaluation.latent_table import COLUMNS, position_bins
from posmask.evaluation.position import PositionInformation, ShiftDesign
from posmask.evaluation.retention import PositionMass
from posmask.evaluation.stored_codes import StoredCodes
from simulated_latents import LENGTH, N_TRAITS, N_WINDOWS, SHIFT_TEXTS, batch_of, codes_of, contents, simulate


def chance(share, shape, random):
    return torch.rand(shape, generator=random) < share


def content_only(n_latents):
    which, strength = torch.arange(n_latents) % N_TRAITS, 0.3 + 0.6 * torch.arange(n_latents) / n_latents

    def fires(position, traits, random):
        shape = len(position), n_latents
        return (traits[:, which] & chance(strength, shape, random)) | chance(0.002, shape, random)

    return fires


@pytest.mark.parametrize("starts_alike", [False, True])
def test_content_alone_is_not_taken_for_position(starts_alike):
    table = simulate(content_only(1000), 1000, n_tokens=24_000, starts_alike=starts_alike)
    assert table.uses_rotations is not starts_alike
    p = table.columns["p_value"]
    assert (p[np.isfinite(p)] < 0.05).mean() < 0.06
    assert (table.columns["q_value"] < 0.05).sum() <= 2
    assert not np.isin(table.columns["class"], ["position-tracking", "mixed"]).any()
    assert (table.columns["class"] == "content").mean() > (0.1 if starts_alike else 0.5)


PLANTED = {
    "inside": ("position-tracking", {"early", "middle", "late"}),
    "late": ("position-tracking", {"late"}),
    "first": ("position-tracking", {"first"}),
    "periodic": ("position-tracking", {"periodic"}),
    "content": ("content", {""}),
    "mixed": ("mixed", {"early", "middle", "late"}),
    "dead": ("dead", {""}),
    "rare": ("undecided", {""}),
}


def planted(n_latents):
    kinds = list(PLANTED)

    def fires(position, traits, random):
        out = torch.zeros(len(position), n_latents, dtype=torch.bool)
        for latent in range(n_latents):
            kind, number = kinds[latent % len(kinds)], latent // len(kinds)
            inside = (position >= 1 + 3 * number) & (position < 15 + 3 * number)
            trait = traits[:, number % 12]
            where = {
                "inside": inside,
                "late": position > 100 + number % 10,
                "first": position == 1,
                "periodic": position % (3 + number % 14) == 0,
                "content": trait & (number % 2 == 0 or traits[:, (number + 1) % 12]),
                "mixed": trait & inside,
                "dead": torch.zeros_like(inside),
                "rare": torch.zeros_like(inside),
            }[kind]
            out[:, latent] = where & chance(0.95, (len(position),), random)
            if kind != "dead":
                out[:, latent] |= chance(0.0002 if kind == "rare" else 0.001, (len(position),), random)
        return out

    return fires


def test_planted_latents_are_recovered():
    n_latents = 25 * len(PLANTED)
    table = simulate(planted(n_latents), n_latents, n_tokens=60_000)
    classes, kinds = table.columns["class"], table.columns["kind"]
    truth = np.array([PLANTED[list(PLANTED)[latent % len(PLANTED)]][0] for latent in range(n_latents)])
    for name in {name for name, _ in PLANTED.values()}:
        # A content latent that fires at more than a tenth of tokens is dense, which is true of it, too.
        called = classes == name
        recall, precision = (called & (truth == name)).sum() / (truth == name).sum(), (truth[called] == name).mean()
        assert precision >= 0.95, (name, precision)
        assert recall >= 0.95 or name == "content", (name, recall)
    assert np.isin(classes[truth == "content"], ["content", "dense"]).mean() >= 0.95
    right = [kinds[latent] in PLANTED[list(PLANTED)[latent % len(PLANTED)]][1] for latent in range(n_latents)]
    assert np.mean(np.array(right)[truth != "undecided"]) >= 0.95


def test_columns_are_documented_and_complete():
    table = simulate(content_only(8), 8, n_tokens=4000)
    assert list(table.columns) == list(COLUMNS)
    assert {len(column) for column in table.columns.values()} == {8}
    rate = table.columns["firing_rate"]
    assert (table.columns["firing_rate_low"] <= rate).all()
    assert (rate <= table.columns["firing_rate_high"]).all()
    tokens = np.diff(np.append(table.bin_start, 128))
    assert table.rate.T @ tokens / tokens.sum() == pytest.approx(rate, rel=0.05)


def test_latents_of_sinks_track_position_only_if_sinks_are_at_the_first_positions():
    fires = content_only(3)
    first = simulate(fires, 3, n_tokens=6000, sink_firings=[12, 12, 2], sink_position=[1] * 11 + [60])
    rate = first.columns["sink_rate"]
    assert rate.tolist() == pytest.approx([1, 1, 1 / 6])
    expected = np.where((rate >= 0.5) & (rate >= 10 * first.columns["firing_rate"]), "sink", first.columns["kind"])
    assert first.columns["kind"].tolist() == expected.tolist()
    assert "sink" in expected
    anywhere = simulate(fires, 3, n_tokens=6000, sink_firings=[12, 12, 2], sink_position=range(1, 13))
    assert "sink" not in anywhere.columns["kind"]


def test_few_firings_are_undecided():
    table = simulate(lambda position, traits, random: chance(0.001, (len(position), 40), random), 40, n_tokens=8000)
    assert set(table.columns["class"]) == {"undecided"}


@pytest.mark.parametrize("in_memory", [2**28, 1000])
def test_codes_are_stored_by_blocks(in_memory, monkeypatch):
    monkeypatch.setattr(stored_codes, "LATENTS_PER_BLOCK", 7)
    monkeypatch.setattr(stored_codes, "MOST_BYTES_IN_MEMORY", in_memory)
    random = torch.Generator().manual_seed(0)
    stored, dense = StoredCodes(20), []
    for number in range(5):
        codes = codes_of(chance(0.2, (30, 20), random), random)
        dense.append(codes.dense())
        where = torch.arange(30)
        stored.add(batch_of(where, torch.full((30,), number), where), codes)
    blocks = list(stored.blocks())
    assert [latents.stop - latents.start for latents, _ in blocks] == [7, 7, 6]
    assert torch.equal(torch.cat([codes.dense() for _, codes in blocks], 1), torch.cat(dense))
    assert torch.equal(stored.batch.text, torch.arange(5).repeat_interleave(30))


def test_shares_are_those_of_the_reported_metrics(monkeypatch):
    """Blocks of latents have the numbers that all latents together have."""
    monkeypatch.setattr(stored_codes, "LATENTS_PER_BLOCK", 16)
    together = {}
    plain = table_module._of_heldout

    def kept(used, information, bins):
        together.setdefault("by_latent", []).append(information.by_latent(used))
        return plain(used, information, bins)

    monkeypatch.setattr(table_module, "_of_heldout", kept)
    table = simulate(content_only(40), 40, n_tokens=12_000)
    expected = torch.cat(together["by_latent"]).numpy()
    assert len(together["by_latent"]) == 3
    np.testing.assert_allclose(table.columns["position_share"], expected, atol=1e-9)


def test_the_shift_design_of_each_latent_averages_to_its_measures():
    random = torch.Generator().manual_seed(0)
    design = ShiftDesign(SHIFT_TEXTS, LENGTH, N_WINDOWS, 12)
    pieces = contents(SHIFT_TEXTS, LENGTH, random).flatten(0, 1)
    content = torch.arange(SHIFT_TEXTS * LENGTH)
    for window in range(N_WINDOWS):
        firing = content_only(12)(content, pieces, random)
        where = 1 + (window + 1) * LENGTH + content % LENGTH
        design.update(batch_of(where, content // LENGTH, content % LENGTH + 1), codes_of(firing, random))
    shares, without = design.by_latent()
    measures = design.measures("on")
    assert shares.nanmean(1).tolist() == pytest.approx([measure.value for measure in measures])
    assert without.shape == (16, 3, 12)
    real, null = design.with_null(7)
    assert null.shape == (7, 12)
    assert bool((null > 0).all())
    # The statistic is a ratio of mean squares, so its null is about 1 on average.
    assert 0.5 < float(null.mean()) < 2
    assert 0.2 < float(real.mean()) < 3


def test_p_values_of_exchangeable_draws_are_uniform():
    draws = torch.rand(20, 4000, generator=torch.Generator().manual_seed(0)).exp()
    p = table_module._pooled_p(draws[0], draws[1:])
    for level in (0.01, 0.05, 0.5):
        assert float((p <= level).double().mean()) == pytest.approx(level, rel=0.35, abs=0.01)
    draws[:, :10] = torch.nan
    assert bool(table_module._pooled_p(draws[0], draws[1:])[:10].isnan().all())


def test_information_of_bins_is_that_of_summed_counts():
    random = torch.Generator().manual_seed(0)
    bins = position_bins(128)
    position = torch.arange(2000) % 127 + 1
    batch = batch_of(position, torch.arange(2000) // 50, position)
    codes = codes_of(chance(0.1, (2000, 3), random), random)
    used, information = PositionMass(128, 3), PositionInformation(128, 3, 40, torch.arange(1, 128))
    used.update(batch, codes)
    information.update(batch, codes)
    real, _ = information.with_null(used, bins)
    fires = codes.dense() > 0
    for latent in range(3):
        table = np.zeros((int(bins.max()) + 1, 2))
        np.add.at(table, (bins[position].numpy(), fires[:, latent].long().numpy()), 1)
        joint = table / table.sum()
        outer = joint.sum(1, keepdims=True) * joint.sum(0)
        information_of = (joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum()
        fired = joint.sum(0)
        assert float(real[latent]) == pytest.approx(information_of / -(fired * np.log(fired)).sum(), rel=1e-5)
