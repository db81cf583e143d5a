"""The results page agrees with the result files in its folder."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

from posmask.probing.order_tasks import ORDER_TASKS
from posmask.report import write_report
from posmask.results import rows
from posmask.results.comparisons import read_verdicts
from posmask.results.rows import parse_slice, write_rows
from posmask.results.table import format_number, format_signed, summarize

RESULTS = Path(__file__).parents[1] / "docs" / "results"


read_rows = functools.cache(rows.read_rows)


@functools.cache
def answer():
    """Return the script that writes the page; it reads each table once."""
    spec = importlib.util.spec_from_file_location("answer", RESULTS.parents[1] / "studies" / "answer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.read_rows = read_rows
    return module


def test_every_table_of_the_page_is_generated_from_the_result_files():
    marks = set()
    for page in PAGES:
        text = (RESULTS.parents[1] / page).read_text(encoding="utf8")
        assert answer().page(text) == text
        marks |= set(re.findall(r"<!-- (?!end of )(.+?) -->", text))
    assert {
        "full log", "full cells", "full verdicts", "full strictness", "controls cells", "controls verdicts",
        "confirm short", "confirm hypotheses", "confirm cells", "confirm verdicts",
    } <= marks  # fmt: skip
    changed = re.sub(r"\| 0\.\d\d\d \|", "| 0.999 |", text, count=1)
    assert changed != text
    assert answer().page(changed) == text


STUDIES = ("full", "key-early", "key-late", "key-gpt2")
PAGES = ("README.md", "docs/results/README.md")
BLOCK_ORDER = ("language_order", "topic_permutation")


def values(study, metric, cell):
    """Return the mean over seeds of a metric per slice."""
    by_slice = {}
    for row in read_rows(RESULTS / study / "results.csv.zst"):
        if (row.metric, row.cell) == (metric, cell):
            by_slice.setdefault(row.slice, []).append(row.value)
    return {slice: sum(slice_values) / len(slice_values) for slice, slice_values in by_slice.items()}


def order_gains(study):
    """Return the gain of `windows` over `open` at k = 5 per task, on shared seeds."""
    windows, baseline = (values(study, "order_accuracy", cell) for cell in ("windows", "open"))
    keys = [key for key in windows if ";k=5;pooling=mean" in key]
    return {parse_slice(key)["task"]: windows[key] - baseline[key] for key in keys}


def test_results_are_small_and_their_summaries_are_current():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert not [path for path in files if path.name in ("results.csv", "report.html")]
    for study in (folder.name for folder in answer().folders()):
        full = read_rows(RESULTS / study / "results.csv.zst")
        summary = RESULTS / study / "summary.csv"
        assert repr(read_rows(summary)) == repr(answer().summary_rows(full))
        assert summary.stat().st_size < 500_000
        for line, expected in zip(summarize(read_rows(summary)), summarize(full), strict=True):
            assert (line.label, line.n_seeds) == (expected.label, expected.n_seeds)
            for part in ("overall", "numbers"):
                assert getattr(line, part) == pytest.approx(getattr(expected, part), abs=1e-12, nan_ok=True)


def test_the_report_of_a_study_compares_cells_with_the_baseline(tmp_path):
    page = write_report(RESULTS / "key-late", out=tmp_path / "key-late.html").read_text(encoding="utf8")
    assert "study.json is missing" not in page
    gains = order_gains("key-late")
    for about in ("block", "local"):
        of = rf"windows\|order_accuracy\|k=5;about={about};pooling=mean"
        (number,) = re.findall(rf'data-of="{of}" [^>]*', page)[:1]
        of_kind = [gain for task, gain in gains.items() if ORDER_TASKS[task].about == about]
        difference = format_signed(sum(of_kind) / len(of_kind))
        assert f"difference to the baseline {difference}" in number


def test_packed_results_are_readable(tmp_path):
    few = read_rows(RESULTS / "key-late" / "results.csv.zst")[:50]
    write_rows(tmp_path / "results.csv", few)
    answer().pack(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv.zst"]
    assert repr(read_rows(tmp_path / "results.csv.zst")) == repr(few)


def claims():
    """Return each page as a single line."""
    return [" ".join((RESULTS.parents[1] / name).read_text(encoding="utf8").split()) for name in PAGES]


def test_pages_do_not_repeat_refuted_claims():
    for text in claims():
        for refuted in (
            "no latent learns to belong",
            "is told better from five of them than from five of the unmasked SAE, at all three layers",
            "only at the early layer are windows above it",
            "Slices lose less variance here (.032) and",
        ):
            assert refuted not in text


def test_most_of_the_order_gain_comes_from_two_block_order_tasks():
    gains = order_gains("full")
    block = sum(gains[task] for task in BLOCK_ORDER)
    others = [gain for task, gain in gains.items() if task not in BLOCK_ORDER]
    assert len(others) == 6
    assert f"{block / sum(gains.values()):.0%}" == "85%"
    assert f"{sum(others) / 6:.3f}" == "0.011"
    assert "85 %" in claims()[1]
    assert "`language_order` and `topic_permutation`" in claims()[1]
    assert "over the other six it is 0.011" in claims()[1]
    late = [gain for task, gain in order_gains("key-late").items() if task not in BLOCK_ORDER]
    assert f"{sum(late) / 6:.3f}" == "-0.008"
    assert "the other six lose 0.008" in claims()[1]


def test_explained_variance_of_the_late_layer_excludes_its_two_large_positions():
    by_cell = {cell: values("key-late", "explained_variance", cell) for cell in ("open", "slice")}
    at_position = {cell: [by_slice[f"position={p}"] for p in range(1, 128)] for cell, by_slice in by_cell.items()}
    rest = {cell: sum(shares[2:]) / 125 for cell, shares in at_position.items()}
    assert [f"{value:.3f}" for value in (*at_position["open"][:2], rest["open"])] == ["0.999", "0.940", "0.780"]
    assert f"{rest['open'] - rest['slice']:.3f}" == "0.121"
    assert "0.999 of the variance at position 1, 0.940 at position 2, and 0.780 on average" in claims()[1]


def test_significant_results_are_significant_after_correction():
    verdicts = {
        (study, verdict.label, verdict.against, verdict.column): verdict
        for study in STUDIES
        for verdict in read_verdicts(RESULTS / study / "verdicts.csv")
    }
    against_open = [verdicts[study, "windows", "open", "order k=5"].verdict for study in STUDIES]
    assert against_open == ["better", "better", "undecided", "undecided"]
    pooled = {
        (study, column): verdict.verdict
        for (study, label, against, column), verdict in verdicts.items()
        if (label, against) == ("windows", "open + segments8-mean") and verdict.verdict != "undecided"
    }
    assert pooled == {("key-gpt2", "order k=1"): "worse"}


def test_the_controls_are_those_of_the_page():
    verdicts = {(v.label, v.against, v.column): v for v in read_verdicts(RESULTS / "controls" / "verdicts.csv")}

    def said(label, against, column="block k=5"):
        v = verdicts[label, against, column]
        return f"{format_signed(v.effect)} [{format_number(v.ci_low)}, {format_number(v.ci_high)}]"

    page = claims()[1]
    for pair in (
        ("windows", "open"), ("windows + zero-step", "open"), ("windows", "windows + matched"),
        ("open + moment", "open"), ("open + parts3", "open"), ("open + moment", "open", "local k=1"),
        ("slice", "open"), ("slice", "slice + matched"), ("slice", "open", "probing k=5"),
    ):  # fmt: skip
        assert said(*pair) in page, pair
    zero_step, matched = (
        [(v.effect, v.ci_low) for (label, _, _), v in verdicts.items() if label == f"windows + {name}"]
        for name in ("zero-step", "matched")
    )
    assert zero_step == matched
    assert verdicts["windows", "open", "explained_variance"].verdict == "equivalent"
    local = [v for (_, against, column), v in verdicts.items() if (against, column) == ("open", "local k=5")]
    assert len(local) > 8
    assert {v.verdict for v in local} == {"undecided"}


def test_what_became_of_each_hypothesis_is_said():
    stated = {v.hypothesis: v for v in read_verdicts(RESULTS / "confirm" / "verdicts.csv") if v.hypothesis}
    registered = (RESULTS.parents[1] / "studies" / "preregistered.md").read_text(encoding="utf8")
    assert sorted(stated) == [1, 2, 3, 4]
    assert all(f"\n{number}. " in registered for number in stated)
    n_expected = sum(v.verdict == v.expected for v in stated.values())
    assert f"{['None', 'One', 'Two', 'Three', 'All'][n_expected]} of the four" in claims()[1]


NUMBER = r"([+−]?\d+\.\d+)"
INTERVAL = re.compile(rf"\[{NUMBER}, {NUMBER}\]")
DIFFERENCE = re.compile(rf"{NUMBER},? \(?(?:95 % CI )?{INTERVAL.pattern}")


def prose(name):
    """Return the sentences of a page outside of its tables."""
    lines = (RESULTS.parents[1] / name).read_text(encoding="utf8").splitlines()
    text = " ".join(" ".join(line for line in lines if not line.startswith("|")).split())
    return re.split(r"(?:(?<=[.:])|(?<=\.\*)) +(?=[A-Z*`-])", text)


def verdicts_of(difference):
    """Return the verdicts of all studies whose rounded effect and interval are these."""
    numbers = [number.replace("−", "-") for number in difference.groups()]
    return {
        verdict.verdict
        for study in (*STUDIES, "controls", "confirm", "readouts")
        for verdict in read_verdicts(RESULTS / study / "verdicts.csv")
        if all(
            abs(f(round(value, len(number.partition(".")[2]))) - f(float(number))) < 1e-9
            for value, number, f in zip(
                (verdict.effect, verdict.ci_low, verdict.ci_high), numbers, (abs, float, float), strict=True
            )
        )
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_difference_in_a_sentence_is_a_row_with_the_verdict_that_it_claims(name):
    n_intervals = 0
    for sentence in prose(name):
        differences = list(DIFFERENCE.finditer(sentence))
        n_intervals += len(differences)
        assert len(differences) == len(INTERVAL.findall(sentence)), f"an interval without its difference: {sentence}"
        found = [verdicts_of(difference) for difference in differences]
        assert all(found), f"a difference that is in no verdicts.csv: {sentence}"
        if len(found) == 1 and "not significant" not in sentence and "undecided" not in sentence:
            for word, verdicts in (("significant", {"better", "worse"}), ("equivalent", {"equivalent"})):
                assert word not in sentence or found[0] & verdicts, f"the row says {found[0]}: {sentence}"
        elif len(found) == 1:
            assert "undecided" in found[0], f"the row says {found[0]}: {sentence}"
    assert n_intervals > 3


def test_the_accuracy_of_the_edges_of_texts_equals_the_rows():
    edges = {
        parse_slice(row.slice)["task"]: row.value
        for row in read_rows(RESULTS / "controls" / "results.csv.zst")
        if row.metric == "order_edges"
    }
    first, second = (f"{edges[task]:.2f}" for task in ("language_order", "chronology"))
    said = f"{first} of the cases of `language_order` and {second} of `chronology`"
    assert said in claims()[1]


def test_the_accuracies_of_the_confirmation_equal_the_rows():
    accuracy = {}
    for row in read_rows(RESULTS / "confirm" / "results.csv.zst"):
        where = parse_slice(row.slice)
        if row.metric == "order_edges" or (row.metric == "order_accuracy" and row.cell == "open" and where["k"] == "5"):
            kind = where.get("pooling", "edges")
            accuracy.setdefault((kind, where["task"]), []).append(row.value)
    tasks = ("genre_order", "rating_order", "story_order", "review_shift")
    edges, moment, mean = (
        [sum(accuracy[kind, task]) / len(accuracy[kind, task]) for task in tasks]
        for kind in ("edges", "moment", "mean")
    )
    for said in (
        f"{edges[0]:.3f} of `genre_order`, {edges[1]:.3f} of `rating_order`, {edges[2]:.3f} of `story_order` and "
        f"{edges[3]:.3f} of `review_shift`",
        "the moment has {:.3f}, {:.3f}, {:.3f} and {:.3f}".format(*moment),
        "the mean {:.3f}, {:.3f}, {:.3f} and {:.3f}".format(*mean),
    ):
        assert said in claims()[1]


def test_the_accuracies_of_readouts_on_all_latents_equal_the_rows():
    accuracy = {}
    for row in read_rows(RESULTS / "readouts" / "results.csv.zst"):
        where = parse_slice(row.slice)
        if row.metric == "order_accuracy" and row.cell == "open" and where["k"] == "all":
            accuracy.setdefault((where["pooling"], where["task"]), []).append(row.value)
    assert {len(values) for values in accuracy.values()} == {5}
    for pooling in ("attention", "moment", "mean"):
        values = [
            f"{sum(accuracy[pooling, task]) / 5:.3f}"
            for task in ("genre_order", "rating_order", "story_order", "review_shift")
        ]
        assert f"in {', '.join(values[:3])} and {values[3]}" in claims()[1], pooling


def test_the_share_of_position_bound_latents_equals_the_rows():
    shares = [
        row.value
        for study in STUDIES
        for row in read_rows(RESULTS / study / "results.csv.zst")
        if (row.metric, row.cell) == ("position_bound_share", "open")
    ]
    assert (f"{min(shares):.2f}", f"{max(shares):.2f}") == ("0.18", "0.58")
    assert all("0.18 to 0.58 of the latents" in text for text in claims())


def test_the_time_of_the_main_run_is_given_with_its_cpu():
    (sentence,) = re.findall(r"Once set up, on [^.]*\.", claims()[0])[:1]
    assert "AMD EPYC with AVX2" in sentence
