"""One progress bar for everything that takes longer than two seconds: rate and time left, on standard error.

In a terminal it is a bar; in a log file it is one line every ten seconds and one at the end.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["announce", "duration", "progress_bar"]

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


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {self._unit}/s")


_shows_one: ContextVar[bool] = ContextVar("_shows_one", default=False)


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes how many more units are done. Within another bar nothing is shown."""
    if _shows_one.get():
        yield lambda n: None
        return
    token = _shows_one.set(True)
    try:
        with _bar(label, total, unit) as advance:
            yield advance
    finally:
        _shows_one.reset(token)


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(label, total, unit)
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=10) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)


def _lines(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _LINE_SECONDS and 0 < done < total:
            last = now
            rate = done / (now - started)
            left = duration((total - done) / rate)
            print(
                f"{label}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    yield advance
    seconds = time.monotonic() - started
    if seconds >= _QUIET_SECONDS:
        print(
            f"{label}: {done:,} {unit} in {duration(seconds)}, {done / seconds:,.0f} {unit}/s",
            file=sys.stderr,
            flush=True,
        )
