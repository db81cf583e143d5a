"""Measures inside the model: loss recovered by a reconstruction, and a causal test of position-bound latents."""

import math
import os
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
from posmask.kernels import operations
from posmask.results.intervals import jackknife_interval, ratio
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes, SparseAutoencoder

__all__ = ["InModel", "Losses", "WindowMass", "causal", "recovered", "without_latents"]

MIN_CAUSAL_FIRINGS = 40
_BLOCK_BYTES = 2**24
_TOKENS_AT_ONCE = 256  # 50 MB of log-probabilities for 49,152 tokens of vocabulary, several times over
Replace = Callable[[Batch, Int[Tensor, " token"]], Float[Tensor, "token d_model"]]
"""Maps kept tokens and the index of each token's context to the vectors that replace theirs."""


def _allocate(file: int, n_bytes: int) -> None:
    """Reserve the blocks of a temporary file: writing to a mapped file on a full disk would end the process.

    Raises:
        OSError: the disk is full.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, n_bytes)
        else:
            for start in range(0, n_bytes, _BLOCK_BYTES):
                os.write(file, bytes(min(_BLOCK_BYTES, n_bytes - start)))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{n_bytes / 1e9:.2g} GB of the model's predictions do not fit into the folder of temporary files "
            f"({error.strerror}; set TMPDIR to a larger one, or lower evaluation.model_contexts)",
            tempfile.gettempdir(),
        ) from error


@dataclass(frozen=True)
class Losses:
    """Losses of next-token predictions in nats, by context and position; NaN where no prediction is scored.

    `divergence` is KL(unmodified model || model with replaced vectors).
    """

    cross_entropy: Float[Tensor, "context position"]
    divergence: Float[Tensor, "context position"]


class InModel:
    """Runs the layers above the site on replaced vectors of full-length held-out contexts.

    Only kept tokens are replaced, so BOS keeps its vector. A prediction is scored if both its token and the token it
    predicts are kept.

    Args:
        model: at the site of the activations.
        activations: of the held-out texts.
        n_contexts: number of contexts, evenly spread over the full-length contexts, so that few share a text.

    Raises:
        NothingToDo: there are fewer full-length contexts.
    """

    def __init__(self, model: LanguageModel, activations: Activations, n_contexts: int) -> None:
        self._model = model
        self._activations = activations
        starts = (activations.position == 0).nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([activations.n_tokens]))
        full_length = starts[lengths == lengths.max()]
        if len(full_length) < n_contexts:
            raise NothingToDo(
                f"model_contexts = {n_contexts} is more than the {len(full_length)} full-length contexts of the "
                "held-out texts: lower it, or raise heldout_tokens"
            )
        self.starts: Int[Tensor, " context"] = full_length[torch.arange(n_contexts) * len(full_length) // n_contexts]
        self._length = int(lengths.max())
        self.texts: Int[Tensor, " text"] = self.batch(torch.arange(n_contexts)).kept().text.unique()

    def batch(self, contexts: Int[Tensor, " context"]) -> Batch:
        """All tokens of the contexts with these indices, context by context."""
        return self._activations.batch((self.starts[contexts, None] + torch.arange(self._length)).reshape(-1))

    def forget(self) -> None:
        """Free the unmodified model's predictions, which are computed again when they are needed."""
        self.__dict__.pop("_clean_logits", None)

    @property
    def n_tokens(self) -> int:
        """Tokens of all contexts."""
        return len(self.starts) * self._length

    def _groups(self) -> tuple[Int[Tensor, " context"], ...]:
        """The contexts that the model reads at once."""
        return torch.arange(len(self.starts)).split(max(1, _TOKENS_AT_ONCE // self._length))

    def losses(self, replacements: Sequence[Replace], advance: Callable[[int], None] = lambda n: None) -> list[Losses]:
        """The losses of the unmodified model, followed by those with each replacement.

        Args:
            advance: called with the number of tokens finished since its last call.

        Raises:
            DegenerateResult: predictions are NaN or infinite.
        """
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(1 + len(replacements))]
        for contexts in self._groups():
            batch = self.batch(contexts).to(self._model.device)
            ids = batch.token_id.view(len(contexts), -1).long()
            context = contexts.repeat_interleave(self._length).to(ids.device)
            keep = batch.keep.view(ids.shape)
            scored = keep[:, :-1] & keep[:, 1:]
            clean = self._clean_logits[contexts].to(self._model.device).float().log_softmax(-1)
            if not bool(clean.isfinite().all()):
                raise DegenerateResult("the model's predictions are NaN or infinite: use precision float32")
            probability = clean.exp()
            parts[0].append(_losses(clean, probability, clean, ids, scored))
            for number, replacement in enumerate(replacements, start=1):
                vectors = batch.vectors.clone()
                vectors[batch.keep] = replacement(batch.kept(), context[batch.keep]).to(vectors.dtype)
                replaced = self._logits(ids, vectors).float().log_softmax(-1)
                if not bool(replaced.isfinite().all()):
                    raise DegenerateResult(
                        "the model's predictions are NaN or infinite on replaced vectors: use precision float32"
                    )
                parts[number].append(_losses(clean, probability, replaced, ids, scored))
            advance(ids.numel() * len(replacements))
        return [Losses(*(torch.cat(column) for column in zip(*batches, strict=True))) for batches in parts]

    def _logits(self, ids: Tensor, vectors: Tensor) -> Float[Tensor, "context position token"]:
        return self._model.logits(ids, vectors.view(*ids.shape, -1))[:, :-1]

    @cached_property
    def _clean_logits(self) -> Float[Tensor, "context position token"]:
        """Logits of the unmodified model in its precision, computed once and stored in a temporary file."""
        stored: Tensor | None = None
        with tempfile.NamedTemporaryFile() as file:
            for contexts in self._groups():
                batch = self.batch(contexts)
                logits = self._logits(batch.token_id.view(len(contexts), -1).long(), batch.vectors)
                if stored is None:
                    shape = len(self.starts), *logits.shape[1:]
                    size = math.prod(shape)
                    _allocate(file.fileno(), size * logits.dtype.itemsize)
                    stored = torch.from_file(file.name, shared=True, size=size, dtype=logits.dtype).view(shape)
                stored[contexts] = logits.cpu()
        assert stored is not None
        return stored

    @cached_property
    def references(self) -> tuple[Losses, Losses]:
        """Losses of the unmodified model, and with all kept vectors set to 0 (sae-bench's `core` also zeroes BOS)."""
        clean, zeroed = self.losses([lambda batch, context: torch.zeros_like(batch.vectors)])
        return clean, zeroed

    def reference_measures(self) -> list[Measure]:
        """`cross_entropy` of the unmodified model and with its vectors set to 0, in nats per token."""
        measures = []
        for name, losses in zip(("model", "zeroed"), self.references, strict=True):
            top, bottom = _by_context(losses.cross_entropy)
            measures.append(ratio("cross_entropy", top, bottom, slice={"vectors": name}, n=int(bottom.sum())))
        return measures


def _losses(
    clean: Tensor, probability: Tensor, replaced: Tensor, ids: Tensor, scored: Bool[Tensor, "context position"]
) -> tuple:
    cross_entropy = -replaced.gather(2, ids[:, 1:, None])[..., 0]
    divergence = (clean - replaced).mul_(probability).sum(2)
    return cross_entropy.masked_fill(~scored, torch.nan).cpu(), divergence.masked_fill(~scored, torch.nan).cpu()


def _by_context(values: Float[Tensor, "context position"]) -> tuple[Tensor, Tensor]:
    """Sum and number of the predictions of each context."""
    return values.nansum(1).double(), values.isfinite().sum(1).double()


def recovered(references: tuple[Losses, Losses], reconstructed: Losses) -> list[Measure]:
    """`ce_recovered` and `kl_recovered`: the share of the model's predictive loss that a reconstruction recovers.

    ce_recovered = (CE(zeroed) - CE(reconstruction)) / (CE(zeroed) - CE(model)), kl_recovered = 1 - KL(reconstruction)
    / KL(zeroed). 1 is the unmodified model, 0 is as bad as vectors of 0. Overall, and at each position of the
    predicting token. Units of the confidence intervals are contexts. ce_recovered is missing unless vectors of 0 raise
    the cross-entropy by an amount whose 95 % interval is above 0, and at positions where they do not raise it.

    Args:
        references: `InModel.references`.
        reconstructed: losses with the reconstruction in place of the vectors.
    """
    clean, zeroed = references
    parts = {
        "ce_recovered": (
            zeroed.cross_entropy - reconstructed.cross_entropy,
            zeroed.cross_entropy - clean.cross_entropy,
        ),
        "kl_recovered": (zeroed.divergence - reconstructed.divergence, zeroed.divergence),
    }
    measures = []
    for name, (top, bottom) in parts.items():
        n_at = bottom.isfinite().sum(0)
        harm = ratio("harm of zeros", *_by_context(bottom))
        if name == "ce_recovered" and not harm.ci_low > 0:
            reason = (
                f"vectors of 0 raise the cross-entropy by {harm.value:.3f} (95 % interval {harm.ci_low:.3f} to "
                f"{harm.ci_high:.3f}), not clearly above 0, so there is no loss to recover"
            )
            measures.append(Measure(name, math.nan, reason=reason))
            continue
        measures.append(ratio(name, top.nansum(1), bottom.nansum(1), n=int(n_at.sum())))
        for position, n in enumerate(n_at.tolist()):
            lost = float(bottom[:, position].nansum())
            value = float(top[:, position].nansum()) / lost if lost > 0 else torch.nan
            measures.append(Measure(name, value, n=n, slice={"position": position}))
    return measures


class WindowMass:
    """Accumulates the activation mass of each latent per window of positions, to choose latents for the causal test.

    Args:
        n_positions: positions per context.
        n_windows: equal windows of positions.
        d_sae: number of latents.
        device: of the batches and codes.
    """

    def __init__(self, n_positions: int, n_windows: int, d_sae: int, device: torch.device | None = None) -> None:
        self._window = equal_segments(n_positions, n_windows).to(device)
        self._mass = torch.zeros(n_windows, d_sae, device=device)
        self._firings = torch.zeros(d_sae, device=device)
        self._n_tokens = 0

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes, from texts other than those of the causal test."""
        self._n_tokens += len(batch)
        window = self._window[batch.position.long()]
        operations.add_at_(self._mass.view(-1), window[codes.token] * codes.d_sae + codes.latent, codes.value)
        operations.count_at_(self._firings, codes.latent)

    def specialized(self, share: float = 0.05) -> tuple[Bool[Tensor, "window latent"], Bool[Tensor, "window latent"]]:
        """For each window the most specialized latents, and as many other latents of equal activity; on the host.

        Of the latents with at least 40 firings, the specialized ones are the fraction `share` with the largest part
        of their mass in the window. Each of them, most active first, is matched with the unused other latent of nearest
        log mass.

        Raises:
            DegenerateResult: fewer than two latents fire 40 times.
        """
        counted = (self._firings.cpu() >= MIN_CAUSAL_FIRINGS).nonzero()[:, 0]
        special, matched = torch.zeros(2, *self._mass.shape, dtype=torch.bool)
        n_chosen = min(max(1, round(share * len(counted))), len(counted) // 2)
        if n_chosen == 0:
            raise DegenerateResult(
                f"fewer than two latents fire {MIN_CAUSAL_FIRINGS} times on the {self._n_tokens:,} held-out tokens of "
                "texts that the causal test does not use, so there are no latents to compare: evaluate on more texts"
            )
        mass = self._mass.cpu()[:, counted]
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
    """Subtract the contribution of latents from the vectors: in context c the latents of window c mod n_windows."""
    ablated_latents = chosen.to(sae.decoder.device)

    def ablated(batch: Batch, context: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        codes = sae.encode_batch(batch)
        removed = codes.value * ablated_latents[context[codes.token] % len(chosen), codes.latent]
        return batch.vectors.float() - sae.share_of(replace(codes, value=removed))

    return ablated


def causal(clean: Losses, specialized: Losses, matched: Losses, n_windows: int, n_positions: int) -> list[Measure]:
    """The causal test: loss inside and outside a window after ablation of the latents specialized in it.

    `ablation_effect` = mean increase of the cross-entropy in nats per token, by `latents` (specialized, or matched
    latents of equal activity) and `at` (inside or outside the window). `causal_specificity` = (inside - outside) of the
    specialized latents minus (inside - outside) of the matched ones: above 0 if the ablated latents matter more inside
    their window than elsewhere. Units are contexts, each tested with one window. An ablation inside a window also
    affects later positions through attention.

    Args:
        clean: losses of the unmodified model.
        specialized: losses without the specialized latents.
        matched: losses without the matched latents.
        n_windows: equal windows of positions.
        n_positions: positions per context.
    """
    n_contexts, n_predicting = clean.cross_entropy.shape
    window = equal_segments(n_positions, n_windows)[:n_predicting]
    inside = window == (torch.arange(n_contexts) % n_windows)[:, None]
    measures, effects = [], []
    for name, ablated in (("specialized", specialized), ("matched", matched)):
        rise = ablated.cross_entropy - clean.cross_entropy
        sides = []
        for side, where in (("inside", inside), ("outside", ~inside)):
            top, bottom = _by_context(rise.masked_fill(~where, torch.nan))
            measures.append(
                ratio("ablation_effect", top, bottom, slice={"latents": name, "at": side}, n=int(bottom.sum()))
            )
            sides.append((top, bottom))
        effects.append(sides)

    def specificity(keep: Tensor) -> Tensor:
        (special_in, special_out), (matched_in, matched_out) = (
            [top[keep].sum() / bottom[keep].sum() for top, bottom in sides] for sides in effects
        )
        return (special_in - special_out) - (matched_in - matched_out)

    every_context = torch.arange(n_contexts)
    value = float(specificity(every_context))
    without = torch.stack([specificity(every_context[every_context != context]) for context in every_context])
    measures.append(Measure("causal_specificity", value, *jackknife_interval(value, without), n_contexts))
    return measures
