"""The table of latents: how each latent depends on position, with intervals, tests, and a class by stated rules.

Two sources of evidence, both under the null hypothesis that a latent depends on content alone:

- Held-out texts follow each other in contexts, so a text begins at any position. Rotating the positions of each text
  preserves everything about its content. Statistic: information of firing about position.
- The shift design shows the same content in several windows of the context. Reordering the windows of each text
  preserves everything about its content. Statistic: variance between windows over that between windows of a text.

The statistics of a latent are standardized by its null draws, and their p-values are shares of all latents' null draws,
standardized alike, that are as large (a pooled permutation null). A latent's p-value is its smallest, times the number
of its tests; q-values are those of Benjamini and Hochberg (1995) over latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask.data.activations import Batch
from posmask.evaluation.blocks import LatentBlock
from posmask.evaluation.position import COMPONENTS, N_NULL_DRAWS, PositionInformation, ShiftDesign, binary_entropy
from posmask.evaluation.retention import N_FOLDS, PositionMass
from posmask.results.intervals import jackknife_intervals
from posmask.results.rows import Measure
from posmask.storage.layout import LATENT_TABLE_FILE, LIFTED, PROFILES_FILE

__all__ = [
    "CLASSES",
    "CLASS_RULES",
    "COLUMNS",
    "KINDS",
    "KIND_RULES",
    "LIFTED",
    "PROFILE_COLUMNS",
    "LatentTable",
    "LatentTableParts",
    "position_bins",
    "write_tables",
]

CLASSES = ("position-tracking", "mixed", "content", "dense", "dead", "undecided")
KINDS = ("first", "sink", "early", "middle", "late", "periodic")

LEVEL = 0.05
"""q-values below it show that a latent depends on position."""
TRACKING_SHARE = 0.5
"""Position-tracking: at least half of a latent's information or variance is about position."""
LEAST_SHARE = 0.02
"""Smaller shares do not count as dependence on position, however significant."""
CONTENT_SHARE = 0.1
"""Content: the 95 % interval of the share of position ends below it."""
DENSE_RATE = 0.1
"""Dense latents fire at more than this share of tokens (Sun et al. 2025, arXiv 2506.15679)."""
MIN_SINKS = 10
SINK_RATE = 0.5
"""Latents of attention sinks fire at least at this share of them,"""
SINK_CONTRAST = 10
"""and this many times as often as at other tokens."""
LONGEST_PERIOD = 64
_MOST_STARTS_AT_ONE_POSITION = 0.25
FIRST_POSITIONS = 4
"""The first positions after BOS, which are often special."""

CLASS_RULES: Mapping[str, str] = {
    "dead": "It fires on no held-out token, in no text of the shift design and at no attention sink.",
    "position-tracking": f"It depends on position (q below {LEVEL}), and position explains at least "
    f"{TRACKING_SHARE:.0%} of the uncertainty about its firing or of its variance in the shift design. Or most "
    f"attention sinks are at the first {FIRST_POSITIONS} positions, and it fires at {SINK_RATE:.0%} of the sinks or "
    f"more and {SINK_CONTRAST} times as often as at other tokens.",
    "mixed": f"It depends on position (q below {LEVEL}), and the larger of these shares is at least {LEAST_SHARE:.0%} "
    f"and below {TRACKING_SHARE:.0%}.",
    "dense": f"It does not depend on position, as content latents do not, and fires at more than {DENSE_RATE:.0%} of "
    "tokens.",
    "content": f"The 95 % intervals of both shares of position, where measured, end below {CONTENT_SHARE:.0%}.",
    "undecided": "None of the above: it fires too rarely, or the intervals are too wide.",
}
"""The rule of each class, in the order in which they apply."""

KIND_RULES: Mapping[str, str] = {
    "sink": f"It fires at attention sinks at the first positions, as above; only with at least {MIN_SINKS} of them.",
    "periodic": f"A period of 2 to {LONGEST_PERIOD} positions explains at least half of the variance of its mean "
    "activation by position.",
    "first": "At least half of its mean activation by position is at the first position after BOS.",
    "early": "Half of its excess over its mean activation is reached in the first third of the context.",
    "late": "Half of this excess is reached only in the last third.",
    "middle": "All others.",
}
"""Where a position-tracking or mixed latent fires, in the order in which the rules apply."""

