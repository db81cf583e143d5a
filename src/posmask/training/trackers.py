"""Training curves in a tracker, while they grow. Each cell's `curve.csv` is written too, tracker or not."""

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
    """
    Raises:
        MissingExtra: its package is not installed.
    """
    if name is not None and find_spec(name) is None:
        raise MissingExtra(f"track = {name!r} needs the package `{name}`: pip install 'posmask[track]'")


def curve_writer(
    name: Tracker | None, folder: Path, study: str, run: str, settings: Mapping[str, Any]
) -> AbstractContextManager[Write]:
    """What takes a curve's points one by one; loads the tracker's package only now.

    Args:
        name: None drops the points.
        folder: where `tensorboard` and `wandb` write; trackio has a folder of its own (TRACKIO_DIR).
        study: the tracker's name for it, as a project.
        run: the tracker's name for a cell with a seed, within the project.
        settings: shown beside the run.
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
    """Weights & Biases, and trackio, which takes the same calls."""
    tracker = importlib.import_module(name)
    where = {"dir": str(folder)} if name == "wandb" else {}
    tracker.init(project=f"posmask-{study}", name=run, config=dict(settings), **where)
    try:
        yield lambda point: tracker.log(_numbers(point), step=point.step)
    finally:
        tracker.finish()
