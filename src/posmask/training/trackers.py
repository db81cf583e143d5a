"""Experiment trackers that show training curves live. `curve.csv` of each cell is written with or without a tracker."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from posmask.errors import MissingExtra
from posmask.training.curve import CurvePoint

__all__ = ["Tracker", "check_tracker", "curve_writer"]

Tracker = Literal["tensorboard", "wandb", "trackio"]
Write = Callable[[CurvePoint], None]


def check_tracker(name: Tracker | None) -> None:
    """Check that a tracker's package is installed, without importing it.

    Raises:
        MissingExtra: the package is not installed.
    """
    if name is not None and find_spec(name) is None:
        raise MissingExtra(f"track = {name!r} needs the package `{name}`: pip install 'posmask[track]'")


def curve_writer(
    name: Tracker | None, folder: Path, study: str, run: str, settings: Mapping[str, Any]
) -> AbstractContextManager[Write]:
    """Open a run in a tracker; the context's value is a function that logs a curve point.

    Args:
        name: the tracker; None discards the points.
        folder: the folder that `tensorboard` and `wandb` write to; trackio uses TRACKIO_DIR.
        study: the study's name, for the tracker's project.
        run: the name of the run within the project.
        settings: the run's settings, shown by the tracker.

    Raises:
        MissingExtra: the tracker's package is not installed.
    """
    check_tracker(name)
    if name is None:
        return nullcontext(lambda point: None)
    if name == "tensorboard":
        return _tensorboard(folder / "tensorboard" / run)
    return _runs(name, folder, study, run, settings)


def _numbers(point: CurvePoint) -> dict[str, float]:
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
