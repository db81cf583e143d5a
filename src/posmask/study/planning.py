"""What a study costs before it starts: tokens, time, disk and memory.

Seconds are counts, which follow from the settings, times rates, which `rates.measure` takes on this machine.
docs/planning.md has the formulas, and a plan beside the run that it foretold.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posmask.data import models, sites
from posmask.data.activations import bytes_a_token
from posmask.data.tokens import shift_length
from posmask.probing import datasets
from posmask.probing.order_tasks import ORDER_TASKS
from posmask.storage.manifest import MANIFEST, finished, read_manifest
from posmask.study.harvests import Source
from posmask.study.machines import Machine
from posmask.study.rates import FREE, Linear, Rates, lifts, measure, n_segments, precision_of, shape_of
from posmask.study.run import cell_states
from posmask.study.settings import CellSettings, StudySettings

__all__ = ["Line", "Plan", "Stage", "plan"]

Stage = Literal["harvest", "baselines", "training", "evaluation"]


@dataclass(frozen=True)
class Line:
    """One part of what is still to be done.

    `tokens` are kept tokens, counted as often as they are harvested, trained on or encoded, all seeds together;
    `seconds` is an estimate of the time on this machine. Both are 0 where the folders are finished.
    """

    stage: Stage
    what: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a study still costs here.

    A study has `n_folders`: one for each cell and seed, and the baselines'. `disk_bytes` will be written;
    `memory_bytes` is roughly the largest resident memory. `assumptions` are sentences: what both rest on.
    """

    lines: tuple[Line, ...]
    n_folders: int
    n_finished: int
    disk_bytes: int
    memory_bytes: int
    assumptions: tuple[str, ...]

    def seconds(self, stage: Stage | None = None) -> float:
        """Of one stage, or of all."""
        return sum(line.seconds for line in self.lines if stage in (None, line.stage))


@dataclass(frozen=True)
class _Set:
    """A folder of harvested vectors; `stored` tokens, BOS and what is not kept included, go through the model."""

    kind: str
    kept: int
    stored: int
    n_texts: int
    n_classes: int
    there: bool


_TRAINING, _HELDOUT, _SHIFT, _ORDER, _PROBES = (
    "training texts", "held-out texts", "shift design", "order tasks", "probe datasets",
)  # fmt: skip
_TOKENS_A_TEXT = {
    # Measured with the embedded model's tokenizer in contexts of 512, texts cut to 1,000 characters.
    "topic_permutation": 53, "contrast_order": 21, "chronology": 32, "agreement_swap": 10, "bigram_shift": 30,
    "language_order": 69, "sentence_order": 54, "dialogue_order": 30, "ag_news": 56, "github_code": 312,
    "amazon_sentiment": 174, "occupations_1": 115, "occupations_2": 118, "news_class": 56, "sentence_language": 21,
}  # fmt: skip


def plan(study: StudySettings, root: Path, rates: Rates | None = None, machine: Machine | None = None) -> Plan:
    """What is still to be done of a study, and what that costs here, or on a machine that is not here.

    Args:
        root: the study's folder; what is finished there costs nothing.
        rates: None measures them, which takes about half a minute.
        machine: whose rates stand for model and SAEs; what stays on the host is measured here.

    Raises:
        BadSetting: the model's sizes are unknown here, it has no such layer, or it is too short for the contexts.
    """
    if machine is None:
        models.check_device(study.device)
    asked = study.model
    layer = asked.layer if isinstance(asked.layer, int) else Source(asked, study.device).layer
    outline = models.load_outline(asked.name, layer, asked.site, asked.sizes)
    outline.check_length(study.corpus.n_positions)
    (_, baselines), *states = cell_states(study, root)
    left = Counter(label.rpartition("-seed")[0] for label, state in states if state != "finished")
    n_left = left.total() + (baselines != "finished")
    sets = _sets(study, root, any_finished=n_left <= len(states))
    missing = [one for one in sets if n_left and not one.there]
    cells = [cell for cell in study.cells if left[cell.name]]
    if rates is None:
        rates = measure(study, cells, outline, _mean_length(sets), machine) if n_left else FREE
    costs = _Costs(study, outline, sets, rates)
    kinds = dict.fromkeys(one.kind for one in sets)
    lines = [costs.harvest(kind, missing) for kind in kinds] + [costs.baselines(baselines != "finished")]
    for cell in study.cells:
        lines += [costs.training(cell, left[cell.name]), costs.evaluation(cell, left[cell.name])]
    return Plan(
        tuple(lines),
        1 + len(states),
        1 + len(states) - n_left,
        sum(one.stored * costs.bytes_a_token(one) for one in missing)
        + sum(left[cell.name] * costs.bytes_a_cell(cell) for cell in cells),
        costs.memory_bytes(cells) if n_left else 0,
        (*costs.assumptions(), *rates.assumptions),
    )


