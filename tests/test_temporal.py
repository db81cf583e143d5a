"""The rule `temporal`: the contrastive loss, batches of pairs, planted features; and the smoothness of codes."""

import math
import re
from itertools import pairwise

import pytest
import torch

from conftest import D_MODEL, D_SAE, MASKS, N_POSITIONS, RULES, batch_of, codes_of, make_sae, make_vectors
from posmask import notebook
from posmask.data.activations import Activations, training_batches
from posmask.errors import BadSetting, DegenerateResult, NothingToDo
from posmask.evaluation.smoothness import Smoothness
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.storage.manifest import read_manifest
from posmask.study import cell as study_cell
from posmask.study import estimate
from posmask.study import run as study_run
from posmask.study.study_file import read_study
from posmask.training.fast_loss import fast_gradients
from posmask.training.loop import train
from posmask.training.reference_loss import plain_gradients
from posmask.training.settings import TrainingSettings
from test_rivals import cell, with_cells

SETTINGS = TrainingSettings(n_steps=12, batch_tokens=240, learning_rate=5e-3)


def info_nce(later, earlier, similarity):
    """The contrastive loss of the paper by a plain loop over pairs, without its weight."""

    def s(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        if similarity == "dot":
            return dot
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return dot / norms if norms else 0.0

    n, loss = len(later), 0.0
    for i in range(n):
        loss -= math.log(math.exp(s(later[i], earlier[i])) / sum(math.exp(s(later[i], earlier[j])) for j in range(n)))
        loss -= math.log(math.exp(s(later[i], earlier[i])) / sum(math.exp(s(later[j], earlier[i])) for j in range(n)))
    return loss / n


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_contrastive_loss_equals_a_plain_loop(similarity):
    rule = {**RULES["temporal"], "similarity": similarity, "contrast_weight": 3.0, "parts": (0.25, 0.5, 1.0)}
    sae = make_sae("open", rule=rule, dtype=torch.float64)
    vectors, _ = make_vectors(20, dtype=torch.float64)
    preactivation = (vectors @ sae.encoder.T / 3).detach()
    preactivation[4, :8] = -1  # a token without a code in the first part
    coded = sae.rule.training_codes(preactivation, None, lambda parameter: parameter)
    first = coded.codes[:, :8].tolist()
    expected = info_nce(first[:10], first[10:], similarity)
    assert not any(first[4])
    # Summed over tokens, and divided by the number of parts as the reconstruction errors are.
    assert float(coded.penalty) == pytest.approx(3.0 / 3 * 20 * expected)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["open", "slice", "switch"])
def test_the_contrastive_loss_moves_the_first_part_only(kind, similarity):
    gradients = []
    for weight in (0.0, 20.0):
        rule = {**RULES["temporal"], "similarity": similarity, "contrast_weight": weight}
        sae = make_sae(kind, rule=rule, dtype=torch.float64)
        vectors, position = make_vectors(60, dtype=torch.float64)
        shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        vectors, position = vectors[shuffled], position[shuffled]
        plain_gradients(sae, vectors, position)
        plain = sae.encoder.grad.clone()
        sae.zero_grad()
        fast_gradients(sae, vectors, position)
        torch.testing.assert_close(sae.encoder.grad, plain)
        gradients.append(plain)
    changed = (gradients[0] - gradients[1]).abs().amax(1) > 1e-6
    is_first = sae.rule.level == 0
    assert not bool((changed & ~is_first).any())
    assert int(changed.sum()) > int(is_first.sum()) // 2


def test_a_batch_of_an_odd_number_of_tokens_raises_an_error():
    sae = make_sae("open", rule="temporal")
    with pytest.raises(BadSetting, match="a batch of 17 tokens does not consist of pairs"):
        fast_gradients(sae, *make_vectors(17))


