"""Build the SAE of a cell, from random weights or from another SAE."""

from pathlib import Path

from posmask import masks
from posmask.data.activations import Activations
from posmask.errors import BadSetting
from posmask.kernels.devices import memory_for
from posmask.masks.base import PositionMask
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae
from posmask.sae.warm_start import renormalize_, warm_start
from posmask.storage.layout import WEIGHTS_FILE
from posmask.storage.record import check_identity, check_sha256
from posmask.study.settings import CellSettings, StudySettings
from posmask.study.targets import Target

__all__ = ["check_buildable", "make_sae", "read_init", "untrained"]


def make_sae(study: StudySettings, cell: CellSettings, d_model: int, seed: int) -> SparseAutoencoder:
    """The SAE of a cell that starts from random weights."""
    return SparseAutoencoder(d_model, study.rule_of(cell), _make_mask(study, cell, seed), seed, cell.position_bias)


def _make_mask(study: StudySettings, cell: CellSettings, seed: int) -> PositionMask:
    return masks.make_mask(cell.mask, study.corpus.n_positions, study.width(cell), seed)


def _init_sae(study: StudySettings, cell: CellSettings, source: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """The SAE of a cell that starts from another SAE."""
    rule = study.rule_of(cell)
    if source.rule.settings.of_codes() != rule.of_codes():
        raise BadSetting(
            f"{cell.name} would start from an SAE with the rule {source.rule.settings.model_dump()}, but its own is "
            f"{rule.model_dump()}: make them equal"
        )
    if source.position_bias_kind != cell.position_bias:
        raise BadSetting(
            f"{cell.name} has position_bias = {cell.position_bias!r}, but would start from an SAE with "
            f"{source.position_bias_kind!r}: make them equal"
        )
    return warm_start(source, _make_mask(study, cell, seed), seed, rule)


def check_buildable(study: StudySettings, cell: CellSettings) -> None:
    """Build a cell's SAE for vectors of one number, so that a mask that does not fit is found before the harvest.

    Raises:
        PosmaskError: mask, rule, sizes and starting SAE do not fit together.
    """
    seed = study.seeds[0]
    sae = make_sae(study, cell, 1, seed)
    if cell.init_folder is not None:
        if not cell.init_folder.is_dir():
            raise BadSetting(f"init_from = {str(cell.init_folder)!r} does not exist: give the folder of an SAE")
        sae = _init_sae(study, cell, read_sae(cell.init_folder), seed)
    elif cell.init_from is not None:
        source = next(other for other in study.cells if other.name == cell.init_from)
        sae = _init_sae(study, cell, make_sae(study, source, 1, 0), seed)
    if cell.mask.gradient_sharing and not sae.mask.may_have_copies():
        raise BadSetting(
            f"{cell.name} has gradient_sharing = {cell.mask.gradient_sharing}, but its latents are not copies of each "
            "other: leave it out, or let the cell start from an open one"
        )


def read_init(folder: Path, d_model: int, identity: str | None = None) -> SparseAutoencoder:
    """The SAE that a cell starts from.

    Args:
        identity: the identity that the folder must have; None for an SAE from outside the study.

    Raises:
        BadSetting: the identity differs, or the SAE is for vectors of another size.
    """
    if identity is not None:
        check_identity(folder, identity)
    sae = read_sae(folder, verify=identity is None)
    if sae.d_model != d_model:
        raise BadSetting(f"the SAE in {folder} codes vectors of {sae.d_model} numbers, the model gives {d_model}")
    return sae


@memory_for("training", "lower sae.d_sae or --jobs")
def untrained(study: StudySettings, target: Target, training: Activations) -> tuple[SparseAutoencoder, int]:
    """A cell's SAE before its training, and the number of tokens that the SAE it starts from was trained on."""
    assert target.cell is not None
    if target.init_folder is None:
        sae = make_sae(study, target.cell, training.d_model, target.seed)
        sae.center, sae.scale = training.center_and_scale
        if sae.position_bias is not None:
            means = training.position_means(sae.mask.n_positions, sae.mask.settings.position_origin)
            sae.start_position_bias_(means)
        return sae.to(study.device), 0
    if target.init_identity is None:
        check_sha256(target.init_folder / WEIGHTS_FILE, target.made_from["init_from"]["sha256"])
    source = read_init(target.init_folder, training.d_model, target.init_identity)
    origin = read_origin(target.init_folder)
    if "imported" in origin:  # Its constants are not those of these vectors.
        renormalize_(source, *training.center_and_scale)
    sae = _init_sae(study, target.cell, source, target.seed)
    return sae.to(study.device), origin.get("training_tokens", 0)
