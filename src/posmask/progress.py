"""Progress on standard error: one line for a whole study, one bar for the current stage.

On a terminal they are bars. In a log file a stage prints a line every ten seconds and one at its end, if it takes
longer than two seconds, and the study prints a line after each part. Time left is shown after ten seconds of data.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

__all__ = [
    "Show",
    "announce",
    "duration",
    "no_progress",
    "part_finished",
    "progress_bar",
    "progress_bars",
    "shown_by",
    "study_progress",
]

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 10.0
_TIME_LEFT_SECONDS = 10.0

Show = Callable[[str, int, str, int], None]
"""Takes the label of a stage, its total, the unit of both numbers, and the number of units done."""

_shown_by: ContextVar[Show | None] = ContextVar("_shown_by", default=None)
_advance_study: ContextVar[Callable[[str], None]] = ContextVar("_advance_study", default=lambda part: None)
_silent = False  # No ContextVar: threads announce too.


def duration(seconds: float) -> str:
    """Format seconds for people.

    >>> duration(75), duration(7500)
    ('1 min 15 s', '2 h 05 min')
    """
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def announce(text: str) -> None:
    """Print a line about the current work on standard error, such as the start of a step without a count."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def no_progress() -> Iterator[None]:
    """Show neither bars nor announcements within the block, in any thread."""
    global _silent
    before, _silent = _silent, True
    try:
        with shown_by(_ignore):
            yield
    finally:
        _silent = before


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Let `show` display the bars within the block, for example by sending them to another process."""
    token = _shown_by.set(show)
    try:
        yield
    finally:
        _shown_by.reset(token)


def _ignore(label: str, total: int, unit: str, done: int) -> None:
    pass


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds finished units to a bar. A bar within another bar is not shown."""
    done = 0
    with progress_bars() as show, shown_by(_ignore):

        def advance(n: int) -> None:
            nonlocal done
            done += n
            show(label, total, unit, done)

        show(label, total, unit, 0)
        yield advance


@contextmanager
def progress_bars() -> Iterator[Show]:
    """Yield a function that displays several stages at a time, below the line of the study if there is one."""
    show = _shown_by.get()
    if show is not None:
        yield show
        return
    with _display() as display:
        yield display.show_stage


@contextmanager
def study_progress(
    name: str, cells: Collection[str], done: Collection[str], costs: Mapping[str, float]
) -> Iterator[None]:
    """Show a line for a study within the block, with its stages below it; `part_finished` advances it.

    The time left is the predicted cost of what remains, times the elapsed time per predicted cost so far.

    Args:
        name: name of the study.
        cells: labels of all cells with each seed, and of the baselines.
        done: those that were finished before this run.
        costs: predicted cost of each part that is not finished: cells, and other parts such as the harvest. Only their
            ratios matter.
    """
    if _shown_by.get() is not None:
        yield
        return
    finished, total = set(done), sum(costs.values())
    with _display() as display, shown_by(display.show_stage):

        def show() -> None:
            spent = sum(cost for part, cost in costs.items() if part in finished)
            display.show_study(name, len(finished & set(cells)), len(cells), spent, total)

        def advance(part: str) -> None:
            if part not in finished:
                finished.add(part)
                show()

        show()
        token = _advance_study.set(advance)
        try:
            yield
        finally:
            _advance_study.reset(token)


def part_finished(part: str) -> None:
    """Count a part as finished in the line of the study: a cell by its label, or another part of its costs."""
    _advance_study.get()(part)


class _Display(Protocol):
    def show_stage(self, label: str, total: int, unit: str, done: int) -> None: ...

    def show_study(self, name: str, n_done: int, n_cells: int, spent: float, total: float) -> None: ...


@contextmanager
def _display() -> Iterator[_Display]:
    console = Console(stderr=True)
    if console.is_terminal:
        # On a terminal, lines on stdout scroll above the bars; in a pipe they must not end up on stderr.
        progress = Progress(*_columns(), console=console, redirect_stdout=sys.stdout.isatty())
        with progress:
            yield _Bars(progress)
    else:
        log = _Log()
        yield log
        log.end()


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description:<34}"), BarColumn(bar_width=None), _Count(), _Rate(), _TimeLeft()


