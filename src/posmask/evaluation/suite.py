"""Everything a trained SAE is asked, in the order of the results: one function a question.

An evaluation goes over harvested vectors in batches, encodes them, and hands batch and codes to accumulators; each
accumulator then gives its measures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posmask.data import tokens
from posmask.data.activations import Activations, Batch, evaluation_batches, training_batches
from posmask.data.sites import LanguageModel
from posmask.evaluation.downstream import InModel, WindowMass, causal, recovered, without_latents
from posmask.evaluation.latents import MOST_PROBED, LatentFacts, vocabulary_effects
from posmask.evaluation.position import PositionInformation, ShiftDesign
from posmask.evaluation.reconstruction import Reconstruction, dead_share
from posmask.evaluation.retention import (
    PositionMass,
    mask_measures,
    profile_fidelity,
    retention,
    retention_by_latent,
    special_positions,
)
from posmask.evaluation.settings import EvaluationSettings
from posmask.probing import datasets, order_probes
from posmask.probing.order_tasks import OrderTask
from posmask.probing.pooling import Pooling
from posmask.probing.probes import OnFit
from posmask.progress import progress_bar
from posmask.results.rows import Measure
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.warm_start import without_mask
from posmask.training import loop
from posmask.training.settings import TrainingSettings

__all__ = ["Data", "baselines", "evaluate", "forgetting", "growing_name"]


@dataclass
class Data:
    """Everything that all cells share: harvested vectors, with the tasks they belong to.

    `load_model` gives the language model, for the questions that run it on.
    """

    training: Activations
    heldout: Activations
    shift: Activations
    order: dict[str, tuple[OrderTask, Activations]]
    probes: dict[str, tuple[datasets.ProbeDataset, Activations]]
    tokenizer: tokens.Tokenizer
    n_positions: int
    ask: EvaluationSettings
    load_model: Callable[[], LanguageModel]

    @cached_property
    def in_model(self) -> InModel:
        return InModel(self.load_model(), self.heldout, self.ask.model_contexts)

    @property
    def n_probed_tokens(self) -> int:
        return sum(activations.n_kept for _, activations in [*self.order.values(), *self.probes.values()])


def _kept_batches(activations: Activations, advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in evaluation_batches(activations):
        kept = batch.kept()
        yield kept
        advance(len(kept))


def evaluate(
    sae: SparseAutoencoder, dead: Bool[Tensor, " latent"] | None, data: Data, label: str
) -> tuple[list[Measure], LatentFacts]:
    """Every measure of a trained SAE, but for its decay, and what is to be known of each latent.

    Args:
        dead: which latents were dead at the end of training; None where nobody knows, and then there is no dead share.
    """
    facts = LatentFacts(sae.d_sae)
    in_model = data.in_model  # Loads the model, if it is not there yet, before the bar starts.
    lifted_too = sae.mask.lifting_matters()
    n_tokens = (data.heldout.n_kept + data.shift.n_kept) * (2 if lifted_too else 1) + data.n_probed_tokens
    with progress_bar(f"evaluate {label}", n_tokens + 3 * in_model.n_tokens, "tokens") as advance:
        used, information, to_ablate, found = _heldout(sae, data, facts, advance)
        found += mask_measures(sae.mask) + ([] if dead is None else dead_share(sae, dead))
        found += profile_fidelity(used, sae.mask.openness().detach().cpu())
        lifted = _position_mass(sae, data, advance) if lifted_too else used
        special = special_positions(lifted, sae.mask.bound_positions().cpu(), data.ask.retention_positions)
        found += retention(lifted, special)
        facts.add_positions(used, information, *retention_by_latent(lifted, special), sae.mask.settings.position_origin)
        del used, lifted, special  # 0.3 GB each for 18,432 latents at 128 positions
        found += _shift(sae, data, advance, lifted_too)
        found += _in_model(sae, to_ablate, data, advance)
        found += _order(sae, data, facts, advance)
        found += _topics(sae, data, facts, advance)
    facts.add_effects(*vocabulary_effects(sae, data.load_model()))
    return found, facts


def _heldout(
    sae: SparseAutoencoder, data: Data, facts: LatentFacts, advance: Callable[[int], None]
) -> tuple[PositionMass, Float[Tensor, " latent"], WindowMass, list[Measure]]:
    heldout = data.heldout
    mean, _ = heldout.center_and_scale
    reconstruction = Reconstruction(data.n_positions, heldout.n_texts, mean)
    position_origin = sae.mask.settings.position_origin
    used = PositionMass(data.n_positions, sae.d_sae)
    in_context = used if position_origin == "context" else PositionMass(data.n_positions, sae.d_sae)
    information = PositionInformation(data.n_positions, sae.d_sae, heldout.n_texts)
    to_ablate = WindowMass(data.n_positions, data.ask.causal_windows, sae.d_sae)
    for batch in _kept_batches(heldout, advance):
        codes = sae.encode_batch(batch)
        reconstruction.update(batch, codes, sae.sparse_decode(codes))
        used.update(batch, codes, position_origin)
        if in_context is not used:
            in_context.update(batch, codes)
        information.update(batch, codes)
        facts.update(batch, codes)
        # Latents are chosen on other texts than they are tried on.
        apart = ~torch.isin(batch.text, data.in_model.texts)
        to_ablate.update(batch.select(apart), codes.select(apart))
    found = reconstruction.measures() + information.measures(in_context)
    return used, information.by_latent(in_context), to_ablate, found


def _position_mass(sae: SparseAutoencoder, data: Data, advance: Callable[[int], None]) -> PositionMass:
    """Where latents speak on the held-out texts when the mask is lifted."""
    lifted = PositionMass(data.n_positions, sae.d_sae)
    for batch in _kept_batches(data.heldout, advance):
        lifted.update(batch, sae.encode_batch(batch, use_mask=False), sae.mask.settings.position_origin)
    return lifted


def _shift(sae: SparseAutoencoder, data: Data, advance: Callable[[int], None], lifted_too: bool) -> list[Measure]:
    found = []
    n_texts, n_windows = data.ask.shift_texts, data.ask.shift_windows
    for mask in ("on", "lifted") if lifted_too else ("on",):
        design = ShiftDesign(n_texts, tokens.shift_length(data.n_positions, n_windows), n_windows, sae.d_sae)
        for batch in _kept_batches(data.shift, advance):
            design.update(batch, sae.encode_batch(batch, use_mask=mask == "on"))
        found += design.measures(mask)
    return found


def _in_model(
    sae: SparseAutoencoder, to_ablate: WindowMass, data: Data, advance: Callable[[int], None]
) -> list[Measure]:
    n_windows = data.ask.causal_windows
    special, matched = to_ablate.specialized()

    def reconstruct(batch: Batch, context: Tensor) -> Tensor:
        return sae.sparse_decode(sae.encode_batch(batch))

    clean, reconstructed, without_special, without_matched = data.in_model.losses(
        [reconstruct, without_latents(sae, special), without_latents(sae, matched)], advance
    )
    return recovered(data.in_model.references, reconstructed) + causal(
        clean, without_special, without_matched, n_windows, data.n_positions
    )


def _order(sae: SparseAutoencoder, data: Data, facts: LatentFacts, advance: Callable[[int], None]) -> list[Measure]:
    found = []
    for task, activations in data.order.values():
        n_texts = activations.n_texts
        poolings = _poolings(sae, n_texts)
        if sae.mask.settings.kind == "open":
            n_segments = data.ask.order_segments
            for name, segments in (
                (f"segments{n_segments}", tokens.equal_segments(data.n_positions, n_segments)),
                (growing_name(data.n_positions), tokens.growing_segments(data.n_positions)),
            ):
                poolings[name] = Pooling(n_texts, sae.d_sae, segment_of_position=segments)
        _pool(sae, activations, poolings, advance)
        for name, pooling in poolings.items():
            classes = order_probes.positives(task)
            told = _told(facts, name, data.ask.ks, [_probe_name(task.name, number, len(classes)) for number in classes])
            found += order_probes.order_accuracy(task, pooling.texts, data.ask.ks, name, told)
    return found


def _probe_name(task: str, positive: int, n_probes: int) -> str:
    return task if n_probes == 1 else f"{task}: {positive + 1}"


def _told(facts: LatentFacts, pooling: str, ks: tuple[int, ...], names: list[str]) -> OnFit:
    """Hands the first probes of mean-pooled codes on, those on as many latents as tell something of each."""
    told_k = max((k for k in ks if k <= MOST_PROBED), default=min(ks))

    def told(k: int, latents: Tensor, weights: Tensor) -> None:
        if pooling == "mean" and k == told_k:
            for name, chosen, weight in zip(names, latents, weights, strict=False):
                facts.add_probe(name, chosen, weight)

    return told


def growing_name(n_positions: int) -> str:
    """What pooling in growing segments is called in slices, such as `growing7`."""
    return f"growing{int(tokens.growing_segments(n_positions).max()) + 1}"


def _topics(sae: SparseAutoencoder, data: Data, facts: LatentFacts, advance: Callable[[int], None]) -> list[Measure]:
    found = []
    streams = {name: torch.Generator().manual_seed(datasets.SAEBENCH_SEED) for name in ("mean", "fair")}
    for dataset, activations in data.probes.values():
        poolings = _poolings(sae, len(dataset.texts))
        _pool(sae, activations, poolings, advance)
        for name, pooling in poolings.items():
            found += datasets.probe_accuracy(
                dataset,
                pooling.texts,
                data.ask.ks,
                source="sae",
                pooling=name,
                protocol=data.ask.probe_protocol,
                on_all=name == "mean",
                random=streams[name],
                on_fit=_told(facts, name, data.ask.ks, [f"{dataset.name}: {label}" for label in dataset.classes]),
            )
    return found


def _poolings(sae: SparseAutoencoder, n_texts: int) -> dict[str, Pooling]:
    """Mean pooling, and position-fair pooling where it differs."""
    poolings = {"mean": Pooling(n_texts, sae.d_sae)}
    live = (sae.mask.openness().detach().cpu() > 0).float()
    if sae.mask.gates_code() and not bool((live == 1).all()):
        poolings["fair"] = Pooling(n_texts, sae.d_sae, live=live, position_origin=sae.mask.settings.position_origin)
    return poolings


def _pool(
    sae: SparseAutoencoder | None,
    activations: Activations,
    poolings: dict[str, Pooling],
    advance: Callable[[int], None],
) -> None:
    """Encode once, pool in every way. Without an SAE the model's own channels are pooled."""
    for batch in _kept_batches(activations, advance):
        codes = None if sae is None else sae.encode_batch(batch)
        for pooling in poolings.values():
            pooling.update(batch, codes)


