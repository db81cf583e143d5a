import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import D_MODEL, D_SAE, N_POSITIONS, make_sae
from posmask.data.activations import evaluation_batches
from posmask.errors import DegenerateResult, NothingToDo
from posmask.evaluation.downstream import InModel, Losses, WindowMass, causal, recovered, without_latents


@pytest.fixture(scope="module")
def causal_model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def in_model(language_model, activations):
    return InModel(language_model, activations, 12)


def test_logits_from_unchanged_vectors_equal_those_of_the_model(causal_model, language_model):
    ids = torch.randint(3, 20, (3, N_POSITIONS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = causal_model(input_ids=ids).logits
    vectors = language_model.vectors(ids)
    assert torch.equal(language_model.logits(ids, vectors), expected)
    assert not torch.allclose(language_model.logits(ids, vectors * 0), expected)
    assert torch.equal(language_model.vectors(ids), vectors)  # the replacement leaves no state


def test_losses_equal_a_plain_loop(in_model, causal_model, activations):
    (clean,) = in_model.losses([])
    assert clean.cross_entropy.shape == (12, N_POSITIONS - 1)
    assert bool((clean.divergence.nan_to_num() == 0).all())
    batch = in_model.batch(torch.arange(12))
    ids, keep = (part.view(12, -1) for part in (batch.token_id.long(), batch.keep))
    with torch.inference_mode():
        log_p = causal_model(input_ids=ids).logits.log_softmax(-1)
    for context in range(12):
        for position in range(N_POSITIONS - 1):
            loss = clean.cross_entropy[context, position]
            if keep[context, position] and keep[context, position + 1]:
                assert float(loss) == pytest.approx(-float(log_p[context, position, ids[context, position + 1]]))
            else:
                assert bool(loss.isnan())
    assert bool(clean.cross_entropy[:, 0].isnan().all())  # BOS is not kept


def measures(rows):
    return {(measure.metric, *(measure.slice or {}).values()): measure for measure in rows}


def test_the_mapped_file_of_predictions_has_its_blocks_on_disk(language_model, activations, monkeypatch):
    allocated = []
    map_file = torch.from_file

    def checked(name, size, dtype, **options):
        allocated.append((os.stat(name).st_blocks * 512, size * dtype.itemsize))
        return map_file(name, size=size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "from_file", checked)
    expected = InModel(language_model, activations, 12).losses([])[0]
    with monkeypatch.context() as patch:
        patch.delattr(os, "posix_fallocate", raising=False)
        patch.setattr("posmask.evaluation.downstream._BLOCK_BYTES", 1000)
        again = InModel(language_model, activations, 12).losses([])[0]
    assert torch.equal(again.divergence.nan_to_num(), expected.divergence.nan_to_num())
    for on_disk, needed in allocated:
        assert on_disk >= needed


def test_a_full_folder_of_temporary_files_raises_an_error(language_model, activations, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"predictions do not fit into .* \(No space left on device; set TMPDIR"):
        InModel(language_model, activations, 12).losses([])


def test_loss_recovered_is_1_for_a_perfect_reconstruction_and_0_for_zeros(in_model):
    noise = torch.Generator().manual_seed(0)
    perfect, zeros, noisy = in_model.losses(
        [
            lambda batch, context: batch.vectors,
            lambda batch, context: torch.zeros_like(batch.vectors),
            lambda batch, context: batch.vectors * (1 + 0.2 * torch.randn(batch.vectors.shape, generator=noise)),
        ]
    )[1:]
    clean, zeroed = in_model.references
    # Zeros do not harm a model with random weights.
    zeroed, zeros = (Losses(losses.cross_entropy + 5, losses.divergence) for losses in (zeroed, zeros))
    for losses, value in ((perfect, 1.0), (zeros, 0.0)):
        by_key = measures(recovered((clean, zeroed), losses))
        assert by_key[("ce_recovered",)].value == pytest.approx(value, abs=1e-5)
        assert by_key[("kl_recovered",)].value == pytest.approx(value, abs=1e-5)
        assert by_key[("kl_recovered", 5)].value == pytest.approx(value, abs=1e-4)
        assert by_key[("ce_recovered", 0)].n == 0
        assert by_key[("ce_recovered", 0)].value != by_key[("ce_recovered", 0)].value  # NaN
    assert 0 < measures(recovered((clean, zeroed), noisy))[("kl_recovered",)].value < 1


def test_ablating_all_latents_leaves_the_error_and_ablating_none_changes_nothing(in_model):
    sae = make_sae("slice")
    batch = in_model.batch(torch.arange(8)).kept()
    context = torch.zeros(len(batch), dtype=torch.int64)
    codes = sae.sparse_encode(batch.vectors, batch.position)
    nothing, everything = torch.zeros(1, D_SAE).bool(), torch.ones(1, D_SAE).bool()
    torch.testing.assert_close(without_latents(sae, nothing)(batch, context), batch.vectors)
    without_bias = sae.sparse_decode(codes) - sae.decoder_bias.detach() * sae.scale - sae.center
    torch.testing.assert_close(
        without_latents(sae, everything)(batch, context), batch.vectors - without_bias, rtol=1e-4, atol=1e-5
    )
    # Context c loses only the latents of window c mod n_windows.
    both = torch.cat([nothing, everything])
    odd = torch.arange(len(batch)) % 2
    ablated = without_latents(sae, both)(batch, odd)
    torch.testing.assert_close(ablated[odd == 0], batch.vectors[odd == 0])
    assert not torch.allclose(ablated[odd == 1], batch.vectors[odd == 1])


def test_specialized_latents_are_open_in_the_window_and_have_equally_active_matches(activations):
    sae = make_sae("slice", rule={"kind": "topk", "k": D_SAE})
    by_window = WindowMass(N_POSITIONS, 4, D_SAE)
    for batch in evaluation_batches(activations):
        by_window.update(batch.kept(), sae.sparse_encode(batch.kept().vectors, batch.kept().position))
    special, matched = by_window.specialized(share=0.05)
    openness = sae.mask.openness()
    for window in range(4):
        assert int(special[window].sum()) == int(matched[window].sum()) >= 1
        assert not bool((special[window] & matched[window]).any())
        assert bool((openness[window * 4 : window * 4 + 4, special[window]].mean(0) == 1).all())


def test_loss_recovered_is_missing_where_zeros_do_no_harm():
    random = torch.Generator().manual_seed(0)
    clean = Losses(torch.rand(12, 6, generator=random), torch.zeros(12, 6))
    noise = 0.1 * torch.randn(12, 6, generator=random)
    zeroed = Losses(clean.cross_entropy + noise, torch.ones(12, 6))
    by_key = measures(recovered((clean, zeroed), Losses(clean.cross_entropy, torch.full((12, 6), 0.5))))
    missing = by_key[("ce_recovered",)]
    assert missing.value != missing.value  # NaN
    assert "vectors of 0 raise the cross-entropy by" in missing.reason
    assert ("ce_recovered", 2) not in by_key
    assert by_key[("kl_recovered",)].value == pytest.approx(0.5)
    # One position where zeros help is missing, the whole is not.
    zeroed.cross_entropy[:] = clean.cross_entropy + 1
    zeroed.cross_entropy[:, 2] = clean.cross_entropy[:, 2] - 0.1
    by_key = measures(recovered((clean, zeroed), clean))
    assert by_key[("ce_recovered",)].value == pytest.approx(1)
    assert by_key[("ce_recovered", 2)].value != by_key[("ce_recovered", 2)].value
    assert by_key[("ce_recovered", 3)].value == pytest.approx(1)


def test_matched_latents_have_the_nearest_mass():
    by_window = WindowMass(8, 2, 8)
    mass = torch.tensor([100.0, 10.0, 90.0, 50.0, 9.0, 1.0, 2.0, 3.0])
    in_first = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    by_window._mass = torch.stack([mass * in_first, mass * (1 - in_first)])
    by_window._firings = torch.full((8,), 100.0)
    special, matched = by_window.specialized(share=0.25)
    assert special[0].nonzero()[:, 0].tolist() == [0, 1]
    assert matched[0].nonzero()[:, 0].tolist() == [2, 4]
    by_window._firings[1:] = 3
    with pytest.raises(
        DegenerateResult, match="fewer than two latents fire 40 times on the 0 held-out tokens of texts that the causal"
    ):
        by_window.specialized()


def test_contexts_are_spread_over_the_data(language_model, activations):
    in_model = InModel(language_model, activations, 5)
    assert int(in_model.starts[-1]) > 0.7 * activations.n_tokens
    batch = in_model.batch(torch.arange(5))
    assert set(batch.kept().text.tolist()) == set(in_model.texts.tolist())
    with pytest.raises(NothingToDo, match="model_contexts = 10000 is more than the"):
        InModel(language_model, activations, 10_000)


def test_nonfinite_predictions_of_the_unmodified_model_raise_an_error(language_model, activations, monkeypatch):
    in_model = InModel(language_model, activations, 2)
    monkeypatch.setattr(language_model, "logits", lambda ids, vectors: torch.full((*ids.shape, 23), torch.nan))
    with pytest.raises(DegenerateResult, match="the model's predictions are NaN or infinite: use precision float32"):
        in_model.losses([])


def test_nonfinite_predictions_raise_an_error(in_model):
    with pytest.raises(DegenerateResult, match="NaN or infinite on replaced vectors"):
        in_model.losses([lambda batch, context: batch.vectors * torch.nan])


def losses(rise):
    return Losses(torch.as_tensor(rise), torch.zeros_like(rise))


def test_causal_specificity_equals_the_planted_effect():
    n_contexts, n_windows, n_positions = 24, 4, 17
    random = torch.Generator().manual_seed(0)
    clean = torch.randn(n_contexts, n_positions - 1, generator=random)
    window = torch.arange(n_positions - 1) * n_windows // n_positions
    inside = window == (torch.arange(n_contexts) % n_windows)[:, None]
    noise = 0.01 * torch.randn(clean.shape, generator=random)
    by_key = measures(
        causal(losses(clean), losses(clean + 0.3 * inside + 0.1), losses(clean + 0.1 + noise), n_windows, n_positions)
    )
    assert by_key[("ablation_effect", "specialized", "inside")].value == pytest.approx(0.4)
    assert by_key[("ablation_effect", "specialized", "outside")].value == pytest.approx(0.1)
    specificity = by_key[("causal_specificity",)]
    assert specificity.value == pytest.approx(0.3, abs=0.01)
    assert 0.28 < specificity.ci_low < 0.3 < specificity.ci_high < 0.32


def test_a_context_has_a_vector_per_position(in_model):
    assert in_model.batch(torch.arange(1)).vectors.shape == (N_POSITIONS, D_MODEL)
