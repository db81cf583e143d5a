"""Tables and lines of the command line. They use the columns of the terminal and are readable in a log file."""

import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from posmask.progress import duration
from posmask.results.finding import seeds_text
from posmask.results.table import SHOWN, Column, Line, format_number, format_signed
from posmask.storage import layout

if TYPE_CHECKING:
    from posmask.results.comparisons import Verdict
    from posmask.study import estimate
    from posmask.study.targets import CellState

__all__ = [
    "audit_table",
    "console",
    "cost_line",
    "duration_line",
    "lacking_outputs",
    "plan_values",
    "print_plan",
    "print_wrapped",
    "results_table",
    "slurm_line",
    "status_table",
    "table_note",
    "watched",
]

_STAGES = ("harvest", "baselines", "training", "evaluation")
console = Console()


def results_table(
    lines: Sequence[Line], baseline: str | None = None, verdicts: Sequence["Verdict"] = (), width: int | None = None
) -> Table:
    """Return the table of a study: baselines above a rule, then cells with their differences to the baseline.

    Wide tables show value and difference, medium ones the difference, narrow ones the difference above its interval.
    Columns that do not fit even so are left out, from the right.

    Args:
        lines: of the study's table; poolings of cells other than the baseline are left out.
        baseline: the cell that the others are compared with.
        verdicts: the differences; cells without any show values.
        width: columns of the terminal; None: those of `console`.
    """
    width = console.width if width is None else width
    is_baseline = {line.label: line.mask == "none" or line.label.partition(" + ")[0] == baseline for line in lines}
    differences = {
        (of.label, of.column): of for of in verdicts if of.against == baseline and not is_baseline.get(of.label)
    }
    rows = [line for line in lines if is_baseline[line.label] or line.pooling == "mean"]
    rows.sort(key=lambda line: not is_baseline[line.label])
    longest = max(len(line.label) for line in rows)
    table, columns = Table(), []
    for form, n_columns in (("full", len(SHOWN)), ("line", len(SHOWN)), *(("stacked", n) for n in _DOWN)):
        columns = [_column_texts(rows, column, differences, form) for column in SHOWN[:n_columns]]
        table = Table(box=box.HORIZONTALS, show_edge=False, padding=0, pad_edge=False, header_style="bold")
        table.add_column("\ncell", overflow="fold")
        table.add_column("\nbudget", no_wrap=True)
        for column in SHOWN[:n_columns]:
            table.add_column(column.heading, justify="right", no_wrap=True)
        for line, *texts in zip(rows, *columns, strict=True):
            if table.rows and is_baseline[rows[len(table.rows) - 1].label] and not is_baseline[line.label]:
                table.add_section()
            table.add_row(Text(line.label), line.budget, *texts)
        needed = console.measure(table, options=console.options.update(width=10_000)).maximum
        if needed <= width:
            break
        if form == "stacked" and needed - longest + min(longest, _SHORT_NAME) <= width:
            break  # A long name takes several lines; numbers are never cut.
    if len(columns) < len(SHOWN):
        table.caption = Text(f"{len(SHOWN) - len(columns)} columns do not fit", justify="left")
    return table


_SHORT_NAME = 12
_MARKS = {"better": "*", "worse": "*", "equivalent": "="}
"""Marks after differences, by verdict."""
_DOWN = range(len(SHOWN), 0, -1)


def _column_texts(
    rows: Sequence[Line], column: Column, differences: Mapping[tuple[str, str], "Verdict"], form: str
) -> list[Text]:
    """The entries of a column: values, and differences with half of their 95 % intervals, which are symmetric."""
    mark = any(of.verdict in _MARKS for of in differences.values())
    plus_minus = "+/-" if console.options.ascii_only else "±"
    texts: list[tuple[str, Text | None]] = []
    for line in rows:
        value = format_number(line.numbers[column.name], column.digits) if line.printed(column) else ""
        of = differences.get((line.label, column.name))
        if of is None:
            texts.append((value, None))
            continue
        half = (of.ci_high - of.ci_low) / 2
        star = "" if not mark else _MARKS.get(of.verdict, " ")
        color = {"better": "green", "worse": "red"}.get(of.verdict, "")
        interval = f"{plus_minus}{format_number(half, 4 if half < 0.0005 else 3)}"
        if form == "stacked":
            interval = f"\n{interval}{' ' * len(star)}"  # The digits of both lines are aligned.
        difference = Text.assemble((f"{format_signed(of.effect)}{star}", color), "" if form == "stacked" else " ")
        texts.append((value, difference.append(interval, style="dim")))
    longest = max((len(difference) for _, difference in texts if difference is not None), default=0)
    if form != "full" or not longest:
        end = " " if mark and longest else ""  # the place of the star
        return [Text(f"{value}{end}") if difference is None else difference for value, difference in texts]
    blank = Text(" " * longest)
    padded = ((value, blank if difference is None else difference) for value, difference in texts)
    return [Text.assemble(value, " " * (1 + longest - len(second)), second) for value, second in padded]


