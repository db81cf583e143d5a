"""Download an SAE of any format from the Hugging Face hub, or find it in the cache of huggingface_hub."""

from pathlib import Path, PurePosixPath

from posmask.errors import BadSetting, MissingAsset
from posmask.interop.hub_errors import hub_errors, network_error
from posmask.interop.reading.formats import Format, folder_of, recognized
from posmask.interop.weights import check_pickle_allowed

__all__ = ["download"]

_ANSWER_SECONDS = 30.0


def download(
    repo: str, path: str | None, *, revision: str | None = None, allow_pickle: bool = False
) -> tuple[Path, str]:
    """Download the files of one SAE; return its folder, or its file, in the cache, and its path in the repository.

    Args:
        repo: USER/NAME.
        path: folder or file of the SAE in the repository; None for the SAE at its root, or its only one.
        revision: branch, tag or commit; None for the main branch.
        allow_pickle: whether pickled weights are downloaded.

    Raises:
        BadSetting: the repository holds several SAEs and `path` is None, or weights are pickled.
        MissingAsset: the repository or SAE does not exist or is not readable, or the hub is unreachable.
    """
    import huggingface_hub as hub

    with hub_errors(repo, "read"):
        names = _names(repo, revision)
        found, format = _only_sae(repo, names) if path is None else _sae_at(repo, path, names)
        format.check_names([*reversed(found.split("/")), f"models--{repo}"])
        if format.is_pickled:
            check_pickle_allowed(f"{repo}/{found}", allow_pickle=allow_pickle)
        files = {
            name: Path(hub.hf_hub_download(repo, name, revision=revision))
            for name in format.files_of(found, names.__contains__)
        }
    if format.one_file:
        return files[found], found
    name, file = next(iter(files.items()))
    return file.parents[name.count("/")] / found, found


def _names(repo: str, revision: str | None) -> set[str]:
    """The repository's files; without a network, those in the cache."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        # Listing the files by `list_repo_files` would wait without limit for a server that says nothing.
        about = hub.HfApi().model_info(repo, revision=revision, timeout=_ANSWER_SECONDS)
        return {sibling.rfilename for sibling in about.siblings or ()}
    except (errors.OfflineModeIsEnabled, ConnectionError, network_error()) as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise
        snapshot = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        return {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()}


def _sae_at(repo: str, path: str, names: set[str]) -> tuple[str, Format]:
    found = folder_of(path.strip("/"))
    if (format := recognized(found, names.__contains__)) is None:
        at = f" at {found}" if found else ""
        others = sorted({other for other, _ in _saes(names)})
        known = f"name one of its SAEs, such as {', '.join(others[:3])}" if others else "look at its page on the hub"
        raise MissingAsset(f"{repo} has no SAE of a known format{at}: {known}")
    return found, format


def _only_sae(repo: str, names: set[str]) -> tuple[str, Format]:
    saes = dict(_saes(names))
    if "" in saes:
        return "", saes[""]
    if len(saes) != 1:
        listed = sorted(saes)
        shown = f" ({', '.join(listed[:5])}{', ..' if len(listed) > 5 else ''})" if listed else ""
        raise BadSetting(f"{repo} holds {len(saes)} SAEs of known formats{shown}: name the folder or file of one")
    return next(iter(saes.items()))


def _saes(names: set[str]) -> list[tuple[str, Format]]:
    """Every SAE in a repository, and its format."""
    paths = {*names, *(parent.as_posix().removeprefix(".") for name in names for parent in PurePosixPath(name).parents)}
    found = [(path, recognized(path, names.__contains__)) for path in sorted(paths)]
    return [(path, format) for path, format in found if format is not None]
