"""Adam with clipped gradients and a parameter whose rows keep unit norm.

On CUDA a Triton kernel does all of it in one pass over each parameter (`kernels.triton_rows.adam_rows`); elsewhere
clipping, `torch.optim.Adam` and `operations.unit_rows_` follow each other. The state has the names of torch's Adam.
"""

from typing import Any

import torch
from torch import Tensor, nn

from posmask.kernels import backend, operations

__all__ = ["UnitRowAdam"]


class UnitRowAdam(torch.optim.Adam):
    """Adam that scales the rows of one parameter to unit norm after each step.

    Args:
        groups: parameter groups, as torch's Adam takes them; the gradients of the first one are clipped.
        unit_rows: the parameter whose rows keep unit norm, [row d].
        copied: a parameter of which Triton's steps keep a bfloat16 copy, see `low_copy`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], unit_rows: nn.Parameter, copied: nn.Parameter | None = None
    ) -> None:
        super().__init__(groups, fused=True)
        self._unit_rows = unit_rows
        self._copied = copied
        self._low: Tensor | None = None
        self._low_version = -1

    @torch.no_grad()
    def clipped_step(self, norm: Tensor | None, max_norm: float | None) -> None:
        """Scale the gradients of the first group down to `max_norm`, and take a step.

        Args:
            norm: the norm of these gradients; None does not clip.
            max_norm: the largest norm of the step's gradients.
        """
        if backend.implementation(self._unit_rows) == "triton" and self._unit_rows.dtype == torch.float32:
            self._step_by_triton(norm, max_norm)
            return
        if norm is not None and max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.param_groups[0]["params"], max_norm, norm)
        self.step()
        operations.unit_rows_(self._unit_rows.detach())

    def low_copy(self) -> Tensor | None:
        """The bfloat16 copy of the parameter `copied`; None if there is none or the parameter was changed since."""
        return self._low if self._copied is not None and self._low_version == self._copied._version else None

    def _step_by_triton(self, norm: Tensor | None, max_norm: float | None) -> None:
        factor = None
        if norm is not None and max_norm is not None:
            factor = (max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
        for group in self.param_groups:
            clip = factor if group is self.param_groups[0] else None
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, clip)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], clip: Tensor | None) -> None:
        """Take a step on one parameter by a Triton kernel."""
        from posmask.kernels import triton_rows

        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        # The number of steps is kept on the CPU, where reading it does not wait for the device.
        state["step"] = state["step"].cpu() + 1
        low = None
        if parameter is self._copied:
            low = torch.empty_like(parameter, dtype=torch.bfloat16) if self._low is None else self._low
            self._low, self._low_version = low, parameter._version
        triton_rows.adam_rows(
            parameter.detach(),
            gradient.contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            triton_rows.AdamStep(group["lr"], group["betas"], group["eps"], int(state["step"])),
            clip,
            unit_rows=parameter is self._unit_rows,
            low=low,
        )


_CLIP_EPSILON = 1e-6  # that of torch.nn.utils.clip_grads_with_norm_
