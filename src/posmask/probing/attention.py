"""A probe that learns how to pool: attention over the codes of a text's tokens.

    logit = b + sum over heads h of  sum_t softmax_t(q_h . z_t + w_h r_t) (v_h . z_t)

z_t are the codes of token t = 0 .. n - 1, and r_t = 2 (t + 1/2) / n - 1 is its place in the text. This is the form of
EleutherAI's attention probes (https://github.com/EleutherAI/attention-probes), which count t in tokens. Codes are
divided by the mean of the active codes of the training texts. q starts at 0, and w at -3, -1, 1 and 3, so that the
heads begin with different places in the text. From w = 0, where the probe is one on mean codes, it does not leave
chance in order tasks, whose texts have equal means.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.probing.probes import ProbeTask
from posmask.sae.autoencoder import Codes

__all__ = ["N_HEADS", "TextCodes", "attention_correct"]

N_HEADS = 4
_N_STEPS = 200
_LEARNING_RATE = 0.02
_PATIENCE = 50


class TextCodes:
    """The codes of the tokens of many texts, on the host.

    Args:
        n_texts: number of texts.
        n_features: number of latents.
    """

    def __init__(self, n_texts: int, n_features: int) -> None:
        self.n_texts = n_texts
        self.n_features = n_features
        self._batches: list[tuple[Tensor, Codes]] = []

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes. All tokens of a text must be in one batch and in order."""
        host = torch.device("cpu")
        self._batches.append((batch.text.long().to(host), codes.to(host)))

    def part(self, texts: Int[Tensor, " chosen"]) -> "_Part":
        """The tokens of some texts, which are counted in the order given."""
        index = torch.full((self.n_texts,), -1)
        index[texts] = torch.arange(len(texts))
        text, n_active, latent, value = [], [], [], []
        for text_of_token, codes in self._batches:
            chosen = codes.select(index[text_of_token] >= 0)
            text.append(index[text_of_token][index[text_of_token] >= 0])
            n_active.append(chosen.n_active().long())
            latent.append(chosen.latent)
            value.append(chosen.value)
        of_token, count = torch.cat(text), torch.cat(n_active)
        order = of_token.sort(stable=True).indices
        n_tokens = torch.bincount(of_token, minlength=len(texts))
        rank = torch.empty_like(of_token)
        rank[order] = torch.arange(len(order)) - (n_tokens.cumsum(0) - n_tokens)[of_token[order]]
        place = (2 * rank + 1) / n_tokens[of_token] - 1
        return _Part(len(texts), of_token, place, count.cumsum(0) - count, torch.cat(latent), torch.cat(value).float())


@dataclass(frozen=True)
class _Part:
    """Tokens of some texts.

    Attributes:
        text: of each token, from 0.
        place: of each token in its text, from -1 to 1.
        first: the first entry of each token.
    """

    n_texts: int
    text: Int[Tensor, " token"]
    place: Float[Tensor, " token"]
    first: Int[Tensor, " token"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]


def attention_correct(codes: TextCodes, task: ProbeTask, random: torch.Generator) -> Bool[Tensor, " test_text"]:
    """Fit an attention probe and report which test texts it classifies correctly.

    AdamW on all training texts but a held-out fifth, at most 200 steps. The result is that of the step with the highest
    accuracy, and then the lowest loss, on the held-out fifth; training stops 50 steps after it.

    Args:
        codes: of all texts.
        random: draws the held-out fifth and the initial weights.

    Raises:
        DegenerateResult: no latent is active on the training texts.
    """
    order = torch.randperm(len(task.train), generator=random)
    heldout, rest = order[: len(order) // 5], order[len(order) // 5 :]
    parts = [codes.part(texts) for texts in (task.train[rest], task.train[heldout], task.test)]
    if not len(parts[0].value):
        raise DegenerateResult(
            f"none of {codes.n_features:,} latents is active on {len(rest):,} training texts, so an attention probe "
            "would be at chance: check that the SAE is trained and its latents are open on these texts"
        )
    scale = float(parts[0].value.mean())
    label, heldout_label = task.train_label[rest].float(), task.train_label[heldout].float()
    # The columns of the first heads are queries, those of the others values.
    table = torch.zeros(codes.n_features, 2 * N_HEADS)
    table[:, N_HEADS:].uniform_(-1, 1, generator=random).div_(math.sqrt(codes.n_features))
    parameters = [table, torch.linspace(-3, 3, N_HEADS), torch.zeros(1)]
    optimizer = torch.optim.AdamW([each.requires_grad_() for each in parameters], lr=_LEARNING_RATE)
    best, right, since = (-1.0, 0.0), torch.zeros(len(task.test), dtype=torch.bool), 0
    for _ in range(_N_STEPS):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(_logits(parts[0], scale, *parameters), label).backward()
        optimizer.step()
        with torch.no_grad():
            logits = _logits(parts[1], scale, *parameters)
            accuracy = float(((logits > 0) == (heldout_label > 0)).float().mean())
            reached = accuracy, -float(F.binary_cross_entropy_with_logits(logits, heldout_label))
            since += 1
            if reached > best:
                best, right, since = reached, (_logits(parts[2], scale, *parameters) > 0) == task.test_label, 0
        if since == _PATIENCE:
            break
    return right


def _logits(part: _Part, scale: float, table: Tensor, of_place: Tensor, bias: Tensor) -> Float[Tensor, " text"]:
    projected = F.embedding_bag(part.latent, table, part.first, mode="sum", per_sample_weights=part.value / scale)
    score = projected[:, :N_HEADS] + part.place[:, None] * of_place
    highest = score.detach().new_full((part.n_texts, N_HEADS), -math.inf)
    highest.scatter_reduce_(0, part.text[:, None].expand(-1, N_HEADS), score.detach(), "amax")
    weight = (score - highest[part.text]).exp()
    zeros = weight.new_zeros(part.n_texts, N_HEADS)
    total = zeros.index_add(0, part.text, weight)
    pooled = zeros.index_add(0, part.text, weight * projected[:, N_HEADS:])
    return (pooled / total.clamp(min=1e-12)).sum(1) + bias
