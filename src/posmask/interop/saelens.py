"""Our SAEs as SAELens's: importing this module registers the architecture `posmask` with SAELens.

    import posmask.interop.saelens
    from sae_lens import SAE

    sae = SAE.load_from_disk("folder that `posmask export CELL --to saelens` wrote")

Which position a vector stands at is read off its shape, [.., position, d_in], as SAELens passes them. Where it cannot
be, in [vector, d_in], or where the mask counts positions from elsewhere than the context's start, the mask is lifted
with a warning, unless positions are given: `sae.encode(x, positions=p)`, or `with sae.at(p):` around a tool's call.
Positions beyond the mask's context count as its last one. Special tokens are no exception: at position 0 (BOS) an SAE
codes what it was never trained on.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posmask.errors import BadSetting, MissingExtra
from posmask.interop.saelens_files import ARCHITECTURE, Form, saelens_form
from posmask.mask_kinds import make_mask, mask_settings
from posmask.rules import make_rule, rule_settings
from posmask.sae import SparseAutoencoder

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SAELens's and TransformerLens's, of one another
        from sae_lens import SAE, SAEConfig, register_sae_class
        from sae_lens.registry import SAE_CLASS_REGISTRY
except ImportError as error:
    raise MissingExtra(f"posmask.interop.saelens needs SAELens ({error}): pip install 'posmask[saelens]'") from None

__all__ = ["PosmaskSAE", "PosmaskSAEConfig", "as_saelens"]


@dataclass
class PosmaskSAEConfig(SAEConfig):
    """SAELens's settings, and ours: what a posmask SAE's rule and mask are made from."""

    n_positions: int = 0
    rule: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations != "none" or self.reshape_activations != "none":
            raise BadSetting(
                f"normalize_activations = {self.normalize_activations!r} and reshape_activations = "
                f"{self.reshape_activations!r} are not for architecture posmask: set both to 'none'"
            )


class PosmaskSAE(SAE[PosmaskSAEConfig]):
    """A posmask SAE with SAELens's parameters, [d_in, d_sae] and [d_sae, d_in], in the model's own units.

    Codes and reconstructions equal those of the `SparseAutoencoder` it was made from, to rounding.
    """

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        # These two look at what they draw, which the loader's meta device does not hold.
        self.rule = make_rule(rule_settings(cfg.rule), cfg.d_sae).to(dtype=self.dtype)
        self.mask = make_mask(mask_settings(cfg.mask), cfg.n_positions, cfg.d_sae)
        self.mask.meet(cfg.d_in, 0)
        self.mask.to(dtype=self.dtype)
        if self.device.type != "meta":
            self.rule.to(self.device)
            self.mask.to(self.device)
        self._positions: Tensor | int | None = None
        self._warned: set[str] = set()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Give whole numbers back their type: the loader makes all tensors floats."""
        for name, tensor in self.state_dict().items():
            if name in state_dict and not tensor.is_floating_point():
                state_dict[name] = state_dict[name].to(tensor.dtype)

    @contextmanager
    def at(self, positions: Tensor | int) -> Iterator["PosmaskSAE"]:
        """Vectors that come without positions stand at these, for calls by tools that pass none.

        Args:
            positions: whole numbers that broadcast to the vectors' shape without its last axis; 0 = BOS.
        """
        before, self._positions = self._positions, positions
        try:
            yield self
        finally:
            self._positions = before

    def encode(self, x: Tensor, positions: Tensor | int | None = None) -> Tensor:
        """The codes, [.., d_sae], of vectors [.., d_in].

        Args:
            positions: of the vectors, as `at` takes them; None: see above.

        Raises:
            BadSetting: positions that are negative or do not fit the vectors.
        """
        sae_in = self.process_sae_in(x)
        place = self._place(sae_in, self._positions if positions is None else positions)
        anywhere = torch.zeros(sae_in.shape[:-1], dtype=torch.long, device=sae_in.device)
        routing = self.mask.route(sae_in + self.b_dec, anywhere if place is None else place)
        preactivation = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        lifted = place is None and not self.mask.reads_vectors
        openness = self.mask.table()[routing.place] if self.mask.gates_code() and not lifted else None
        codes = self.rule.codes(preactivation, openness, lambda parameter: parameter)
        if routing.strength is not None:
            codes = codes * routing.strength[..., None]
        return self.hook_sae_acts_post(codes)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor, positions: Tensor | int | None = None) -> Tensor:
        """The reconstructions; arguments as `encode`."""
        if positions is None:
            return super().forward(x)
        with self.at(positions):
            return super().forward(x)

    def _place(self, x: Tensor, positions: Tensor | int | None) -> Tensor | None:
        """Each vector's row of the mask; None where its position is unknown."""
        mask, shape = self.mask, x.shape[:-1]
        if mask.reads_vectors or not mask.gates_code() or bool((mask.table() == 1).all()):
            return None  # No position would matter.
        if positions is not None:
            try:
                place = torch.as_tensor(positions, device=x.device).long().expand(shape)
            except RuntimeError:
                raise BadSetting(
                    f"positions of shape {list(torch.as_tensor(positions).shape)} do not fit vectors {list(x.shape)}: "
                    f"give whole numbers that broadcast to {list(shape)}"
                ) from None
        elif x.dim() >= 3 and mask.settings.coordinate == "context":
            place = torch.arange(shape[-1], device=x.device).expand(shape)
        else:
            why = (
                f"vectors of shape {list(x.shape)} do not say"
                if x.dim() < 3
                else f"the {mask.settings.coordinate}, from which this mask counts, does not say"
            )
            self._warn(
                "unknown",
                f"at which positions the vectors stand, {why}, so the mask is lifted: pass positions=, or call within "
                "sae.at(positions)",
            )
            return None
        if place.numel() and int(place.min()) < 0:
            raise BadSetting(f"position {int(place.min())} is negative: count from 0, which is BOS")
        last = mask.n_positions - 1
        if place.numel() and int(place.max()) > last:
            self._warn(
                "beyond", f"positions up to {int(place.max())} are beyond the mask's last, {last}, and count as it"
            )
        return place.clamp(max=last)

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, UserWarning, stacklevel=4)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Make decoder rows of norm 1 and codes so much larger that reconstructions stay.

        Raises:
            NotImplementedError: rows differ in norm, and the rule compares latents: it would choose others.
        """
        norms = self.get_W_dec_norm()
        if self.rule.compares_latents:
            mean = norms.float().mean()
            if bool(((norms / mean - 1).abs() > 0.01).any()):
                raise NotImplementedError(
                    f"decoder rows of unlike norms cannot be folded under {self.cfg.rule['kind']}"
                )
            norms = mean.to(norms.dtype).expand_as(norms)
        self.W_dec.data.div_(norms[:, None])
        self.W_enc.data.mul_(norms)
        self.b_enc.data.mul_(norms)
        self.rule.rescale_(norms)


def as_saelens(
    sae: SparseAutoencoder, origin: dict[str, Any] | None = None, model_name: str | None = None
) -> PosmaskSAE:
    """SAELens's object of an SAE, as `SAE.load_from_disk` gives it, without a folder; arguments as `saelens_form`."""
    form: Form = saelens_form(sae, origin, model_name)
    theirs = PosmaskSAE(PosmaskSAEConfig.from_dict(form[0]))
    theirs.load_state_dict(form[1])
    return theirs


if ARCHITECTURE not in SAE_CLASS_REGISTRY:  # The module may be loaded anew.
    register_sae_class(ARCHITECTURE, PosmaskSAE, PosmaskSAEConfig)