def kept_pairs(activations):
    """All pairs (earlier, later) of neighboring kept tokens of one text in one context, by a plain loop."""
    pairs, fields = set(), (activations.keep, activations.position, activations.text)
    keep, position, text = (field.tolist() for field in fields)
    for index in range(1, len(keep)):
        neighbors = position[index] == position[index - 1] + 1 and text[index] == text[index - 1]
        if keep[index] and keep[index - 1] and neighbors:
            pairs.add((index - 1, index))
    return pairs


def test_batches_hold_pairs_of_neighbors(activations, monkeypatch):
    possible, indices, read = kept_pairs(activations), [], activations.batch
    monkeypatch.setattr(activations, "batch", lambda index: (indices.append(index.tolist()), read(index))[1])
    batches = list(training_batches(activations, 120, 60, seed=0, pairs=True))
    per_epoch, epochs, seen = [], 0, set()
    for batch, index in zip(batches, indices, strict=True):
        pairs = list(zip(index[60:], index[:60], strict=True))
        assert set(pairs) <= possible
        assert batch.position[:60].tolist() == sorted(batch.position[:60].tolist())
        assert torch.equal(batch.position[:60], batch.position[60:] + 1)
        tokens = [token for pair in pairs for token in pair]
        assert len(set(tokens)) == len(tokens)
        if seen & set(tokens):  # a new epoch
            epochs, seen = epochs + 1, set()
        seen |= set(tokens)
        per_epoch.append(pairs)
    assert epochs >= 2
    drawn = {pair for pairs in per_epoch for pair in pairs}
    assert len(drawn) > 0.75 * len(possible)  # Other pairs in each epoch: one of two neighbors at most in a single one.


def test_batches_of_pairs_follow_from_the_seed_and_resume(activations):
    def vectors(seed, n, after=0):
        return [batch.vectors for batch in training_batches(activations, 120, n, seed, after=after, pairs=True)]

    every = vectors(0, 50)
    assert all(map(torch.equal, every, vectors(0, 50)))
    assert all(map(torch.equal, every[31:], vectors(0, 19, after=31)))
    assert not torch.equal(every[0], vectors(1, 1)[0])


def test_a_token_without_a_neighbor_is_not_drawn(monkeypatch):
    keep = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1]).bool()
    position = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2])
    text = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 3])
    drawn = []
    stub = Activations.__new__(Activations)
    stub.keep, stub.position, stub.text, stub._shards = keep, position, text, [{}]
    monkeypatch.setattr(stub, "batch", lambda index: drawn.append(index.tolist()))
    list(training_batches(stub, 4, 40, 0, pairs=True))
    assert {tuple(sorted(index)) for index in drawn} == {(1, 2, 6, 7), (1, 2, 7, 8)}
    with pytest.raises(
        NothingToDo, match=re.escape("batch_tokens = 6 is more than the 4 kept tokens that have neighbors")
    ):
        next(training_batches(stub, 6, 1, 0, pairs=True))
    with pytest.raises(BadSetting, match="batch_tokens = 3 is odd"):
        next(training_batches(stub, 3, 1, 0, pairs=True))


def test_training_refuses_batches_without_pairs(activations):
    sae = SparseAutoencoder(
        D_MODEL, rule_settings(RULES["temporal"]), make_mask(mask_settings(MASKS["open"]), N_POSITIONS, D_SAE)
    )
    sae.center, sae.scale = activations.center_and_scale
    with pytest.raises(BadSetting, match="draw batches with training_batches"):
        train(sae, training_batches(activations, 240, 12, 0), SETTINGS, "test")
    notebook.fit(sae, activations, n_steps=12, batch_tokens=240)  # draws pairs by itself


N_PERSISTENT, N_LOCAL, WIDTH = 6, 18, 24


