import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from conftest import N_POSITIONS, batch_of, codes_of, make_sae, make_vectors
from posmask.data import embedded, models
from posmask.data.embedded_models import DEFAULT_MODEL
from posmask.data.tokens import equal_segments, growing_segments, split_of, text_key, unique_texts
from posmask.errors import BadSetting, DegenerateResult
from posmask.probing import attention, datasets, order_probes, order_tasks
from posmask.probing.attention import N_HEADS, TextCodes, attention_correct
from posmask.probing.order_tasks import OrderTask
from posmask.probing.pooling import PooledTexts, Pooling
from posmask.probing.probes import (
    ProbeTask,
    all_feature_correct,
    chosen_features,
    k_sparse_correct,
    logistic_regression,
)


def pooled(rows):
    features = PooledTexts(*rows.shape)
    features.add(torch.arange(len(rows)), rows)
    features.n_tokens += 1
    return features


def labeled(n, *, seed=0):
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2 == 0
    features = torch.randn(n, 20, generator=random).clamp(min=0)
    features[:, 7] += 3.0 * label
    features[:, 3] -= 1.5 * label
    return features, label


def probe(train, train_label, test, test_label, ks):
    n_train = len(train)
    task = ProbeTask(torch.arange(n_train), train_label, n_train + torch.arange(len(test)), test_label)
    return {k: right for k, (right,) in k_sparse_correct(pooled(torch.cat([train, test])), [task], ks).items()}


def test_probes_use_the_features_whose_class_means_differ_most():
    train, label = labeled(400)
    test, test_label = labeled(400, seed=1)
    correct = probe(train, label, test, test_label, (1, 2, 20))
    assert correct[1].float().mean() > 0.9
    assert correct[2].float().mean() > correct[1].float().mean()
    train[:, [7, 3]] = test[:, [7, 3]] = 0.0
    blind = probe(train, label, test, test_label, (1, 2))
    assert abs(float(blind[2].float().mean()) - 0.5) < 0.08


def test_probes_on_permuted_labels_are_at_chance():
    train, label = labeled(400)
    test, test_label = labeled(2000, seed=1)
    permuted = label[torch.randperm(400, generator=torch.Generator().manual_seed(5))]
    assert abs(float(probe(train, permuted, test, test_label, (5,))[5].float().mean()) - 0.5) < 0.1


def test_constant_features_raise_an_error():
    label = torch.arange(10) % 2 == 0
    for value in (0.0, 0.3):
        rows = torch.full((10, 4), value)
        with pytest.raises(DegenerateResult, match="all 4 pooled features are constant over 10 training texts"):
            probe(rows, label, rows, label, (1,))


def test_nonfinite_features_raise_an_error():
    train, label = labeled(20)
    for bad in (torch.nan, torch.inf):
        test = train.clone()
        test[3, 5] = bad
        with pytest.raises(DegenerateResult, match="NaN or infinite"):
            probe(train, label, test, label, (1,))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_newton_reaches_the_optimum_of_scikit_learn(k, scale):
    """Also for separable classes and for tasks with different numbers of texts."""
    n_texts = (300, 200)
    inputs, target = torch.zeros(2, 300, k, dtype=torch.float64), torch.zeros(2, 300, dtype=torch.float64)
    for number, n in enumerate(n_texts):
        rows, label = labeled(n, seed=number)
        inputs[number, :n] = scale * rows[:, 20 - k :].double() if number else scale * rows[:, :k].double()
        target[number, :n] = label.double() * 2 - 1
    weight, intercept = logistic_regression(inputs, target)
    for number, n in enumerate(n_texts):
        peer = LogisticRegression(tol=1e-10, max_iter=10_000)
        peer.fit(inputs[number, :n].numpy(), target[number, :n].numpy())

        def loss(w, b, number=number, n=n):
            margin = target[number, :n].numpy() * (inputs[number, :n].numpy() @ w + b)
            return np.logaddexp(0, -margin).sum() + (w**2).sum() / 2

        ours, theirs = loss(weight[number].numpy(), float(intercept[number])), loss(peer.coef_[0], peer.intercept_[0])
        assert ours <= theirs * (1 + 1e-7)


def test_a_warm_start_gives_the_same_solution():
    rows, label = labeled(300)
    inputs, target = rows.double()[None], (label.double() * 2 - 1)[None]
    start = logistic_regression(inputs[..., :5], target)
    cold = logistic_regression(inputs, target)
    torch.testing.assert_close(logistic_regression(inputs, target, start), cold, rtol=1e-3, atol=1e-4)


