"""Choice between the compiled CPU loops and torch operations, in one place."""

from torch import Tensor

__all__ = ["compiled"]


def compiled(tensor: Tensor) -> bool:
    """Whether the compiled loops can work on a tensor; where not, torch operations do the same."""
    return tensor.device.type == "cpu"
