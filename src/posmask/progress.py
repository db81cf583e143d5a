"""Progress on standard error: one line for a whole study, and one line per stage under way.

On a terminal they are bars. In a log file a stage prints one line per minute and one at its end. Time left is shown
after ten seconds of data.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

__all__ = [
    "Advance",
    "Show",
    "Stage",
    "announce",
    "duration",
    "no_progress",
    "progress_bar",
    "progress_bars",
    "sent_by",
    "shown_by",
    "stage_label",
    "stages_finished",
    "study_progress",
    "throttled",
]

_LINE_SECONDS = 60.0
_TIME_LEFT_SECONDS = 10.0
_SEND_SECONDS = 0.5
_NARROW_COLUMNS = 60
_RATE_COLUMNS = 110
"""Terminals with at least this many columns also show the rate of a stage."""


@dataclass(frozen=True)
class Stage:
    """How far a counted piece of work is, such as the training of a cell.

    Attributes:
        label: what is done; see `stage_label`.
        total: number of units.
        unit: their name, in the plural.
        done: number of units done.
        explained_variance: of the SAE, as far as it is known.
        ended: whether the stage is completed, which may be later than its last unit.
    """

    label: str
    total: int
    unit: str
    done: int = 0
    explained_variance: float | None = None
    ended: bool = False

    @property
    def fraction(self) -> float:
        """The share of units done; a stage without units has none to wait for."""
        return self.done / self.total if self.total else 1.0


Show = Callable[[Stage], None]
"""Takes a new state of a stage."""


class Advance(Protocol):
    """Counts finished units of a stage."""

    def __call__(self, n: int, *, explained_variance: float | None = None) -> None:
        """Add `n` units; an explained variance replaces the previous one."""
        ...


_shown_by: ContextVar[Show | None] = ContextVar("_shown_by", default=None)
_finish_stages: ContextVar[Callable[[Iterable[str]], None]] = ContextVar("_finish_stages", default=lambda labels: None)
_silent = False  # No ContextVar: threads announce too.


def stage_label(kind: Literal["harvest", "train", "evaluate"], name: str) -> str:
    """Return the label of a stage, by which `study_progress` knows its cost.

    >>> stage_label("train", "slice-seed0")
    'train slice-seed0'
    """
    return f"{kind} {name}"


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
    """Let `show` display the stages within the block, for example by sending them to another process."""
    token = _shown_by.set(show)
    try:
        yield
    finally:
        _shown_by.reset(token)


@contextmanager
def sent_by(send: Show) -> Iterator[None]:
    """Display the stages within the block here, and send them to another process about twice per second."""
    send = throttled(send, _SEND_SECONDS)
    with _display(None) as display:

        def show_and_send(stage: Stage) -> None:
            display.show(stage)
            send(stage)

        with shown_by(show_and_send):
            yield


def throttled(show: Show, seconds: float) -> Show:
    """Return `show` without the states of a stage that follow another one within `seconds`, except its first and last.

    Args:
        show: receives the remaining states.
        seconds: minimum time between two states.
    """
    last = -seconds

    def show_some(stage: Stage) -> None:
        nonlocal last
        now = time.monotonic()
        if stage.done == 0 or stage.ended or now - last >= seconds:
            last = now
            show(stage)

    return show_some


def _ignore(stage: Stage) -> None:
    pass


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield a function that adds finished units to a stage. A stage within another stage is not shown."""
    stage = Stage(label, total, unit)
    with progress_bars() as show, shown_by(_ignore):

        def advance(n: int, *, explained_variance: float | None = None) -> None:
            nonlocal stage
            known = stage.explained_variance if explained_variance is None else explained_variance
            stage = replace(stage, done=stage.done + n, explained_variance=known)
            show(stage)

        show(stage)
        yield advance
        show(replace(stage, ended=True))


@contextmanager
def progress_bars() -> Iterator[Show]:
    """Yield a function that displays several stages at a time, below the line of the study if there is one."""
    show = _shown_by.get()
    if show is not None:
        yield show
        return
    with _display(None) as display:
        yield display.show