def test_probes_trained_together_equal_probes_trained_separately():
    train, label = labeled(300)
    other = torch.randperm(300, generator=torch.Generator().manual_seed(1)) < 150
    features, texts = pooled(train), torch.arange(300)
    tasks = [ProbeTask(texts[:200], labels[:200], texts[200:], labels[200:]) for labels in (label, other)]
    together = k_sparse_correct(features, tasks, (1, 3, 10))
    for number, task in enumerate(tasks):
        alone = k_sparse_correct(features, [task], (10, 3, 1))
        assert all(torch.equal(alone[k][0], together[k][number]) for k in (1, 3, 10))


def test_the_probe_on_all_features_does_not_use_the_test_labels():
    train, label = labeled(400)
    features = pooled(torch.cat([train, labeled(200, seed=1)[0]]))
    task = ProbeTask(torch.arange(400), label, 400 + torch.arange(200), torch.arange(200) % 2 == 0)
    correct = all_feature_correct(features, task, torch.Generator().manual_seed(0))
    assert correct.float().mean() > 0.9
    # Inverting the test labels inverts correctness and nothing else.
    inverted = ProbeTask(task.train, task.train_label, task.test, ~task.test_label)
    assert torch.equal(all_feature_correct(features, inverted, torch.Generator().manual_seed(0)), ~correct)


POOLINGS = [
    "mean", "fair", "segments4", "segments4-mean", "growing", "growing-mean", "parts2", "parts3", "moment", "max",
    "binary", "last",
]  # fmt: skip


def contexts(n_texts, *, seed=0):
    """Make a batch of complete texts of different lengths."""
    vectors, _ = make_vectors(n_texts * N_POSITIONS, seed=seed)
    length = torch.randint(1, N_POSITIONS, (n_texts,), generator=torch.Generator().manual_seed(seed))
    text = torch.arange(n_texts).repeat_interleave(length).to(torch.int32)
    position = torch.cat([torch.arange(1, n + 1) for n in length.tolist()]).to(torch.int32)
    n = len(text)
    return batch_of(vectors[:n], position, text)


