"""Sentences on what a study found, generated from its verdicts."""

from collections.abc import Iterable, Sequence

from posmask.results.comparisons import MIN_SEEDS, Verdict
from posmask.results.rows import CONTROLS
from posmask.results.table import COMPARED, Column, format_number, format_signed

__all__ = ["finding", "headline", "seeds_text"]


def finding(verdicts: Sequence[Verdict], baseline: str | None) -> str:
    """Return the significant differences to the baseline, in one sentence; without enough seeds, that there are none.

    Args:
        verdicts: all verdicts of a study.
        baseline: the cell that the others are compared with; None: the reference of the first verdict.
    """
    reference = baseline if any(verdict.against == baseline for verdict in verdicts) else None
    if reference is None:
        if not verdicts:
            return "Nothing is compared: the study has neither an open cell as baseline nor comparisons."
        reference = verdicts[0].against
    judged = [verdict for verdict in verdicts if verdict.against == reference and not _is_control(verdict.label)]
    seeds = seeds_text([verdict.n_seeds for verdict in judged])
    if all(verdict.n_seeds < MIN_SEEDS for verdict in judged):
        return f"With {seeds} no difference to {reference} can be established: comparisons need {MIN_SEEDS} seeds."
    n = judged[0].n_comparisons
    start = f"Compared with {reference} ({seeds}, corrected for {n} comparison{'s' * (n > 1)}), "
    clauses = [
        clause
        for column in COMPARED.values()
        for clause in _clauses(column, [verdict for verdict in judged if verdict.column == column.name])
    ]
    few = list(dict.fromkeys(verdict.label for verdict in judged if verdict.n_seeds < MIN_SEEDS))
    end = f"; {', '.join(few)}: fewer than {MIN_SEEDS} seeds" if few else ""
    if not clauses:
        return f"{start}no difference is significant{end}."
    return f"{start}{'; '.join(clauses)}; no other difference is significant{end}."


def headline(verdicts: Sequence[Verdict], baseline: str | None) -> list[str]:
    """Return the sentences at the head of the page: hypotheses, what training added to masks, the largest differences.

    Hypotheses that did not come out as expected are named. Cells with a mask are compared with the unmasked SAE's codes
    pooled by it (`matched`). Of each kind of rows and each metric the largest significant difference is named.
    Accuracies are of probes on 5 latents.

    Args:
        verdicts: all verdicts of a study.
        baseline: as in `finding`.
    """
    judged = [verdict for verdict in verdicts if verdict.against == baseline and not _is_control(verdict.label)]
    if not any(verdict.n_seeds >= MIN_SEEDS for verdict in judged):
        return [finding(verdicts, baseline)]
    sentences = [_of_hypotheses(verdicts), _of_training(verdicts)]
    n_seeds = seeds_text([verdict.n_seeds for verdict in judged])
    cells = [verdict for verdict in judged if " + " not in verdict.label]
    pooled = [verdict for verdict in judged if " + " in verdict.label]
    clauses = [_differing("SAEs", cells), _differing("other poolings of codes", pooled)]
    if any(clauses):
        sentences.append(f"Compared with {baseline} ({n_seeds}), {'; '.join(filter(None, clauses))}.")
    return [sentence for sentence in sentences if sentence]


def _of_hypotheses(verdicts: Sequence[Verdict]) -> str:
    """How many hypotheses came out as expected, and what became of the others; empty if the study states none."""
    stated = sorted((verdict for verdict in verdicts if verdict.hypothesis), key=lambda verdict: verdict.hypothesis)
    if not stated:
        return ""
    others = [
        f"{verdict.label} against {verdict.against} is {verdict.verdict} in {_name(verdict.column)} where "
        f"{verdict.expected} was expected ({format_signed(verdict.effect)}, {_interval(verdict)})"
        for verdict in stated
        if verdict.verdict != verdict.expected
    ]
    n_expected = len(stated) - len(others)
    count = f"{n_expected} of {len(stated)} hypothes{'es' if len(stated) > 1 else 'is'} stated beforehand"
    return "; ".join([f"{count} came out as expected", *others]) + "."


