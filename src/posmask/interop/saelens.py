"""SAEs with position masks in SAELens: importing this module registers the architecture `posmask`.

    import posmask.interop.saelens
    from sae_lens import SAE

    sae = SAE.load_from_disk("exported")  # written by `posmask export CELL exported --to saelens`

Positions come from the shape: input of shape [batch, position, d_in] starts at position 0. If the shape does not
determine them, `encode` raises `BadSetting` unless they are passed: `sae.encode(x, positions=p)`, or `with sae.at(p):`
around a tool's call. This holds for input [vector, d_in], for a single vector per text ([batch, 1, d_in], as in
generation with a KV cache), and for masks that do not count positions from the start of the context. In generation and
for padded texts, `posmask.interop.positions.positions_of(model)` gives the positions. For tools that cannot pass any,
`cfg.unknown_position` is one position for all vectors of unknown position. The mask is lifted on request only:
`sae.encode(x, use_mask=False)` or `with sae.without_mask():`. Positions beyond the mask's context count as its last
one, with a warning. Special tokens are encoded as well, although an SAE was not trained at position 0 (BOS).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from posmask.errors import BadSetting, MissingExtra, first_line
from posmask.interop.positions import Positions, check_position
from posmask.interop.saelens_files import ARCHITECTURE, saelens_form
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import make_rule, rule_settings

try:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # SAELens and TransformerLens use deprecated parts of each other.
        from sae_lens import SAE, SAEConfig, register_sae_class
        from sae_lens.registry import SAE_CLASS_REGISTRY
        from sae_lens.saes.topk_sae import TopK
except Exception as error:  # A broken torchvision raises RuntimeError when transformers imports it.
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "sae_lens":
        raise MissingExtra(
            f"posmask.interop.saelens needs SAELens 6.45 or later ({first_line(error)}): pip install 'posmask[saelens]'"
        ) from None
    raise MissingExtra(
        "SAELens is installed, but a package that it imports is broken "
        f"({type(error).__name__}: {first_line(error)}): repair that package, which `python -c 'import sae_lens'` names"
    ) from error

__all__ = ["PosmaskSAE", "PosmaskSAEConfig", "as_saelens"]

GivenPositions = Tensor | int | Callable[[], Tensor]
"""Positions of vectors, or a function that returns the current ones, such as `positions_of` yields."""

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass
class PosmaskSAEConfig(SAEConfig):
    """Settings of SAELens, and those of a posmask SAE's rule and mask."""

    n_positions: int = 0
    """Tokens per context, including BOS."""
    rule: dict[str, Any] = field(default_factory=dict)
    """Settings of the rule, see `posmask.sae.rules`."""
    mask: dict[str, Any] = field(default_factory=dict)
    """Settings of the mask, see `posmask.masks`."""
    unknown_position: int | None = None
    """Position of all vectors whose position is unknown; None: they are an error."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name under which SAELens knows this class."""
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_position(self.unknown_position, self.n_positions)
        if self.normalize_activations != "none" or self.reshape_activations != "none":
            raise BadSetting(
                f"normalize_activations = {self.normalize_activations!r} and reshape_activations = "
                f"{self.reshape_activations!r} are not for architecture posmask: set both to 'none'"
            )


