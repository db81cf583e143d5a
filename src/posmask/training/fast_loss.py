"""The training loss and its masked gradients, by formulas that skip closed and zero terms.

`reference_loss.plain_gradients` computes the same by definition, through autograd. Both set `.grad` of every parameter
of the SAE and its rule. The loss of a batch is the mean over tokens of

    |x_hat - x|^2  +  the rule's penalty  +  AUX_WEIGHT * |e_hat - e|^2,     e = x - x_hat taken as a constant,

where e_hat is the reconstruction of the error by the `aux_k` most active *dead* latents (Gao et al. 2024, arXiv
2406.04093, appendix A.2), gated by the mask like all codes. Only rules that revive latents have this term, and only
while latents are dead. With nested parts the first term is its mean over the parts, and e is the error of all parts
together. Rules with a gate of their own add |gate_codes . decoder + decoder_bias - x|^2, with the decoder taken as
constant. A router adds its penalty.

Under `gating = "gradient"` codes are not gated. The gradient of a token at position p is multiplied by M[p, j] for the
encoder row, encoder bias, decoder row and rule parameters of latent j. The decoder bias and a learned bias per
position, which belong to no latent, get their full gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask.kernels import operations, runtime
from posmask.masks.groups import LiveGroup
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.rules import Coded
from posmask.sae.selection import (
    Choice,
    GatedEncoder,
    GroupedInputs,
    LargestOfToken,
    choose,
    in_group_order,
    pieces,
)
from posmask.training.reference_loss import AUX_WEIGHT, SharedParameter, StepLoss, StepNumbers

__all__ = ["fast_gradients"]


@torch.no_grad()
def fast_gradients(
    sae: SparseAutoencoder,
    vectors: Float[Tensor, "token d_model"],
    position: Int[Tensor, " token"],
    *,
    dead: Bool[Tensor, " latent"] | None = None,
    aux_k: int = 0,
    precision: runtime.Precision = "float32",
    loss_tokens: int | None = None,
    details: bool = True,
    low_encoder: Float[Tensor, "latent d_model"] | None = None,
) -> StepLoss:
    """Compute the loss of a batch and set the gradients of the SAE and its rule.

    Rules that select few codes (`training_choice`) compute on active codes alone. The other rules need the
    pre-activations of all latents that are live at a position, and compute on blocks of them. Either way tokens are
    sorted by the mask's live groups, which costs a copy if the batch has another order.

    Args:
        sae: on any device; its gradients are overwritten.
        vectors: before normalization, of any floating precision.
        position: position of each token, counted from the mask's `position_origin`.
        dead: the latents that the auxiliary loss revives.
        aux_k: the number of dead latents that reconstruct the error on each token.
        precision: bfloat16 requires a float32 SAE. For rules that select few codes it affects only the selection, and
            values and gradients are float32. For the other rules all products with the dictionary carry its rounding.
        loss_tokens: the divisor of the sums over tokens, by default the number of tokens.
        details: whether to return codes and residual.
        low_encoder: the encoder in bfloat16 if it is available; it is converted otherwise, where it is needed.
    """
    with torch.enable_grad():
        routing = sae.mask.route(sae.normalize(vectors) if sae.mask.reads_vectors else vectors, position)
    order, ends = in_group_order(sae.mask.groups(), routing.mask_row)
    work = _Work(
        sae,
        inputs=sae.encoder_inputs(vectors, position, order),
        mask_row=_in_order(routing.mask_row, order),
        position=_in_order(position, order).long(),
        order=order,
        ends=ends,
        strength=None if routing.strength is None else _in_order(routing.strength.detach(), order),
        loss_tokens=loss_tokens or len(vectors),
        low_encoder=low_encoder,
    )
    if sae.rule.training_choice() is None:
        step = _through_blocks(work, precision, details)
    else:
        step = _through_entries(work, dead if sae.rule.revives and aux_k else None, aux_k, precision, details)
    if not details:
        step = replace(step, codes=None, residual=None)
    if order is not None:
        step = _in_batch_order(step, order)
    if routing.strength is not None:
        assert routing.penalty is not None
        strength_gradient = torch.empty_like(work.strength_gradient)
        strength_gradient[slice(None) if order is None else order] = work.strength_gradient
        torch.autograd.backward(
            [routing.strength, routing.penalty], [strength_gradient, torch.ones_like(routing.penalty)]
        )
    return step


class _Work:
    """A batch with its tokens in the order of live groups, and its gradients with respect to mask and router.

    Attributes:
        inputs: `SparseAutoencoder.encoder_inputs` [token d_model].
        ends: where each live group ends in the order of tokens.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        inputs: Tensor,
        mask_row: Tensor,
        position: Tensor,
        order: Tensor | None,
        ends: list[int],
        strength: Tensor | None,
        loss_tokens: int,
        low_encoder: Tensor | None = None,
    ) -> None:
        self.sae = sae
        self.inputs = inputs
        self.mask_row = mask_row
        self.position = position
        self.order = order
        self.ends = ends
        self.strength = strength
        self.loss_tokens = loss_tokens
        self.low_encoder = low_encoder
        self.table = sae.mask.table().detach()
        self.table_gradient = torch.zeros_like(self.table) if sae.mask.learns else None
        self.strength_gradient = inputs.new_zeros(len(inputs))


