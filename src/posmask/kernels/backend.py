"""The choice between compiled CPU loops and torch operations."""

from torch import Tensor

__all__ = ["compiled"]


def compiled(tensor: Tensor) -> bool:
    """Whether the compiled loops run on this tensor: it is on the CPU. If not, torch operations do the same."""
    return tensor.device.type == "cpu"
