"""The sparse autoencoder: what a code is, by definition, and the sparse codes that everything else works with.

For a token at position p with vector v:

    x     = (v - center) / scale                                 (constants of the training data, stored here)
    pre   = (x - decoder_bias) . encoder[j] + encoder_bias[j]    for each latent j
    code  = rule(M[p] * relu(pre))                               (M: the position mask's openness; see rules.py)
    x_hat = sum_j code[j] * decoder[j] + decoder_bias            and  v_hat = x_hat * scale + center
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posmask import kernels
from posmask.choosing import choose, in_group_order, pieces
from posmask.errors import BadSetting, DamagedFolder
from posmask.folders import MANIFEST, check_file, read_manifest
from posmask.mask_kinds import make_mask, mask_settings
from posmask.masks import Copies, LiveGroup, PositionMask
from posmask.rules import RuleSettings, make_rule, rule_settings
from posmask.seeds import generator

__all__ = [
    "Codes",
    "SparseAutoencoder",
    "check_sizes",
    "check_table",
    "copy_latents_",
    "flaw_of",
    "read_origin",
    "read_sae",
    "restate_",
    "started_from",
    "without_mask",
    "write_sae",
]

WEIGHTS_FILE = "sae.safetensors"
SETTINGS_FILE = "sae.json"
OPENNESS_FILE = "openness.safetensors"


@dataclass(frozen=True)
class Codes:
    """The active codes of some tokens: pairs of token and latent, those of a token together, tokens in order.

    All values are above 0, and no pair stands twice.
    """

    token: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    n_tokens: int
    d_sae: int

    def some(self, which: Bool[Tensor, " token"] | Int[Tensor, " some"]) -> "Codes":
        """The codes of some of the tokens, chosen by truth or by number (none twice), as `Batch.some` takes them."""
        numbers = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        new = torch.full((self.n_tokens,), -1, device=self.token.device)
        new[numbers] = torch.arange(len(numbers), device=new.device)
        token = new[self.token]
        entry = (token >= 0).nonzero()[:, 0]
        entry = entry[torch.sort(token[entry], stable=True).indices]
        return Codes(token[entry], self.latent[entry], self.value[entry], len(numbers), self.d_sae)

    def to(self, device: torch.device) -> "Codes":
        """The same on a device."""
        token, latent, value = (part.to(device) for part in (self.token, self.latent, self.value))
        return Codes(token, latent, value, self.n_tokens, self.d_sae)

    def n_active(self) -> Float[Tensor, " token"]:
        """How many latents are active on each token."""
        return torch.bincount(self.token, minlength=self.n_tokens).float()

    def dense(self) -> Float[Tensor, "token latent"]:
        out = self.value.new_zeros(self.n_tokens, self.d_sae)
        out[self.token, self.latent] = self.value
        return out


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

    def __init__(self, d_model: int, rule: RuleSettings, mask: PositionMask, seed: int = 0) -> None:
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
        self.register_buffer("center", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    def latent_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold a row or a number for each latent."""
        return [self.encoder, self.encoder_bias, self.decoder, *self.rule.parameters()]

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
        beyond: Literal["refuse", "clamp"] = "refuse",
    ) -> Float[Tensor, "*token latent"]:
        """The codes, by definition: dense and differentiable.

        Args:
            vectors: in the model's units.
            position: of each token, counted as the mask's `coordinate` says; 0 = BOS.
            lift: lift the mask, i.e. take every latent as open everywhere.
            beyond: what to do with positions outside the context that the mask was made for: `clamp` takes the last.

        Raises:
            BadSetting: a position outside the context.
        """
        position = self._checked(position, beyond)
        x = self.normalise(vectors)
        routing = self.mask.route(x, position)
        preactivation = (x - self.decoder_bias) @ self.encoder.T + self.encoder_bias
        openness = self.mask.table()[routing.place] if self.mask.gates_code() and not lift else None
        codes = self.rule.codes(preactivation, openness, lambda parameter: parameter)
        return codes if routing.strength is None else codes * routing.strength[..., None]

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
        beyond: Literal["refuse", "clamp"] = "refuse",
        precision: kernels.Precision = "float32",
    ) -> Codes:
        """The same codes as `encode`, found without computing what is closed or zero.

        Computed on the SAE's device; the codes are where the vectors are.

        Args:
            precision: of the product that chooses the latents; the values are always computed in full.
        """
        whence, vectors = vectors.device, vectors.to(self.encoder.device)
        position = self._checked(position, beyond).to(vectors.device)
        routing = self.mask.route(self.normalise(vectors) if self.mask.reads_vectors else vectors, position)
        table = self.mask.table().detach()
        groups = [_everything(table)] if lift else self.mask.groups()
        gates = self.mask.gates_code() and not lift
        softens = gates and not self.mask.is_strict()
        order, ends = in_group_order(groups, routing.place)
        inputs = kernels.centred(vectors, order, self.center, self.scale, self.decoder_bias.detach())
        place, choice = routing.place if order is None else routing.place[order], self.rule.choice()
        if choice is None:
            token, latent, value = self._encode_blocks(inputs, place, ends, groups, table if gates else None)
        else:
            encoder, bias = self.encoder.detach(), self.encoder_bias.detach()
            found = choose(inputs, place, ends, encoder, bias, groups, table, choice, precision=precision)
            token, latent, value = found.token, found.latent, found.preactivation
            if softens:
                value = value * table[place[token], latent]
        if order is not None:
            token = order[token]
            entry = kernels.Grouped(token, len(vectors)).order
            token, latent, value = token[entry], latent[entry], value[entry]
        if routing.strength is not None:
            value = value * routing.strength[token]
        return Codes(token, latent, value, len(vectors), self.d_sae).to(whence)

    def _encode_blocks(
        self, inputs: Tensor, place: Tensor, ends: list[int], groups: list[LiveGroup], table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, value) of the active codes, for rules that see all pre-activations of the live latents."""
        found = [(place[:0], place[:0], inputs.new_zeros(0))]
        for rows, group in pieces(groups, ends):
            latents = group.latents
            with kernels.fast_float32():
                preactivation = inputs[rows] @ self.encoder[latents].T + self.encoder_bias[latents]
            openness = table[:, latents][place[rows]] if table is not None and group.gated else None
            codes = self.rule.codes(preactivation, openness, lambda parameter, latents=latents: parameter[latents])
            row, column = codes.nonzero(as_tuple=True)
            numbers = torch.arange(self.d_sae, device=inputs.device)[latents]
            found.append((row + rows.start, numbers[column], codes[row, column]))
        token, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
        return token, latent, value

    @torch.no_grad()
    def sparse_decode(self, codes: Codes) -> Float[Tensor, "token d_model"]:
        """What `decode` gives for them, where the codes are."""
        x_hat = self._sums(codes) + self.decoder_bias
        return (x_hat * self.scale + self.center).to(codes.value.device)

    @torch.no_grad()
    def share_of(self, codes: Codes) -> Float[Tensor, "token d_model"]:
        """What these codes alone put into the vectors, without the bias, in the model's units."""
        return (self._sums(codes) * self.scale).to(codes.value.device)

    def _sums(self, codes: Codes) -> Float[Tensor, "token d_model"]:
        codes = codes.to(self.decoder.device)
        return kernels.Grouped(codes.token, codes.n_tokens).sum_rows(codes.value, self.decoder.detach(), codes.latent)

    def _checked(self, position: Int[Tensor, "*token"], beyond: str) -> Int[Tensor, "*token"]:
        longest = self.mask.n_positions - 1
        if beyond == "clamp":
            position = position.clamp(max=longest)
        if position.numel() and (int(position.min()) < 0 or int(position.max()) > longest):
            raise BadSetting(
                f"positions {int(position.min())} to {int(position.max())} are not all within the "
                f"{self.mask.n_positions} positions that this SAE's mask was made for: cut the texts to that length, "
                'or take the last position for those beyond with beyond = "clamp"'
            )
        return position.long()


