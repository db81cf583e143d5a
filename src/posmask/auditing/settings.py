"""Settings of an audit: from what is known of the SAEs, and what the user says."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from posmask.auditing.subject import Subject
from posmask.data import models
from posmask.data.tokens import shift_length
from posmask.errors import BadSetting
from posmask.interop import sites
from posmask.study.settings import MeasurementSettings, ModelSettings

__all__ = ["DEFAULT_TOKENS", "AuditSettings", "audit_settings"]

DEFAULT_TOKENS = 100_000
TABLES = (
    "56_wikidatasex_or_gender",
    "59_wikidata_occupation_isjournalist",
    "94_ai_gen",
    "97_news_class",
    "100_news_fake",
    "110_aimade_humangpt3",
    "111_yelp_data",
    "157_amazon_5star",
    "158_code_C",
    "159_code_Python",
    "160_code_HTML",
    "161_agnews_0",
    "162_agnews_1",
    "163_agnews_2",
)
ORDER_TASKS = ("language_order", "contrast_order", "bigram_shift", "agreement_swap")
_SHIFT_WINDOWS = 5
_SHIFT_SHARE = 0.4  # tokens of the shift design's contexts, relative to the held-out tokens
_SHIFT_TEXTS = (16, 400)
_MODEL_TOKENS = 1024
_MODEL_CONTEXTS = (8, 16)
_KS = (1, 5, 50, 200)


class AuditSettings(MeasurementSettings):
    """Settings of an audit, which all SAEs audited together share."""

    beyond_positions: int | None = Field(default=None, gt=1)
    """Tokens per context of the texts that are longer than the SAEs' context. None: the model reads no longer ones."""

    @property
    def beyond_tokens(self) -> int:
        """Kept tokens of these texts."""
        return max(self.corpus.heldout_tokens // 4, 8 * (self.beyond_positions or 0))


def audit_settings(
    subjects: Sequence[Subject],
    *,
    model: str | None = None,
    texts: str | None = None,
    n_texts: int | None = None,
    n_tokens: int = DEFAULT_TOKENS,
    order: bool = True,
    device: str = "cpu",
) -> AuditSettings:
    """The settings with which SAEs of one site are audited.

    Args:
        subjects: the SAEs.
        model: replaces the model that they state.
        texts: as in `corpus.texts` of a study; None for embedded texts.
        n_texts: how many of the texts are read; None for all.
        n_tokens: kept held-out tokens.
        order: whether to probe codes and stream for order, on embedded tasks.
        device: of the model and the SAEs.

    Raises:
        BadSetting: the model, the site or the context length is unknown or differs between the SAEs, the model has no
            such layer, reads only shorter contexts or has vectors of another size.
    """
    name = _shared("model", [model or subject.model for subject in subjects], subjects, "--model")
    number, site = _shared("site", [subject.site for subject in subjects], subjects, "--site or --layer")
    n_positions = _shared("context", [subject.sae.mask.n_positions for subject in subjects], subjects, "--context")
    outline = models.load_outline(name, number, site) if _is_here(name) else None
    if outline is not None:
        outline.check_length(n_positions)
        for subject in subjects:
            if subject.sae.d_model != outline.d_model:
                raise BadSetting(
                    f"{subject.name} codes vectors of {subject.sae.d_model} numbers, {name} gives {outline.d_model}: "
                    "give the model that it was trained on with --model"
                )
    bound = [s.name for s in subjects if s.sae.mask.settings.kind != "open" or s.sae.position_bias is not None]
    beyond = None if bound else _beyond(outline, n_positions)
    smallest = min(subject.sae.d_sae for subject in subjects)
    corpus: dict[str, Any] = {"texts": texts, "n_texts": n_texts} if texts else {"tables": TABLES}
    n_contexts = max(_MODEL_CONTEXTS[0], min(_MODEL_CONTEXTS[1], _MODEL_TOKENS // n_positions))
    values = {
        "name": _root_name(name, number, site),
        "model": ModelSettings(name=name, layer=number, site=site),
        # Vectors for training are never harvested.
        "corpus": {**corpus, "n_positions": n_positions, "training_tokens": 1, "heldout_tokens": n_tokens},
        "evaluation": {
            "retention_positions": max(1, n_positions // 8),
            "shift_texts": _n_shift_texts(n_tokens, n_positions),
            "shift_windows": _SHIFT_WINDOWS,
            "model_contexts": n_contexts,
            "order_tasks": ORDER_TASKS if order else (),
            "order_train_groups": 100,
            "order_test_groups": 50,
            "order_poolings": (),
            "ks": [k for k in _KS if k <= smallest],
        },
        "device": device,
        "beyond_positions": beyond,
    }
    try:
        settings = AuditSettings.model_validate(values)
    except ValidationError as error:
        raise BadSetting(
            "\n".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        ) from None
    if n_tokens < n_contexts * n_positions:
        raise BadSetting(
            f"{n_tokens:,} tokens are too few: the model continues from {n_contexts} contexts of {n_positions} "
            f"positions; give at least --tokens {n_contexts * n_positions}"
        )
    return settings


def _shared(what: str, values: Sequence[Any], subjects: Sequence[Subject], option: str) -> Any:
    """The value that all SAEs have.

    Raises:
        BadSetting: it is unknown, or they differ.
    """
    for value, subject in zip(values, subjects, strict=True):
        if value is None:
            raise BadSetting(f"the files of {subject.name} do not state its {what}: give {option}")
    if len(set(values)) > 1:
        pairs = ", ".join(f"{subject.name}: {value}" for subject, value in zip(subjects, values, strict=True))
        raise BadSetting(f"the SAEs differ in their {what} ({pairs}): audit them one at a time")
    return values[0]


def _is_here(model: str) -> bool:
    """Whether the configuration of a model is on this machine; others are checked when they are downloaded."""
    try:
        models.load_outline(model, 1)
    except BadSetting:
        return False
    return True


def _beyond(outline: Any, n_positions: int) -> int | None:
    """Twice the context, if the model reads that."""
    if outline is None:
        return None
    try:
        outline.check_length(2 * n_positions)
    except BadSetting:
        return None
    return 2 * n_positions


def _n_shift_texts(n_tokens: int, n_positions: int) -> int:
    """Texts of the shift design whose contexts have two fifths of the held-out tokens."""
    per_text = shift_length(n_positions, _SHIFT_WINDOWS) * sum(range(2, _SHIFT_WINDOWS + 2))
    return max(_SHIFT_TEXTS[0], min(_SHIFT_TEXTS[1], math.floor(_SHIFT_SHARE * n_tokens / per_text)))


def _root_name(model: str, layer: int, site: str) -> str:
    plain = Path(model.removeprefix("embedded:")).name
    return re.sub(r"[^a-z0-9_.-]+", "-", f"{plain}-{sites.hook_name(layer, site)}".lower()).strip("-._")
