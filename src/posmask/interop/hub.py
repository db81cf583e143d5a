"""SAEs on the Hugging Face hub: a cell with its numbers goes there, in SAELens's layout, and comes back as one of ours.

A repository holds one folder a cell (cfg.json, sae_weights.safetensors, rows.csv) and a README.md with a section each.
Only safetensors are read. Tokens are huggingface_hub's business (`hf auth login`, or HF_TOKEN) and are never shown.
"""

import inspect
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posmask.errors import BadSetting, MissingAsset
from posmask.interop.saelens_files import (
    CFG_FILE,
    GEMMA_SCOPE_FILE,
    SAELENS_WEIGHTS_FILE,
    export_saelens,
    read_saelens,
)
from posmask.interop.sites import described
from posmask.masks import MASKS
from posmask.results.rows import read_rows
from posmask.results.table import summarize
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae

__all__ = ["from_pretrained", "model_card", "push"]

ROWS_FILE = "rows.csv"
CARD_FILE = "README.md"


def from_pretrained(
    repo: str, folder: str | None = None, *, n_positions: int | None = None, revision: str | None = None
) -> SparseAutoencoder:
    """The SAE in a repository on the hub: one that `push` put there, or any that `read_saelens` reads.

    Args:
        folder: in the repository; None: its only one.
        n_positions: as `read_saelens` takes it.

    Raises:
        BadSetting: the repository's name is none, or it holds several SAEs and `folder` is None.
        MissingAsset: there is no such repository or file, it may not be read, or the hub is out of reach.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hub.hf_hub_download(repo, f"{folder}/{name}", revision=revision))

    with _hub_errors(repo, "read"):
        if folder is None:
            folder = _only_folder(repo, hub.HfApi().list_repo_files(repo, revision=revision))
        try:
            path = fetch(CFG_FILE)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            try:
                path = fetch(GEMMA_SCOPE_FILE)
            except EntryNotFoundError:
                raise MissingAsset(
                    f"{repo} has no {folder}/{CFG_FILE}: name one of its folders that holds an SAE of SAELens 6"
                ) from None
        else:
            fetch(SAELENS_WEIGHTS_FILE)
    return read_saelens(path.parent, n_positions=n_positions)[0]


def _only_folder(repo: str, files: list[str]) -> str:
    found = sorted(path.rpartition("/")[0] for path in files if path.endswith((f"/{CFG_FILE}", f"/{GEMMA_SCOPE_FILE}")))
    if len(found) != 1:
        some = f"{', '.join(found[:5])}{', ..' if len(found) > 5 else ''}"
        raise BadSetting(f"{repo} holds {len(found)} SAEs{f' ({some})' if found else ''}: name a folder that holds one")
    return found[0]


def push(cell: Path, repo: str, *, private: bool = False, model_name: str | None = None) -> str:
    """Put a cell's SAE and its numbers into a repository, which is made if need be; returns its address.

    The cell's folder there has the name of its folder here; one of that name is replaced, others stay.

    Args:
        model_name: of the model as SAELens calls it; None: what the SAE's origin says.

    Raises:
        DamagedFolder: the cell holds no SAE, or its files differ from its manifest.
        BadSetting, MissingAsset: as `from_pretrained`.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    name = cell.resolve().name
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / name
        cfg = export_saelens(cell, staged, model_name=model_name)
        if (cell / ROWS_FILE).is_file():
            (staged / ROWS_FILE).write_bytes((cell / ROWS_FILE).read_bytes())
        with _hub_errors(repo, "write to"):
            api = hub.HfApi()
            address = str(api.create_repo(repo, exist_ok=True, private=private))
            try:
                card = Path(hub.hf_hub_download(repo, CARD_FILE)).read_text(encoding="utf8")
            except EntryNotFoundError:
                card = ""
            card = model_card(cell, repo, name, cfg["metadata"].get("model_name"), card)
            (Path(place) / CARD_FILE).write_text(card, encoding="utf8")
            files = [CARD_FILE, *(f"{name}/{file}" for file in (CFG_FILE, SAELENS_WEIGHTS_FILE, ROWS_FILE))]
            with _unwrapped():
                api.upload_folder(
                    repo_id=repo, folder_path=place, allow_patterns=files, commit_message=f"posmask: {name}"
                )
    return address


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise what went wrong with a large file, which huggingface_hub hides in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise error.__cause__ or error from None


