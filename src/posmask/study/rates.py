"""What one of everything costs on this machine: rates, measured by running a little of everything as a study does."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from posmask import masks
from posmask.data import models, sites
from posmask.data.activations import Activations, Batch, evaluation_batches, training_batches
from posmask.data.harvest import harvest
from posmask.data.tokens import Tokens, growing_segments
from posmask.errors import BadSetting, DegenerateResult
from posmask.evaluation.downstream import InModel, WindowMass
from posmask.evaluation.position import PositionInformation
from posmask.evaluation.reconstruction import Reconstruction
from posmask.evaluation.retention import PositionMass, profile_fidelity, retention, special_positions
from posmask.kernels import runtime
from posmask.masks.base import MaskSettings
from posmask.probing import datasets
from posmask.probing.order_probes import order_accuracy
from posmask.probing.order_tasks import OrderTask
from posmask.probing.pooling import PooledTexts, Pooling
from posmask.progress import progress_bar
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.seeds import generator
from posmask.study.harvests import Source
from posmask.study.machines import DISK_RATE, Machine
from posmask.study.settings import CellSettings, StudySettings
from posmask.training import loop

__all__ = ["FREE", "Linear", "Rates", "Shape", "lifts", "measure", "n_segments", "precision_of", "shape_of"]


@dataclass(frozen=True)
class Linear:
    """Seconds that grow in a straight line with n."""

    fixed: float
    each: float

    def at(self, n: float) -> float:
        return self.fixed + self.each * n

    @classmethod
    def through(cls, less: tuple[float, float], more: tuple[float, float]) -> "Linear":
        """Through two measured points (n, seconds); in proportion to n where they would cross 0 elsewhere."""
        (n, seconds), (n_more, seconds_more) = less, more
        each = max(0.0, (seconds_more - seconds) / (n_more - n)) if n_more > n else 0.0
        each = min(each, seconds_more / n_more)
        return cls(seconds_more - each * n_more, each)


@dataclass(frozen=True)
class Shape:
    """What the cost of a step and of a code depends on, beside the settings that all cells share."""

    mask: MaskSettings
    width: int

    @property
    def opened(self) -> "Shape":
        """The same with every latent open everywhere: its mask lifted."""
        return replace(self, mask=masks.mask_settings({"kind": "open", "coordinate": self.mask.coordinate}))


@dataclass(frozen=True)
class Rates:
    """What one of everything costs on this machine, in seconds.

    A width is a number of latents, or of features of a pooled text, which are more where segments are pooled apart.
    """

    below: float
    """A token: through the model up to the layer, and written to disk."""
    above: float
    """A token: its vector replaced, through the layers above and the head, its predictions compared."""
    training: Mapping[Shape, Linear]
    """A training, by its steps."""
    encode: Mapping[Shape, float]
    """A token's codes, as the trained SAE is used."""
    closing: frozenset[Shape]
    """Shapes whose mask ends with closed latents: their texts are pooled fairly too."""
    count: Linear
    """A held-out token's codes, entered into what reconstruction and ties to positions come from, by width."""
    conclude: Linear
    """What is computed from that at the end, by width."""
    pool: Linear
    """A text pooled, by width."""
    order_probes: Linear
    """An order task's probes and their controls, for one class, by width."""
    topic_probes: Linear
    """A dataset's k-sparse probes, for one class, by width."""
    full_probe: Linear
    """The probe on all features, for one class, by width."""
    assumptions: tuple[str, ...] = ()


def shape_of(study: StudySettings, cell: CellSettings) -> Shape:
    return Shape(cell.mask, study.width(cell))


def lifts(cell: CellSettings) -> bool:
    """Whether evaluation encodes some tokens a second time, with the mask lifted."""
    return cell.mask.kind != "open" and cell.mask.apply == "forward"


def n_segments(study: StudySettings) -> tuple[int, int]:
    """How many segments the unmasked SAE's codes are pooled in, in either way."""
    return study.evaluation.order_segments, int(growing_segments(study.corpus.n_positions)[-1]) + 1


def precision_of(study: StudySettings) -> runtime.Precision:
    return runtime.fast_precision(study.device) if study.model.precision == "auto" else study.model.precision