def planted_batches(n_steps, n_pairs=256):
    """Pairs of neighbors that share one of the persistent features, each with two further features of its own."""
    random = torch.Generator().manual_seed(0)
    token = torch.arange(2 * n_pairs)
    for _ in range(n_steps):
        persistent = torch.randint(N_PERSISTENT, (n_pairs,), generator=random)
        vectors = torch.zeros(2 * n_pairs, WIDTH)
        vectors[token, persistent.repeat(2)] = 2.0
        for _ in range(2):
            vectors[token, N_PERSISTENT + torch.randint(N_LOCAL, (2 * n_pairs,), generator=random)] += 2.0
        position = torch.cat([torch.full((n_pairs,), 6), torch.full((n_pairs,), 5)])
        yield batch_of(vectors, position, torch.arange(n_pairs).repeat(2))


def n_in_first_part(rule):
    """The number of persistent features that have a latent in the first part."""
    sae = SparseAutoencoder(WIDTH, rule_settings(rule), make_mask(mask_settings(MASKS["open"]), N_POSITIONS, 32))
    sae.scale = torch.tensor(0.6)
    settings = TrainingSettings(n_steps=400, batch_tokens=512, learning_rate=5e-3, dead_after_eligible_tokens=5000)
    train(sae, planted_batches(400), settings, "test")
    first = sae.decoder.detach()[sae.rule.level == 0]
    return int((first[:, :N_PERSISTENT].amax(0) > 0.7).sum())


def test_features_that_persist_over_tokens_are_found_by_the_first_part():
    nested = {"k": 3, "parts": (0.25, 1.0)}
    assert n_in_first_part({"kind": "temporal", "contrast_weight": 30.0, **nested}) >= N_PERSISTENT - 1
    assert n_in_first_part({"kind": "matryoshka", **nested}) <= N_PERSISTENT // 2


def smooth_by_loop(vectors, dense, position, text, context, scale, latents):
    """The paper's definition, context by context."""
    of_contexts = []
    for number in sorted(set(context.tolist())):
        tokens = (context == number).nonzero()[:, 0].tolist()
        pairs = [(a, b) for a, b in pairwise(tokens) if position[b] == position[a] + 1 and text[a] == text[b]]
        largest = []
        for latent in latents:
            if any(dense[a, latent] > 0 or dense[b, latent] > 0 for a, b in pairs):
                largest.append(
                    max(
                        scale
                        * abs(float(dense[b, latent] - dense[a, latent]))
                        / float((vectors[b] - vectors[a]).norm())
                        for a, b in pairs
                    )
                )
        if largest:
            of_contexts.append(sum(largest) / len(largest))
    return sum(of_contexts) / len(of_contexts), len(of_contexts)


