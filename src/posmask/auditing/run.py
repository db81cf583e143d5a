"""Audit SAEs of one site: harvest what is missing, evaluate each SAE, and write its tables."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from posmask.auditing.cost import expected_sentence
from posmask.auditing.measures import beyond_context, beyond_table, order_table, position_table, removal_table
from posmask.auditing.result import AuditReport, read_audit
from posmask.auditing.settings import DEFAULT_TOKENS, AuditSettings, audit_settings
from posmask.auditing.subject import Subject, read_subject
from posmask.auditing.summary import summarized
from posmask.data.activations import Activations
from posmask.errors import BadSetting
from posmask.evaluation.suite import EvaluationData
from posmask.interop import reading, sites
from posmask.kernels import devices, runtime
from posmask.progress import announce, progress_bar
from posmask.results import rows
from posmask.sae.files import write_sae
from posmask.storage import layout, manifest
from posmask.storage.json_file import read_json
from posmask.storage.record import check_links, claim_of
from posmask.study.cell import evaluate_to_folder, fill_baselines
from posmask.study.harvests import heldout_of, prepare
from posmask.study.run import check_shared
from posmask.study.source import Source
from posmask.study.targets import Target, results_origin, rows_in, state_of

__all__ = ["audit", "audit_all"]

_VERSION = 1
"""Part of the identity of an audit; changes when its tables do."""
_BEYOND_CONTEXTS = 6
_N_WORDS = 5


def audit(sae: Any, **options: Any) -> AuditReport:
    """Audit one SAE: which latents depend on position, where reconstruction fails, and what codes know of order.

    Args:
        sae: a folder, file or name as in `posmask import`, the folder of a cell, or a loaded SAE of posmask or SAELens.
        options: see `audit_all`.

    Returns:
        Its tables; `latents`, `positions`, `order` and `removal` are data frames.

    Raises:
        BadSetting: see `audit_all`.
    """
    return audit_all([sae], **options)[0]


def audit_all(
    saes: Sequence[Any],
    *,
    model: str | None = None,
    layer: int | None = None,
    site: str | None = None,
    texts: str | None = None,
    n_texts: int | None = None,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    order: bool = True,
    device: str = "cpu",
    allow_pickle: bool = False,
    root: Path | str | None = None,
) -> list[AuditReport]:
    """Audit SAEs of one site of one model on the same texts.

    Finished audits with the same settings are read, not repeated. Vectors are harvested once.

    Args:
        saes: each as in `audit`.
        model: a name on the hub, a folder, or `embedded:SmolLM2-135M-Instruct`; None for the one that the SAEs state.
        layer: residual stream after this many layers; None for the site that the SAEs state.
        site: in TransformerLens's words, such as blocks.6.hook_resid_pre; None for the one that the SAEs state.
        texts: a file or folder of .txt, .jsonl or .jsonl.zst, or hf:OWNER/NAME; None for embedded texts.
        n_texts: how many of the texts are read; None for all.
        tokens: kept held-out tokens.
        context: tokens per context, including BOS; None for the length that the SAEs state.
        order: whether to probe for order, which takes about a third of the time.
        device: of the model and the SAEs.
        allow_pickle: read pickled weights (.pt) of SAEs, in a process with limited memory.
        root: folder for harvests and results; None for audits/MODEL-SITE.

    Raises:
        BadSetting: model, site or context length are unknown, do not fit or differ between the SAEs.
        NothingToDo: the texts have too few tokens.
        DamagedFolder: files of an SAE are missing or damaged.
    """
    devices.check_device(device)
    if site is not None and layer is not None:
        raise BadSetting(f"site = {site!r} and layer = {layer} both name the site: give one of them")
    hook = site if layer is None else sites.hook_name(layer, "residual_after")
    subjects = [read_subject(sae, context=context, model=model, hook=hook, allow_pickle=allow_pickle) for sae in saes]
    subjects = _uniquely_named(subjects)
    settings = audit_settings(
        subjects, model=model, texts=texts, n_texts=n_texts, n_tokens=tokens, order=order, device=device
    )
    root = Path("audits") / settings.name if root is None else Path(root)
    for subject in subjects:
        for remark in reading.remarks(subject.origin, settings.corpus.n_positions):
            announce(f"{subject.name}: {remark}")
    return [read_audit(folder) for folder in _run(settings, subjects, root)]


def _uniquely_named(subjects: Sequence[Subject]) -> list[Subject]:
    names: list[str] = []
    for subject in subjects:
        name, number = subject.name, 2
        while name in names:
            name, number = f"{subject.name}-{number}", number + 1
        names.append(name)
    return [Subject(name, subject.sae, subject.origin) for name, subject in zip(names, subjects, strict=True)]


def _run(settings: AuditSettings, subjects: Sequence[Subject], root: Path) -> list[Path]:
    """Make what is missing, and return the folder of each SAE."""
    runtime.keep_freed_memory()
    source = Source(settings.model, settings.device)
    shared = results_origin(settings, source)
    baseline = Target(None, 0, root, layout.cell_folder(root, layout.BASELINES), shared)
    targets = [
        Target(
            None,
            0,
            root,
            layout.evaluated_folder(root, subject.name),
            {**shared, "sae": {"sha256": subject.sha256(), "audit": _VERSION, "beyond": settings.beyond_positions}},
        )
        for subject in subjects
    ]
    check_links(root)
    check_shared(baseline)
    missing = [target for target in (baseline, *targets) if state_of(target, verify=True) != "finished"]
    for target in missing:
        manifest.check_aside(target.folder)
    if missing:
        todo = [subject for subject, target in zip(subjects, targets, strict=True) if target in missing]
        announce(expected_sentence(settings, todo, source, root))
        data = prepare(settings, source, root, for_training=False)
        beyond = _beyond(settings, source, root)
        for target in missing:
            with claim_of(root, target.folder, wait=True):
                if state_of(target, verify=True) == "finished":
                    continue
                if target.folder.exists():
                    moved = manifest.set_aside(target.folder, layout.stale_paths(root, target.label))
                    announce(f"{target.label} was made from other settings: moved to {moved}.")
                if target is baseline:
                    fill_baselines(settings, target, data)
                else:
                    subject = subjects[targets.index(target)]
                    _fill(settings, target, subject, data, beyond, rows_in(baseline))
    return [target.folder for target in targets]


def _beyond(settings: AuditSettings, source: Source, root: Path) -> Activations | None:
    """Vectors of contexts that are longer than the SAEs'."""
    if settings.beyond_positions is None:
        return None
    update = {"n_positions": settings.beyond_positions, "heldout_tokens": settings.beyond_tokens}
    return heldout_of(settings.model_copy(update={"corpus": settings.corpus.model_copy(update=update)}), source, root)


