"""The training loss by definition: dense products and autograd."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.rules import Coded

__all__ = ["AUX_WEIGHT", "StepLoss", "plain_gradients"]

AUX_WEIGHT = 1 / 32


@dataclass(frozen=True)
class StepLoss:
    """What a step found besides the gradients it set. Losses are means over the batch's tokens.

    `reconstruction` is that of all codes together, whatever parts there are; `fired` which latents were active on any
    token, `n_active` the number of active codes and `least` the least of them, before a router's strength (0 from fast
    steps of rules whose `training_choice` is None); `place` the row of the mask's table that each token took;
    `residual` is x - x_hat, `strength` what a router multiplied the codes by. `codes` and `residual` are None where
    they were not asked for.
    """

    reconstruction: float
    auxiliary: float
    fired: Bool[Tensor, " latent"]
    n_active: int
    least: float
    codes: Codes | None
    mask_row: Int[Tensor, " token"]
    residual: Float[Tensor, "token d_model"] | None
    strength: Float[Tensor, " token"] | None
    openness_gradient: Float[Tensor, "place latent"] | None


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


class _Shared(Function):
    """A parameter for each token, of whose gradient only the share M is kept."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return parameter.expand_as(share).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (share,) = ctx.saved_tensors
        return (gradient * share).sum(0), None


def plain_gradients(
    sae: SparseAutoencoder,
    vectors: Float[Tensor, "token d_model"],
    position: Int[Tensor, " token"],
    *,
    dead: Bool[Tensor, " latent"] | None = None,
    aux_k: int = 0,
    loss_tokens: int | None = None,
) -> StepLoss:
    """The definition: dense products and autograd. Slow, for any device, precision, rule and mask.

    Args:
        loss_tokens: take the loss as the sum over tokens divided by this, instead of by their number: for the part of a
            batch that falls to one of several SAEs.
    """
    x = sae.normalize(vectors)
    n = loss_tokens or len(x)
    routing = sae.mask.route(x, position)
    table = sae.mask.table().detach().clone().requires_grad_(sae.mask.learns)
    rows = table[routing.mask_row]
    if sae.mask.gates_code():
        share, openness = torch.ones_like(rows), rows
    else:  # Exactly 1, with the gradient that the gate would get.
        share, openness = rows.detach(), 1 + (rows - rows.detach())

    preactivation = _MaskedLinear.apply(x - sae.decoder_bias, sae.encoder, sae.encoder_bias, share)
    coded: Coded = sae.rule.training_codes(preactivation, openness, lambda parameter: _Shared.apply(parameter, share))
    codes = coded.codes if routing.strength is None else coded.codes * routing.strength[:, None]

    def decode(codes: Tensor) -> Tensor:
        return _MaskedDecode.apply(codes, sae.decoder, share)

    x_hat = decode(codes) + sae.decoder_bias
    error = x_hat - x
    level = sae.rule.level
    if level is None:
        loss = error.square().sum() / n
    else:
        parts = [decode(codes * (level <= part)) + sae.decoder_bias - x for part in range(int(level.max()) + 1)]
        loss = torch.stack([part.square().sum() / n for part in parts]).mean()
    if coded.penalty is not None:
        loss = loss + coded.penalty / n
    if routing.penalty is not None:
        loss = loss + routing.penalty
    if coded.through_gate is not None:
        gate_error = coded.through_gate @ sae.decoder.detach() + sae.decoder_bias.detach() - x
        loss = loss + gate_error.square().sum() / n

    auxiliary = x.new_zeros(())
    if sae.rule.revives and dead is not None and aux_k and dead.any():
        gated_dead = (preactivation.relu() * openness).masked_fill(~dead, 0)
        top = gated_dead.topk(min(aux_k, gated_dead.shape[1]), dim=1)
        codes_dead = torch.zeros_like(gated_dead).scatter(1, top.indices, top.values * (top.values > 0))
        if routing.strength is not None:
            codes_dead = codes_dead * routing.strength[:, None]
        auxiliary = (decode(codes_dead) + error.detach()).square().sum(1).mean()

    (loss + AUX_WEIGHT * auxiliary * (len(x) / n)).backward()
    token, latent = codes.nonzero(as_tuple=True)
    return StepLoss(
        float(error.detach().square().sum(1).mean()),
        float(auxiliary.detach()),
        (codes > 0).any(0),
        len(token),
        float(coded.codes.detach()[token, latent].min()) if len(token) else 0.0,
        Codes(token, latent, codes.detach()[token, latent], len(x), sae.d_sae),
        routing.mask_row,
        -error.detach(),
        None if routing.strength is None else routing.strength.detach(),
        table.grad,
    )