class _Bars:
    """Display of a terminal. Bars of finished stages disappear below a study, which has many."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._study: TaskID | None = None

    def show_stage(self, label: str, total: int, unit: str, done: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total, unit=unit, before=done)
        self._progress.update(self._tasks[label], completed=done)
        if done >= total and self._study is not None:
            self._progress.remove_task(self._tasks.pop(label))

    def show_study(self, name: str, n_done: int, n_cells: int, spent: float, total: float) -> None:
        if self._study is None:
            self._study = self._progress.add_task(name, total=total, unit=_CELLS, before=0.0, cells="")
        self._progress.update(self._study, completed=spent, cells=f"{n_done}/{n_cells}")


_CELLS = "cells"
"""Unit of the line of a study, whose bar shows predicted costs."""


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("cells") or f"{int(task.completed):,}/{int(task.total or 0):,}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds, unit = task.elapsed or 0.0, task.fields["unit"]
        if unit == _CELLS:
            return Text(f"cells, {duration(seconds)}")
        return Text(_rate(task.completed - task.fields["before"], seconds, unit))


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        before, seconds = task.fields["before"], task.elapsed or 0.0
        return Text(_time_left(task.completed - before, (task.total or 0) - task.completed, seconds))


def _rate(done: float, seconds: float, unit: str) -> str:
    """Units per second, with two digits if they are few; empty before there is one.

    >>> _rate(3, 60, "tokens"), _rate(0, 60, "tokens")
    ('0.050 tokens/s', '')
    """
    if not done or not seconds:
        return ""
    rate = done / seconds
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:#.2g} {unit}/s"


def _time_left(done: float, remaining: float, seconds: float) -> str:
    """Time for what remains at the rate so far; empty before ten seconds of data.

    >>> _time_left(2, 8, 60), _time_left(2, 8, 9)
    ('4 min 00 s left', '')
    """
    if not done or remaining <= 0 or seconds < _TIME_LEFT_SECONDS:
        return ""
    return f"{duration(remaining * seconds / done)} left"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


class _Log:
    """Display of a log file: lines of stages, and one line per finished part of a study."""

    def __init__(self) -> None:
        self._stages: dict[str, _StageLines] = {}
        self._started = time.monotonic()
        self._study_shown = False

    def show_stage(self, label: str, total: int, unit: str, done: int) -> None:
        if done == 0 or label not in self._stages:
            self._stages[label] = _StageLines(label, total, unit)
        self._stages[label].show(done)

    def show_study(self, name: str, n_done: int, n_cells: int, spent: float, total: float) -> None:
        if not self._study_shown:
            self._study_shown = True
            return
        seconds = time.monotonic() - self._started
        left = _time_left(spent, total - spent, seconds)
        done = f"{name}: {n_done} of {n_cells} cells done"
        announce(_joined(done, f"{duration(seconds)} elapsed", left and f"about {left}"))

    def end(self) -> None:
        for stage in self._stages.values():
            stage.end()


class _StageLines:
    """Lines of one stage in a log file."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._started = self._last = time.monotonic()
        self._done = 0
        self._ended = False

    def show(self, done: int) -> None:
        self._done = done
        now = time.monotonic()
        if done >= self._total:
            self.end()
        elif done and now - self._last >= _LINE_SECONDS:
            self._last = now
            seconds = now - self._started
            rate, left = _rate(done, seconds, self._unit), _time_left(done, self._total - done, seconds)
            announce(f"{self._label}: {_joined(f'{done:,} of {self._total:,} {self._unit}', rate, left)}")

    def end(self) -> None:
        seconds = time.monotonic() - self._started
        if not self._ended and seconds >= _QUIET_SECONDS:
            amount = f"{self._done:,} {self._unit} in {duration(seconds)}"
            announce(f"{self._label}: {_joined(amount, _rate(self._done, seconds, self._unit))}")
        self._ended = True
