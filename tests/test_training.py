import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from conftest import D_SAE, MASKS, N_POSITIONS
from posmask.activations import Activations, evaluation_batches
from posmask.errors import DegenerateResult
from posmask.folders import write_folder
from posmask.masks import make_mask, mask_settings
from posmask.metrics.specialization import PositionMass, retention, special_positions
from posmask.sae import SparseAutoencoder, TopK
from posmask.training import TrainingSettings, train

SETTINGS = TrainingSettings(n_steps=40, batch_tokens=128, learning_rate=5e-3)


def fresh_sae(kind, *, k=4, d_sae=D_SAE, d_model=12, n_positions=N_POSITIONS, **changes):
    mask = make_mask(mask_settings({**MASKS[kind], **changes}), n_positions, d_sae)
    return SparseAutoencoder(d_model, TopK(k=k), mask)


def write_activations(folder, vectors, position, text):
    with write_folder(folder, {}) as draft:
        fields = {
            "vectors": vectors,
            "position": position.to(torch.int32),
            "token_id": torch.zeros(len(vectors), dtype=torch.int32),
            "text": text.to(torch.int32),
            "keep": position > 0,
        }
        save_file(fields, draft / "shard-00000.safetensors")
    return Activations(folder)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("apply", ["forward", "gradient"])
