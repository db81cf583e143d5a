"""The sparse autoencoder: the definition of a code, and sparse codes, which everything else uses.

For a token at position p with vector v:

    x     = (v - center) / scale                                 (constants of the training data, stored in the SAE)
    pre   = (x - decoder_bias) . encoder[j] + encoder_bias[j]    for each latent j
    code  = rule(M[p] * relu(pre))                               (M: the position mask's openness; see rules.py)
    x_hat = sum_j code[j] * decoder[j] + decoder_bias            and  v_hat = x_hat * scale + center

An SAE with a position bias codes x - position_bias[p] in place of x, and adds position_bias[p] to x_hat.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posmask.errors import BadSetting
from posmask.kernels import operations, runtime
from posmask.masks.base import PositionMask, PositionOrigin
from posmask.masks.groups import LiveGroup
from posmask.sae.rules import RuleSettings, make_rule
from posmask.sae.selection import GatedEncoder, GroupedInputs, choose, in_group_order, pieces
from posmask.seeds import generator

__all__ = ["Codes", "PositionBias", "PositionedVectors", "SparseAutoencoder", "check_sizes", "check_table"]

PositionBias = Literal["mean", "learned"]
"""A vector per position that is subtracted before encoding and added back after decoding: the mean of the training
vectors at the position, which stays fixed, or a parameter that starts at that mean."""


@dataclass(frozen=True)
class Codes:
    """The active codes of a batch, as entries of token, latent and value.

    Entries are sorted by token. All values are above 0, and no pair of token and latent occurs twice.
    """

    token: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    n_tokens: int
    d_sae: int

    def select(self, which: Bool[Tensor, " token"] | Int[Tensor, " selected"]) -> "Codes":
        """The codes of a subset of the tokens, in the order of `Batch.select`.

        Args:
            which: a boolean per token, or token indices without repetitions.
        """
        indices = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        new_token = torch.full((self.n_tokens,), -1, device=self.token.device)
        new_token[indices] = torch.arange(len(indices), device=new_token.device)
        token = new_token[self.token]
        entry = (token >= 0).nonzero()[:, 0]
        entry = entry[torch.sort(token[entry], stable=True).indices]
        return Codes(token[entry], self.latent[entry], self.value[entry], len(indices), self.d_sae)

    def to(self, device: torch.device) -> "Codes":
        """The codes on `device`."""
        token, latent, value = (part.to(device) for part in (self.token, self.latent, self.value))
        return Codes(token, latent, value, self.n_tokens, self.d_sae)

    def n_active(self) -> Float[Tensor, " token"]:
        """Number of active latents per token."""
        return torch.bincount(self.token, minlength=self.n_tokens).float()

    def dense(self) -> Float[Tensor, "token latent"]:
        """The codes as a dense matrix."""
        out = self.value.new_zeros(self.n_tokens, self.d_sae)
        out[self.token, self.latent] = self.value
        return out


@runtime_checkable
class PositionedVectors(Protocol):
    """Vectors with their positions, such as `data.activations.Batch`."""

    @property
    def vectors(self) -> Tensor:
        """Vectors in the model's units, [token d_model]."""
        ...

    def positions(self, position_origin: PositionOrigin) -> Tensor:
        """Position of each token counted from the origin, [token]."""
        ...


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_Method = Callable[Concatenate["SparseAutoencoder", Arguments], Result]