COLUMNS: Mapping[str, str] = {
    "latent": "index in the SAE",
    "class": f"one of {', '.join(CLASSES)}",
    "kind": f"where a position-tracking or mixed latent fires: one of {', '.join(KINDS)}; empty for others",
    "firings": "number of kept held-out tokens at which it fires",
    "firing_rate": "their share",
    "firing_rate_low": "lower end of its 95 % interval (jackknife over 16 folds of texts)",
    "firing_rate_high": "upper end",
    "mean_activation": "mean activation where it fires, in the SAE's units",
    "position_share": "share of the uncertainty about firing that position explains, above its null; missing if texts "
    "begin at one position, or with fewer than 20 firings in a half of the texts",
    "position_share_low": "lower end of its 95 % interval (jackknife over 16 folds of texts)",
    "position_share_high": "upper end",
    "position_bits": "the same in bits per token",
    "shift_position": "share of position in its variance in the shift design",
    "shift_position_low": "lower end of its 95 % interval (jackknife over folds of texts)",
    "shift_position_high": "upper end",
    "shift_content": "share of content",
    "shift_interaction": "share of the interaction of position and content",
    "shift_firings": "firings in the shift design",
    "p_value": "that it depends on content alone",
    "q_value": "the same after Benjamini and Hochberg, over all latents with a p-value",
    "peak_position": "position with the largest mean activation",
    "period": "positions between the peaks of a periodic latent",
    "sink_rate": "share of attention sinks at which it fires",
}
"""Columns of the table and their meanings."""

PROFILE_COLUMNS: Mapping[str, str] = {
    "latent": "index in the SAE",
    "mask": "on or lifted",
    "first_position": "first position of the bin, counted in the context; 0 is BOS",
    "last_position": "last position of the bin",
    "firing_rate": "share of the bin's tokens at which it fires",
    "firing_rate_low": "lower end of its 95 % interval (jackknife over 16 folds of texts)",
    "firing_rate_high": "upper end",
    "mean_activation": "mean activation over all of the bin's tokens, in the SAE's units",
}
"""Columns of the table of profiles, which has a row for each latent and bin at which the latent may fire."""


@dataclass(frozen=True)
class LatentTable:
    """Statistics of all latents.

    Attributes:
        columns: [latent] by the names in `COLUMNS`.
        bin_start: first position of each bin of positions.
        bin_end: last position of each bin.
        rate: [bin latent] share of the tokens in each bin at which a latent fires.
        rate_low: lower ends of its 95 % intervals.
        rate_high: upper ends.
        mean: [bin latent] mean activation of all tokens in each bin.
        null_rate: `rate` with the positions of each text rotated.
        n_tokens: kept held-out tokens.
        uses_rotations: whether held-out texts begin at varied positions, so that rotations test position.
    """

    columns: dict[str, np.ndarray]
    bin_start: Int[np.ndarray, " bin"]
    bin_end: Int[np.ndarray, " bin"]
    rate: Float[np.ndarray, "bin latent"]
    rate_low: Float[np.ndarray, "bin latent"]
    rate_high: Float[np.ndarray, "bin latent"]
    mean: Float[np.ndarray, "bin latent"]
    null_rate: Float[np.ndarray, "bin latent"]
    n_tokens: int
    uses_rotations: bool

    def measures(self, mask: str) -> list[Measure]:
        """`latent_share` of each class, and by bin of positions `silent_share`, `silent_share_null`, `dense_share`.

        silent_share = share of the latents that fire anywhere which do not fire in the bin; its null has the positions
        of each text rotated. dense_share = share of all latents that fire at more than a tenth of the bin's tokens.
        Intervals of class shares are Wilson intervals with latents as units: they do not cover the choice of texts.

        Args:
            mask: `on` or `lifted`, reported in the slice.
        """
        classes, fires = self.columns["class"], self.columns["firings"] > 0
        measures = []
        for name in CLASSES:
            count, n = int((classes == name).sum()), len(classes)
            low, high = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
            measures.append(Measure("latent_share", count / n, low, high, n, {"latents": name, "mask": mask}))
        for number, ends in enumerate(zip(self.bin_start, self.bin_end, strict=True)):
            where = {"positions": "-".join(map(str, ends)), "mask": mask}
            silent, null = ((rate[number, fires] == 0).mean() for rate in (self.rate, self.null_rate))
            dense = (self.rate[number] > DENSE_RATE).mean()
            for name, value in (("silent_share", silent), ("silent_share_null", null), ("dense_share", dense)):
                measures.append(Measure(name, float(value), n=len(classes), slice=where))
        return measures


