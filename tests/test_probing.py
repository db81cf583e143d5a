from collections import Counter

import pytest
import torch

from conftest import D_SAE, N_POSITIONS, make_sae, make_vectors
from posmask import assets, corpus, model
from posmask.activations import Batch
from posmask.errors import BadSetting, DegenerateResult
from posmask.probing import order, order_tasks, topics
from posmask.probing.order_tasks import OrderTask
from posmask.probing.pooling import Pool
from posmask.probing.sparse import k_sparse_correct


def labelled(n, *, seed=0):
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2 == 0
    features = torch.randn(n, 20, generator=random)
    features[:, 7] += 3.0 * label
    features[:, 3] -= 1.5 * label
    return features, label


def test_probes_use_the_features_whose_class_means_differ_most():
    train, label = labelled(400)
    test, test_label = labelled(400, seed=1)
    found = k_sparse_correct(train, label, test, test_label, (1, 2, 20))
    assert found[1].float().mean() > 0.9
    assert found[2].float().mean() > found[1].float().mean()
    train[:, [7, 3]] = test[:, [7, 3]] = 0.0
    blind = k_sparse_correct(train, label, test, test_label, (1, 2))
    assert abs(float(blind[2].float().mean()) - 0.5) < 0.08


def test_probes_on_permuted_labels_are_at_chance():
    train, label = labelled(400)
    test, test_label = labelled(2000, seed=1)
    permuted = label[torch.randperm(400, generator=torch.Generator().manual_seed(5))]
    correct = k_sparse_correct(train, permuted, test, test_label, (5,))[5]
    assert abs(float(correct.float().mean()) - 0.5) < 0.1


def test_constant_features_stop_the_probe():
    label = torch.arange(10) % 2 == 0
    with pytest.raises(DegenerateResult, match="all 4 pooled features are constant over 10 training texts"):
        k_sparse_correct(torch.zeros(10, 4), label, torch.zeros(10, 4), label, (1,))


def test_features_that_are_not_finite_stop_the_probe():
    train, label = labelled(20)
    test = train.clone()
    test[3, 5] = torch.nan
    with pytest.raises(DegenerateResult, match="NaN or infinite"):
        k_sparse_correct(train, label, test, label, (1,))


@pytest.mark.parametrize("n_segments", [1, 4])
def test_pooling_equals_a_plain_loop(n_segments):
    sae = make_sae("hard")
    vectors, position = make_vectors(200)
    text = (torch.arange(200) * 7 % 5).to(torch.int32)
    batch = Batch(vectors, position, position, text, torch.ones(200).bool())
    codes = sae.sparse_encode(vectors, position)
    pool = Pool(6, D_SAE, N_POSITIONS, n_segments)
    pool.update(batch, codes)
    expected = torch.zeros(6, n_segments, D_SAE)
    for number in range(6):
        for segment in range(n_segments):
            inside = (text == number) & (position * n_segments // N_POSITIONS == segment)
            if inside.any():
                expected[number, segment] = codes.dense()[inside].mean(0)
    torch.testing.assert_close(pool.features(), expected.flatten(1))


def make_dataset(n_class=40):
    label = torch.arange(3).repeat_interleave(n_class)
    train = torch.arange(n_class).repeat(3) < 30
    return topics.ProbeDataset("toy", ("a", "b", "c"), tuple(map(str, range(3 * n_class))), label, train)


def test_each_class_is_probed_on_balanced_texts_that_never_cross_the_split():
    dataset = make_dataset()
    for number in range(3):
        for train in (True, False):
            chosen = topics._balanced(dataset, number, train)
            assert len(set(chosen.tolist())) == len(chosen)
            assert bool((dataset.train[chosen] == train).all())
            counts = Counter(dataset.label[chosen].tolist())
            assert counts[number] == len(chosen) / 2
            assert max(counts[other] for other in counts if other != number) <= len(chosen) / 4 + 1


def test_probe_accuracy_is_the_mean_over_classes():
    dataset = make_dataset()
    features = torch.nn.functional.one_hot(dataset.label, 3).float()
    found = topics.probe_accuracy(dataset, features, (1, 3), "sae")
    assert [measure.value for measure in found] == [1.0, 1.0]
    assert found[0].slice == {"dataset": "toy", "k": 1, "source": "sae"}
    assert found[0].n == 60


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer(model.EMBEDDED_MODEL)


@pytest.mark.embedded
def test_a_leaking_task_is_refused(tokenizer):
    leaking = OrderTask("leak", 2, ("old cat", "new cat") * 30, 20, 10)
    with pytest.raises(BadSetting, match=r"a bag of words scores 1\.0 on leak, not exactly 1/2"):
        order.bag_accuracy(leaking, tokenizer)


@pytest.mark.embedded
@pytest.mark.parametrize("name", topics.DATASETS)
def test_probe_texts_are_balanced_capped_and_never_trained_on(name):
    dataset = topics.read_probe_dataset(name, 100, 20, 1000)
    assert Counter(dataset.label.tolist()) == dict.fromkeys(range(len(dataset.classes)), 60)
    assert int(dataset.train.sum()) == 50 * len(dataset.classes)
    assert len(set(map(corpus.text_key, dataset.texts))) == len(dataset.texts)
    assert {corpus.split_of(text) for text in dataset.texts} == {"evaluation"}
    whole = topics.read_probe_dataset(name, 100_000, 25_000, 1000)
    n_class = len(whole.texts) // len(whole.classes)
    assert n_class < 2500
    assert int(whole.train.sum()) / len(whole.texts) == pytest.approx(0.8, abs=0.01)


@pytest.mark.embedded
def test_no_text_of_a_metric_or_probe_is_in_the_training_corpus():
    """Compared by their own words, not by the hash that sorted them: no text of one side begins one of the other."""
    tables = ("161_agnews_0", "158_code_C", "157_amazon_5star", "97_news_class")
    rows = {table: assets.read_table(table) for table in tables}

    def beginning(text):
        return " ".join(text.lower().split())[:200]

    training = {
        beginning(text)
        for found in rows.values()
        for text in corpus.unique_texts((text for text, _ in found), "training")
    }
    assert len(training) > 1000
    evaluated = [text for name in topics.DATASETS for text in topics.read_probe_dataset(name, 400, 100, 1000).texts]
    evaluated += order_tasks._evaluation_texts("97_news_class", "Sport")
    assert len(evaluated) > 1000
    assert not training & set(map(beginning, evaluated))