class _PositionGradient:
    """Sums the gradient of a learned bias per position, which is subtracted before encoding and added to the output.

    The gradient at a position is that of the output minus that of the encoder's input, summed over its tokens.
    """

    def __init__(self, work: _Work) -> None:
        self._work = work
        sae = work.sae
        self._of_output = sae.encoder.new_zeros(sae.mask.n_positions, sae.d_model)
        self._of_preactivation = sae.encoder.new_zeros(sae.mask.n_positions, sae.d_sae)

    def add_output(self, rows: slice, gradient: Tensor) -> None:
        """Add the gradient [token d_model] of the output at the tokens `rows`."""
        self._of_output += self._sums(rows, gradient)

    def add_preactivations(self, rows: slice, latents: slice | Tensor, gradient: Tensor) -> None:
        """Add the gradient [token live] of the pre-activations of live latents at the tokens `rows`."""
        self._of_preactivation[:, latents] += self._sums(rows, gradient)

    def add_entries(self, token: Tensor, latent: Tensor, gradient: Tensor) -> None:
        """Add the gradient of pre-activations by entry; empty slots have a gradient of 0."""
        index = self._work.position[token] * self._work.sae.d_sae + latent.clamp(min=0)
        operations.add_at_(self._of_preactivation.view(-1), index, gradient)

    def _sums(self, rows: slice, gradient: Tensor) -> Tensor:
        tokens = torch.arange(len(gradient), device=gradient.device)
        by_position = operations.Grouped(self._work.position[rows], self._work.sae.mask.n_positions)
        return by_position.sum_rows(gradient.new_ones(len(gradient)), gradient.contiguous(), tokens)

    def finish(self) -> None:
        """Set the gradient."""
        sae = self._work.sae
        assert sae.position_bias is not None
        sae.position_bias.grad = self._of_output - self._of_preactivation @ sae.encoder


def _position_gradient(work: _Work) -> _PositionGradient | None:
    """None without a learned bias per position."""
    bias = work.sae.position_bias
    return _PositionGradient(work) if bias is not None and bias.requires_grad else None


def _in_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _in_batch_order(step: StepLoss, order: Tensor) -> StepLoss:
    """The step with tokens in the order of the batch; `order` [token] has the batch's index of each token of `step`."""
    codes = step.codes
    if codes is not None:
        token = order[codes.token]
        entry = operations.Grouped(token, codes.n_tokens).order
        codes = replace(codes, token=token[entry], latent=codes.latent[entry], value=codes.value[entry])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return replace(
        step,
        codes=codes,
        mask_row=step.mask_row[back],
        residual=None if step.residual is None else step.residual[back],
        strength=None if step.strength is None else step.strength[back],
    )