_NOTHING = Linear(0.0, 0.0)
FREE = Rates(0.0, 0.0, {}, {}, frozenset(), _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)
_BATCH_TOKENS = 4096
_SECONDS_OF_MODEL = 5.0  # at most, with whole batches
_SECONDS_OF_STEPS = 24.0  # at most, all shapes together
_STEPS = 12
_ACTIVE = 50
_MOST_GROUPS, _MOST_PROBE_TEXTS = 200, 400
_SECONDS_A_RATE = 0.1


def measure(
    study: StudySettings,
    cells: Sequence[CellSettings],
    outline: sites.LanguageModel,
    text_tokens: int,
    machine: Machine | None = None,
) -> Rates:
    """What one of everything costs here, in about half a minute; more where dictionaries are wide. Downloads nothing.

    Everything runs as in a study, on random vectors but for the model itself.

    Args:
        cells: those whose shapes are to be measured.
        outline: the model without its weights.
        text_tokens: how many kept tokens a text has that is pooled for probes.
        machine: whose model passes, steps and codes to take, by its rates; what stays on the host is measured here.
    """
    runtime.keep_freed_memory()
    shapes = {shape_of(study, cell) for cell in cells}
    opened = {shape_of(study, cell).opened for cell in cells if cell.decay or lifts(cell)}
    trained = shapes | {shape_of(study, cell).opened for cell in cells if cell.decay}
    widths = [shape.width for shape in shapes]
    features = [outline.d_model, *widths]
    features += [shape.width * n for shape in shapes if shape.mask.kind == "open" for n in n_segments(study)]
    steps, encode, closing = {}, {}, set()
    n_parts = len(trained | opened) + 5
    with tempfile.TemporaryDirectory() as temporary, progress_bar("measure costs", n_parts, "parts") as advance:
        if machine is None:
            below, above, said = _model_seconds(study, outline, Path(temporary) / "model")
        else:
            below, above, said = _elsewhere(study, outline, machine)
        vectors = _noise(study, outline, Path(temporary) / "noise")
        advance(1)
        if machine is not None:
            reading = _reading_seconds(vectors)
            for shape in trained | opened:
                steps[shape], encode[shape] = _shape_elsewhere(study, shape, outline.d_model, machine, reading)
            closing = {shape for shape in trained if shape.mask.kind != "open" and shape.mask.apply == "forward"}
            trained, opened = set(), set()
        for shape in trained:
            sae, steps[shape] = _training_seconds(study, shape, vectors, _SECONDS_OF_STEPS / len(trained))
            encode[shape] = _encoding_seconds(sae, vectors)
            if sae.mask.gates_code() and not bool((sae.mask.openness() > 0).all()):
                closing.add(shape)
            advance(1)
        for shape in opened - trained:
            encode[shape] = _encoding_seconds(_make_sae(study, shape, vectors.d_model), vectors)
            advance(1)

        def by_width(some: Sequence[int], seconds: Callable[[int], Sequence[float]]) -> list[Linear]:
            found = []
            for width in (min(some), max(some)):
                found.append((width, seconds(width)))
                advance(1)
            (less, ours), (more, theirs) = found
            return [Linear.through((less, one), (more, other)) for one, other in zip(ours, theirs, strict=True)]

        count = conclude = _NOTHING
        if widths:
            count, conclude = by_width(widths, lambda width: _accounting_seconds(study, width, vectors))
        pool, *probes = by_width(features, lambda width: _probing_seconds(study, width, text_tokens))
        order_probes, topic_probes, full_probe = probes
    by_widths = count, conclude, pool, order_probes, topic_probes, full_probe
    return Rates(below, above, steps, encode, frozenset(closing), *by_widths, said)


