"""Estimate what a study costs before it runs: tokens, time, disk and memory.

Seconds are counts, which follow from the settings, times rates: operations and bytes over what this machine was
measured to do in at most 20 seconds, or over the published rates of a GPU. docs/planning.md has the formulas and their
measured accuracy.
"""

import contextlib
import statistics
import time
import timeit
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from posmask.data import models, sites
from posmask.data.activations import Batch, bytes_per_token
from posmask.data.embedded_models import embedded_model
from posmask.data.harvest import sink_sentence
from posmask.data.tokens import shift_length
from posmask.errors import BadSetting, DegenerateResult
from posmask.evaluation.settings import LEARNED_POOLINGS, may_have_controls
from posmask.evaluation.stored_codes import LATENTS_PER_BLOCK, MOST_BYTES_IN_MEMORY
from posmask.kernels import cpu, devices, runtime
from posmask.masks.base import PositionMask
from posmask.probing import datasets
from posmask.probing.order_tasks import ORDER_TASKS
from posmask.probing.pooling import n_parts
from posmask.progress import announce, shown_by
from posmask.results.table import MODEL_LABEL
from posmask.sae.rules import RULES, make_rule
from posmask.seeds import generator
from posmask.storage import layout
from posmask.study.harvests import Harvest, HarvestKind, harvests
from posmask.study.saes import make_sae
from posmask.study.settings import CellSettings, StudySettings
from posmask.study.source import Source, texts_identity
from posmask.study.targets import cell_states
from posmask.training import loop
from posmask.training.settings import product_precision

__all__ = ["DISK_RATE", "GPUS", "Line", "Machine", "Plan", "Rates", "Shape", "Stage", "gpu_named", "measure", "plan"]

Stage = Literal["harvest", "baselines", "training", "evaluation"]
MEASURING_SECONDS = 20.0
DISK_RATE = 1e9  # bytes per second from and to the disk, for each GPU


@dataclass(frozen=True)
class Machine:
    """Peak operations and bytes per second, the shares of them that are reached (assumed of GPUs), seconds per step."""

    name: str
    product_rates: Mapping[str, float]
    bandwidth: float
    source: str
    model_share: float = 0.4
    product_share: float = 0.5
    bandwidth_share: float = 0.5
    overhead: float = 5e-3
    transfer: float | None = 12e9  # from the host: half of PCIe 4 x16; None where it is the host

    def pass_seconds(self, n_parameters: float, precision: str) -> float:
        """One token through `n_parameters` of a model: 2 operations per parameter."""
        return 2 * n_parameters / (self.product_rates[precision] * self.model_share)

    def step_parts(
        self, d_model: int, d_sae: float, n_live: float, n_active: float | None, batch_tokens: float, precision: str
    ) -> dict[str, float]:
        """Seconds of a training step by part, with `n_live` latents open at a position and `n_active` codes per token.

        `n_active` is None for a rule without k, whose reconstruction and gradients are products too.
        """
        n_products = 4 if n_active is None else 1
        product = n_products * 2 * d_model * n_live / (self.product_rates[precision] * self.product_share)
        # Pre-activations are written and read; rows of active codes are read 5 times. Adam reads 4 and writes 3 tables.
        moved = _FLOAT * (2 * n_live + 5 * (n_active or 0) * d_model)
        rate = self.bandwidth * self.bandwidth_share
        return {
            "products": batch_tokens * product,
            "codes": batch_tokens * moved / rate,
            "Adam": _FLOAT * 7 * 2 * d_sae * d_model / rate,
            "host": batch_tokens * _FLOAT * d_model / self.transfer if self.transfer else 0.0,
            "overhead": self.overhead,
        }

    def sentence(self) -> str:
        peak = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.product_rates.items())
        shares = f"{self.model_share:.0%} reached in the model, {self.product_share:.0%} in an SAE's products"
        return (
            f"{self.name}: {peak}, {self.bandwidth / 1e9:,.0f} GB/s ({self.source}), of which {shares} and "
            f"{self.bandwidth_share:.0%} of the memory's rate: assumed, not measured."
        )


