"""What an audit will do and how long it takes, measured in a few seconds."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from posmask.auditing.settings import AuditSettings
from posmask.auditing.subject import Subject
from posmask.data.tokens import shift_length
from posmask.progress import duration
from posmask.storage import manifest
from posmask.study.harvests import harvests
from posmask.study.source import Source

__all__ = ["expected_sentence"]

_TOKENS_PER_ORDER_TEXT = 50
_CLASSES_PER_TASK = 2
_BATCH = 512


def expected_sentence(settings: AuditSettings, subjects: Sequence[Subject], source: Source, root: Path) -> str:
    """State what will be done and how long it takes, after running the model and each SAE on a few tokens.

    Args:
        subjects: the SAEs that have not been audited yet.
    """
    todo = _tokens_to_harvest(settings, source, root)
    model, n_positions = source.loaded, settings.corpus.n_positions
    ids = torch.randint(model.n_vocabulary // 4, model.n_vocabulary // 2, (max(1, _BATCH // n_positions), n_positions))
    vectors = model.vectors(ids)
    below = _seconds(lambda: model.vectors(ids)) / ids.numel()
    above = _seconds(lambda: model.logits(ids[:1], vectors[:1])) / n_positions
    seconds = below * sum(todo.values())
    n_in_model = settings.evaluation.model_contexts * n_positions
    n_encoded = 2 * settings.corpus.heldout_tokens + sum(_all_tokens(settings).values())
    flat, position = vectors.flatten(0, 1).float().to(settings.device), torch.arange(n_positions).repeat(len(ids))
    for subject in subjects:
        sae = subject.sae.to(settings.device)
        places = position.to(flat.device)
        encode = _seconds(lambda sae=sae, places=places: sae.sparse_encode(flat, places)) / len(flat)
        n_passes = 2 if sae.mask.lifting_matters() else 1
        seconds += n_passes * (encode * n_encoded + above * 6 * n_in_model)
        if settings.beyond_positions:
            seconds += above * 3 * 6 * settings.beyond_positions
    harvested = f"harvests {sum(todo.values()):,} tokens" if todo else "finds all vectors harvested"
    names = ", ".join(subject.name for subject in subjects)
    order = (
        f", probes for order on {len(settings.evaluation.order_tasks)} tasks" if settings.evaluation.order_tasks else ""
    )
    return (
        f"The audit of {names} {harvested} of {settings.model.name}, encodes {settings.corpus.heldout_tokens:,} "
        f"held-out tokens{order}, and lets the model continue from {settings.evaluation.model_contexts} "
        f"reconstructed contexts: about {duration(seconds)}. Results go to {root}."
    )


def _seconds(work: Callable[[], object]) -> float:
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _all_tokens(settings: AuditSettings) -> dict[str, int]:
    """Tokens of the forward passes of each kind of harvest, roughly for order tasks."""
    evaluation, n_positions = settings.evaluation, settings.corpus.n_positions
    length = shift_length(n_positions, evaluation.shift_windows)
    of_shift = evaluation.shift_texts * length * sum(range(2, evaluation.shift_windows + 2))
    n_groups = evaluation.order_train_groups + 2 * evaluation.order_test_groups
    return {
        "heldout": settings.corpus.heldout_tokens,
        "shift": of_shift,
        "order": n_groups * _CLASSES_PER_TASK * _TOKENS_PER_ORDER_TEXT,
    }


def _tokens_to_harvest(settings: AuditSettings, source: Source, root: Path) -> dict[str, int]:
    """Tokens of the harvests that are not finished, by label."""
    sizes = _all_tokens(settings)
    todo = {}
    for item in harvests(settings, source.made_from, source.texts_identity(settings)):
        if item.kind in sizes and not manifest.finished(item.folder(root), item.made_from):
            todo[item.label] = sizes[item.kind]
    if settings.beyond_positions and "evaluation" in todo:
        todo["beyond"] = settings.beyond_tokens
    return todo
