"""The training loss and its masked gradients: once by definition through autograd, and fast by hand.

All ways set `.grad` of every parameter of the SAE and its rule. The loss of a batch is the mean over tokens of

    |x_hat - x|^2  +  the rule's penalty  +  AUX_WEIGHT * |e_hat - e|^2,     e = x - x_hat taken as a constant,

where e_hat is the reconstruction of the error by the `aux_k` most active *dead* latents (Gao et al. 2024, arXiv
2406.04093, appendix A.2), gated by the mask like all codes; that term is there only while latents are dead, and for
rules that revive them. With nested parts the first term is its mean over the parts, and e the error of all of them.
Codes that must reconstruct the vector through a rule's gate add |gate_codes . decoder + decoder_bias - x|^2 with the
decoder taken as constant; a router adds its penalty.

Under `gating = "gradient"` codes are not gated. What a token at position p sends into latent j's encoder row, encoder
bias, decoder row and rule parameters is multiplied by M[p, j]; the decoder bias, which belongs to no latent, gets all
of its gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask.kernels import operations, runtime
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.selection import Choice, LargestOfToken, choose, in_group_order, pieces
from posmask.training.reference_loss import AUX_WEIGHT, StepLoss, _Shared

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
) -> StepLoss:
    """The same loss and gradients without what is closed or zero; the one place that chooses how.

    Rules that make few codes active from the start work on active codes alone. The others need all pre-activations of
    the latents that are live at a position, and work on blocks of them. Either way tokens are taken in the order of
    the mask's live groups, which costs a copy where the batch is laid out otherwise.

    Args:
        precision: bfloat16 is for float32 SAEs. Where few codes are chosen it decides only which; all values and
            gradients are float32. The other rules' products with the dictionary all carry its rounding.
        details: whether codes and residual are wanted, which not every step of a training needs.
    """
    with torch.enable_grad():
        routing = sae.mask.route(sae.normalize(vectors) if sae.mask.reads_vectors else vectors, position)
    order, ends = in_group_order(sae.mask.groups(), routing.mask_row)
    work = _Work(
        sae,
        inputs=operations.centered(vectors, order, sae.center, sae.scale, sae.decoder_bias.detach()),
        mask_row=_in_order(routing.mask_row, order),
        ends=ends,
        strength=None if routing.strength is None else _in_order(routing.strength.detach(), order),
        loss_tokens=loss_tokens or len(vectors),
    )
    if sae.rule.training_choice() is None:
        found = _through_blocks(work, precision, details)
    else:
        revived = dead if sae.rule.revives and aux_k and dead is not None and bool(dead.any()) else None
        found = _through_entries(work, revived, aux_k, precision)
    if not details:
        found = replace(found, codes=None, residual=None)
    if order is not None:
        found = _as_they_came(found, order)
    if routing.strength is not None:
        assert routing.penalty is not None
        strength_gradient = torch.empty_like(work.strength_gradient)
        strength_gradient[slice(None) if order is None else order] = work.strength_gradient
        torch.autograd.backward(
            [routing.strength, routing.penalty], [strength_gradient, torch.ones_like(routing.penalty)]
        )
    return found


class _Work:
    """A batch as it is worked on, tokens in the order of live groups, and what it sends to the mask."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        inputs: Tensor,
        mask_row: Tensor,
        ends: list[int],
        strength: Tensor | None,
        loss_tokens: int,
    ) -> None:
        self.sae = sae
        self.inputs = inputs  # x - decoder_bias
        self.mask_row = mask_row
        self.ends = ends  # where in the order of tokens each live group ends
        self.strength = strength
        self.loss_tokens = loss_tokens
        self.table = sae.mask.table().detach()
        self.table_gradient = torch.zeros_like(self.table) if sae.mask.learns else None
        self.strength_gradient = inputs.new_zeros(len(inputs))


def _in_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _as_they_came(found: StepLoss, order: Tensor) -> StepLoss:
    """The same with tokens as they stood in the batch, of which `order` lists those worked on."""
    codes = found.codes
    if codes is not None:
        token = order[codes.token]
        entry = operations.Grouped(token, codes.n_tokens).order
        codes = replace(codes, token=token[entry], latent=codes.latent[entry], value=codes.value[entry])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return replace(
        found,
        codes=codes,
        mask_row=found.mask_row[back],
        residual=None if found.residual is None else found.residual[back],
        strength=None if found.strength is None else found.strength[back],
    )