@contextmanager
def study_progress(name: str, costs: Mapping[str, float]) -> Iterator[None]:
    """Show a line for a study within the block, with the stages under way below it.

    The time left is the predicted cost of what remains, times the elapsed time per predicted cost so far.

    Args:
        name: name of the study.
        costs: predicted cost of each stage that is not finished, by its label, in the order of execution. Only their
            ratios matter.
    """
    if _shown_by.get() is not None:
        yield
        return
    study = _Study(name, costs)
    with _display(study) as display:
        lock = threading.Lock()

        def update(stage: Stage) -> None:
            with lock:  # Several threads report stages of other processes.
                study.update(stage)
                display.show(stage)

        def finish(labels: Iterable[str]) -> None:
            with lock:
                if new := study.finish(labels):
                    display.show_finished(new)

        token = _finish_stages.set(finish)
        try:
            with shown_by(update):
                yield
        finally:
            _finish_stages.reset(token)


def stages_finished(labels: Iterable[str]) -> None:
    """Count stages of the study as finished that were not shown, because another process completed them."""
    _finish_stages.get()(labels)


class _Study:
    """How far a study is."""

    def __init__(self, name: str, costs: Mapping[str, float]) -> None:
        self.name = name
        self._costs = costs
        self._fractions: dict[str, float] = {}
        self._started = time.monotonic()

    def update(self, stage: Stage) -> None:
        if stage.label in self._costs:
            self._fractions[stage.label] = 1.0 if stage.ended else stage.fraction

    def finish(self, labels: Iterable[str]) -> list[str]:
        """Count stages as finished, and return those that were not before."""
        new = [label for label in labels if label in self._costs and self._fractions.get(label) != 1.0]
        self._fractions.update(dict.fromkeys(new, 1.0))
        return new

    @property
    def count(self) -> str:
        return f"stage {max(1, len(self._fractions))} of {len(self._costs)}"

    @property
    def cost(self) -> float:
        return sum(self._costs.values())

    @property
    def spent(self) -> float:
        return sum(self._costs[label] * fraction for label, fraction in self._fractions.items())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def time_left(self) -> str:
        return _time_left(self.spent, self.cost - self.spent, self.seconds)


