"""Active codes of many tokens, stored by blocks of latents so that statistics of each latent need little memory."""

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

import numpy as np
import torch
from torch import Tensor

from posmask.data.activations import Batch
from posmask.sae.autoencoder import Codes

__all__ = ["LATENTS_PER_BLOCK", "MOST_BYTES_IN_MEMORY", "StoredCodes"]

LATENTS_PER_BLOCK = 512
_ENTRY = np.dtype([("token", np.int32), ("latent", np.int32), ("value", np.float32)])
MOST_BYTES_IN_MEMORY = 2**28


class StoredCodes:
    """The codes of an SAE on many tokens, with the fields of the tokens but without their vectors.

    Codes are on the host, from 256 MB on in a temporary file. They are read back one block of latents at a time.

    Args:
        d_sae: number of latents.
    """

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self._batches: list[Batch] = []
        self._n_tokens = 0
        self._portions: list[tuple[np.ndarray | int, np.ndarray]] = []  # entries or their place, ends of blocks
        self._n_bytes_in_memory = 0
        self._file: IO[bytes] | None = None

    def add(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes."""
        block = (codes.latent // LATENTS_PER_BLOCK).cpu()
        order = torch.sort(block, stable=True).indices
        entries = np.empty(len(order), _ENTRY)
        entries["token"] = (codes.token.cpu()[order] + self._n_tokens).numpy()
        entries["latent"] = codes.latent.cpu()[order].numpy()
        entries["value"] = codes.value.detach().cpu()[order].numpy()
        ends = torch.bincount(block, minlength=self.n_blocks).cumsum(0).numpy()
        self._portions.append((entries, ends))
        self._n_bytes_in_memory += entries.nbytes
        self._batches.append(replace(batch, vectors=batch.vectors[:, :0]).to(torch.device("cpu")))
        self._n_tokens += len(batch)
        if self._n_bytes_in_memory > MOST_BYTES_IN_MEMORY:
            self._write()

    @property
    def n_blocks(self) -> int:
        """Number of blocks of latents."""
        return -(-self.d_sae // LATENTS_PER_BLOCK)

    @property
    def batch(self) -> Batch:
        """All tokens, with vectors of no numbers."""
        columns = zip(*(vars(batch).values() for batch in self._batches), strict=True)
        return Batch(*(torch.cat(column) for column in columns))

    def blocks(self) -> Iterator[tuple[slice, Codes]]:
        """The codes of each block of latents: which latents, and codes that count latents from the block's first."""
        for number in range(self.n_blocks):
            latents = slice(number * LATENTS_PER_BLOCK, min((number + 1) * LATENTS_PER_BLOCK, self.d_sae))
            entries = np.concatenate([self._part(*portion, number) for portion in self._portions] or [_NO_ENTRIES])
            token, latent, value = (_as_tensor(entries[name]) for name in ("token", "latent", "value"))
            n_latents = latents.stop - latents.start
            yield latents, Codes(token.long(), latent.long() - latents.start, value, self._n_tokens, n_latents)

    def _part(self, place: np.ndarray | int, ends: np.ndarray, number: int) -> np.ndarray:
        start, end = (int(ends[number - 1]) if number else 0), int(ends[number])
        if isinstance(place, np.ndarray):
            return place[start:end]
        assert self._file is not None
        self._file.seek(place + start * _ENTRY.itemsize)
        return np.frombuffer(self._file.read((end - start) * _ENTRY.itemsize), _ENTRY)

    def _write(self) -> None:
        """Move the entries in memory to the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when this is collected)
            weakref.finalize(self, self._file.close)
        self._file.seek(0, 2)
        for number, (entries, ends) in enumerate(self._portions):
            if isinstance(entries, np.ndarray):
                self._portions[number] = (self._file.tell(), ends)
                self._file.write(entries.tobytes())
        self._n_bytes_in_memory = 0


_NO_ENTRIES = np.empty(0, _ENTRY)


def _as_tensor(column: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column))
