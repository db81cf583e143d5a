"""The model and the texts of a study, and everything that all its cells share: vectors, harvested once."""

import contextlib
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from posmask.data import embedded, models, sites
from posmask.data.activations import Activations, StorageDtype, finished_activations
from posmask.data.harvest import ComputeShards, harvest
from posmask.data.texts import content_of, read_texts
from posmask.data.tokens import TRAINING_SHARE, VALIDATION_SHARE, Split, Tokens, pack, pad, shifted, unique_texts
from posmask.errors import DamagedFolder
from posmask.evaluation.suite import EvaluationData
from posmask.kernels import runtime
from posmask.probing.datasets import read_probe_dataset
from posmask.probing.order_probes import order_tokens
from posmask.probing.order_tasks import make_order_task
from posmask.progress import announce
from posmask.storage import manifest
from posmask.study.settings import ModelSettings, StudySettings

__all__ = ["Source", "prepare", "texts_identity"]


class Source:
    """The model a study reads vectors from, loaded only when something must be harvested."""

    def __init__(self, settings: ModelSettings, device: str = "cpu") -> None:
        precision = runtime.fast_precision(device) if settings.precision == "auto" else settings.precision
        self._settings = settings
        self._device = device
        self._precision: runtime.Precision = precision

    @cached_property
    def layer(self) -> int:
        return models.layer_number(self._settings.name, self._settings.layer)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        return {
            "weights": models.weights_identity(self._settings.name),
            "layer": self.layer,
            "precision": self._precision,
            # Named only where it is not what all folders were made from before there was a choice.
            **({} if self._settings.site == "residual_after" else {"site": self._settings.site}),
        }

    @cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(self._settings.name)

    @cached_property
    def loaded(self) -> sites.LanguageModel:
        settings = self._settings
        return models.load_model(settings.name, self.layer, self._precision, site=settings.site, device=self._device)


def texts_identity(study: StudySettings) -> dict[str, Any]:
    carriers = {
        carrier.package: carrier.wheel_sha256 for carrier in embedded.CARRIERS if carrier != embedded.MODEL_CARRIER
    }
    shares = [TRAINING_SHARE, VALIDATION_SHARE]
    own = study.corpus.texts
    return {"carriers": carriers, "shares": shares} | ({} if own is None else {"own": content_of(own)})


def prepare(study: StudySettings, source: Source, root: Path, compute: ComputeShards | None = None) -> EvaluationData:
    """Harvest what is missing: training, held-out, order and probe texts, each into a folder of its own.

    Args:
        compute: computes vectors elsewhere; None: here.
    """
    n_positions = study.corpus.n_positions
    shared = {
        "model": source.made_from,
        "texts": texts_identity(study),
        "n_positions": n_positions,
    }
    store = study.store(root)

    def harvested(
        label: str, what: dict[str, Any], tokens: Callable[[], Tokens], storage_dtype: StorageDtype = "model"
    ) -> Activations:
        made_from = {**shared, **what, "stored": storage_dtype}
        place = root / "activations" / f"{label}-{manifest.identity(made_from)}"
        folder = place if store is None else store.folder(place.name)

        def there() -> Activations | None:
            with contextlib.suppress(DamagedFolder):  # Then `harvest` says so, and mends it.
                return finished_activations(folder, made_from)
            return None

        if (found := there()) is not None:
            return found
        with manifest.claim(place, wait=True):  # Another process may have made it meanwhile.
            found = there()
            if found is None:
                here = source.loaded if compute is None else None
                found = harvest(tokens(), here, folder, made_from, label, storage_dtype, compute)
            return found

    @cache
    def texts(split: Split) -> list[str]:
        tables, own = study.corpus.tables, study.corpus.texts
        announce(f"Reading the {split} texts of {own or f'{len(tables)} tables'}.")
        every = (text for name in tables for text, _ in embedded.read_table(name))
        found = unique_texts(every if own is None else read_texts(own, study.corpus.n_texts), split)
        return [text[: study.corpus.max_characters] for text in found]

    def packed(split: Split, n_tokens: int) -> Callable[[], Tokens]:
        return lambda: pack(texts(split), source.tokenizer, n_positions, n_tokens)

    settings = study.corpus.source
    eval_split = study.corpus.eval_split
    ask = study.evaluation
    splits: tuple[tuple[Split, int, StorageDtype], ...] = (
        ("training", study.corpus.training_tokens, study.model.storage_dtype),
        (eval_split, study.corpus.heldout_tokens, "model"),
    )
    sets = {
        split: harvested(split, {"split": split, "tokens": n_tokens, **settings}, packed(split, n_tokens), dtype)
        for split, n_tokens, dtype in splits
    }
    runtime.give_back_freed_memory()
    n_pieces, n_windows = ask.shift_texts, ask.shift_windows
    shift = harvested(
        "shift",
        {"shift": [n_pieces, n_windows], "split": eval_split, **settings},
        lambda: shifted(texts(eval_split), source.tokenizer, n_positions, n_pieces, n_windows),
    )
    tasks, datasets = {}, {}
    for name in ask.order_tasks:
        task = make_order_task(
            name, source.tokenizer, n_positions, ask.order_train_groups, ask.order_test_groups, eval_split
        )
        tokens = partial(order_tokens, task, source.tokenizer, n_positions)
        tasks[name] = task, harvested(name, {"shuffled_too": True, "texts_of": list(task.texts)}, tokens)
    for name in ask.probe_datasets:
        dataset = read_probe_dataset(name, ask.probe_train, ask.probe_test, study.corpus.max_characters, eval_split)
        tokens = partial(pad, dataset.texts, source.tokenizer, n_positions)
        datasets[name] = dataset, harvested(name, {"texts_of": list(dataset.texts)}, tokens)
    return EvaluationData(
        sets["training"],
        sets[eval_split],
        shift,
        tasks,
        datasets,
        source.tokenizer,
        n_positions,
        ask,
        lambda: source.loaded,
    )