class PosmaskSAE(SAE[PosmaskSAEConfig]):
    """SAE with a position mask and SAELens's parameters W_enc [d_in, d_sae] and W_dec [d_sae, d_in].

    Inputs are in the model's units, and so are codes, because rows of W_dec have norm 1. Up to rounding, codes are
    `cfg.metadata.posmask_scale` times those of the original `SparseAutoencoder`, and reconstructions are equal.
    """

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Create the parameters, the rule and the mask."""
        super().initialize_weights()
        cfg = self.cfg
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        # On the CPU, because they inspect their values, which tensors on the loader's meta device do not have.
        self.rule = make_rule(rule_settings(cfg.rule), cfg.d_sae).to(dtype=self.dtype)
        self.mask = make_mask(mask_settings(cfg.mask), cfg.n_positions, cfg.d_sae)
        self.mask.meet(cfg.d_in, 0)
        self.mask.to(dtype=self.dtype)
        if self.device.type != "meta":
            self.rule.to(self.device)
            self.mask.to(self.device)
        self._context: tuple[GivenPositions | None, bool] = None, True  # positions, and whether the mask is used
        self._warned: set[str] = set()
        self._varies = True
        self.register_load_state_dict_post_hook(_note_whether_positions_matter)
        _note_whether_positions_matter(self)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """Return SAELens's TopK, with k = d_sae (which is ReLU) for rules other than top-k.

        `encode` does not use it. It tells SAEDashboard to encode with all latents and select some of the codes, instead
        of encoding with some latents only, for which rule and mask have no meaning.
        """
        return TopK(self.cfg.rule["k"] if self.cfg.rule.get("kind") == "topk" else self.cfg.d_sae)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Restore the type of integer tensors, which the loader converts to floats."""
        for name, tensor in self.state_dict().items():
            if name in state_dict and not tensor.is_floating_point():
                state_dict[name] = state_dict[name].to(tensor.dtype)

    def at(self, positions: GivenPositions) -> AbstractContextManager["PosmaskSAE"]:
        """Set the positions of vectors within a context, for tools that do not pass any.

        Args:
            positions: integers that broadcast to the vectors' shape without its last axis, 0 is BOS; or a function
                that returns them, called at each `encode`.
        """
        return self._within(positions, use_mask=True)

    def without_mask(self) -> AbstractContextManager["PosmaskSAE"]:
        """Lift the mask within a context: every latent is open at every position."""
        return self._within(None, use_mask=False)

    @contextmanager
    def _within(self, positions: GivenPositions | None, *, use_mask: bool) -> Iterator["PosmaskSAE"]:
        before, self._context = self._context, (positions, use_mask)
        try:
            yield self
        finally:
            self._context = before

    def encode(self, x: Tensor, positions: GivenPositions | None = None, *, use_mask: bool = True) -> Tensor:
        """Return the codes, [.., d_sae], of vectors [.., d_in].

        Args:
            x: vectors in the model's units.
            positions: positions of the vectors, see `at`; None takes those of the surrounding `with sae.at(..)`, else
                those that the shape determines.
            use_mask: False lifts the mask: every latent is open at every position.

        Raises:
            BadSetting: positions are unknown, negative, not integers or do not fit the vectors; or none are given, and
                texts begin with vectors of zeros, as tools that pad texts on the left leave them.
        """
        sae_in = self.process_sae_in(x)
        if positions is None:
            positions, within = self._context
            use_mask = use_mask and within
        if not use_mask or not self._varies:
            mask_rows = torch.zeros(sae_in.shape[:-1], dtype=torch.long, device=sae_in.device)  # All rows are equal.
        else:
            mask_rows = self._mask_rows(x, positions)
        routing = self.mask.route(sae_in + self.b_dec, mask_rows)
        preactivation = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        openness = self.mask.table()[routing.mask_row] if self.mask.gates_code() and use_mask else None
        codes = self.rule.codes(preactivation, openness, lambda parameter: parameter)
        if routing.strength is not None:
            codes = codes * routing.strength[..., None]
        return self.hook_sae_acts_post(codes)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstructions, [.., d_in], of codes [.., d_sae]."""
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor, positions: GivenPositions | None = None, *, use_mask: bool = True) -> Tensor:
        """Return the reconstructions of vectors; for the arguments see `encode`."""
        if positions is None and use_mask:
            return super().forward(x)
        with self._within(positions, use_mask=use_mask):
            return super().forward(x)

    def _mask_rows(self, x: Tensor, positions: GivenPositions | None) -> Tensor:
        """Return the row of the mask's table for each vector."""
        last = self.mask.n_positions - 1
        if isinstance(positions, Positions) and self.mask.settings.position_origin != "context":
            raise BadSetting(
                f"this SAE's mask counts positions from the {self.mask.settings.position_origin}, which a model's "
                "inputs do not show: give the positions themselves with `with sae.at(p):`"
            )
        if callable(positions):
            positions = positions()
        if positions is None:
            return self._rows_of_shape(x, last)
        rows = _broadcast(positions, x)
        if torch.compiler.is_compiling() or isinstance(rows, FakeTensor):  # No values yet: check when the graph runs.
            is_valid = (rows >= 0).all()
            torch.ops.aten._assert_async.msg(is_valid, "a position is negative: count from 0, which is BOS")
        elif rows.numel():
            if int(rows.min()) < 0:
                raise BadSetting(f"position {int(rows.min())} is negative: count from 0, which is BOS")
            self._warn_beyond(int(rows.max()), last)
        return rows.clamp(max=last)

    def _rows_of_shape(self, x: Tensor, last: int) -> Tensor:
        """Return positions 0, 1, .. along the second-to-last axis, or `cfg.unknown_position` if that is not known.

        Raises:
            BadSetting: the shape does not determine the positions, and there is no `cfg.unknown_position`.
        """
        position_origin = self.mask.settings.position_origin
        by_shape, first = ", or give vectors [batch, position, d_in] from position 0 on", ""
        is_single = x.dim() >= 3 and x.shape[-2] == 1
        if position_origin != "context":
            reason, by_shape = f"a position is counted from the {position_origin}, which no shape shows", ""
        elif x.dim() < 3:
            reason = f"vectors of shape {list(x.shape)} have no position axis"
        elif is_single:
            reason = f"the one vector per text in shape {list(x.shape)} may be at any position"
            first = " (positions=0 if it is the first)"
        else:
            _refuse_left_padding(x)
            self._warn_beyond(x.shape[-2] - 1, last)
            return torch.arange(x.shape[-2], device=x.device).clamp(max=last).expand(x.shape[:-1])
        unknown = self.cfg.unknown_position
        if unknown is None:
            raise BadSetting(
                f"this SAE's mask needs positions, and {reason}: call sae.encode(x, positions=p){first}, use "
                f"`with sae.at(p):` around a tool's call{by_shape}; in generation follow the model with "
                "posmask.interop.positions.positions_of; to lift the mask on purpose use `with sae.without_mask():`"
            )
        if is_single:
            self._warn(
                "single",
                f"vectors of shape {list(x.shape)} are all encoded at position {unknown} (unknown_position): in "
                "generation with a KV cache follow the model with posmask.interop.positions.positions_of",
            )
        return torch.full(x.shape[:-1], unknown, device=x.device)

    def _warn_beyond(self, largest: int, last: int) -> None:
        if largest > last:
            self._warn("beyond", f"positions up to {largest} are beyond the mask's last, {last}, and count as it")

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=4)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Scale decoder rows to norm 1, and codes inversely so that reconstructions stay the same.

        Raises:
            NotImplementedError: rows differ in norm, and the rule compares latents, so it would choose others.
        """
        norms = self.get_W_dec_norm()
        if self.rule.compares_latents:
            mean = norms.float().mean()
            if bool(((norms / mean - 1).abs() > 0.01).any()):
                raise NotImplementedError(
                    f"decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}, so folding "
                    f"them would change which latents {self.cfg.rule['kind']} chooses: keep the norms"
                )
            norms = mean.to(norms.dtype).expand_as(norms)
        self.W_dec.data.div_(norms[:, None])
        self.W_enc.data.mul_(norms)
        self.b_enc.data.mul_(norms)
        self.rule.rescale_(norms)


def _refuse_left_padding(x: Tensor) -> None:
    """Check that no text begins with two vectors of zeros, which SAEBench sets for BOS and padding.

    Raises:
        BadSetting: some text does, so its positions are not 0, 1, ..
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return  # There are no values yet.
    padded = (x[..., :2, :] == 0).flatten(-2).all(-1)
    if bool(padded.any()) and bool((x[padded] != 0).any()):
        raise BadSetting(
            f"{int(padded.sum())} of {padded.numel()} texts begin with vectors of zeros, as if they were padded on the "
            "left, so their positions are not 0, 1, ..: set padding_side = 'right' on the tool's tokenizer, or pass "
            "positions"
        )


