"""What an audit measures beyond the evaluation of a study: by position, beyond the context, and without latents."""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask import masks
from posmask.data.activations import Activations, Batch, evaluation_batches
from posmask.data.tokens import equal_segments
from posmask.evaluation.downstream import InModel, Losses, Replace, without_latents
from posmask.evaluation.reconstruction import Reconstruction
from posmask.evaluation.retention import N_FOLDS
from posmask.evaluation.suite import EvaluationData
from posmask.kernels import operations
from posmask.probing.order_tasks import ORDER_TASKS
from posmask.results.bootstrap import resample_counts
from posmask.results.intervals import interval, jackknife_intervals
from posmask.results.rows import Row, Units, parse_slice
from posmask.sae.autoencoder import SparseAutoencoder

__all__ = [
    "ORDER_COLUMNS",
    "POSITION_COLUMNS",
    "REMOVAL_COLUMNS",
    "Beyond",
    "beyond_context",
    "beyond_table",
    "order_table",
    "position_table",
    "removal_table",
]

POSITION_COLUMNS: Mapping[str, str] = {
    "mask": "on or lifted",
    "position": "in the context; 0 is BOS",
    "is_beyond": "whether it is beyond the context that the SAE is for",
    "tokens": "kept held-out tokens at the position",
    "explained_variance": "relative to the mean of the vectors at the position",
    "explained_variance_low": "lower end of its 95 % interval (jackknife over 16 folds of texts)",
    "explained_variance_high": "upper end",
    "explained_variance_of_all": "relative to the mean of all vectors",
    "explained_variance_with_sinks": "explained_variance with attention sinks among the tokens",
    "sink_tokens": "attention sinks at the position",
    "l0": "active latents per token",
    "l0_low": "lower end of its 95 % interval (jackknife over 16 folds of texts)",
    "l0_high": "upper end",
    "stream_norm": "mean norm of the vectors",
    "predictions": "scored predictions at the position",
    "cross_entropy": "of the unmodified model's next-token predictions, in nats",
    "cross_entropy_increase": "its increase with reconstructions in place of the vectors, in nats",
    "cross_entropy_increase_low": "lower end of its 95 % interval (t, over contexts)",
    "cross_entropy_increase_high": "upper end",
    "ce_recovered": "share of the loss that vectors of 0 cause which the reconstruction recovers",
    "kl_divergence": "of the model with reconstructions from the unmodified model, in nats",
    "kl_divergence_low": "lower end of its 95 % interval (t, over contexts)",
    "kl_divergence_high": "upper end",
    "silent_share": "share of the latents that fire anywhere which do not fire in the position's bin",
    "silent_share_null": "the same with the positions of each text rotated",
    "dense_share": "share of all latents that fire at more than a tenth of the tokens in the position's bin",
}
"""Columns of the table of positions and their meanings."""

REMOVAL_COLUMNS: Mapping[str, str] = {
    "first_position": "first position of the window; 1 for all positions",
    "last_position": "last position of the window",
    "removed": "position-tracking latents, or matched latents: others of equal activation mass",
    "latents": "how many are removed",
    "cross_entropy_increase": "increase of the cross-entropy without them, in nats",
    "cross_entropy_increase_low": "lower end of its 95 % interval (t, over contexts)",
    "cross_entropy_increase_high": "upper end",
}
"""Columns of the table of removals."""

ORDER_COLUMNS: Mapping[str, str] = {
    "about": "block: where a passage stands. local: order of neighboring words or sentences",
    "task": "order task, or all of a kind",
    "k": "features that a probe uses",
    "stream": "accuracy of probes on the mean-pooled stream; 0.5 is chance",
    "codes": "accuracy of probes on the mean-pooled codes",
    "difference": "codes minus stream",
    "difference_low": "lower end of its 95 % interval (bootstrap over the groups of texts)",
    "difference_high": "upper end",
}
"""Columns of the table of order tasks."""

N_REMOVAL_WINDOWS = 4
MIN_FIRINGS = 40
_FEW = 2
Profile = dict[str, Float[Tensor, " position"]]
Beyond = dict[str, dict[str, float]]
"""Metrics in the last quarter of the SAE's context and beyond it, on the same contexts, by metric and range."""