def _through_entries(work: _Work, dead: Tensor | None, aux_k: int, precision: runtime.Precision) -> StepLoss:
    sae, n = work.sae, len(work.inputs)
    training_choice = sae.rule.training_choice()
    assert training_choice is not None
    sums = _ParameterGradients(work)
    chosen = _choose(work, training_choice, precision)
    n_parts = 1 if sae.rule.level is None else int(sae.rule.level.max()) + 1
    left = sums.explain(work.inputs, chosen, 2 / (work.loss_tokens * n_parts), sae.rule.level)
    # What a latent of part m does shows in the errors of m and of all later parts.
    bias_gradient = left[0].sum(0) * (-2 / (work.loss_tokens * n_parts))
    residual = left[-1]
    auxiliary = 0.0
    if dead is not None:
        revived = _choose(work, LargestOfToken(aux_k), precision, among=dead)
        left = sums.explain(residual, revived, 2 * AUX_WEIGHT / work.loss_tokens)
        auxiliary = _mean_square(left[0])
    sums.finish(bias_gradient)
    value, strength = chosen.value, work.strength
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=value.device)
    fired[chosen.latent] = True
    return StepLoss(
        _mean_square(residual),
        auxiliary,
        fired,
        len(value),
        float((value if strength is None else value / strength[chosen.token]).min()) if len(value) else 0.0,
        Codes(chosen.token, chosen.latent, value, n, sae.d_sae),
        work.mask_row,
        residual,
        strength,
        work.table_gradient,
    )


def _mean_square(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows).square()) / len(rows)


@dataclass(frozen=True)
class _Chosen:
    """Active codes: what they are made of, and their values with gate and router's strength."""

    token: Tensor
    latent: Tensor
    preactivation: Tensor
    openness: Tensor | None  # None: 1 for all
    value: Tensor


def _choose(work: _Work, choice: Choice, precision: runtime.Precision, among: Tensor | None = None) -> _Chosen:
    sae = work.sae
    found = choose(
        work.inputs,
        work.mask_row,
        work.ends,
        sae.encoder.detach(),
        sae.encoder_bias.detach(),
        sae.mask.groups(),
        work.table,
        choice,
        precision=precision,
        among=among,
    )
    openness = None
    if not (sae.mask.gates_code() and sae.mask.is_strict()):
        openness = work.table[work.mask_row[found.token], found.latent]
    value = found.preactivation
    if sae.mask.gates_code() and openness is not None:
        value = value * openness
    if work.strength is not None:
        value = value * work.strength[found.token]
    return _Chosen(found.token, found.latent, found.preactivation, openness, value)