def position_bins(n_positions: int) -> Int[Tensor, " position"]:
    """The bin of each position: bins double in length up to a sixteenth of the context and then stay; BOS is in bin 0.

    Example:
        >>> position_bins(64).tolist()[:14]
        [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    """
    longest, bins, length = max(1, n_positions // 16), [0, 0], 1
    while len(bins) < n_positions:
        length = min(2 * length, longest)
        bins += [bins[-1] + 1] * length
    return torch.tensor(bins[:n_positions])


class LatentTableParts:
    """Collects the table of latents from blocks of them.

    Args:
        n_positions: positions per context.
    """

    def __init__(self, n_positions: int) -> None:
        self._bins = position_bins(n_positions)
        self._parts: list[dict[str, Tensor]] = []

    def add(self, block: LatentBlock) -> None:
        """Add the latents of a block."""
        part = _of_heldout(block.in_context, block.information, self._bins) | _of_shift(block.design)
        self._parts.append({name: tensor.cpu() for name, tensor in part.items()})

    def table(
        self, heldout: Batch, sink_firings: Int[Tensor, " latent"], sink_position: Int[Tensor, " sink"]
    ) -> LatentTable:
        """Test and classify each latent.

        Args:
            heldout: the kept held-out tokens.
            sink_firings: number of attention sinks at which each latent fires.
            sink_position: position of each attention sink.
        """
        n_sinks, n_first = len(sink_position), int((sink_position <= FIRST_POSITIONS).sum())
        every = {name: torch.cat([part[name] for part in self._parts], dim=-1) for name in self._parts[0]}
        d_sae = len(every["firing_rate"])
        every["sink_rate"] = sink_firings.double() / n_sinks if n_sinks else torch.full((d_sae,), torch.nan)
        every["first_sinks"] = torch.full((d_sae,), n_first if 2 * n_first >= n_sinks else 0)
        uses_rotations = _texts_begin_anywhere(heldout.position, heldout.text_position)
        if not uses_rotations:
            for name in ("position_share", "position_share_low", "position_share_high", "position_bits"):
                every[name] = torch.full_like(every[name], torch.nan)
        every["p_value"], every["q_value"] = _tests(every, uses_rotations=uses_rotations)
        classes, kinds = _classes(every)
        columns = {name: every[name].numpy() for name in COLUMNS if name in every}
        columns["latent"] = np.arange(d_sae)
        columns["class"], columns["kind"] = classes, kinds
        columns["period"] = np.where(kinds == "periodic", columns["period"], np.nan)
        names = ("rate", "rate_low", "rate_high", "mean", "null_rate")
        starts = np.unique(self._bins[1:].numpy(), return_index=True)[1] + 1
        return LatentTable(
            columns={name: columns[name] for name in COLUMNS},
            bin_start=starts,
            bin_end=np.append(starts[1:], len(self._bins)) - 1,
            n_tokens=len(heldout),
            uses_rotations=uses_rotations,
            **{name: every[name].float().numpy() for name in names},
        )


def _texts_begin_anywhere(position: Int[Tensor, " token"], text_position: Int[Tensor, " token"]) -> bool:
    """Whether no position has more than a quarter of the beginnings of texts.

    If texts begin at one position, position in the context is position in the text, and rotations would count habits
    of texts' beginnings as position. Then only the shift design tells.
    """
    starts = position[text_position == 1]
    if len(starts) == 0:
        return True
    return int(torch.bincount(starts.long()).max()) <= max(1, _MOST_STARTS_AT_ONE_POSITION * len(starts))


def _of_heldout(
    used: PositionMass, information: PositionInformation, bins: Int[Tensor, " position"]
) -> dict[str, Tensor]:
    """Statistics from the held-out texts: [latent], profiles [bin latent] and null draws [draw latent]."""
    firings, tokens = used.firings.sum(0), used.tokens.sum(0)
    n_fired, n_tokens = firings.sum(0), tokens.sum()
    rate, mass = (n_fired / n_tokens).double(), used.mass.sum(0)
    bins = bins.to(used.mass.device)
    every_position = torch.arange(len(bins), device=bins.device)
    in_bin = torch.zeros(int(bins.max()) + 1, len(bins), device=bins.device)
    in_bin[bins, every_position] = 1
    by_fold, tokens_by_fold = in_bin @ used.firings, used.tokens @ in_bin.T
    bin_tokens = tokens_by_fold.sum(0).clamp(min=1)[:, None]
    rate_low, rate_high = jackknife_intervals(
        by_fold.sum(0) / bin_tokens,
        (by_fold.sum(0) - by_fold) / (tokens_by_fold.sum(0) - tokens_by_fold).clamp(min=1)[..., None],
    )
    n_by_fold, tokens_of_fold = used.firings.sum(1).double(), used.tokens.sum(1).double()[:, None]
    low, high = jackknife_intervals(rate, (n_fired - n_by_fold) / (n_tokens - tokens_of_fold))
    real, null = information.with_null(used, every_position)
    binned, binned_null = information.with_null(used, bins)
    share = real - null.mean(0)
    without = []
    for fold in range(N_FOLDS):
        remaining = n_tokens - used.tokens[fold].sum()
        information_without = information.without_fold(used, fold)
        without.append(information_without - null.mean(0) * float(n_tokens / remaining))
    share_low, share_high = jackknife_intervals(share, torch.stack(without))
    share, share_low, share_high = (
        torch.where(used.counted(), value, torch.nan) for value in (share, share_low, share_high)
    )
    profile = mass / tokens.clamp(min=1)[:, None]
    return {
        "firings": n_fired.long(),
        "firing_rate": rate,
        "firing_rate_low": low.clamp(min=0),
        "firing_rate_high": high.clamp(max=1),
        "mean_activation": mass.sum(0) / n_fired,
        "position_share": share,
        "position_share_low": share_low,
        "position_share_high": share_high,
        "position_bits": share * binary_entropy(rate) / np.log(2),
        "peak_position": torch.where(n_fired > 0, profile.argmax(0), -1),
        "rate": by_fold.sum(0) / bin_tokens,
        "rate_low": rate_low.clamp(min=0),
        "rate_high": rate_high.clamp(max=1),
        "mean": in_bin @ mass / bin_tokens,
        "null_rate": information.null_rate(bins),
        "by_position": torch.cat([real[None], null]),
        "by_bin": torch.cat([binned[None], binned_null]),
        "is_counted": used.counted(),
        **_shape_of(profile, tokens > 0),
    }


def _of_shift(design: ShiftDesign) -> dict[str, Tensor]:
    shares, without = design.by_latent()
    position, content, interaction = shares
    low, high = jackknife_intervals(position, without[:, COMPONENTS.index("position")])
    real, null = design.with_null(N_NULL_DRAWS)
    is_counted = position.isfinite()
    return {
        "shift_position": position,
        "shift_position_low": low,
        "shift_position_high": high,
        "shift_content": content,
        "shift_interaction": interaction,
        "shift_firings": design.firings.long(),
        "by_window": torch.where(is_counted, torch.cat([real[None], null]), torch.nan),
    }


def _shape_of(
    profile: Float[Tensor, "position latent"], is_seen: Bool[Tensor, " position"]
) -> dict[str, Float[Tensor, " latent"]]:
    """Where the mean activation of each latent lies.

    `of_first`: the part at the first position. `half_of_excess`: the position, from 0 to 1, by which half of the excess
    over the mean is reached. `period`: the smallest period that explains half of the variance of the profile without
    its first positions, adjusted for the number of phases; NaN if there is none.
    """
    seen = profile[is_seen].double()
    excess = (seen - seen.mean(0)).clamp(min=0)
    reached = excess.cumsum(0) >= excess.sum(0) / 2
    half = reached.double().argmax(0) / max(1, len(seen) - 1)
    rest = seen[min(FIRST_POSITIONS, len(seen) // 4) :]
    n, total = len(rest), (rest - rest.mean(0)).square().sum(0)
    period = total.new_full((profile.shape[1],), torch.nan)
    for length in range(2, min(LONGEST_PERIOD, n // 4) + 1):
        phase = torch.arange(n, device=rest.device) % length
        sums = rest.new_zeros(length, rest.shape[1]).index_add_(0, phase, rest)
        means = sums / torch.bincount(phase, minlength=length)[:, None]
        left = (rest - means[phase]).square().sum(0) / (n - length)
        explained = 1 - left / (total / (n - 1))
        period = torch.where(period.isnan() & (explained >= 0.5) & (total > 0), float(length), period)
    return {"of_first": seen[0] / seen.sum(0), "half_of_excess": half, "period": period}


def _tests(every: Mapping[str, Tensor], *, uses_rotations: bool) -> tuple[Tensor, Tensor]:
    """p-values and q-values; NaN for latents without a test."""
    is_counted = every["is_counted"]
    names = ["by_position", "by_bin", "by_window"] if uses_rotations else ["by_window"]
    ps = []
    for name in names:
        values = every[name] if name == "by_window" else torch.where(is_counted, every[name], torch.nan)
        ps.append(_pooled_p(values[0], values[1:]))
    table = torch.stack(ps)
    n_tests = table.isfinite().sum(0)
    smallest = table.nan_to_num(nan=torch.inf).amin(0)
    p = torch.where(n_tests > 0, (smallest * n_tests).clamp(max=1), torch.nan)
    q, tested = p.clone(), p.isfinite()
    if bool(tested.any()):
        q[tested] = torch.from_numpy(scipy.stats.false_discovery_control(p[tested].numpy()))
    return p, q


def _pooled_p(real: Float[Tensor, " latent"], null: Float[Tensor, "draw latent"]) -> Float[Tensor, " latent"]:
    """The share of standardized null draws of all latents that are at least as large as a latent's standardized value.

    Cube roots make the statistics nearly normal (Wilson and Hilferty 1931). Each null draw is standardized by the
    latent's other draws. NaN where a value or a draw is.
    """
    real, null = (torch.sign(values) * values.abs().pow(1 / 3) for values in (real.double(), null.double()))
    is_tested = real.isfinite() & null.isfinite().all(0)
    p = torch.full_like(real, torch.nan)
    if not bool(is_tested.any()):
        return p
    real, null = real[is_tested], null[:, is_tested]
    n, total, squares = len(null), null.sum(0), null.square().sum(0)
    tiny = 1e-9 * (1 + null.abs().mean(0))
    value = (real - null.mean(0)) / (null.std(0) + tiny)
    mean_of_others = (total - null) / (n - 1)
    variance_of_others = (
        ((squares - null.square()) / (n - 1) - mean_of_others.square()).clamp(min=0) * (n - 1) / (n - 2)
    )
    drawn = ((null - mean_of_others) / (variance_of_others.sqrt() + tiny)).flatten().sort().values
    n_larger = len(drawn) - torch.searchsorted(drawn, value)
    p[is_tested] = (1 + n_larger.double()) / (1 + len(drawn))
    return p


def _classes(every: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Class and kind of each latent, by the rules in docs/audit.md."""
    share, shift = every["position_share"], every["shift_position"]
    largest = torch.fmax(share, shift)
    depends = (every["q_value"] < LEVEL) & (largest >= LEAST_SHARE)
    is_sink = (every["first_sinks"] >= MIN_SINKS) & (every["sink_rate"] >= SINK_RATE)
    is_sink &= every["sink_rate"] >= SINK_CONTRAST * every["firing_rate"]
    highs = torch.stack([every["position_share_high"], every["shift_position_high"]])
    bounded = (highs.isnan() | (highs < CONTENT_SHARE)).all(0) & highs.isfinite().any(0) & every["is_counted"]
    fires_nowhere = (every["firings"] == 0) & (every["shift_firings"] == 0) & ~(every["sink_rate"] > 0)
    rules = (
        ("dead", fires_nowhere),
        ("position-tracking", is_sink | (depends & (largest >= TRACKING_SHARE))),
        ("mixed", depends),
        ("dense", bounded & (every["firing_rate"] > DENSE_RATE)),
        ("content", bounded),
    )
    half = every["half_of_excess"]
    kinds = (
        ("sink", is_sink),
        ("periodic", every["period"].isfinite()),
        ("first", every["of_first"] >= 0.5),
        ("early", half < 1 / 3),
        ("late", half > 2 / 3),
    )
    classes = np.select([rule.numpy() for _, rule in rules], [name for name, _ in rules], "undecided")
    kind = np.select([rule.numpy() for _, rule in kinds], [name for name, _ in kinds], "middle")
    return classes, np.where(np.isin(classes, ["position-tracking", "mixed"]), kind, "")


def write_tables(tables: Mapping[str, LatentTable], folder: Path) -> None:
    """Write `latents.parquet` and `profiles.parquet` into a folder.

    Args:
        tables: with the mask `on` and, where that differs, `lifted`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = dict(tables["on"].columns)
    if (lifted := tables.get("lifted")) is not None:
        columns |= {f"{LIFTED}{name}": column for name, column in lifted.columns.items() if name != "latent"}
    parquet.write_table(
        pa.table({name: pa.array(column) for name, column in columns.items()}), folder / LATENT_TABLE_FILE
    )
    parts = [_profiles(table, mask) for mask, table in tables.items()]
    parquet.write_table(pa.concat_tables([pa.table(part) for part in parts]), folder / PROFILES_FILE)


def _profiles(table: LatentTable, mask: str) -> dict[str, np.ndarray | list[str]]:
    """The columns of the table of profiles, without latents that never fire."""
    (fires,) = np.nonzero(table.columns["firings"])
    n_bins = len(table.bin_start)
    parts = (table.rate, table.rate_low, table.rate_high, table.mean)
    values = [
        np.repeat(fires, n_bins),
        [mask] * (n_bins * len(fires)),
        np.tile(table.bin_start, len(fires)),
        np.tile(table.bin_end, len(fires)),
        *(part[:, fires].T.ravel() for part in parts),
    ]
    return dict(zip(PROFILE_COLUMNS, values, strict=True))