def _everything(table: Tensor) -> LiveGroup:
    return LiveGroup(torch.arange(len(table), device=table.device), slice(0, table.shape[1]), gated=False)


def copy_latents_(sae: SparseAutoencoder, copies: Copies) -> None:
    """Make some latents copies of others, with whatever the rule holds for them."""
    with torch.no_grad():
        for tensor in (*sae.latent_parameters(), *sae.rule.buffers()):
            if tensor.dim():  # A rule may keep a number for all latents together.
                tensor[copies.target] = tensor[copies.source]


def without_mask(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy of an SAE, every latent open everywhere."""
    settings = mask_settings({"kind": "open", "coordinate": sae.mask.settings.coordinate})
    mask = make_mask(settings, sae.mask.n_positions, sae.d_sae)
    copy = SparseAutoencoder(sae.d_model, sae.rule.settings, mask)
    own = copy.state_dict()
    copy.load_state_dict({**own, **{name: value for name, value in sae.state_dict().items() if "mask." not in name}})
    return copy


def restate_(sae: SparseAutoencoder, center: Float[Tensor, " d_model"], scale: Float[Tensor, ""]) -> None:
    """Give an SAE without a router other constants, and parameters with which it does what it did.

    Codes become sae.scale / scale times as large. So an SAE from elsewhere is trained on in the units of this data.
    """
    factor = sae.scale / scale
    with torch.no_grad():
        sae.decoder_bias.copy_((sae.decoder_bias * sae.scale + sae.center - center) / scale)
        sae.encoder_bias.mul_(factor)
        sae.rule.rescale_(factor.expand(sae.d_sae))
    sae.center, sae.scale = center.clone(), scale.clone()


def started_from(
    source: SparseAutoencoder, mask: PositionMask, seed: int = 0, rule: RuleSettings | None = None
) -> SparseAutoencoder:
    """An SAE with this mask whose latents are copies of an unmasked SAE's.

    Where the mask has as many latents as the source, each is a copy of its own. Otherwise the free latents copy the
    first ones and each block of the mask the rest, so that at every position exactly one copy of each latent is live
    and the new SAE does what the source did (*upcycling*); splitting starts with one copy of each, the rest unborn.

    Args:
        rule: settings to train on with, that decide codes as the source's do; None: the source's.

    Raises:
        BadSetting: the source has a mask, or the mask has no such blocks for its latents.
    """
    n_free, n_latents = mask.n_free, source.d_sae
    if source.mask.settings.kind != "open":
        raise BadSetting(
            f"the SAE to start from has a {source.mask.settings.kind!r} mask: start from one that is open everywhere"
        )
    if source.mask.n_positions != mask.n_positions:
        raise BadSetting(
            f"the SAE to start from was trained on contexts of {source.mask.n_positions} positions, not "
            f"{mask.n_positions}: harvest at that length, or start from another"
        )
    if mask.settings.kind == "switch":
        raise BadSetting(
            "a switch multiplies codes by its router's p, so it cannot do what an SAE did: leave out start"
        )
    latent = torch.arange(mask.d_sae)
    live = mask.live() > 0
    unborn = ~live.any(0)
    known, of_known = mask.copied_from.unique(return_inverse=True)
    if mask.d_sae == n_latents and not bool(unborn.any()):
        copied = latent
    elif len(known) == n_latents:
        copied = of_known
    else:
        per_block = max(1, n_latents - n_free)
        copied = torch.where(latent < n_free, latent, n_free + (latent - n_free) % per_block)
        once = all(torch.equal(copied[row].sort().values, torch.arange(n_latents)) for row in live)
        if n_free > n_latents or not once:
            raise BadSetting(
                f"a {mask.settings.kind!r} mask of {mask.d_sae} latents does not open one copy of each of the "
                f"{n_latents} latents to start from at every position: use slice, band, windows, split or cohort with "
                'budget = "compute", or as many latents as the source has'
            )
    sae = SparseAutoencoder(source.d_model, rule or source.rule.settings, mask, seed).to(source.encoder.dtype)
    mask.copied_from[~unborn] = copied[~unborn]
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name.startswith("mask."):
                continue
            given = source.state_dict()[name]
            if name == "rule.level":  # The mask decides.
                continue
            if name in ("encoder", "encoder_bias", "decoder") or (name.startswith("rule.") and given.dim()):
                tensor[~unborn] = given[copied[~unborn]]
            else:
                tensor.copy_(given)
    return sae


def write_sae(sae: SparseAutoencoder, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write weights, mask tensors and constants as safetensors, and what they mean as JSON beside them.

    Args:
        origin: what the SAE was trained on: name (`model`), `weights`, `layer` and `site` of the model,
            `training_tokens`.

    Raises:
        BadSetting: the folder is a finished one, or holds files of these names that are not an SAE of posmask's.
    """
    if (folder / MANIFEST).exists():
        raise BadSetting(f"{folder} is finished, its {MANIFEST} says what it holds: choose another folder")
    marks = {WEIGHTS_FILE: b'"encoder":', OPENNESS_FILE: b'"openness":', SETTINGS_FILE: b'"d_sae":'}
    for name, mark in marks.items():
        check_file(folder / name, mark)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, folder / WEIGHTS_FILE)
    # What the mask ended as, whatever its kind keeps: for those who only want to look.
    save_file({"openness": sae.mask.openness().detach().contiguous()}, folder / OPENNESS_FILE)
    description = {
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "n_positions": sae.mask.n_positions,
        "rule": sae.rule.settings.model_dump(),
        "mask": sae.mask.settings.model_dump(),
        "origin": dict(origin or {}),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(description, indent=1), encoding="utf8")


