"""The training loss by definition: dense products and autograd."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.rules import Coded

__all__ = ["AUX_WEIGHT", "SharedParameter", "StepLoss", "StepNumbers", "plain_gradients"]

AUX_WEIGHT = 1 / 32


class StepNumbers(NamedTuple):
    """The numbers of a step. Losses are means over tokens.

    Attributes:
        reconstruction: squared error of all codes together, also for rules with nested parts.
        auxiliary: squared error of the dead latents' reconstruction of the error.
        n_active: number of active codes.
        least: the smallest active code before the router's strength; 0 from `fast_gradients` with rules whose
            `training_choice` is None.
    """

    reconstruction: float
    auxiliary: float
    n_active: int
    least: float


@dataclass(frozen=True)
class StepLoss:
    """The loss of a batch, and what else a step computes besides gradients.

    Attributes:
        read: returns the step's numbers, for which the host waits for a GPU. `numbers` calls it once.
        fired: which latents are active on any token.
        codes: the active codes; None if no details were requested.
        mask_row: each token's row of the mask's table.
        residual: x - x_hat; None if no details were requested.
        strength: the factor of each token's codes by a router; None without a router.
        openness_gradient: the gradient with respect to the mask's table; None for masks that do not learn.
    """

    read: Callable[[], StepNumbers]
    fired: Bool[Tensor, " latent"]
    codes: Codes | None
    mask_row: Int[Tensor, " token"]
    residual: Float[Tensor, "token d_model"] | None
    strength: Float[Tensor, " token"] | None
    openness_gradient: Float[Tensor, "mask_row latent"] | None

    @cached_property
    def numbers(self) -> StepNumbers:
        """The step's numbers, on the host."""
        return self.read()