def _fill(
    settings: AuditSettings,
    target: Target,
    subject: Subject,
    data: EvaluationData,
    beyond: Activations | None,
    baseline: list[rows.Row],
) -> None:
    """Evaluate an SAE and write its folder."""
    sae = subject.sae.to(settings.device)
    with manifest.write_folder(target.folder, target.made_from) as draft:
        columns = {"cell": subject.name, "budget": "", "seed": 0}
        evaluate_to_folder(settings, target, sae, data, baseline, draft, columns)
        runtime.give_back_freed_memory()
        of_sae, units = rows.read_rows(draft / layout.ROWS_FILE), rows.read_units(draft / layout.UNITS_FILE)
        units_of_stream = rows.read_units(layout.cell_folder(target.root, layout.BASELINES) / layout.UNITS_FILE)
        latents = pd.read_parquet(draft / layout.LATENT_TABLE_FILE)
        with progress_bar(f"tables of {subject.name}", 5, "tables") as advance:
            order = order_table({"codes": of_sae, "stream": baseline}, {"codes": units, "stream": units_of_stream})
            advance(1)
            removal = removal_table(sae, latents, data)
            advance(1)
            positions, differences = position_table(sae, data, of_sae), None
            advance(1)
            data.in_model.forget()  # Longer contexts need as much memory.
            runtime.give_back_freed_memory()
            if beyond is not None:
                latents = latents.join(beyond_context(sae, beyond, data.n_positions))
                advance(1)
                further, differences = beyond_table(sae, data, beyond, _BEYOND_CONTEXTS)
                positions = pd.concat([positions, further], ignore_index=True)
            latents = latents.join(_words(draft))
            advance(1 if beyond is not None else 2)
        about = _about(settings, subject, data)
        summary = summarized(about, of_sae, latents, differences, order, removal)
        latents.to_parquet(draft / layout.LATENT_TABLE_FILE)
        tables: dict[str, pd.DataFrame] = {
            layout.LATENT_CSV_FILE: latents,
            layout.POSITIONS_FILE: positions,
            layout.ORDER_FILE: order,
            layout.REMOVAL_FILE: removal,
        }
        for name, table in tables.items():
            table.to_csv(draft / name, index=False, lineterminator="\n")
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        (draft / layout.SUMMARY_FILE).write_text(text, encoding="utf8")
        write_sae(sae, draft, subject.origin)
    runtime.give_back_freed_memory()


def _about(settings: AuditSettings, subject: Subject, data: EvaluationData) -> dict[str, Any]:
    model = settings.model
    assert isinstance(model.layer, int)
    return {
        "name": subject.name,
        "model": model.name,
        "site": sites.hook_name(model.layer, model.site),
        "d_sae": subject.sae.d_sae,
        "rule": subject.sae.rule.settings.kind,
        "mask": subject.sae.mask.settings.kind,
        "n_positions": settings.corpus.n_positions,
        "tokens": data.heldout.n_kept,
        "texts": settings.corpus.texts or "embedded texts",
        "n_texts": len(data.heldout.text[data.heldout.keep].unique()),
        "sink_tokens": int(data.heldout.sink.sum()),
    }


def _words(folder: Path) -> pd.DataFrame:
    """The columns `promoted` (tokens that a latent's decoder row promotes most) and `example` (its strongest text)."""
    arrays = load_file(folder / layout.LATENTS_FILE)
    described = read_json(folder / layout.LATENT_WORDS_FILE)
    words = {int(token): word for token, word in described["words"].items()}
    promoted = [" | ".join(words[token] for token in ids) for ids in arrays["promoted"][:, :_N_WORDS].tolist()]
    show: Callable[[int], str] = lambda latent: _example(arrays, words, latent)  # noqa: E731
    return pd.DataFrame({"promoted": promoted, "example": [show(latent) for latent in range(len(promoted))]})


def _example(arrays: dict[str, np.ndarray], words: dict[int, str], latent: int) -> str:
    """The text on which a latent is most active, with the strongest token in «»; empty if there is none."""
    start, length = int(arrays["text_start"][latent, 0]), int(arrays["text_length"][latent, 0])
    if start < 0:
        return ""
    peak = int(arrays["text_value"][latent, 0, :length].argmax())
    shown = [words[token] for token in arrays["token_id"][start : start + length].tolist()]
    shown[peak] = f"«{shown[peak]}»"
    return "".join(shown)