def _through_entries(
    work: _Work, dead: Tensor | None, aux_k: int, precision: runtime.Precision, details: bool
) -> StepLoss:
    """Set the gradients of a rule that selects few codes, from the active codes alone."""
    sae, n = work.sae, len(work.inputs)
    training_choice = sae.rule.training_choice()
    assert training_choice is not None
    sums = _ParameterGradients(work)
    chosen = _choose(work, training_choice, precision)
    n_parts = 1 if sae.rule.level is None else int(sae.rule.level.max()) + 1
    slope = 2 / (work.loss_tokens * n_parts)
    ungated = chosen.value if work.strength is None else chosen.value / work.strength[chosen.token]
    token = chosen.token if work.order is None else work.order[chosen.token]
    of_penalty = sae.rule.penalty_gradient(token, chosen.latent, ungated, n)
    left = sums.explain(work.inputs, chosen, slope, sae.rule.level, of_penalty)
    # A latent of part m contributes to the errors of part m and all later parts; left[0] sums all of them.
    bias_gradient = left[0].sum(0) * -slope
    if sums.of_positions is not None:
        sums.of_positions.add_output(slice(0, n), left[0] * -slope)
    residual = left[-1]
    squares = [_square(residual)]
    # Asked here, the host waits for the GPU while that has work.
    if dead is not None and bool(dead.any()):
        revived = _choose(work, LargestOfToken(aux_k), precision, among=dead)
        left = sums.explain(residual, revived, 2 * AUX_WEIGHT / work.loss_tokens)
        squares.append(_square(left[0]))
    sums.finish(bias_gradient)
    active = chosen.latent >= 0
    least = ungated.masked_fill(~active, torch.inf)
    least = least.min() if len(least) else ungated.new_zeros(())
    numbers = torch.stack([*squares, least, active.sum().to(least.dtype)])
    fired = torch.zeros(sae.d_sae + 1, dtype=torch.bool, device=residual.device)
    fired[chosen.latent] = True  # the last one for empty entries
    return StepLoss(
        read=partial(_read_numbers, numbers, n),
        fired=fired[:-1],
        codes=chosen.codes(n, sae.d_sae) if details else None,
        mask_row=work.mask_row,
        residual=residual,
        strength=work.strength,
        openness_gradient=work.table_gradient,
    )


def _read_numbers(numbers: Tensor, n_tokens: int) -> StepNumbers:
    """Read the squared errors, without and, if there are four numbers, with the dead latents, the least code, and L0.

    This is one transfer from a GPU.
    """
    error, *auxiliary, least, n_active = numbers.tolist()
    return StepNumbers(
        reconstruction=error / n_tokens,
        auxiliary=auxiliary[0] / n_tokens if auxiliary else 0.0,
        n_active=int(n_active),
        least=least if n_active else 0.0,
    )


def _square(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows).square()


@dataclass(frozen=True)
class _Chosen:
    """Active codes [entry], in slots if `slots` is not None; `value` includes the gate and the router's strength."""

    token: Tensor
    latent: Tensor
    preactivation: Tensor
    openness: Tensor | None  # None stands for 1
    value: Tensor
    slots: int | None

    def codes(self, n_tokens: int, d_sae: int) -> Codes:
        """The codes without empty entries."""
        if self.slots is None:
            return Codes(self.token, self.latent, self.value, n_tokens, d_sae)
        entry = (self.latent >= 0).nonzero()[:, 0]
        return Codes(self.token[entry], self.latent[entry], self.value[entry], n_tokens, d_sae)


