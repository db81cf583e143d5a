"""Tables and lines of the command line. They fit 80 columns and are readable in a log file."""

import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from posmask.progress import duration
from posmask.results.table import PRINTED, Line, format_number
from posmask.storage import layout

if TYPE_CHECKING:
    from posmask.study import estimate
    from posmask.study.targets import CellState

__all__ = [
    "audit_table",
    "console",
    "duration_line",
    "plan_values",
    "print_plan",
    "results_table",
    "run_summary",
    "slurm_line",
    "status_table",
    "verdict_line",
]

_STAGES = ("harvest", "baselines", "training", "evaluation")
console = Console()


def results_table(lines: list[Line]) -> Table:
    """Return the table of a study's numbers, with the columns of `PRINTED`."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")  # A long name takes two lines; numbers are never cut.
    table.add_column("budget", no_wrap=True)
    for column in PRINTED:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for line in lines:
        numbers = (
            format_number(line.numbers[column.name], column.digits) if line.printed(column) else ""
            for column in PRINTED
        )
        table.add_row(line.label, line.budget, *numbers)
    return table


def audit_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of audited SAEs: how many latents are of each class, and how well they reconstruct."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("SAE", overflow="fold")
    classes = list(summaries[0]["classes"]["on"])
    for heading in ("latents", *(name.replace("-", "-\n") for name in classes), "expl.\nvar.", "L0"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        for mask, shares in summary["classes"].items():
            lifted = mask == "lifted"
            table.add_row(
                f"{summary['name']}, mask lifted" if lifted else summary["name"],
                f"{summary['d_sae']:,}",
                *(f"{shares[name]['count']:,}" for name in classes),
                "" if lifted else f"{summary['explained_variance']['value']:.3f}",
                "" if lifted else f"{summary['l0']['value']:.3g}",
            )
    return table


def verdict_line(path: Path) -> str:
    """Count the verdicts of a study's comparisons; `path` is its verdicts.csv."""
    from posmask.results.comparisons import read_verdicts
    from posmask.results.table import MIN_SEEDS

    verdicts = read_verdicts(path)
    if not verdicts:
        return "Verdicts: none, because the study has neither an open cell as baseline nor comparisons."
    count = Counter(verdict.verdict for verdict in verdicts)
    seeds = min(verdict.n_seeds for verdict in verdicts)
    needed = f" (a verdict needs {MIN_SEEDS} seeds, this study has {seeds})"
    return (
        f"Verdicts: {', '.join(f'{count[word]} {word}' for word in ('better', 'worse', 'equivalent', 'undecided'))}"
        f"{needed if seeds < MIN_SEEDS else ''}; differences with intervals in verdicts.csv and on the page."
    )


def run_summary(seconds: float, n_jobs: int) -> str:
    """Explain the columns of the results table and report the peak memory and the duration of the run."""
    per_process = " per process" if n_jobs > 1 else ""
    return (
        "Order and probing: accuracy of probes on k latents (chance 0.5), mean over tasks. "
        f"Peak memory {_peak_gigabytes():.1f} GB{per_process}, {duration(seconds)}."
    )


def _peak_gigabytes() -> float:
    """Peak memory of this process or of any that it started, whichever is higher."""
    import resource

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def status_table(states: list[tuple[str, "CellState"]]) -> Table:
    """Return a table with one row per cell and one column per state, which lists the seeds in that state."""
    all_kinds = ("finished", "trained", "missing", "other settings", "damaged")
    kinds = [kind for kind in all_kinds if any(state == kind for _, state in states)]
    seeds: dict[str, dict[str, list[str]]] = {}
    for label, state in states:
        is_cell = label != layout.BASELINES
        name, seed = layout.parse_cell_label(label) if is_cell else (label, 0)
        seeds.setdefault(name, {}).setdefault(state, []).append(f"seed {seed}" if is_cell else "yes")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    for kind in kinds:
        table.add_column(kind, overflow="fold")
    for name, by_kind in seeds.items():
        table.add_row(name, *(", ".join(by_kind.get(kind, [])).replace(", seed ", ", ") for kind in kinds))
    return table


