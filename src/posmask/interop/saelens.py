"""Our SAEs as SAELens's: importing this module registers the architecture `posmask` with SAELens.

    import posmask.interop.saelens
    from sae_lens import SAE

    sae = SAE.load_from_disk("folder that `posmask export CELL --to saelens` wrote")

Positions come from the shape: input of shape [batch, position, d_in] starts at position 0. Where the shape does not
give them, `encode` raises `BadSetting` unless they are passed: `sae.encode(x, positions=p)`, or `with sae.at(p):`
around a tool's call. This holds for input [vector, d_in], for a single vector per text ([batch, 1, d_in], as
generation with a KV cache gives), and for masks that count positions from elsewhere than the context's start. The mask
is lifted on request only: `sae.encode(x, use_mask=False)` or `with sae.without_mask():`. Positions beyond the mask's
context count as its last one, with a warning. Special tokens are no exception: at position 0 (BOS) an SAE codes what it
was never trained on.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posmask.errors import BadSetting, MissingExtra
from posmask.interop.saelens_files import ARCHITECTURE, Form, saelens_form
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import make_rule, rule_settings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SAELens's and TransformerLens's, of one another
        from sae_lens import SAE, SAEConfig, register_sae_class
        from sae_lens.registry import SAE_CLASS_REGISTRY
except ImportError as error:
    raise MissingExtra(f"posmask.interop.saelens needs SAELens ({error}): pip install 'posmask[saelens]'") from None

__all__ = ["PosmaskSAE", "PosmaskSAEConfig", "as_saelens"]

_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


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
        self._context: tuple[Tensor | int | None, bool] = None, True  # positions, and whether the mask is used
        self._warned: set[str] = set()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Give whole numbers back their type: the loader makes all tensors floats."""
        for name, tensor in self.state_dict().items():
            if name in state_dict and not tensor.is_floating_point():
                state_dict[name] = state_dict[name].to(tensor.dtype)

    def at(self, positions: Tensor | int) -> AbstractContextManager["PosmaskSAE"]:
        """A context in which vectors without positions are at these, for calls by tools that pass none.

        Args:
            positions: whole numbers that broadcast to the vectors' shape without its last axis; 0 = BOS.
        """
        return self._within(positions, use_mask=True)

    def without_mask(self) -> AbstractContextManager["PosmaskSAE"]:
        """A context in which the mask is lifted, i.e. every latent is open everywhere, for calls by tools."""
        return self._within(None, use_mask=False)

    @contextmanager
    def _within(self, positions: Tensor | int | None, *, use_mask: bool) -> Iterator["PosmaskSAE"]:
        before, self._context = self._context, (positions, use_mask)
        try:
            yield self
        finally:
            self._context = before

    def encode(self, x: Tensor, positions: Tensor | int | None = None, *, use_mask: bool = True) -> Tensor:
        """The codes, [.., d_sae], of vectors [.., d_in].

        Args:
            positions: of the vectors, as `at` takes them; None: those of the context around the call, else from the
                shape.
            use_mask: False lifts the mask: every latent counts as open everywhere.

        Raises:
            BadSetting: positions that are unknown, negative, not whole or do not fit the vectors.
        """
        sae_in = self.process_sae_in(x)
        if positions is None:
            positions, within = self._context
            use_mask = use_mask and within
        if not use_mask or not self._needs_positions():
            place = torch.zeros(sae_in.shape[:-1], dtype=torch.long, device=sae_in.device)  # Any row gives the same.
        else:
            place = self._place(sae_in, positions)
        routing = self.mask.route(sae_in + self.b_dec, place)
        preactivation = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        openness = self.mask.table()[routing.mask_row] if self.mask.gates_code() and use_mask else None
        codes = self.rule.codes(preactivation, openness, lambda parameter: parameter)
        if routing.strength is not None:
            codes = codes * routing.strength[..., None]
        return self.hook_sae_acts_post(codes)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor, positions: Tensor | int | None = None, *, use_mask: bool = True) -> Tensor:
        """The reconstructions; arguments as `encode`."""
        if positions is None and use_mask:
            return super().forward(x)
        with self._within(positions, use_mask=use_mask):
            return super().forward(x)

    def _needs_positions(self) -> bool:
        """Whether codes depend on the position."""
        table = self.mask.table()
        return self.mask.gates_code() and not self.mask.reads_vectors and bool((table != table[:1]).any())

    def _place(self, x: Tensor, positions: Tensor | int | None) -> Tensor:
        """Each vector's row of the mask."""
        place = self._from_shape(x) if positions is None else _given(positions, x)
        if place.numel() and int(place.min()) < 0:
            raise BadSetting(f"position {int(place.min())} is negative: count from 0, which is BOS")
        last = self.mask.n_positions - 1
        if place.numel() and int(place.max()) > last:
            self._warn(
                "beyond", f"positions up to {int(place.max())} are beyond the mask's last, {last}, and count as it"
            )
        return place.clamp(max=last)

    def _from_shape(self, x: Tensor) -> Tensor:
        """Positions 0, 1, .. along the last axis but one.

        Raises:
            BadSetting: the shape does not give the positions.
        """
        position_origin = self.mask.settings.position_origin
        by_shape, first = ", or give vectors [batch, position, d_in] from position 0 on", ""
        if position_origin != "context":
            reason, by_shape = f"a position is counted from the {position_origin}, which no shape shows", ""
        elif x.dim() < 3:
            reason = f"vectors of shape {list(x.shape)} have no position axis"
        elif x.shape[-2] == 1:
            reason = f"the one vector per text in shape {list(x.shape)} may be at any position"
            first = " (positions=0 if it is the first)"
        else:
            return torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
        raise BadSetting(
            f"this SAE's mask needs positions, and {reason}: call sae.encode(x, positions=p){first}, use "
            f"`with sae.at(p):` around a tool's call{by_shape}; to lift the mask on purpose use "
            "`with sae.without_mask():`"
        )

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


def _given(positions: Tensor | int, x: Tensor) -> Tensor:
    """Positions that were passed, in the vectors' shape without its last axis."""
    given = torch.as_tensor(positions, device=x.device)
    if given.dtype not in _WHOLE:
        raise BadSetting(f"positions of type {given.dtype} are not whole numbers: count from 0, which is BOS")
    try:
        return given.long().expand(x.shape[:-1])
    except RuntimeError:
        raise BadSetting(
            f"positions of shape {list(given.shape)} do not fit vectors {list(x.shape)}: "
            f"give whole numbers that broadcast to {list(x.shape[:-1])}"
        ) from None


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