def _choose(work: _Work, choice: Choice, precision: runtime.Precision, among: Tensor | None = None) -> _Chosen:
    sae = work.sae
    inputs = GroupedInputs(work.inputs, work.mask_row, work.ends)
    weight, bias = sae.encoder.detach(), sae.encoder_bias.detach()
    encoder = GatedEncoder(weight, bias, sae.mask.groups(), work.table, work.low_encoder)
    entries = choose(inputs, encoder, choice, precision=precision, among=among, in_slots=True)
    openness = None
    if not (sae.mask.gates_code() and sae.mask.is_strict()):
        openness = work.table[work.mask_row[entries.token], entries.latent]
    value = entries.preactivation
    if sae.mask.gates_code() and openness is not None:
        value = value * openness
    if work.strength is not None:
        value = value * work.strength[entries.token]
    return _Chosen(entries.token, entries.latent, entries.preactivation, openness, value, entries.slots)


class _ParameterGradients:
    """Sums the gradients of entries in the SAE's parameters; `finish` sets those of the biases."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._first = True
        # Overwriting the last step's gradients is faster than allocating new pages.
        sae = work.sae
        for parameter in (sae.encoder, sae.decoder):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        self._bias = torch.zeros_like(sae.encoder_bias)
        self._unmasked_bias = torch.zeros_like(sae.encoder_bias)
        self.of_positions = _position_gradient(work)

    def explain(
        self,
        target: Tensor,
        chosen: _Chosen,
        slope: float,
        level: Tensor | None = None,
        of_penalty: Tensor | None = None,
    ) -> Tensor:
        """Subtract the codes from the target, and add the gradients of slope / 2 * |remainder|^2.

        Args:
            target: [token d_model].
            chosen: the codes that reconstruct the target.
            slope: 2 / number of tokens, for a mean over them.
            level: [latent], see `operations.explain`.
            of_penalty: [entry], see `ActivationRule.penalty_gradient`.

        Returns:
            The remainders [part token d_model] of `operations.explain`.
        """
        work, sae, token, latent = self._work, self._work.sae, chosen.token, chosen.latent
        decoder = sae.decoder.detach()
        left, along = operations.explain(target, token, latent, chosen.value, decoder, level, chosen.slots)
        pulled = along * -slope
        if work.strength is not None:
            operations.add_at_(work.strength_gradient, token, pulled * chosen.value / work.strength[token])
            pulled = pulled * work.strength[token]
        if of_penalty is not None:
            pulled = pulled + of_penalty / work.loss_tokens
        if work.table_gradient is not None:
            index = work.mask_row[token] * sae.d_sae + latent.clamp(min=0)
            operations.add_at_(work.table_gradient.view(-1), index, pulled * chosen.preactivation)
        value, masked = chosen.value, pulled
        if chosen.openness is not None:
            masked = pulled * chosen.openness
            if sae.mask.gates_code():
                pulled = masked
            else:
                value = value * chosen.openness
        by_latent = operations.Grouped(latent, sae.d_sae)
        row = token if level is None else level[latent] * len(target) + token
        add = not self._first
        by_latent.sum_rows(masked, work.inputs, token, out=sae.encoder.grad, add=add)
        by_latent.sum_rows(value * -slope, left.view(-1, sae.d_model), row, out=sae.decoder.grad, add=add)
        self._bias += by_latent.sum(masked)
        self._unmasked_bias += by_latent.sum(pulled)
        if self.of_positions is not None:
            self.of_positions.add_entries(token, latent, pulled)
        self._first = False
        return left

    def finish(self, bias_gradient: Tensor) -> None:
        """Set the gradients of the biases; `bias_gradient` [d_model] is that of the decoder's output."""
        sae = self._work.sae
        sae.encoder_bias.grad = self._bias
        # The encoder's input is x - decoder_bias, so pre-activations contribute with a minus sign.
        sae.decoder_bias.grad = bias_gradient - self._unmasked_bias @ sae.encoder
        if self.of_positions is not None:
            self.of_positions.finish()


