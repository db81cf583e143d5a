"""What an SAE's reconstruction, and its position-bound latents, do to the model that goes on from them."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask.data.activations import Activations, Batch
from posmask.data.sites import LanguageModel
from posmask.data.tokens import equal_segments
from posmask.errors import DegenerateResult, NothingToDo
from posmask.results.intervals import jackknife_interval, ratio
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes, SparseAutoencoder

__all__ = ["InModel", "Losses", "WindowMass", "causal", "recovered", "without_latents"]

MIN_CAUSAL_FIRINGS = 40
_CONTEXTS_AT_ONCE = 2  # 25 MB of log-probabilities each, several times over
Replace = Callable[[Batch, Int[Tensor, " token"]], Float[Tensor, "token d_model"]]
"""Kept tokens and the number of the context that each stands in -> the vectors to put in their place."""


@dataclass(frozen=True)
class Losses:
    """What next-token predictions lose, in nats, by context and position; NaN where nothing is predicted.

    `divergence` is KL(model as it is || model with replaced vectors).
    """

    cross_entropy: Float[Tensor, "context position"]
    divergence: Float[Tensor, "context position"]


class InModel:
    """Runs the layers above on replaced vectors, over some whole held-out contexts.

    Only kept tokens are replaced, so BOS keeps its own vector. A prediction counts where both the token and the one
    it predicts are kept.

    Args:
        n_contexts: how many, evenly spread over the whole contexts, so that few share a text.

    Raises:
        NothingToDo: there are not that many whole contexts.
    """

    def __init__(self, model: LanguageModel, activations: Activations, n_contexts: int) -> None:
        self._model = model
        self._activations = activations
        starts = (activations.position == 0).nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([activations.n_tokens]))
        whole = starts[lengths == lengths.max()]
        if len(whole) < n_contexts:
            raise NothingToDo(
                f"model_contexts = {n_contexts} is more than the {len(whole)} whole contexts of the held-out texts: "
                "lower it, or raise heldout_tokens"
            )
        self.starts: Int[Tensor, " context"] = whole[torch.arange(n_contexts) * len(whole) // n_contexts]
        self._length = int(lengths.max())
        self.texts: Int[Tensor, " text"] = self.batch(torch.arange(n_contexts)).kept().text.unique()

    def batch(self, contexts: Int[Tensor, " context"]) -> Batch:
        return self._activations.batch((self.starts[contexts, None] + torch.arange(self._length)).reshape(-1))

    @property
    def n_tokens(self) -> int:
        return len(self.starts) * self._length

    def losses(self, replacements: Sequence[Replace], advance: Callable[[int], None] = lambda n: None) -> list[Losses]:
        """What the model loses as it is (first), then with each replacement."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(1 + len(replacements))]
        for contexts in torch.arange(len(self.starts)).split(_CONTEXTS_AT_ONCE):
            batch = self.batch(contexts)
            ids = batch.token_id.view(len(contexts), -1).long()
            context = contexts.repeat_interleave(self._length)
            keep = batch.keep.view(ids.shape)
            scored = keep[:, :-1] & keep[:, 1:]
            clean = self._clean_logits[contexts].to(self._model.device).float().log_softmax(-1)
            probability = clean.exp()
            found[0].append(_losses(clean, probability, clean, ids, scored))
            for number, instead in enumerate(replacements, start=1):
                vectors = batch.vectors.clone()
                vectors[batch.keep] = instead(batch.kept(), context[batch.keep]).to(vectors.dtype)
                replaced = self._logits(ids, vectors).float().log_softmax(-1)
                if not bool(replaced.isfinite().all()):
                    raise DegenerateResult(
                        "the model's predictions are NaN or infinite on replaced vectors: use precision float32"
                    )
                found[number].append(_losses(clean, probability, replaced, ids, scored))
            advance(ids.numel() * len(replacements))
        return [Losses(*(torch.cat(parts) for parts in zip(*some, strict=True))) for some in found]

    def _logits(self, ids: Tensor, vectors: Tensor) -> Float[Tensor, "context position token"]:
        return self._model.logits(ids, vectors.view(*ids.shape, -1))[:, :-1]

    @cached_property
    def _clean_logits(self) -> Float[Tensor, "context position token"]:
        """The model's own, in its precision, computed once and kept in a temporary file."""
        found: Tensor | None = None
        with tempfile.NamedTemporaryFile() as file:
            for contexts in torch.arange(len(self.starts)).split(_CONTEXTS_AT_ONCE):
                batch = self.batch(contexts)
                logits = self._logits(batch.token_id.view(len(contexts), -1).long(), batch.vectors)
                if found is None:
                    shape = len(self.starts), *logits.shape[1:]
                    size = math.prod(shape)
                    found = torch.from_file(file.name, shared=True, size=size, dtype=logits.dtype).view(shape)
                found[contexts] = logits.cpu()
        assert found is not None
        return found

    @cached_property
    def references(self) -> tuple[Losses, Losses]:
        """As the model is, and with all kept vectors set to 0 (sae-bench's `core` also sets that of BOS)."""
        clean, zeroed = self.losses([lambda batch, context: torch.zeros_like(batch.vectors)])
        return clean, zeroed

    def reference_measures(self) -> list[Measure]:
        """`cross_entropy` of the model as it is and with its vectors set to 0, nats a token."""
        found = []
        for name, losses in zip(("model", "zeroed"), self.references, strict=True):
            top, bottom = _by_context(losses.cross_entropy)
            found.append(ratio("cross_entropy", top, bottom, slice={"vectors": name}, n=int(bottom.sum())))
        return found


