"""One progress bar for everything that takes longer than two seconds: rate and time left, on standard error.

In a terminal it is a bar; in a log file it is one line every ten seconds and one at the end.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Show", "announce", "duration", "progress_bar", "progress_bars", "shown_by"]

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 10.0


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(75), duration(7500)
    ('1 min 15 s', '2 h 05 min')
    """
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def announce(text: str) -> None:
    """Say what begins now and has no steps to count, on standard error."""
    print(text, file=sys.stderr, flush=True)


Show = Callable[[str, int, str, int], None]
"""Takes of a piece of work: its label, its total, the unit of both, how much of it is done."""

_shown_by: ContextVar[Show | None] = ContextVar("_shown_by", default=None)


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes how many more units are done. Within another bar nothing is shown."""
    show, done = _shown_by.get(), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        assert show is not None
        show(label, total, unit, done)

    with nullcontext(show) if show is not None else progress_bars() as show, shown_by(_not_at_all):
        show(label, total, unit, 0)
        yield advance


def _not_at_all(label: str, total: int, unit: str, done: int) -> None:
    pass


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Within the block bars are shown by this function, such as one that tells another process."""
    token = _shown_by.set(show)
    try:
        yield
    finally:
        _shown_by.reset(token)


@contextmanager
def progress_bars() -> Iterator[Show]:
    """Yield a function that shows how far each of several pieces of work is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        lines: dict[str, _Lines] = {}
        yield lambda label, total, unit, done: lines.setdefault(label, _Lines(label, total, unit)).show(done)
        for line in lines.values():
            line.end()
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=10) as progress:
        tasks: dict[str, TaskID] = {}

        def show(label: str, total: int, unit: str, done: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total, unit=unit)
            progress.update(tasks[label], completed=done)

        yield show


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {task.fields['unit']}/s")


class _Lines:
    """One piece of work in a log file."""

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
            rate = done / (now - self._started)
            self._say(
                f"{done:,} of {self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s, "
                f"{duration((self._total - done) / rate)} left"
            )

    def end(self) -> None:
        seconds = time.monotonic() - self._started
        if not self._ended and seconds >= _QUIET_SECONDS:
            self._say(f"{self._done:,} {self._unit} in {duration(seconds)}, {self._done / seconds:,.0f} {self._unit}/s")
        self._ended = True

    def _say(self, text: str) -> None:
        print(f"{self._label}: {text}", file=sys.stderr, flush=True)
