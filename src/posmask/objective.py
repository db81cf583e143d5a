"""The training loss and its masked gradients: once by definition through autograd, once fast by hand.

Both set `.grad` of every parameter of the SAE. The loss of a batch is the mean over tokens of

    |x_hat - x|^2  +  AUX_WEIGHT * |e_hat - e|^2,     e = x - x_hat taken as a constant,

where e_hat is the reconstruction of the error by the `aux_k` most active *dead* latents (Gao et al. 2024, arXiv
2406.04093, appendix A.2), gated by the mask like all codes. The second term is there only while latents are dead.

Under `apply = "gradient"` codes are not gated. What a token at position p sends into latent j's encoder row, encoder
bias and decoder row is multiplied by M[p, j]; the decoder bias, which belongs to no latent, gets all of its gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

from posmask import kernels
from posmask.sae import Codes, SparseAutoencoder

__all__ = ["AUX_WEIGHT", "StepLoss", "fast_gradients", "plain_gradients"]

AUX_WEIGHT = 1 / 32


@dataclass(frozen=True)
class StepLoss:
    """What a step found besides the gradients it set. Losses are means over the batch's tokens."""

    reconstruction: float
    auxiliary: float
    codes: Codes
    openness_gradient: Float[Tensor, "position latent"] | None


class _MaskedLinear(Function):
    """inputs @ weight.T + bias, whose parameters get only the share M of each token's gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight, share)
        return inputs @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, weight, share = ctx.saved_tensors
        masked = gradient * share
        return gradient @ weight, masked.T @ inputs, masked.sum(0), None


class _MaskedDecode(Function):
    """codes @ decoder, whose rows get only the share M of each token's gradient."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, decoder: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(codes, decoder, share)
        return codes @ decoder

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, decoder, share = ctx.saved_tensors
        return gradient @ decoder.T, (codes * share).T @ gradient, None


class _GateLeftOpen(Function):
    """The code ungated, with the gradient that the openness would get if the gate were applied."""

    @staticmethod
    def forward(ctx: Any, preactivation: Tensor, openness: Tensor) -> Tensor:
        ctx.save_for_backward(preactivation)
        return preactivation.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        (preactivation,) = ctx.saved_tensors
        return gradient, gradient * preactivation


def plain_gradients(
    sae: SparseAutoencoder,
    vectors: Float[Tensor, "token d_model"],
    position: Int[Tensor, " token"],
    *,
    dead: Bool[Tensor, " latent"] | None = None,
    aux_k: int = 0,
) -> StepLoss:
    """The definition: dense products and autograd. Slow, for any device, precision and rule."""
    x = sae.normalise(vectors)
    openness = sae.mask.openness().detach().clone().requires_grad_(sae.mask.learns)
    rows = openness[position.long()]
    forward = sae.mask.gates_code()

    share = torch.ones_like(rows) if forward else rows.detach()
    preactivation = _MaskedLinear.apply(x - sae.decoder_bias, sae.encoder, sae.encoder_bias, share).relu()
    gated = preactivation * rows if forward else _GateLeftOpen.apply(preactivation, rows)
    codes = sae.rule(gated)
    x_hat = _MaskedDecode.apply(codes, sae.decoder, share) + sae.decoder_bias
    reconstruction = (x_hat - x).square().sum(1).mean()

    auxiliary = reconstruction.new_zeros(())
    if dead is not None and dead.any():
        gated_dead = gated.masked_fill(~dead, 0)
        top = gated_dead.topk(min(aux_k, gated_dead.shape[1]), dim=1)
        codes_dead = torch.zeros_like(gated_dead).scatter(1, top.indices, top.values * (top.values > 0))
        error = (x - x_hat).detach()
        error_hat = _MaskedDecode.apply(codes_dead, sae.decoder, share)
        auxiliary = (error_hat - error).square().sum(1).mean()

    (reconstruction + AUX_WEIGHT * auxiliary).backward()
    active = codes.detach().topk(min(sae.rule.k, sae.d_sae), dim=1)
    return StepLoss(
        float(reconstruction.detach()),
        float(auxiliary.detach()),
        Codes(active.indices, active.values, sae.d_sae),
        openness.grad,
    )


