"""Settings of an evaluation."""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from posmask.masks import MASKS
from posmask.masks.base import MaskSettings
from posmask.probing import datasets
from posmask.probing.order_tasks import ORDER_TASKS
from posmask.probing.pooling import is_pooling_of_codes

__all__ = ["ATTENTION", "CHOSEN", "LEARNED_POOLINGS", "EvaluationSettings", "may_have_controls"]

ATTENTION, CHOSEN = LEARNED_POOLINGS = ("attention", "chosen")
"""Poolings that training texts decide: an attention probe, and the best of the other poolings on validation texts."""
_LEAST_GROUPS_TO_CHOOSE = 8


def may_have_controls(mask: MaskSettings) -> bool:
    """Whether the SAEs with these masks may have controls."""
    return mask.kind != "open" and mask.gating == "forward" and not MASKS[mask.kind].reads_vectors


class EvaluationSettings(BaseModel):
    """The metrics, tasks and sample sizes of the evaluation of each cell."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    retention_positions: int = Field(gt=0)
    """Positions with the largest mass that count as specialized, for latents that the mask binds to no positions."""
    forgetting_fractions: tuple[Annotated[float, Field(ge=0)], ...] = (0, 0.05, 0.1, 0.25, 0.5, 1)
    """For cells with `measure_forgetting`: steps without the mask, as fractions of the training steps, after which
    retention is measured."""
    shift_texts: int = Field(default=48, gt=1)
    """Number of text pieces in the shift design."""
    shift_windows: int = Field(default=5, ge=4)
    """Windows of the context that each piece is placed in."""
    model_contexts: int = Field(gt=1)
    """Held-out contexts on which the model continues from replaced vectors; at least two per causal window."""
    causal_windows: int = Field(default=4, gt=1)
    """Windows of positions in the causal test."""
    order_tasks: tuple[str, ...] = ()
    """Names of order tasks."""
    order_train_groups: int = Field(default=480, gt=0)
    """Training groups per order task."""
    order_test_groups: int = Field(default=155, gt=1)
    """Test groups per order task."""
    order_poolings: tuple[str, ...] = ("segments8", "growing", "moment")
    """Further poolings of an unmasked SAE's codes in order tasks, the baselines of masks; see `probing.pooling`.
    `chosen` is, for each task and k, the one of `mean` and the others that is best on a quarter of the training groups;
    `attention` is an attention probe on the codes of the tokens."""
    probe_datasets: tuple[str, ...] = ()
    """Names of embedded probe datasets, or of SAEBench's datasets on the hub."""
    probe_train: int = Field(default=800, gt=1)
    """Training texts per probe, half of them of its class; reduced with the test texts if a dataset has fewer."""
    probe_test: int = Field(default=200, gt=1)
    """Test texts per probe, half of them of its class."""
    probe_protocol: datasets.Protocol = "default"
    """`saebench` reproduces two choices of sae-bench that make numbers optimistic or noisy; see docs/metrics.md."""
    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(1, 5, 20, 50), min_length=1)
    """Numbers of latents that probes use."""
    smoothness: bool = False
    """Whether to measure how much codes change between neighboring held-out tokens (`activation_smoothness`)."""

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a setting of a later version that is off, so that it changes no identity."""
        return {name: value for name, value in serialize(self).items() if name != "smoothness" or value}

    def parts(self) -> dict[str, dict[str, Any]]:
        """The parts of an evaluation by name, in order, and the settings that each of them depends on.

        All parts also depend on the SAE, the model and the corpus.
        """

        def only(*names: str) -> dict[str, Any]:
            return self.model_dump(mode="json", include=set(names))

        heldout = only("retention_positions", "shift_texts", "shift_windows", "model_contexts", "causal_windows")
        order = only("ks", "order_train_groups", "order_test_groups", "order_poolings")
        probes = only("ks", "probe_train", "probe_test", "probe_protocol")
        if self.probe_protocol == "saebench":  # It draws from one stream for all datasets.
            probes |= only("probe_datasets")
        return {
            "heldout": heldout,
            **{f"order {task}": order for task in self.order_tasks},
            **{f"probes {dataset}": probes for dataset in self.probe_datasets},
            **({"smoothness": {}} if self.smoothness else {}),
            "forgetting": only("retention_positions", "forgetting_fractions"),
        }

    @model_validator(mode="after")
    def _enough_to_measure(self) -> "EvaluationSettings":
        if self.model_contexts < 2 * self.causal_windows:
            raise ValueError(
                f"model_contexts = {self.model_contexts} gives {self.causal_windows} causal windows less than two "
                "contexts each: raise model_contexts or lower causal_windows"
            )
        if not {1, 5} <= set(self.ks):
            raise ValueError(f"ks = {list(self.ks)} must include 1 and 5, which tables and comparisons use: add them")
        return self

    @model_validator(mode="after")
    def _known_names(self) -> "EvaluationSettings":
        problems = [
            f"{setting} has {name!r}, which is unknown: choose from {', '.join(known)}"
            for setting, known in (("order_tasks", ORDER_TASKS), ("probe_datasets", datasets.dataset_names()))
            for name in getattr(self, setting)
            if name not in known
        ] + [
            f"order_poolings has {name!r}, which is unknown: choose from segmentsN, segmentsN-mean (N segments), "
            "growing, growing-mean, partsN, moment, max, binary, last, attention, chosen"
            for name in self.order_poolings
            if not (is_pooling_of_codes(name) or name in LEARNED_POOLINGS)
        ]
        if CHOSEN in self.order_poolings and self.order_train_groups < _LEAST_GROUPS_TO_CHOOSE:
            problems.append(
                f"order_poolings has 'chosen' with order_train_groups = {self.order_train_groups}, of which a quarter "
                f"is for the choice: raise it to at least {_LEAST_GROUPS_TO_CHOOSE}, or remove 'chosen'"
            )
        if CHOSEN in self.order_poolings and set(self.order_poolings) <= set(LEARNED_POOLINGS):
            problems.append("order_poolings has 'chosen', but nothing beside the mean to choose from: add poolings")
        if problems:
            raise ValueError("\n".join(problems))
        return self
