"""Pool the codes of a text's tokens into one row of features per text, sparse and outside of memory.

Poolings differ in the tokens that they combine and in the divisor:

    mean              sum over the kept tokens of a text / their number n, as in SAEBench
    fair              the same sum / the number of kept tokens at which the latent is open, so that a latent open at 16
                      of 127 positions is not diluted by the other 111. Equal to mean if all are open everywhere
    segments<n>       the sum over each of n equal segments of the context / n, side by side
    growing           the same for segments that double in length: positions 1, 2-3, 4-7, ...
    parts<n>          the same for n equal parts of the text, counted in its own tokens
    segments<n>-mean, growing-mean    the mean in each segment: the sum / the kept tokens in it, so that a segment with
                      one token counts as much as a full one
    moment            the mean, and the first moment: sum of (2 r - 1) z / n, where r = (t + 1/2) / n is how far into
                      the text the token t = 0 .. n - 1 is
    max               the largest activation
    binary            1 if the latent is active anywhere, else 0
    last              the last kept token of the text
"""

import re
import tempfile
import weakref
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posmask.data import tokens
from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.kernels import operations
from posmask.masks.base import PositionOrigin
from posmask.sae.autoencoder import Codes

__all__ = ["PooledTexts", "Pooling", "is_pooling_of_codes", "n_parts"]

_ENTRY = np.dtype([("text", np.int32), ("feature", np.int32), ("value", np.float32)])
_BLOCK_ENTRIES = 2**21  # 25 MB
_IN_MEMORY_BYTES = 2**28