def read_sae(folder: Path, *, verify: bool = False) -> SparseAutoencoder:
    """The SAE that `write_sae` wrote, with the same codes to the last bit.

    Args:
        verify: also compare the folder's files with its manifest, if it has one: an SAE that a user brings may not.

    Raises:
        DamagedFolder: a file is missing, or its tensors are not those that its description asks for, are not finite or
            make no sense.
    """
    if verify and (folder / MANIFEST).exists():
        read_manifest(folder, verify=True)
    try:
        description = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        _check_sizes(description, tensors)
        mask = make_mask(mask_settings(description["mask"]), description["n_positions"], description["d_sae"])
        sae = SparseAutoencoder(description["d_model"], rule_settings(description["rule"]), mask)
        sae.load_state_dict(tensors)
        if (flaw := flaw_of(sae)) is not None:
            raise ValueError(flaw)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DamagedFolder(f"{folder} holds no readable SAE ({error}): train it again") from error
    return sae


def _check_sizes(description: Any, tensors: Mapping[str, Tensor]) -> None:
    """That a description asks for no larger an SAE than its tensors make, before any is made.

    Raises:
        ValueError: it does.
    """
    said = {name: description[name] for name in ("d_sae", "d_model", "n_positions")}
    check_sizes(**said)
    found: dict[str, int] = dict(zip(("d_sae", "d_model"), tensors["encoder"].shape, strict=True))
    tables = [tensors[name] for name in ("mask.fixed_openness", "mask.theta") if name in tensors]
    found["n_positions"] = len(tables[0])
    if description["mask"]["kind"] == "switch":  # Its table has a row for each expert.
        found["n_positions"] = said["n_positions"]
    if said != found:
        raise ValueError(f"its description asks for {said}, its tensors are of {found}")
    check_table(said["d_model"], said["d_sae"], said["n_positions"])


