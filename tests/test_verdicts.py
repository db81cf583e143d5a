"""Coverage of intervals and error rate of verdicts in simulated studies with a planted difference."""

import numpy as np
import pytest
import scipy

from posmask.errors import DamagedFolder, DegenerateResult
from posmask.results import comparisons
from posmask.results.bootstrap import resample_counts
from posmask.results.comparisons import (
    Comparison,
    Hypothesis,
    Verdict,
    equivalence,
    judge,
    paired_difference,
    read_verdicts,
    write_verdicts,
)
from posmask.results.rows import Units
from posmask.results.table import COMPARED


@pytest.fixture(autouse=True)
def quick_resampling(monkeypatch):
    """Cache the bootstrap draws, which are the same for every study."""
    cache = {}

    def cached_counts(n_units, name):
        if (n_units, name) not in cache:
            cache[n_units, name] = resample_counts(n_units, name)
        return cache[n_units, name]

    monkeypatch.setattr(comparisons, "resample_counts", cached_counts)


def simulated(random, n_seeds, seed_spread, text_spread, noise, *, difference=0.0, n_units=50, n_tasks=3):
    """Simulate two cells; per task, their difference is d[s, u] = difference + seed[s] + text[u] + noise[s, u]."""
    texts = random.normal(0, text_spread, (n_tasks, n_units))
    cells = [], []
    for _ in range(n_seeds):
        seed = random.normal(0, seed_spread)
        samples = {}, {}
        for task in range(n_tasks):
            base = random.normal(0.6, 0.3, n_units)
            d = difference + seed + texts[task] + random.normal(0, noise, n_units)
            samples[0][f"task{task}"] = Units(base + d, np.ones(n_units))
            samples[1][f"task{task}"] = Units(base, np.ones(n_units))
        for cell, sample in zip(cells, samples, strict=True):
            cell.append(sample)
    return cells


# (spread over seeds, over texts, noise): texts alone, a mixture, seeds alone, noise alone.
PLANTED = [
    (0.05, 0.4, 0.4),
    *(
        pytest.param(spreads, marks=pytest.mark.slow)
        for spreads in ((0.0, 0.4, 0.4), (0.1, 0.4, 0.4), (0.1, 0.0, 0.1), (0.0, 0.0, 0.4))
    ),
]


@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize("spreads", PLANTED)
def test_intervals_cover_the_planted_difference_in_95_percent_of_studies(n_seeds, spreads):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        estimate = paired_difference(*simulated(random, n_seeds, *spreads, difference=0.1))
        covered += estimate.ci_low <= 0.1 <= estimate.ci_high
    assert 930 <= covered <= 970


def test_intervals_of_one_seed_cover_the_sampling_of_texts():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        estimate = paired_difference(*simulated(random, 1, 0.0, 0.4, 0.4, difference=0.1))
        covered += estimate.ci_low <= 0.1 <= estimate.ci_high
    assert 930 <= covered <= 970


def units_of(cells, column):
    metric, where = COMPARED[column].metric, COMPARED[column].where
    slices = "".join(f";{key}={value}" for key, value in where.items())
    return [
        {
            seed: {f"{metric}|task={name}{slices}": units for name, units in sample.items()}
            for seed, sample in enumerate(cell)
        }
        for cell in cells
    ]


@pytest.mark.parametrize("spreads", PLANTED)
def test_at_most_5_percent_of_null_studies_have_a_verdict(spreads):
    """Each of 1,000 studies compares three cells with one in two columns; any false verdict counts."""
    random = np.random.default_rng(1)
    planned = [Comparison(f"cell{number}", "open") for number in range(3)]
    false = 0
    for _ in range(1000):
        study: dict = {}
        for number in range(3):
            for column in ("block k=1", "block k=5"):
                cell, other = units_of(simulated(random, 5, *spreads, n_tasks=2), column)
                for name, seeds in ((f"cell{number}", cell), ("open", other)):
                    merged = study.setdefault(name, {seed: {} for seed in seeds})
                    for seed, new in seeds.items():
                        merged[seed].update(new)
        false += any(verdict.verdict in ("better", "worse") for verdict in judge(study, planned))
    assert false <= 50