def model_card(cell: Path, repo: str, name: str, model_name: str | None = None, card: str = "") -> str:
    """A repository's README.md with a section on this cell.

    Args:
        card: what stands there now; a section of the same name is replaced, the rest stays.
    """
    section = f"<!-- posmask {name} -->\n{_section(cell, repo, name, model_name)}<!-- end {name} -->\n"
    old = re.compile(rf"<!-- posmask {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->\n", re.DOTALL)
    if old.search(card):
        return old.sub(lambda found: section, card)
    if card:
        return f"{card.rstrip()}\n\n{section}"
    base = f"base_model: {model_name}\n" if model_name else ""
    head = f"---\nlibrary_name: saelens\ntags:\n- sparse-autoencoder\n- posmask\n{base}---\n\n"
    return f"{head}# Sparse autoencoders with position masks\n\n{section}"


def _section(cell: Path, repo: str, name: str, model_name: str | None) -> str:
    sae, origin = read_sae(cell), read_origin(cell)
    mask = sae.mask.settings
    what = (inspect.getdoc(MASKS[mask.kind]) or "").partition("\n\n")[0].replace("\n", " ")
    own = {key: value for key, value in mask.model_dump(mode="json").items() if key != "kind"}
    site = f", {described(origin['layer'], origin.get('site', 'residual_after'))}" if "layer" in origin else ""
    tokens = f", trained on {origin['training_tokens']:,} tokens" if "training_tokens" in origin else ""
    lines = [
        f"## {name}",
        "",
        f"{sae.d_sae:,} latents on vectors of {sae.d_model:,} numbers from {model_name or 'a model'}{site}{tokens}.",
        "",
        f"- mask: `{mask.kind}`. {what} Settings: `{own}`; {sae.mask.n_positions} positions, 0 = BOS.",
        f"- rule: `{sae.rule.settings.model_dump(mode='json')}`",
        "",
        *_numbers(cell),
        "```python",
        "from posmask.interop.hub import from_pretrained",
        f'sae = from_pretrained("{repo}", "{name}")  # sae.encode(vectors, position)',
        "",
        "import posmask.interop.saelens  # registers the architecture",
        "from sae_lens import SAE",
        f'sae = SAE.from_pretrained("{repo}", "{name}")  # sae.encode(vectors [batch, position, d_model])',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _numbers(cell: Path) -> Iterator[str]:
    """A table of what the cell's rows say of it as a whole; rows.csv has every slice."""
    if not (cell / ROWS_FILE).is_file():
        return
    rows = read_rows(cell / ROWS_FILE)
    yield from ("| metric | value | interval |", "|---|---|---|")
    for row in rows:
        if not row.slice:
            interval = "" if row.ci_low != row.ci_low else f"{_say(row.ci_low)} to {_say(row.ci_high)}"
            yield f"| {row.metric} | {_say(row.value)} | {interval} |"
    for line in summarize(rows):
        for what, accuracies in (("order", line.order), ("probe", line.probing)):
            for k, value in accuracies.items():
                if value == value:
                    yield f"| {what} accuracy, k = {k}, {line.pooling} pooling | {_say(value)} | |"
    yield from (
        "",
        "All of them by position, task and text: `rows.csv`; what they mean: posmask's `docs/metrics.md`.",
        "",
    )


def _say(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@contextmanager
def _hub_errors(repo: str, what: str) -> Iterator[None]:
    """Say in one sentence what huggingface_hub's errors mean here, and what to do."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except (errors.HFValidationError, errors.HfUriError):
        raise BadSetting(f"{repo!r} is not a repository's name: write USER/NAME") from None
    except errors.GatedRepoError:
        raise MissingAsset(f"{repo} is gated: accept its conditions on its page of the hub, then {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise MissingAsset(f"{repo} is not on the hub, or private: check the name, or {log_in}") from None
    except errors.RevisionNotFoundError:
        raise MissingAsset(f"{repo} has no such revision: name a branch, tag or commit of it") from None
    except errors.RemoteEntryNotFoundError:
        raise MissingAsset(f"{repo} lacks a file of that SAE: look at its page on the hub") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            remedy = f"{log_in}, with a token that may"
            raise MissingAsset(f"the hub does not let you {what} {repo} (status {code}): {remedy}") from None
        raise MissingAsset(f"the hub answered with status {code} when asked to {what} {repo}: try later") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, _network_error()):
        raise MissingAsset(
            f"the hub could not be reached to {what} {repo}, and the cache does not help: check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None


def _network_error() -> type[Exception]:
    """What the HTTP library under huggingface_hub raises, of whichever name and version."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