class _MaskedLinear(Function):
    """inputs @ weight.T + bias; the parameters get each token's gradient times its share [token latent]."""

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
    """codes @ decoder; the decoder rows get each token's gradient times its share [token latent]."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, decoder: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(codes, decoder, share)
        return codes @ decoder

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, decoder, share = ctx.saved_tensors
        return gradient @ decoder.T, (codes * share).T @ gradient, None


class SharedParameter(Function):
    """A parameter [latent] repeated per token; it gets each token's gradient times its share [token latent]."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: Tensor) -> Tensor:
        """The parameter, repeated for each row of `share`."""
        ctx.save_for_backward(share)
        return parameter.expand_as(share).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the parameter, summed over tokens with their shares."""
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
    """Compute the loss and set the gradients by dense products and autograd; slow, for any device, rule and mask.

    The formula of the loss is in `fast_loss`.

    Args:
        sae: its gradients are accumulated, so they must be None or zero before.
        vectors: before normalization.
        position: position of each token, counted from the mask's `position_origin`.
        dead: the latents that the auxiliary loss revives.
        aux_k: the number of dead latents that reconstruct the error on each token.
        loss_tokens: the divisor of the sums over tokens, by default the number of tokens; for a process that has a
            part of the batch.
    """
    forward = _Forward(sae, vectors, position)
    n = loss_tokens or len(forward.x)
    error = forward.decode(forward.codes) + sae.decoder_bias - forward.x
    loss = _loss(forward, error, n)
    auxiliary = forward.x.new_zeros(())
    if sae.rule.revives and dead is not None and aux_k and dead.any():
        auxiliary = _auxiliary_loss(forward, error.detach(), dead, aux_k)
    (loss + AUX_WEIGHT * auxiliary * (len(forward.x) / n)).backward()
    return _step_loss(forward, error.detach(), float(auxiliary.detach()))


class _Forward:
    """The codes of a batch as dense tensors, with the graph of their gradients.

    Attributes:
        x: normalized vectors without the biases of their positions, [token d_model].
        routing: each token's row of the mask's table.
        table: the mask's table, whose .grad is the openness gradient, [mask_row latent].
        share: of each token's gradient that the latents' parameters get, [token latent].
        openness: what the rule multiplies pre-activations by, [token latent].
        preactivation: [token latent].
        coded: codes and penalty of the rule.
        codes: the rule's codes times the router's strength, [token latent].
    """

    def __init__(self, sae: SparseAutoencoder, vectors: Tensor, position: Tensor) -> None:
        self.sae = sae
        self.x = sae.normalize(vectors)
        self.routing = sae.mask.route(self.x, position)
        self.x = sae.without_position_bias(self.x, position)
        self.table = sae.mask.table().detach().clone().requires_grad_(sae.mask.learns)
        rows = self.table.index_select(0, self.routing.mask_row)  # adds gradients in the same order in every run
        if sae.mask.gates_code():
            self.share, self.openness = torch.ones_like(rows), rows
        else:  # The openness is exactly 1, but has the gradient of the gate.
            self.share, self.openness = rows.detach(), 1 + (rows - rows.detach())
        self.preactivation = _MaskedLinear.apply(self.x - sae.decoder_bias, sae.encoder, sae.encoder_bias, self.share)
        self.coded: Coded = sae.rule.training_codes(
            self.preactivation, self.openness, lambda parameter: SharedParameter.apply(parameter, self.share)
        )
        self.codes = self.with_strength(self.coded.codes)

    def with_strength(self, codes: Tensor) -> Tensor:
        """Codes times the router's strength, if there is a router."""
        strength = self.routing.strength
        return codes if strength is None else codes * strength[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        """codes . decoder, [token d_model]."""
        return _MaskedDecode.apply(codes, self.sae.decoder, self.share)


def _loss(forward: _Forward, error: Tensor, n: int) -> Tensor:
    """The loss without its auxiliary term; `error` is x_hat - x of all codes together, `n` the divisor."""
    sae, x, coded = forward.sae, forward.x, forward.coded
    loss, level = error.square().sum() / n, sae.rule.level
    if level is not None:
        errors = [
            forward.decode(forward.codes * (level <= part)) + sae.decoder_bias - x
            for part in range(int(level.max()) + 1)
        ]
        loss = torch.stack([part.square().sum() / n for part in errors]).mean()
    if coded.penalty is not None:
        loss = loss + coded.penalty / n
    if forward.routing.penalty is not None:
        loss = loss + forward.routing.penalty
    if coded.through_gate is not None:
        gate_error = coded.through_gate @ sae.decoder.detach() + sae.decoder_bias.detach() - x.detach()
        loss = loss + gate_error.square().sum() / n
    return loss


def _auxiliary_loss(forward: _Forward, error: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """Squared error of the reconstruction of -error by the `aux_k` most active dead latents, mean over tokens."""
    gated = forward.preactivation.relu() * forward.openness
    codes = forward.with_strength(_largest_of_rows(gated.masked_fill(~dead, 0), aux_k))
    return (forward.decode(codes) + error).square().sum(1).mean()


def _largest_of_rows(numbers: Float[Tensor, "token latent"], k: int) -> Float[Tensor, "token latent"]:
    """The k largest positive numbers of each row; all others are 0."""
    top = numbers.topk(min(k, numbers.shape[1]), dim=1)
    return torch.zeros_like(numbers).scatter(1, top.indices, top.values * (top.values > 0))


def _step_loss(forward: _Forward, error: Tensor, auxiliary: float) -> StepLoss:
    codes, routing, table = forward.codes.detach(), forward.routing, forward.table
    token, latent = codes.nonzero(as_tuple=True)
    before_strength = forward.coded.codes.detach()[token, latent]
    least = float(before_strength.min()) if len(token) else 0.0
    numbers = StepNumbers(float(error.square().sum(1).mean()), auxiliary, len(token), least)
    return StepLoss(
        read=lambda: numbers,
        fired=(codes > 0).any(0),
        codes=Codes(token, latent, codes[token, latent], len(codes), forward.sae.d_sae),
        mask_row=routing.mask_row,
        residual=-error,
        strength=None if routing.strength is None else routing.strength.detach(),
        openness_gradient=table.grad,
    )