_FLOAT = 4
GPUS = {
    name: Machine(title, {"bfloat16": bfloat16, "float32": float32}, bandwidth, f"NVIDIA {source}")
    for name, title, bfloat16, float32, bandwidth, source in (
        # Dense products with float32 sums, without TF32, as posmask's own products are.
        ("a100", "A100 80 GB SXM", 312e12, 19.5e12, 2039e9, "A100 datasheet, 2022"),
        ("h100", "H100 SXM", 989e12, 67e12, 3350e9, "H100 datasheet, without sparsity"),
        ("l4", "L4", 121e12, 30.3e12, 300e9, "L4 datasheet, without sparsity"),
        ("rtx4090", "RTX 4090", 165.2e12, 82.6e12, 1008e9, "Ada whitepaper, without sparsity"),
    )
}
CPU_SHARES = (0.65, 0.9, 0.9)  # of a CPU's measured peak rates, fitted on one (docs/planning.md)


def gpu_named(name: str) -> Machine:
    """Raises BadSetting if its rates are unknown."""
    if name not in GPUS:
        raise BadSetting(f"GPU {name!r} is not among those whose rates are known: choose from {', '.join(GPUS)}")
    return GPUS[name]


def this_machine(precisions: Collection[str]) -> Machine:
    """Measure the peak rates of this CPU, in about a second."""
    numbers, copied = torch.ones(2, 8_000_000)
    bandwidth = 2 * numbers.nbytes / min(timeit.repeat(lambda: copied.copy_(numbers), number=1, repeat=5))
    rates = {name: runtime.product_rate(name, n_rows=256) for name in precisions}
    return Machine("this machine", rates, bandwidth, "measured", *CPU_SHARES, overhead=0.0, transfer=None)


class Shape(NamedTuple):
    """How many latents there are, and how many of them are computed for a token, on average over positions."""

    d_sae: int
    n_live: int


def shape_of(mask: PositionMask) -> Shape:
    every = torch.arange(mask.d_sae)
    sizes = [(int((group.positions > 0).sum()), len(every[group.latents])) for group in mask.groups()]  # without BOS
    return Shape(mask.d_sae, round(sum(n * n_live for n, n_live in sizes) / sum(n for n, _ in sizes)))


@dataclass(frozen=True)
class Rates:
    """Seconds per token below and above the site; measured over calculated seconds of steps and of the CPU's work."""

    machine: Machine
    below: float
    above: float
    factor: float = 1.0
    host: float = 1.0
    assumptions: tuple[str, ...] = ()


