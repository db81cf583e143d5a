"""Settings of a study: data, with the rules that relate them. `study_file` reads them, `cell` builds SAEs from them."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from posmask import masks
from posmask.data import sites, texts, tokens
from posmask.data.activations import StorageDtype
from posmask.errors import BadSetting
from posmask.evaluation.settings import ATTENTION, EvaluationSettings
from posmask.masks.base import MaskSettings
from posmask.probing.order_tasks import ORDER_TASKS
from posmask.results.rows import CONTROLS
from posmask.results.table import COMPARED, MIN_SEEDS
from posmask.sae import rules
from posmask.sae.autoencoder import PositionBias
from posmask.training import trackers
from posmask.training.settings import TrainingSettings

__all__ = [
    "MODEL_CELL",
    "CellSettings",
    "ComparisonSettings",
    "CorpusSettings",
    "HypothesisSettings",
    "MarginSettings",
    "MeasurementSettings",
    "ModelSettings",
    "SaeSettings",
    "StudySettings",
]

_TABLE_CHARACTERS = 1000
_SOURCE_FIELDS = {"tables", "n_texts", "max_characters", "packing"}
MODEL_CELL = "llm"
"""Value of the column `cell` in the rows of the baselines."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _settings_of(read: Callable[[dict[str, Any]], Any], value: Any) -> Any:
    """Read the settings of a mask or rule; pydantic collects a ValueError with the other problems of a study."""
    try:
        return read(value) if isinstance(value, dict) else value
    except BadSetting as error:
        raise ValueError(str(error)) from None


class ModelSettings(_Settings):
    """The language model and the site whose vectors SAEs are trained on."""

    name: str
    """`embedded:SmolLM2-135M-Instruct`, `embedded:gemma-3-270m`, a name on the hub, a folder, or a GGUF file
    (`OWNER/NAME:FILE.gguf` on the hub)."""
    layer: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, lt=1)]
    """Vectors are read after this many layers (`hidden_states[layer]`). A number below 1 is a fraction of the model's
    depth, for studies that are used with several models."""
    site: sites.Site = "residual_after"
    """Site at that layer: the residual stream after or before it, or the output of its attention or MLP."""
    sizes: dict[str, int | float | str | bool] | None = None
    """Entries of the model's config.json, for plans without access to it. Not part of any identity."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass and of stored vectors. auto: bfloat16 if the CPU or GPU multiplies it natively."""
    sink_norm: float = Field(default=sites.SINK_NORM, ge=0)
    """Tokens whose vectors have a norm above this multiple of the median are attention sinks, which count in training
    and metrics as little as BOS does. 0: every token counts."""
    storage_dtype: StorageDtype = "model"
    """Data type of training vectors on disk; vectors for evaluation keep the model's precision."""


