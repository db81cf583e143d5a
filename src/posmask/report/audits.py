"""Reads the folders of audited SAEs for the page of audits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posmask.errors import DamagedFolder
from posmask.storage import layout
from posmask.storage.json_file import read_json
from posmask.storage.manifest import read_manifest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Audit", "read_audits"]


@dataclass(frozen=True)
class Audit:
    """The tables of an audited SAE, as `posmask.AuditReport` describes them.

    Attributes:
        name: of the SAE, unique on the page.
    """

    name: str
    summary: dict[str, Any]
    latents: "pd.DataFrame"
    profiles: "pd.DataFrame"
    positions: "pd.DataFrame"
    order: "pd.DataFrame"
    removal: "pd.DataFrame"

    @property
    def masks(self) -> list[str]:
        """`on`, and `lifted` if the SAE was also measured without its mask."""
        return list(self.summary["classes"])


def read_audits(root: Path, names: Sequence[str]) -> list[Audit]:
    """Read audited SAEs.

    Args:
        root: of the audit.
        names: of the folders in `root/evaluated`.

    Raises:
        DamagedFolder: a folder is missing, holds no audit, or its files differ from what was written.
    """
    return [_read(layout.evaluated_folder(root, name), name) for name in names]


def _read(folder: Path, name: str) -> Audit:
    import pandas as pd

    read_manifest(folder, verify=True)
    summary = folder / layout.SUMMARY_FILE
    if not summary.is_file():
        raise DamagedFolder(f"{folder} holds no audit: run `posmask audit` on the SAE")
    return Audit(
        name=name,
        summary=read_json(summary),
        latents=pd.read_parquet(folder / layout.LATENT_TABLE_FILE),
        profiles=pd.read_parquet(folder / layout.PROFILES_FILE),
        positions=pd.read_csv(folder / layout.POSITIONS_FILE),
        order=pd.read_csv(folder / layout.ORDER_FILE),
        removal=pd.read_csv(folder / layout.REMOVAL_FILE),
    )
