"""Settings of an evaluation."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posmask.probing import datasets
from posmask.probing.order_tasks import ORDER_TASKS

__all__ = ["EvaluationSettings"]


class EvaluationSettings(BaseModel):
    """What each cell is asked, and with how much."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    retention_positions: int = Field(gt=0)
    """How many top positions stand in for a mask, for latents whose mask binds them to none."""
    forgetting_fractions: tuple[Annotated[float, Field(ge=0)], ...] = (0, 0.05, 0.1, 0.25, 0.5, 1)
    """For cells with `measure_forgetting`: fractions of the steps without mask after which retention is measured."""
    shift_texts: int = Field(default=48, gt=1)
    """Pieces of text in the shift design."""
    shift_windows: int = Field(default=5, ge=4)
    """In how many windows of the context each piece is seen."""
    model_contexts: int = Field(gt=1)
    """Whole held-out contexts on which the model goes on from replaced vectors, at least two a causal window."""
    causal_windows: int = Field(default=4, gt=1)
    """How many windows of positions the causal test tells apart."""
    order_tasks: tuple[str, ...]
    order_train_groups: int = Field(gt=0)
    order_test_groups: int = Field(gt=1)
    order_segments: int = Field(default=8, gt=1)
    """Position segments of the segment-pooled rival of the unmasked SAE."""
    probe_datasets: tuple[str, ...]
    """Embedded roles, or SAEBench's datasets by their hub names."""
    probe_train: int = Field(gt=1)
    """Training texts a probe, half of them of its class; capped at what the dataset has, with the test texts."""
    probe_test: int = Field(gt=1)
    probe_protocol: datasets.Protocol = "default"
    """`saebench` repeats sae-bench's two habits that make numbers optimiztic or noisy; see docs/metrics.md."""
    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(1, 5, 20, 50), min_length=1)
    """How many latents a probe may use."""

    @model_validator(mode="after")
    def _enough_to_measure(self) -> "EvaluationSettings":
        if self.model_contexts < 2 * self.causal_windows:
            raise ValueError(
                f"model_contexts = {self.model_contexts} gives {self.causal_windows} causal windows less than two "
                "contexts each: raise the one or lower the other"
            )
        if not {1, 5} <= set(self.ks):
            raise ValueError(f"ks = {list(self.ks)} lacks 1 or 5, which tables and verdicts rest on: add them")
        return self

    @model_validator(mode="after")
    def _known_names(self) -> "EvaluationSettings":
        for given, known in ((self.order_tasks, ORDER_TASKS), (self.probe_datasets, datasets.dataset_names())):
            for name in given:
                if name not in known:
                    raise ValueError(f"{name!r} is unknown: choose from {', '.join(known)}")
        return self
