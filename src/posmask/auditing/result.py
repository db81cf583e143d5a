"""The result of an audit as data frames, and its figures."""

from functools import cached_property
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from posmask.errors import BadSetting, DamagedFolder
from posmask.storage import layout
from posmask.storage.json_file import read_json
from posmask.storage.manifest import read_manifest

__all__ = ["AuditReport", "read_audit"]


class AuditReport:
    """The tables of an audited SAE; docs/audit.md describes their columns.

    Attributes:
        folder: holds the tables as files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"AuditReport({str(self.folder)!r})\n" + "\n".join(self.summary["sentences"])

    @cached_property
    def latents(self) -> pd.DataFrame:
        """One row per latent: class, firing rate, dependence on position with intervals and q-value, example."""
        return pd.read_parquet(self.folder / layout.LATENT_TABLE_FILE)

    @cached_property
    def profiles(self) -> pd.DataFrame:
        """Firing rate and mean activation of each latent by bin of positions, with intervals."""
        return pd.read_parquet(self.folder / layout.PROFILES_FILE)

    @cached_property
    def positions(self) -> pd.DataFrame:
        """Reconstruction, losses and latents by position, with intervals."""
        return pd.read_csv(self.folder / layout.POSITIONS_FILE)

    @cached_property
    def order(self) -> pd.DataFrame:
        """Accuracy of probes for order on the SAE's codes and on the stream, with intervals of the difference."""
        return pd.read_csv(self.folder / layout.ORDER_FILE)

    @cached_property
    def removal(self) -> pd.DataFrame:
        """Cross-entropy without the position-tracking latents and without matched latents, by window of positions."""
        return pd.read_csv(self.folder / layout.REMOVAL_FILE)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What was audited, counts of classes with intervals, main numbers, and sentences that state them."""
        return read_json(self.folder / layout.SUMMARY_FILE)

    def plot_profile(self, latent: int) -> Any:
        """Where a latent fires: firing rate by position with its 95 % interval, with the mask on and lifted.

        Raises:
            BadSetting: the SAE has no such latent, or it never fired.
        """
        of_latent = self.profiles[self.profiles["latent"] == latent]
        if of_latent.empty:
            n = len(self.latents)
            reason = "it never fired" if 0 <= latent < n else f"the SAE has the latents 0 to {n - 1}"
            raise BadSetting(f"latent {latent} has no profile: {reason}")
        middle = (of_latent["first_position"] + of_latent["last_position"]) / 2
        position = alt.X("position:Q", title="position in the context")
        base = alt.Chart(of_latent.assign(position=middle)).encode(x=position, color=alt.Color("mask:N", title="mask"))
        band = base.mark_area(opacity=0.25).encode(
            y=alt.Y("firing_rate_low:Q", title="firing rate"), y2="firing_rate_high:Q"
        )
        line = base.mark_line(point=True).encode(y="firing_rate:Q")
        row = self.latents.iloc[latent]
        title = f"latent {latent}: {row['class']}" + (f", {row['kind']}" if row["kind"] else "")
        return alt.layer(band, line).properties(title=title, width=420, height=220)


def read_audit(folder: Path | str) -> AuditReport:
    """Read the result of an earlier audit.

    Args:
        folder: of the SAE, as `AuditReport.folder`.

    Raises:
        DamagedFolder: there is no audit, or its files differ from what was written.
    """
    folder = Path(folder)
    read_manifest(folder, verify=True)
    if not (folder / layout.SUMMARY_FILE).is_file():
        raise DamagedFolder(f"{folder} holds no audit: give a folder that `posmask audit` wrote, in DIR/evaluated")
    return AuditReport(folder)