def _model_seconds(
    study: StudySettings, outline: sites.LanguageModel, folder: Path
) -> tuple[float, float, tuple[str, ...]]:
    """(below, above, what is to be said of them); from floating-point operations where the weights are not here."""
    name, n_positions, precision = study.model.name, study.corpus.n_positions, precision_of(study)
    try:
        if name == models.EMBEDDED_MODEL and not models.is_embedded_here():
            raise BadSetting(f"{name} is not here")
        layer, site = Source(study.model, study.device).layer, study.model.site
        loaded = models.load_model(name, layer, precision, site=site, device=study.device, local_only=True)
    except BadSetting:
        rate = runtime.product_rate(precision)
        below, above = (2 * n / rate for n in outline.n_parameters())
        said = "The model's weights are not here: at least 2 operations a parameter and token, at the rate of products."
        return below, above, (said,)

    def seconds(name: str, n_contexts: int) -> float:
        tokens = _random_tokens(n_contexts, n_positions, outline.n_vocabulary)
        started = time.perf_counter()
        harvest(tokens, loaded, folder / name, {"name": name}, "random tokens")
        return (time.perf_counter() - started) / tokens.id.numel()

    n_contexts = 2 * max(1, _BATCH_TOKENS // n_positions)
    first = seconds("first", 2)
    below = seconds("more", n_contexts if first * n_contexts * n_positions < _SECONDS_OF_MODEL else 2)
    in_model = InModel(loaded, Activations(folder / "first"), 2)

    def zeros(batch: Batch, context: Tensor) -> Tensor:
        return torch.zeros_like(batch.vectors)

    above = _seconds(lambda: in_model.losses([zeros] * 3)) / (3 * in_model.n_tokens)
    return below, above, ()


def _elsewhere(
    study: StudySettings, outline: sites.LanguageModel, machine: Machine
) -> tuple[float, float, tuple[str, ...]]:
    """(below, above, what is to be said) of the model on another machine."""
    precision = precision_of(study)
    below, above = (machine.pass_seconds(n, precision) for n in outline.n_parameters())
    n_bytes = 2 if precision == "bfloat16" else 4
    logits = _PASSES_OVER_LOGITS * 4 * outline.n_vocabulary / (machine.bandwidth * machine.bandwidth_share)
    held = n_bytes * sum(outline.n_parameters()) + _LOGITS_HELD * study.corpus.n_positions * outline.n_vocabulary * 4
    return (
        below + n_bytes * outline.d_model / DISK_RATE,
        above + logits,
        (
            machine.sentence(),
            f"On it: some {held / 1e9:.0f} GB of weights and logits, beside the SAE's.",
            f"Vectors are written at {DISK_RATE / 1e9:.0f} GB/s. Probing, pooling and counting stay on the host's "
            "processor, which is taken to be as fast as this one.",
        ),
    )


_PASSES_OVER_LOGITS, _LOGITS_HELD = 10, 10  # softmax, entropy and divergence; five tables of two contexts


def _shape_elsewhere(
    study: StudySettings, shape: Shape, d_model: int, machine: Machine, reading: float
) -> tuple[Linear, float]:
    """(trainings by their steps, a token's codes) on another machine; learned masks as they start.

    Args:
        reading: seconds in which the host reads a token's vector.
    """
    mask = masks.make_mask(shape.mask, study.corpus.n_positions, shape.width)
    n_live = float(mask.live()[1:].sum(1).mean())
    k = getattr(study.sae.rule, "k", None)
    tokens = study.training.batch_tokens
    precision = "bfloat16" if study.training.precision == "auto" else study.training.precision
    step = machine.step_seconds(d_model, shape.width, n_live, k, tokens, precision)
    encode = machine.encode_seconds(d_model, n_live, k or _ACTIVE, "float32")
    return Linear(0.0, step + tokens * reading), encode + reading


def _reading_seconds(vectors: Activations) -> float:
    """A token's, in random order."""
    index = torch.randperm(vectors.n_tokens, generator=generator(0, "plan"))
    return _seconds(lambda: vectors.batch(index)) / len(index)


def _random_tokens(n_contexts: int, n_positions: int, n_vocabulary: int) -> Tokens:
    """Contexts of BOS and one text each."""
    shape = n_contexts, n_positions
    position = torch.arange(n_positions).expand(shape).contiguous()
    keep = position > 0
    text = torch.where(keep, torch.arange(n_contexts)[:, None], -1)
    ids = torch.randint(n_vocabulary, shape, generator=generator(0, "plan"))
    return Tokens(ids, position, text, keep, (position + 19) % 20 + keep, position, (n_positions - position) * keep)


class _Noise(sites.LanguageModel):
    """Stands in for a model: vectors of its size, at no cost."""

    def __init__(self, d_model: int, precision: runtime.Precision) -> None:
        self.d_model = d_model
        self._dtype = getattr(torch, precision)
        self._random = generator(0, "plan")

    def check_length(self, n_positions: int) -> None:
        pass

    def vectors(self, ids: Tensor) -> Tensor:
        return torch.randn(*ids.shape, self.d_model, generator=self._random).to(self._dtype)


def _noise(study: StudySettings, outline: sites.LanguageModel, folder: Path) -> Activations:
    """Two evaluation batches of random vectors, enough for a training batch too."""
    n_positions = study.corpus.n_positions
    tokens = _random_tokens(2 * max(1, _BATCH_TOKENS // n_positions), n_positions, outline.n_vocabulary)
    stand_in = _Noise(outline.d_model, precision_of(study))
    return harvest(tokens, stand_in, folder, {"noise": True}, "noise", study.model.stored)


def _make_sae(study: StudySettings, shape: Shape, d_model: int) -> SparseAutoencoder:
    mask = masks.make_mask(shape.mask, study.corpus.n_positions, shape.width)
    return SparseAutoencoder(d_model, study.sae.rule, mask)


def _training_seconds(
    study: StudySettings, shape: Shape, vectors: Activations, budget: float
) -> tuple[SparseAutoencoder, Linear]:
    """An SAE after a few steps, and what trainings cost by their steps.

    Steps are timed on at most 4,096 tokens, or on a quarter of them where they take long; what steps of the study's
    batches cost lies on the line through these and steps of half as many.

    Args:
        budget: seconds that may be spent.
    """
    batch_tokens = study.training.batch_tokens
    n_tokens = min(batch_tokens, _BATCH_TOKENS)

    def steps(sae: SparseAutoencoder, n_steps: int, n_tokens: int) -> list[float]:
        changes = {"n_steps": n_steps, "batch_tokens": n_tokens, "learning_rate": 1e-6}  # as dear as any
        settings = study.training.model_copy(update=changes)
        batches = training_batches(vectors, n_tokens, n_steps, seed=0)
        moments = [time.perf_counter()]
        with contextlib.suppress(DegenerateResult):  # So early, and on noise, an SAE may explain nothing.
            loop.train(sae, batches, settings, "a shape", lambda done: moments.append(time.perf_counter()))
        return [after - before for before, after in pairwise(moments)]

    n_half = -(-n_tokens // 2)
    half = min(steps(_make_sae(study, shape, vectors.d_model), 3, n_half)[1:])
    if 2 * half * _STEPS > budget:
        n_tokens = -(-n_tokens // 4)
    sae = _make_sae(study, shape, vectors.d_model)
    times = steps(sae, _STEPS, n_tokens)
    # Masks change in training, so the mean over its thirds; but what happens now and then is none of a step's time.
    thirds = [times[n : n + _STEPS // 3] for n in range(0, len(times), _STEPS // 3)]
    step = statistics.mean(statistics.median_low(some) for some in thirds)
    once = max(0.0, sum(times) - len(times) * step)
    if n_tokens < batch_tokens:
        step = Linear.through(*sorted([(n_half, half), (n_tokens, step)])).at(batch_tokens)
    return sae, Linear(once, step)


def _encoding_seconds(sae: SparseAutoencoder, vectors: Activations) -> float:
    """A token's, batches read as in an evaluation."""
    if sae.rule.training_choice() is None:
        _settle(sae, vectors)

    def encode() -> None:
        kept = next(evaluation_batches(vectors)).kept()
        sae.sparse_encode(kept.vectors, kept.counted(sae.mask.settings.coordinate))

    return _seconds(encode) / len(next(evaluation_batches(vectors)).kept())


@torch.no_grad()
def _settle(sae: SparseAutoencoder, vectors: Activations) -> None:
    """Lower all biases until few latents are active, as training would: some 50 a token."""
    x = sae.normalise(vectors.batch(torch.arange(min(256, vectors.n_tokens))).vectors)
    preactivation = ((x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).flatten()
    sae.encoder_bias.sub_(preactivation.topk(min(len(preactivation), _ACTIVE * len(x))).values[-1])


def _accounting_seconds(study: StudySettings, width: int, vectors: Activations) -> tuple[float, float]:
    """(a token counted, what is computed at the end), as if all latents fired often enough to be judged."""
    n_positions = study.corpus.n_positions
    batch = next(evaluation_batches(vectors)).kept()
    codes = _random_codes(study, len(batch), width)
    reconstruction = Reconstruction(n_positions, vectors.n_texts, torch.zeros(vectors.d_model))
    used, information = PositionMass(n_positions, width), PositionInformation(n_positions, width, vectors.n_texts)
    windows = WindowMass(n_positions, study.evaluation.causal_windows, width)

    def count() -> None:
        reconstruction.update(batch, codes, batch.vectors.float())
        for account in (used, information, windows):
            account.update(batch, codes)

    each = _seconds(count) / len(batch)
    used.firings.fill_(float(used.tokens.sum()) / (2 * used.tokens.numel()))  # each latent on half of the tokens
    openness = torch.ones(n_positions, width)

    def conclude() -> None:
        information.measures(used)
        profile_fidelity(used, openness)
        special = special_positions(used, openness > 0, study.evaluation.retention_positions)
        retention(used, special)

    started = time.perf_counter()
    conclude()
    return each, time.perf_counter() - started


def _random_codes(study: StudySettings, n_tokens: int, width: int) -> Codes:
    random = generator(0, "plan")
    n_active = min(getattr(study.sae.rule, "k", _ACTIVE), width)
    token = torch.arange(n_tokens).repeat_interleave(n_active)
    latent = torch.randint(width, token.shape, generator=random)
    return Codes(token, latent, torch.rand(token.shape, generator=random), n_tokens, width)


def _probing_seconds(study: StudySettings, width: int, length: int) -> tuple[float, float, float, float]:
    """(a text pooled, and for one class an order task's probes, a dataset's, and the one on all features).

    On fewer texts than the study's where it has many: k-sparse probes then cost in proportion, while that on all
    features takes as many steps as before.

    Args:
        length: kept tokens a text.
    """
    ask = study.evaluation
    n_groups, n_test_groups = (min(n, _MOST_GROUPS) for n in (ask.order_train_groups, ask.order_test_groups))
    n_train, n_test = (2 * (min(n, _MOST_PROBE_TEXTS) // 2) for n in (ask.probe_train, ask.probe_test))
    task = OrderTask("plan", 2, ("",) * (2 * (n_groups + n_test_groups)), n_groups, n_test_groups)
    label, is_train = torch.arange(n_train + n_test) % 2, torch.arange(n_train + n_test) < n_train
    dataset = datasets.ProbeDataset("plan", ("0", "1"), ("",) * len(label), label, is_train)
    texts, pool = _pooled(study, len(task.texts) + 2 * n_test_groups, width, length)
    order_probes = _seconds(lambda: order_accuracy(task, texts, ask.ks, "mean"))
    texts, _ = _pooled(study, len(label), width, length)

    def probes(on_all: bool) -> float:
        random = torch.Generator().manual_seed(datasets.SAEBENCH_SEED)
        given = {"source": "sae", "protocol": ask.probe_protocol, "on_all": on_all, "random": random}
        return _seconds(lambda: datasets.probe_accuracy(dataset, texts, ask.ks, **given)) / 2

    k_sparse = probes(on_all=False)
    return (
        pool,
        order_probes * ask.order_train_groups / n_groups,
        k_sparse * ask.probe_train / n_train,
        max(0.0, probes(on_all=True) - k_sparse),
    )


def _pooled(study: StudySettings, n_texts: int, width: int, length: int) -> tuple[PooledTexts, float]:
    """Random texts of that many tokens, pooled in batches as an evaluation does it, and the seconds a text."""
    pooling = Pooling(n_texts, width)
    seconds = []
    for numbers in torch.arange(n_texts).split(max(1, _BATCH_TOKENS // (length + 1))):
        text = numbers.repeat_interleave(length)
        position = 1 + torch.arange(length).repeat(len(numbers))
        batch = Batch(torch.zeros(len(text), 1), position, text, text, text >= 0, position, position, position)
        codes = _random_codes(study, len(text), width)
        started = time.perf_counter()
        pooling.update(batch, codes)
        seconds.append((time.perf_counter() - started) / len(numbers))
    return pooling.texts, statistics.median(seconds)


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, after one to warm up: the median of some, unless they are long."""
    work()
    found = []
    while sum(found) < _SECONDS_A_RATE and len(found) < 5:
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)
