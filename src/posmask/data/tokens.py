"""Turn texts into contexts of tokens with their positions, source texts and a mask of the tokens that are kept.

`keep` is set in this module: False for BOS, EOS and padding. A harvest also excludes attention sinks (`harvest.sinks`);
every later stage uses it as it is.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from posmask.errors import BadSetting, NothingToDo
from posmask.progress import announce
from posmask.seeds import generator

__all__ = [
    "TRAINING_SHARE",
    "VALIDATION_SHARE",
    "EvalSplit",
    "Key",
    "Split",
    "SplitTexts",
    "Tokenizer",
    "Tokens",
    "count_tokens",
    "equal_segments",
    "growing_segments",
    "pack",
    "pack_singly",
    "pad",
    "select_texts",
    "shift_length",
    "shifted",
    "split_of",
    "text_key",
    "unique_texts",
    "whole_text_key",
    "with_shuffled",
]

TRAINING_SHARE = 0.25
"""Fraction of all texts that SAEs may train on. It is small because labeled texts for evaluation are scarce."""
VALIDATION_SHARE = 0.2
"""Fraction of all texts that settings are chosen on, so that reported numbers come from texts not used for tuning."""
_PORTION_TEXTS, _PORTION_CHARACTERS = 256, 2**22
_SHARES = {
    "training": TRAINING_SHARE,
    "validation": VALIDATION_SHARE,
    "evaluation": 1 - TRAINING_SHARE - VALIDATION_SHARE,
}


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that posmask uses."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> Any:
        """The vocabulary's string for each id."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Tokens in contexts of equal length that start with BOS. Tokens that are not kept stay in their positions.

    Args:
        id: token ids.
        position: 0 for BOS, then 1, 2, ...
        text: index of the text that the token came from; -1 for BOS and padding.
        keep: whether the token counts in training and metrics.
        sentence: position in the sentence, from 1; 0 for tokens that are not kept.
        line: position in the line, from 1; 0 for tokens that are not kept.
        end: position counted backward from the last kept token of the text in this context, from 1; 0 for tokens that
            are not kept.
        text_position: position in the text, also if it began in an earlier context, from 1 to the last position of a
            context; 0 for tokens that are not kept.
    """

    id: Int[Tensor, "context position"]
    position: Int[Tensor, "context position"]
    text: Int[Tensor, "context position"]
    keep: Bool[Tensor, "context position"]
    sentence: Int[Tensor, "context position"]
    line: Int[Tensor, "context position"]
    end: Int[Tensor, "context position"]
    text_position: Int[Tensor, "context position"]

    @property
    def n_kept(self) -> int:
        """Number of kept tokens."""
        return int(self.keep.sum())


Split = Literal["training", "validation", "evaluation"]
EvalSplit = Literal["validation", "evaluation"]
"""The splits that metrics and probes may use."""


Key = Callable[[str], str]
"""A hash that is equal for texts that count as the same."""


def text_key(text: str) -> str:
    """The hash of embedded texts and datasets: of the first 200 characters in lower case, with white space collapsed.

    A truncated copy of a text therefore counts as the same text, unless it is shorter than 200 characters.
    """
    return hashlib.sha256(" ".join(text[:1000].lower().split())[:200].encode()).hexdigest()


def whole_text_key(text: str) -> str:
    """The hash of a user's texts: of all characters in lower case, with white space collapsed.

    Chats that begin with the same system prompt are different texts. For texts of at most 200 characters it equals
    `text_key`.
    """
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def split_of(text: str, key: Key = text_key) -> Split:
    """The split of a text, determined by its key alone.

    SAEs train on one split, metrics and probes use another, so no choice of files puts a text into both. Different
    texts may still share passages, such as the license at the head of source code.
    """
    fraction = int(key(text)[:8], 16) / 16**8
    if fraction < TRAINING_SHARE:
        return "training"
    return "validation" if fraction < TRAINING_SHARE + VALIDATION_SHARE else "evaluation"


def unique_texts(texts: Iterable[str], split: Split) -> list[str]:
    """The non-empty texts of one split in order, without duplicates by `text_key`."""
    return select_texts(texts, split).texts


@dataclass(frozen=True)
class SplitTexts:
    """The texts of one split, without duplicates, and what was left out to get them.

    Args:
        n_all: non-empty texts of all splits, with duplicates.
        n_duplicates: duplicates of this split, which are left out.
        n_cut: texts that were cut to `max_characters`.
    """

    split: Split
    texts: list[str]
    n_all: int
    n_duplicates: int
    n_cut: int
    max_characters: int | None

    def __str__(self) -> str:
        """A description for messages: `the 12 training texts (of 50 in all, ...)`."""
        parts = [f"of {self.n_all:,} in all, of which {_SHARES[self.split]:.0%} are for {self.split}"]
        if self.n_duplicates:
            parts.append(f"without {self.n_duplicates:,} duplicates")
        if self.n_cut:
            parts.append(f"{self.n_cut:,} of them cut to corpus.max_characters = {self.max_characters:,}")
        return f"{len(self.texts):,} {self.split} texts ({'; '.join(parts)})"


def select_texts(
    texts: Iterable[str], split: Split, *, key: Key = text_key, max_characters: int | None = None
) -> SplitTexts:
    """The non-empty texts of one split in order, without duplicates, cut to `max_characters`."""
    by_key: dict[str, str] = {}
    n_all = n_of_split = n_cut = 0
    for text in texts:
        if not text.strip():
            continue
        n_all += 1
        if split_of(text, key) != split:
            continue
        n_of_split += 1
        if (hashed := key(text)) not in by_key:
            by_key[hashed] = text[:max_characters]
            n_cut += len(by_key[hashed]) < len(text)
    return SplitTexts(split, list(by_key.values()), n_all, n_of_split - len(by_key), n_cut, max_characters)


def _token_ids(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """(BOS, EOS). A tokenizer that lacks one of them uses the other for both."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise NothingToDo("the tokenizer has neither a BOS nor an EOS token: set one, since contexts start with BOS")
    return (eos if bos is None else bos), (bos if eos is None else eos)  # type: ignore[return-value]