def position_table(sae: SparseAutoencoder, data: EvaluationData, rows: Sequence[Row]) -> pd.DataFrame:
    """The table of positions within the SAE's context, see `POSITION_COLUMNS`.

    Args:
        rows: of the evaluation of the SAE.
    """
    parts = []
    for mask in ("on", "lifted") if sae.mask.lifting_matters() else ("on",):
        columns, _ = _by_position(sae, data.heldout, data.in_model, data.n_positions, use_mask=mask == "on")
        columns |= _latents_by_position(rows, mask, data.n_positions)
        parts.append(_frame(columns, mask, first=1, context=data.n_positions))
    return pd.concat(parts, ignore_index=True).reindex(columns=list(POSITION_COLUMNS))


def beyond_table(
    sae: SparseAutoencoder, data: EvaluationData, beyond: Activations, n_contexts: int
) -> tuple[pd.DataFrame, Beyond]:
    """The table of positions beyond the SAE's context, and what differs from positions within it.

    Args:
        beyond: vectors of contexts that are longer than the SAE's.
        n_contexts: how many of these contexts the model continues from.
    """
    length = int(beyond.position.max()) + 1
    in_model = InModel(data.load_model(), beyond, n_contexts)
    columns, reconstruction = _by_position(_longer(sae, length), beyond, in_model, length, use_mask=True)
    frame = _frame(columns, "on", first=data.n_positions, context=data.n_positions)
    differences = _beyond(columns, reconstruction, data.n_positions, length)
    return frame.reindex(columns=list(POSITION_COLUMNS)), differences


def _beyond(columns: Profile, reconstruction: Reconstruction, n_positions: int, length: int) -> Beyond:
    ranges = {
        "last quarter of the context": (n_positions - max(1, n_positions // 4), n_positions - 1),
        "beyond": (n_positions, length - 1),
    }
    of_ranges = {name: reconstruction.within(*ends) for name, ends in ranges.items()}
    for name, (first, last) in ranges.items():
        for column in ("cross_entropy_increase", "kl_divergence"):
            of_ranges[name][column] = float(columns[column][first : last + 1].nanmean())
    metrics = of_ranges["beyond"]
    return {metric: {name: values[metric] for name, values in of_ranges.items()} for metric in metrics}


def _longer(sae: SparseAutoencoder, n_positions: int) -> SparseAutoencoder:
    """An SAE without a mask, for longer contexts."""
    assert sae.mask.settings.kind == "open"
    longer = copy.copy(sae)
    longer._modules = dict(sae._modules)
    longer.mask = masks.make_mask(sae.mask.settings, n_positions, sae.d_sae).to(sae.encoder.device)
    return longer


def _frame(columns: Profile, mask: str, *, first: int, context: int) -> pd.DataFrame:
    frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()}).iloc[first:]
    position = np.arange(first, first + len(frame))
    for name in ("tokens", "sink_tokens", "predictions"):
        frame[name] = frame[name].astype(int)
    return frame.assign(mask=mask, position=position, is_beyond=position >= context)


def _by_position(
    sae: SparseAutoencoder, activations: Activations, in_model: InModel, n_positions: int, *, use_mask: bool
) -> tuple[Profile, Reconstruction]:
    device = sae.encoder.device
    mean, _ = activations.center_and_scale
    reconstruction = Reconstruction(n_positions, activations.n_texts, mean.to(device))
    norms, n = torch.zeros(2, n_positions, dtype=torch.float64)
    for batch in evaluation_batches(activations, device=device):
        kept = batch.kept()
        codes = sae.encode_batch(kept, use_mask=use_mask)
        reconstruction.update(kept, codes, sae.decode_batch(codes, kept))
        at = kept.position.long().cpu()
        operations.add_at_(norms, at, kept.vectors.float().norm(dim=1).double().cpu())
        operations.count_at_(n, at)
    sinks = activations.sinks.to(device)
    reconstruction.update_sinks(sinks, sae.decode_batch(sae.encode_batch(sinks, use_mask=use_mask), sinks))
    columns = reconstruction.by_position() | {"stream_norm": norms / n, "tokens": n}
    return columns | _losses_by_position(sae, in_model, n_positions, use_mask=use_mask), reconstruction