class PooledTexts:
    """One sparse row of features per text.

    Rows are moved to a temporary file when they reach 256 MB, and read back in blocks, so memory does not grow with the
    number of texts.

    Args:
        n_texts: number of texts.
        n_features: number of features.
        device: of the results of all methods; entries stay on the host.
    """

    def __init__(self, n_texts: int, n_features: int, device: torch.device | None = None) -> None:
        self.n_texts = n_texts
        self.n_features = n_features
        self.device = device or torch.device("cpu")
        self.n_tokens: Int[Tensor, " text"] = torch.zeros(n_texts, dtype=torch.int64)
        """Kept tokens of each text; a text without kept tokens has an empty row and is left out of probes."""
        self._in_memory: list[np.ndarray] = []
        self._file: IO[bytes] | None = None

    def add(self, text: Int[Tensor, " row"], rows: Float[Tensor, "row feature"]) -> None:
        """Add complete rows.

        Args:
            text: index of the text of each row.

        Raises:
            DegenerateResult: a number is NaN or infinite.
        """
        if not bool(rows.isfinite().all()):
            raise DegenerateResult("pooled features are NaN or infinite: check the vectors and the SAE's weights")
        row, feature = rows.nonzero(as_tuple=True)
        entries = np.empty(len(row), _ENTRY)
        entries["text"], entries["feature"] = text[row].cpu().numpy(), feature.cpu().numpy()
        entries["value"] = rows[row, feature].cpu().numpy()
        self._in_memory.append(entries)
        if sum(block.nbytes for block in self._in_memory) > _IN_MEMORY_BYTES:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when this is collected)
                weakref.finalize(self, self._file.close)
            self._file.seek(0, 2)
            for block in self._in_memory:
                self._file.write(block.tobytes())
            self._in_memory = []

    def _blocks(self) -> Iterator[operations.Block]:
        """(text, feature, value) of all entries."""
        if self._file is not None:
            self._file.seek(0)
            while data := self._file.read(_BLOCK_ENTRIES * _ENTRY.itemsize):
                yield _columns(np.frombuffer(data, _ENTRY))
        yield from map(_columns, self._in_memory)

    def weighted_sums(
        self, weight: Float[Tensor, "text column"], *, of_squares: bool = False
    ) -> Float[Tensor, "column feature"]:
        """sum over texts of weight[text, column] * row[text, feature], in float64.

        Args:
            of_squares: square the features first.
        """
        blocks = self._blocks()
        if of_squares:
            blocks = ((text, feature, value**2) for text, feature, value in blocks)
        return operations.weighted_sums(blocks, weight.double().to(self.device), self.n_features)

    def columns(self, features: Int[Tensor, " chosen"]) -> Float[Tensor, "text chosen"]:
        """Dense columns of the given features, which must be unique."""
        return self._dense(torch.arange(self.n_texts), features)

    def rows(self, texts: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen feature"]:
        """Dense rows of the given texts, which must be unique."""
        return self._dense(texts, torch.arange(self.n_features))

    def _dense(self, texts: Int[Tensor, " row"], features: Int[Tensor, " column"]) -> Float[Tensor, "row column"]:
        slots = []
        for chosen, count in ((texts, self.n_texts), (features, self.n_features)):
            slots.append(torch.full((count,), -1, dtype=torch.int32, device=self.device))
            slots[-1][chosen] = torch.arange(len(chosen), dtype=torch.int32, device=self.device)
        return operations.dense_part(self._blocks(), *slots)


def _columns(entries: np.ndarray) -> operations.Block:
    return entries["text"], entries["feature"], entries["value"]


class Pooling:
    """Pools batches of complete texts into `texts`.

    Args:
        name: see the list above; `fair` needs `live`.
        n_texts: number of texts.
        n_features: latents of the SAE, or channels of the model.
        n_positions: length of the contexts.
        live: for `fair`, 1 where a latent is open, else 0.
        position_origin: from where the positions of `live` are counted.
        device: of the batches and codes.
    """

    def __init__(
        self,
        name: str,
        n_texts: int,
        n_features: int,
        n_positions: int,
        *,
        live: Float[Tensor, "position latent"] | None = None,
        position_origin: PositionOrigin = "context",
        device: torch.device | None = None,
    ) -> None:
        assert (live is not None) == (name == "fair")
        self._kind, _, own = name.partition("-")
        self._divides_by_own_tokens = own == "mean"
        segment = _segment_of_position(self._kind, n_positions)
        self._segment = None if segment is None else segment.to(device)
        self._n_parts = n_parts(name, n_positions)
        self._live = None if live is None else live.to(device)
        self._position_origin: PositionOrigin = position_origin
        self._n_latents = n_features
        self.texts = PooledTexts(n_texts, n_features * self._n_parts, device)

    def update(self, batch: Batch, codes: Codes | None) -> None:
        """Add kept tokens (`batch.kept()`) with their sparse codes, or with their vectors if `codes` is None.

        All tokens of a text must be in one batch and in order, as in `evaluation_batches` of padded texts.

        Raises:
            DegenerateResult: a number is NaN or infinite.
        """
        most = max(1, _MOST_NUMBERS_AT_ONCE // (self._n_latents * self._n_parts))
        texts = batch.text.unique()
        if len(texts) <= most:
            self._add(batch, codes)
            return
        for some in texts.split(most):
            chosen = torch.isin(batch.text, some).nonzero()[:, 0]
            self._add(batch.select(chosen), None if codes is None else codes.select(chosen))

    def _add(self, batch: Batch, codes: Codes | None) -> None:
        text, place = batch.text.long().unique(return_inverse=True)
        assert int(self.texts.n_tokens[text.cpu()].sum()) == 0, "a text's tokens came in two batches"
        n_tokens = operations.counts(place, len(text))
        self.texts.n_tokens[text.cpu()] = n_tokens.cpu()
        total = torch.zeros(len(text) * self._n_parts, self._n_latents, device=text.device)
        divisor = n_tokens.float()[:, None].expand(-1, self._n_parts).reshape(-1, 1)
        for part, weight in self._parts(batch, place, n_tokens):
            row = place * self._n_parts + part
            if codes is None:
                assert self._kind not in ("max", "binary"), "vectors have no activations"
                operations.add_at_(total, row, batch.vectors.float() * weight[:, None])
            elif self._kind in ("max", "binary"):
                entry = row[codes.token] * self._n_latents + codes.latent
                total.view(-1).scatter_reduce_(0, entry, codes.value, "amax")
            else:
                entry = row[codes.token] * self._n_latents + codes.latent
                operations.add_at_(total.view(-1), entry, codes.value * weight[codes.token])
            if self._divides_by_own_tokens:
                divisor = operations.counts(row, len(total))[:, None].float()
        if self._live is not None:
            entry = place * len(self._live) + batch.positions(self._position_origin).long()
            tokens_at = operations.counts(entry, len(total) * len(self._live)).view(len(total), -1)
            divisor = tokens_at.float() @ self._live
        if self._kind in ("max", "binary", "last"):
            pooled = total if self._kind != "binary" else (total > 0).float()
        else:
            pooled = total / divisor.clamp(min=1)
        self.texts.add(text, pooled.view(len(text), -1))

    def _parts(
        self, batch: Batch, place: Int[Tensor, " token"], n_tokens: Int[Tensor, " text"]
    ) -> list[tuple[Int[Tensor, " token"], Float[Tensor, " token"]]]:
        """Each token's part of the row and its weight there; for each part that a token is in."""
        ones = torch.ones(len(place), device=place.device)
        first = torch.zeros_like(place)
        if self._segment is not None:
            return [(self._segment[batch.position.long()], ones)]
        if self._kind in ("moment", "last") or _PARTS.fullmatch(self._kind):
            index = torch.arange(len(place), device=place.device)
            before = (n_tokens.cumsum(0) - n_tokens)[place]
            rank = torch.empty_like(place)
            rank[place.sort(stable=True).indices] = index
            rank -= before
            if self._kind == "last":
                return [(first, (rank == n_tokens[place] - 1).float())]
            if self._kind == "moment":
                return [(first, ones), (first + 1, (2 * rank + 1) / n_tokens[place] - 1)]
            return [(rank * self._n_parts // n_tokens[place], ones)]
        return [(first, ones)]


_MOST_NUMBERS_AT_ONCE = 2**23


def _segment_of_position(kind: str, n_positions: int) -> Int[Tensor, " position"] | None:
    if kind == "growing":
        return tokens.growing_segments(n_positions)
    if match := _SEGMENTS.fullmatch(kind):
        return tokens.equal_segments(n_positions, int(match[1]))
    return None


_SEGMENTS = re.compile(r"segments([1-9]\d{0,3})")
_PARTS = re.compile(r"parts([1-9]\d{0,3})")


def n_parts(name: str, n_positions: int) -> int:
    """Features per latent in a pooling.

    >>> n_parts("segments8", 128), n_parts("moment", 128), n_parts("growing", 128), n_parts("mean", 128)
    (8, 2, 7, 1)
    """
    kind = name.partition("-")[0]
    segment = _segment_of_position(kind, n_positions)
    if segment is not None:
        return int(segment.max()) + 1
    if match := _PARTS.fullmatch(kind):
        return int(match[1])
    return 2 if kind == "moment" else 1


def is_pooling_of_codes(name: str) -> bool:
    """Whether a name is that of a pooling that any SAE's codes can have, other than `mean`."""
    kind, _, own = name.partition("-")
    is_segmented = kind == "growing" or _SEGMENTS.fullmatch(kind) is not None
    is_whole = kind in ("moment", "max", "binary", "last") or _PARTS.fullmatch(kind) is not None
    return (is_whole and not own) or (is_segmented and own in ("", "mean"))