def _differing(which: str, verdicts: Sequence[Verdict]) -> str:
    """The largest significant differences, and the metrics without any; empty without the metrics of the headline."""
    named = _largest(verdicts)
    others = [name for name in _HEADLINE if _of_column(verdicts, name) and not _of_column(named, name)]
    same = f"significantly in {_joined(map(_name, others))}" if others else ""
    if not named:
        return f"{which} do not differ {same}" if same else ""
    return f"{which} differ by up to {_joined([*map(_effect, named), *([f'not {same}'] if same else [])])}"


def _of_training(verdicts: Sequence[Verdict]) -> str:
    """What training added to the masks, in one sentence; empty if no cell has a control."""
    own = [verdict for verdict in verdicts if verdict.against == f"{verdict.label} + matched"]
    largest = [max(of_column, key=_gain) for name in _OF_TRAINING if (of_column := _of_column(own, name))]
    if not largest:
        return ""
    shown = [verdict for verdict in largest if verdict.verdict == "better"]
    unshown = [verdict for verdict in largest if verdict.verdict != "better"]
    what = "pooling the unmasked SAE's codes by the same mask"
    if not shown:
        gains = "gains are" if len(unshown) > 1 else "gain is"
        effects = _joined(map(_effect, unshown))
        return f"Training with a mask is not shown to improve on {what}: the largest {gains} {effects}."
    rest = f"; the largest other gain, {_effect(unshown[0])}, is not significant" if unshown else ""
    return f"Training with a mask improves on {what}: {_joined(map(_effect, shown))}{rest}."


_HEADLINE = ("block k=5", "local k=5", "probing k=5", "explained_variance")
_OF_TRAINING = ("block k=5", "local k=5")


def _of_column(verdicts: Sequence[Verdict], name: str) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.column == name]


def _gain(verdict: Verdict) -> tuple[bool, float]:
    return verdict.verdict == "better", verdict.effect


def _largest(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The largest significant difference upwards and downwards in each metric of the headline."""
    return [
        max(of_kind, key=lambda verdict: abs(verdict.effect))
        for name in _HEADLINE
        for kind in ("better", "worse")
        if (of_kind := [verdict for verdict in _of_column(verdicts, name) if verdict.verdict == kind])
    ]


def _name(column: str) -> str:
    return COMPARED[column].group if COMPARED[column].is_probing else COMPARED[column].title


def _effect(verdict: Verdict) -> str:
    return f"{format_signed(verdict.effect)} in {_name(verdict.column)} ({verdict.label}, {_interval(verdict)})"


def _interval(verdict: Verdict) -> str:
    return f"95 % CI [{format_number(verdict.ci_low)}, {format_number(verdict.ci_high)}]"


def _joined(parts: Iterable[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _is_control(label: str) -> bool:
    return label.partition(" + ")[2] in CONTROLS


def seeds_text(n_seeds: Sequence[int]) -> str:
    """Return the number of seeds of several comparisons.

    >>> seeds_text([1, 1]), seeds_text([3, 5, 3])
    ('1 seed', '3 to 5 seeds')
    """
    least, most = min(n_seeds), max(n_seeds)
    return f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds"


def _clauses(column: Column, verdicts: Sequence[Verdict]) -> list[str]:
    """The cells that are significantly higher, and those that are lower."""
    name = column.full_title.replace(", ", " at ")
    clauses = []
    for kind, word in (("better", "higher"), ("worse", "lower")):
        of_kind = [verdict for verdict in verdicts if verdict.verdict == kind]
        if of_kind:
            largest = max(of_kind, key=lambda verdict: abs(verdict.effect))
            interval = f"[{format_number(largest.ci_low)}, {format_number(largest.ci_high)}]"
            effect = f"{largest.label} ({format_signed(largest.effect)}, 95 % CI {interval})"
            many = f"{len(of_kind)} rows, most in " if len(of_kind) > 1 else ""
            clauses.append(f"{name} is {word} in {many}{effect}")
    return clauses
