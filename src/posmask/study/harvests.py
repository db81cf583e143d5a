"""Harvests of a study: the declarative list of vector sets that all cells share, and its execution.

`harvests` lists what is needed without reading a text or loading the model. `prepare` executes the list; estimates
print it.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from posmask.data import embedded
from posmask.data.activations import Activations, StorageDtype, finished_activations
from posmask.data.harvest import ComputeShards, harvest
from posmask.data.texts import read_texts
from posmask.data.tokens import Split, SplitTexts, Tokens, pack, pack_singly, pad, select_texts, shifted, whole_text_key
from posmask.errors import DamagedFolder, NothingToDo
from posmask.evaluation.suite import EvaluationData
from posmask.kernels import runtime
from posmask.probing.datasets import ProbeDataset, read_probe_dataset
from posmask.probing.order_probes import order_tokens
from posmask.probing.order_tasks import OrderTask, make_order_task
from posmask.progress import announce
from posmask.storage import layout, manifest
from posmask.storage.record import claim_of
from posmask.storage.remote import Store
from posmask.study.settings import MeasurementSettings
from posmask.study.source import Source

__all__ = ["Harvest", "HarvestKind", "harvests", "heldout_of", "prepare"]

HELDOUT_TEXTS = 32
"""Held-out tokens come from at least this many texts if possible, because texts are the units of intervals."""

HarvestKind = Literal["training", "heldout", "shift", "order", "probes"]


@dataclass(frozen=True)
class Harvest:
    """One set of vectors, declared by the settings that decide it."""

    kind: HarvestKind
    label: str
    """The split's name, `shift`, or the name of the order task or probe dataset."""
    made_from: Mapping[str, Any]
    storage_dtype: StorageDtype = "model"

    def folder(self, root: Path) -> Path:
        return layout.activations_folder(root) / f"{self.label}-{manifest.identity(self.made_from)}"

    def facts(self, root: Path) -> Mapping[str, Any] | None:
        """The manifest of the finished folder; None if it is not finished. A remote store is not consulted."""
        try:
            return manifest.read_manifest(self.folder(root))
        except DamagedFolder:
            return None


def harvests(study: MeasurementSettings, model: Mapping[str, Any], texts: Mapping[str, Any]) -> list[Harvest]:
    """Every set of vectors that a study needs, in the order of execution.

    Args:
        model: `Source.made_from`.
        texts: `texts_identity`.
    """
    corpus, evaluation = study.corpus, study.evaluation
    shared = {"model": model, "texts": texts, "n_positions": corpus.n_positions}
    split: dict[str, Any] = {"split": corpus.eval_split}

    def declare(
        kind: HarvestKind, label: str, settings: Mapping[str, Any], storage_dtype: StorageDtype = "model"
    ) -> Harvest:
        return Harvest(kind, label, {**shared, **settings, "stored": storage_dtype}, storage_dtype)

    training = {"split": "training", "tokens": corpus.training_tokens, **corpus.source}
    heldout = {"tokens": corpus.heldout_tokens, **split, **corpus.source}
    shift = {"shift": [evaluation.shift_texts, evaluation.shift_windows], **split, **corpus.source}
    order = {"groups": [evaluation.order_train_groups, evaluation.order_test_groups], **split}
    probes = {"probe_texts": [evaluation.probe_train, evaluation.probe_test], **split}
    probes["max_characters"] = corpus.max_characters
    return [
        declare("training", "training", training, study.model.storage_dtype),
        declare("heldout", corpus.eval_split, heldout),
        declare("shift", "shift", shift),
        *(declare("order", name, {"order_task": name, **order}) for name in evaluation.order_tasks),
        *(declare("probes", name, {"probe_dataset": name, **probes}) for name in evaluation.probe_datasets),
    ]


def prepare(
    study: MeasurementSettings,
    source: Source,
    root: Path,
    compute: ComputeShards | None = None,
    *,
    for_training: bool = True,
) -> EvaluationData:
    """Harvest what is missing and return everything that cells train on and are evaluated with.

    Args:
        compute: computes vectors on other machines; None: this process does.
        for_training: False harvests training vectors only if they are used.

    Raises:
        DegenerateResult: all held-out vectors are equal.
        BadSetting: the texts were changed while this process read them.
    """
    vectors = _Vectors(study, source, root, compute)
    by_kind: dict[HarvestKind, list[Harvest]] = {}
    for item in harvests(study, source.made_from, source.texts_identity(study)):
        by_kind.setdefault(item.kind, []).append(item)
    (training,), (heldout,), (shift,) = (by_kind[kind] for kind in ("training", "heldout", "shift"))
    load_training = cache(partial(vectors.packed, training, "training", study.corpus.training_tokens))
    if for_training:
        load_training()
    heldout_vectors = vectors.packed(heldout, study.corpus.eval_split, study.corpus.heldout_tokens)
    _ = heldout_vectors.center_and_scale  # Fails before anything is trained if the model gives constant vectors.
    runtime.give_back_freed_memory()
    return EvaluationData(
        load_training,
        heldout_vectors,
        vectors.shifted(shift),
        {item.label: vectors.order_task(item) for item in by_kind.get("order", [])},
        {item.label: vectors.probe_dataset(item) for item in by_kind.get("probes", [])},
        source.tokenizer,
        study.corpus.n_positions,
        study.evaluation,
        lambda: source.loaded,
    )


