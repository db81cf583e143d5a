import pytest
import torch

from posmask.masks.groups import LiveGroup, live_groups
from posmask.sae import selection
from posmask.sae.selection import (
    Above,
    GatedEncoder,
    GroupedInputs,
    LargestOfBatch,
    LargestOfToken,
    choose,
    in_group_order,
)

TYPES = [torch.float32, torch.float64, torch.bfloat16]


def table(n_latents, dtype=torch.float32, n_tokens=20):
    value = torch.randn(n_tokens, n_latents, generator=torch.Generator().manual_seed(n_latents)).to(dtype)
    value[3] = -1.0  # a token for which nothing is positive
    value[5, ::3] = value[5].max()  # and one with many equal numbers
    return value


def chosen(value, choice, openness=None, **options):
    """(token, latent) pairs that `choose` takes of products that are just these values."""
    n_tokens, n_latents = value.shape
    low = value.dtype == torch.bfloat16
    value = value.float() if low else value
    openness = value.new_ones(1, n_latents) if openness is None else openness
    groups = live_groups(openness)
    place = torch.arange(n_tokens) % len(openness)
    order, ends = in_group_order(groups, place)
    order = torch.arange(n_tokens) if order is None else order
    precision = "bfloat16" if low else "float32"
    identity, bias = torch.eye(n_latents, dtype=value.dtype), value.new_zeros(n_latents)
    inputs, encoder = GroupedInputs(value[order], place[order], ends), GatedEncoder(identity, bias, groups, openness)
    entries = choose(inputs, encoder, choice, precision=precision, **options)
    assert bool((entries.token.diff() >= 0).all())
    token, latent = order[entries.token], entries.latent
    torch.testing.assert_close(entries.preactivation, value[token, latent])
    pairs = list(zip(token.tolist(), latent.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    return pairs


def by_size(value, pairs):
    return sorted((float(value[pair]) for pair in pairs), reverse=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n_latents", "k"), [(7, 10), (40, 4), (300, 32), (1100, 32), (1100, 200), (600, 500)])
def test_largest_of_token_and_batch_equal_sorting(dtype, n_latents, k, either_way):
    value = table(n_latents, dtype)
    found = chosen(value, LargestOfToken(k))
    # By value, since of equal numbers any may be taken.
    for token, row in enumerate(value.double().tolist()):
        own = [pair for pair in found if pair[0] == token]
        assert by_size(value, own) == sorted((v for v in row if v > 0), reverse=True)[:k]
    everything = sorted((v for v in value.double().flatten().tolist() if v > 0), reverse=True)
    for near in (0.0, 0.5, 100.0):  # whether the guess is too low, about right or too high
        assert by_size(value, chosen(value, LargestOfBatch(k, near))) == everything[: 20 * k]
    assert by_size(value, chosen(value, Above(0.5))) == [v for v in everything if v > 0.5]


@pytest.mark.parametrize("dtype", TYPES)
def test_exactly_k_of_equal_numbers_are_selected(dtype, either_way):
    ones = torch.ones(2, 600).to(dtype)
    tokens = [token for token, _ in chosen(ones, LargestOfToken(32))]
    assert tokens == [0] * 32 + [1] * 32
    assert len(chosen(ones, LargestOfBatch(32))) == 64


@pytest.mark.parametrize("n_latents", [640, 4096])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("choice", [LargestOfToken(5), LargestOfBatch(5), Above(0.3)])
def test_only_live_latents_are_selected_by_gated_value(choice, scattered, n_latents, either_way):
    n_places = 4
    random = torch.Generator().manual_seed(0)
    openness = torch.rand(n_places, n_latents, generator=random)
    live = torch.arange(n_latents) * n_places // n_latents == torch.arange(n_places)[:, None]
    if scattered:
        live = torch.rand(n_places, n_latents, generator=random) < 0.25
    openness = openness * live
    value = table(n_latents, n_tokens=37)
    gated = value * openness[torch.arange(37) % n_places]
    assert by_size(gated, chosen(value, choice, openness)) == by_size(gated, chosen(gated, choice))
    among = torch.arange(n_latents) % 2 == 0
    assert by_size(gated, chosen(value, choice, openness, among=among)) == by_size(gated, chosen(gated * among, choice))
    nobody = torch.zeros(n_latents).bool()
    assert chosen(value, choice, openness, among=nobody) == []


def test_a_position_without_live_latents_gets_no_codes(either_way):
    openness = torch.zeros(2, 50)
    openness[1, 10:20] = 1
    found = chosen(table(50).abs(), LargestOfToken(3), openness)
    assert {token % 2 for token, _ in found} == {1}
    assert {latent // 10 for _, latent in found} == {1}


def test_dropping_candidates_keeps_the_largest_of_the_batch(monkeypatch):
    """Candidates dropped before all tokens are seen are never among the largest."""
    monkeypatch.setattr(selection, "_LEAST_ROWS", 64)
    value = table(5000, n_tokens=2000)
    cuts = []
    plain = selection._Candidates._cut
    monkeypatch.setattr(
        selection._Candidates, "_cut", lambda self, wanted: cuts.append(self._n_entries) or plain(self, wanted)
    )
    x, place = value, torch.zeros(2000, dtype=torch.int64)
    groups = [LiveGroup(torch.tensor([0]), slice(0, 5000), gated=False)]
    encoder = GatedEncoder(torch.eye(5000), torch.zeros(5000), groups, torch.ones(1, 5000))
    entries = choose(GroupedInputs(x, place, [2000]), encoder, LargestOfBatch(4))
    pairs = value[entries.token, entries.latent].sort(descending=True).values
    assert len(cuts) > 2
    assert max(cuts) < 0.2 * value.numel()
    assert torch.equal(pairs, value.flatten().topk(8000).values)


def test_tokens_in_group_order_are_not_copied():
    groups = live_groups(torch.eye(4).repeat_interleave(3, 0))
    place = torch.tensor([0, 2, 3, 3, 7, 11])
    order, ends = in_group_order(groups, place)
    assert order is None
    assert ends == [2, 4, 5, 6]
    order, ends = in_group_order(groups, place.flip(0))
    assert order.tolist() == [4, 5, 2, 3, 1, 0]
    assert ends == [2, 4, 5, 6]


def test_infinite_numbers_give_at_most_k_latents_per_token(either_way):
    """Codes of infinite numbers are useless, but all indices stay valid."""
    x = torch.where(torch.arange(130) < 70, 1e38, table(130))
    place, everywhere = torch.zeros(20, dtype=torch.int64), torch.ones(1, 130)
    weight = 1e3 * torch.eye(130)  # 1e41 is more than float32 holds
    encoder = GatedEncoder(weight, torch.zeros(130), live_groups(everywhere), everywhere)
    entries = choose(GroupedInputs(x, place, [20]), encoder, LargestOfToken(32))
    assert int(torch.bincount(entries.token, minlength=20).max()) <= 32
    assert 0 <= int(entries.latent.min()) <= int(entries.latent.max()) < 130


def test_products_have_few_shapes_for_any_batch(monkeypatch):
    """oneDNN compiles a kernel for each shape and keeps a thousand, some hundred MiB: memory would grow for hours."""
    seen, product = set(), torch.mm

    def watched(left, right, out):
        seen.add(tuple(left.shape))
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    openness = torch.block_diag(*torch.ones(3, 1, 32))
    groups = live_groups(openness)
    encoder = GatedEncoder(torch.randn(96, 16), torch.zeros(96), groups, openness)
    for seed in range(30):
        place = torch.randint(3, (400,), generator=torch.Generator().manual_seed(seed)).sort().values
        order, ends = in_group_order(groups, place)
        assert order is None
        choose(GroupedInputs(torch.randn(400, 16), place, ends), encoder, LargestOfToken(4))
    assert {n_rows % 32 for n_rows, _ in seen} == {0}
    assert len(seen) <= 5