def _plan_tables(plan: "estimate.Plan") -> list[Table]:
    """Return the table of harvests and the table of cells."""
    harvest = _columns("harvest", "tokens", "time")
    for line in plan.lines:
        if line.stage == "harvest":
            harvest.add_row(line.what, *_tokens_and_time(line))
    cells = _columns("cell", "trained on,\ntokens", "\ntime", "encoded,\ntokens", "\ntime")
    for line in plan.lines:
        if line.stage == "baselines":
            cells.add_row(line.what, "", "", *_tokens_and_time(line))
    trained = {line.what: line for line in plan.lines if line.stage == "training"}
    evaluated = {line.what: line for line in plan.lines if line.stage == "evaluation"}
    for name, line in trained.items():
        cells.add_row(name, *_tokens_and_time(line), *_tokens_and_time(evaluated[name]))
    return [harvest, cells]


def _columns(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True, vertical="bottom")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _tokens_and_time(line: "estimate.Line") -> tuple[str, str]:
    return (f"{line.tokens:,}", duration(line.seconds)) if line.tokens or line.seconds else ("", "finished")


def plan_values(plan: "estimate.Plan") -> dict[str, Any]:
    """Return a plan as values for JSON: seconds in total and per stage, bytes, and one entry per line of the tables."""
    return {
        "seconds": plan.seconds(),
        "stages": {stage: plan.seconds(stage) for stage in _STAGES},
        "finished": plan.n_finished,
        "folders": plan.n_folders,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "lines": [asdict(line) for line in plan.lines],
        "assumptions": list(plan.assumptions),
    }


def print_plan(plan: "estimate.Plan", root: Path, gpu: str | None) -> None:
    """Print a plan: what is finished and the total, then the tables, then disk, memory and assumptions.

    Args:
        gpu: name of the GPU that the plan is for; None for this machine.
    """
    width = min(console.width, 100)
    finished = f"{plan.n_finished} of {plan.n_folders} folders (cells with each seed, and the baselines) are finished"
    if plan.n_finished == plan.n_folders:
        print(textwrap.fill(f"{finished} under {root}: nothing is left to do.", width))
        return
    print(textwrap.fill(_total(plan, gpu), width))
    print(textwrap.fill(f"{finished} under {root}.", width))
    disk, memory = plan.disk_bytes / 1e9, plan.memory_bytes / 1e9
    print(f"Disk: {disk:.1f} GB to write. Memory: about {memory:.1f} GB at the peak.\n")
    for table in _plan_tables(plan):
        console.print(table)
        console.print()
    for assumption in plan.assumptions:
        print(textwrap.fill(f"- {assumption}", width, subsequent_indent="  "))


def _total(plan: "estimate.Plan", gpu: str | None) -> str:
    import torch

    threads = torch.get_num_threads()
    where = f"this machine ({threads} thread{'s' * (threads > 1)})"
    if gpu is not None:
        where = f"one {gpu}, with a host like {where}"
    stages = ", ".join(f"{stage} {duration(plan.seconds(stage))}" for stage in _STAGES)
    hours = "" if gpu is None else f" That is {plan.seconds() / 3600:.1f} GPU hours, the host's work included."
    return f"In all {duration(plan.seconds())} on {where}: {stages}.{hours}"


def duration_line(plan: "estimate.Plan") -> str:
    """Return the predicted duration of a run, in total and by stage."""
    stages = ", ".join(f"{stage} {duration(plan.seconds(stage))}" for stage in _STAGES if plan.seconds(stage))
    return f"Estimated time: {duration(plan.seconds())} ({stages}); `posmask plan` shows the details."


def slurm_line(study_file: Path) -> str:
    """Return the Slurm command that trains one cell in several processes; see docs/cluster.md."""
    return (
        "srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint "
        f'"$HOSTNAME:29500" -m posmask.cli train-distributed {study_file} CELL --by data'
    )
