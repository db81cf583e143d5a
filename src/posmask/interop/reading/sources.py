"""Read an SAE of another tool by its path, its place on the hub or its name in SAELens's list."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posmask.data.texts import HUB_PREFIX
from posmask.errors import BadSetting, DamagedFolder, MissingExtra, first_line
from posmask.interop.reading.convert import Origin, converted
from posmask.interop.reading.download import download
from posmask.interop.reading.form import Form
from posmask.interop.reading.formats import FORMATS, UNREADABLE_CONVERSIONS, folder_of, recognized
from posmask.interop.reading.releases import Listed, listed_at, listed_sae
from posmask.interop.weights import PICKLES, Weights
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import write_sae
from posmask.storage.atomic import check_new_folder
from posmask.storage.layout import SAE_FILE
from posmask.storage.manifest import write_folder

__all__ = ["SAELENS_PREFIX", "from_saelens", "import_sae", "is_external", "read_external", "remarks"]

SAELENS_PREFIX = "saelens:"


def is_external(path: Path) -> bool:
    """Whether a path holds an SAE of another tool, and none of posmask."""
    return not (path / SAE_FILE).is_file() and recognized(folder_of(path.as_posix()), _is_file) is not None


def import_sae(source: str | Path, folder: Path, **options: Any) -> SparseAutoencoder:
    """Read an SAE with `read_external`, write it as a folder of posmask, and return it.

    Args:
        source: see `read_external`.
        folder: must not exist, or be empty.
        options: of `read_external`.

    Raises:
        BadSetting: the folder exists and is not empty, or `read_external` raises it.
    """
    check_new_folder(folder)
    sae, origin = read_external(source, **options)
    with write_folder(folder, {"what": "import", "n_positions": sae.mask.n_positions, **origin["imported"]}) as draft:
        write_sae(sae, draft, origin)
    return sae


def read_external(
    source: Any,
    *,
    n_positions: int | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> tuple[SparseAutoencoder, Origin]:
    """Read an SAE of another tool, and its origin: model, layer, site and what its metadata states.

    An SAE of architecture `posmask` keeps its mask; others are open at every position. Reconstructions stay the same.
    Codes stay the same if all decoder rows have one norm; otherwise they are multiplied by the norms, as SAELens's
    `fold_W_dec_norm` does. Coefficients that only matter in training are 0.

    Args:
        source: a folder or file, `hf:USER/NAME[/PATH]` on the hub, `saelens:RELEASE/ID` of SAELens's list, or an SAE
            that SAELens has loaded.
        n_positions: tokens per context; None for the length that its files state.
        model_name: the model; None for the one that its files state.
        hook_name: the site in TransformerLens's words, if its files do not state it.
        revision: of a repository on the hub: branch, tag or commit; None for the main branch.
        allow_pickle: read pickled weights (.pt), in a process with limited memory.

    Raises:
        BadSetting: the architecture, site or normalization is not supported, the site or the context length is
            unknown, or weights are pickled.
        DamagedFolder: files are missing, or tensors are missing, misshapen or not finite.
        MissingAsset: the hub has no such SAE, or is unreachable.
        MissingExtra: a name of SAELens's list, and SAELens is not installed.
    """
    is_name = isinstance(source, str | Path)
    form = _form(source, revision, allow_pickle=allow_pickle) if is_name else _form_of_object(source)
    return converted(form, n_positions=n_positions, model_name=model_name, hook_name=hook_name)


def from_saelens(sae: Any, *, n_positions: int | None = None) -> SparseAutoencoder:
    """Convert a loaded SAE of SAELens, as `SAE.from_pretrained` returns it; it is not changed.

    Args:
        sae: of architecture standard, topk, jumprelu, gated or posmask. An SAE in training is converted as SAELens
            saves it for inference.
        n_positions: tokens per context; None for `sae.cfg.metadata.context_size`.

    Raises:
        BadSetting: it is not an SAE of SAELens, its architecture, site or normalization is not supported, or the
            context length is unknown.
    """
    return converted(_form_of_object(sae), n_positions=n_positions)[0]


def _form(source: str | Path, revision: str | None, *, allow_pickle: bool) -> Form:
    text = str(source)
    if text.startswith(SAELENS_PREFIX):
        release, _, sae_id = text.removeprefix(SAELENS_PREFIX).partition("/")
        listed = listed_sae(release, sae_id)
        if listed.conversion in UNREADABLE_CONVERSIONS:
            what = UNREADABLE_CONVERSIONS[listed.conversion]
            raise BadSetting(f"release {release} holds {what}, which posmask does not read: choose another")
        if not any(listed.conversion in format.conversions for format in FORMATS):
            return _form_of_saelens(release, sae_id)
        path, _ = download(listed.repo, listed.path, revision=revision, allow_pickle=allow_pickle)
        return _with_listed(_form_at(path, allow_pickle=allow_pickle), listed)
    if text.startswith(HUB_PREFIX):
        *repository, inside = [*text.removeprefix(HUB_PREFIX).split("/", 2), "", ""][:3]
        repo = "/".join(filter(None, repository))
        path, found = download(repo, inside.strip("/") or None, revision=revision, allow_pickle=allow_pickle)
        return _with_listed(_form_at(path, allow_pickle=allow_pickle), listed_at(repo, found))
    return _form_at(Path(source), allow_pickle=allow_pickle)


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _form_at(path: Path, *, allow_pickle: bool) -> Form:
    """Read the SAE in a folder or file.

    Raises:
        DamagedFolder: there is none of a known format.
    """
    path = Path(folder_of(path.as_posix()))
    format = recognized(path.as_posix(), _is_file)
    if format is None:
        raise DamagedFolder(_why_unknown(path))
    try:
        return format.read(path, allow_pickle=allow_pickle)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, ZeroDivisionError) as error:
        reason = f"its settings lack {error}" if isinstance(error, KeyError) else first_line(error)
        raise BadSetting(f"{path}: {reason}: fetch an SAE with complete settings") from None


def _why_unknown(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist: give a folder, hf:USER/NAME/PATH or saelens:RELEASE/ID"
    here = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    if pickled := sorted(name for name in here if name.endswith(PICKLES)):
        return (
            f"{path} holds pickled weights ({pickled[0]}) of no known format, which are never read: get safetensors, "
            "or load them with SAELens if you trust them and save them with save_model"
        )
    missing = sorted({file for f in FORMATS if here.intersection(f.files) for file in f.files if file not in here})
    if missing:
        some = sorted(here.intersection(file for format in FORMATS for file in format.files))
        return f"{path} holds {', '.join(some)}, but not {' or '.join(missing)}: fetch the folder again"
    layouts = "; ".join(f"{format.name}: {', '.join(format.files)}" for format in FORMATS if format.files)
    return f"{path} holds no SAE of a known format ({layouts}): give the folder of an SAE"


def _with_listed(form: Form, listed: Listed | None) -> Form:
    """Add what SAELens's list says about an SAE to what its files say."""
    if listed is None:
        return form
    metadata = {**(form.cfg.get("metadata") or {}), **listed.overrides}
    cfg = {**form.cfg, "metadata": metadata}
    if "normalize_activations" in listed.overrides:
        cfg["normalize_activations"] = metadata.pop("normalize_activations")
    if listed.norm_scaling_factor is not None:
        cfg.setdefault("norm_scaling_factor", listed.norm_scaling_factor)
    return dataclasses.replace(form, cfg=cfg, centering_unstated=False)