def _through_blocks(work: _Work, precision: runtime.Precision, details: bool) -> StepLoss:
    """Set the gradients of a rule that needs the pre-activations of all live latents."""
    gradients = _BlockGradients(work, precision, details)
    with runtime.fast_float32(work.inputs.device):
        numbers = _BLOCK_NUMBERS if work.inputs.device.type == "cpu" else _GPU_BLOCK_NUMBERS
        for rows, group in pieces(work.sae.mask.groups(), work.ends, numbers):
            gradients.add(rows, group)
    return gradients.finish()


_BLOCK_NUMBERS = 2**22  # 16 MB of float32; sums over tokens are slow with fewer rows per block
_GPU_BLOCK_NUMBERS = 2**26  # 256 MB of float32, about ten times per block


@dataclass(frozen=True)
class _Gate:
    """How the mask acts on a block's codes; all [token live_latent], or None where it does not act."""

    leaf: Tensor | None  # whose .grad is the openness gradient
    openness: Tensor | None
    share: Tensor | None  # of each token's gradient that the latents' parameters get


class _BlockGradients:
    """Sums the gradients of blocks: some tokens of one live group, and all latents that are live there."""

    def __init__(self, work: _Work, precision: runtime.Precision, details: bool) -> None:
        self._work = work
        self._details = details
        sae = work.sae
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias, *sae.rule.parameters()):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        self._low = precision == "bfloat16" and work.inputs.dtype == torch.float32
        self._encoder, self._decoder, self._inputs = (
            tensor.bfloat16() if self._low else tensor for tensor in (sae.encoder, sae.decoder, work.inputs)
        )
        self._residual = torch.empty_like(work.inputs)
        self._unmasked_bias = torch.zeros_like(sae.encoder_bias)
        self._of_positions = _position_gradient(work)
        self._n_active = torch.zeros(sae.d_sae, dtype=torch.int64, device=work.inputs.device)
        self._latents = torch.arange(sae.d_sae, device=work.inputs.device)
        no_index = work.mask_row[:0]
        self._entries = [(no_index, no_index, work.inputs.new_zeros(0))]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return (left.bfloat16() @ right if self._low else left @ right).to(self._residual.dtype)

    def add(self, rows: slice, group: LiveGroup) -> None:
        """Add the gradients of the tokens `rows`, all of which are at positions of `group`."""
        work, sae, latents = self._work, self._work.sae, group.latents
        encoder, decoder = self._encoder[latents], self._decoder[latents]
        gate = self._gate(rows, group)
        preactivation = self._product(self._inputs[rows], encoder.T).add_(sae.encoder_bias[latents]).requires_grad_()
        with torch.enable_grad():
            coded = sae.rule.training_codes(preactivation, gate.openness, _shared_of(latents, gate.share))
        values, error, output_gradient = self._backward(rows, decoder, coded)
        assert preactivation.grad is not None
        self._add_to_parameters(rows, latents, gate, preactivation.grad, values, output_gradient)
        if self._of_positions is not None:
            self._of_positions.add_output(rows, output_gradient)
            self._of_positions.add_preactivations(rows, latents, preactivation.grad)
        if work.table_gradient is not None and gate.leaf is not None and gate.leaf.grad is not None:
            # index_put_ would add in an order that differs between runs.
            tokens = torch.arange(rows.stop - rows.start, device=values.device)
            by_row = operations.Grouped(work.mask_row[rows], len(work.table))
            sums = by_row.sum_rows(values.new_ones(len(values)), gate.leaf.grad.contiguous(), tokens)
            work.table_gradient[:, latents] += sums
        self._residual[rows] = -error
        self._n_active[latents] += (values > 0).sum(0)
        if self._details:
            row, column = values.nonzero(as_tuple=True)
            self._entries.append((row + rows.start, self._latents[latents][column], values[row, column]))

    def _gate(self, rows: slice, group: LiveGroup) -> _Gate:
        work, mask = self._work, self._work.sae.mask
        ungated = not mask.learns and (not mask.gates_code() or not group.gated)
        if ungated and mask.gates_code():
            return _Gate(None, None, None)
        table_rows = work.table[:, group.latents][work.mask_row[rows]]
        share = None if mask.gates_code() else table_rows
        if ungated:
            return _Gate(None, None, share)
        with torch.enable_grad():
            leaf = table_rows.clone().requires_grad_(mask.learns)
            openness = leaf if mask.gates_code() else 1 + (leaf - table_rows)
        return _Gate(leaf, openness, share)

    def _backward(self, rows: slice, decoder: Tensor, coded: Coded) -> tuple[Tensor, Tensor, Tensor]:
        """Send the loss back through the rule; returns the codes' values, x_hat - x and its gradient."""
        work, codes, inputs = self._work, coded.codes.detach(), self._work.inputs[rows]
        strength = None if work.strength is None else work.strength[rows, None]
        values = codes if strength is None else codes * strength
        error = self._product(values, decoder) - inputs
        output_gradient = error * (2 / work.loss_tokens)
        code_gradient = self._product(output_gradient, decoder.T)
        if strength is not None:
            work.strength_gradient[rows] = (code_gradient * codes).sum(1)
            code_gradient = code_gradient * strength
        outputs, gradients = [coded.codes], [code_gradient]
        if coded.penalty is not None:
            outputs.append(coded.penalty)
            gradients.append(error.new_ones(()) / work.loss_tokens)
        if coded.through_gate is not None:
            gate_error = self._product(coded.through_gate.detach(), decoder) - inputs
            outputs.append(coded.through_gate)
            gradients.append(self._product(gate_error, decoder.T) * (2 / work.loss_tokens))
        torch.autograd.backward(outputs, gradients)
        return values, error, output_gradient

    def _add_to_parameters(
        self,
        rows: slice,
        latents: slice | Tensor,
        gate: _Gate,
        preactivation_gradient: Tensor,
        values: Tensor,
        output_gradient: Tensor,
    ) -> None:
        sae, share = self._work.sae, gate.share
        masked = preactivation_gradient if share is None else preactivation_gradient * share
        masked_values = values if share is None else values * share
        _add_at(sae.encoder.grad, latents, self._product(masked.T, self._inputs[rows]))
        _add_at(sae.decoder.grad, latents, self._product(masked_values.T, output_gradient.to(self._inputs.dtype)))
        _add_at(sae.encoder_bias.grad, latents, masked.sum(0))
        _add_at(self._unmasked_bias, latents, masked.sum(0) if share is None else preactivation_gradient.sum(0))
        assert sae.decoder_bias.grad is not None
        sae.decoder_bias.grad += output_gradient.sum(0)

    def finish(self) -> StepLoss:
        """Complete the decoder bias gradient, and return the step."""
        work, sae = self._work, self._work.sae
        assert sae.decoder_bias.grad is not None
        sae.decoder_bias.grad -= self._unmasked_bias @ sae.encoder
        if self._of_positions is not None:
            self._of_positions.finish()
        codes = None
        if self._details:
            token, latent, value = (torch.cat(parts) for parts in zip(*self._entries, strict=True))
            codes = Codes(token, latent, value, len(work.inputs), sae.d_sae)
        square, n_active, n_tokens = _square(self._residual), self._n_active.sum(), len(self._residual)
        return StepLoss(
            read=lambda: StepNumbers(float(square) / n_tokens, 0.0, int(n_active), 0.0),
            fired=self._n_active > 0,
            codes=codes,
            mask_row=work.mask_row,
            residual=self._residual,
            strength=work.strength,
            openness_gradient=work.table_gradient,
        )


def _shared_of(latents: slice | Tensor, share: Tensor | None) -> Callable[[Tensor], Tensor]:
    if share is None:
        return lambda parameter: parameter[latents]
    return lambda parameter: SharedParameter.apply(parameter[latents], share)


def _add_at(total: Tensor | None, latents: slice | Tensor, part: Tensor) -> None:
    assert total is not None
    if isinstance(latents, slice):
        total[latents] += part
    else:
        total.index_add_(0, latents, part)