def check_sizes(**sizes: Any) -> None:
    """
    Raises:
        ValueError: a size is not a positive whole number.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} = {size!r} is not a positive whole number")


def check_table(d_model: int, d_sae: int, n_positions: int) -> None:
    """
    Raises:
        ValueError: the mask, whose length no tensor may confirm, would be out of proportion to the weights.
    """
    limit = max(_ALWAYS_ALLOWED, _MASK_PER_WEIGHT * d_model * d_sae)
    if n_positions * d_sae > limit:
        raise ValueError(
            f"a mask of {n_positions} positions and {d_sae} latents would have more than {limit:,} entries, the most "
            f"for vectors of {d_model} numbers"
        )


_ALWAYS_ALLOWED = 2**26  # entries of a mask: 256 MiB
_MASK_PER_WEIGHT = 64  # entries of a mask for each weight of the encoder


def flaw_of(sae: SparseAutoencoder) -> str | None:
    """What makes an SAE's numbers useless; None: nothing does."""
    for name, tensor in sae.state_dict().items():
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinite numbers"
    if not float(sae.scale) > 0:
        return f"scale = {float(sae.scale):g} is not above 0"
    table = sae.mask.table().detach()
    if not bool(((table >= 0) & (table <= 1)).all()):
        return "openness is not within 0 and 1"
    return None


def read_origin(folder: Path) -> dict[str, Any]:
    """What `write_sae` was told of the SAE's training; empty where it was told nothing.

    Raises:
        DamagedFolder: there is no readable description.
    """
    try:
        return dict(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf8"))["origin"])
    except (OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFolder(f"{folder / SETTINGS_FILE} cannot be read ({error}): give the folder of an SAE") from error
