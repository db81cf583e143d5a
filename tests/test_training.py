import contextlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import D_SAE, KINDS, MASKS, N_POSITIONS, RULES, codes_of, train_on
from posmask.data.activations import Activations, Batch, evaluation_batches
from posmask.errors import DegenerateResult
from posmask.evaluation.retention import PositionMass, retention, special_positions
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.storage.manifest import write_folder
from posmask.training import fast_loss, reference_loss
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

SETTINGS = TrainingSettings(n_steps=40, batch_tokens=128, learning_rate=5e-3)


def fresh_sae(kind, *, k=4, rule=None, d_sae=D_SAE, d_model=12, n_positions=N_POSITIONS, seed=0, **changes):
    mask = make_mask(mask_settings({**MASKS[kind], **changes}), n_positions, d_sae, seed)
    return SparseAutoencoder(d_model, rule_settings(rule or {"kind": "topk", "k": k}), mask, seed)


def write_activations(folder, vectors, position, text):
    with write_folder(folder, {}) as draft:
        fields = {
            "vectors": vectors,
            "position": position.to(torch.int32),
            "token_id": torch.zeros(len(vectors), dtype=torch.int32),
            "text": text.to(torch.int32),
            "sink": torch.zeros_like(position, dtype=torch.bool),
            "keep": position > 0,
            **{name: position.to(torch.int32, copy=True) for name in ("sentence", "line", "end", "text_position")},
        }
        save_file(fields, draft / "shard-00000.safetensors")
    return Activations(folder)


@pytest.mark.parametrize(("kind", "gating"), KINDS)
def test_training_lowers_the_loss_and_is_deterministic(kind, gating, activations):
    runs = [train_on(fresh_sae(kind, gating=gating), activations, SETTINGS) for _ in range(2)]
    first, second = (run.sae.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs[0].curve == runs[1].curve
    first_point, last_point = runs[0].curve[0], runs[0].curve[-1]
    closes = kind == "importance" and gating == "forward"
    assert last_point.explained_variance > (0.2 if closes else first_point.explained_variance + 0.05)
    assert runs[0].n_tokens == 40 * 128
    torch.testing.assert_close(runs[0].sae.decoder.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("kind", ["soft", "importance", "split"])
def test_snapshots_record_a_changing_mask_from_the_first_to_the_last_step(kind, activations, tmp_path):
    sae, seen = fresh_sae(kind), {}

    def after_step(done):
        seen[done] = sae.mask.openness().detach().clone()

    trained = train_on(sae, activations, SETTINGS, after_step=after_step)
    trained.snapshots.write(tmp_path / "snapshots", SETTINGS.batch_tokens)
    snapshots = load_file(tmp_path / "snapshots")
    steps = (snapshots["tokens"] / SETTINGS.batch_tokens).tolist()
    assert steps == [1, 6, 11, 17, 23, 29, 34, 40]
    assert snapshots["latent"].tolist() == list(range(D_SAE))
    for step, openness in zip(steps, snapshots["openness"], strict=True):
        torch.testing.assert_close(openness / 255, seen[step], atol=0.51 / 255, rtol=0)
    assert not torch.equal(snapshots["openness"][0], snapshots["openness"][-1])


def test_a_fixed_mask_has_no_snapshots(activations, tmp_path):
    train_on(fresh_sae("slice"), activations, SETTINGS).snapshots.write(tmp_path / "snapshots", 1)
    assert not (tmp_path / "snapshots").exists()


def plain_losses(sae, batches, settings, dead):
    """Return the losses of training with autograd, torch's Adam and clipping, and a plain decoder normalization."""
    parameters = [p for name, p in sae.named_parameters() if "mask." not in name]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, foreach=False)
    losses = []
    for done, batch in enumerate(batches):
        for part in (sae.mask, sae.rule):
            part.before_step(done, settings.n_steps)
        optimizer.zero_grad()
        step = reference_loss.plain_gradients(sae, batch.vectors, batch.position, dead=dead, aux_k=settings.aux_k)
        losses.append(step.numbers.reconstruction)
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm, foreach=False)
        optimizer.step()
        with torch.no_grad():
            sae.decoder /= sae.decoder.norm(dim=1, keepdim=True)
        sae.rule.after_step(step.numbers.least)
    return losses


