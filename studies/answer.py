"""docs/results/*/results.csv.zst and verdicts.csv -> the tables of docs/results/README.md: `python studies/answer.py`.

A `results.csv` that was copied from a run is compressed first; `summary.csv` is written from the full table. The text
between `<!-- name -->` and `<!-- end of name -->` is generated; a test checks that it is current. `python
studies/answer.py RUN NAME` also keeps latents of the run folder RUN in docs/results/NAME/, for its page.
"""

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import altair as alt
import zstandard

from posmask.report import figures, keep_latents
from posmask.results.comparisons import Verdict, read_verdicts
from posmask.results.rows import Row, parse_slice, read_rows, write_rows
from posmask.results.table import COMPARED, PRINTED, Line, format_number, summarize

ROOT = Path(__file__).parents[1] / "docs" / "results"
PAGE = ROOT / "README.md"
README = Path(__file__).parents[1] / "README.md"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
N_LATENTS = 80

CONTROLLED = {
    "windows": "windows: trained with its mask",
    "windows + zero-step": "the same mask, not trained",
    "slice": "slice: trained with its mask",
    "slice + matched": "the same mask, not trained",
    "open + segments8": "open, pooled by 8 segments",
    "open + moment": "open, mean and first moment",
    "open + parts3": "open, thirds of the text",
}
"""What the picture of the controls shows, and how it is called there."""
COMPARED_IN = {
    "explained_variance": "explained variance",
    "block k=5": "block order, k = 5",
    "local k=5": "local order, k = 5",
    "probing k=5": "standard probing, k = 5",
}
"""The columns of that picture."""

SHORT = {
    "open": "`open`: no mask",
    "slice": "`slice`: each latent is open in one eighth of the context",
    "windows": "`windows`: copies of each latent, each open in a window of its own",
    "windows + matched": "`open` pooled by the windows of that mask, without training",
    "open + moment": "`open`, mean and first moment of its codes",
}
"""Rows of the README's table."""

LOG_ROWS = (
    ("Run 0, no mask", "0.5 everywhere", "open"),
    ("Run 1, hard: about 16 random positions of 128 per latent", "0.5 everywhere", "hard"),
    ("Run 2, soft: learned, from openness 0.1 to 0.2", "nothing", "soft-low"),
    ("Run 3, soft: learned, from openness 0.3 to 0.7", "0.5 everywhere", "soft-high"),
    ("Run 4, importance of positions from gradients", "announced", "importance"),
    ("static slicing", "announced", "slice"),
    ("static slicing after the fact: `open` pooled by 8 segments", "–", "open + segments8-mean"),
    ("masked gradient updates alone, slices", "announced", "slice-gradient"),
    ("masked gradient updates alone, hard", "announced", "hard-gradient"),
)
"""The table of the research log that the study repeats: name of the row, reported value, corresponding cell."""

STRICTNESS = {
    "leak of 16 random positions": (
        ("0", "hard"),
        ("0.01", "leak-0.01"),
        ("0.03", "leak-0.03"),
        ("0.1", "leak-0.1"),
        ("0.3", "leak-0.3"),
        ("1", "open"),
    ),
    "random positions per latent": (
        ("8", "positions-8"),
        ("16", "hard"),
        ("32", "positions-32"),
        ("64", "positions-64"),
        ("128", "open"),
    ),
    "last temperature of a soft mask under pressure": (
        ("1", "temperature-1"),
        ("0.1", "temperature-0.1"),
        ("0.01", "temperature-0.01"),
    ),
    "gradient only, positions": (("16", "hard-gradient"), ("64", "gradient-64"), ("128", "open")),
}
KEY = ("slice", "windows", "windows-free", "halves", "split", "split-tied", "split-width")
VERDICT_COLUMNS = {
    "explained_variance": COMPARED["explained_variance"].full_title,
    "order k=1": "order probing of both kinds, k = 1",
    "order k=5": "order probing of both kinds, k = 5",
    "probing k=1": COMPARED["probing k=1"].full_title,
    "probing k=5": COMPARED["probing k=5"].full_title,
}
"""Columns of the published comparisons, which were made before order was reported as block and local order."""
HEAD = tuple(column.full_title for column in PRINTED)


