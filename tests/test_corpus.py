import pytest
import torch

from conftest import WORDS, make_texts
from posmask.corpus import Tokens, pack, pad, split_of, unique_texts
from posmask.errors import NothingToDo


def test_packed_contexts_start_with_bos_and_hold_the_texts_in_a_row(tokenizer):
    texts = make_texts(20)
    tokens = pack(texts, tokenizer, 16, 200)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert bool((tokens.id[:, 0] == bos).all())
    assert torch.equal(tokens.keep, (tokens.id != bos) & (tokens.id != eos))
    assert torch.equal(tokens.position[0], torch.arange(16))
    assert 200 <= tokens.n_kept < 215
    for number in tokens.text[tokens.keep].unique().tolist():
        words = tokenizer.decode(tokens.id[tokens.keep & (tokens.text == number)])
        assert texts[number].startswith(words)


def test_packing_stops_at_what_there_is(tokenizer):
    with pytest.raises(NothingToDo, match="500 kept tokens were asked for, but the 2 texts have"):
        pack(make_texts(2), tokenizer, 16, 500)
    with pytest.raises(NothingToDo, match="but the 0 texts have 0"):
        pack([], tokenizer, 16, 1)


def test_packing_short_texts_finds_all_their_tokens(tokenizer):
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:5]]
    assert pack(texts, tokenizer, 16, 3 * len(texts) - 60).n_kept > 3 * len(texts) - 60 - 1


def test_packing_repeats_with_the_seed_and_differs_with_another(tokenizer):
    texts = make_texts(20)
    first = pack(texts, tokenizer, 16, 200, seed=0)
    assert torch.equal(first.id, pack(texts, tokenizer, 16, 200, seed=0).id)
    assert not torch.equal(first.id[:12], pack(texts, tokenizer, 16, 200, seed=1).id[:12])


def test_padded_texts_keep_only_their_own_words(tokenizer):
    tokens = pad(["red house", "", "old <eos> tree"], tokenizer, 6)
    assert isinstance(tokens, Tokens)
    assert tokens.keep.tolist() == [
        [False, True, True, False, False, False],
        [False] * 6,
        [False, True, False, True, False, False],
    ]


def test_the_split_depends_on_the_text_alone():
    texts = make_texts(400, n_words=8)
    training, evaluation = unique_texts(texts * 2, "training"), unique_texts(texts, "evaluation")
    assert len(training) + len(evaluation) == len(set(texts))
    assert 0.15 < len(training) / len(texts) < 0.35
    assert split_of("  Red\n HOUSE ") == split_of("red house")


def test_a_text_that_another_table_cuts_off_is_the_same_text():
    (long,) = make_texts(1, n_words=200)
    for end in (300, 500, 900):
        assert split_of(long[:end]) == split_of(long)
    assert len(unique_texts([long, long[:300]], split_of(long))) == 1