class _ParameterGradients:
    """Sums what entries send to the SAE's parameters, and sets their `.grad` at the end."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._first = True
        # The last step's gradients are written over, which is faster than allocating as many pages anew.
        sae = work.sae
        for parameter in (sae.encoder, sae.decoder):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        self._bias = torch.zeros_like(sae.encoder_bias)
        self._unmasked_bias = torch.zeros_like(sae.encoder_bias)

    def explain(self, target: Tensor, chosen: _Chosen, slope: float, level: Tensor | None = None) -> Tensor:
        """Take the codes from the target, and add what slope / 2 * |what is left|^2 sends back; see kernels.explain.

        Args:
            slope: 2 / number of tokens, for a mean over them.
        """
        work, sae, token, latent = self._work, self._work.sae, chosen.token, chosen.latent
        left, along = operations.explain(target, token, latent, chosen.value, sae.decoder.detach(), level)
        pulled = along * -slope
        if work.strength is not None:
            work.strength_gradient.index_add_(0, token, pulled * chosen.value / work.strength[token])
            pulled = pulled * work.strength[token]
        if work.table_gradient is not None:
            index = work.mask_row[token] * sae.d_sae + latent
            work.table_gradient.view(-1).index_add_(0, index, pulled * chosen.preactivation)
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
        self._first = False
        return left

    def finish(self, bias_gradient: Tensor) -> None:
        sae = self._work.sae
        sae.encoder_bias.grad = self._bias
        # The encoder's input is x - decoder_bias, so every pre-activation pulls the decoder bias the other way.
        sae.decoder_bias.grad = bias_gradient - self._unmasked_bias @ sae.encoder


def _through_blocks(work: _Work, precision: runtime.Precision, details: bool) -> StepLoss:
    sae, mask, n = work.sae, work.sae.mask, len(work.inputs)
    for parameter in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias, *sae.rule.parameters()):
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    low = precision == "bfloat16" and work.inputs.dtype == torch.float32
    encoder, decoder, inputs = (part.bfloat16() if low else part for part in (sae.encoder, sae.decoder, work.inputs))
    residual = torch.empty_like(work.inputs)
    unmasked_bias = torch.zeros_like(sae.encoder_bias)
    n_active_of = torch.zeros(sae.d_sae, dtype=torch.int64, device=residual.device)
    every = torch.arange(sae.d_sae, device=residual.device)
    found = [(work.mask_row[:0], work.mask_row[:0], residual.new_zeros(0))]

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left.bfloat16() @ right if low else left @ right).to(residual.dtype)

    for rows, group in pieces(mask.groups(), work.ends, _BLOCK_NUMBERS):
        latents, strength = group.latents, None if work.strength is None else work.strength[rows, None]
        encoder_here, decoder_here = encoder[latents], decoder[latents]
        ungated = not mask.learns and (not mask.gates_code() or not group.gated)
        openness_here = None
        if not ungated or not mask.gates_code():
            openness_here = work.table[:, latents][work.mask_row[rows]]
        share = None if mask.gates_code() else openness_here
        with runtime.fast_float32():
            preactivation = product(inputs[rows], encoder_here.T).add_(sae.encoder_bias[latents]).requires_grad_()
        with torch.enable_grad():
            gate = openness = None
            if openness_here is not None and not ungated:
                gate = openness_here.clone().requires_grad_(mask.learns)
                openness = gate if mask.gates_code() else 1 + (gate - openness_here)
            coded = sae.rule.training_codes(preactivation, openness, _shared_of(latents, share))
        codes = coded.codes.detach()
        spoken = codes if strength is None else codes * strength
        with runtime.fast_float32():
            error = product(spoken, decoder_here) - work.inputs[rows]
            output_gradient = error * (2 / work.loss_tokens)
            code_gradient = product(output_gradient, decoder_here.T)
            if strength is not None:
                work.strength_gradient[rows] = (code_gradient * codes).sum(1)
                code_gradient = code_gradient * strength
            outputs, gradients = [coded.codes], [code_gradient]
            if coded.penalty is not None:
                outputs, gradients = [*outputs, coded.penalty], [*gradients, error.new_ones(()) / work.loss_tokens]
            if coded.through_gate is not None:
                gate_error = product(coded.through_gate.detach(), decoder_here) - work.inputs[rows]
                outputs = [*outputs, coded.through_gate]
                gradients = [*gradients, product(gate_error, decoder_here.T) * (2 / work.loss_tokens)]
            torch.autograd.backward(outputs, gradients)
            assert preactivation.grad is not None
            masked = preactivation.grad if share is None else preactivation.grad * share
            spoken_share = spoken if share is None else spoken * share
            _add_at(sae.encoder.grad, latents, product(masked.T, inputs[rows]))
            _add_at(sae.decoder.grad, latents, product(spoken_share.T, output_gradient.to(inputs.dtype)))
        _add_at(sae.encoder_bias.grad, latents, masked.sum(0))
        _add_at(unmasked_bias, latents, masked.sum(0) if share is None else preactivation.grad.sum(0))
        if work.table_gradient is not None and gate is not None and gate.grad is not None:
            work.table_gradient.index_put_((work.mask_row[rows, None], every[latents]), gate.grad, accumulate=True)
        assert sae.decoder_bias.grad is not None
        sae.decoder_bias.grad += output_gradient.sum(0)
        residual[rows] = -error
        n_active_of[latents] += (spoken > 0).sum(0)
        if details:
            row, column = spoken.nonzero(as_tuple=True)
            found.append((row + rows.start, every[latents][column], spoken[row, column]))

    assert sae.decoder_bias.grad is not None
    sae.decoder_bias.grad -= unmasked_bias @ sae.encoder
    codes = None
    if details:
        token, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
        codes = Codes(token, latent, value, n, sae.d_sae)
    return StepLoss(
        _mean_square(residual),
        0.0,
        n_active_of > 0,
        int(n_active_of.sum()),
        0.0,
        codes,
        work.mask_row,
        residual,
        work.strength,
        work.table_gradient,
    )


_BLOCK_NUMBERS = 2**22  # 16 MB of float32; with few rows a piece the sums over tokens would be slow


def _shared_of(latents: slice | Tensor, share: Tensor | None) -> Callable[[Tensor], Tensor]:
    if share is None:
        return lambda parameter: parameter[latents]
    return lambda parameter: _Shared.apply(parameter[latents], share)


def _add_at(total: Tensor | None, latents: slice | Tensor, part: Tensor) -> None:
    assert total is not None
    if isinstance(latents, slice):
        total[latents] += part
    else:
        total.index_add_(0, latents, part)
