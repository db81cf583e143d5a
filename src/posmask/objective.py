"""The training loss and its masked gradients: once by definition through autograd, and fast by hand.

All ways set `.grad` of every parameter of the SAE and its rule. The loss of a batch is the mean over tokens of

    |x_hat - x|^2  +  the rule's penalty  +  AUX_WEIGHT * |e_hat - e|^2,     e = x - x_hat taken as a constant,

where e_hat is the reconstruction of the error by the `aux_k` most active *dead* latents (Gao et al. 2024, arXiv
2406.04093, appendix A.2), gated by the mask like all codes; that term is there only while latents are dead, and for
rules that revive them. With nested parts the first term is its mean over the parts, and e the error of all of them.
Codes that must reconstruct the vector through a rule's gate add |gate_codes . decoder + decoder_bias - x|^2 with the
decoder taken as constant; a router adds its penalty.

Under `apply = "gradient"` codes are not gated. What a token at position p sends into latent j's encoder row, encoder
bias, decoder row and rule parameters is multiplied by M[p, j]; the decoder bias, which belongs to no latent, gets all
of its gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

from posmask import kernels
from posmask.masks import Routing
from posmask.rules import Coded
from posmask.sae import Codes, SparseAutoencoder

__all__ = ["AUX_WEIGHT", "StepLoss", "fast_gradients", "plain_gradients"]

AUX_WEIGHT = 1 / 32


@dataclass(frozen=True)
class StepLoss:
    """What a step found besides the gradients it set. Losses are means over the batch's tokens.

    `reconstruction` is that of all codes together, whatever parts there are; `place` the row of the mask's table that
    each token took; `residual` is x - x_hat, `strength` what a router multiplied the codes by.
    """

    reconstruction: float
    auxiliary: float
    codes: Codes
    place: Int[Tensor, " token"]
    residual: Float[Tensor, "token d_model"]
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
    x = sae.normalise(vectors)
    n = loss_tokens or len(x)
    routing = sae.mask.route(x, position)
    table = sae.mask.table().detach().clone().requires_grad_(sae.mask.learns)
    rows = table[routing.place]
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
        Codes(token, latent, codes.detach()[token, latent], len(x), sae.d_sae),
        routing.place,
        -error.detach(),
        None if routing.strength is None else routing.strength.detach(),
        table.grad,
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
    loss_tokens: int | None = None,
) -> StepLoss:
    """The same loss and gradients without what is closed or zero; the one place that chooses how.

    Rules that make few codes active from the start work on active codes alone. The others need all pre-activations of
    the latents that are live at a position, and work on blocks of them.
    """
    x = sae.normalise(vectors)
    with torch.enable_grad():
        routing = sae.mask.route(x, position)
    if sae.rule.training_choice() is None:
        found, strength_gradient = _through_blocks(sae, x, routing, loss_tokens or len(x))
    else:
        revived = dead if sae.rule.revives and aux_k and dead is not None and bool(dead.any()) else None
        found, strength_gradient = _through_entries(sae, x, routing, revived, aux_k, precision, loss_tokens or len(x))
    if routing.strength is not None:
        assert routing.penalty is not None
        torch.autograd.backward([routing.strength, routing.penalty], [strength_gradient, torch.ones(())])
    return found


def _through_entries(
    sae: SparseAutoencoder,
    x: Tensor,
    routing: Routing,
    dead: Tensor | None,
    aux_k: int,
    precision: kernels.Precision,
    loss_tokens: int,
) -> tuple[StepLoss, Tensor]:
    mask, place, n = sae.mask, routing.place, len(x)
    inputs = x - sae.decoder_bias
    table = mask.table().detach()
    table_gradient = torch.zeros_like(table) if mask.learns else None
    strength = None if routing.strength is None else routing.strength.detach()
    strength_gradient = x.new_zeros(n)
    decoder = sae.decoder.detach()
    sums = _ParameterGradients(sae, inputs)

    def choose(choice: kernels.Choice, among: Tensor | None) -> tuple[kernels.Entries, Tensor, Tensor]:
        """The chosen entries, their openness and their codes."""
        with kernels.fast_float32():
            chosen = kernels.choose(
                inputs,
                place,
                sae.encoder.detach(),
                sae.encoder_bias.detach(),
                mask.groups(),
                table,
                choice,
                precision=precision,
                among=among,
            )
        rows = table[place[chosen.token], chosen.latent]
        value = chosen.preactivation * rows if mask.gates_code() else chosen.preactivation
        return chosen, rows, value if strength is None else value * strength[chosen.token]

    def send(chosen: kernels.Entries, rows: Tensor, value: Tensor, gradient: Tensor, row: Tensor) -> None:
        """Add what these entries send back, given dL/d(output) in `gradient`, of which entry e takes row[e]."""
        code_gradient = kernels.dot_rows(gradient, row, decoder, chosen.latent)
        if strength is not None:
            strength_gradient.index_add_(0, chosen.token, code_gradient * value / strength[chosen.token])
            code_gradient = code_gradient * strength[chosen.token]
        if table_gradient is not None:
            index = place[chosen.token] * sae.d_sae + chosen.latent
            table_gradient.view(-1).index_add_(0, index, code_gradient * chosen.preactivation)
        if mask.gates_code():
            share, preactivation_gradient = torch.ones_like(rows), code_gradient * rows
        else:
            share, preactivation_gradient = rows, code_gradient
        sums.add(chosen, value, preactivation_gradient, share, gradient, row)

    training_choice = sae.rule.training_choice()
    assert training_choice is not None
    chosen, rows, value = choose(training_choice, None)
    errors, row = _errors_of_parts(sae, x, chosen, value)
    n_parts = len(errors) // n
    # What a latent of part m does shows in the errors of m and of all later parts.
    gradient = errors.view(n_parts, n, -1).flip(0).cumsum(0).flip(0).reshape(errors.shape) * (
        2 / (loss_tokens * n_parts)
    )
    send(chosen, rows, value, gradient, row)
    bias_gradient = gradient[:n].sum(0)
    error = errors[-n:]

    auxiliary = 0.0
    if dead is not None:
        revived, dead_rows, dead_value = choose(kernels.LargestOfToken(aux_k), dead)
        tokens = kernels.Grouped(revived.token, n)
        error_of_error = tokens.sum_rows(dead_value, decoder, revived.latent) + error
        send(revived, dead_rows, dead_value, error_of_error * (2 * AUX_WEIGHT / loss_tokens), revived.token)
        auxiliary = float(error_of_error.square().sum(1).mean())

    sums.finish(bias_gradient)
    codes = Codes(chosen.token, chosen.latent, value, n, sae.d_sae)
    loss = float(error.square().sum(1).mean())
    return StepLoss(loss, auxiliary, codes, place, -error, strength, table_gradient), strength_gradient


def _errors_of_parts(
    sae: SparseAutoencoder, x: Tensor, chosen: kernels.Entries, value: Tensor
) -> tuple[Tensor, Tensor]:
    """(x_hat - x from each nested part, one below the other [part * token, d_model]; each entry's row in it)."""
    level = sae.rule.level
    n_parts = 1 if level is None else int(level.max()) + 1
    row = chosen.token if level is None else level[chosen.latent] * len(x) + chosen.token
    own = kernels.Grouped(row, n_parts * len(x)).sum_rows(value, sae.decoder.detach(), chosen.latent)
    own = own.view(n_parts, len(x), -1)
    own[0] += sae.decoder_bias - x
    return own.cumsum(0).view(n_parts * len(x), -1), row


class _ParameterGradients:
    """Sums what sparse entries send to the SAE's parameters, and sets their `.grad` at the end."""

    def __init__(self, sae: SparseAutoencoder, encoder_input: Tensor) -> None:
        self._sae = sae
        self._encoder_input = encoder_input
        self._sent: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(
        self,
        chosen: kernels.Entries,
        value: Tensor,
        preactivation_gradient: Tensor,
        share: Tensor,
        output_gradient: Tensor,
        row: Tensor,
    ) -> None:
        by_latent = kernels.Grouped(chosen.latent, self._sae.d_sae)
        masked = preactivation_gradient * share
        # The last step's gradients are written over, which is faster than allocating as many pages anew.
        old = (self._sae.encoder.grad, self._sae.decoder.grad) if not self._sent else (None, None)
        self._sent.append(
            (
                by_latent.sum_rows(masked, self._encoder_input, chosen.token, out=old[0]),
                by_latent.sum(masked),
                by_latent.sum_rows(value * share, output_gradient, row, out=old[1]),
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


def _through_blocks(sae: SparseAutoencoder, x: Tensor, routing: Routing, loss_tokens: int) -> tuple[StepLoss, Tensor]:
    mask, place, n = sae.mask, routing.place, len(x)
    inputs = x - sae.decoder_bias
    table = mask.table().detach()
    table_gradient = torch.zeros_like(table) if mask.learns else None
    parameters = [sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias, *sae.rule.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    residual, strength_gradient = torch.empty_like(x), x.new_zeros(n)
    unmasked_bias = torch.zeros_like(sae.encoder_bias)
    found = [(place[:0], place[:0], x.new_zeros(0))]

    for tokens, group in kernels.tokens_by_group(mask.groups(), place):
        latents, some = group.latents, x[tokens]
        encoder, decoder = sae.encoder[latents], sae.decoder[latents]
        rows = table[place[tokens]][:, latents]
        share = torch.ones_like(rows) if mask.gates_code() else rows
        with kernels.fast_float32():
            preactivation = (inputs[tokens] @ encoder.T + sae.encoder_bias[latents]).requires_grad_()
        with torch.enable_grad():
            gate = rows.clone().requires_grad_(mask.learns)
            openness = gate if mask.gates_code() else 1 + (gate - rows)
            plain = not mask.learns and (not mask.gates_code() or not group.gated)
            coded = sae.rule.training_codes(preactivation, None if plain else openness, _shared_of(latents, share))
        codes = coded.codes.detach()
        strength = None if routing.strength is None else routing.strength.detach()[tokens, None]
        spoken = codes if strength is None else codes * strength
        with kernels.fast_float32():
            error = spoken @ decoder + sae.decoder_bias - some
            output_gradient = error * (2 / loss_tokens)
            code_gradient = output_gradient @ decoder.T
            if strength is not None:
                strength_gradient[tokens] = (code_gradient * codes).sum(1)
                code_gradient = code_gradient * strength
            outputs, gradients = [coded.codes], [code_gradient]
            if coded.penalty is not None:
                outputs, gradients = [*outputs, coded.penalty], [*gradients, x.new_ones(()) / loss_tokens]
            if coded.through_gate is not None:
                gate_error = coded.through_gate.detach() @ decoder + sae.decoder_bias - some
                outputs = [*outputs, coded.through_gate]
                gradients = [*gradients, gate_error @ decoder.T * (2 / loss_tokens)]
            torch.autograd.backward(outputs, gradients)
            assert preactivation.grad is not None
            masked = preactivation.grad * share
            _add_at(sae.encoder.grad, latents, masked.T @ inputs[tokens])
            _add_at(sae.decoder.grad, latents, (spoken * share).T @ output_gradient)
        _add_at(sae.encoder_bias.grad, latents, masked.sum(0))
        _add_at(unmasked_bias, latents, preactivation.grad.sum(0))
        if table_gradient is not None and gate.grad is not None:
            numbers = torch.arange(sae.d_sae, device=x.device)[latents]
            table_gradient.index_put_((place[tokens, None], numbers), gate.grad, accumulate=True)
        assert sae.decoder_bias.grad is not None
        sae.decoder_bias.grad += output_gradient.sum(0)
        residual[tokens] = -error
        row, column = spoken.nonzero(as_tuple=True)
        found.append((tokens[row], torch.arange(sae.d_sae, device=x.device)[latents][column], spoken[row, column]))

    assert sae.decoder_bias.grad is not None
    sae.decoder_bias.grad -= unmasked_bias @ sae.encoder
    token, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.sort(token, stable=True).indices
    codes = Codes(token[order], latent[order], value[order], n, sae.d_sae)
    loss = float(residual.square().sum(1).mean())
    strength = None if routing.strength is None else routing.strength.detach()
    return StepLoss(loss, 0.0, codes, place, residual, strength, table_gradient), strength_gradient


def _shared_of(latents: slice | Tensor, share: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda parameter: _Shared.apply(parameter[latents], share)


def _add_at(total: Tensor | None, latents: slice | Tensor, part: Tensor) -> None:
    assert total is not None
    if isinstance(latents, slice):
        total[latents] += part
    else:
        total.index_add_(0, latents, part)