def measure(
    study: StudySettings,
    cells: Sequence[CellSettings],
    outline: sites.LanguageModel,
    gpu: Machine | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Measure this machine for at most `MEASURING_SECONDS`: the model, a few steps of each of `cells`, host's work."""
    end = clock() + MEASURING_SECONDS
    if cells:
        announce(f"Measuring this machine for at most {MEASURING_SECONDS:.0f} s.")
    runtime.keep_freed_memory()
    precision, host = _model_precision(study), timeit.repeat(_host_work, number=1, repeat=5)
    of_training = {_training_precision(study, cell, on_gpu=False) for cell in cells or study.cells}
    machine = gpu or this_machine({"float32", precision, *of_training})
    below, above = (machine.pass_seconds(n, precision) for n in outline.n_parameters())
    if gpu is not None:
        below += _BYTES[precision] * outline.d_model / DISK_RATE
        above += 10 * 4 * outline.n_vocabulary / (gpu.bandwidth * gpu.bandwidth_share)  # softmax, entropy, divergence
        assumptions = (
            gpu.sentence(),
            f"Vectors are written at {DISK_RATE / 1e9:.0f} GB/s. Probing, pooling and counting take as long as on this "
            "CPU, an upper bound.",
        )
        return Rates(gpu, below, above, 1.0, statistics.median(host) / _HOST_SECONDS, assumptions)
    assumptions = ()
    if (measured := _model_seconds(study, outline, lambda: end - clock())) is None:
        assumptions = (
            "The model was not run (its weights are not here, or too large to load): 2 operations per parameter.",
        )
    elif below:
        below, above = measured, above * measured / below
    factors: list[float] = []
    n_measured = 0
    with shown_by(lambda stage: None):
        for cell in cells if cpu.loops_are_compiled() else ():  # Compiling them would take all the time.
            caution = max(10.0, 2 * statistics.median(factors or [0.0]))
            measured_factors = _step_factors(study, cell, outline.d_model, machine, caution, lambda: end - clock())
            factors, n_measured = factors + measured_factors, n_measured + bool(measured_factors)
            host += timeit.repeat(_host_work, number=1, repeat=2)
    if n_measured < len(cells):
        why = "lack of time" if cpu.loops_are_compiled() else "their loops are not compiled before the first run"
        assumptions += (f"{len(cells) - n_measured} of {len(cells)} kinds of training steps were not measured: {why}.",)
    # Medians, over kinds of steps too: a busy machine takes ten times as long now and then.
    factor, host_factor = statistics.median(factors or [1.0]), statistics.median(host) / _HOST_SECONDS
    return Rates(machine, below, _COMPARED * above, factor, host_factor, assumptions)


_MOST_LOADED_BYTES, _MODEL_SECONDS = 2e9, 4.0  # A model is loaded and run if that takes a few seconds.
_COMPARED = 1.2  # a prediction with its softmax and comparison, over the pass through the layers and the head
_MOST_PASS_TOKENS, _STEP_TOKENS, _N_STEPS = 2048, (4096, 1024, 256), 6
_BYTES = {"bfloat16": 2, "float32": 4}


def _model_precision(study: StudySettings) -> runtime.Precision:
    return runtime.fast_precision(study.device) if study.model.precision == "auto" else study.model.precision


def _model_seconds(study: StudySettings, outline: sites.LanguageModel, left: Callable[[], float]) -> float | None:
    """Seconds per token up to the site, on random tokens; None if the weights are not here or slow to load."""
    name, precision = study.model.name, _model_precision(study)
    if (embedded := embedded_model(name)) is not None and not embedded.is_here:
        return None
    if _BYTES[precision] * sum(outline.n_parameters()) > _MOST_LOADED_BYTES:
        return None
    try:
        site, device = study.model.site, study.device
        loaded = models.load_model(name, outline.layer, precision, site=site, device=device, local_only=True)
    except BadSetting:
        return None
    n_tokens, took, per_token, end = 32, 0.0, [], left() - _MODEL_SECONDS
    while len(per_token) < 2 or (len(per_token) < 8 and left() - took > end):  # The first pass of a size warms up.
        length = min(study.corpus.n_positions, n_tokens)
        ids = torch.randint(loaded.n_vocabulary, (n_tokens // length, length), generator=generator(0, "plan"))
        started = left()
        loaded.vectors(ids).cpu()
        took = started - left()
        per_token.append(took / ids.numel())
        if n_tokens < _MOST_PASS_TOKENS and left() - 4 * took > end:
            n_tokens, per_token = 4 * n_tokens, []
    return statistics.median(per_token[1:])


def _step_factors(
    study: StudySettings, cell: CellSettings, d_model: int, machine: Machine, caution: float, left: Callable[[], float]
) -> list[float]:
    """Measured over calculated seconds of training steps; none if `caution` times these exceed the time left."""
    shape = shape_of(_mask(study, cell))
    sizes = [min(n, study.training.batch_tokens) for n in _STEP_TOKENS]
    calculated = {n: _step_seconds(study, cell, shape, d_model, machine, n) for n in sizes}
    n_tokens = next((n for n in sizes if caution * _N_STEPS * calculated[n] < left()), 0)
    if not n_tokens:
        return []
    number = torch.arange(n_tokens)
    position = 1 + number * (study.corpus.n_positions - 1) // n_tokens  # in order, as in training
    if RULES[study.rule_of(cell).kind].pairs_tokens:
        earlier = position[::2].clamp(max=study.corpus.n_positions - 2)
        position = torch.cat([earlier + 1, earlier])
        number = number % (n_tokens // 2)  # Both tokens of a pair are of one text.
    vectors = torch.randn(n_tokens, d_model, generator=generator(0, "plan"))
    batch = Batch(vectors, position, number, number, number >= 0, position, position, position, position)
    moments = [left()]

    def batches() -> Iterator[Batch]:
        while len(moments) < 3 or (len(moments) <= _N_STEPS and left() > 0):
            yield batch

    settings = study.training.model_copy(update={"batch_tokens": n_tokens})
    sae = make_sae(study, cell, d_model, study.seeds[0]).to(study.device)
    with contextlib.suppress(DegenerateResult):  # After a few steps on noise an SAE may explain nothing.
        loop.train(sae, batches(), settings, "plan", lambda done: moments.append(left()))
    return [(before - after) / calculated[n_tokens] for before, after in pairwise(moments[1:])]


def _mask(study: StudySettings, cell: CellSettings) -> PositionMask:
    """As it is before training."""
    return make_sae(study, cell, 1, study.seeds[0]).mask


def _step_seconds(
    study: StudySettings, cell: CellSettings, shape: Shape, d_model: int, machine: Machine, n_tokens: int
) -> float:
    """Calculated from the machine's peak rates."""
    precision = _training_precision(study, cell, on_gpu=machine.transfer is not None)
    k = getattr(study.rule_of(cell), "k", None)
    return sum(machine.step_parts(d_model, shape.d_sae, shape.n_live, k, n_tokens, precision).values())


def _training_precision(study: StudySettings, cell: CellSettings, *, on_gpu: bool) -> runtime.Precision:
    if on_gpu and study.training.precision == "auto":
        return "bfloat16"
    return product_precision(study.training, make_rule(study.rule_of(cell), study.width(cell)), study.device)


def _host_work() -> None:
    """Like pooling and counting: scattered sums into a large table, and a search for what is not 0."""
    entry = torch.randint(4_000_000, (500_000,), generator=generator(0, "plan"))
    (torch.zeros(4_000_000).index_add_(0, entry, torch.ones(500_000)) / 3).nonzero()


# Seconds on the CPU of docs/planning.md, fitted on one run:
_HOST_SECONDS = 0.0105  # `_host_work`
_COUNT = 3.4e-7  # per held-out token and active code: sums by position, also in 19 null draws
_CONCLUDE = 1e-6  # per position and latent: what is computed from these sums
_POOL = 3.3e-9  # per text and pooled feature
_QUESTION = 9e-5  # per k-sparse probe (question of a task or class of a dataset), pooling and training text
_FULL_PROBE = 1.5e-5  # per class and feature: the probe on all features
_ACTIVE = 50  # codes per token, for rules without k


@dataclass(frozen=True)
class Line:
    """One part of the remaining work: kept tokens, as often as they are harvested, trained on or encoded, all seeds."""

    stage: Stage
    what: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a study still costs. Its folders are one per cell and seed, and the baselines'; memory is the peak."""

    lines: tuple[Line, ...]
    n_folders: int
    n_finished: int
    disk_bytes: int
    memory_bytes: int
    assumptions: tuple[str, ...]

    def seconds(self, stage: Stage | None = None, what: str | None = None) -> float:
        """Of one stage, or of all; of a single cell with all seeds, or of everything."""
        return sum(line.seconds for line in self.lines if stage in (None, line.stage) and what in (None, line.what))

    def harvest_seconds(self, kind: HarvestKind) -> float:
        """Of the harvests of one kind."""
        return self.seconds("harvest", _KINDS[kind])


@dataclass(frozen=True)
class _Set:
    """A folder of harvested vectors; `stored` tokens, including BOS and others not kept, go through the model."""

    kind: str
    kept: int
    stored: int
    n_texts: int
    n_classes: int
    finished: bool
    sinks: str | None = None


_TRAINING, _HELDOUT, _SHIFT = "training texts", "held-out texts", "shift design"
_ORDER, _PROBES = "order tasks", "probe datasets"
_KINDS: dict[HarvestKind, str] = {
    "training": _TRAINING, "heldout": _HELDOUT, "shift": _SHIFT, "order": _ORDER, "probes": _PROBES,
}  # fmt: skip
_TOKENS_PER_TEXT = {
    # Measured with the embedded model's tokenizer in contexts of 512, texts cut to 1,000 characters.
    "topic_permutation": 53, "contrast_order": 21, "chronology": 32, "agreement_swap": 10, "bigram_shift": 30,
    "language_order": 69, "sentence_order": 54, "dialogue_order": 30, "ag_news": 56, "github_code": 312,
    "amazon_sentiment": 174, "occupations_1": 115, "occupations_2": 118, "news_class": 56, "sentence_language": 21,
}  # fmt: skip
_ASSUMPTIONS = (
    "Not included: imports, reading and tokenizing texts, tables and the report; compiling loops on a machine's first "
    "run (20 s); reviving dead latents. Texts that are not harvested yet have as many tokens as with SmolLM2.",
    "Memory: the program, the model, all vectors, logits, and the widest cell's training or evaluation.",
)


def plan(
    study: StudySettings,
    root: Path,
    rates: Rates | None = None,
    gpu: Machine | None = None,
    *,
    measure_steps: bool = True,
) -> Plan:
    """Estimate what remains to be done of a study, and what that costs on this machine, or on a GPU by published rates.

    Args:
        rates: of the machine; None measures them.
        gpu: a GPU with published rates, instead of this machine.
        measure_steps: whether training steps are measured, for up to 20 seconds; without, it takes about five.

    Raises:
        BadSetting: the model's sizes are unknown here, it has no such layer, or it is too short for the contexts.
    """
    if gpu is None:
        devices.check_device(study.device)
    settings, layer = study.model, study.model.layer
    layer = layer if isinstance(layer, int) else Source(settings, study.device).layer
    outline = models.load_outline(settings.name, layer, settings.site, settings.sizes)
    outline.check_length(study.corpus.n_positions)
    (_, baselines), *states = cell_states(study, root)
    left = Counter(layout.parse_cell_label(label)[0] for label, state in states if state != "finished")
    untrained = left - Counter(layout.parse_cell_label(label)[0] for label, state in states if state == "trained")
    n_left = left.total() + (baselines != "finished")
    sets = _sets(study, root)
    missing = [harvest for harvest in sets if n_left and not harvest.finished]
    cells = [cell for cell in study.cells if left[cell.name]]
    if rates is None and n_left:
        by_kind = {(shape_of(_mask(study, cell)), study.rule_of(cell).model_dump_json()): cell for cell in cells}
        kinds_of_steps = [by_kind[kind] for kind in sorted(by_kind, reverse=True)] if measure_steps else []
        rates = measure(study, kinds_of_steps, outline, gpu)
    costs = _Costs(study, outline, sets, rates or Rates(GPUS["a100"], 0.0, 0.0))
    kinds = dict.fromkeys(harvest.kind for harvest in sets)
    lines = [*(costs.harvest(kind, missing) for kind in kinds), costs.baselines(baselines != "finished")]
    for cell in study.cells:
        n = left[cell.name]
        nothing = [Line("training", cell.name, 0, 0.0), Line("evaluation", cell.name, 0, 0.0)]
        lines += [costs.training(cell, n, untrained[cell.name]), costs.evaluation(cell, n)] if n else nothing
    disk_bytes = sum(harvest.stored * costs.bytes_per_token(harvest) for harvest in missing)
    per_latent = 8 * (outline.d_model + study.corpus.n_positions)  # its rows of the dictionary and of two tables
    disk_bytes += sum(left[cell.name] * (per_latent * study.width(cell) + 600_000) for cell in cells)
    memory_bytes = costs.memory_bytes(max(map(study.width, cells), default=0)) if n_left else 0
    known_sinks = (harvest.sinks for harvest in sets if harvest.sinks is not None)
    assumptions = (*_ASSUMPTIONS, *(rates.assumptions if rates else ()), *known_sinks)
    return Plan(tuple(lines), 1 + len(states), 1 + len(states) - n_left, disk_bytes, memory_bytes, assumptions)


def _sets(study: StudySettings, root: Path) -> list[_Set]:
    """What a study harvests: kept tokens as counted where it is finished, else from settings and `_TOKENS_PER_TEXT`.

    The model is looked up only if there are finished harvests to compare with.
    """
    model, texts = {}, {}
    if layout.activations_folder(root).is_dir():
        model, texts = Source(study.model, study.device).made_from, texts_identity(study)
    return [_set(study, item, item.facts(root)) for item in harvests(study, model, texts)]


def _set(study: StudySettings, item: Harvest, facts: Mapping[str, Any] | None) -> _Set:
    corpus, evaluation, n_positions = study.corpus, study.evaluation, study.corpus.n_positions
    kind, finished = _KINDS[item.kind], facts is not None
    kept, sinks = (facts["kept_tokens"], sink_sentence(item.label, facts)) if facts else (None, None)
    if item.kind in ("training", "heldout"):
        n_tokens = corpus.training_tokens if item.kind == "training" else corpus.heldout_tokens
        n_contexts = -(-n_tokens // (n_positions - 1))
        return _Set(kind, kept or n_tokens, n_contexts * n_positions, 0, 0, finished, sinks)
    if item.kind == "shift":
        n_texts, n_windows = evaluation.shift_texts, evaluation.shift_windows
        length = shift_length(n_positions, n_windows)
        stored = n_texts * sum(1 + (window + 2) * length for window in range(n_windows))
        return _Set(kind, n_texts * n_windows * length, stored, 0, 0, finished, sinks)
    if item.kind == "order":
        n_classes = len(ORDER_TASKS[item.label].labels)
        n_texts = n_classes * (evaluation.order_train_groups + 2 * evaluation.order_test_groups)
    else:
        n_classes = len(datasets.class_names(item.label))
        n_texts = n_classes * (evaluation.probe_train // 2 + evaluation.probe_test // 2)
    kept = kept or n_texts * min(_TOKENS_PER_TEXT.get(item.label, n_positions), n_positions - 1)
    return _Set(kind, kept, n_texts + kept, n_texts, n_classes, finished, sinks)


class _Costs:
    """Counts times rates, by part of a study."""

    def __init__(self, study: StudySettings, outline: sites.LanguageModel, sets: list[_Set], rates: Rates) -> None:
        self._study, self._outline, self._sets, self._rates = study, outline, sets, rates
        self._n_probed = sum(harvest.kept for harvest in sets if harvest.n_classes)
        self._n_in_model = study.evaluation.model_contexts * study.corpus.n_positions
        self._forgetting_steps = {
            round(share * study.training.n_steps) for share in study.evaluation.forgetting_fractions
        }

    def harvest(self, kind: str, missing: list[_Set]) -> Line:
        kept, stored = (
            sum(getattr(item, count) for item in missing if item.kind == kind) for count in ("kept", "stored")
        )
        return Line("harvest", kind, kept, self._rates.below * stored)

    def baselines(self, left: bool) -> Line:
        """Probes on the model's own channels (mean and last token), and its loss as it is and without its vectors."""
        d_model = self._outline.d_model
        seconds = 2 * self._n_in_model * self._rates.above
        seconds += self._rates.host * self._probing([d_model, d_model], [d_model])
        return Line("baselines", MODEL_LABEL, left * self._n_probed, left * seconds)

    def training(self, cell: CellSettings, n_left: int, n_untrained: int) -> Line:
        """Args: n_left, n_untrained: seeds that are not finished, and those of them that are not trained either."""
        shape = shape_of(_mask(self._study, cell))
        steps = [(shape, n_untrained * self._study.n_steps(cell))]
        if cell.measure_forgetting:
            steps.append((Shape(shape.d_sae, shape.d_sae), n_left * max(self._forgetting_steps)))
        machine, batch, d_model = self._rates.machine, self._study.training.batch_tokens, self._outline.d_model
        seconds = sum(n * _step_seconds(self._study, cell, shape, d_model, machine, batch) for shape, n in steps)
        return Line("training", cell.name, batch * sum(n for _, n in steps), self._rates.factor * seconds)

    def _encode(self, shape: Shape, k: int) -> float:
        """A token's codes: a step's product (in float32) and choice, but one pass over rows of active codes, not 5."""
        machine = self._rates.machine
        parts = machine.step_parts(self._outline.d_model, 0, shape.n_live, k / 5, 1, "float32")
        return self._rates.factor * (parts["products"] + parts["codes"] + parts["host"])

    def evaluation(self, cell: CellSettings, n_left: int) -> Line:
        mask, rates = _mask(self._study, cell), self._rates
        n_positions, d_sae, shape = self._study.corpus.n_positions, mask.d_sae, shape_of(mask)
        is_open = mask.is_open() and not mask.changes_in_training
        masked = mask.gates_code() and not is_open
        heldout, shift = (item.kept for item in self._sets if item.kind in (_HELDOUT, _SHIFT))
        n_encoded = heldout + shift + self._n_probed + 3 * self._n_in_model
        n_lifted = (heldout + shift) * masked + heldout * len(self._forgetting_steps | {0}) * cell.measure_forgetting
        widths = [d_sae, d_sae] if masked else [d_sae]  # pooled by mean, and where a latent is open
        poolings = self._study.evaluation.order_poolings
        further = [n_parts(name, n_positions) for name in poolings if name not in LEARNED_POOLINGS]
        n_controls = 2 + mask.may_have_copies() if masked and may_have_controls(cell.mask) else 0
        n_encoded += n_controls * (self._n_probed + heldout)
        widths += n_controls * [d_sae]
        seconds = self._probing([*widths, *(n * d_sae for n in further if is_open)], widths)
        k = getattr(self._study.rule_of(cell), "k", _ACTIVE)
        seconds = rates.host * (seconds + heldout * k * _COUNT + n_positions * d_sae * _CONCLUDE)
        seconds += n_encoded * self._encode(shape, k) + n_lifted * self._encode(Shape(d_sae, d_sae), k)
        seconds += 3 * self._n_in_model * rates.above
        head = self._outline.d_model * self._outline.n_vocabulary  # each latent's effect on the vocabulary, and a sort
        seconds += 2 * d_sae * rates.machine.pass_seconds(head, _model_precision(self._study))
        return Line("evaluation", cell.name, n_left * (n_encoded + n_lifted), n_left * seconds)

    def _probing(self, of_tasks: list[int], of_datasets: list[int]) -> float:
        """Pooling and probes, by the number of features of each pooling; without `Rates.host`."""
        evaluation, seconds = self._study.evaluation, 0.0
        for item in self._sets:
            if item.kind == _ORDER:  # One probe answers a question with two classes.
                widths, n_train = of_tasks, 2 * evaluation.order_train_groups
                n_probes = item.n_classes - (item.n_classes == 2)
            elif item.kind == _PROBES:
                n_draws = datasets.n_draws(item.n_classes, evaluation.probe_test)
                widths, n_probes, n_train = of_datasets, n_draws * item.n_classes, evaluation.probe_train
                seconds += item.n_classes * of_datasets[0] * _FULL_PROBE
            else:
                continue
            seconds += sum(item.n_texts * width * _POOL + n_probes * n_train * _QUESTION for width in widths)
        return seconds

    def bytes_per_token(self, item: _Set) -> int:
        """On disk, with the fields that say which token it is."""
        stored = self._study.model.storage_dtype if item.kind == _TRAINING else "model"
        return bytes_per_token(self._outline.d_model, _model_precision(self._study) if stored == "model" else stored)

    def memory_bytes(self, width: int) -> int:
        """The program, the model, all vectors (files mapped into memory), logits, and the widest cell."""
        n_positions, d_model = self._study.corpus.n_positions, self._outline.d_model
        n_bytes = _BYTES[_model_precision(self._study)]
        vectors = sum(item.stored * self.bytes_per_token(item) for item in self._sets)
        logits = self._outline.n_vocabulary * (4 * 10 * n_positions + n_bytes * self._n_in_model)
        dictionary = 4 * 2 * width * d_model  # in training also its gradients and Adam's moments
        # In evaluation: sums by fold, null draws and copies for a block of latents, profiles of all, and their codes.
        tables = 4 * n_positions * min(width, LATENTS_PER_BLOCK) * 2 * (4 * 16 + 19 + 16) + 2 * n_positions * width
        tables += 2 * MOST_BYTES_IN_MEMORY
        if any(cell.measure_forgetting for cell in self._study.cells):
            tables = max(tables, 4 * n_positions * width * 2 * 16)
        weights, cell = n_bytes * sum(self._outline.n_parameters()), max(4 * dictionary, 2 * dictionary + tables)
        return 850_000_000 + weights + vectors + logits + cell