def _tokens(
    ids: Int[Tensor, "context position"],
    text: Int[Tensor, "context position"],
    keep: Bool[Tensor, "context position"],
    tokenizer: Tokenizer,
    text_position: Int[Tensor, "context position"] | None = None,
) -> Tokens:
    """Build `Tokens` with the positions in text, sentence and line and from the end.

    Args:
        text_position: positions in the text; None if each text is in one context.
    """
    position = torch.arange(ids.shape[1]).expand(len(ids), -1).contiguous()
    new_text = torch.ones_like(keep)
    new_text[:, 1:] = text[:, 1:] != text[:, :-1]
    starts = (new_text, *_starts(ids, text, keep, tokenizer))
    since = [position - torch.where(new, position, 0).cummax(1).values + 1 for new in starts]
    if text_position is not None:
        since[0] = text_position.clamp(max=ids.shape[1] - 1)
    continues = torch.zeros_like(keep)
    continues[:, :-1] = keep[:, 1:] & (text[:, 1:] == text[:, :-1])
    last = torch.where(continues, ids.shape[1], position).flip(1).cummin(1).values.flip(1)
    in_text, sentence, line, end = (counted.masked_fill(~keep, 0) for counted in (*since, last - position + 1))
    return Tokens(ids, position, text, keep, sentence, line, end, in_text)


def _starts(
    ids: Int[Tensor, "context position"],
    text: Int[Tensor, "context position"],
    keep: Bool[Tensor, "context position"],
    tokenizer: Tokenizer,
) -> tuple[Bool[Tensor, "context position"], Bool[Tensor, "context position"]]:
    """The tokens that start a sentence, and those that start a line.

    A line starts with a text and after a token that contains a newline. A sentence starts at the same tokens, and at
    a token that begins with a space if the token before it ends in . ! ? or …, optionally followed by quotes or
    brackets.
    """
    unique, inverse = ids.unique(return_inverse=True)
    words = [str(word) for word in tokenizer.convert_ids_to_tokens(unique.tolist())]
    newline = torch.tensor([any(mark in word for mark in ("\n", "\u010a", "<0x0A>")) for word in words])[inverse]
    stop = torch.tensor([word.rstrip("\"')]}\u2019\u201d").endswith((".", "!", "?", "\u2026")) for word in words])
    spaced = torch.tensor([word.startswith((" ", "\u0120", "\u2581")) for word in words])
    first = torch.ones_like(keep)
    first[:, 1:] = ~keep[:, :-1] | (text[:, 1:] != text[:, :-1])
    new_line, new_sentence = first.clone(), first.clone()
    new_line[:, 1:] |= newline[:, :-1]
    new_sentence[:, 1:] |= newline[:, :-1] | (stop[inverse[:, :-1]] & spaced[inverse[:, 1:]])
    return new_sentence, new_line


