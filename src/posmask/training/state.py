"""Training state: the tensors of a checkpoint, and how they are restored.

The state holds everything that the remaining steps depend on, except the batches, which follow from their number.
"""

from dataclasses import astuple, fields

import torch
from torch import Tensor

from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import flaw_of
from posmask.training.curve import CurvePoint

__all__ = ["latent_row_names", "restore_state_", "training_state"]

_CURVE, _SINCE_FIRED, _SECONDS = "curve", "eligible_since_fired", "seconds"
_STEP, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")


def training_state(
    sae: SparseAutoencoder,
    optimizer: torch.optim.Adam,
    eligible_since_fired: Tensor,
    curve: list[CurvePoint],
    seconds: float,
) -> dict[str, Tensor]:
    """The state of a training by name: `sae.NAME`, `adam.PARAMETER.MOMENT`, and the arguments."""
    state = {f"sae.{name}": tensor.detach() for name, tensor in (*sae.named_parameters(), *sae.named_buffers())}
    for name, parameter in sae.named_parameters():
        state |= {f"adam.{name}.{moment}": value for moment, value in optimizer.state.get(parameter, {}).items()}
    state[_SINCE_FIRED] = eligible_since_fired
    state[_CURVE] = torch.tensor([astuple(point) for point in curve], dtype=torch.float64)
    state[_SECONDS] = torch.tensor(seconds, dtype=torch.float64)
    return state


def restore_state_(
    sae: SparseAutoencoder, optimizer: torch.optim.Adam, state: dict[str, Tensor]
) -> tuple[Tensor, list[CurvePoint], float]:
    """Restore the SAE and the optimizer, in place, from what `training_state` returned.

    Returns:
        The other arguments of `training_state`: eligible_since_fired, curve and seconds.

    Raises:
        ValueError: the state is not of a training of such an SAE. Compiled loops and torch's Adam would write outside
            of tensors of other shapes.
    """
    _check_shapes(sae, state)
    known = set(sae.state_dict())
    device = sae.encoder.device
    with torch.no_grad():
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            owner, _, attribute = name.rpartition(".")
            if kind == "sae" and name not in known:
                setattr(sae.get_submodule(owner), attribute, tensor.to(device))
            elif kind == "adam":
                optimizer.state[sae.get_parameter(owner)][attribute] = tensor.to(device)
    sae.load_state_dict({name: state[f"sae.{name}"] for name in known})
    if (flaw := flaw_of(sae) or sae.mask.flaw()) is not None:
        raise ValueError(flaw)
    types = [field.type for field in fields(CurvePoint)]
    points = [[kind(value) for kind, value in zip(types, line, strict=True)] for line in state[_CURVE].tolist()]  # type: ignore[operator]
    return state[_SINCE_FIRED].to(device), [CurvePoint(*point) for point in points], float(state[_SECONDS])


def _check_shapes(sae: SparseAutoencoder, state: dict[str, Tensor]) -> None:
    """Check names, shapes and types of a state, as far as they follow from the SAE.

    Raises:
        ValueError: one differs or is missing.
    """
    parameters = dict(sae.named_parameters())
    ours = {**parameters, **dict(sae.named_buffers())}
    wanted = {f"sae.{name}": tensor for name, tensor in ours.items()}
    for name, tensor in parameters.items():
        of_adam = {f"adam.{name}.{moment}": tensor for moment in _MOMENTS} | {f"adam.{name}.{_STEP}": torch.zeros(())}
        wanted |= of_adam if not state.keys().isdisjoint(of_adam) else {}  # Adam skips parameters without a gradient.
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"{missing[0]} is missing")
    for key, tensor in state.items():
        kind, _, name = key.partition(".")
        like = wanted.get(key)
        if like is not None:
            fits = tensor.shape == like.shape and tensor.dtype == like.dtype
        else:  # Of masks, sums that exist at some steps only; see `flaw`.
            of_mask = kind == "sae" and name.startswith("mask.") and name.removeprefix("mask.") in sae.mask._buffers
            fits = of_mask or kind not in ("sae", "adam")
        if not fits or (tensor.is_floating_point() and not bool(tensor.isfinite().all())):
            raise ValueError(f"{key} has the shape {list(tensor.shape)}, or NaN or infinite numbers")
    since_fired, curve = state[_SINCE_FIRED], state[_CURVE]
    if since_fired.shape != (sae.d_sae,) or since_fired.dtype != torch.float32 or curve.dim() > 2:
        raise ValueError(f"{_SINCE_FIRED} has the shape {list(since_fired.shape)}, {_CURVE} {list(curve.shape)}")


def latent_row_names(sae: SparseAutoencoder, state: dict[str, Tensor]) -> list[str]:
    """The names of a state's tensors whose first dimension is the latent, except the mask's."""
    latent_parameters = {
        name
        for name, parameter in sae.named_parameters()
        if any(parameter is other for other in sae.latent_parameters())
    }
    keys = [(key, *key.split(".", 1)) for key in state if "." in key]
    weights = [key for key, kind, name in keys if kind == "sae" and name in latent_parameters]
    adam = [(key, name.rpartition(".")[0]) for key, kind, name in keys if kind == "adam"]
    moments = [key for key, name in adam if name in latent_parameters and state[key].dim()]
    return [*weights, *moments, _SINCE_FIRED]