def pooled_by_loop(name, rows, tokens, position, live):
    """One text's row: for each part of the pooling, one number per feature."""
    n = len(tokens)
    segment = {
        "segments4": equal_segments(N_POSITIONS, 4), "growing": growing_segments(N_POSITIONS),
    }.get(name.removesuffix("-mean"))  # fmt: skip
    n_parts = {"parts2": 2, "parts3": 3, "moment": 2}.get(name, 1) if segment is None else int(segment.max()) + 1
    parts = torch.zeros(n_parts, rows.shape[1])
    if name in ("max", "binary"):
        largest = rows[tokens].max(0).values
        return largest[None] if name == "max" else (largest > 0).float()[None]
    if name == "last":
        return rows[tokens[-1:]]
    if name == "moment":
        far = [2 * (rank + 0.5) / n - 1 for rank in range(n)]
        moment = sum(weight * rows[token] for weight, token in zip(far, tokens, strict=True)) / n
        return torch.stack([rows[tokens].mean(0), moment])
    for rank, token in enumerate(tokens):
        at = int(position[token])
        part = 0 if segment is None else int(segment[at])
        part = {"parts2": rank * 2 // n, "parts3": rank * 3 // n}.get(name, part)
        for feature in range(rows.shape[1]):
            divisor = n
            if name == "fair":
                divisor = max(1, sum(float(live[int(position[t]), feature]) for t in tokens))
            if name.endswith("-mean"):
                divisor = sum(int(segment[int(position[t])]) == part for t in tokens)
            parts[part, feature] += rows[token, feature] / divisor
    return parts


@pytest.mark.parametrize("at_once", [2**23, 100])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_equals_a_plain_loop(name, dense, at_once, monkeypatch):
    if dense and name in ("fair", "max", "binary"):
        pytest.skip("of activations only")
    monkeypatch.setattr("posmask.probing.pooling._MOST_NUMBERS_AT_ONCE", at_once)
    sae, batch = make_sae("hard"), contexts(9)
    codes = None if dense else sae.sparse_encode(batch.vectors, batch.position)
    rows = batch.vectors if codes is None else codes.dense()
    live = sae.mask.live()
    pooling = Pooling(name, 10, rows.shape[1], N_POSITIONS, live=live if name == "fair" else None)
    for part in (batch.text < 4, batch.text >= 4):
        pooling.update(batch.select(part), None if codes is None else codes.select(part))
    of_texts = [
        pooled_by_loop(name, rows, (batch.text == text).nonzero()[:, 0].tolist(), batch.position, live)
        for text in range(9)
    ]
    expected = torch.stack([*of_texts, torch.zeros_like(of_texts[0])])
    pooled_rows = pooling.texts.rows(torch.arange(10))
    torch.testing.assert_close(pooled_rows, expected.flatten(1))
    chosen = torch.tensor([3, 0, 5])
    assert torch.equal(pooling.texts.columns(chosen), pooled_rows[:, chosen])
    weight = torch.rand(10, 2, generator=torch.Generator().manual_seed(0)) * (torch.arange(10) % 3 > 0)[:, None]
    torch.testing.assert_close(pooling.texts.weighted_sums(weight).float(), weight.T @ pooled_rows)
    assert pooling.texts.n_tokens.tolist() == [int((batch.text == text).sum()) for text in range(10)]


def test_fair_pooling_averages_over_the_open_positions_of_a_latent():
    """A latent with value 1 at every open position pools to 1 with fair pooling, but to less with mean pooling."""
    live = make_sae("slice").mask.live()
    n_positions, d_sae = live.shape
    position = torch.arange(1, n_positions, dtype=torch.int32)
    batch = batch_of(torch.zeros(len(position), 1), position, position * 0)
    codes = codes_of(live[1:])
    mean, fair = Pooling("mean", 1, d_sae, n_positions), Pooling("fair", 1, d_sae, n_positions, live=live)
    for pooling in (mean, fair):
        pooling.update(batch, codes)
    everything = torch.arange(1)
    assert torch.equal(fair.texts.rows(everything), torch.ones(1, d_sae))
    assert float(mean.texts.rows(everything).max()) == pytest.approx(4 / 15)


def test_texts_pool_the_same_in_memory_and_on_disk(monkeypatch):
    rows = torch.rand(50, 30, generator=torch.Generator().manual_seed(0)) * (torch.rand(50, 30) < 0.3)
    in_memory = pooled(rows)
    monkeypatch.setattr("posmask.probing.pooling._IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("posmask.probing.pooling._BLOCK_ENTRIES", 7)
    on_disk = pooled(rows)
    assert on_disk._file is not None
    assert in_memory._file is None
    for features in (in_memory, on_disk):
        assert torch.equal(features.rows(torch.arange(50)), rows)


@pytest.mark.slow
def test_memory_of_pooled_texts_is_bounded():
    """30,000 texts with 1,300 nonzeros of 16,384 features take 470 MB sparse and 2 GB dense."""
    code = """if True:
        import resource, torch
        from posmask.probing.pooling import PooledTexts
        from posmask.probing.probes import ProbeTask, k_sparse_correct
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        features, random = PooledTexts(30_000, 16_384), torch.Generator().manual_seed(0)
        before = peak()
        for text in torch.arange(30_000).split(50):
            rows = torch.rand(50, 16_384, generator=random)
            features.add(text, rows * (torch.rand(50, 16_384, generator=random) < 0.08))
        features.n_tokens += 1
        label = torch.arange(30_000) % 2 == 0
        every = torch.arange(30_000)
        k_sparse_correct(features, [ProbeTask(every[:4000], label[:4000], every[4000:5000], label[4000:5000])], (1, 50))
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.8  # GB: 256 MB of rows in memory, one block, and the inputs of the probe


def test_a_reversed_text_has_the_opposite_moment():
    rows = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    moments = []
    for order in (torch.arange(7), torch.arange(6, -1, -1)):
        pooling = Pooling("moment", 1, 3, N_POSITIONS)
        pooling.update(batch_of(rows[order], torch.arange(1, 8), torch.zeros(7)), None)
        moments.append(pooling.texts.rows(torch.arange(1))[0])
    torch.testing.assert_close(moments[0][:3], moments[1][:3])
    torch.testing.assert_close(moments[0][3:], -moments[1][3:])


def test_ranking_by_t_prefers_reliable_features():
    """A feature that is huge in one text has the largest difference of means, but a small t."""
    random = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 2 == 0
    small = label * 0.2 + 0.1 + 0.02 * torch.rand(200, generator=random)
    rare = torch.zeros(200)
    rare[0] = 500
    features = pooled(torch.stack([rare, small, torch.rand(200, generator=random)], 1))
    task = ProbeTask(torch.arange(200), label, torch.arange(200), label)
    assert chosen_features(features, [task], 2)[0].tolist()[0] == 0
    assert chosen_features(features, [task], 2, "t")[0].tolist()[0] == 1
    table = features.rows(torch.arange(200)).double()
    sides = table[label], table[~label]
    t = (sides[0].mean(0) - sides[1].mean(0)) / (sides[0].var(0) / 100 + sides[1].var(0) / 100).sqrt()
    assert chosen_features(features, [task], 3, "t")[0].tolist() == t.abs().argsort(descending=True).tolist()


def make_dataset(n_class=40):
    label = torch.arange(3).repeat_interleave(n_class)
    train = torch.arange(n_class).repeat(3) < 30
    return datasets.ProbeDataset("toy", ("a", "b", "c"), tuple(map(str, range(3 * n_class))), label, train)


def test_each_class_is_probed_on_balanced_texts_of_one_split():
    dataset = make_dataset()
    kept = torch.ones(120).bool()
    kept[5] = False
    for number in range(3):
        task = datasets._task(dataset, kept, number, torch.Generator().manual_seed(0))
        for chosen, positive, train in ((task.train, task.train_label, True), (task.test, task.test_label, False)):
            assert 5 not in chosen.tolist()
            assert len(set(chosen.tolist())) == len(chosen)
            assert bool((dataset.train[chosen] == train).all())
            assert torch.equal(dataset.label[chosen] == number, positive)
            counts = Counter(dataset.label[chosen].tolist())
            assert counts[number] == len(chosen) / 2
            assert max(counts[other] for other in counts if other != number) <= len(chosen) / 4 + 1


@pytest.mark.parametrize("protocol", ["default", "saebench"])
def test_probe_accuracy_is_the_mean_over_classes(protocol):
    dataset = make_dataset()
    features = pooled(torch.nn.functional.one_hot(dataset.label, 3).float())
    measures = datasets.probe_accuracy(
        dataset, features, (1, 3), source="sae", protocol=protocol, random=torch.Generator().manual_seed(0)
    )
    means = [measure for measure in measures if "class" not in measure.slice]
    # With so few texts, sae-bench's patience of 10 epochs is 10 steps, so its probe on all features does not learn.
    assert [measure.value for measure in means][protocol == "saebench" :] == [1.0, 1.0, 1.0][protocol == "saebench" :]
    assert [measure.slice["k"] for measure in means] == ["all", 1, 3]
    assert means[1].slice == {
        "dataset": "toy", "k": 1, "source": "sae", "pooling": "mean", "protocol": protocol, "train": 60,
    }  # fmt: skip
    assert [measure.slice["class"] for measure in measures if "class" in measure.slice and measure.slice["k"] == 1] == [
        "a", "b", "c",
    ]  # fmt: skip


def accuracy_of_one_feature(n_drawn, name, monkeypatch):
    """Return the accuracy of one-feature probes on few texts; the dataset's name is the seed of the negatives."""
    monkeypatch.setattr(datasets, "n_draws", lambda n_classes, n_test: n_drawn)
    random = torch.Generator().manual_seed(1)
    base = make_dataset(60)
    dataset = datasets.ProbeDataset(name, base.classes, base.texts, base.label, torch.arange(60).repeat(3) < 40)
    features = torch.nn.functional.one_hot(dataset.label, 3) + 2 * torch.randn(180, 3, generator=random)
    (mean,) = (
        measure
        for measure in datasets.probe_accuracy(dataset, pooled(features), (1,), source="sae", on_all=False)
        if "class" not in measure.slice
    )
    return mean


def test_several_draws_of_negatives_reduce_the_variance_of_accuracies(monkeypatch):
    spread = {
        n_drawn: np.std([accuracy_of_one_feature(n_drawn, f"toy{i}", monkeypatch).value for i in range(30)])
        for n_drawn in (1, 5)
    }
    assert spread[5] < 0.6 * spread[1]
    one, several = (accuracy_of_one_feature(n_drawn, "toy0", monkeypatch) for n_drawn in (1, 5))
    assert several.ci_low < several.value < several.ci_high
    assert one.n == several.n == 60  # Units are the test texts of all classes.
    assert several.units.bottom.sum() == 5 * one.units.bottom.sum()


def test_the_first_draw_of_negatives_decides_the_probe_on_all_features(monkeypatch):
    seen = []
    monkeypatch.setattr(
        datasets, "all_feature_correct", lambda features, task, stream: seen.append(task) or task.test_label
    )
    accuracy = {}
    features = pooled(torch.nn.functional.one_hot(make_dataset().label, 3).float())
    for n_drawn in (1, 5):
        monkeypatch.setattr(datasets, "n_draws", lambda n_classes, n_test, n_drawn=n_drawn: n_drawn)
        accuracy[n_drawn] = datasets.probe_accuracy(make_dataset(), features, (1,), source="sae")
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first.train, second.train)
        assert torch.equal(first.test, second.test)


def test_only_the_saebench_protocol_draws_new_texts_for_every_k(monkeypatch):
    train_texts = {}
    probes = datasets.k_sparse_correct

    def spy(features, tasks, ks, on_fit):
        for k in ks:
            train_texts.setdefault(protocol, {})[k] = torch.cat([task.train for task in tasks])
        return probes(features, tasks, ks, on_fit)

    monkeypatch.setattr(datasets, "k_sparse_correct", spy)
    features = pooled(torch.nn.functional.one_hot(make_dataset().label, 3).float())
    for protocol in ("default", "saebench"):
        datasets.probe_accuracy(
            make_dataset(), features, (1, 2), source="sae", protocol=protocol, random=torch.Generator().manual_seed(0)
        )
    assert torch.equal(train_texts["default"][1], train_texts["default"][2])
    assert not torch.equal(train_texts["saebench"][1], train_texts["saebench"][2])


def test_texts_without_kept_tokens_are_dropped_and_rows_record_the_real_sizes():
    dataset = make_dataset()
    features = pooled(torch.nn.functional.one_hot(dataset.label, 3).float())
    features.n_tokens[:10] = 0  # ten training texts of class a
    measures = datasets.probe_accuracy(dataset, features, (1,), source="sae")
    sizes = {measure.slice["class"]: measure.slice["train"] for measure in measures if "class" in measure.slice}
    assert sizes == {"a": 40, "b": 60, "c": 60}
    features.n_tokens[:30] = 0
    with pytest.raises(BadSetting, match="toy has no texts with content on both sides of its class 'a'"):
        datasets.probe_accuracy(dataset, features, (1,), source="sae")


def toy_order(n_train=60, n_test=40, n_classes=2):
    texts = tuple(f"{group} {label}" for group in range(n_train + n_test) for label in range(n_classes))
    return OrderTask("toy", n_classes, texts, n_train, n_test, "block")


@pytest.mark.parametrize("n_classes", [2, 3])
def test_order_probes_are_correct_with_order_features_and_controls_are_at_chance(n_classes):
    task = toy_order(n_classes=n_classes)
    n_shuffled = task.n_test_groups * n_classes
    label = torch.arange(len(task.texts)) % n_classes
    order_features = torch.nn.functional.one_hot(label, n_classes).float()
    shuffled = torch.rand(n_shuffled, n_classes, generator=torch.Generator().manual_seed(0))
    measures = order_probes.order_accuracy(task, pooled(torch.cat([order_features, shuffled])), (1,), "mean")
    values = {measure.metric: measure.value for measure in measures}
    assert values["order_accuracy"] == 1.0
    assert abs(values["order_shuffled"] - 0.5) < 0.15
    assert values["order_permuted"] < 0.9  # random labels: all texts of a group are right or all are wrong
    assert {measure.n for measure in measures} == {task.n_test_groups}
    bag = torch.arange(len(task.texts)).float()[:, None] // n_classes
    bag = torch.cat([bag, bag[-n_shuffled:]])
    bag_measures = order_probes.order_accuracy(task, pooled(torch.cat([bag, (bag % 7) ** 2], 1)), (1,), "mean")
    assert [measure.value for measure in bag_measures] == [0.5, 0.5, 0.5, 0.5]


def early_and_late(n_texts=280, n_tokens=12, *, seed=0):
    """Texts in which latent 0 fires once: early in even texts, late in odd ones, while latents 1 to 5 are noise."""
    random = torch.Generator().manual_seed(seed)
    dense = torch.zeros(n_texts, n_tokens, 6)
    dense[:, :, 1:] = torch.rand(n_texts, n_tokens, 5, generator=random) * (
        torch.rand(n_texts, n_tokens, 5, generator=random) < 0.5
    )
    early = torch.randint(0, n_tokens // 2, (n_texts,), generator=random)
    where = torch.where(torch.arange(n_texts) % 2 == 0, early, n_tokens - 1 - early)
    dense[torch.arange(n_texts), where, 0] = 3.0
    batch = batch_of(
        torch.zeros(n_texts * n_tokens, 1),
        torch.arange(1, n_tokens + 1).repeat(n_texts),
        torch.arange(n_texts).repeat_interleave(n_tokens).to(torch.int32),
    )
    return batch, codes_of(dense.view(-1, 6)), dense


def text_codes(batch, codes, n_texts):
    texts = TextCodes(n_texts, codes.d_sae)
    for some in torch.arange(n_texts).split(90):  # as in several batches
        chosen = torch.isin(batch.text, some)
        texts.update(batch.select(chosen), codes.select(chosen))
    return texts


def test_an_attention_probe_finds_where_a_latent_fires():
    task, (batch, codes, dense) = toy_order(), early_and_late()
    (measure,) = order_probes.attention_accuracy(task, text_codes(batch, codes, 280))
    assert measure.slice == {"task": "toy", "about": "block", "k": "all", "pooling": "attention"}
    assert measure.n == 40
    assert measure.value > 0.9
    of_mean = order_probes.order_accuracy(task, pooled(dense.mean(1)), (1,), "mean")
    assert abs(of_mean[0].value - 0.5) < 0.15
    (again,) = order_probes.attention_accuracy(task, text_codes(batch, codes, 280))
    assert again.value == measure.value
    silent = codes_of(torch.zeros(280 * 12, 6))
    (missing,) = order_probes.attention_accuracy(task, text_codes(batch, silent, 280))
    assert missing.reason.startswith("none of 6 latents is active on 96 training texts")


def test_an_attention_probe_does_not_use_the_test_labels():
    batch, codes, _ = early_and_late()
    texts = text_codes(batch, codes, 280)
    train = torch.arange(200)
    task = ProbeTask(train, train % 2 == 0, 200 + torch.arange(80), torch.arange(80) % 2 == 0)
    correct = attention_correct(texts, task, torch.Generator().manual_seed(0))
    inverted = ProbeTask(task.train, task.train_label, task.test, ~task.test_label)
    assert torch.equal(attention_correct(texts, inverted, torch.Generator().manual_seed(0)), ~correct)


def test_attention_equals_a_plain_loop():
    batch, codes, dense = early_and_late(30)
    random = torch.Generator().manual_seed(1)
    table, of_place, bias = (torch.randn(size, generator=random) for size in ((6, 2 * N_HEADS), N_HEADS, 1))
    chosen = torch.tensor([7, 2, 29])
    logits = attention._logits(text_codes(batch, codes, 30).part(chosen), 1.7, table, of_place, bias)
    for logit, text in zip(logits, chosen, strict=True):
        expected = bias.clone()
        for head in range(N_HEADS):
            scores = [
                dense[text, t] @ table[:, head] / 1.7 + of_place[head] * (2 * (t + 0.5) / 12 - 1) for t in range(12)
            ]
            share = torch.stack(scores).softmax(0)
            expected += sum(share[t] * (dense[text, t] @ table[:, N_HEADS + head]) / 1.7 for t in range(12))
        torch.testing.assert_close(logit[None], expected, rtol=1e-4, atol=1e-5)


def test_the_chosen_pooling_is_the_best_on_validation_texts_not_on_test_texts():
    """Pooling `a` is right on all training groups, `b` on the test groups alone."""
    task, random = toy_order(), torch.Generator().manual_seed(0)
    label = (torch.arange(280) % 2).float()[:, None]
    noise = torch.rand(280, 1, generator=random)
    is_test = torch.arange(280)[:, None] >= 120
    by_pooling = {"a": torch.where(is_test, noise, label), "b": torch.where(is_test, label, noise)}
    measures = []
    for name, rows in by_pooling.items():
        measures += order_probes.order_accuracy(task, pooled(rows), (1,), name)
        measures += order_probes.validation_accuracy(task, pooled(rows), (1,), name)
    chosen = order_probes.with_chosen(measures)[-1]
    of_a = next(m for m in measures if m.metric == "order_accuracy" and m.slice["pooling"] == "a")
    assert (chosen.metric, chosen.slice["pooling"], chosen.value) == ("order_accuracy", "chosen", of_a.value)
    assert chosen.units is of_a.units
    validated = {m.slice["pooling"]: (m.value, m.n) for m in measures if m.metric == "order_validation"}
    assert validated["a"] == (1.0, 15)
    assert validated["b"][0] < 0.8
    constant = [
        *order_probes.order_accuracy(task, pooled(torch.ones(280, 1)), (1,), "c"),
        *order_probes.validation_accuracy(task, pooled(torch.ones(280, 1)), (1,), "c"),
    ]
    assert order_probes.with_chosen(constant) == constant
    assert order_probes.with_chosen([*constant, *measures])[-1].value == of_a.value


def test_accuracies_on_constant_features_are_missing_with_the_reason():
    task, dataset = toy_order(), make_dataset()
    of_order = order_probes.order_accuracy(task, pooled(torch.ones(280, 2)), (1, 2), "mean")
    of_dataset = datasets.probe_accuracy(dataset, pooled(torch.ones(len(dataset.texts), 2)), (1, 2), source="sae")
    for name, measures in (("order_accuracy", of_order), ("probe_accuracy", of_dataset)):
        assert [(measure.metric, measure.slice["k"]) for measure in measures] == [(name, 1), (name, 2)]
        for measure in measures:
            assert measure.value != measure.value  # NaN
            assert measure.reason.startswith("all 2 pooled features are constant over")


def test_probes_with_permuted_order_labels_are_at_chance():
    """Averaged over many draws, with features that encode the order perfectly."""
    accuracies = []
    for number in range(12):
        task = OrderTask(f"toy{number}", 2, toy_order().texts, 60, 40, "block")
        order_features = torch.nn.functional.one_hot(torch.arange(280) % 2, 2).float()
        accuracies.append(order_probes.order_accuracy(task, pooled(order_features), (1,), "mean")[3].value)
    assert 0.25 < sum(accuracies) / len(accuracies) < 0.75


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(DEFAULT_MODEL)


@pytest.mark.embedded
def test_a_leaking_task_raises_an_error(tokenizer):
    leaking = OrderTask("leak", 2, ("old cat", "new cat") * 30, 20, 10, "local")
    with pytest.raises(BadSetting, match=r"a bag of words scores 1\.0 on leak, not exactly 1/2"):
        order_probes.bag_accuracy(leaking, tokenizer)


@pytest.mark.embedded
@pytest.mark.parametrize("name", datasets.DATASETS)
def test_probe_texts_are_balanced_capped_and_from_the_evaluation_split(name):
    dataset = datasets.read_probe_dataset(name, 100, 20, 1000)
    assert Counter(dataset.label.tolist()) == dict.fromkeys(range(len(dataset.classes)), 60)
    assert int(dataset.train.sum()) == 50 * len(dataset.classes)
    assert len(set(map(text_key, dataset.texts))) == len(dataset.texts)
    assert {split_of(text) for text in dataset.texts} == {"evaluation"}
    uncapped = datasets.read_probe_dataset(name, 100_000, 25_000, 1000)
    n_class = len(uncapped.texts) // len(uncapped.classes)
    assert n_class < 2500
    assert int(uncapped.train.sum()) / len(uncapped.texts) == pytest.approx(0.8, abs=0.01)


@pytest.mark.embedded
def test_no_text_of_a_metric_or_probe_is_in_the_training_corpus():
    """Compare the first 200 characters of the texts rather than the hash that defines the split."""
    tables = ("161_agnews_0", "158_code_C", "157_amazon_5star", "97_news_class")
    tables_by_name = {table: embedded.read_table(table) for table in tables}

    def beginning(text):
        return " ".join(text.lower().split())[:200]

    training = {
        beginning(text)
        for rows in tables_by_name.values()
        for text in unique_texts((text for text, _ in rows), "training")
    }
    assert len(training) > 1000
    evaluated = [text for name in datasets.DATASETS for text in datasets.read_probe_dataset(name, 400, 100, 1000).texts]
    evaluated += order_tasks._texts("97_news_class", "evaluation", "Sport")
    assert len(evaluated) > 1000
    assert not training & set(map(beginning, evaluated))
