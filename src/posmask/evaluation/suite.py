"""Evaluation suite: one function per metric family.

Each function encodes harvested vectors batch by batch and passes batch and codes to accumulators. An accumulator
returns its measures at the end. Rows follow the order in which `evaluate` calls the functions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from posmask.data import tokens
from posmask.data.activations import Activations, Batch, evaluation_batches, training_batches
from posmask.data.sites import LanguageModel
from posmask.errors import DegenerateResult
from posmask.evaluation.blocks import latent_blocks
from posmask.evaluation.controls import Control
from posmask.evaluation.downstream import InModel, WindowMass, causal, recovered, without_latents
from posmask.evaluation.latent_table import LatentTableParts
from posmask.evaluation.latents import MOST_PROBED, LatentFacts, vocabulary_effects
from posmask.evaluation.position import InformationMeasures, ShiftMeasures
from posmask.evaluation.reconstruction import Reconstruction, dead_share, stream_measures
from posmask.evaluation.retention import (
    PositionMass,
    ProfileFidelity,
    Retention,
    mask_measures,
    retention,
    retention_by_latent,
    special_positions,
)
from posmask.evaluation.settings import ATTENTION, CHOSEN, LEARNED_POOLINGS, EvaluationSettings
from posmask.evaluation.smoothness import Smoothness
from posmask.evaluation.stored_codes import StoredCodes
from posmask.kernels.devices import memory_for
from posmask.probing import datasets, order_probes
from posmask.probing.attention import TextCodes
from posmask.probing.order_tasks import OrderTask
from posmask.probing.pooling import PooledTexts, Pooling
from posmask.probing.probes import OnFit
from posmask.progress import progress_bar, stage_label
from posmask.results.rows import Measure, measured, missing
from posmask.results.table import MODEL_LABEL
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.warm_start import without_mask
from posmask.training import loop
from posmask.training.settings import TrainingSettings

__all__ = ["EvaluationData", "baselines", "evaluate", "forgetting", "unmasked_label"]

_RETENTION = ("retention", "retention_chance")
_INFORMATION = ("position_information", "position_information_null", "position_bound_share")
_SHIFT = ("shift_position", "shift_content", "shift_interaction")
_PROBED_ON_ALL = ("mean", "moment")
"""Poolings whose order probes are also fitted on all features."""
_memory = memory_for(
    "the evaluation", "lower evaluation.probe_train or --jobs, or finish on the CPU with --set device=cpu"
)


@dataclass
class EvaluationData:
    """The inputs of an evaluation, which all cells of a study share.

    Args:
        load_training: returns the vectors of the training texts; an SAE from elsewhere needs none.
        heldout: vectors of the held-out texts.
        shift: vectors of the shift design (`tokens.shifted`).
        order: each order task with the vectors of `order_probes.order_tokens`, by name.
        probes: each probe dataset with the vectors of its texts, one context per text, by name.
        n_positions: positions per context.
        load_model: returns the language model, for metrics that run it on replaced vectors.
    """

    load_training: Callable[[], Activations]
    heldout: Activations
    shift: Activations
    order: dict[str, tuple[OrderTask, Activations]]
    probes: dict[str, tuple[datasets.ProbeDataset, Activations]]
    tokenizer: tokens.Tokenizer
    n_positions: int
    settings: EvaluationSettings
    load_model: Callable[[], LanguageModel]

    @cached_property
    def training(self) -> Activations:
        """Vectors of the training texts; harvested on first use if they are missing."""
        return self.load_training()

    @cached_property
    def in_model(self) -> InModel:
        """The model on whole held-out contexts; loaded on first use."""
        return InModel(self.load_model(), self.heldout, self.settings.model_contexts)

    @property
    def n_probed_tokens(self) -> int:
        """Kept tokens of all order tasks and probe datasets."""
        return sum(activations.n_kept for _, activations in [*self.order.values(), *self.probes.values()])


def _statistics_device(device: torch.device) -> torch.device:
    """The device on which codes are pooled, counted and probed: that of the SAE, or the host if that lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _kept_batches(activations: Activations, device: torch.device, advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in evaluation_batches(activations, device=device):
        kept = batch.kept()
        yield kept
        advance(len(kept))


@_memory
def evaluate(
    sae: SparseAutoencoder,
    dead: Bool[Tensor, " latent"] | None,
    data: EvaluationData,
    label: str,
    kept: Mapping[str, list[Measure]] | None = None,
    earlier: Path | None = None,
    controls: Mapping[str, Control] | None = None,
) -> tuple[dict[str, list[Measure]], LatentFacts]:
    """Compute every measure of a trained SAE except forgetting, and the data of the latent browser.

    Args:
        dead: latents that were dead at the end of training; None where unknown, and then `dead_share` is left out.
        label: name of the cell, for the progress bar.
        kept: measures of an earlier evaluation of the same SAE, by part (`EvaluationSettings.parts`); these parts are
            not computed.
        earlier: the folder of that evaluation.
        controls: codes that are probed in the same way, and whose reconstruction is measured (`controls.controls_of`).

    Returns:
        Measures by part, and the data of the latent browser.

    Raises:
        DegenerateResult: the SAE explains no variance. A metric that cannot be computed is a measure without a value.
    """
    facts, measures, controls = LatentFacts(sae.d_sae, earlier), dict(kept or {}), controls or {}
    order = {f"order {name}": pair for name, pair in data.order.items()}
    probes = {f"probes {name}": pair for name, pair in data.probes.items()}
    n_tokens = sum(vectors.n_kept for part, (_, vectors) in [*order.items(), *probes.items()] if part not in measures)
    if "heldout" not in measures:
        n_passes = 2 if sae.mask.lifting_matters() else 1
        n_tokens += (data.heldout.n_kept + data.shift.n_kept) * n_passes + 3 * data.in_model.n_tokens
        n_tokens += data.heldout.n_kept * len(controls)
    if data.settings.smoothness and "smoothness" not in measures:
        n_tokens += data.heldout.n_kept
    poolings = ("mean", "fair", *controls)
    streams = {name: torch.Generator().manual_seed(datasets.SAEBENCH_SEED) for name in poolings}
    with progress_bar(stage_label("evaluate", label), n_tokens, "tokens") as advance:
        if "heldout" in measures:
            facts.keep_heldout()
        else:
            measures["heldout"] = _of_heldout_texts(sae, dead, data, facts, advance)
            measures["heldout"] += _reconstruction_of_controls(controls, data, advance)
        advance(0, explained_variance=_explained_variance(measures["heldout"]))
        for part, (task, vectors) in order.items():
            if part in measures:
                facts.keep_probes(task.name)
            else:
                measures[part] = _order(sae, controls, task, vectors, data, facts, advance)
        for part, (dataset, vectors) in probes.items():
            if part in measures:
                facts.keep_probes(dataset.name)
            else:
                measures[part] = _topics(sae, controls, dataset, vectors, data, facts, streams, advance)
        if data.settings.smoothness and "smoothness" not in measures:
            measures["smoothness"] = measured(["activation_smoothness"], _smoothness, sae, data, advance)
    further = ("smoothness",) if data.settings.smoothness else ()
    return {part: measures[part] for part in ("heldout", *order, *probes, *further)}, facts


def _explained_variance(measures: list[Measure]) -> float | None:
    return next((of.value for of in measures if of.metric == "explained_variance" and of.slice is None), None)


def _of_heldout_texts(
    sae: SparseAutoencoder,
    dead: Bool[Tensor, " latent"] | None,
    data: EvaluationData,
    facts: LatentFacts,
    advance: Callable[[int], None],
) -> list[Measure]:
    stored = {mask: _StoredCodes(sae) for mask in (("on", "lifted") if sae.mask.lifting_matters() else ("on",))}
    window_mass, measures = _heldout(sae, data, facts, stored, advance)
    _shift(sae, data, stored, advance)
    information, fidelity, retained, shift = _of_latents(sae, data, facts, stored)
    measures += information + mask_measures(sae.mask) + ([] if dead is None else dead_share(sae, dead))
    measures += [*fidelity, *retained, *shift]
    measures += [measure for mask, table in facts.tables.items() for measure in table.measures(mask)]
    del stored
    in_model_metrics = ["ce_recovered", "kl_recovered", "causal_specificity"]
    measures += measured(in_model_metrics, _in_model, sae, window_mass, data, advance)
    facts.add_effects(*vocabulary_effects(sae, data.load_model()))
    return measures


def _reconstruction_of_controls(
    controls: Mapping[str, Control], data: EvaluationData, advance: Callable[[int], None]
) -> list[Measure]:
    """`explained_variance` and `l0` of the SAEs of the controls."""
    measures = []
    mean, _ = data.heldout.center_and_scale
    for name, control in controls.items():
        device = _statistics_device(control.sae.encoder.device)
        reconstruction = Reconstruction(data.n_positions, data.heldout.n_texts, mean.to(device))
        for batch in _kept_batches(data.heldout, device, advance):
            codes = control.sae.encode_batch(batch)
            reconstruction.update(batch, codes, control.sae.decode_batch(codes, batch))
        measures += reconstruction.overall({"control": name})
    return measures


def _smoothness(sae: SparseAutoencoder, data: EvaluationData, advance: Callable[[int], None]) -> list[Measure]:
    """How much codes change between neighboring held-out tokens."""
    device = _statistics_device(sae.encoder.device)
    level = None if sae.rule.level is None else sae.rule.level.to(device)
    smoothness = Smoothness(float(sae.scale), level)
    for batch in evaluation_batches(data.heldout, _SMOOTHNESS_TOKENS, device=device):
        context = (batch.position == 0).cumsum(0)
        kept = batch.kept()
        smoothness.update(kept, sae.encode_batch(kept), context[batch.keep])
        advance(len(kept))
    return smoothness.measures()


_SMOOTHNESS_TOKENS = 1024  # whose codes are dense


class _StoredCodes:
    """The codes of the held-out texts and of the shift design, with the mask on or lifted."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.heldout, self.shift = StoredCodes(sae.d_sae), StoredCodes(sae.d_sae)


def _of_latents(
    sae: SparseAutoencoder, data: EvaluationData, facts: LatentFacts, stored: Mapping[str, _StoredCodes]
) -> tuple[list[Measure], list[Measure], list[Measure], list[Measure]]:
    """What is measured per latent: (information about position, fidelity, retention, shift design).

    The latents' profiles and their table are added to `facts`.
    """
    settings, n_positions, device = data.settings, data.n_positions, _statistics_device(sae.encoder.device)
    origin, lifted = sae.mask.settings.position_origin, "lifted" if "lifted" in stored else "on"
    openness, bound_positions = sae.mask.openness().detach(), sae.mask.bound_positions()
    shift_length = tokens.shift_length(n_positions, settings.shift_windows)
    information, fidelity, retained = InformationMeasures(), ProfileFidelity(), Retention()
    shift = {mask: ShiftMeasures() for mask in stored}
    tables = {mask: LatentTableParts(n_positions) for mask in stored}
    blocks = (
        latent_blocks(
            codes.heldout,
            codes.shift,
            n_positions=n_positions,
            n_windows=settings.shift_windows,
            shift_length=shift_length,
            position_origin=origin,
            device=device,
        )
        for codes in stored.values()
    )
    for of_masks in zip(*blocks, strict=True):
        by_mask = dict(zip(stored, of_masks, strict=True))
        on, off = by_mask["on"], by_mask[lifted]
        information.add(on.information, on.in_context)
        fidelity.add(on.at_origin, openness[:, on.latents])
        special = special_positions(off.at_origin, bound_positions[:, off.latents], settings.retention_positions)
        retained.add(off.at_origin, special)
        of_position = on.information.by_latent(on.in_context)
        facts.add_positions(on.at_origin, of_position, *retention_by_latent(off.at_origin, special), origin)
        for mask, block in by_mask.items():
            shift[mask].add(block.design)
            tables[mask].add(block)
    facts.add_shift(stored["on"].shift, settings.shift_windows, shift_length)
    sinks = data.heldout.sinks.to(device)
    for mask, parts in tables.items():
        codes = sae.encode_batch(sinks, use_mask=mask == "on")
        firings = torch.bincount(codes.latent, minlength=sae.d_sae).cpu()
        facts.tables[mask] = parts.table(stored[mask].heldout.batch, firings, sinks.position.cpu())
    return (
        measured(_INFORMATION, information.measures),
        measured(["profile_fidelity"], fidelity.measures),
        measured(_RETENTION, retained.measures),
        [
            measure
            for mask, of_mask in shift.items()
            for measure in measured(_SHIFT, of_mask.measures, mask, slices=[{"mask": mask}])
        ],
    )


def _heldout(
    sae: SparseAutoencoder,
    data: EvaluationData,
    facts: LatentFacts,
    stored: Mapping[str, _StoredCodes],
    advance: Callable[[int], None],
) -> tuple[WindowMass, list[Measure]]:
    """Encode the held-out texts: measures of reconstruction, and the mass of latents in windows for the causal test."""
    heldout, device = data.heldout, _statistics_device(sae.encoder.device)
    mean, _ = heldout.center_and_scale
    reconstruction = Reconstruction(data.n_positions, heldout.n_texts, mean.to(device))
    window_mass = WindowMass(data.n_positions, data.settings.causal_windows, sae.d_sae, device)
    texts_in_model = data.in_model.texts.to(device)
    for batch in _kept_batches(heldout, device, advance):
        codes = sae.encode_batch(batch)
        reconstruction.update(batch, codes, sae.decode_batch(codes, batch))
        facts.update(batch, codes)
        stored["on"].heldout.add(batch, codes)
        # Latents are chosen on texts other than those they are ablated on.
        is_unseen = ~torch.isin(batch.text, texts_in_model)
        window_mass.update(batch.select(is_unseen), codes.select(is_unseen))
    if "lifted" in stored:
        for batch in _kept_batches(heldout, device, advance):
            stored["lifted"].heldout.add(batch, sae.encode_batch(batch, use_mask=False))
    sinks = heldout.sinks.to(device)
    reconstruction.update_sinks(sinks, sae.decode_batch(sae.encode_batch(sinks), sinks))
    return window_mass, reconstruction.measures()


def _position_mass(sae: SparseAutoencoder, data: EvaluationData) -> PositionMass:
    """Activation mass on the held-out texts with the mask lifted."""
    device = _statistics_device(sae.encoder.device)
    lifted = PositionMass(data.n_positions, sae.d_sae, device)
    for batch in _kept_batches(data.heldout, device, lambda n: None):
        lifted.update(batch, sae.encode_batch(batch, use_mask=False), sae.mask.settings.position_origin)
    return lifted


def _shift(
    sae: SparseAutoencoder,
    data: EvaluationData,
    stored: Mapping[str, _StoredCodes],
    advance: Callable[[int], None],
) -> None:
    """Encode the texts of the shift design, without content that is an attention sink in any window."""
    device, n_texts = _statistics_device(sae.encoder.device), data.settings.shift_texts
    length = tokens.shift_length(data.n_positions, data.settings.shift_windows)

    def content_of(batch: Batch) -> Tensor:
        return batch.text.long() * length + (batch.position.long() - 1) % length

    sunk = torch.zeros(n_texts * length, dtype=torch.bool, device=device)
    sunk[content_of(data.shift.sinks.to(device))] = True
    for mask, codes in stored.items():
        for batch in _kept_batches(data.shift, device, advance):
            seen = batch.select(~sunk[content_of(batch)])
            codes.shift.add(seen, sae.encode_batch(seen, use_mask=mask == "on"))


def _in_model(
    sae: SparseAutoencoder, window_mass: WindowMass, data: EvaluationData, advance: Callable[[int], None]
) -> list[Measure]:
    n_windows = data.settings.causal_windows

    def reconstruct(batch: Batch, context: Tensor) -> Tensor:
        return sae.decode_batch(sae.encode_batch(batch), batch)

    replacements, of_latents = [reconstruct], []
    try:
        replacements += [without_latents(sae, chosen) for chosen in window_mass.specialized()]
    except DegenerateResult as error:
        of_latents = missing(str(error), ["causal_specificity"])
    clean, reconstructed, *ablated = data.in_model.losses(replacements, advance)
    if ablated:
        of_latents = causal(clean, *ablated, n_windows=n_windows, n_positions=data.n_positions)
    return recovered(data.in_model.references, reconstructed) + of_latents


def _order(
    sae: SparseAutoencoder,
    controls: Mapping[str, Control],
    task: OrderTask,
    activations: Activations,
    data: EvaluationData,
    facts: LatentFacts,
    advance: Callable[[int], None],
) -> list[Measure]:
    measures: list[Measure] = []
    further = data.settings.order_poolings if sae.mask.settings.kind == "open" else ()
    classes = order_probes.positives(task)
    names = [_probe_name(task.name, number, len(classes)) for number in classes]
    learned = TextCodes(activations.n_texts, sae.d_sae) if ATTENTION in further else None
    fixed = [name for name in further if name not in LEARNED_POOLINGS]
    for name, texts in _pooled(sae, controls, activations, data, fixed, advance, learned).items():
        on_fit = _record_probes(facts, name, data.settings.ks, names)
        measures += order_probes.order_accuracy(
            task, texts, data.settings.ks, name, permutations=name not in controls, on_fit=on_fit
        )
        if name in _PROBED_ON_ALL:
            measures += order_probes.order_accuracy_of_all(task, texts, name)
        if CHOSEN in further:
            measures += order_probes.validation_accuracy(task, texts, data.settings.ks, name)
    if learned is not None:
        measures += order_probes.attention_accuracy(task, learned)
    return order_probes.with_chosen(measures) if CHOSEN in further else measures


def _probe_name(task: str, positive: int, n_probes: int) -> str:
    return task if n_probes == 1 else f"{task}: {positive + 1}"


def _record_probes(facts: LatentFacts, pooling: str, ks: tuple[int, ...], names: list[str]) -> OnFit:
    """Callback that adds the first probes of mean-pooled codes to `facts`, at the largest k of at most MOST_PROBED."""
    recorded_k = max((k for k in ks if k <= MOST_PROBED), default=min(ks))

    def record(k: int, latents: Tensor, weights: Tensor) -> None:
        if pooling == "mean" and k == recorded_k:
            for name, chosen, weight in zip(names, latents, weights, strict=False):
                facts.add_probe(name, chosen, weight)

    return record


def _topics(
    sae: SparseAutoencoder,
    controls: Mapping[str, Control],
    dataset: datasets.ProbeDataset,
    activations: Activations,
    data: EvaluationData,
    facts: LatentFacts,
    streams: Mapping[str, torch.Generator],
    advance: Callable[[int], None],
) -> list[Measure]:
    measures = []
    names = [f"{dataset.name}: {label}" for label in dataset.classes]
    for name, texts in _pooled(sae, controls, activations, data, (), advance).items():
        measures += datasets.probe_accuracy(
            dataset,
            texts,
            data.settings.ks,
            source="sae",
            pooling=name,
            protocol=data.settings.probe_protocol,
            on_all=name == "mean",
            random=streams[name],
            on_fit=_record_probes(facts, name, data.settings.ks, names),
        )
    return measures


def _pooled(
    sae: SparseAutoencoder,
    controls: Mapping[str, Control],
    activations: Activations,
    data: EvaluationData,
    further: Sequence[str],
    advance: Callable[[int], None],
    of_tokens: TextCodes | None = None,
) -> dict[str, PooledTexts]:
    """The codes of each text by name of the pooling: `mean`, further ones, `fair` where it differs, and controls.

    The codes of the texts' tokens are added to `of_tokens`.
    """
    device, n_texts = _statistics_device(sae.encoder.device), activations.n_texts

    def pooling(name: str, n_latents: int = sae.d_sae, **options: Any) -> Pooling:
        return Pooling(name, n_texts, n_latents, data.n_positions, device=device, **options)

    own = {name: pooling(name) for name in ("mean", *further)}
    live = (sae.mask.openness().detach() > 0).float()
    if sae.mask.gates_code() and not bool((live == 1).all()):
        own["fair"] = pooling("fair", live=live, position_origin=sae.mask.settings.position_origin)
    of_controls = {name: pooling("mean", control.d_sae) for name, control in controls.items()}
    for batch in _kept_batches(activations, device, advance):
        codes = sae.encode_batch(batch)
        for each in own.values():
            each.update(batch, codes)
        if of_tokens is not None:
            of_tokens.update(batch, codes)
        for name, control in controls.items():
            of_controls[name].update(batch, control.encode(batch))
    return {name: each.texts for name, each in (own | of_controls).items()}


def unmasked_label(label: str) -> str:
    """Return the name of the SAE that `forgetting` trains."""
    return f"{label} without its mask"


@_memory
def forgetting(
    sae: SparseAutoencoder, data: EvaluationData, settings: TrainingSettings, seed: int, label: str
) -> list[Measure]:
    """Measure `retention` by `after`: how specialization fades when training continues without the mask.

    A copy of the SAE with every latent open is trained from fresh Adam moments at the original learning rate, with
    the same warmup and then constant. The positions of each latent are those from before this training.

    Args:
        settings: of the SAE's training.
        seed: of the batch order.
        label: name of the cell, for the progress bar.

    Raises:
        DegenerateResult: training fails.
    """
    steps = {round(share * settings.n_steps): float(share) for share in data.settings.forgetting_fractions}
    open_sae = without_mask(sae).to(sae.encoder.device)
    before = _position_mass(open_sae, data)
    special = special_positions(before, sae.mask.bound_positions(), data.settings.retention_positions)
    measures: list[Measure] = []

    def add_retention(mass: PositionMass, after: float) -> None:
        compute = partial(retention, after=after)
        measures.extend(measured(_RETENTION, compute, mass, special, slices=[{"after": f"{after:g}"}]))

    def measure_retention(done: int) -> None:
        if done in steps:
            add_retention(_position_mass(open_sae, data), steps[done])

    if 0 in steps:
        add_retention(before, 0.0)

    continued = settings.model_copy(update={"n_steps": max(steps), "decay_fraction": 0.0})
    batches = training_batches(
        data.training,
        continued.batch_tokens,
        continued.n_steps,
        seed,
        pairs=open_sae.rule.pairs_tokens,
        device=open_sae.encoder.device,
    )
    loop.train(open_sae, batches, continued, unmasked_label(label), measure_retention)
    return measures


@_memory
def baselines(data: EvaluationData) -> list[Measure]:
    """Measures that need no SAE: the model's losses and vectors, probes on its channels, and order tasks without order.

    Raises:
        BadSetting: the groups of an order task do not have equal token counts.
    """
    measures = data.in_model.reference_measures()
    device = _statistics_device(data.load_model().device)
    mean, _ = data.heldout.center_and_scale
    batches = _kept_batches(data.heldout, device, lambda n: None)
    measures += stream_measures(batches, mean.to(device), data.n_positions)
    with progress_bar(stage_label("evaluate", MODEL_LABEL), data.n_probed_tokens, "tokens") as advance:
        for task, activations in data.order.values():
            measures += order_probes.bag_accuracy(task, data.tokenizer) + order_probes.edge_accuracy(
                task, data.tokenizer
            )
            for name, texts in _pooled_vectors(("mean", "last", "moment"), activations, data, advance).items():
                measures += order_probes.order_accuracy(task, texts, data.settings.ks, name)
                measures += order_probes.order_accuracy_of_all(task, texts, name)
        random = torch.Generator().manual_seed(datasets.SAEBENCH_SEED)
        for dataset, activations in data.probes.values():
            measures += datasets.probe_accuracy(
                dataset,
                _pooled_vectors(["mean"], activations, data, advance)["mean"],
                data.settings.ks,
                source="llm",
                protocol=data.settings.probe_protocol,
                random=random,
            )
    return measures


def _pooled_vectors(
    names: Sequence[str], activations: Activations, data: EvaluationData, advance: Callable[[int], None]
) -> dict[str, PooledTexts]:
    """The model's own channels of each text in these poolings."""
    device = _statistics_device(data.load_model().device)
    poolings = {
        name: Pooling(name, activations.n_texts, activations.d_model, data.n_positions, device=device) for name in names
    }
    for batch in _kept_batches(activations, device, advance):
        for pooling in poolings.values():
            pooling.update(batch, None)
    return {name: pooling.texts for name, pooling in poolings.items()}
