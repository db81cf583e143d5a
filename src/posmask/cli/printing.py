"""What the command line prints: tables that fit 80 columns, without color, in a log file as well."""

import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from posmask.progress import duration
from posmask.results.comparisons import MIN_SEEDS, read_verdicts
from posmask.results.table import PRINTED, Line, format_number

if TYPE_CHECKING:
    from posmask.study import estimate
    from posmask.study.cell import CellState

__all__ = [
    "console",
    "peak_gigabytes",
    "print_plan",
    "results_table",
    "slurm_line",
    "status_table",
    "verdict_line",
]

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


def verdict_line(path: Path) -> str:
    """How many of a study's comparisons are decided; `path` is its verdicts.csv."""
    verdicts = read_verdicts(path)
    if not verdicts:
        return "Verdicts: none, as the study has no open cell to compare with and asks no questions."
    count = Counter(verdict.verdict for verdict in verdicts)
    seeds = min(verdict.n_seeds for verdict in verdicts)
    needed = f" (a verdict needs {MIN_SEEDS} seeds, here {'is' if seeds == 1 else 'are'} {seeds})"
    return (
        f"Verdicts: {count['better']} better, {count['worse']} worse, {count['no evidence']} no evidence"
        f"{needed if seeds < MIN_SEEDS else ''}; differences with intervals in verdicts.csv and on the page."
    )


def peak_gigabytes() -> float:
    """The most memory that this process, or any that it started, had."""
    import resource

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def status_table(states: list[tuple[str, "CellState"]]) -> Table:
    """A line a cell, its seeds under what they are."""
    every = ("finished", "missing", "other settings", "damaged")
    kinds = [kind for kind in every if any(state == kind for _, state in states)]
    seeds: dict[str, dict[str, list[str]]] = {}
    for label, state in states:
        name, _, seed = label.rpartition("-seed")
        seeds.setdefault(name or label, {}).setdefault(state, []).append(f"seed {seed}" if name else "yes")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    for kind in kinds:
        table.add_column(kind, overflow="fold")
    for name, found in seeds.items():
        table.add_row(name, *(", ".join(found.get(kind, [])).replace(", seed ", ", ") for kind in kinds))
    return table


def _plan_tables(plan: "estimate.Plan") -> list[Table]:
    """What is harvested, and what each cell takes."""
    harvest = _columns("harvest", "tokens", "time")
    for line in plan.lines:
        if line.stage == "harvest":
            harvest.add_row(line.what, *_tokens_and_time(line))
    cells = _columns("cell", "trained on,\ntokens", "\ntime", "encoded,\ntokens", "\ntime")
    for line in plan.lines:
        if line.stage == "baselines":
            cells.add_row(line.what, "", "", *_tokens_and_time(line))
    trained = {line.what: line for line in plan.lines if line.stage == "training"}
    asked = {line.what: line for line in plan.lines if line.stage == "evaluation"}
    for name, line in trained.items():
        cells.add_row(name, *_tokens_and_time(line), *_tokens_and_time(asked[name]))
    return [harvest, cells]


def _columns(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True, vertical="bottom")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _tokens_and_time(line: "estimate.Line") -> tuple[str, str]:
    return (f"{line.tokens:,}", duration(line.seconds)) if line.tokens or line.seconds else ("", "finished")


def print_plan(plan: "estimate.Plan", root: Path, gpu: str | None) -> None:
    """Print a plan: what is finished and the total, then the tables, then disk, memory and assumptions.

    Args:
        gpu: the name of the GPU that the plan is for; None: this machine.
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
    stages = ", ".join(
        f"{stage} {duration(plan.seconds(stage))}" for stage in ("harvest", "baselines", "training", "evaluation")
    )
    hours = "" if gpu is None else f" That is {plan.seconds() / 3600:.1f} GPU hours, the host's work included."
    return f"In all {duration(plan.seconds())} on {where}: {stages}.{hours}"


def slurm_line(study_file: Path) -> str:
    """How Slurm starts the processes that train a cell together, see docs/cluster.md."""
    return (
        "srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint "
        f'"$HOSTNAME:29500" -m posmask.cli train-distributed {study_file} CELL --by data'
    )