def _losses(
    clean: Tensor, probability: Tensor, replaced: Tensor, ids: Tensor, scored: Bool[Tensor, "context position"]
) -> tuple:
    cross_entropy = -replaced.gather(2, ids[:, 1:, None].to(replaced.device))[..., 0].cpu()
    divergence = (clean - replaced).mul_(probability).sum(2).cpu()
    return cross_entropy.masked_fill(~scored, torch.nan), divergence.masked_fill(~scored, torch.nan)


def _by_context(values: Float[Tensor, "context position"]) -> tuple[Tensor, Tensor]:
    """Sums and counts of a context's predictions."""
    return values.nansum(1).double(), values.isfinite().sum(1).double()


def recovered(references: tuple[Losses, Losses], reconstructed: Losses) -> list[Measure]:
    """`ce_recovered` and `kl_recovered`: how much of the model's prediction a reconstruction keeps.

    ce_recovered = (CE(zeroed) - CE(reconstruction)) / (CE(zeroed) - CE(model)), kl_recovered = 1 - KL(reconstruction)
    / KL(zeroed); 1 keeps all, 0 no more than vectors of 0. Overall, and at each position of the predicting token.
    Units are contexts.
    """
    clean, zeroed = references
    parts = {
        "ce_recovered": (
            zeroed.cross_entropy - reconstructed.cross_entropy,
            zeroed.cross_entropy - clean.cross_entropy,
        ),
        "kl_recovered": (zeroed.divergence - reconstructed.divergence, zeroed.divergence),
    }
    found = []
    for name, (top, bottom) in parts.items():
        n_at = bottom.isfinite().sum(0)
        found.append(ratio(name, top.nansum(1), bottom.nansum(1), n=int(n_at.sum())))
        for position, n in enumerate(n_at.tolist()):
            value = float(top[:, position].nansum() / bottom[:, position].nansum()) if n else torch.nan
            found.append(Measure(name, value, n=n, slice={"position": position}))
    return found


