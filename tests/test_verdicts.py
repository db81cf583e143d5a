"""Coverage of intervals and error rate of verdicts in simulated studies with a planted difference."""

import numpy as np
import pytest

from posmask.errors import BadSetting, DegenerateResult
from posmask.results import comparisons
from posmask.results.bootstrap import resample_counts
from posmask.results.comparisons import Comparison, holm, judge, paired_difference
from posmask.results.rows import Units
from posmask.results.table import COMPARED


@pytest.fixture(autouse=True)
def quick_resampling(monkeypatch):
    """The same draws for every study, made once."""
    made = {}

    def once(n_units, name):
        if (n_units, name) not in made:
            made[n_units, name] = resample_counts(n_units, name)
        return made[n_units, name]

    monkeypatch.setattr(comparisons, "resample_counts", once)


def simulated(random, n_seeds, seed_spread, text_spread, noise, *, difference=0.0, n_units=50, n_tasks=3):
    """Two cells, seed by seed: d[s, u] = difference + seed[s] + text[u] + noise[s, u], task by task."""
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
        pytest.param(some, marks=pytest.mark.slow)
        for some in ((0.0, 0.4, 0.4), (0.1, 0.4, 0.4), (0.1, 0.0, 0.1), (0.0, 0.0, 0.4))
    ),
]


@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize("spreads", PLANTED)
def test_intervals_cover_the_planted_difference_in_95_of_100_studies(n_seeds, spreads):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = paired_difference(*simulated(random, n_seeds, *spreads, difference=0.1))
        covered += found.ci_low <= 0.1 <= found.ci_high
    assert 930 <= covered <= 970


def test_one_seed_covers_the_drawing_of_texts():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = paired_difference(*simulated(random, 1, 0.0, 0.4, 0.4, difference=0.1))
        covered += found.ci_low <= 0.1 <= found.ci_high
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
def test_under_a_true_null_at_most_5_of_100_studies_have_a_verdict(spreads):
    """Of 1,000 studies of three cells against one, two columns each: any false verdict counts."""
    random = np.random.default_rng(1)
    asked = [Comparison(f"cell{number}", "open") for number in range(3)]
    false = 0
    for _ in range(1000):
        study: dict = {}
        for number in range(3):
            for column in ("order k=1", "order k=5"):
                cell, other = units_of(simulated(random, 5, *spreads, n_tasks=2), column)
                for name, seeds in ((f"cell{number}", cell), ("open", other)):
                    merged = study.setdefault(name, {seed: {} for seed in seeds})
                    for seed, new in seeds.items():
                        merged[seed].update(new)
        false += any(verdict.verdict != "no evidence" for verdict in judge(study, asked))
    assert false <= 50


def test_a_large_difference_is_found_and_named_by_its_sign():
    random = np.random.default_rng(0)
    for difference, verdict in ((0.3, "better"), (-0.3, "worse")):
        cell, other = units_of(simulated(random, 5, 0.02, 0.2, 0.2, difference=difference), "order k=5")
        (found,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
        assert (found.verdict, found.n_seeds, found.n_comparisons) == (verdict, 5, 1)
        assert found.ci_low < found.effect < found.ci_high
        assert found.ci_low * found.ci_high > 0


def test_fewer_than_three_seeds_are_no_evidence_however_large_the_difference():
    random = np.random.default_rng(0)
    for n_seeds in (1, 2):
        cell, other = units_of(simulated(random, n_seeds, 0.0, 0.01, 0.01, difference=0.5), "order k=5")
        (found,) = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
        assert found.verdict == "no evidence"
        assert found.p_corrected < 1e-6


def test_pairing_takes_out_what_cells_share():
    """Texts of very different difficulty, the same for both: the difference is known far better than either."""
    random = np.random.default_rng(0)
    hard = random.random(50)
    cell = [{"task": Units(hard + 0.05 + random.normal(0, 0.01, 50), np.ones(50))} for _ in range(3)]
    other = [{"task": Units(hard.copy(), np.ones(50))} for _ in range(3)]
    found = paired_difference(cell, other)
    assert found.ci_high - found.ci_low < 0.02
    assert found.ci_low < 0.05 < found.ci_high


def test_equal_cells_differ_by_nothing():
    same = [{"task": Units(np.ones(10), np.ones(10))} for _ in range(3)]
    found = paired_difference(same, same)
    assert (found.effect, found.ci_low, found.ci_high, found.p) == (0, 0, 0, 1)


def test_other_poolings_are_selected_by_name():
    ones, half = Units(np.ones(20), np.ones(20)), Units(np.arange(20) % 2 * 1.0, np.ones(20))
    rows = {
        "order_accuracy|task=a;k=5;pooling=mean": half,
        "order_accuracy|task=a;k=5;pooling=segments8": ones,
        "probe_accuracy|dataset=b;k=5;source=sae;pooling=mean;protocol=default;train=9": half,
        "probe_accuracy|dataset=b;k=5;source=sae;pooling=mean;protocol=default;train=9;class=x": ones,
        "explained_variance|": half,
    }
    found = judge(
        {"open": dict.fromkeys(range(3), rows)}, [Comparison("open + segments8", "open"), Comparison("open", "open")]
    )
    effects = {(verdict.label, verdict.column): verdict.effect for verdict in found}
    assert effects == {
        ("open + segments8", "order k=5"): 0.5,  # what pooling does not touch is compared once, not twice
        ("open", "order k=5"): 0, ("open", "probing k=5"): 0, ("open", "explained_variance"): 0,
    }  # fmt: skip
    with pytest.raises(BadSetting, match=r"'open \+ growing7' and 'open' have no number in common"):
        judge({"open": dict.fromkeys(range(3), rows)}, [Comparison("open + growing7", "open")])


def test_a_number_without_a_value_stops_the_verdicts():
    none = [{"task": Units(np.zeros(10), np.zeros(10))}] * 3
    with pytest.raises(DegenerateResult, match="task has no finite value in a draw of its 10 units: evaluate on more"):
        paired_difference(none, none)


def test_holm_keeps_order_and_never_exceeds_1():
    assert holm([0.5, 0.001, 0.6]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([]) == []


def test_verdicts_survive_their_file(tmp_path):
    random = np.random.default_rng(0)
    cell, other = units_of(simulated(random, 3, 0.0, 0.2, 0.2), "order k=1")
    found = judge({"slice": cell, "open": other}, [Comparison("slice", "open")])
    comparisons.write_verdicts(tmp_path / "verdicts.csv", found)
    assert comparisons.read_verdicts(tmp_path / "verdicts.csv") == found