def table_note(baseline: str | None, verdicts: Sequence["Verdict"]) -> str:
    """Explain the numbers of `results_table`."""
    note = "Block order, local order and probe: accuracy of probes on k latents (chance 0.5), mean over tasks."
    n_seeds = [verdict.n_seeds for verdict in verdicts if verdict.against == baseline]
    if not n_seeds:
        return note
    over = f"texts and {seeds_text(n_seeds)}" if max(n_seeds) > 1 else "texts only, because there is one seed"
    words = {of.verdict for of in verdicts if of.against == baseline}
    marks = (
        f"{'; * better or worse' if words & {'better', 'worse'} else ''}{'; = equivalent' * ('equivalent' in words)}"
    )
    return (
        f"Below the rule: difference to {baseline} ± half of its 95 % interval over {over}"
        f"{marks}{', after correction' * bool(marks)}. {note}"
    )


def print_wrapped(text: str) -> None:
    """Print a sentence in lines of at most the console's width; in a log file as one line."""
    print(
        textwrap.fill(text, min(console.width, 100), break_long_words=False, break_on_hyphens=False)
        if console.is_terminal
        else text
    )


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
                Text(f"{summary['name']}, mask lifted" if lifted else summary["name"]),
                f"{summary['d_sae']:,}",
                *(f"{shares[name]['count']:,}" for name in classes),
                "" if lifted else f"{summary['explained_variance']['value']:.3f}",
                "" if lifted else f"{summary['l0']['value']:.3g}",
            )
    return table


def cost_line(seconds: float, n_jobs: int) -> str:
    """Report the duration and the peak memory of a run."""
    per_process = " per process" if n_jobs > 1 else ""
    return f"The run took {duration(seconds)} and at most {_peak_gigabytes():.1f} GB of memory{per_process}."


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


def lacking_outputs(root: Path) -> list[str]:
    """The joined results and the page, if they are missing."""
    return [name for name in (layout.RESULTS_FILE, layout.REPORT_FILE) if not (root / name).is_file()]


def watched(read: Callable[[], list[tuple[str, "CellState"]]], root: Path) -> None:
    """Show the states of cells until all are finished and the page is written: a table, or lines in a log file."""
    console_has_lines = not (console.is_interactive and sys.stdout.isatty())
    with nullcontext() if console_has_lines else Live(console=console, auto_refresh=False) as live:
        last = ""
        while True:
            states = read()
            line = _watch_line(states, root)
            if live is not None:
                live.update(Group(status_table(states), Text(line)), refresh=True)
            elif line != last:
                print(line, flush=True)
            last = line
            if all(state == "finished" for _, state in states) and not lacking_outputs(root):
                return
            time.sleep(_WATCH_SECONDS)


_WATCH_SECONDS = 2.0


def _watch_line(states: list[tuple[str, "CellState"]], root: Path) -> str:
    left = [label for label, state in states if state != "finished"]
    begun = [label for label in left if layout.checkpoints_folder(root, label).is_dir()]
    rest = f"; with checkpoints: {', '.join(begun)}" if begun else ""
    if not left and (lacking := lacking_outputs(root)):
        rest = f"; {' and '.join(lacking)} not yet written"
    return f"{len(states) - len(left)} of {len(states)} finished under {root}{rest}"


_TOKENS_COLUMNS = 64
"""Terminals with at least this many columns show the tokens of each cell in a plan."""


def _plan_tables(plan: "estimate.Plan", width: int) -> list[Table]:
    """Return the table of harvests and the table of cells; narrow ones have times only."""
    harvest = _columns("harvest", "tokens", "time")
    for line in plan.lines:
        if line.stage == "harvest":
            harvest.add_row(line.what, *_tokens_and_time(line))
    shown = slice(None) if width >= _TOKENS_COLUMNS else slice(1, None)
    headings = (("trained on,\ntokens", "training,\ntime"), ("encoded,\ntokens", "evaluation,\ntime"))
    cells = _columns("cell", *(heading for pair in headings for heading in pair[shown]))
    for line in plan.lines:
        if line.stage == "baselines":
            cells.add_row(line.what, *("", "")[shown], *_tokens_and_time(line)[shown])
    trained = {line.what: line for line in plan.lines if line.stage == "training"}
    evaluated = {line.what: line for line in plan.lines if line.stage == "evaluation"}
    for name, line in trained.items():
        cells.add_row(name, *_tokens_and_time(line)[shown], *_tokens_and_time(evaluated[name])[shown])
    return [harvest, cells]


def _columns(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column(f"\n{first}" if "\n" in others[0] else first, overflow="fold")
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
    for table in _plan_tables(plan, console.width):
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