class WindowMass:
    """Accumulates each latent's activation mass by window of positions, to choose latents for the causal test."""

    def __init__(self, n_positions: int, n_windows: int, d_sae: int) -> None:
        self._window = equal_segments(n_positions, n_windows)
        self._mass = torch.zeros(n_windows, d_sae)
        self._firings = torch.zeros(d_sae)

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes; none of texts that the test is made on."""
        window = self._window[batch.position.long()]
        self._mass.view(-1).index_add_(0, window[codes.token] * codes.d_sae + codes.latent, codes.value)
        self._firings += torch.bincount(codes.latent, minlength=codes.d_sae)

    def specialized(self, share: float = 0.05) -> tuple[Bool[Tensor, "window latent"], Bool[Tensor, "window latent"]]:
        """For each window its most specialized latents, and as many equally active others.

        The specialized are the `share` of the latents with at least 40 firings that have the largest part of their
        mass in the window. To each, the most active first, comes the unused other latent of nearest log mass.
        """
        counted = (self._firings >= MIN_CAUSAL_FIRINGS).nonzero()[:, 0]
        special, matched = torch.zeros(2, *self._mass.shape, dtype=torch.bool)
        n_chosen = min(max(1, round(share * len(counted))), len(counted) // 2)
        if n_chosen == 0:
            raise DegenerateResult(
                f"fewer than two latents fire {MIN_CAUSAL_FIRINGS} times on the held-out texts, so the causal test has "
                "none to compare: raise heldout_tokens"
            )
        mass = self._mass[:, counted]
        log_mass = mass.sum(0).log()
        for number, part in enumerate(mass / mass.sum(0)):
            chosen = torch.sort(part, descending=True, stable=True).indices[:n_chosen]
            special[number, counted[chosen]] = True
            free = torch.ones(len(counted)).bool()
            free[chosen] = False
            for latent in chosen[log_mass[chosen].argsort(descending=True)]:
                nearest = (log_mass - log_mass[latent]).abs().masked_fill(~free, torch.inf).argmin()
                free[nearest] = False
                matched[number, counted[nearest]] = True
        return special, matched


def without_latents(sae: SparseAutoencoder, chosen: Bool[Tensor, "window latent"]) -> Replace:
    """Takes the decoder's part of some latents out of the vectors: in context c those of window c mod n_windows."""

    def put(batch: Batch, context: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        codes = sae.encode_batch(batch)
        taken = codes.value * chosen[context[codes.token] % len(chosen), codes.latent]
        return batch.vectors.float() - sae.share_of(replace(codes, value=taken))

    return put


def causal(clean: Losses, specialized: Losses, matched: Losses, n_windows: int, n_positions: int) -> list[Measure]:
    """The causal test: what happens inside and outside a window when the latents specialized on it are taken out.

    `ablation_effect` = mean rise of the cross-entropy, nats a token, by `latents` (specialized, or as many equally
    active others) and `at` (inside, outside the window). `causal_specificity` = (inside - outside) of the specialized
    minus that of the others: above 0 when what was taken out mattered inside its window more than elsewhere.
    Units are contexts, each tried with one window; what is taken out inside a window also reaches later positions
    through attention.
    """
    n_contexts, n_predicting = clean.cross_entropy.shape
    window = equal_segments(n_positions, n_windows)[:n_predicting]
    inside = window == (torch.arange(n_contexts) % n_windows)[:, None]
    found, effects = [], []
    for name, ablated in (("specialized", specialized), ("matched", matched)):
        rise = ablated.cross_entropy - clean.cross_entropy
        sides = []
        for side, where in (("inside", inside), ("outside", ~inside)):
            top, bottom = _by_context(rise.masked_fill(~where, torch.nan))
            found.append(
                ratio("ablation_effect", top, bottom, slice={"latents": name, "at": side}, n=int(bottom.sum()))
            )
            sides.append((top, bottom))
        effects.append(sides)

    def specificity(keep: Tensor) -> Tensor:
        (own_in, own_out), (other_in, other_out) = (
            [top[keep].sum() / bottom[keep].sum() for top, bottom in sides] for sides in effects
        )
        return (own_in - own_out) - (other_in - other_out)

    everything = torch.arange(n_contexts)
    value = float(specificity(everything))
    without = torch.stack([specificity(everything[everything != context]) for context in everything])
    found.append(Measure("causal_specificity", value, *jackknife_interval(value, without), n_contexts))
    return found