def sparse_sums(n_batches, n_tokens, d_model):
    """Make batches of vectors that are sparse sums of many directions, at positions 0, 1, ... repeatedly."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_model, d_model, generator=random))
    batches = []
    for _ in range(n_batches):
        weights = torch.rand(n_tokens, 4 * d_model, generator=random) * 8
        vectors = (weights * (torch.rand(weights.shape, generator=random) < 0.05)) @ directions
        position = torch.arange(n_tokens, dtype=torch.int32) % N_POSITIONS
        keep = torch.ones(n_tokens, dtype=torch.bool)
        batches.append(Batch(vectors, position, position, position, keep, position, position, position, position))
    return batches


def in_pairs(batch):
    """The batch with positions of pairs of neighbors."""
    pair = torch.arange(len(batch) // 2, dtype=torch.int32)
    later = pair % (N_POSITIONS - 1) + 1
    return replace(batch, position=torch.cat([later, later - 1]), text=pair.repeat(2))


# Products of the other rules carry bfloat16's rounding: see test_contract.py.
IN_BFLOAT16 = [
    (kind, rule, "bfloat16") for kind in ("open", "slice", "hard", "cohort") for rule in RULES if "k" in RULES[rule]
]
IN_FLOAT32 = [(kind, rule, "float32") for kind in ("open", "slice", "hard", "cohort") for rule in RULES]


def quickly(kind, rule, precision):
    """Whether the case runs in `make test`: one kind of mask per rule in bfloat16, which takes seconds."""
    if precision == "float32":
        return kind in ("open", "slice")
    return kind == {"topk": "slice", "batchtopk": "open", "matryoshka": "slice", "temporal": "open"}[rule]


@pytest.mark.parametrize(
    ("kind", "rule", "precision"),
    [pytest.param(*case, marks=[] if quickly(*case) else [pytest.mark.slow]) for case in IN_FLOAT32 + IN_BFLOAT16],
)
def test_the_loss_curve_equals_that_of_plain_autograd_and_adam(kind, rule, precision, monkeypatch):
    # With fewer selected entries, the few that bfloat16 swaps weigh more in the loss.
    d_sae, d_model, n_tokens = (384, 48, 512) if precision == "float32" else (1536, 384, 384)
    settings = TrainingSettings(
        n_steps=12, batch_tokens=n_tokens, learning_rate=1e-3, warmup_fraction=0, decay_fraction=0, precision=precision
    )
    batches = sparse_sums(12, n_tokens, d_model)
    if rule == "temporal":
        batches = list(map(in_pairs, batches))
    dead = torch.arange(d_sae) % 7 == 0
    monkeypatch.setattr("posmask.training.loop.DeadLatents.to_revive", dead)
    rule = {**RULES[rule], "k": 16} if "k" in RULES[rule] else RULES[rule]
    sae, plain = (fresh_sae(kind, rule=rule, d_sae=d_sae, d_model=d_model) for _ in range(2))
    expected = torch.tensor(plain_losses(plain, batches, settings, dead))
    losses, fast = [], fast_loss.fast_gradients

    def recorded(*args, **options):
        losses.append(fast(*args, **options))
        return losses[-1]

    monkeypatch.setattr(fast_loss, "fast_gradients", recorded)
    with contextlib.suppress(DegenerateResult):  # 12 steps may explain no variance
        train(sae, iter(batches), settings, "test")
    actual = torch.tensor([step.numbers.reconstruction for step in losses])
    assert len(actual) == 12
    assert float((actual / expected - 1).abs().max()) <= (1e-5 if precision == "float32" else 1e-3)
    assert float(expected[-1]) < float(expected[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["open", "slice", "soft", "split"])
def test_every_rule_trains_with_every_kind_of_mask(kind, rule, activations):
    sae = fresh_sae(kind, rule=RULES[rule])
    trained = train_on(sae, activations, SETTINGS.model_copy(update={"n_steps": 60}))
    first, last = trained.curve[0], trained.curve[-1]
    assert last.explained_variance > first.explained_variance + 0.1
    if "k" in RULES[rule]:
        assert 3 < last.l0 <= 4  # Fewer than 4 of the 8 live latents may be positive.
    elif kind in ("open", "soft"):
        assert last.l0 < first.l0


def test_batchtopk_keeps_its_mean_l0_at_inference(activations):
    """The threshold learned in training gives a mean of k active latents at inference."""
    sae = fresh_sae("open", rule=RULES["batchtopk"])
    train_on(sae, activations, SETTINGS.model_copy(update={"n_steps": 200}))
    batch = activations.batch(activations.keep.nonzero()[:, 0])
    n_active = sae.sparse_encode(batch.vectors, batch.position).n_active()
    assert float(n_active.mean()) == pytest.approx(4, rel=0.15)
    assert float(n_active.std()) > 0.5  # not k on each


def test_the_first_matryoshka_part_reconstructs_better_alone(activations):
    """The first quarter of the latents explains more than a quarter that was not trained to reconstruct alone."""
    alone = {}
    for rule in ("batchtopk", "matryoshka"):
        sae = fresh_sae("open", rule=RULES[rule])
        train_on(sae, activations, SETTINGS.model_copy(update={"n_steps": 150}))
        batch = activations.batch(activations.keep.nonzero()[:, 0])
        x = sae.normalize(batch.vectors)
        codes = sae.encode(batch.vectors, batch.position).detach()
        codes[:, D_SAE // 4 :] = 0
        error = codes @ sae.decoder + sae.decoder_bias - x
        alone[rule] = 1 - float(error.detach().square().sum() / x.square().sum())
    assert alone["matryoshka"] > alone["batchtopk"] + 0.1


def test_matryoshka_nests_parts_within_each_slice():
    level = fresh_sae("slice", rule=RULES["matryoshka"]).rule.level
    assert level.view(4, 8).tolist() == [[0, 0, 1, 1, 2, 2, 2, 2]] * 4
    level = fresh_sae("hard", rule=RULES["matryoshka"]).rule.level  # hardly any two latents share their positions
    assert torch.bincount(level).tolist() == [8, 8, 16]


def test_another_seed_gives_a_different_sae(activations):
    first = train_on(fresh_sae("open"), activations, SETTINGS).sae
    second = train_on(fresh_sae("open"), activations, SETTINGS, 1).sae
    assert not torch.equal(first.encoder, second.encoder)


def test_soft_masks_learn_their_openness(activations):
    sae = fresh_sae("soft")
    before = sae.mask.openness().detach().clone()
    train_on(sae, activations, SETTINGS)
    assert float((sae.mask.openness().detach() - before).abs().mean()) > 0.01


def test_importance_masks_end_strict(activations):
    sae = train_on(fresh_sae("importance"), activations, SETTINGS).sae
    assert sae.mask.openness().sum(0).tolist() == [4.0] * D_SAE
    assert set(sae.mask.openness().unique().tolist()) == {0.0, 1.0}


def test_an_sae_that_explains_nothing_raises_an_error(activations):
    with pytest.raises(DegenerateResult, match=r"explains -?[\d.e+]+ of the variance"):
        train_on(fresh_sae("open"), activations, SETTINGS.model_copy(update={"learning_rate": 1.0, "n_steps": 10}))


def silent_latent(sae, decoder_row):
    with torch.no_grad():
        sae.encoder[3], sae.encoder_bias[3], sae.decoder[3] = 0, -1e6, decoder_row
    return sae


def test_training_from_a_zero_decoder_row_ends_finite(activations):
    sae = train_on(silent_latent(fresh_sae("open"), 0.0), activations, SETTINGS).sae
    assert all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values())


def test_a_trained_sae_with_nan_raises_an_error(activations):
    sae = silent_latent(fresh_sae("open"), torch.nan)
    with pytest.raises(DegenerateResult, match="decoder holds NaN or infinite numbers after 40 steps: lower learning_"):
        train_on(sae, activations, SETTINGS)


def test_latents_are_dead_by_eligible_tokens(activations):
    """A latent open at a quarter of the positions may be silent four times as long."""
    settings = SETTINGS.model_copy(update={"dead_after_eligible_tokens": 1500, "aux_k": 0})
    dead = {}
    for kind in ("open", "slice"):
        sae = fresh_sae(kind)
        with torch.no_grad():
            sae.encoder_bias[:8] = -1e6  # never fires
        dead[kind] = train_on(sae, activations, settings).dead
    assert dead["open"][:8].all()
    assert not dead["slice"][:8].any()


def test_the_auxiliary_loss_revives_dead_latents(activations):
    n_dead = {}
    for aux_k in (0, 8):
        settings = SETTINGS.model_copy(update={"dead_after_eligible_tokens": 600, "aux_k": aux_k, "n_steps": 120})
        sae = fresh_sae("open")
        with torch.no_grad():
            sae.encoder[:16] *= 0.02  # fires, but never strongly enough to be among the k
        n_dead[aux_k] = int(train_on(sae, activations, settings).dead.sum())
    assert n_dead[0] >= 12
    assert n_dead[8] <= n_dead[0] / 2


def planted(n_texts=1500, n_positions=16, d_model=24, n_latents=20, seed=0):
    """Make vectors from a known dictionary: half of its latents occur at 4 positions each, the others anywhere."""
    random = torch.Generator().manual_seed(seed)
    dictionary = torch.linalg.qr(torch.randn(d_model, d_model, generator=random)).Q[:n_latents]
    allowed = torch.ones(n_positions, n_latents)
    for latent in range(n_latents // 2):
        positions = 1 + torch.randperm(n_positions - 1, generator=random)[:4]
        allowed[:, latent] = 0
        allowed[positions, latent] = 1
    position = torch.arange(n_positions).repeat(n_texts)
    text = torch.arange(n_texts).repeat_interleave(n_positions)
    active = torch.rand(len(position), n_latents, generator=random) < 0.12
    strength = 1 + torch.rand(len(position), n_latents, generator=random)
    codes = active * strength * allowed[position]
    noise = 0.01 * torch.randn(len(position), d_model, generator=random)
    return codes @ dictionary + noise, position, text, allowed, dictionary


def test_importance_finds_planted_positions_and_retention_separates_bound_from_free(tmp_path, record_property):
    vectors, position, text, allowed, dictionary = planted()
    activations = write_activations(tmp_path / "planted", vectors, position, text)
    settings = TrainingSettings(n_steps=300, batch_tokens=512, learning_rate=5e-3)
    sae = fresh_sae("importance", k=3, d_sae=40, d_model=24)
    train_on(sae, activations, settings)
    similarity = sae.decoder.detach() @ dictionary.T
    closest = similarity.max(1)
    bound = (closest.indices < 10) & (closest.values > 0.9)
    learned = sae.mask.openness()[:, bound] > 0
    truth = allowed[:, closest.indices[bound]] > 0
    true_positives = float((learned & truth).sum())
    precision, recall = true_positives / float(learned.sum()), true_positives / float(truth.sum())
    record_property("precision", precision)
    record_property("recall", recall)
    print(f"planted positions: precision {precision:.3f}, recall {recall:.3f}, {int(bound.sum())} latents")
    assert int(bound.sum()) >= 8
    assert precision > 0.9
    assert recall > 0.9

    # Retention of an unmasked SAE: only the data bind latents to positions.
    sae = fresh_sae("open", k=3, d_sae=20, d_model=24)
    train_on(sae, activations, settings)
    closest = (sae.decoder.detach() @ dictionary.T).max(1)
    for is_bound in (True, False):
        chosen = ((closest.indices < 10) == is_bound) & (closest.values > 0.9)
        assert int(chosen.sum()) >= 4
        mass = PositionMass(16, 20)
        for batch in evaluation_batches(activations):
            kept = batch.kept()
            dense = sae.sparse_encode(kept.vectors, kept.position).dense()
            mass.update(kept, codes_of(dense * chosen))
        share, chance = retention(mass, special_positions(mass, torch.ones(16, 20).bool(), 4))
        assert chance.value == pytest.approx(4 / 15, abs=0.01)
        if is_bound:
            assert share.value > 0.95
        else:
            assert share.value == pytest.approx(chance.value, abs=0.05)


def test_training_on_late_positions_does_not_change_early_latents(activations, tmp_path):
    late = ((activations.position >= 4) & activations.keep).nonzero()[:, 0]
    batch = activations.batch(late)
    late_activations = write_activations(tmp_path / "late", batch.vectors, batch.position, batch.text)
    for gating in ("forward", "gradient"):
        sae = fresh_sae("slice", gating=gating)
        before = sae.encoder.detach().clone()
        train_on(sae, late_activations, SETTINGS.model_copy(update={"aux_k": 0}))
        assert torch.equal(sae.encoder[:8], before[:8])
        assert bool((sae.encoder_bias[:8] == 0).all())
        assert not torch.equal(sae.encoder[8:], before[8:])


def separately(activations, settings, source, n_slices, d_sae, *, share_bias):
    """Train separate SAEs, one per window of positions, on the same batches restricted to the window."""
    rows, biases = [], []
    for number in range(n_slices):
        sae = fresh_sae("open", d_sae=d_sae // n_slices, d_model=source.d_model, k=2).double()
        block = slice(number * d_sae // n_slices, (number + 1) * d_sae // n_slices)
        with torch.no_grad():
            for name in ("encoder", "encoder_bias", "decoder"):
                getattr(sae, name).copy_(getattr(source, name)[block])
        sae.decoder_bias.requires_grad_(share_bias)
        positions = torch.arange(N_POSITIONS) * n_slices // N_POSITIONS == number
        train_on(sae, activations, settings, positions=positions)
        rows.append(sae.decoder.detach())
        biases.append(sae.decoder_bias.detach())
    return torch.cat(rows), biases


def test_a_sliced_sae_equals_separate_saes_on_windows(activations, record_property):
    """They agree if the shared decoder bias is frozen; a learned bias is the only difference."""
    settings = SETTINGS.model_copy(update={"aux_k": 0, "n_steps": 50, "max_gradient_norm": None})
    drift = {}
    for bias_learns in (False, True):
        sliced, source = (fresh_sae("slice", k=2).double() for _ in range(2))
        sliced.decoder_bias.requires_grad_(bias_learns)
        train_on(sliced, activations, settings)
        rows, biases = separately(activations, settings, source, 4, D_SAE, share_bias=bias_learns)
        drift[bias_learns] = float((rows - sliced.decoder.detach()).abs().max())
        if bias_learns:
            assert max(float((bias - sliced.decoder_bias.detach()).abs().max()) for bias in biases) > 1e-3
    record_property("largest difference of decoder rows", drift)
    print(f"decoder rows differ by at most {drift[False]:.1e} with the bias fixed, {drift[True]:.1e} with it learned")
    assert float((sliced.decoder - source.decoder).detach().abs().max()) > 0.1  # training changed the decoder
    assert drift[False] < 1e-4
    assert drift[True] > 10 * drift[False]


def test_frozen_parameters_do_not_change(activations):
    sae = fresh_sae("slice")
    sae.decoder_bias.requires_grad_(False)
    train_on(sae, activations, SETTINGS)
    assert bool((sae.decoder_bias == 0).all())


def test_a_mask_counts_positions_from_its_origin(activations):
    """With positions from the end, the latents of a slice fire at their distance from the end."""
    trained = train_on(fresh_sae("slice", position_origin="end"), activations, SETTINGS)
    batch = activations.batch(activations.keep.nonzero()[:, 0])
    codes = trained.sae.sparse_encode(batch.vectors, batch.positions("end"))
    assert torch.equal(batch.end[codes.token].long() // 4, codes.latent // 8)
    assert not torch.equal(batch.end, batch.position)


@pytest.mark.parametrize("kind", ["open", "switch"])
def test_the_batch_threshold_applies_before_router_weights(kind, activations):
    sae = fresh_sae(kind, rule=RULES["batchtopk"])
    trained = train_on(sae, activations, SETTINGS.model_copy(update={"n_steps": 150}))
    batch = activations.batch(activations.keep.nonzero()[:, 0])
    n_active = trained.sae.sparse_encode(batch.vectors, batch.position).n_active()
    assert float(n_active.mean()) == pytest.approx(4, rel=0.2)