def _losses_by_position(sae: SparseAutoencoder, in_model: InModel, n_positions: int, *, use_mask: bool) -> Profile:
    def reconstruct(batch: Batch, context: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        return sae.decode_batch(sae.encode_batch(batch, use_mask=use_mask), batch)

    (clean, zeroed), (_, reconstructed) = in_model.references, in_model.losses([reconstruct])

    def padded(values: Float[Tensor, " prediction"]) -> Float[Tensor, " position"]:
        return torch.cat([values.double(), torch.full((n_positions - len(values),), torch.nan)])

    increase = reconstructed.cross_entropy - clean.cross_entropy
    harm = (zeroed.cross_entropy - clean.cross_entropy).nanmean(0)
    recovered = torch.where(harm > 0, 1 - increase.nanmean(0) / harm, torch.nan)
    columns = {"cross_entropy": padded(clean.cross_entropy.nanmean(0)), "ce_recovered": padded(recovered)}
    for name, losses in (("cross_entropy_increase", increase), ("kl_divergence", reconstructed.divergence)):
        mean, low, high = _t_interval(losses)
        columns |= {name: padded(mean), f"{name}_low": padded(low), f"{name}_high": padded(high)}
    n = clean.cross_entropy.isfinite().sum(0)
    return columns | {"predictions": padded(n).nan_to_num(0)}


def _t_interval(values: Float[Tensor, "context ..."]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over contexts without NaN, and the ends of its 95 % t interval; NaN with fewer than two contexts."""
    values = values.double()
    n = values.isfinite().sum(0)
    mean = values.nanmean(0)
    variance = (values - mean).square().nansum(0) / (n - 1)
    quantile = torch.from_numpy(np.asarray(scipy.stats.t.ppf(0.975, (n - 1).clamp(min=1).numpy())))
    half_width = torch.where(n >= _FEW, quantile * (variance / n).sqrt(), torch.nan)
    return mean, mean - half_width, mean + half_width


def _latents_by_position(rows: Sequence[Row], mask: str, n_positions: int) -> Profile:
    """Shares of silent and dense latents, which are measured by bin of positions."""
    columns = {}
    for name in ("silent_share", "silent_share_null", "dense_share"):
        columns[name] = torch.full((n_positions,), torch.nan, dtype=torch.float64)
        for row in rows:
            where = parse_slice(row.slice)
            if row.metric == name and where["mask"] == mask:
                first, last = map(int, where["positions"].split("-"))
                columns[name][first : last + 1] = row.value
    return columns


def removal_table(sae: SparseAutoencoder, latents: pd.DataFrame, data: EvaluationData) -> pd.DataFrame:
    """The cross-entropy without the position-tracking latents, and without as many others, see `REMOVAL_COLUMNS`.

    The others are content or dense latents. Each position-tracking latent, most active first, is matched with the
    unused one of nearest log activation mass. Latents are chosen by their firing on all held-out texts, not by losses.
    Only latents with at least 40 firings take part. Empty if there are none of either kind.
    """
    mass = latents["firings"] * latents["mean_activation"]
    is_frequent = latents["firings"] >= MIN_FIRINGS
    tracking = np.flatnonzero((latents["class"] == "position-tracking") & is_frequent)
    others = np.flatnonzero(latents["class"].isin(["content", "dense"]) & is_frequent)
    n = min(len(tracking), len(others))
    if n == 0:
        return pd.DataFrame(columns=list(REMOVAL_COLUMNS))
    tracking = tracking[np.argsort(-mass.to_numpy()[tracking], kind="stable")][:n]
    log_mass = np.log(mass.to_numpy())
    free, matched = dict.fromkeys(others.tolist()), []
    for latent in tracking:
        candidates = np.fromiter(free, int)
        nearest = int(candidates[np.abs(log_mass[candidates] - log_mass[latent]).argmin()])
        del free[nearest]
        matched.append(nearest)
    chosen = {"position-tracking latents": tracking, "matched latents": np.array(matched)}
    replacements = [_without(sae, members) for members in chosen.values()]
    clean, *ablated = data.in_model.losses(replacements)
    return pd.concat([_removal(name, n, clean, losses) for name, losses in zip(chosen, ablated, strict=True)])


def _without(sae: SparseAutoencoder, members: Int[np.ndarray, " member"]) -> Replace:
    is_removed: Bool[Tensor, "window latent"] = torch.zeros(1, sae.d_sae, dtype=torch.bool)
    is_removed[0, torch.from_numpy(members)] = True
    return without_latents(sae, is_removed)


def _removal(name: str, n: int, clean: Losses, ablated: Losses) -> pd.DataFrame:
    increase = ablated.cross_entropy - clean.cross_entropy
    length = increase.shape[1]
    windows = [(1, length - 1)]
    segment = equal_segments(length, N_REMOVAL_WINDOWS)
    for number in range(N_REMOVAL_WINDOWS):
        (inside,) = (segment == number).nonzero(as_tuple=True)
        windows.append((max(1, int(inside[0])), int(inside[-1])))
    lines = []
    for first, last in windows:
        of_contexts = increase[:, first : last + 1].nanmean(1)
        mean, low, high = (float(value) for value in _t_interval(of_contexts))
        lines.append([first, last, name, n, mean, low, high])
    return pd.DataFrame(lines, columns=list(REMOVAL_COLUMNS))


def beyond_context(sae: SparseAutoencoder, beyond: Activations, n_positions: int) -> pd.DataFrame:
    """Whether each latent fires as often beyond the context as within it, on the same contexts.

    Columns: `beyond_rate_ratio`, the firing rate beyond the context over that within it, with `_low` and `_high` (95 %,
    jackknife over folds of texts of its logarithm); and `beyond_context`: holds if the interval lies within 1/2 and 2,
    fails if it lies outside, undecided otherwise or with fewer than 20 firings in all.
    """
    length = int(beyond.position.max()) + 1
    longer, device = _longer(sae, length), sae.encoder.device
    firings = torch.zeros(N_FOLDS, 2, sae.d_sae, device=device)
    tokens = torch.zeros(N_FOLDS, 2, device=device)
    for batch in evaluation_batches(beyond, device=device):
        kept = batch.kept()
        codes = longer.encode_batch(kept)
        cell = kept.text.long() % N_FOLDS * 2 + (kept.position >= n_positions).long()
        operations.count_at_(tokens.view(-1), cell)
        operations.count_at_(firings.view(-1), cell[codes.token] * sae.d_sae + codes.latent)
    firings, tokens = firings.cpu().double(), tokens.cpu().double()

    def log_ratio(firings: Float[Tensor, "side latent"], tokens: Float[Tensor, " side"]) -> Float[Tensor, " latent"]:
        rate = (firings + 0.5) / (tokens[:, None] + 1)  # Half a firing each keeps latents of one side finite.
        return (rate[1] / rate[0]).log()

    total, n = firings.sum(0), tokens.sum(0)
    value = log_ratio(total, n)
    without = torch.stack([log_ratio(total - firings[fold], n - tokens[fold]) for fold in range(N_FOLDS)])
    low, high = jackknife_intervals(value, without)
    enough = total.sum(0) >= 20
    limit = math.log(2)
    verdict = np.select(
        [~enough.numpy(), ((low > -limit) & (high < limit)).numpy(), ((high < -limit) | (low > limit)).numpy()],
        ["undecided", "holds", "fails"],
        "undecided",
    )
    ends = {"": value, "_low": low, "_high": high}
    columns = {f"beyond_rate_ratio{end}": torch.where(enough, v.exp(), torch.nan).numpy() for end, v in ends.items()}
    return pd.DataFrame({**columns, "beyond_context": verdict})


def order_table(rows: Mapping[str, Sequence[Row]], units: Mapping[str, Mapping[str, Units]]) -> pd.DataFrame:
    """Accuracies of probes on codes and on the stream, by task and for block and local order, see `ORDER_COLUMNS`.

    Args:
        rows: of the `codes` and of the `stream`.
        units: of both, as `read_units` returns them.
    """
    accuracy = {
        source: {
            (where["task"], int(where["k"])): row
            for row in rows[source]
            if row.metric == "order_accuracy" and (where := parse_slice(row.slice))["pooling"] == "mean"
            if where["k"] != "all"
        }
        for source in ("codes", "stream")
    }
    lines = []
    for k in sorted({k for _, k in accuracy["codes"].keys() & accuracy["stream"].keys()}):
        for about in ("block", "local"):
            tasks = [task for task, number in accuracy["codes"] if number == k and ORDER_TASKS[task].about == about]
            of_tasks = []
            for task in tasks:
                pair = [accuracy[source][task, k] for source in ("stream", "codes")]
                draws = [
                    _draws(units[source], row, task) for source, row in zip(("stream", "codes"), pair, strict=True)
                ]
                of_tasks.append((task, *(row.value for row in pair), draws[1] - draws[0]))
            for task, stream, codes, draws in of_tasks:
                lines.append([about, task, k, stream, codes, codes - stream, *interval(draws)])
            if of_tasks:
                _, stream, codes, draws = zip(*of_tasks, strict=True)
                means = [float(np.mean(values)) for values in (stream, codes)]
                difference = means[1] - means[0]
                lines.append([about, "all", k, *means, difference, *interval(torch.stack(draws).mean(0))])
    return pd.DataFrame(lines, columns=list(ORDER_COLUMNS))


def _draws(units: Mapping[str, Units], row: Row, task: str) -> Float[Tensor, " draw"]:
    """A measure in bootstrap draws of the groups of a task, the same draws for codes and stream."""
    of_row = units[f"{row.metric}|{row.slice}"]
    counts = resample_counts(len(of_row.top), task)
    return torch.from_numpy((counts @ of_row.top) / (counts @ of_row.bottom))
