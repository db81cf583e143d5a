"""Latents of published results: the blocks of a page, kept beside results that are published without their cells."""

from pathlib import Path

from posmask.errors import DamagedFolder
from posmask.report.browser import Browser, browser
from posmask.report.reading import read_studies
from posmask.storage.layout import kept_latents_folder
from posmask.storage.manifest import read_manifest, write_folder

__all__ = ["keep_latents", "read_kept_latents"]

_TYPES = {"label": str, "cell": str, "seed": int, "folder": str, "identity": str, "block": str, "kept": int, "of": int}


def keep_latents(root: Path, results: Path, n_latents: int) -> Path:
    """Keep the most informative latents of each cell's first seed beside results, and return their folder.

    Args:
        root: the run folder.
        results: the folder of the results.
        n_latents: number of latents to keep per cell.

    Raises:
        DamagedFolder: the run folder has neither results nor cells, or no cell has latents.
        BadSetting: the folder to write contains something that posmask did not write.
    """
    (study,) = read_studies([root])
    shown = browser(study.pictured, study.in_order, n_latents, study.warnings)
    if not shown.cells:
        raise DamagedFolder(f"{root} has no cell with latents: `posmask run` computes them")
    folder = kept_latents_folder(results)
    with write_folder(folder, {"what": "latents", "cells": shown.cells}) as draft:
        for name, block in shown.blocks.items():
            (draft / f"{name}.gz").write_bytes(block)
    return folder


def read_kept_latents(results: Path, warnings: list[str]) -> Browser:
    """Return the latents that are kept beside results; none if there are none or they cannot be read.

    Args:
        results: the folder of the results.
        warnings: why they cannot be read is added to it.
    """
    folder = kept_latents_folder(results)
    if not folder.is_dir():
        return Browser({}, [])
    try:
        manifest = read_manifest(folder, verify=True)
        cells = manifest["made_from"]["cells"]
        blocks = {name.removesuffix(".gz"): (folder / name).read_bytes() for name in manifest["files"]}
        if not all(cell["block"] in blocks for cell in cells) or not all(
            isinstance(cell[name], kind) for cell in cells for name, kind in _TYPES.items()
        ):
            raise DamagedFolder(f"{folder.name} does not describe its cells: keep them again")
    except (DamagedFolder, OSError, KeyError, TypeError) as error:
        warnings.append(f"The latents beside the results are left out: {error}.".replace(f"{results}/", ""))
        return Browser({}, [])
    return Browser(blocks, cells)