def _numbers(line: Line) -> list[str]:
    return [
        format_number(line.numbers[column.name] if line.printed(column) else math.nan, column.digits)
        for column in PRINTED
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def cells(lines: list[Line]) -> str:
    """Return the table of all cells."""
    rows = [[line.label, line.budget, str(line.n_seeds), *_numbers(line)] for line in lines]
    return _table(["cell", "budget", "seeds", *HEAD], rows)


def short(lines: list[Line]) -> str:
    """Return the README's table: what was tried, and the columns of the picture."""
    by_label = {line.label: line for line in lines}
    rows = [
        [what, *(format_number(_of(by_label[label], by_label, name)) for name in COMPARED_IN)]
        for label, what in SHORT.items()
    ]
    return _table(["", *COMPARED_IN.values()], rows)


def _of(line: Line, by_label: dict[str, Line], column: str) -> float:
    """A number of a line; other poolings are not made in standard probing, where their cell has the mean."""
    value = line.numbers[column]
    return by_label[line.label.partition(" + ")[0]].numbers[column] if math.isnan(value) else value


def log(lines: list[Line]) -> str:
    """Return the table of the research log with the study's numbers."""
    by_label = {line.label: line for line in lines}
    rows = [[what, reported, cell, *_numbers(by_label[cell])] for what, reported, cell in LOG_ROWS]
    return _table(["row of the research log", "reported there", "cell", *HEAD], rows)


def strictness(lines: list[Line]) -> str:
    """Return the table of families of cells from strict to open."""
    by_label = {line.label: line for line in lines}
    rows = [
        [name, value, *_numbers(by_label[cell]), format_number(by_label[cell].overall["strictness"])]
        for name, points in STRICTNESS.items()
        for value, cell in points
        if cell in by_label  # a study may be finished in parts
    ]
    return _table(["what is varied", "value", *HEAD, "strictness"], rows)


def verdicts(judged: list[Verdict]) -> str:
    """Return a line per comparison that the conclusions rest on, with the difference and interval of every column."""
    columns = VERDICT_COLUMNS
    if not any(verdict.column in columns and verdict.column.startswith("order") for verdict in judged):
        columns = {name: column.full_title for name, column in COMPARED.items() if name != "ce_recovered"}
    pairs = dict.fromkeys((verdict.label, verdict.against) for verdict in judged)
    by_key = {(verdict.label, verdict.against, verdict.column): verdict for verdict in judged}
    rows = []
    for label, against in pairs:
        if columns is VERDICT_COLUMNS and against == "open" and label not in (*KEY, "open + segments8-mean"):
            continue
        line = [by_key.get((label, against, name)) for name in columns]
        n_seeds = next(verdict.n_seeds for verdict in line if verdict is not None)
        texts = ["–" if verdict is None else _verdict_text(verdict) for verdict in line]
        rows.append([f"{label} against {against}", str(n_seeds), *texts])
    return _table(["comparison", "seeds", *columns.values()], rows)


def hypotheses(judged: list[Verdict]) -> str:
    """Return the table of a study's hypotheses in their order: what was expected, and what came out."""
    rows = [
        [
            str(verdict.hypothesis),
            f"{verdict.label} against {verdict.against}",
            COMPARED[verdict.column].full_title,
            verdict.expected,
            _verdict_text(verdict).removesuffix(f" {verdict.verdict}**").removeprefix("**"),
            verdict.verdict,
        ]
        for verdict in sorted(judged, key=lambda verdict: verdict.hypothesis)
        if verdict.hypothesis
    ]
    return _table(["", "comparison", "in", "expected", "difference (95 % interval)", "found"], rows)


def _verdict_text(verdict: Verdict) -> str:
    effect, low, high = (format_number(value) for value in (verdict.effect, verdict.ci_low, verdict.ci_high))
    text = f"{effect} ({low} to {high})"
    return text if verdict.verdict == "undecided" else f"**{text} {verdict.verdict}**"


def pack(folder: Path) -> None:
    """Replace `results.csv` by `results.csv.zst`."""
    plain = folder / "results.csv"
    packed = zstandard.ZstdCompressor(level=19).compress(plain.read_bytes())
    (folder / "results.csv.zst").write_bytes(packed)
    plain.unlink()


def summary_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of whole cells and of their controls, and mean accuracies over tasks and datasets.

    The means are per cell, seed, k and pooling; their `n` is the number of tasks or datasets.
    """
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        where = parse_slice(row.slice)
        if where.keys() <= {"control"}:
            groups[row.cell, row.seed, row.metric, row.slice] = [row]
        elif row.metric in ("order_accuracy", "probe_accuracy") and "class" not in where:
            about = f"about={where['about']};" if "about" in where else ""
            slice = f"{about}k={where['k']};pooling={where['pooling']}"
            groups.setdefault((row.cell, row.seed, row.metric, slice), []).append(row)
    return [
        replace(group[0], slice=slice, value=_mean(group), ci_low=math.nan, ci_high=math.nan, n=len(group))
        if "k=" in slice
        else group[0]
        for (_, _, _, slice), group in groups.items()
    ]


def _mean(rows: list[Row]) -> float:
    return sum(row.value for row in rows) / len(rows)


def folders() -> list[Path]:
    """Return the folders with results."""
    return sorted(path.parent for path in ROOT.glob("*/results.csv.zst"))


def page(text: str) -> str:
    """Return the page with its tables regenerated."""
    for folder in folders():
        lines = summarize(read_rows(folder / "results.csv.zst"))
        tables = {"cells": cells(lines), "verdicts": verdicts(read_verdicts(folder / "verdicts.csv"))}
        if folder.name == "full":
            tables |= {"log": log(lines), "strictness": strictness(lines)}
        if folder.name == "confirm":
            judged = read_verdicts(folder / "verdicts.csv")
            tables |= {"short": short(lines), "hypotheses": hypotheses(judged)}
        for name, table in tables.items():
            mark = f"{folder.name} {name}"
            inside = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
            text = re.sub(inside, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


def controls() -> None:
    """Write the figure of the differences to `open` of masks, the same masks without training, and poolings."""
    shown = [
        {
            "row": number,
            "what": what,
            "column": title,
            **dict(zip(("effect", "low", "high"), _numbers_of(verdict), strict=True)),
        }
        for number, (label, what) in enumerate(CONTROLLED.items())
        for column, title in COMPARED_IN.items()
        for verdict in read_verdicts(ROOT / "confirm" / "verdicts.csv")
        if (verdict.label, verdict.against, verdict.column) == (label, "open", column)
    ]
    names = alt.Y("row:O", scale=alt.Scale(domain=list(range(len(CONTROLLED)))), title=None, axis=None)
    base = alt.Chart(alt.Data(values=shown))
    color = alt.condition(
        "indexof(datum.what, 'trained with') >= 0", alt.value(figures.COLORS[0]), alt.value("#555555")
    )
    zero = base.mark_rule(color="#BBBBBB").encode(x=alt.datum(0))
    interval = base.mark_rule(strokeWidth=2).encode(y=names, x="low:Q", x2="high:Q", color=color)
    point = base.mark_point(filled=True, size=50, opacity=1).encode(y=names, x="effect:Q", color=color)
    labels = base.transform_filter(alt.datum.column == COMPARED_IN["block k=5"]).mark_text(align="left", x=0)
    columns = [
        alt.layer(zero, interval, point)
        .transform_filter(alt.datum.column == title)
        .encode(x=alt.X(title="difference to open", axis=alt.Axis(tickCount=3, format="+.2f", grid=False)))
        .properties(width=150, height=170, title=alt.Title(title, fontSize=12, fontWeight="normal"))
        for title in COMPARED_IN.values()
    ]
    named = labels.encode(y=names, text="what:N").properties(width=170, height=170)
    alt.hconcat(named, *columns, spacing=14).configure_view(stroke=None).save(IMAGES / "controls.png", scale_factor=1.3)


def _numbers_of(verdict: Verdict) -> tuple[float, float, float]:
    return verdict.effect, verdict.ci_low, verdict.ci_high


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep_latents(Path(sys.argv[1]), ROOT / sys.argv[2], N_LATENTS)
    for path in ROOT.glob("*/results.csv"):
        pack(path.parent)
    for folder in folders():
        write_rows(folder / "summary.csv", summary_rows(read_rows(folder / "results.csv.zst")))
    controls()
    for path in (PAGE, README):
        path.write_text(page(path.read_text(encoding="utf8")), encoding="utf8")