def test_training_lowers_the_loss_and_repeats_to_the_last_byte(kind, apply, activations):
    runs = [train(fresh_sae(kind, apply=apply), activations, SETTINGS, 0, "test") for _ in range(2)]
    first, second = (run.sae.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs[0].curve == runs[1].curve
    first_point, last_point = runs[0].curve[0], runs[0].curve[-1]
    assert last_point.explained_variance > (0.2 if kind == "importance" else first_point.explained_variance + 0.05)
    assert runs[0].n_tokens == 40 * 128
    torch.testing.assert_close(runs[0].sae.decoder.norm(dim=1), torch.ones(D_SAE))


def test_another_seed_gives_another_sae(activations):
    one = train(fresh_sae("open"), activations, SETTINGS, 0, "test").sae
    other = train(fresh_sae("open"), activations, SETTINGS, 1, "test").sae
    assert not torch.equal(one.encoder, other.encoder)


def test_soft_masks_learn_their_openness(activations):
    sae = fresh_sae("soft")
    before = sae.mask.openness().detach().clone()
    train(sae, activations, SETTINGS, 0, "test")
    assert float((sae.mask.openness().detach() - before).abs().mean()) > 0.01


def test_importance_ends_strict(activations):
    sae = train(fresh_sae("importance"), activations, SETTINGS, 0, "test").sae
    assert sae.mask.openness().sum(0).tolist() == [4.0] * D_SAE
    assert set(sae.mask.openness().unique().tolist()) == {0.0, 1.0}


def test_zero_steps_are_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        TrainingSettings(n_steps=0, batch_tokens=128, learning_rate=1e-3)


def test_an_sae_that_explains_nothing_is_refused(activations):
    with pytest.raises(DegenerateResult, match=r"explains -?[\d.e+]+ of the variance"):
        train(fresh_sae("open"), activations, SETTINGS.model_copy(update={"learning_rate": 1e4}), 0, "test")


def test_latents_are_dead_by_eligible_tokens(activations):
    """A latent open at a quarter of the positions may be silent four times as long."""
    settings = SETTINGS.model_copy(update={"dead_after_eligible_tokens": 1500, "aux_k": 0})
    dead = {}
    for kind in ("open", "slice"):
        sae = fresh_sae(kind)
        with torch.no_grad():
            sae.encoder_bias[:8] = -1e6  # never fires
        dead[kind] = train(sae, activations, settings, 0, "test").dead
    assert dead["open"][:8].all()
    assert not dead["slice"][:8].any()


def test_the_auxiliary_loss_revives_dead_latents(activations):
    n_dead = {}
    for aux_k in (0, 8):
        settings = SETTINGS.model_copy(update={"dead_after_eligible_tokens": 600, "aux_k": aux_k, "n_steps": 200})
        sae = fresh_sae("open")
        with torch.no_grad():
            sae.encoder[:16] *= 0.02  # fires, but never strongly enough to be among the k
        n_dead[aux_k] = int(train(sae, activations, settings, 0, "test").dead.sum())
    assert n_dead[0] >= 12
    assert n_dead[8] <= n_dead[0] / 2


def planted(n_texts=1500, n_positions=16, d_model=24, n_latents=20, seed=0):
    """Vectors of a known dictionary: half of its latents occur only at 4 positions each, the rest anywhere."""
    random = torch.Generator().manual_seed(seed)
    dictionary = torch.linalg.qr(torch.randn(d_model, d_model, generator=random)).Q[:n_latents]
    allowed = torch.ones(n_positions, n_latents)
    for latent in range(n_latents // 2):
        places = 1 + torch.randperm(n_positions - 1, generator=random)[:4]
        allowed[:, latent] = 0
        allowed[places, latent] = 1
    position = torch.arange(n_positions).repeat(n_texts)
    text = torch.arange(n_texts).repeat_interleave(n_positions)
    active = torch.rand(len(position), n_latents, generator=random) < 0.12
    strength = 1 + torch.rand(len(position), n_latents, generator=random)
    codes = active * strength * allowed[position]
    noise = 0.01 * torch.randn(len(position), d_model, generator=random)
    return codes @ dictionary + noise, position, text, allowed, dictionary


def test_importance_finds_planted_positions_and_retention_tells_bound_from_free(tmp_path, record_property):
    vectors, position, text, allowed, dictionary = planted()
    activations = write_activations(tmp_path / "planted", vectors, position, text)
    settings = TrainingSettings(n_steps=500, batch_tokens=512, learning_rate=3e-3)
    sae = fresh_sae("importance", k=3, d_sae=40, d_model=24)
    train(sae, activations, settings, 0, "planted")
    similarity = sae.decoder.detach() @ dictionary.T
    closest = similarity.max(1)
    bound = (closest.indices < 10) & (closest.values > 0.9)
    found = sae.mask.openness()[:, bound] > 0
    truth = allowed[:, closest.indices[bound]] > 0
    true_positives = float((found & truth).sum())
    precision, recall = true_positives / float(found.sum()), true_positives / float(truth.sum())
    record_property("precision", precision)
    record_property("recall", recall)
    print(f"planted positions: precision {precision:.3f}, recall {recall:.3f}, {int(bound.sum())} latents")
    assert int(bound.sum()) >= 8
    assert precision > 0.9
    assert recall > 0.9

    # Retention of an SAE that was never masked: which latents live at positions is in the data alone.
    sae = fresh_sae("open", k=3, d_sae=20, d_model=24)
    train(sae, activations, settings, 0, "planted")
    closest = (sae.decoder.detach() @ dictionary.T).max(1)
    for is_bound in (True, False):
        chosen = ((closest.indices < 10) == is_bound) & (closest.values > 0.9)
        assert int(chosen.sum()) >= 4
        mass = PositionMass(16, 20)
        for batch in evaluation_batches(activations):
            kept = batch.kept()
            codes = sae.sparse_encode(kept.vectors, kept.position)
            value = codes.value * chosen[codes.latent]
            mass.update(kept, type(codes)(codes.latent, value, codes.d_sae))
        share, chance = retention(mass, special_positions(mass, None, 4))
        assert chance.value == pytest.approx(4 / 15, abs=0.01)
        if is_bound:
            assert share.value > 0.95
        else:
            assert share.value == pytest.approx(chance.value, abs=0.05)


def test_training_on_late_positions_leaves_early_latents_as_they_were(activations, tmp_path):
    late = ((activations.position >= 4) & activations.keep).nonzero()[:, 0]
    batch = activations.batch(late)
    some = write_activations(tmp_path / "late", batch.vectors, batch.position, batch.text)
    for apply in ("forward", "gradient"):
        sae = fresh_sae("slice", apply=apply)
        before = sae.encoder.detach().clone()
        train(sae, some, SETTINGS.model_copy(update={"aux_k": 0}), 0, "late")
        assert torch.equal(sae.encoder[:8], before[:8])
        assert bool((sae.encoder_bias[:8] == 0).all())
        assert not torch.equal(sae.encoder[8:], before[8:])
