"""Pool the codes of a text's tokens into one row of features per text, sparse and outside of memory.

Poolings differ in the tokens that they combine and in the divisor:

    mean         sum over the kept tokens of a text / their number, as in SAEBench
    fair         the same sum / the number of kept tokens at which the latent is open, so that a latent open at 16 of
                 127 positions is not diluted by the other 111. Equal to mean if every latent is open everywhere
    segments<n>  the mean in each of n equal segments of the context, concatenated
    growing<n>   the same in segments that double in length: positions 1, 2-3, 4-7, ...
    last         the last kept token of the text
"""

import tempfile
import weakref
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.kernels import operations
from posmask.masks.base import PositionOrigin
from posmask.sae.autoencoder import Codes

__all__ = ["PooledTexts", "Pooling"]

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

    def weighted_sums(self, weight: Float[Tensor, "text column"]) -> Float[Tensor, "column feature"]:
        """sum over texts of weight[text, column] * row[text, feature], in float64."""
        return operations.weighted_sums(self._blocks(), weight.double().to(self.device), self.n_features)

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
        n_texts: number of texts.
        n_features: latents of the SAE, or channels of the model.
        segment_of_position: the segment that the tokens of each position are pooled in; None pools all together.
        live: 1 where a latent is open, else 0. If given, a latent's sum is divided by the number of kept tokens of the
            text (in the segment) at which the latent is open, instead of by all of them.
        position_origin: from where the positions of `live` are counted.
        last_token_only: use only the last kept token of each text.
        device: of the batches and codes.
    """

    def __init__(
        self,
        n_texts: int,
        n_features: int,
        *,
        segment_of_position: Int[Tensor, " position"] | None = None,
        live: Float[Tensor, "position latent"] | None = None,
        position_origin: PositionOrigin = "context",
        last_token_only: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._segment = None if segment_of_position is None else segment_of_position.to(device)
        self._n_segments = 1 if segment_of_position is None else int(segment_of_position.max()) + 1
        self._live = None if live is None else live.to(device)
        self._position_origin: PositionOrigin = position_origin
        self._last = last_token_only
        self._n_latents = n_features
        self.texts = PooledTexts(n_texts, n_features * self._n_segments, device)

    def update(self, batch: Batch, codes: Codes | None) -> None:
        """Add kept tokens (`batch.kept()`) with their sparse codes, or with their vectors if `codes` is None.

        All tokens of a text must be in one batch, as in `evaluation_batches` of padded texts.

        Raises:
            DegenerateResult: a number is NaN or infinite.
        """
        text, inverse = batch.text.long().unique(return_inverse=True)
        assert int(self.texts.n_tokens[text.cpu()].sum()) == 0, "a text's tokens came in two batches"
        self.texts.n_tokens[text.cpu()] = operations.counts(inverse, len(text)).cpu()
        if self._last:
            last = torch.zeros_like(text).scatter_reduce_(
                0, inverse, torch.arange(len(inverse), device=text.device), "amax"
            )
            batch, inverse = batch.select(last), inverse[last]
            codes = None if codes is None else codes.select(last)
        segment = 0 if self._segment is None else self._segment[batch.position.long()]
        row = inverse * self._n_segments + segment
        total = torch.zeros(len(text) * self._n_segments, self._n_latents, device=text.device)
        if codes is None:
            operations.add_at_(total, row, batch.vectors.float())
        else:
            operations.add_at_(total.view(-1), row[codes.token] * self._n_latents + codes.latent, codes.value)
        if self._live is None:
            divisor = operations.counts(row, len(total))[:, None].float()
        else:
            entry = row * len(self._live) + batch.positions(self._position_origin).long()
            tokens_at = operations.counts(entry, len(total) * len(self._live)).view(len(total), -1)
            divisor = tokens_at.float() @ self._live
        pooled = (total / divisor.clamp(min=1)).view(len(text), -1)
        self.texts.add(text, pooled)
