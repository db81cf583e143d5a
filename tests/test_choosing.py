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
    value[3] = -1.0  # a token without positive values
    value[5, ::3] = value[5].max()  # a token with many equal values
    return value


def chosen(value, choice, openness=None, **options):
    """Return the (token, latent) pairs that `choose` selects if the pre-activations are `value`."""
    n_tokens, n_latents = value.shape
    low = value.dtype == torch.bfloat16
    value = value.float() if low else value
    openness = value.new_ones(1, n_latents) if openness is None else openness
    groups = live_groups(openness)
    mask_row = torch.arange(n_tokens) % len(openness)
    order, ends = in_group_order(groups, mask_row)
    order = torch.arange(n_tokens) if order is None else order
    precision = "bfloat16" if low else "float32"
    identity, bias = torch.eye(n_latents, dtype=value.dtype), value.new_zeros(n_latents)
    inputs, encoder = GroupedInputs(value[order], mask_row[order], ends), GatedEncoder(identity, bias, groups, openness)
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
    n_tokens = 8 if either_way == "triton" else 20
    value = table(n_latents, dtype, n_tokens)
    pairs = chosen(value, LargestOfToken(k))
    # Compare values, because any of several equal values may be selected.
    for token, row in enumerate(value.double().tolist()):
        pairs_of_token = [pair for pair in pairs if pair[0] == token]
        assert by_size(value, pairs_of_token) == sorted((v for v in row if v > 0), reverse=True)[:k]
    everything = sorted((v for v in value.double().flatten().tolist() if v > 0), reverse=True)
    for guess in (0.0, 0.5, 100.0):  # a guess that is too low, about right or too high
        assert by_size(value, chosen(value, LargestOfBatch(k, guess))) == everything[: n_tokens * k]
    assert by_size(value, chosen(value, Above(0.5))) == [v for v in everything if v > 0.5]


@pytest.mark.parametrize("dtype", TYPES)
def test_exactly_k_of_equal_values_are_selected(dtype, either_way):
    ones = torch.ones(2, 600).to(dtype)
    tokens = [token for token, _ in chosen(ones, LargestOfToken(32))]
    assert tokens == [0] * 32 + [1] * 32
    assert len(chosen(ones, LargestOfBatch(32))) == 64


@pytest.mark.parametrize("n_latents", [640, 4096])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("choice", [LargestOfToken(5), LargestOfBatch(5), Above(0.3)])
def test_only_live_latents_are_selected_by_gated_value(choice, scattered, n_latents, either_way):
    n_rows, n_tokens = 4, 9 if either_way == "triton" else 37
    random = torch.Generator().manual_seed(0)
    openness = torch.rand(n_rows, n_latents, generator=random)
    live = torch.arange(n_latents) * n_rows // n_latents == torch.arange(n_rows)[:, None]
    if scattered:
        live = torch.rand(n_rows, n_latents, generator=random) < 0.25
    openness = openness * live
    value = table(n_latents, n_tokens=n_tokens)
    gated = value * openness[torch.arange(n_tokens) % n_rows]
    assert by_size(gated, chosen(value, choice, openness)) == by_size(gated, chosen(gated, choice))
    among = torch.arange(n_latents) % 2 == 0
    assert by_size(gated, chosen(value, choice, openness, among=among)) == by_size(gated, chosen(gated * among, choice))
    none = torch.zeros(n_latents).bool()
    assert chosen(value, choice, openness, among=none) == []


def test_a_position_without_live_latents_gets_no_codes(either_way):
    openness = torch.zeros(2, 50)
    openness[1, 10:20] = 1
    pairs = chosen(table(50).abs(), LargestOfToken(3), openness)
    assert {token % 2 for token, _ in pairs} == {1}
    assert {latent // 10 for _, latent in pairs} == {1}


def test_dropping_candidates_keeps_the_largest_of_the_batch(monkeypatch):
    """Candidates dropped before all tokens are seen are never among the largest."""
    monkeypatch.setattr(selection, "_LEAST_ROWS", 64)
    value = table(3000, n_tokens=1500)
    cuts = []
    plain = selection._Candidates._cut
    monkeypatch.setattr(
        selection._Candidates, "_cut", lambda self, wanted: cuts.append(self._n_entries) or plain(self, wanted)
    )
    x, mask_row = value, torch.zeros(1500, dtype=torch.int64)
    groups = [LiveGroup(torch.tensor([0]), slice(0, 3000), gated=False)]
    encoder = GatedEncoder(torch.eye(3000), torch.zeros(3000), groups, torch.ones(1, 3000))
    entries = choose(GroupedInputs(x, mask_row, [1500]), encoder, LargestOfBatch(4))
    pairs = value[entries.token, entries.latent].sort(descending=True).values
    assert len(cuts) > 2
    assert max(cuts) < 0.2 * value.numel()
    assert torch.equal(pairs, value.flatten().topk(6000).values)


def test_tokens_in_group_order_are_not_copied():
    groups = live_groups(torch.eye(4).repeat_interleave(3, 0))
    mask_row = torch.tensor([0, 2, 3, 3, 7, 11])
    order, ends = in_group_order(groups, mask_row)
    assert order is None
    assert ends == [2, 4, 5, 6]
    order, ends = in_group_order(groups, mask_row.flip(0))
    assert order.tolist() == [4, 5, 2, 3, 1, 0]
    assert ends == [2, 4, 5, 6]


def test_infinite_values_give_at_most_k_latents_per_token(either_way):
    """Codes of infinite values are useless, but all indices stay valid."""
    n_tokens = 8 if either_way == "triton" else 20
    x = torch.where(torch.arange(130) < 70, 1e38, table(130, n_tokens=n_tokens))
    mask_row, everywhere = torch.zeros(n_tokens, dtype=torch.int64), torch.ones(1, 130)
    weight = 1e3 * torch.eye(130)  # 1e41 is more than float32 holds
    encoder = GatedEncoder(weight, torch.zeros(130), live_groups(everywhere), everywhere)
    entries = choose(GroupedInputs(x, mask_row, [n_tokens]), encoder, LargestOfToken(32))
    assert int(torch.bincount(entries.token, minlength=n_tokens).max()) <= 32
    assert 0 <= int(entries.latent.min()) <= int(entries.latent.max()) < 130


def test_products_have_few_shapes_for_any_batch(monkeypatch):
    """oneDNN caches a kernel for each of up to a thousand shapes, which would cost several hundred MiB."""
    shapes, product = set(), torch.mm

    def recorded(left, right, out):
        shapes.add(tuple(left.shape))
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", recorded)
    openness = torch.block_diag(*torch.ones(3, 1, 32))
    groups = live_groups(openness)
    encoder = GatedEncoder(torch.randn(96, 16), torch.zeros(96), groups, openness)
    for seed in range(30):
        mask_row = torch.randint(3, (400,), generator=torch.Generator().manual_seed(seed)).sort().values
        order, ends = in_group_order(groups, mask_row)
        assert order is None
        choose(GroupedInputs(torch.randn(400, 16), mask_row, ends), encoder, LargestOfToken(4))
    assert {n_rows % 32 for n_rows, _ in shapes} == {0}
    assert len(shapes) <= 5
