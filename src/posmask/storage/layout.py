"""Layout of a run folder: the name of every file and folder, and the label of a cell.

ROOT/
  study.json, results.csv, verdicts.csv, report.html, audit.html
  baselines/, cells/CELL-seedN/, evaluated/NAME/     one finished folder each
  activations/, checkpoints/CELL-seedN/, jobs/N.log, stale/, .locks/
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "AUDIT_FILE",
    "BASELINES",
    "CURVE_FILE",
    "DEAD_FILE",
    "LATENTS_FILE",
    "LATENT_CSV_FILE",
    "LATENT_TABLE_FILE",
    "LATENT_WORDS_FILE",
    "LIFTED",
    "OPENNESS_FILE",
    "ORDER_FILE",
    "PAGE_MARK",
    "PARTS_FILE",
    "POSITIONS_FILE",
    "PROFILES_FILE",
    "REMOVAL_FILE",
    "REPORT_FILE",
    "RESULTS_FILE",
    "ROWS_FILE",
    "SAEBENCH_FILE",
    "SAE_FILE",
    "SETTINGS_FILE",
    "SNAPSHOTS_FILE",
    "STUDY_FILE",
    "SUMMARY_FILE",
    "UNITS_FILE",
    "VERDICTS_FILE",
    "WEIGHTS_FILE",
    "activations_folder",
    "all_checkpoints_folder",
    "cache_folder",
    "cell_folder",
    "cell_label",
    "cells_folder",
    "checkpoints_folder",
    "evaluated_folder",
    "evaluated_folders",
    "folders",
    "job_log",
    "jobs_folder",
    "kept_latents_folder",
    "locks_folder",
    "parse_cell_label",
    "root_of",
    "stale_folder",
    "stale_paths",
]

STUDY_FILE = "study.json"
RESULTS_FILE = "results.csv"
VERDICTS_FILE = "verdicts.csv"
REPORT_FILE = "report.html"
AUDIT_FILE = "audit.html"
PAGE_MARK = b'<meta name="generator" content="posmask'
"""At the beginning of every page that posmask wrote."""
BASELINES = "baselines"
"""Label and folder of the model's own results."""

ROWS_FILE = "rows.csv"
UNITS_FILE = "units.safetensors"
PARTS_FILE = "parts_of_evaluation.json"
"""The identity and the number of rows of each part of an evaluation, in the order of its rows."""
SETTINGS_FILE = "settings.json"
CURVE_FILE = "curve.csv"
SNAPSHOTS_FILE = "snapshots.safetensors"
DEAD_FILE = "dead.safetensors"
"""The latents that were dead at the end of training."""
SAEBENCH_FILE = "saebench.json"
WEIGHTS_FILE = "sae.safetensors"
SAE_FILE = "sae.json"
OPENNESS_FILE = "openness.safetensors"
LATENTS_FILE = "latents.safetensors"
LATENT_WORDS_FILE = "latents.json"
LATENT_TABLE_FILE = "latents.parquet"
LIFTED = "lifted_"
"""Prefix of the columns with the mask lifted in the table of latents, for SAEs whose mask can be lifted."""
PROFILES_FILE = "profiles.parquet"
POSITIONS_FILE = "positions.csv"
ORDER_FILE = "order.csv"
REMOVAL_FILE = "removal.csv"
SUMMARY_FILE = "summary.json"
LATENT_CSV_FILE = "latents.csv"
"""Tables of an audit, in the folder of an evaluated SAE."""


def cell_label(cell: str, seed: int) -> str:
    """
    >>> cell_label("slice", 0)
    'slice-seed0'
    """
    return f"{cell}-seed{seed}"


def parse_cell_label(label: str) -> tuple[str, int]:
    """The inverse of `cell_label`.

    Raises:
        ValueError: the label is not of that form.

    >>> parse_cell_label("slice-seed0")
    ('slice', 0)
    """
    cell, separator, seed = label.rpartition("-seed")
    if not separator or not seed.isdecimal():
        raise ValueError(f"{label!r} is not the label of a cell, such as slice-seed0")
    return cell, int(seed)


def cells_folder(root: Path) -> Path:
    return root / "cells"


def cell_folder(root: Path, label: str) -> Path:
    """The finished folder of a label: a cell's, or the baselines'."""
    return root / label if label == BASELINES else cells_folder(root) / label


def all_checkpoints_folder(root: Path) -> Path:
    """The checkpoints of all trainings that are not finished."""
    return root / "checkpoints"


def checkpoints_folder(root: Path, label: str) -> Path:
    """The checkpoints of a training that is not finished."""
    return all_checkpoints_folder(root) / label


def activations_folder(root: Path) -> Path:
    """The harvested vectors, one folder per set."""
    return root / "activations"


def cache_folder(root: Path) -> Path:
    """The local copies of vectors that are in a remote store."""
    return activations_folder(root) / ".store"


def evaluated_folders(root: Path) -> Path:
    """The results of SAEs that the study did not train, one folder each."""
    return root / "evaluated"


def evaluated_folder(root: Path, name: str) -> Path:
    """The results of an SAE that the study did not train."""
    return evaluated_folders(root) / name


def root_of(path: Path) -> Path | None:
    """The run folder that a path is, or is directly in; None if there is none."""
    roots = (path, path.absolute().parent)
    return next((root for root in roots if cells_folder(root).is_dir() or evaluated_folders(root).is_dir()), None)


def stale_folder(root: Path) -> Path:
    """Folders of other settings that a run moved out of the way."""
    return root / "stale"


def stale_paths(root: Path, label: str) -> Iterator[Path]:
    """The paths for folders of a label that are moved out of the way, in the order of use."""
    return (stale_folder(root) / f"{label}-{number}" for number in itertools.count(1))


def kept_latents_folder(results: Path) -> Path:
    """Where latents are kept beside results that are published without their cells."""
    return results / "latents"


def jobs_folder(root: Path) -> Path:
    return root / "jobs"


def job_log(root: Path, number: int) -> Path:
    """The output of a helper process of `run --jobs`."""
    return jobs_folder(root) / f"{number}.log"


def locks_folder(root: Path) -> Path:
    """The locks of processes that share a run folder; they are left behind."""
    return root / ".locks"


def folders(root: Path) -> list[Path]:
    """All folders of a run folder that hold other folders or files of posmask."""
    return [
        cells_folder(root),
        all_checkpoints_folder(root),
        activations_folder(root),
        cache_folder(root),
        evaluated_folders(root),
        stale_folder(root),
        jobs_folder(root),
        locks_folder(root),
    ]