def _in_float32(method: "_Method[Arguments, Result]") -> "_Method[Arguments, Result]":
    """Let an SAE in bfloat16 or float16 compute in float32, with a copy of its weights."""

    @functools.wraps(method)
    def compute(sae: "SparseAutoencoder", *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if sae.encoder.dtype in (torch.bfloat16, torch.float16):
            sae = copy.deepcopy(sae).float()
        return method(sae, *args, **kwargs)

    return compute


class SparseAutoencoder(nn.Module):
    """A dictionary of latents with an activation rule and a position mask.

    `encoder` and `decoder` have one row per latent, [latent d_model]; decoder rows have unit norm.
    Inputs and outputs are in the model's units. Internally vectors are centered and scaled so that the mean of |x|^2 is
    d_model on the training data. In bfloat16 or float16, weights are stored in it, and codes and reconstructions are
    computed in float32.

    Args:
        d_model: size of a vector.
        rule: settings of the activation rule.
        mask: sets the number of latents (d_sae) and the number of positions that can be encoded (n_positions).
        seed: seed of the initial weights.
        position_bias: the kind of the bias per position; None for none. It is 0 until `start_position_bias_`.

    Raises:
        BadSetting: the rule needs more latents.
    """

    center: Tensor
    scale: Tensor
    position_bias: nn.Parameter | None
    """The bias per position, [position d_model], in the SAE's units."""

    def __init__(
        self,
        d_model: int,
        rule: RuleSettings,
        mask: PositionMask,
        seed: int = 0,
        position_bias: PositionBias | None = None,
    ) -> None:
        super().__init__()
        self.rule = make_rule(rule, mask.d_sae)
        self.rule.nest(mask.support(), mask.n_free)
        self.mask = mask
        mask.meet(d_model, seed)
        rows = torch.randn(mask.d_sae, d_model, generator=generator(seed, "weights"))
        rows = (rows / rows.norm(dim=1, keepdim=True))[mask.copied_from]
        self.encoder = nn.Parameter(rows.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(mask.d_sae))
        self.decoder = nn.Parameter(rows)
        self.decoder_bias = nn.Parameter(torch.zeros(d_model))
        self.position_bias_kind: PositionBias | None = position_bias
        table = None
        if position_bias is not None:
            table = nn.Parameter(torch.zeros(mask.n_positions, d_model), requires_grad=position_bias == "learned")
        self.register_parameter("position_bias", table)
        self.register_buffer("center", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.encoder.shape[0]

    def latent_parameters(self) -> list[nn.Parameter]:
        """The parameters whose first dimension is the latent."""
        return [self.encoder, self.encoder_bias, self.decoder, *self.rule.parameters()]

    @property
    def d_model(self) -> int:
        """Size of a vector."""
        return self.encoder.shape[1]

    def normalize(self, vectors: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """Vectors in the SAE's units: (vectors - center) / scale."""
        return (vectors.to(self.encoder.dtype) - self.center) / self.scale

    @torch.no_grad()
    def start_position_bias_(self, means: Float[Tensor, "position d_model"]) -> None:
        """Set the bias per position to these vectors, which are in the model's units; does nothing without a bias.

        Args:
            means: such as `Activations.position_means`. The bias is 0 where a row is NaN.
        """
        if self.position_bias is not None:
            self.position_bias.copy_(self.normalize(means).nan_to_num(0.0))

    def without_position_bias(
        self, x: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]
    ) -> Float[Tensor, "*token d_model"]:
        """Normalized vectors minus the bias of their positions."""
        return x if self.position_bias is None else x - self._bias_at(position)

    def _bias_at(self, position: Int[Tensor, "*token"]) -> Float[Tensor, "*token d_model"]:
        assert self.position_bias is not None
        # index_select adds gradients in the same order in every run.
        rows = self.position_bias.index_select(0, position.to(self.position_bias.device).reshape(-1))
        return rows.view(*position.shape, self.d_model)

    @torch.no_grad()
    def encoder_inputs(
        self, vectors: Float[Tensor, "token d_model"], position: Int[Tensor, " token"], order: Tensor | None
    ) -> Float[Tensor, "token d_model"]:
        """What the encoder multiplies: normalized vectors without the biases of their positions and of the decoder.

        Args:
            order: [token] indices of the tokens of the result; None for all in their order.
        """
        center, scale = self.center, self.scale
        if self.position_bias is not None:
            vectors = self.without_position_bias(self.normalize(vectors), position)
            center, scale = torch.zeros_like(center), torch.ones_like(scale)
        return operations.centered(vectors, order, center, scale, self.decoder_bias.detach())

    @_in_float32
    def encode(
        self,
        vectors: Float[Tensor, "*token d_model"],
        position: Int[Tensor, "*token"],
        *,
        use_mask: bool = True,
    ) -> Float[Tensor, "*token latent"]:
        """The codes by their definition: dense and differentiable.

        Args:
            vectors: in the model's units.
            position: position of each token, counted from the mask's `position_origin`; 0 is BOS.
            use_mask: False treats every latent as open everywhere.

        Raises:
            BadSetting: a position is outside the context.
        """
        position = self._checked(position)
        x = self.normalize(vectors)
        routing = self.mask.route(x, position)
        x = self.without_position_bias(x, position) - self.decoder_bias
        preactivation = x @ self.encoder.T + self.encoder_bias
        openness = self.mask.table()[routing.mask_row] if self.mask.gates_code() and use_mask else None
        codes = self.rule.codes(preactivation, openness, lambda parameter: parameter)
        return codes if routing.strength is None else codes * routing.strength[..., None]

    @_in_float32
    def decode(
        self, codes: Float[Tensor, "*token latent"], position: Int[Tensor, "*token"] | None = None
    ) -> Float[Tensor, "*token d_model"]:
        """The reconstructions of codes, in the model's units.

        Args:
            position: as in `encode`; only an SAE with a bias per position needs it.

        Raises:
            BadSetting: the SAE needs positions, or one is outside the context.
        """
        return self._with_position_bias(codes @ self.decoder + self.decoder_bias, position) * self.scale + self.center

    def _with_position_bias(self, x_hat: Tensor, position: Tensor | None) -> Tensor:
        if self.position_bias is None:
            return x_hat
        if position is None:
            raise BadSetting("this SAE has a bias per position, and codes do not contain positions: pass the positions")
        return x_hat + self._bias_at(self._checked(position))

    def forward(
        self, vectors: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]
    ) -> Float[Tensor, "*token d_model"]:
        """The reconstructions of vectors, in the model's units."""
        return self.decode(self.encode(vectors, position), position)

    @_in_float32
    @torch.no_grad()
    def sparse_encode(
        self,
        vectors: Float[Tensor, "token d_model"],
        position: Int[Tensor, " token"],
        *,
        use_mask: bool = True,
        precision: runtime.Precision = "float32",
    ) -> Codes:
        """The codes of `encode`, computed without closed latents and without zeros.

        They are computed on the SAE's device and returned on the device of the vectors.

        Args:
            vectors: in the model's units.
            position: position of each token, counted from the mask's `position_origin`; 0 is BOS.
            use_mask: False treats every latent as open everywhere.
            precision: of the product that chooses the latents; values are always computed in full precision.

        Raises:
            BadSetting: a position is outside the context.
        """
        device, vectors = vectors.device, vectors.to(self.encoder.device)
        position = self._checked(position).to(vectors.device)
        routing = self.mask.route(self.normalize(vectors) if self.mask.reads_vectors else vectors, position)
        table = self.mask.table().detach()
        groups = self.mask.groups() if use_mask else [_everything(table)]
        gates = self.mask.gates_code() and use_mask
        softens = gates and not self.mask.is_strict()
        order, ends = in_group_order(groups, routing.mask_row)
        x = self.encoder_inputs(vectors, position, order)
        inputs = GroupedInputs(x, routing.mask_row if order is None else routing.mask_row[order], ends)
        choice = self.rule.choice()
        if choice is None:
            token, latent, value = self._encode_blocks(inputs, groups, table if gates else None)
        else:
            encoder = GatedEncoder(self.encoder.detach(), self.encoder_bias.detach(), groups, table)
            chosen = choose(inputs, encoder, choice, precision=precision)
            token, latent, value = chosen.token, chosen.latent, chosen.preactivation
            if softens:
                value = value * table[inputs.mask_row[token], latent]
        if order is not None:
            token = order[token]
            entry = operations.Grouped(token, len(vectors)).order
            token, latent, value = token[entry], latent[entry], value[entry]
        if routing.strength is not None:
            value = value * routing.strength[token]
        return Codes(token, latent, value, len(vectors), self.d_sae).to(device)

    def _encode_blocks(
        self, inputs: GroupedInputs, groups: list[LiveGroup], table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, value) of the active codes, for rules that need all pre-activations of the live latents."""
        x, mask_row = inputs.x, inputs.mask_row
        entries = [(mask_row[:0], mask_row[:0], x.new_zeros(0))]
        for rows, group in pieces(groups, inputs.ends):
            latents = group.latents
            with runtime.fast_float32(x.device):
                preactivation = x[rows] @ self.encoder[latents].T + self.encoder_bias[latents]
            openness = table[:, latents][mask_row[rows]] if table is not None and group.gated else None
            codes = self.rule.codes(preactivation, openness, lambda parameter, latents=latents: parameter[latents])
            row, column = codes.nonzero(as_tuple=True)
            live = torch.arange(self.d_sae, device=x.device)[latents]
            entries.append((row + rows.start, live[column], codes[row, column]))
        token, latent, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
        return token, latent, value

    def encode_batch(self, batch: PositionedVectors, *, use_mask: bool = True) -> Codes:
        """`sparse_encode` of a batch, with positions counted from the mask's origin.

        Raises:
            BadSetting: a position is outside the context.
        """
        position = batch.positions(self.mask.settings.position_origin)
        return self.sparse_encode(batch.vectors, position, use_mask=use_mask)

    @_in_float32
    @torch.no_grad()
    def sparse_decode(
        self, codes: Codes, position: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "token d_model"]:
        """`decode` of sparse codes, on the device of the codes."""
        x_hat = self._with_position_bias(self._sums(codes) + self.decoder_bias, position)
        return (x_hat * self.scale + self.center).to(codes.value.device)

    def decode_batch(self, codes: Codes, batch: PositionedVectors) -> Float[Tensor, "token d_model"]:
        """`sparse_decode` of the codes of a batch, such as those of `encode_batch`."""
        return self.sparse_decode(codes, batch.positions(self.mask.settings.position_origin))

    @_in_float32
    @torch.no_grad()
    def share_of(self, codes: Codes) -> Float[Tensor, "token d_model"]:
        """The contribution of these codes to the reconstruction, without the biases, in the model's units."""
        return (self._sums(codes) * self.scale).to(codes.value.device)

    def _sums(self, codes: Codes) -> Float[Tensor, "token d_model"]:
        codes = codes.to(self.decoder.device)
        return operations.Grouped(codes.token, codes.n_tokens).sum_rows(
            codes.value, self.decoder.detach(), codes.latent
        )

    def _checked(self, position: Int[Tensor, "*token"]) -> Int[Tensor, "*token"]:
        longest = self.mask.n_positions - 1
        if position.numel() and (int(position.min()) < 0 or int(position.max()) > longest):
            raise BadSetting(
                f"positions {int(position.min())} to {int(position.max())} are not all within the "
                f"{self.mask.n_positions} positions of this SAE's mask: cut the texts to that length"
            )
        return position.long()


def _everything(table: Tensor) -> LiveGroup:
    return LiveGroup(torch.arange(len(table), device=table.device), slice(0, table.shape[1]), gated=False)


def check_sizes(**sizes: Any) -> None:
    """Check that sizes are positive integers.

    Raises:
        ValueError: a size is not a positive integer.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} = {size!r} is not a positive whole number")


def check_table(d_model: int, d_sae: int, n_positions: int) -> None:
    """Check that a mask's table has a plausible size for the weights, before it is allocated.

    A description's `n_positions` is not always confirmed by a tensor.

    Raises:
        ValueError: the table would be too large.
    """
    limit = max(_ALWAYS_ALLOWED, _MASK_PER_WEIGHT * d_model * d_sae)
    if n_positions * d_sae > limit:
        raise ValueError(
            f"a mask of {n_positions} positions and {d_sae} latents would have more than {limit:,} entries, the most "
            f"for vectors of {d_model} numbers"
        )


_ALWAYS_ALLOWED = 2**26  # entries of a mask: 256 MiB
_MASK_PER_WEIGHT = 64  # entries of a mask for each weight of the encoder