def pack(
    texts: list[str],
    tokenizer: Tokenizer,
    n_positions: int,
    kept_tokens: int,
    *,
    most_per_text: int | None = None,
    seed: int = 0,
    description: str | None = None,
) -> Tokens:
    """Concatenate texts in random order, separated by EOS, and cut them into contexts.

    Each context is BOS followed by n_positions - 1 tokens. BOS and EOS tokens within a text are not kept.

    Args:
        n_positions: tokens per context.
        kept_tokens: stop at the first context with which at least this many tokens are kept.
        most_per_text: longer texts are cut to this many tokens.
        seed: of the order of the texts.
        description: of the texts, for messages.

    Raises:
        NothingToDo: the texts have fewer tokens than `kept_tokens`, or the tokenizer has neither BOS nor EOS.
    """
    bos, eos = _special_ids(tokenizer)
    order = torch.randperm(len(texts), generator=generator(seed, "text order")).tolist()
    stream: list[np.ndarray] = []
    n_kept_in_stream = 0
    for numbers in _portions(order, texts):
        for number, ids in zip(numbers, _token_ids([texts[n] for n in numbers], tokenizer), strict=True):
            ids = ids[:most_per_text]
            row = np.full((len(ids) + 1, 3), number, dtype=np.int64)
            row[:-1, 0], row[-1, 0], row[:, 2] = ids, eos, np.arange(1, len(ids) + 2)
            stream.append(row)
            n_kept_in_stream += int(((row[:, 0] != bos) & (row[:, 0] != eos)).sum())
        if n_kept_in_stream > kept_tokens + 2 * n_positions:
            break
    width = n_positions - 1
    flat = np.concatenate(stream) if stream else np.zeros((0, 3), dtype=np.int64)
    contexts = torch.from_numpy(flat[: len(flat) // width * width]).reshape(-1, width, 3)
    keep = (contexts[..., 0] != bos) & (contexts[..., 0] != eos)
    n_kept = keep.sum(1).cumsum(0)
    if len(n_kept) == 0 or int(n_kept[-1]) < kept_tokens:
        raise NothingToDo(
            f"{kept_tokens:,} kept tokens are needed, but {description or f'the {len(texts):,} texts'} have "
            f"{n_kept_in_stream:,}, of which {int(n_kept[-1]) if len(n_kept) else 0:,} fill whole contexts of "
            f"{n_positions} positions: lower the number of tokens, or give more or longer texts"
        )
    n_contexts = int(torch.searchsorted(n_kept, kept_tokens)) + 1
    contexts, keep = contexts[:n_contexts], keep[:n_contexts]
    return _tokens(
        torch.cat([torch.full((n_contexts, 1), bos), contexts[..., 0]], 1),
        torch.cat([torch.full((n_contexts, 1), -1), contexts[..., 1]], 1),
        torch.cat([torch.zeros(n_contexts, 1, dtype=torch.bool), keep], 1),
        tokenizer,
        torch.cat([torch.zeros(n_contexts, 1, dtype=torch.int64), contexts[..., 2]], 1),
    )


def count_tokens(texts: list[str], tokenizer: Tokenizer, most: int) -> int:
    """The number of kept tokens of texts, at most `most`."""
    special, n_tokens = set(_special_ids(tokenizer)), 0
    for numbers in _portions(list(range(len(texts))), texts):
        for ids in _token_ids([texts[number] for number in numbers], tokenizer):
            n_tokens += sum(token not in special for token in ids)
        if n_tokens >= most:
            return most
    return n_tokens


def _portions(order: list[int], texts: Sequence[str]) -> Iterator[list[int]]:
    """Divide text indices into portions that are tokenized together: 256 texts, or fewer that are long."""
    portion: list[int] = []
    n_characters = 0
    for number in order:
        portion.append(number)
        n_characters += len(texts[number])
        if len(portion) == _PORTION_TEXTS or n_characters >= _PORTION_CHARACTERS:
            yield portion
            portion, n_characters = [], 0
    if portion:
        yield portion


def pack_singly(
    texts: list[str],
    tokenizer: Tokenizer,
    n_positions: int,
    kept_tokens: int,
    *,
    seed: int = 0,
    description: str | None = None,
) -> Tokens:
    """Put each text into a separate context, as `pad` does, in random order and until enough tokens are kept.

    Arguments and errors are those of `pack`. The rest of a text that is longer than a context is not used, so that the
    position in the context is the position in the text.
    """
    bos, eos = _special_ids(tokenizer)
    order = torch.randperm(len(texts), generator=generator(seed, "text order")).tolist()
    rows: list[tuple[int, list[int]]] = []
    n_kept = n_longer = 0
    for numbers in _portions(order, texts):
        for number, ids in zip(numbers, _token_ids([texts[n] for n in numbers], tokenizer), strict=True):
            if n_kept < kept_tokens:
                rows.append((number, ids[: n_positions - 1]))
                n_kept += sum(token not in (bos, eos) for token in rows[-1][1])
                n_longer += len(ids) >= n_positions
        if n_kept >= kept_tokens:
            break
    else:
        raise NothingToDo(
            f"{kept_tokens:,} kept tokens are needed, but {description or f'the {len(texts):,} texts'} have {n_kept:,} "
            f"in their first {n_positions - 1} tokens: lower the number of tokens, or give more texts"
        )
    if n_longer:
        announce(f"{n_longer:,} of {len(rows):,} texts are longer than a context; the rest of them is not used.")
    return _padded(rows, tokenizer, n_positions)


def pad(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    n_positions: int,
    groups_at_offsets: Int[Tensor, " text"] | None = None,
    *,
    seed: int = 0,
) -> Tokens:
    """Put each text into a separate context: BOS, the truncated text, then padding (EOS ids that are not kept).

    Context i holds text i. BOS and EOS tokens within a text are not kept.

    Args:
        n_positions: tokens per context.
        groups_at_offsets: the group of each text, in ascending order. The texts of a group then stand at one random
            position at which the longest of them fits, after the end of the first texts of the groups before it,
            which is not kept. None: texts stand after BOS.
        seed: of the random positions.

    Raises:
        NothingToDo: the tokenizer has neither BOS nor EOS.
    """
    rows = _token_ids(list(texts), tokenizer)
    before = [] if groups_at_offsets is None else _before(rows, groups_at_offsets.tolist(), n_positions, seed)
    return _padded(list(enumerate(rows)), tokenizer, n_positions, before)


def _before(rows: list[list[int]], group_of: list[int], n_positions: int, seed: int) -> list[list[int]]:
    """Token ids that stand before each row, the same for all rows of a group."""
    random, before = generator(seed, "offsets"), []
    for group in dict.fromkeys(group_of):
        members = [row for row, its_group in zip(rows, group_of, strict=True) if its_group == group]
        room = max(0, n_positions - 1 - max(map(len, members)))
        offset = int(torch.randint(room + 1, (), generator=random))
        others: list[int] = []
        number = group
        while len(others) < offset and number - 1 > group - len(rows):
            number -= 1
            others = [*rows[group_of.index(number % (group_of[-1] + 1))], *others]
        before += [others[len(others) - offset :] if offset else []] * len(members)
    return before


def _padded(
    rows: Sequence[tuple[int, list[int]]],
    tokenizer: Tokenizer,
    n_positions: int,
    before: Sequence[list[int]] = (),
) -> Tokens:
    """A context per row (text index, token ids); `before` stands between BOS and each row and is not kept."""
    bos, eos = _special_ids(tokenizer)
    ids = torch.full((len(rows), n_positions), eos, dtype=torch.int64)
    text = torch.full((len(rows), n_positions), -1, dtype=torch.int64)
    ids[:, 0] = bos
    for context, (number, row) in enumerate(rows):
        other = before[context] if before else []
        start = 1 + len(other)
        ids[context, 1:start] = torch.tensor(other, dtype=torch.int64)
        row = row[: n_positions - start]
        ids[context, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        text[context, start : start + len(row)] = number
    return _tokens(ids, text, (text >= 0) & (ids != bos) & (ids != eos), tokenizer)


def with_shuffled(tokens: Tokens, contexts: Int[Tensor, " chosen"], tokenizer: Tokenizer, *, seed: int = 0) -> Tokens:
    """Append copies of some contexts with their kept tokens in random order.

    Args:
        contexts: indices of the contexts to copy. Copy i has text index `tokens.text.max() + 1 + i`.
        seed: of the random order.
    """
    random = generator(seed, "shuffled tokens")
    ids = tokens.id[contexts].clone()
    for row, keep in zip(ids, tokens.keep[contexts], strict=True):
        kept = row[keep]
        row[keep] = kept[torch.randperm(len(kept), generator=random)]
    first = int(tokens.text.max()) + 1
    number = torch.arange(first, first + len(contexts))[:, None]
    text = torch.where(tokens.text[contexts] >= 0, number, -1)
    return _tokens(
        torch.cat([tokens.id, ids]),
        torch.cat([tokens.text, text]),
        torch.cat([tokens.keep, tokens.keep[contexts]]),
        tokenizer,
    )


def shifted(
    texts: list[str],
    tokenizer: Tokenizer,
    n_positions: int,
    n_texts: int,
    n_windows: int,
    *,
    seed: int = 0,
    description: str | None = None,
) -> Tokens:
    """Build the shift design: the beginnings of `n_texts` texts, each placed once in each of `n_windows` windows.

    A context is BOS, other text that ends with EOS, and the piece, which fills its window. Only the piece is kept, and
    `text` is the index of the piece. The context after BOS is divided into n_windows + 1 stretches of `shift_length`
    tokens. The first stretch is not a window, so every piece has other text before it. Texts are drawn in random order
    without their BOS and EOS; texts too short for a piece serve as the other text.

    Args:
        n_positions: tokens per context.
        n_texts: number of pieces.
        n_windows: windows per piece, so n_texts * n_windows contexts.
        seed: of the order of the texts.
        description: of the texts, for messages.

    Raises:
        BadSetting: a window has fewer than two tokens.
        NothingToDo: too few texts are long enough, or the tokenizer has neither BOS nor EOS.
    """
    bos, eos = _special_ids(tokenizer)
    length = shift_length(n_positions, n_windows)
    pieces: list[list[int]] = []
    preceding: list[int] = []
    per_piece = length * n_windows
    order = torch.randperm(len(texts), generator=generator(seed, "shift texts")).tolist()
    for numbers in _portions(order, texts):
        for row in _token_ids([texts[number] for number in numbers], tokenizer):
            row = [token for token in row if token not in (bos, eos)]
            if len(pieces) < n_texts and len(row) >= length:
                pieces.append(row[:length])
            elif len(preceding) < n_texts * per_piece:
                preceding += row
        if len(pieces) == n_texts and len(preceding) >= n_texts * per_piece:
            break
    if len(pieces) < n_texts or len(preceding) < n_texts * per_piece:
        raise NothingToDo(
            f"the shift design needs {n_texts} texts of {length} tokens and {n_texts * per_piece:,} tokens before "
            f"them, but {description or f'{len(texts):,} texts'} give {len(pieces)} and {len(preceding):,}: lower "
            "evaluation.shift_texts, or give more texts"
        )
    ids = torch.full((n_texts * n_windows, n_positions), eos, dtype=torch.int64)
    ids[:, 0] = bos
    text = torch.full_like(ids, -1)
    for number, piece in enumerate(pieces):
        context = torch.tensor(preceding[number * per_piece : (number + 1) * per_piece])
        for window in range(n_windows):
            row, first = number * n_windows + window, 1 + (window + 1) * length
            ids[row, 1 : first - 1] = context[: first - 2]
            ids[row, first : first + length] = torch.tensor(piece)
            text[row, first : first + length] = number
    return _tokens(ids, text, text >= 0, tokenizer)


def shift_length(n_positions: int, n_windows: int) -> int:
    """Tokens per window of the shift design.

    Raises:
        BadSetting: fewer than two.
    """
    length = (n_positions - 1) // (n_windows + 1)
    if length < 2:
        raise BadSetting(
            f"{n_windows} shift windows leave {length} tokens of {n_positions} positions to each, but 2 are needed: "
            "lower shift_windows"
        )
    return length


def equal_segments(n_positions: int, n_segments: int) -> Int[Tensor, " position"]:
    """The segment of each position, for segments of equal length."""
    return torch.arange(n_positions) * n_segments // n_positions


def growing_segments(n_positions: int) -> Int[Tensor, " position"]:
    """The segment of each position, for segments that double in length: positions 1, 2-3, 4-7, ...

    >>> growing_segments(10).tolist()
    [0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    """
    return torch.tensor([max(position, 1).bit_length() - 1 for position in range(n_positions)])
