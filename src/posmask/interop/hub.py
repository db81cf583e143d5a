"""Upload SAEs with their results to the Hugging Face hub in SAELens's layout, and download SAEs from it.

A repository holds one folder per cell (cfg.json, sae_weights.safetensors, README.md, rows.csv) and a README.md with a
section per cell. Only safetensors are read. huggingface_hub manages access tokens (`hf auth login`, or HF_TOKEN); they
are never printed.
"""

import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posmask.data.texts import HUB_PREFIX
from posmask.interop.hub_errors import hub_errors
from posmask.interop.reading import read_external
from posmask.interop.readme import IMPORT_LINE, positions_text
from posmask.interop.saelens_files import (
    CFG_FILE,
    README_FILE,
    SAELENS_WEIGHTS_FILE,
    UnknownPosition,
    export_saelens,
)
from posmask.interop.sites import described
from posmask.masks import MASKS
from posmask.results.rows import read_rows
from posmask.results.table import PRINTED, summarize
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae
from posmask.storage.layout import ROWS_FILE

__all__ = ["from_pretrained", "model_card", "push"]

CARD_FILE = README_FILE
_CELL_FILES = (CFG_FILE, SAELENS_WEIGHTS_FILE, README_FILE, ROWS_FILE)


def from_pretrained(
    repo: str,
    folder: str | None = None,
    *,
    n_positions: int | None = None,
    hook_name: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> SparseAutoencoder:
    """Download an SAE from a repository on the hub: one uploaded by `push`, or any that `read_external` reads.

    Without a network, huggingface_hub's cache is used.

    Args:
        repo: USER/NAME.
        folder: folder or file of the SAE in the repository; None for the SAE at its root, or its only one.
        n_positions: tokens per context; None for the length that its files state.
        hook_name: the site in TransformerLens's words, if its files do not state it.
        revision: branch, tag or commit; None for the main branch.
        allow_pickle: read pickled weights (.pt), in a process with limited memory.

    Raises:
        BadSetting: `repo` is not a repository's name, or it holds several SAEs and `folder` is None.
        MissingAsset: the repository or file does not exist or is not readable, or the hub is unreachable.
    """
    source = f"{HUB_PREFIX}{repo}" + (f"/{folder}" if folder else "")
    options = {"n_positions": n_positions, "hook_name": hook_name, "allow_pickle": allow_pickle}
    return read_external(source, revision=revision, **options)[0]


def push(
    cell: Path,
    repo: str,
    *,
    private: bool = False,
    model_name: str | None = None,
    unknown_position: UnknownPosition | None = None,
) -> str:
    """Upload a cell's SAE and its results to a repository, which is created if it does not exist.

    The folder in the repository has the name of the cell's folder and replaces one of that name; others stay.

    Args:
        cell: folder of the cell.
        repo: USER/NAME.
        private: create a new repository as private.
        model_name: name of the model in TransformerLens; None for the name in the SAE's origin.
        unknown_position: the position of vectors whose position a tool does not give; None: they are an error.

    Returns:
        The address of the repository.

    Raises:
        DamagedFolder: the cell holds no SAE, or its files differ from its manifest.
        BadSetting, MissingAsset: as `from_pretrained`.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    name = cell.resolve().name
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging) / name
        cfg = export_saelens(cell, staged, model_name=model_name, unknown_position=unknown_position)
        if (cell / ROWS_FILE).is_file():
            (staged / ROWS_FILE).write_bytes((cell / ROWS_FILE).read_bytes())
        with hub_errors(repo, "write to"):
            api = hub.HfApi()
            address = str(api.create_repo(repo, exist_ok=True, private=private))
            try:
                card = Path(hub.hf_hub_download(repo, CARD_FILE)).read_text(encoding="utf8")
            except EntryNotFoundError:
                card = ""
            card = model_card(cell, repo, name, cfg, card)
            (Path(staging) / CARD_FILE).write_text(card, encoding="utf8")
            files = [CARD_FILE, *(f"{name}/{file}" for file in _CELL_FILES)]
            with _unwrapped():
                api.upload_folder(
                    repo_id=repo, folder_path=staging, allow_patterns=files, commit_message=f"posmask: {name}"
                )
    return address


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the cause of a failed upload of a large file, which huggingface_hub wraps in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise error.__cause__ or error from None


def model_card(cell: Path, repo: str, name: str, cfg: Mapping[str, Any], card: str = "") -> str:
    """Return the text of a repository's README.md with a section on this cell.

    Args:
        cell: folder of the cell.
        repo: USER/NAME.
        name: the cell's folder in the repository.
        cfg: content of the folder's cfg.json.
        card: present text of README.md; a section of the same name is replaced, the rest stays.
    """
    section = f"<!-- posmask {name} -->\n{_section(cell, repo, name, cfg)}<!-- end {name} -->\n"
    old = re.compile(rf"<!-- posmask {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->\n", re.DOTALL)
    if old.search(card):
        return old.sub(lambda match: section, card)
    if card:
        return f"{card.rstrip()}\n\n{section}"
    model_name = cfg["metadata"].get("model_name")
    base = f"base_model: {model_name}\n" if model_name else ""
    head = f"---\nlibrary_name: saelens\ntags:\n- sparse-autoencoder\n- posmask\n{base}---\n\n"
    return f"{head}# Sparse autoencoders with position masks\n\n{section}"


def _section(cell: Path, repo: str, name: str, cfg: Mapping[str, Any]) -> str:
    sae, origin = read_sae(cell), read_origin(cell)
    mask = sae.mask.settings
    description = (inspect.getdoc(MASKS[mask.kind]) or "").partition("\n\n")[0].replace("\n", " ")
    mask_settings = {key: value for key, value in mask.model_dump(mode="json").items() if key != "kind"}
    site = f", {described(origin['layer'], origin.get('site', 'residual_after'))}" if "layer" in origin else ""
    tokens = f", trained on {origin['training_tokens']:,} tokens" if "training_tokens" in origin else ""
    lines = [
        f"## {name}",
        "",
        f"{sae.d_sae:,} latents on vectors of {sae.d_model:,} numbers from "
        f"{cfg['metadata'].get('model_name') or 'a model'}{site}{tokens}.",
        "",
        f"- mask: `{mask.kind}`. {description} Settings: `{mask_settings}`; {sae.mask.n_positions} positions, 0 = BOS.",
        f"- rule: `{sae.rule.settings.model_dump(mode='json')}`",
        "",
        positions_text(cfg),
        "",
        *_results(cell),
        "```python",
        "from posmask.interop.hub import from_pretrained",
        f'sae = from_pretrained("{repo}", "{name}")  # sae.encode(vectors, position)',
        "",
        f"{IMPORT_LINE}  # registers the architecture",
        "from sae_lens import SAE",
        f'sae = SAE.from_pretrained("{repo}", "{name}")  # sae.encode(vectors [batch, position, d_model])',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _results(cell: Path) -> Iterator[str]:
    """Yield the lines of a table of the cell's overall results; rows.csv has them per slice too."""
    if not (cell / ROWS_FILE).is_file():
        return
    rows = read_rows(cell / ROWS_FILE)
    yield from ("| metric | value | interval |", "|---|---|---|")
    for row in rows:
        if not row.slice:
            interval = "" if row.ci_low != row.ci_low else f"{_rounded(row.ci_low)} to {_rounded(row.ci_high)}"
            yield f"| {row.metric} | {_rounded(row.value)} | {interval} |"
    for line in summarize(rows):
        for column in PRINTED:
            value = line.numbers[column.name]
            if column.is_probing and value == value:
                yield f"| {column.full_title}, {line.pooling} pooling | {_rounded(value)} | |"
    yield from (
        "",
        "`rows.csv` has all results by position, task and text; posmask's `docs/metrics.md` defines the metrics.",
        "",
    )


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