@torch.no_grad()
def fast_gradients(
    sae: SparseAutoencoder,
    vectors: Float[Tensor, "token d_model"],
    position: Int[Tensor, " token"],
    *,
    dead: Bool[Tensor, " latent"] | None = None,
    aux_k: int = 0,
    precision: kernels.Precision = "float32",
) -> StepLoss:
    """The same loss and gradients, from the live latents' products and the active codes alone."""
    mask = sae.mask
    x = sae.normalise(vectors)
    encoder_input = x - sae.decoder_bias
    openness = mask.openness().detach()
    openness_gradient = torch.zeros_like(openness) if mask.learns else None
    position = position.long()
    sums = _ParameterGradients(sae, encoder_input)

    def choose(k: int, among: Tensor | None) -> tuple[kernels.Selected, Tensor, Tensor]:
        """The chosen entries, their openness and their codes."""
        with kernels.fast_float32():
            selected = kernels.select_top_k(
                encoder_input,
                position,
                sae.encoder.detach(),
                sae.encoder_bias.detach(),
                mask.groups(),
                openness,
                k,
                precision=precision,
                among=among,
            )
        rows = openness[position[:, None], selected.latent]
        return selected, rows, selected.preactivation * rows if mask.gates_code() else selected.preactivation

    def send(selected: kernels.Selected, rows: Tensor, value: Tensor, output_gradient: Tensor) -> None:
        """Add what these entries send back, given dL/d(output) by token."""
        code_gradient = kernels.dot_rows(output_gradient, sae.decoder.detach(), selected.latent)
        active = selected.preactivation > 0
        if openness_gradient is not None:
            index = (position[:, None] * sae.d_sae + selected.latent).reshape(-1)
            openness_gradient.view(-1).index_add_(0, index, (code_gradient * selected.preactivation).reshape(-1))
        if mask.gates_code():
            share, preactivation_gradient = torch.ones_like(rows), code_gradient * rows * active
        else:
            share, preactivation_gradient = rows, code_gradient * active
        sums.add(selected.latent, value, preactivation_gradient, share, output_gradient)

    selected, rows, value = choose(sae.rule.k, None)
    error = kernels.weighted_rows(selected.latent, value, sae.decoder) + sae.decoder_bias - x
    output_gradient = error * (2 / len(x))
    send(selected, rows, value, output_gradient)

    auxiliary = 0.0
    if dead is not None and aux_k and bool(dead.any()):
        chosen, dead_rows, dead_value = choose(aux_k, dead)
        error_of_error = kernels.weighted_rows(chosen.latent, dead_value, sae.decoder) + error
        send(chosen, dead_rows, dead_value, error_of_error * (2 * AUX_WEIGHT / len(x)))
        auxiliary = float(error_of_error.square().sum(1).mean())

    sums.finish(output_gradient.sum(0))
    return StepLoss(
        float(error.square().sum(1).mean()),
        auxiliary,
        Codes(selected.latent, value, sae.d_sae),
        openness_gradient,
    )


class _ParameterGradients:
    """Sums what sparse entries send to the SAE's parameters, and sets their `.grad` at the end."""

    def __init__(self, sae: SparseAutoencoder, encoder_input: Tensor) -> None:
        self._sae = sae
        self._encoder_input = encoder_input
        self._sent: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(
        self, latent: Tensor, value: Tensor, preactivation_gradient: Tensor, share: Tensor, output_gradient: Tensor
    ) -> None:
        by_latent = kernels.ByLatent(latent, self._sae.d_sae)
        masked = preactivation_gradient * share
        # The last step's gradients are written over, which is faster than allocating as many pages anew.
        old = (self._sae.encoder.grad, self._sae.decoder.grad) if not self._sent else (None, None)
        self._sent.append(
            (
                by_latent.sum_rows(masked, self._encoder_input, out=old[0]),
                by_latent.sum(masked),
                by_latent.sum_rows(value * share, output_gradient, out=old[1]),
                by_latent.sum(preactivation_gradient),
            )
        )

    def finish(self, output_gradient_total: Tensor) -> None:
        sae = self._sae
        encoder, encoder_bias, decoder, unmasked_bias = self._sent[0]
        for sent in self._sent[1:]:
            for total, part in zip((encoder, encoder_bias, decoder, unmasked_bias), sent, strict=True):
                total += part
        sae.encoder.grad, sae.encoder_bias.grad, sae.decoder.grad = encoder, encoder_bias, decoder
        # The encoder's input is x - decoder_bias, so every pre-activation pulls the decoder bias the other way.
        sae.decoder_bias.grad = output_gradient_total - unmasked_bias @ sae.encoder