class _Running:
    """A stage under way, with its times."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.started = self.last_line = time.monotonic()
        self._first: tuple[float, int] | None = None

    def update(self, stage: Stage) -> None:
        self.stage = stage
        if self._first is None and stage.done:  # The first units may include compiling, or work of an earlier run.
            self._first = time.monotonic(), stage.done

    def restarts_as(self, stage: Stage) -> bool:
        """Whether a stage of this label has started again."""
        return stage.done < self.stage.done

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> str:
        """Units per second since the first ones, or since the start if there is less than ten seconds of data."""
        seconds, done = self._paced()
        if seconds < _TIME_LEFT_SECONDS or not done:
            seconds, done = self.seconds, self.stage.done
        return _rate(done, seconds, self.stage.unit)

    @property
    def time_left(self) -> str:
        seconds, done = self._paced()
        return _time_left(done, self.stage.total - self.stage.done, seconds)

    @property
    def explained_variance(self) -> str:
        value = self.stage.explained_variance
        return "" if value is None else f"{value:.3f}".replace("-", "−")

    def _paced(self) -> tuple[float, int]:
        """Seconds since the first units were done, and the number of units since then."""
        if self._first is None:
            return 0.0, 0
        first_time, first_done = self._first
        return time.monotonic() - first_time, self.stage.done - first_done


class _Display(Protocol):
    def show(self, stage: Stage) -> None: ...

    def show_finished(self, labels: list[str]) -> None:
        """Show that stages are finished which may never have been shown."""
        ...


@contextmanager
def _display(study: _Study | None) -> Iterator[_Display]:
    console = Console(stderr=True)
    if not (console.is_interactive and sys.stderr.isatty()):  # FORCE_COLOR makes every console "a terminal".
        yield _Log(study)
        return
    # On a terminal, lines on stdout scroll above the bars; in a pipe they must not end up on stderr.
    progress = Progress(*_columns(console), console=console, redirect_stdout=sys.stdout.isatty())
    with progress:
        bars = _Bars(progress, study)
        yield bars
        bars.end()


def _columns(console: Console) -> tuple[ProgressColumn, ...]:
    return (
        _Label(console),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        _Amount(table_column=Column(justify="right", no_wrap=True)),
        _Facts(console),
    )


class _Bars:
    """Display of a terminal. Below a study, which has many stages, a stage takes over the line of one that ended."""

    def __init__(self, progress: Progress, study: _Study | None) -> None:
        self._progress = progress
        self._stages: dict[str, tuple[TaskID, _Running]] = {}
        self._free: list[TaskID] = []
        self._study = study
        if study is not None:
            self._study_task = progress.add_task("", total=study.cost, study=study)

    def show(self, stage: Stage) -> None:
        if stage.label not in self._stages:
            task = self._free.pop(0) if self._free else self._progress.add_task("", total=1.0, running=_Running(stage))
            self._stages[stage.label] = task, _Running(stage)
        task, running = self._stages[stage.label]
        if running.restarts_as(stage):
            running = _Running(stage)
            self._stages[stage.label] = task, running
        running.update(stage)
        self._progress.update(task, completed=stage.fraction, running=running)
        if stage.ended:
            self._end(stage.label)
        self._show_study()

    def show_finished(self, labels: list[str]) -> None:
        for label in labels:
            self._end(label)
        self._show_study()

    def end(self) -> None:
        """Leave only the line of the study, if there is one."""
        for task in self._free:
            self._progress.remove_task(task)

    def _end(self, label: str) -> None:
        if label in self._stages:
            task, _ = self._stages.pop(label)
            if self._study is not None:
                self._free.append(task)

    def _show_study(self) -> None:
        if self._study is not None:
            self._progress.update(self._study_task, completed=self._study.spent)


class _Label(ProgressColumn):
    """Name of the study or label of the stage, shortened in the middle to a part of the terminal's width."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        study: _Study | None = task.fields.get("study")
        label = task.fields["running"].stage.label if study is None else study.name
        width = self._console.width
        return Text(_shortened(label, width * 2 // 5 if width >= _NARROW_COLUMNS else width // 5))


class _Amount(ProgressColumn):
    """Stage of the study, or share of the stage."""

    def render(self, task: Task) -> Text:
        study: _Study | None = task.fields.get("study")
        return Text(_percent(task.fields["running"].stage.fraction) if study is None else study.count)


class _Facts(ProgressColumn):
    """Elapsed time of the study; explained variance and, on wide terminals, rate of the stage; time left of both."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        study: _Study | None = task.fields.get("study")
        if study is not None:
            return Text(_joined(duration(study.seconds), study.time_left))
        running: _Running = task.fields["running"]
        rate = running.rate if self._console.width >= _RATE_COLUMNS else ""
        explained = running.explained_variance and f"expl. var. {running.explained_variance}"
        return Text(_joined(explained, rate, running.time_left))


def _shortened(text: str, width: int) -> str:
    """
    >>> _shortened("train windows-seed0", 12)
    'train …seed0'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


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
    """Display of a log file: one line per stage and minute, and one at the end of each stage."""

    def __init__(self, study: _Study | None) -> None:
        self._study = study
        self._stages: dict[str, _Running] = {}

    def show(self, stage: Stage) -> None:
        if stage.label not in self._stages or self._stages[stage.label].restarts_as(stage):
            self._stages[stage.label] = _Running(stage)
        running = self._stages[stage.label]
        running.update(stage)
        now = time.monotonic()
        if stage.ended:
            del self._stages[stage.label]
            self._print(running, f"{stage.label} took {duration(running.seconds)} ({stage.done:,} {stage.unit})")
        elif now - running.last_line >= _LINE_SECONDS:
            running.last_line = now
            amount = f"{stage.done:,} of {stage.total:,} {stage.unit}"
            self._print(running, f"{stage.label} at {_percent(stage.fraction)} ({amount})")

    def show_finished(self, labels: list[str]) -> None:
        if self._study is not None:
            announce(f"{self._study.name}, {self._study.count}: finished elsewhere: {', '.join(labels)}")

    def _print(self, running: _Running, what: str) -> None:
        study, explained = self._study, running.explained_variance
        facts = [what, running.rate, explained and f"explained variance {explained}"]
        if study is None:
            announce(_joined(*facts, running.time_left))
            return
        times = _joined(f"{duration(study.seconds)} elapsed", study.time_left and f"about {study.time_left}")
        announce(f"{study.name}, {study.count}: {_joined(*facts)}; {times}")