class CorpusSettings(_Settings):
    """The texts for training and for evaluation; `data.tokens.split_of` divides them so that no text is in both."""

    tables: tuple[str, ...] = ()
    """Embedded tables. A quarter of their texts is for training, the rest for evaluation."""
    texts: str | None = None
    """Instead of tables: a folder or file of .txt, .jsonl or .jsonl.zst, or a dataset on the hub as
    `hf:OWNER/NAME[:CONFIGURATION][@REVISION]` (see `posmask.data.texts`). Divided like the tables."""
    n_texts: int | None = Field(default=None, gt=0)
    """How many of these texts are read, from the start, before they are divided. None: all."""
    n_positions: int = Field(gt=1, le=2**17)
    """Context length in tokens, including BOS."""
    training_tokens: int = Field(gt=0)
    """Minimum number of kept tokens to harvest for training."""
    heldout_tokens: int = Field(gt=0)
    """Minimum number of kept tokens for reconstruction, retention and fidelity."""
    eval_split: tokens.EvalSplit = "evaluation"
    """The split that metrics, order tasks and probes use. validation: for choosing settings; it shares no text with the
    split of reported numbers."""
    max_characters: int | None = Field(default=None, gt=0)
    """Texts are cut to this many characters, so that a few long texts do not dominate the corpus. Unset: 1000 for
    tables; your own texts are not cut."""
    packing: Literal["one_text_per_context"] | None = None
    """`one_text_per_context`: each context starts with a text and holds nothing else; the rest of longer texts is not
    used. Unset: texts follow each other, so that a context starts anywhere in a text."""

    @model_validator(mode="before")
    @classmethod
    def _cut_tables(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tables") and values.get("max_characters") is None:
            return {**values, "max_characters": _TABLE_CHARACTERS}
        return values

    @model_validator(mode="after")
    def _single_source(self) -> "CorpusSettings":
        if bool(self.tables) == bool(self.texts):
            raise ValueError("corpus needs either tables or texts: give one of the two")
        if self.n_texts is None and self.texts is not None and self.texts.startswith(texts.HUB_PREFIX):
            raise ValueError(
                f"corpus.texts = {self.texts!r} may be unlimited: set n_texts to the number of texts to read"
            )
        return self

    @property
    def source(self) -> dict[str, Any]:
        """Which texts, cut to what and how packed: what is part of a harvest's identity.

        The content of `texts` is part of `source.texts_identity`; its path does not matter.
        """
        return self.model_dump(mode="json", include=_SOURCE_FIELDS, exclude_none=True)


class SaeSettings(_Settings):
    """Size and rule of the unmasked SAE; a cell's `budget` decides how many latents it has."""

    d_sae: int = Field(gt=0)
    rule: SerializeAsAny[rules.RuleSettings]
    """The activation rule of all cells that name none."""

    @field_validator("rule", mode="before")
    @classmethod
    def _known_rule(cls, value: Any) -> Any:
        return _settings_of(rules.rule_settings, value)


_LEAST_OF_PAIRS = 3  # positions: BOS and two tokens
_LATER = frozenset({"rule", "position_bias"})


class CellSettings(_Settings):
    """One cell of the study: a mask at a budget, trained with every seed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    mask: SerializeAsAny[MaskSettings]
    """A kind of posmask with its settings, or `MODULE:CLASS`, a class in a module that is beside the study file or
    installed."""
    budget: Literal["width", "compute"] = "width"
    """width: d_sae latents in total. compute: d_sae latents open at each position, and as many in total as needed."""
    d_sae: int | None = Field(default=None, gt=0)
    """Number of latents, if it differs from the study's; with `budget = "compute"` those open at each position."""
    init_from: str | None = None
    """The SAE that the cell starts from: the name of an open cell, or the folder of an unmasked SAE (a path with a
    slash). Each latent is a copy of one of its latents. None: random weights."""
    step_fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of `training.n_steps`, including the steps of the cell that it starts from."""
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Seeds of this cell, if they differ from the study's."""
    measure_forgetting: bool = False
    """Whether to continue training a copy without the mask and measure retention; doubles the cost of training."""
    rule: SerializeAsAny[rules.RuleSettings] | None = None
    """The activation rule, if it differs from the study's."""
    position_bias: PositionBias | None = None
    """A vector per position that is subtracted before encoding and added back after decoding. mean: the mean of the
    training vectors at the position. learned: a parameter that starts at that mean."""

    @property
    def init_folder(self) -> Path | None:
        return Path(self.init_from) if self.init_from is not None and "/" in self.init_from else None

    @field_validator("mask", mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        return _settings_of(partial(masks.mask_settings, may_import=True), value)

    @field_validator("rule", mode="before")
    @classmethod
    def _known_rule(cls, value: Any) -> Any:
        return _settings_of(rules.rule_settings, value)

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out settings of later versions that are unset, so that they change no identity."""
        return {name: value for name, value in serialize(self).items() if name not in _LATER or value is not None}


class ComparisonSettings(_Settings):
    """A comparison in addition to that of each cell with the baseline."""

    cell: str
    against: str
    """A cell's name, `CELL + POOLING` for its order probes on another pooling, such as `open + segments8`, or
    `CELL + CONTROL` for a control of a masked cell (`evaluation.controls`), such as `windows + zero-step`."""


class HypothesisSettings(ComparisonSettings):
    """What the study expects of one comparison. Hypotheses are tested in their order, before everything else."""

    column: str
    """A column of `verdicts.csv`, such as `block k=5` or `explained_variance`."""
    expected: Literal["better", "worse", "equivalent"]


class MarginSettings(_Settings):
    """The smallest differences that matter: a smaller one is equivalent, and never better or worse."""

    explained_variance: float = Field(default=0.005, gt=0)
    ce_recovered: float = Field(default=0.005, gt=0)
    accuracy: float = Field(default=0.01, gt=0)

    def by_column(self) -> dict[str, float]:
        """The margin of each compared column."""
        return {name: self.accuracy if column.is_probing else getattr(self, name) for name, column in COMPARED.items()}


class MeasurementSettings(_Settings):
    """Which vectors are read, and how SAEs are evaluated on them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    model: ModelSettings
    corpus: CorpusSettings
    evaluation: EvaluationSettings
    device: str = "cpu"
    """Device of the model and the SAEs: cpu, cuda, cuda:1, mps. Not part of any identity."""
    activations_url: str | None = Field(default=None, min_length=1)
    """URL under which harvested vectors are stored, such as s3://BUCKET/PATH. None: in the run folder. Not part of any
    identity."""
    activations_cache_gb: float = Field(default=100.0, gt=0)
    """Limit of the local cache of these vectors, in GB."""


class StudySettings(MeasurementSettings):
    """All settings of a study; the Python form of a TOML file in `studies/`."""

    seeds: tuple[int, ...] = Field(min_length=1)
    sae: SaeSettings
    training: TrainingSettings
    cells: tuple[CellSettings, ...] = Field(min_length=1)
    comparisons: tuple[ComparisonSettings, ...] = ()
    hypotheses: tuple[HypothesisSettings, ...] = ()
    margins: MarginSettings = MarginSettings()
    track: trackers.Tracker | None = None
    """Tracker that receives training curves, too. Not part of any identity."""

    @model_validator(mode="after")
    def _fits_together(self) -> "StudySettings":
        if problems := list(dict.fromkeys(self._problems())):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """What does not fit together, one line per problem."""
        names = [cell.name for cell in self.cells]
        if MODEL_CELL in names:
            yield f"a cell is called {MODEL_CELL!r}, which stands for the model itself: rename it"
        for name, count in Counter(names).items():
            if count > 1:
                yield f"two cells are called {name!r}: give each its own name"
        yield from self._problems_of_comparisons(names)
        yield from self._problems_of_hypotheses(names)
        kept = [name for name in self.evaluation.order_tasks if ORDER_TASKS[name].for_confirmation]
        if kept and self.corpus.eval_split == "validation":
            yield (
                f"corpus.eval_split = 'validation' is for choosing, but order_tasks has {', '.join(kept)}, which are "
                "kept for confirmation: leave them out, or evaluate on the split of reported numbers"
            )
        yield from self._problems_of_starts()
        steps = [round(share * self.training.n_steps) for share in self.evaluation.forgetting_fractions]
        if len(set(steps)) < len(steps) or not any(steps):
            yield (
                f"evaluation.forgetting_fractions = {list(self.evaluation.forgetting_fractions)} of "
                f"{self.training.n_steps} steps are the steps {steps}: name fractions that differ by a step, one of "
                "them above 0"
            )
        try:
            tokens.shift_length(self.corpus.n_positions, self.evaluation.shift_windows)
        except BadSetting as error:
            yield str(error)
        for seeds in (self.seeds, *(cell.seeds for cell in self.cells if cell.seeds)):
            if len(set(seeds)) < len(seeds):
                yield f"seeds = {list(seeds)} repeats a seed: a repeated run is not a second sample"
        if self.training.batch_tokens > self.corpus.training_tokens:
            yield (
                f"training.batch_tokens = {self.training.batch_tokens:,} is more than corpus.training_tokens = "
                f"{self.corpus.training_tokens:,}, which would make 0 steps: lower the one or raise the other"
            )
        yield from self._problems_of_pairs()
        if self.evaluation.retention_positions >= self.corpus.n_positions - 1:
            yield (
                f"evaluation.retention_positions = {self.evaluation.retention_positions} is not below the "
                f"{self.corpus.n_positions - 1} positions after BOS: retention would be 1 for everything"
            )
        if max(self.evaluation.ks) > min([self.sae.d_sae, *(cell.d_sae or self.sae.d_sae for cell in self.cells)]):
            yield (
                f"evaluation.ks asks for probes on {max(self.evaluation.ks)} latents of sae.d_sae = {self.sae.d_sae}: "
                "lower it"
            )

    def _problems_of_pairs(self) -> Iterator[str]:
        paired = [cell for cell in self.cells if rules.RULES[self.rule_of(cell).kind].pairs_tokens]
        for cell in paired:
            needs = f"the rule {self.rule_of(cell).kind} of {cell.name} trains on pairs of neighboring tokens"
            if self.training.batch_tokens % 2:
                yield f"training.batch_tokens = {self.training.batch_tokens} is odd, but {needs}: make it even"
            if self.corpus.n_positions < _LEAST_OF_PAIRS:
                yield (
                    f"corpus.n_positions = {self.corpus.n_positions} leaves no two tokens after BOS, but {needs}: "
                    f"raise it to at least {_LEAST_OF_PAIRS}"
                )

    def _problems_of_starts(self) -> Iterator[str]:
        by_name = {cell.name: cell for cell in self.cells}
        baseline = by_name.get(self.baseline or "")
        for cell in self.cells:
            source = by_name.get(cell.init_from or "")
            if baseline is not None and baseline.init_folder != cell.init_folder:
                yield (
                    f"{cell.name} starts from {cell.init_from or 'scratch'}, but its baseline {baseline.name} from "
                    f"{baseline.init_from or 'scratch'}: let all start from the same folder, or none, since training "
                    "tokens count"
                )
            if cell.measure_forgetting and masks.MASKS[cell.mask.kind].reads_vectors:
                yield (
                    f"{cell.name} has measure_forgetting, but a {cell.mask.kind!r} mask cannot be trained on without "
                    "its router"
                )
            if cell.init_from is None or cell.init_folder:
                if self.n_steps(cell) < 1:
                    yield f"step_fraction = {cell.step_fraction} of {cell.name} makes 0 steps: raise it"
                continue
            if source is None:
                yield f"{cell.name} starts from {cell.init_from!r}, which is not a cell (a folder needs a slash)"
                continue
            if (source.d_sae or self.sae.d_sae) != (cell.d_sae or self.sae.d_sae):
                yield (
                    f"{cell.name} starts from {cell.init_from}, which has another number of latents: give both the "
                    "same d_sae"
                )
                continue
            if source.mask.kind != "open" or source.budget != "width" or source.init_from is not None:
                yield (
                    f"{cell.name} starts from {cell.init_from}, which is not an open cell "
                    "that starts from random weights: name one that does"
                )
                continue
            rule, of_source = self.rule_of(cell), self.rule_of(source)
            if of_source.of_codes() != rule.of_codes():
                yield (
                    f"{cell.name} has the rule {rule.model_dump()}, but starts from {cell.init_from} with the rule "
                    f"{of_source.model_dump()}: give both the same"
                )
                continue
            if source.position_bias != cell.position_bias:
                yield (
                    f"{cell.name} has position_bias = {cell.position_bias!r}, but starts from {cell.init_from} with "
                    f"{source.position_bias!r}: give both the same"
                )
                continue
            if lacking := sorted(set(self.seeds_of(cell)) - set(self.seeds_of(source))):
                yield f"{cell.name} starts from {cell.init_from}, which has no seeds {lacking}: give it those too"
            if self.n_steps(cell) < 1:
                yield (
                    f"{cell.name} starts from {cell.init_from}, which leaves no step of its {self.training.n_steps}: "
                    "name an open cell with a smaller step_fraction"
                )

    def seeds_of(self, cell: CellSettings) -> tuple[int, ...]:
        return cell.seeds or self.seeds

    def rule_of(self, cell: CellSettings) -> rules.RuleSettings:
        """The activation rule of a cell."""
        return cell.rule or self.sae.rule

    def n_steps(self, cell: CellSettings) -> int:
        """Number of steps that a cell is trained for, without those of the cell that it starts from."""
        is_cell = cell.init_from is not None and cell.init_folder is None
        source = next((other for other in self.cells if other.name == cell.init_from), None) if is_cell else None
        total = round(cell.step_fraction * self.training.n_steps)
        return total - (self.n_steps(source) if source is not None and source != cell else 0)

    def _problems_of_comparisons(self, names: list[str]) -> Iterator[str]:
        baseline = self.baseline
        pairs = {(cell.name, baseline) for cell in self.cells if baseline not in (None, cell.name)}
        open_cells = {cell.name for cell in self.cells if cell.mask.kind == "open"}
        pooled = set(self.evaluation.order_poolings) - {ATTENTION}  # It has no accuracy on few latents.
        for comparison in (*self.comparisons, *self.hypotheses):
            what = "hypotheses" if isinstance(comparison, HypothesisSettings) else "comparisons"
            sides = comparison.cell, comparison.against
            unknown = [side for side in sides if side.partition(" + ")[0] not in names]
            for side in unknown:
                yield f"{what} name {side!r}, which is not a cell: choose from {', '.join(names)}"
            if unknown:
                continue
            for side in sides:
                name, _, pooling = side.partition(" + ")
                known = pooled if name in open_cells else {"fair", *CONTROLS}
                if pooling and pooling not in known:
                    yield f"{what} name {side!r}, but {name} has only {sorted(known)}"
            if what == "hypotheses":
                continue
            left, right = (self._cell_of(side) for side in sides)
            if not set(self.seeds_of(left)) & set(self.seeds_of(right)):
                yield f"comparisons compare {sides[0]!r} with {sides[1]!r}, which share no seed: give them one"
            if sides[0] == sides[1] or sides in pairs:
                yield f"comparisons list {sides[0]!r} against {sides[1]!r} twice, or for nothing: remove it"
            pairs.add(sides)

    def _problems_of_hypotheses(self, names: list[str]) -> Iterator[str]:
        kinds = {ORDER_TASKS[name].about for name in self.evaluation.order_tasks}
        seen = set()
        for hypothesis in self.hypotheses:
            sides, column = (hypothesis.cell, hypothesis.against), COMPARED.get(hypothesis.column)
            said = f"hypotheses compare {sides[0]!r} with {sides[1]!r}"
            if column is None:
                yield f"{said} in {hypothesis.column!r}: choose a column from {', '.join(COMPARED)}"
            elif column.where.get("about", next(iter(kinds), "")) not in kinds and column.metric == "order_accuracy":
                yield f"{said} in {column.name}, but no order task is about {column.where['about']} order: add one"
            elif column.metric == "probe_accuracy" and not self.evaluation.probe_datasets:
                yield f"{said} in {column.name}, but there are no probe_datasets: add one"
            elif not column.is_probing and not {side.partition(" + ")[2] for side in sides} <= {"", *CONTROLS}:
                yield f"{said} in {column.name}, which does not depend on the pooling: compare the cells themselves"
            if sides[0] == sides[1] or (*sides, hypothesis.column) in seen:
                yield f"{said} in {hypothesis.column} twice, or for nothing: remove it"
            seen.add((*sides, hypothesis.column))
            if {side.partition(" + ")[0] for side in sides} <= set(names):
                seeds = [self.seeds_of(self._cell_of(side)) for side in sides]
                if set(seeds[0]) != set(seeds[1]):
                    yield f"{said}, which have the seeds {list(seeds[0])} and {list(seeds[1])}: give both the same"
                elif len(seeds[0]) < MIN_SEEDS:
                    yield f"{said} with {len(seeds[0])} seeds, which decide nothing: give both at least {MIN_SEEDS}"

    def _cell_of(self, side: str) -> CellSettings:
        return next(cell for cell in self.cells if cell.name == side.partition(" + ")[0])

    @property
    def baseline(self) -> str | None:
        """The cell that every other cell is compared with.

        It is the first open cell at full width with all steps, the study's rule and no bias per position.
        """
        for cell in self.cells:
            is_plain = cell.mask.kind == "open" and cell.budget == "width" and cell.d_sae is None
            is_plain = is_plain and self.rule_of(cell) == self.sae.rule and cell.position_bias is None
            if is_plain and cell.step_fraction == 1:
                return cell.name
        return None

    def width(self, cell: CellSettings) -> int:
        """Number of latents of a cell's SAE."""
        d_sae = cell.d_sae or self.sae.d_sae
        if cell.budget == "width":
            return d_sae
        kind = masks.MASKS[cell.mask.kind]
        return kind.width_at_equal_compute(cell.mask, self.corpus.n_positions, d_sae)