def _sets(study: StudySettings, root: Path, *, any_finished: bool) -> list[_Set]:
    """What a study harvests: counted where it is there, else as the settings and `_TOKENS_A_TEXT` say."""
    texts, ask, n_positions = study.corpus, study.evaluation, study.corpus.n_positions
    found = list(_manifests(root))
    shared = {"n_positions": n_positions, "model": Source(study.model, study.device).made_from} if found else {}
    drawn = texts.source

    def there(name: str, n_texts: int | None = None, **wanted: Any) -> int | None:
        """Kept tokens of the finished folder; None where there is none.

        Which texts tasks get is known only after reading all. So they are told by their number; where a part of the
        study is finished, by their name.
        """
        for label, manifest in found:
            made_from = manifest["made_from"]
            fits = label == name and {**shared, **wanted}.items() <= made_from.items()
            if fits and (n_texts is None or any_finished or len(made_from["texts_of"]) == n_texts):
                return manifest["kept_tokens"]
        return None

    sets = []
    splits = (
        (_TRAINING, "training", texts.training_tokens),
        (_HELDOUT, texts.measured_on, texts.heldout_tokens),
    )
    for kind, split, n_tokens in splits:
        kept = there(split, split=split, tokens=n_tokens, **drawn)
        n_contexts = -(-n_tokens // (n_positions - 1))
        sets.append(_Set(kind, kept or n_tokens, n_contexts * n_positions, n_contexts, 0, kept is not None))
    n_pieces, n_windows = ask.shift_texts, ask.shift_windows
    length = shift_length(n_positions, n_windows)
    kept = there("shift", shift=[n_pieces, n_windows], split=texts.measured_on, **drawn)
    stored = n_pieces * sum(1 + (window + 2) * length for window in range(n_windows))
    sets.append(_Set(_SHIFT, n_pieces * n_windows * length, stored, n_pieces, 0, kept is not None))

    def tasks(kind: str, name: str, n_classes: int, n_own: int, n_copies: int, **wanted: Any) -> None:
        kept = there(name, n_own, **wanted) if sets[1].there else None
        n_texts = n_own + n_copies
        guess = n_texts * min(_TOKENS_A_TEXT.get(name, n_positions), n_positions - 1)
        sets.append(_Set(kind, kept or guess, n_texts + (kept or guess), n_texts, n_classes, kept is not None))

    for name in ask.order_tasks:
        n_classes = len(ORDER_TASKS[name].labels)
        n_test = n_classes * ask.order_test_groups
        tasks(_ORDER, name, n_classes, n_classes * ask.order_train_groups + n_test, n_test, shuffled_too=True)
    for name in ask.probe_datasets:
        n_classes = len(datasets.class_names(name))
        tasks(_PROBES, name, n_classes, n_classes * (ask.probe_train // 2 + ask.probe_test // 2), 0)
    return sets


def _manifests(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The finished folders of vectors: what is in them, without their identity, and their manifests."""
    folder = root / "activations"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            if finished(path, manifest["made_from"]):  # not so where an older version wrote it
                yield path.name.rpartition("-")[0], manifest


class _Costs:
    """Counts times rates: what each part of a study takes."""

    def __init__(self, study: StudySettings, outline: sites.LanguageModel, sets: list[_Set], rates: Rates) -> None:
        self._study = study
        self._outline = outline
        self._sets = sets
        self._rates = rates
        ask = study.evaluation
        self._tasks = [(one, rates.order_probes) for one in sets if one.kind == _ORDER]
        self._datasets = [(one, rates.topic_probes) for one in sets if one.kind == _PROBES]
        self._n_probed = sum(one.kept for one, _ in [*self._tasks, *self._datasets])
        self._n_in_model = ask.model_contexts * study.corpus.n_positions

    def harvest(self, kind: str, missing: list[_Set]) -> Line:
        own = [one for one in missing if one.kind == kind]
        return Line("harvest", kind, sum(one.kept for one in own), self._rates.below * sum(one.stored for one in own))

    def baselines(self, left: bool) -> Line:
        """The model's own channels, pooled and probed, and what it loses as it is and with its vectors set to 0."""
        width = self._outline.d_model
        seconds = 2 * self._n_in_model * self._rates.above
        seconds += self._probing(self._tasks, [width, width]) + self._probing(self._datasets, [width])
        seconds += self._full_probes(width)
        return Line("baselines", "the model itself", left * self._n_probed, left * seconds)

    def training(self, cell: CellSettings, n_left: int) -> Line:
        study, shape = self._study, shape_of(self._study, cell)
        trainings = [(shape, study.n_steps(cell))]
        if cell.decay:
            trainings.append((shape.opened, _decay_steps(study)[-1]))
        tokens = study.training.batch_tokens * sum(n_steps for _, n_steps in trainings)
        seconds = sum(self._rates.training[one].at(n_steps) for one, n_steps in trainings) if n_left else 0.0
        return Line("training", cell.name, n_left * tokens, n_left * seconds)

    def evaluation(self, cell: CellSettings, n_left: int) -> Line:
        if not n_left:
            return Line("evaluation", cell.name, 0, 0.0)
        rates, shape = self._rates, shape_of(self._study, cell)
        heldout, shift = (one.kept for one in self._sets if one.kind in (_HELDOUT, _SHIFT))
        n_lifted = heldout + shift if lifts(cell) else 0
        if cell.decay:
            n_lifted += heldout * len({0, *_decay_steps(self._study)})
        n_encoded = heldout + shift + self._n_probed + 3 * self._n_in_model
        seconds = n_encoded * rates.encode[shape] + (n_lifted * rates.encode[shape.opened] if n_lifted else 0)
        seconds += heldout * rates.count.at(shape.width) + rates.conclude.at(shape.width)
        seconds += 3 * self._n_in_model * rates.above
        widths = [shape.width] * (2 if shape in rates.closing else 1)
        seconds += self._probing(self._datasets, widths) + self._full_probes(shape.width)
        if cell.mask.kind == "open":
            widths += [shape.width * n for n in n_segments(self._study)]
        seconds += self._probing(self._tasks, widths)
        return Line("evaluation", cell.name, n_left * (n_encoded + n_lifted), n_left * seconds)

    def _probing(self, sets: list[tuple[_Set, Linear]], widths: list[int]) -> float:
        """Pooling and k-sparse probes."""
        return sum(
            one.n_texts * self._rates.pool.at(width) + _n_probed_classes(one) * probes.at(width)
            for one, probes in sets
            for width in widths
        )

    def _full_probes(self, width: int) -> float:
        return sum(one.n_classes for one, _ in self._datasets) * self._rates.full_probe.at(width)

    def bytes_a_token(self, one: _Set) -> int:
        """On disk, with the fields that say what token it is."""
        stored = self._study.model.stored if one.kind == _TRAINING else "model"
        stored = precision_of(self._study) if stored == "model" else stored
        return bytes_a_token(self._outline.d_model, stored)

    def bytes_a_cell(self, cell: CellSettings) -> int:
        """On disk: the dictionary, the mask's table and its openness, and the rows."""
        width = self._study.width(cell)
        return 4 * width * (2 * self._outline.d_model + 2 * self._study.corpus.n_positions) + _BYTES_OF_ROWS

    def memory_bytes(self, cells: list[CellSettings]) -> int:
        """The program, the model, all vectors (files mapped into memory), logits, and the widest cell's own."""
        study, outline = self._study, self._outline
        n_positions, numbers = study.corpus.n_positions, 2 if precision_of(study) == "bfloat16" else 4
        vectors = sum(one.stored * self.bytes_a_token(one) for one in self._sets)
        logits = self._n_in_model * outline.n_vocabulary * numbers + 10 * n_positions * outline.n_vocabulary * 4
        own = [0]
        for width in map(study.width, cells):
            dictionary = 4 * 2 * width * outline.d_model  # once itself, once its gradients, twice Adam's moments
            tables = 4 * n_positions * width * (4 * 16 + 19 + 16)  # used and lifted mass, the null, a copy by fold
            own.append(max(4 * dictionary, 2 * dictionary + tables))
        return round(_BYTES_OF_PROGRAM + numbers * sum(outline.n_parameters()) + vectors + logits + max(own))

    def assumptions(self) -> tuple[str, ...]:
        guessed = [one for one, _ in [*self._tasks, *self._datasets] if not one.there]
        said = [
            "Left out: imports, reading and tokenising texts, writing tables and the page; first use on a machine, "
            "which compiles loops for some 20 s.",
            "Latents that die are not: each step then costs up to one more product to revive them.",
            "Memory: the program, the model, all vectors, logits, and the larger of training and evaluating the widest "
            "cell.",
        ]
        if guessed:
            mean = sum(one.kept for one in guessed) / sum(one.n_texts for one in guessed)
            said.insert(0, f"Texts of tasks and datasets: {mean:.0f} tokens in the mean, as those of SmolLM2 have.")
        return tuple(said)


_BYTES_OF_PROGRAM = 850_000_000  # torch, transformers, numba, a tokenizer, texts
_BYTES_OF_ROWS = 600_000  # rows.csv, units.safetensors, saebench.json


def _decay_steps(study: StudySettings) -> list[int]:
    """After which steps without the mask a cell with `decay` is measured, growing; the last is their number."""
    return sorted({round(share * study.training.n_steps) for share in study.evaluation.decay_shares})


def _mean_length(sets: list[_Set]) -> int:
    """Kept tokens a text of tasks and datasets."""
    own = [one for one in sets if one.kind in (_ORDER, _PROBES)]
    return max(1, round(sum(one.kept for one in own) / max(1, sum(one.n_texts for one in own))))


def _n_probed_classes(one: _Set) -> int:
    """Two classes of an order task are one question."""
    return 1 if one.kind == _ORDER and one.n_classes == 2 else one.n_classes
