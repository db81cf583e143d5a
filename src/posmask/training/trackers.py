"""Experiment trackers that show training curves live. `curve.csv` of each cell is written with or without a tracker."""

import configparser
import contextlib
import importlib
import math
import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from posmask.errors import MissingExtra
from posmask.progress import announce
from posmask.training.curve import CurvePoint

__all__ = ["Tracker", "check_tracker", "curve_writer"]

Tracker = Literal["tensorboard", "wandb", "trackio"]
Write = Callable[[CurvePoint], None]


_given_up: set[Tracker] = set()
"""Trackers that failed in this process; waiting for each of them again could take minutes per cell."""


def check_tracker(name: Tracker | None) -> None:
    """Check that a tracker's package is installed, without importing it, and report a missing key.

    Raises:
        MissingExtra: the package is not installed.
    """
    if name is not None and find_spec(name) is None:
        raise MissingExtra(f"track = {name!r} needs the package `{name}`: pip install 'posmask[track]'")
    if name is not None and _lacks_key(name):
        announce(
            f"track = {name!r} has no API key, so only curve.csv records the curves: run `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline"
        )


def _lacks_key(name: Tracker) -> bool:
    """Whether a tracker would ask for a key."""
    if name != "wandb" or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return False
    settings = configparser.ConfigParser()
    with contextlib.suppress(configparser.Error):
        settings.read([Path.home() / ".config" / "wandb" / "settings", Path("wandb") / "settings"])
    mode = os.environ.get("WANDB_MODE") or settings.get("default", "mode", fallback="online")
    if mode != "online":
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is None
    except (OSError, netrc.NetrcParseError):
        return True


@contextmanager
def curve_writer(
    name: Tracker | None, folder: Path, study: str, run: str, settings: Mapping[str, Any]
) -> Iterator[Write]:
    """Open a run in a tracker; the context's value is a function that logs a curve point.

    A tracker that fails is reported once and not used again in this process; training continues without it.

    Args:
        name: the tracker; None discards the points.
        folder: the folder that `tensorboard` and `wandb` write to; trackio uses TRACKIO_DIR.
        study: the study's name, for the tracker's project.
        run: the name of the run within the project.
        settings: the run's settings, shown by the tracker.
    """
    if name is None or name in _given_up or _lacks_key(name):
        yield lambda point: None
        return
    is_tensorboard = name == "tensorboard"
    opened = _tensorboard(folder / "tensorboard" / run) if is_tensorboard else _runs(name, folder, study, run, settings)
    stack = contextlib.ExitStack()
    writes: list[Write] = []
    with _tolerated(name):
        writes.append(stack.enter_context(opened))

    def write(point: CurvePoint) -> None:
        if name not in _given_up:
            with _tolerated(name):
                writes[0](point)

    try:
        yield write
    finally:
        with _tolerated(name):
            stack.close()


@contextmanager
def _tolerated(name: Tracker) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Of a tracker, which may raise anything.
        if name not in _given_up:
            _given_up.add(name)
            reason = str(error).strip().partition("\n")[0]
            announce(
                f"The tracker {name} failed ({type(error).__name__}: {reason}): training continues without it, and "
                "curve.csv has all points."
            )


def _numbers(point: CurvePoint) -> dict[str, int | float]:
    return {key: value for key, value in asdict(point).items() if key != "step" and math.isfinite(value)}


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(point: CurvePoint) -> None:
            for key, value in _numbers(point).items():
                writer.add_scalar(key, value, point.step)

        yield write


@contextmanager
def _runs(name: str, folder: Path, study: str, run: str, settings: Mapping[str, Any]) -> Iterator[Write]:
    """A run in Weights & Biases, or in trackio, which has the same interface."""
    tracker = importlib.import_module(name)
    location = {"dir": str(folder)} if name == "wandb" else {}
    tracker.init(project=f"posmask-{study}", name=run, config=dict(settings), **location)
    try:
        yield lambda point: tracker.log(_numbers(point), step=point.step)
    finally:
        tracker.finish()