def heldout_of(study: MeasurementSettings, source: Source, root: Path) -> Activations:
    """Harvest the held-out vectors alone if they are missing, and return them."""
    items = harvests(study, source.made_from, source.texts_identity(study))
    (heldout,) = (item for item in items if item.kind == "heldout")
    vectors = _Vectors(study, source, root, None)
    return vectors.packed(heldout, study.corpus.eval_split, study.corpus.heldout_tokens)


class _Vectors:
    """Finds or harvests the vectors of a study's harvests."""

    def __init__(self, study: MeasurementSettings, source: Source, root: Path, compute: ComputeShards | None) -> None:
        self._study, self._source, self._root, self._compute = study, source, root, compute
        self._n_positions = study.corpus.n_positions
        self._store = _remote_store(study, root)
        self._texts = cache(self._read_texts)

    def packed(self, item: Harvest, split: Split, n_tokens: int) -> Activations:
        def tokens() -> Tokens:
            texts, tokenizer = self._texts(split), self._source.tokenizer
            if self._study.corpus.packing is not None:
                return pack_singly(texts.texts, tokenizer, self._n_positions, n_tokens, description=str(texts))
            if item.kind == "heldout":
                most = max(self._n_positions, math.ceil(n_tokens / HELDOUT_TEXTS))
                with contextlib.suppress(NothingToDo):
                    return pack(texts.texts, tokenizer, self._n_positions, n_tokens, most_per_text=most)
                announce(
                    f"The {split} texts are too few or short for {n_tokens:,} tokens with at most {most:,} of each: "
                    "long ones are used whole, so intervals may rest on few texts."
                )
            return pack(texts.texts, tokenizer, self._n_positions, n_tokens, description=str(texts))

        return self._find(item, tokens)

    def shifted(self, item: Harvest) -> Activations:
        split, evaluation = self._study.corpus.eval_split, self._study.evaluation
        n_texts, n_windows = evaluation.shift_texts, evaluation.shift_windows

        def tokens() -> Tokens:
            texts = self._texts(split)
            tokenizer, description = self._source.tokenizer, str(texts)
            return shifted(texts.texts, tokenizer, self._n_positions, n_texts, n_windows, description=description)

        return self._find(item, tokens)

    def order_task(self, item: Harvest) -> tuple[OrderTask, Activations]:
        evaluation, tokenizer = self._study.evaluation, self._source.tokenizer
        n_train, n_test = evaluation.order_train_groups, evaluation.order_test_groups
        split = self._study.corpus.eval_split
        task = make_order_task(item.label, tokenizer, self._n_positions, n_train, n_test, split)
        return task, self._find(item, lambda: order_tokens(task, tokenizer, self._n_positions), task.texts)

    def probe_dataset(self, item: Harvest) -> tuple[ProbeDataset, Activations]:
        evaluation, corpus = self._study.evaluation, self._study.corpus
        n_train, n_test = evaluation.probe_train, evaluation.probe_test
        dataset = read_probe_dataset(item.label, n_train, n_test, corpus.max_characters, corpus.eval_split)
        tokenizer = self._source.tokenizer
        return dataset, self._find(item, lambda: pad(dataset.texts, tokenizer, self._n_positions), dataset.texts)

    def _read_texts(self, split: Split) -> SplitTexts:
        corpus = self._study.corpus
        announce(f"Reading the {split} texts of {corpus.texts or f'{len(corpus.tables)} tables'}.")
        if corpus.texts is None:
            table_texts = (text for name in corpus.tables for text, _ in embedded.read_table(name))
            texts = select_texts(table_texts, split, max_characters=corpus.max_characters)
        else:
            own_texts = read_texts(corpus.texts, corpus.n_texts)
            texts = select_texts(own_texts, split, key=whole_text_key, max_characters=corpus.max_characters)
            self._source.check_texts(self._study)
        announce(f"Read {texts}.")
        return texts

    def _find(self, item: Harvest, tokens: Callable[[], Tokens], texts: Sequence[str] = ()) -> Activations:
        """The vectors of a harvest, which are harvested first if they are not finished.

        Args:
            texts: of a task or dataset, whose content is compared too: a dataset on the hub may change.
        """
        made_from = {**item.made_from, **({"texts_sha256": _texts_sha256(texts)} if texts else {})}
        local = item.folder(self._root)
        folder = local if self._store is None else self._store.folder(local.name)

        def finished() -> Activations | None:
            with contextlib.suppress(DamagedFolder):  # `harvest` reports and repairs it.
                return finished_activations(folder, made_from)
            return None

        if (activations := finished()) is not None:
            return activations
        with claim_of(self._root, local, wait=True):
            activations = finished()  # Another process may have harvested it in the meantime.
            if activations is None:
                model = self._source.loaded if self._compute is None else None
                activations = harvest(tokens(), model, folder, made_from, item.label, item.storage_dtype, self._compute)
            return activations


def _remote_store(study: MeasurementSettings, root: Path) -> Store | None:
    """The store that `activations_url` names, with its local cache under `root`; None: vectors stay under `root`."""
    if study.activations_url is None:
        return None
    cache_bytes = round(study.activations_cache_gb * 1e9)
    return Store(study.activations_url, layout.cache_folder(root), cache_bytes)


def _texts_sha256(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