def _broadcast(positions: Tensor | int, x: Tensor) -> Tensor:
    """Return positions in the vectors' shape without its last axis."""
    positions = torch.as_tensor(positions, device=x.device)
    if positions.dtype not in _INTEGERS:
        raise BadSetting(f"positions of type {positions.dtype} are not whole numbers: count from 0, which is BOS")
    try:
        return positions.long().expand(x.shape[:-1])
    except RuntimeError:
        raise BadSetting(
            f"positions of shape {list(positions.shape)} do not fit vectors {list(x.shape)}: "
            f"give whole numbers that broadcast to {list(x.shape[:-1])}"
        ) from None


def _note_whether_positions_matter(sae: PosmaskSAE, incompatible_keys: object = None) -> None:
    """Store whether codes depend on the position, so that a compiled `encode` has no branch on tensors."""
    mask = sae.mask
    table = mask.table()
    if not mask.gates_code() or mask.reads_vectors:
        sae._varies = False
    elif not table.is_meta and not isinstance(table, FakeTensor):  # Without values they may.
        sae._varies = bool((table != table[:1]).any())


def as_saelens(
    sae: SparseAutoencoder,
    origin: dict[str, Any] | None = None,
    model_name: str | None = None,
    unknown_position: int | Literal["typical"] | None = None,
) -> PosmaskSAE:
    """Convert an SAE to SAELens's class without writing a folder; for the arguments see `saelens_form`."""
    cfg, tensors = saelens_form(sae, origin, model_name, unknown_position)
    converted = PosmaskSAE(PosmaskSAEConfig.from_dict(cfg))
    converted.load_state_dict(tensors)
    return converted


if ARCHITECTURE not in SAE_CLASS_REGISTRY:  # A reload of this module must not register it twice.
    register_sae_class(ARCHITECTURE, PosmaskSAE, PosmaskSAEConfig)