def test_a_large_difference_gives_a_verdict_with_its_sign():
    random = np.random.default_rng(0)
    for difference, direction in ((0.3, "better"), (-0.3, "worse")):
        cell, other = units_of(simulated(random, 5, 0.02, 0.2, 0.2, difference=difference), "block k=5")
        (verdict,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
        assert (verdict.verdict, verdict.n_seeds, verdict.n_comparisons) == (direction, 5, 1)
        assert verdict.ci_low < verdict.effect < verdict.ci_high
        assert verdict.ci_low * verdict.ci_high > 0


def test_fewer_than_three_seeds_decide_nothing():
    random = np.random.default_rng(0)
    for n_seeds in (1, 2):
        cell, other = units_of(simulated(random, n_seeds, 0.0, 0.01, 0.01, difference=0.5), "block k=5")
        (verdict,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
        assert verdict.verdict == "undecided"
        assert verdict.p_corrected < 1e-6


def test_pairing_removes_shared_variance():
    """Text difficulty varies strongly but equally for both cells, so that only the difference is precise."""
    random = np.random.default_rng(0)
    hard = random.random(50)
    cell = [{"task": Units(hard + 0.05 + random.normal(0, 0.01, 50), np.ones(50))} for _ in range(3)]
    other = [{"task": Units(hard.copy(), np.ones(50))} for _ in range(3)]
    difference = paired_difference(cell, other)
    assert difference.ci_high - difference.ci_low < 0.02
    assert difference.ci_low < 0.05 < difference.ci_high


def test_equal_cells_have_zero_difference():
    same = [{"task": Units(np.ones(10), np.ones(10))} for _ in range(3)]
    difference = paired_difference(same, same)
    assert (difference.effect, difference.ci_low, difference.ci_high, difference.p) == (0, 0, 0, 1)


def test_other_poolings_are_selected_by_name():
    ones, half = Units(np.ones(20), np.ones(20)), Units(np.arange(20) % 2 * 1.0, np.ones(20))
    rows = {
        "order_accuracy|task=a;about=block;k=5;pooling=mean": half,
        "order_accuracy|task=a;about=block;k=5;pooling=segments8": ones,
        "probe_accuracy|dataset=b;k=5;source=sae;pooling=mean;protocol=default;train=9": half,
        "probe_accuracy|dataset=b;k=5;source=sae;pooling=mean;protocol=default;train=9;class=x": ones,
        "explained_variance|": half,
    }
    verdicts = judge(
        {"open": dict.fromkeys(range(3), rows)}, [Comparison("open + segments8", "open"), Comparison("open", "open")]
    )
    effects = {(verdict.label, verdict.column): verdict.effect for verdict in verdicts}
    assert effects == {
        ("open + segments8", "block k=5"): 0.5,  # columns without a pooling are compared once
        ("open", "block k=5"): 0, ("open", "probing k=5"): 0, ("open", "explained_variance"): 0,
    }  # fmt: skip
    assert judge({"open": dict.fromkeys(range(3), rows)}, [Comparison("open + growing", "open")]) == []


def test_a_column_without_a_finite_value_has_no_verdict():
    half, none = Units(np.full(10, 0.5), np.ones(10)), Units(np.zeros(10), np.zeros(10))
    cells = {
        "open": {"explained_variance|": half, "ce_recovered|": half},
        "hard": {"explained_variance|": half, "ce_recovered|": none},
    }
    verdicts = judge(
        {name: dict.fromkeys(range(3), units) for name, units in cells.items()}, [Comparison("hard", "open")]
    )
    assert [verdict.column for verdict in verdicts] == ["explained_variance"]


def test_units_without_a_finite_value_raise_an_error():
    none = [{"task": Units(np.zeros(10), np.zeros(10))}] * 3
    with pytest.raises(DegenerateResult, match="task has no finite value in a draw of its 10 units: evaluate on more"):
        paired_difference(none, none)


@pytest.mark.parametrize("spreads", [(0.01, 0.05, 0.05)])
@pytest.mark.parametrize("difference", [0.01, -0.01])
def test_a_difference_of_the_margin_is_called_equivalent_in_at_most_5_percent_of_studies(spreads, difference):
    random, called = np.random.default_rng(2), 0
    for _ in range(400):
        cell, other = units_of(simulated(random, 5, *spreads, difference=difference), "block k=5")
        (verdict,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
        called += verdict.verdict == "equivalent"
    assert called <= 20


def test_small_differences_are_equivalent_and_never_better():
    random = np.random.default_rng(0)
    cell, other = units_of(simulated(random, 5, 0.0, 0.0, 0.001, difference=0.0004), "block k=5")
    (verdict,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
    assert verdict.p_corrected < 0.01  # significantly above 0
    assert (verdict.verdict, verdict.margin, verdict.n_agree) == ("equivalent", 0.01, 5)
    (verdict,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")], margins={"block k=5": 0.0001})
    assert verdict.verdict == "better"


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    random = np.random.default_rng(0)
    estimate = paired_difference(*simulated(random, 5, 0.01, 0.1, 0.1, difference=0.005))
    both = [scipy.stats.t.sf((side * estimate.effect + 0.02) / estimate.error, estimate.freedom) for side in (-1, 1)]
    assert equivalence(estimate, 0.02) == pytest.approx(max(both))


def test_hypotheses_are_tested_in_order_until_one_fails():
    random, study = np.random.default_rng(0), {"open": {}}
    for number, difference in enumerate((0.3, 0.0, 0.3)):
        cell, other = units_of(simulated(random, 5, 0.02, 0.1, 0.1, difference=difference), "block k=5")
        study[f"cell{number}"] = cell
        study[f"open{number}"] = other
    pairs = [(f"cell{number}", f"open{number}") for number in range(3)]
    hypotheses = [Hypothesis(*pair, "block k=5", "better") for pair in pairs]
    verdicts = judge(study, [Comparison(*pair) for pair in pairs], hypotheses)
    assert [(v.hypothesis, v.verdict, v.expected) for v in verdicts] == [
        (1, "better", "better"), (2, "undecided", "better"), (3, "undecided", "better"),
    ]  # fmt: skip
    assert verdicts[2].p_corrected == 1.0  # it was not tested
    reordered = judge(study, [], [hypotheses[0], hypotheses[2], hypotheses[1]])
    assert [v.verdict for v in reordered] == ["better", "better", "undecided"]
    absent = judge(study, [], [Hypothesis("cell0", "open0", "local k=5", "better"), hypotheses[0]])
    assert [v.verdict for v in absent] == ["undecided"]  # a hypothesis that cannot be tested ends the order


def test_controls_are_compared_by_name():
    ones, half = Units(np.ones(20), np.ones(20)), Units(np.arange(20) % 2 * 1.0, np.ones(20))
    rows = {
        "order_accuracy|task=a;about=block;k=5;pooling=mean": ones,
        "order_accuracy|task=a;about=block;k=5;pooling=zero-step": half,
        "explained_variance|": half,
        "explained_variance|control=zero-step": ones,
    }
    verdicts = judge({"slice": dict.fromkeys(range(3), rows)}, [Comparison("slice", "slice + zero-step")])
    assert {v.column: v.effect for v in verdicts} == {"block k=5": 0.5, "explained_variance": -0.5}


def test_written_verdicts_are_read_back(tmp_path):
    random = np.random.default_rng(0)
    cell, other = units_of(simulated(random, 3, 0.0, 0.2, 0.2), "block k=1")
    verdicts = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
    comparisons.write_verdicts(tmp_path / "verdicts.csv", verdicts)
    assert comparisons.read_verdicts(tmp_path / "verdicts.csv") == verdicts


def test_a_table_with_an_unknown_verdict_is_damaged(tmp_path):
    path = tmp_path / "verdicts.csv"
    said = Verdict("slice", "open", "block k=5", 0.1, 0.0, 0.2, 0.5, 3, 1, "undecided", 0.5)
    write_verdicts(path, [said])
    assert read_verdicts(path) == [said]
    path.write_text(path.read_text().replace("undecided", "perhaps"))
    with pytest.raises(DamagedFolder, match="'perhaps' is no verdict"):
        read_verdicts(path)
