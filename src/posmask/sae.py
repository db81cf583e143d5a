"""The sparse autoencoder: what a code is, by definition, and the sparse codes that everything else works with.

For a token at position p with vector v:

    x     = (v - center) / scale                                 (constants of the training data, stored here)
    pre   = (x - decoder_bias) . encoder[j] + encoder_bias[j]    for each latent j
    code  = rule(M[p] * relu(pre))                               (M: the position mask's openness)
    x_hat = sum_j code[j] * decoder[j] + decoder_bias            and  v_hat = x_hat * scale + center

The gate acts before the rule selects, so a closed latent never takes one of the k places.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posmask import kernels
from posmask.errors import BadSetting, DamagedFolder
from posmask.masks import LiveGroup, PositionMask, make_mask, mask_settings
from posmask.seeds import generator

__all__ = ["RULES", "Codes", "SparseAutoencoder", "TopK", "read_sae", "rule_settings", "without_mask", "write_sae"]

WEIGHTS_FILE = "sae.safetensors"
SETTINGS_FILE = "sae.json"
OPENNESS_FILE = "openness.safetensors"


class TopK(BaseModel):
    """Keep the k largest gated pre-activations of each token (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: ClassVar[str] = "topk"

    kind: Literal["topk"] = "topk"
    k: int = Field(gt=0)
    """How many latents may be active on a token."""

    def __call__(self, gated: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        top = gated.topk(min(self.k, gated.shape[-1]), dim=-1)
        # Where fewer than k are positive the rest is chosen arbitrarily: it must send no gradient either.
        return torch.zeros_like(gated).scatter(-1, top.indices, top.values * (top.values > 0))


RULES: dict[str, type[TopK]] = {"topk": TopK}


def rule_settings(values: dict[str, Any]) -> TopK:
    """The activation rule that `values["kind"]` names, checked."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in RULES:
        raise BadSetting(f"activation rule {kind!r} is unknown: choose one of {', '.join(RULES)}")
    return RULES[kind](**values)


@dataclass(frozen=True)
class Codes:
    """The codes of some tokens, sparse: entries of value 0 say nothing, and no latent stands twice in a token."""

    latent: Int[Tensor, "token entry"]
    value: Float[Tensor, "token entry"]
    d_sae: int

    def some(self, which: Bool[Tensor, " token"] | Int[Tensor, " some"]) -> "Codes":
        """The codes of some of the tokens, chosen by truth or by number."""
        return Codes(self.latent[which], self.value[which], self.d_sae)

    def dense(self) -> Float[Tensor, "token latent"]:
        return self.value.new_zeros(len(self.value), self.d_sae).scatter_add_(1, self.latent, self.value)


class SparseAutoencoder(nn.Module):
    """A dictionary of latents with an activation rule and a position mask.

    `encoder` and `decoder` hold one row a latent, [latent d_model] both; decoder rows have unit norm.
    Vectors go in and come out in the model's own units; inside they are centred and scaled so that the mean of
    |x|^2 is d_model on the training data.

    Args:
        mask: its d_sae is the dictionary's width, its n_positions the longest position + 1 that can be encoded.
        seed: decides the initial weights.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, d_model: int, rule: TopK, mask: PositionMask, seed: int = 0) -> None:
        super().__init__()
        if rule.k > mask.d_sae:
            raise BadSetting(f"k = {rule.k} is more than the {mask.d_sae} latents there are: lower k or raise d_sae")
        self.rule = rule
        self.mask = mask
        rows = torch.randn(mask.d_sae, d_model, generator=generator(seed, "weights"))
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.encoder = nn.Parameter(rows.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(mask.d_sae))
        self.decoder = nn.Parameter(rows)
        self.decoder_bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("center", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    def normalise(self, vectors: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        return (vectors.to(self.encoder.dtype) - self.center) / self.scale

    def encode(
        self,
        vectors: Float[Tensor, "*token d_model"],
        position: Int[Tensor, "*token"],
        *,
        lift: bool = False,
    ) -> Float[Tensor, "*token latent"]:
        """The codes, by definition: dense and differentiable.

        Args:
            vectors: in the model's units.
            position: of each token in its context, counted from 0 = BOS.
            lift: lift the mask, i.e. take every latent as open everywhere.

        Raises:
            BadSetting: a position outside the context that the mask was made for.
        """
        self._check_positions(position)
        preactivation = (self.normalise(vectors) - self.decoder_bias) @ self.encoder.T + self.encoder_bias
        gated = preactivation.relu()
        if self.mask.gates_code() and not lift:
            gated = gated * self.mask.openness()[position.long()]
        return self.rule(gated)

    def decode(self, codes: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token d_model"]:
        """The vectors that codes stand for, in the model's units."""
        return (codes @ self.decoder + self.decoder_bias) * self.scale + self.center

    def forward(
        self, vectors: Float[Tensor, "*token d_model"], position: Int[Tensor, "*token"]
    ) -> Float[Tensor, "*token d_model"]:
        return self.decode(self.encode(vectors, position))

    @torch.no_grad()
    def sparse_encode(
        self,
        vectors: Float[Tensor, "token d_model"],
        position: Int[Tensor, " token"],
        *,
        lift: bool = False,
        precision: kernels.Precision = "float32",
    ) -> Codes:
        """The same codes as `encode`, found without computing what is closed or zero.

        Args:
            precision: of the product that chooses the k latents; the values are always computed in full.
        """
        self._check_positions(position)
        position = position.long()
        gates = self.mask.gates_code() and not lift
        openness = self.mask.openness().detach()
        everything = LiveGroup(torch.arange(self.mask.n_positions), slice(0, self.d_sae), gated=False)
        with kernels.fast_float32():
            selected = kernels.select_top_k(
                self.normalise(vectors) - self.decoder_bias,
                position,
                self.encoder.detach(),
                self.encoder_bias.detach(),
                [everything] if lift else self.mask.groups(),
                openness,
                self.rule.k,
                precision=precision,
            )
        value = selected.preactivation
        if gates:
            value = value * openness[position[:, None], selected.latent]
        return Codes(selected.latent, value, self.d_sae)

    @torch.no_grad()
    def sparse_decode(self, codes: Codes) -> Float[Tensor, "token d_model"]:
        x_hat = kernels.weighted_rows(codes.latent, codes.value, self.decoder) + self.decoder_bias
        return x_hat * self.scale + self.center

    def _check_positions(self, position: Int[Tensor, "*token"]) -> None:
        if position.numel() and (int(position.min()) < 0 or int(position.max()) >= self.mask.n_positions):
            raise BadSetting(
                f"positions {int(position.min())} to {int(position.max())} are not all within the "
                f"{self.mask.n_positions} positions that this SAE's mask was made for: cut the texts to that length"
            )


def without_mask(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy of an SAE, every latent open everywhere."""
    mask = make_mask(mask_settings({"kind": "open"}), sae.mask.n_positions, sae.d_sae)
    copy = SparseAutoencoder(sae.d_model, sae.rule, mask)
    own = copy.state_dict()
    copy.load_state_dict({**own, **{name: value for name, value in sae.state_dict().items() if "mask." not in name}})
    return copy


def write_sae(sae: SparseAutoencoder, folder: Path) -> None:
    """Write weights, mask tensors and constants as safetensors, and what they mean as JSON beside them."""
    save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, folder / WEIGHTS_FILE)
    # What the mask ended as, whatever its kind keeps: for those who only want to look.
    save_file({"openness": sae.mask.openness().detach().contiguous()}, folder / OPENNESS_FILE)
    description = {
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "n_positions": sae.mask.n_positions,
        "rule": sae.rule.model_dump(),
        "mask": sae.mask.settings.model_dump(),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(description, indent=1), encoding="utf8")


def read_sae(folder: Path) -> SparseAutoencoder:
    """The SAE that `write_sae` wrote, with the same codes to the last bit.

    Raises:
        DamagedFolder: a file is missing, or its tensors are not those that its description asks for.
    """
    try:
        description = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        mask = make_mask(mask_settings(description["mask"]), description["n_positions"], description["d_sae"])
        sae = SparseAutoencoder(description["d_model"], rule_settings(description["rule"]), mask)
        sae.load_state_dict(tensors)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise DamagedFolder(f"{folder} holds no readable SAE ({error}): train it again") from error
    return sae