def _form_of_saelens(release: str, sae_id: str) -> Form:
    """Load an SAE with SAELens, for formats of its list that have no reader here."""
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise MissingExtra(
            f"release {release} needs SAELens ({first_line(error)}): pip install 'posmask[saelens]'"
        ) from None
    return _form_of_object(SAE.from_pretrained(release, sae_id, device="cpu"))


def _form_of_object(sae: Any) -> Form:
    if not (hasattr(sae, "state_dict") and hasattr(getattr(sae, "cfg", None), "to_dict")):
        raise BadSetting(f"a {type(sae).__name__} is not an SAE of SAELens: give what SAE.from_pretrained returns")
    tensors = dict(sae.state_dict())
    if hasattr(sae, "process_state_dict_for_saving_inference"):  # an SAE in training
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        sae.process_state_dict_for_saving_inference(tensors)
        cfg = sae.cfg.get_inference_sae_cfg_dict()
    else:
        cfg = sae.cfg.to_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Form(cfg, Weights(None, shapes, lambda: dict(tensors)))


def remarks(origin: Mapping[str, Any], n_positions: int) -> Iterator[str]:
    """Sentences on how an imported SAE was trained that matter for its use at so many positions."""
    if "imported" not in origin:
        return
    metadata = origin.get("metadata", {})
    if metadata.get("prepend_bos") is False:
        yield "It was trained on contexts without BOS; those of posmask begin with BOS."
    if metadata.get("seqpos_slice") not in (None, [None], [None, None], [None, None, None]):
        yield f"It was trained on the positions {metadata['seqpos_slice']} (start, stop, step) of each context only."
    length = metadata.get("context_size")
    if isinstance(length, int) and n_positions > length:
        yield f"It was trained on contexts of {length} tokens and is used at {n_positions} positions."
    arguments = metadata.get("model_from_pretrained_kwargs") or {}
    if arguments.get("center_writing_weights"):
        yield (
            "It was trained on vectors without their mean over d_model (center_writing_weights). Codes are those of "
            "SAELens; reconstructions lack that mean, which the model's LayerNorm removes."
        )
    if origin["imported"].get("centering") == "unstated":
        yield (
            "Its settings do not say whether vectors were centered (center_writing_weights), as for early SAEs of gpt2,"
            " which would change its codes: SAELens's list does, so prefer saelens:RELEASE/ID."
        )
    if other := {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}:
        yield f"Its model was loaded with {other}: check that yours is the same."
    if "layer" not in origin:
        yield "Its files do not state its site, so nothing checks that a study reads the same one."


_WITHOUT_EFFECT = {
    "center_writing_weights",
    "center_unembed",
    "fold_ln",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
    "device",
    "n_devices",
    "dtype",
    "torch_dtype",
}
"""Arguments of TransformerLens that do not change vectors, or that are folded."""
