"""One sentence on what a study found, generated from its verdicts."""

from collections.abc import Sequence

from posmask.results.comparisons import MIN_SEEDS, Verdict
from posmask.results.rows import CONTROLS
from posmask.results.table import COMPARED, Column, format_number, format_signed

__all__ = ["against_controls", "finding", "seeds_text"]


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


def against_controls(verdicts: Sequence[Verdict]) -> str:
    """Return what training added to the masks of a study, in one sentence; empty if no cell has a control.

    Cells are compared with the unmasked SAE's codes pooled by their mask, in block and local order at k = 5.
    """
    clauses = []
    for label in dict.fromkeys(
        verdict.label for verdict in verdicts if verdict.against == f"{verdict.label} + matched"
    ):
        numbers = [
            f"{format_signed(verdict.effect)} in {COMPARED[verdict.column].group} (95 % CI "
            f"[{format_number(verdict.ci_low)}, {format_number(verdict.ci_high)}], {verdict.verdict})"
            for verdict in verdicts
            if (verdict.label, verdict.against) == (label, f"{label} + matched") and verdict.column in _OF_CONTROLS
        ]
        if numbers:
            clauses.append(f"{label} {' and '.join(numbers)}")
    start = "Compared with pooling the unmasked SAE by the same mask, without training, at k = 5: "
    return f"{start}{'; '.join(clauses)}." if clauses else ""


def _is_control(label: str) -> bool:
    return label.partition(" + ")[2] in CONTROLS


_OF_CONTROLS = ("block k=5", "local k=5")


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