def forgetting(sae: SparseAutoencoder, data: Data, settings: TrainingSettings, seed: int, label: str) -> list[Measure]:
    """`retention` by `after`: how specialization fades when training goes on without the mask.

    A copy of the SAE with every latent open is trained on from fresh Adam moments at the original learning rate,
    warmed up as before and then constant. Latents keep the positions they had at the start.
    """
    steps = {round(share * settings.n_steps): float(share) for share in data.ask.forgetting_fractions}
    open_sae = without_mask(sae).to(sae.encoder.device)
    before = _position_mass(open_sae, data, lambda n: None)
    special = special_positions(before, sae.mask.bound_positions().cpu(), data.ask.retention_positions)
    found = retention(before, special, after=0.0) if 0 in steps else []

    def measure(done: int) -> None:
        if done in steps:
            mass = _position_mass(open_sae, data, lambda n: None)
            found.extend(retention(mass, special, after=steps[done]))

    on = settings.model_copy(update={"n_steps": max(steps), "decay_fraction": 0.0})
    batches = training_batches(data.training, on.batch_tokens, on.n_steps, seed)
    loop.train(open_sae, batches, on, f"{label} without its mask", measure)
    return found


def baselines(data: Data) -> list[Measure]:
    """What needs no SAE: probes on the model's own channels, and what order tasks give away without order."""
    found = data.in_model.reference_measures()
    with progress_bar("evaluate the model itself", data.n_probed_tokens, "tokens") as advance:
        for task, activations in data.order.values():
            found += order_probes.bag_accuracy(task, data.tokenizer) + order_probes.edge_accuracy(task, data.tokenizer)
            n_texts, d_model = activations.n_texts, activations.d_model
            poolings = {"mean": Pooling(n_texts, d_model), "last": Pooling(n_texts, d_model, last_token_only=True)}
            _pool(None, activations, poolings, advance)
            for name, pooling in poolings.items():
                found += order_probes.order_accuracy(task, pooling.texts, data.ask.ks, name)
        random = torch.Generator().manual_seed(datasets.SAEBENCH_SEED)
        for dataset, activations in data.probes.values():
            pooling = Pooling(len(dataset.texts), activations.d_model)
            _pool(None, activations, {"mean": pooling}, advance)
            found += datasets.probe_accuracy(
                dataset,
                pooling.texts,
                data.ask.ks,
                source="llm",
                protocol=data.ask.probe_protocol,
                random=random,
            )
    return found
