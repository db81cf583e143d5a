"""Options and arguments that several commands share, and the decorator that registers a command."""

import functools
import inspect
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from posmask.errors import BadSetting, PosmaskError

__all__ = [
    "CellFolder",
    "Changes",
    "Json",
    "ModelName",
    "Panel",
    "Quiet",
    "Root",
    "StudyFile",
    "UnknownPosition",
    "Verbose",
    "complete_cell_names",
    "parse_count",
    "parse_position",
    "registered",
    "set_common_options",
]

Panel = Literal["Studies", "Results", "SAEs", "Installation"]
"""Headings under which `posmask --help` groups the commands."""

StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY", help="Study file, such as studies/quick.toml.", show_default=False)
]
Root = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run folder of the study.", show_default="runs/NAME of the study")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Replace a setting of the study file, such as model.layer=5. Can be given several times.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
CellFolder = Annotated[
    Path,
    typer.Argument(metavar="CELL", help="Folder of a cell, such as runs/quick/cells/slice-seed0.", show_default=False),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Name of the model in TransformerLens, which SAELens uses.",
        show_default="the model that it was trained on",
    ),
]
UnknownPosition = Annotated[
    str | None,
    typer.Option(
        metavar="typical|N",
        help="Position of vectors whose position a tool does not give; typical: the middle of the context.",
        show_default="such vectors are an error",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on standard error.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error of posmask.")]


def parse_position(value: str | None) -> Any:
    """The value of an option for a position: a number of up to 18 digits, or the word itself, which is checked later.

    >>> parse_position("-1"), parse_position("typical"), parse_position("9" * 5000) == "9" * 5000
    (-1, 'typical', True)
    """
    return int(value) if value is not None and re.fullmatch(r"-?\d{1,18}", value) else value


def parse_count(value: str) -> int:
    """The value of an option for a count, such as 200000, 200_000, 200k or 1.5M.

    >>> parse_count("200k"), parse_count("1.5M"), parse_count("4_000")
    (200000, 1500000, 4000)

    Raises:
        BadSetting: it is not a count above 0.
    """
    match = re.fullmatch(r"([0-9][0-9_,]{0,14}(?:\.[0-9]{1,3})?)([kKmM]?)", value.strip())
    count = round(float(re.sub("[_,]", "", match[1])) * {"": 1, "k": 1e3, "m": 1e6}[match[2].lower()]) if match else 0
    if count < 1:
        raise BadSetting(f"{value!r} is not a count of tokens: give one such as 200000, 200k or 1M")
    return count


_given_before_command: ContextVar[frozenset[str]] = ContextVar("_given_before_command", default=frozenset())


def set_common_options(*, quiet: bool, verbose: bool) -> None:
    """Let the command run as if it had these options itself; for those given before its name."""
    given = {"quiet": quiet, "verbose": verbose}
    _given_before_command.set(frozenset(name for name, is_given in given.items() if is_given))


def complete_cell_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of cells for shell completion, read from the TOML file alone because settings.py imports torch."""
    try:
        cells = tomllib.loads(Path(ctx.params["study_file"]).read_text(encoding="utf8"))["cells"]
        return [cell["name"] for cell in cells if cell["name"].startswith(incomplete)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def registered(app: typer.Typer, name: str, panel: Panel) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a function as the command `name` of `app`, with the options --quiet and --verbose added to its own."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*, quiet: bool, verbose: bool, **arguments: object) -> None:
            before = _given_before_command.get()
            quiet, verbose = quiet or "quiet" in before, verbose or "verbose" in before
            with _silence() if quiet else nullcontext(), _tracebacks() if verbose else nullcontext():
                function(**arguments)

        extra = {"quiet": Quiet, "verbose": Verbose}
        signature = inspect.signature(function)
        parameters = [
            *signature.parameters.values(),
            *(
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
                for key, kind in extra.items()
            ),
        ]
        command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {**function.__annotations__, **extra}
        return app.command(name, rich_help_panel=panel)(command)

    return register


@contextmanager
def _silence() -> Iterator[None]:
    from posmask.progress import no_progress

    with no_progress():
        yield


@contextmanager
def _tracebacks() -> Iterator[None]:
    try:
        yield
    except (PosmaskError, OSError):
        traceback.print_exc(file=sys.stderr)
        raise