def test_smoothness_equals_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    context = torch.arange(5).repeat_interleave(12)
    position = torch.arange(1, 13).repeat(5)
    text = (torch.arange(60) // 9).to(torch.int32)
    kept = torch.rand(60, generator=random) > 0.15
    kept[36:48] = torch.arange(12) % 2 == 0  # a context without neighbors
    vectors = torch.randn(60, D_MODEL, generator=random)
    dense = torch.rand(60, D_SAE, generator=random) * (torch.rand(60, D_SAE, generator=random) > 0.85)
    level = (torch.arange(D_SAE) >= 8).long()
    smoothness = Smoothness(1.7, level)
    for part in (slice(0, 36), slice(36, 60)):
        where = torch.arange(60)[part][kept[part]]
        smoothness.update(
            batch_of(vectors[where], position[where], text[where]), codes_of(dense[where]), context[where]
        )
    measured = {measure.slice and measure.slice["part"]: measure for measure in smoothness.measures()}
    fields = [field[kept] for field in (vectors, dense, position, text, context)]
    for name, latents in ((None, range(D_SAE)), ("first", range(8)), ("other", range(8, D_SAE))):
        expected, n = smooth_by_loop(*fields, 1.7, latents)
        assert n == 4
        assert measured[name].value == pytest.approx(expected, rel=1e-5)
        assert measured[name].n == n
        assert measured[name].ci_low < expected < measured[name].ci_high


def test_smoothness_does_not_depend_on_units():
    vectors, _ = make_vectors(30)
    sae = make_sae("open")
    values = []
    for unit in (1.0, 8.0):
        sae.scale = torch.tensor(unit)
        batch = batch_of(unit * vectors, torch.arange(1, 31) % 16, torch.zeros(30))
        smoothness = Smoothness(float(sae.scale))
        smoothness.update(batch, sae.encode_batch(batch), torch.arange(30) // 15)
        (measure,) = smoothness.measures()
        values.append(measure.value)
    assert values[0] == pytest.approx(values[1])


def test_smoothness_without_neighbors_is_missing():
    smoothness = Smoothness(1.0)
    batch = batch_of(torch.randn(3, D_MODEL), torch.tensor([1, 3, 5]), torch.zeros(3))
    smoothness.update(batch, codes_of(torch.ones(3, D_SAE)), torch.zeros(3).long())
    with pytest.raises(DegenerateResult, match="neighboring tokens with active latents"):
        smoothness.measures()


TEMPORAL = '{ kind = "temporal", k = 4, parts = [0.25, 1.0] }'


def test_a_study_with_a_temporal_cell(study_file, begin, tmp_path, monkeypatch):
    study = with_cells(study_file, cell("temporal", rule=TEMPORAL, measure_forgetting="true"))
    root = begin(tmp_path / "run", "open-seed0")
    first = study_run.run_study(study, root, say=lambda line: None)
    values = {row.metric: row.value for row in first if row.cell == "temporal" and not row.slice}
    assert values["explained_variance"] > 0.3
    assert values["train_tokens"] == 20 * 256
    assert not any(row.metric == "activation_smoothness" for row in first)
    # With smoothness only that part is computed; trainings and other parts are kept.
    study_file.write_text(study_file.read_text().replace("ks = [1, 5, 20]", "ks = [1, 5, 20]\nsmoothness = true"))
    monkeypatch.setattr(study_cell, "_train", None)
    again = study_run.run_study(read_study(study_file), root, say=lambda line: None)
    smooth = {(row.cell, row.slice): row for row in again if row.metric == "activation_smoothness"}
    assert set(smooth) == {("open", ""), ("temporal", ""), ("temporal", "part=first"), ("temporal", "part=other")}
    assert all(row.value > 0 and row.n > 10 for row in smooth.values())
    seconds = ("train_seconds", "evaluate_seconds")

    def others(table):
        return [str(row) for row in table if row.metric not in (*seconds, "activation_smoothness")]

    assert len(others(again)) == len(others(first))
    assert others(again) == others(first)
    assert read_manifest(root / "cells" / "temporal-seed0", verify=True)


def test_an_estimate_measures_steps_on_pairs(study_file, tmp_path):
    study = with_cells(study_file, cell("temporal", rule=TEMPORAL))
    machine = estimate.Machine("round", {"bfloat16": 1e12, "float32": 1e11}, 1e9, "nowhere", 1.0, 1.0, 1.0, 0.0, None)
    assert estimate._step_factors(study, study.cells[1], D_MODEL, machine, 1.0, iter(range(10**6, 0, -1)).__next__)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_tokens = 256", "batch_tokens = 255", "training.batch_tokens = 255 is odd, but the rule temporal of x"),
        ("n_positions = 16", "n_positions = 2", "corpus.n_positions = 2 leaves no two tokens after BOS, but the rule"),
        ("[0.25, 1.0]", "[0.25, 0.5]", "must grow from above 0 to 1"),
        ("parts = [0.25, 1.0]", 'similarity = "l2"', "rule.similarity"),
    ],
)
def test_settings_that_have_no_pairs_are_refused(study_file, old, new, message):
    with_cells(study_file, cell("x", rule=TEMPORAL))
    text = study_file.read_text()
    assert old in text
    study_file.write_text(text.replace(old, new))
    with pytest.raises(BadSetting, match=re.escape(message)):
        read_study(study_file)
