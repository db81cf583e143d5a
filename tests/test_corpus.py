import pytest
import torch

from conftest import WORDS, make_texts
from posmask.data.tokens import Tokens, pack, pack_singly, pad, shifted, split_of, unique_texts, with_shuffled
from posmask.errors import BadSetting, NothingToDo


def test_packed_contexts_start_with_bos_and_contain_the_texts_in_sequence(tokenizer):
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


def test_packing_too_few_tokens_raises_an_error_with_the_numbers(tokenizer):
    with pytest.raises(
        NothingToDo,
        match="500 kept tokens are needed, but the 2 texts have 60, of which 59 fill whole contexts of 16 positions",
    ):
        pack(make_texts(2), tokenizer, 16, 500)
    with pytest.raises(NothingToDo, match="but the 0 texts have 0"):
        pack([], tokenizer, 16, 1)
    with pytest.raises(NothingToDo, match="but 3 of my texts have 90"):
        pack(make_texts(3), tokenizer, 16, 100, description="3 of my texts")
    with pytest.raises(NothingToDo, match="but 3 of my texts give 3 and 0: lower"):
        shifted(make_texts(3), tokenizer, 16, 4, 4, description="3 of my texts")


def test_special_tokens_inside_texts_do_not_count_as_kept_when_reading_stops(tokenizer):
    chats = [" ".join(["<bos> <eos>"] * 19 + [word, word]) for word in WORDS * 100]
    tokens = pack(chats, tokenizer, 16, 2000)
    assert 2000 <= tokens.n_kept < 2016


def test_long_and_short_texts_are_packed_alike(tokenizer, monkeypatch):
    texts = make_texts(20)
    first = pack(texts, tokenizer, 16, 200)
    monkeypatch.setattr("posmask.data.tokens._PORTION_CHARACTERS", 1)
    assert torch.equal(pack(texts, tokenizer, 16, 200).id, first.id)


def test_packing_short_texts_uses_all_their_tokens(tokenizer):
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:5]]
    assert pack(texts, tokenizer, 16, 3 * len(texts) - 60).n_kept > 3 * len(texts) - 60 - 1


def test_long_texts_are_cut_so_that_many_texts_are_packed(tokenizer):
    texts = [" ".join(make_texts(20)[index:] + make_texts(20)[:index]) for index in range(20)]
    tokens = pack(texts, tokenizer, 16, 600, most_per_text=40)
    counts = tokens.text[tokens.keep].unique(return_counts=True)[1]
    assert len(counts) >= 15
    assert int(counts.max()) == 40


def test_packing_is_determined_by_the_seed(tokenizer):
    texts = make_texts(20)
    first = pack(texts, tokenizer, 16, 200, seed=0)
    assert torch.equal(first.id, pack(texts, tokenizer, 16, 200, seed=0).id)
    assert not torch.equal(first.id[:12], pack(texts, tokenizer, 16, 200, seed=1).id[:12])


def test_padded_texts_keep_only_their_words(tokenizer):
    tokens = pad(["red house", "", "old <eos> tree"], tokenizer, 6)
    assert isinstance(tokens, Tokens)
    assert tokens.keep.tolist() == [
        [False, True, True, False, False, False],
        [False] * 6,
        [False, True, False, True, False, False],
    ]


def test_positions_in_the_text_continue_in_the_next_context(tokenizer):
    texts = make_texts(6, n_words=40)
    tokens = pack(texts, tokenizer, 16, 180)
    keep, position = tokens.keep[:, 1:].reshape(-1), tokens.text_position[:, 1:].reshape(-1)
    place = torch.arange(len(keep)) % 41 + 1  # A text is 40 words and EOS.
    assert torch.equal(keep, place < 41)
    assert torch.equal(position, torch.where(keep, place.clamp(max=15), 0))
    assert not bool(tokens.text_position[:, 0].any())


def test_positions_in_a_text_of_one_context_count_from_its_first_token(tokenizer):
    padded = pad(["red house", "old <eos> tree"], tokenizer, 6)
    assert padded.text_position.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 0, 3, 0, 0]]
    tokens = shifted(make_texts(20), tokenizer, 16, 3, 4)
    for row in range(12):
        assert tokens.text_position[row][tokens.keep[row]].tolist() == [1, 2, 3]


def test_texts_are_packed_one_per_context(tokenizer, capsys):
    texts = make_texts(10, n_words=5) + make_texts(10, n_words=40, seed=1)
    tokens = pack_singly(texts, tokenizer, 16, 100)
    assert 100 <= tokens.n_kept < 115
    assert torch.equal(tokens.text_position[tokens.keep], tokens.position[tokens.keep].long())
    for ids, keep, number in zip(tokens.id, tokens.keep, tokens.text[:, 1].tolist(), strict=True):
        assert tokenizer.decode(ids[keep]) == " ".join(texts[number].split()[:15])
    n_longer = int((tokens.text[:, 1] >= 10).sum())
    assert n_longer > 0
    assert f"{n_longer} of {len(tokens.id)} texts are longer than a context" in capsys.readouterr().err
    assert torch.equal(pack_singly(texts, tokenizer, 16, 100).id, tokens.id)
    with pytest.raises(NothingToDo, match="300 kept tokens are needed, but my texts have 200 in their first 15 tokens"):
        pack_singly(texts, tokenizer, 16, 300, description="my texts")


def test_the_split_depends_only_on_the_text():
    texts = make_texts(400, n_words=8)
    sides = [unique_texts(texts * 2, split) for split in ("training", "validation", "evaluation")]
    assert sorted(text for side in sides for text in side) == sorted(set(texts))
    for side, share in zip(sides, (0.25, 0.2, 0.55), strict=True):
        assert abs(len(side) / len(texts) - share) < 0.08
    assert split_of("  Red\n HOUSE ") == split_of("red house")


def test_a_truncated_copy_counts_as_the_same_text():
    (long,) = make_texts(1, n_words=200)
    for end in (300, 500, 900):
        assert split_of(long[:end]) == split_of(long)
    assert len(unique_texts([long, long[:300]], split_of(long))) == 1


def test_shuffled_copies_have_the_same_tokens_in_another_order(tokenizer):
    tokens = pad(make_texts(6, n_words=10), tokenizer, 16)
    shuffled = with_shuffled(tokens, torch.tensor([2, 4]), tokenizer)
    assert torch.equal(shuffled.id[:6], tokens.id)
    assert shuffled.text.max() == 7
    for copy, context in ((6, 2), (7, 4)):
        assert torch.equal(shuffled.keep[copy], tokens.keep[context])
        assert sorted(shuffled.id[copy].tolist()) == sorted(tokens.id[context].tolist())
        assert not torch.equal(shuffled.id[copy], tokens.id[context])
        assert set(shuffled.text[copy].tolist()) == {-1, copy}
        assert shuffled.id[copy, 0] == tokenizer.bos_token_id


def test_the_shift_design_puts_every_piece_into_every_window_once(tokenizer):
    tokens = shifted(make_texts(60), tokenizer, 16, n_texts=8, n_windows=4)
    assert tokens.id.shape == (32, 16)
    assert tokens.n_kept == 8 * 4 * 3
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for text in range(8):
        rows = ((tokens.text == text).any(1)).nonzero()[:, 0].tolist()
        seen = [tokens.id[row][tokens.keep[row]].tolist() for row in rows]
        assert all(piece == seen[0] for piece in seen)
        starts = [int(tokens.keep[row].nonzero()[0]) for row in rows]
        assert starts == [4, 7, 10, 13]
        for row, start in zip(rows, starts, strict=True):  # another text precedes, ended by EOS
            assert tokens.id[row, 0] == tokenizer.bos_token_id
            assert tokens.id[row, start - 1] == tokenizer.eos_token_id
            assert not set(tokens.id[row, 1 : start - 1].tolist()) & special


def test_the_shift_design_draws_from_all_texts(tokenizer):
    texts = ["red red red red"] * 30 + ["sea sea sea sea"] * 30
    tokens = shifted(texts, tokenizer, 16, n_texts=10, n_windows=4)
    assert len(set(tokens.id[tokens.keep].tolist())) == 2


def test_a_shift_design_with_too_few_texts_or_positions_raises_an_error(tokenizer):
    with pytest.raises(NothingToDo, match=r"needs 8 texts of 3 tokens .* 5 texts give 5"):
        shifted(make_texts(5), tokenizer, 16, n_texts=8, n_windows=4)
    with pytest.raises(BadSetting, match="9 shift windows leave 1 tokens of 16 positions"):
        shifted(make_texts(60), tokenizer, 16, n_texts=8, n_windows=9)


def test_contexts_start_with_eos_if_there_is_no_bos_and_need_either_token(tokenizer):
    class Without:
        def __init__(self, **ids):
            self.bos_token_id = ids.get("bos")
            self.eos_token_id = ids.get("eos")

        def __call__(self, text, *, add_special_tokens):
            return tokenizer(text, add_special_tokens=add_special_tokens)

        def convert_ids_to_tokens(self, ids):
            return tokenizer.convert_ids_to_tokens(ids)

    eos = tokenizer.eos_token_id
    tokens = pad(["red blue", ""], Without(eos=eos), 5)
    assert tokens.id[0, 0] == eos
    assert tokens.keep.tolist() == [[False, True, True, False, False], [False] * 5]
    with pytest.raises(NothingToDo, match="neither a BOS nor an EOS token"):
        pad(["red"], Without(), 5)


class Pieces:
    """A tokenizer that splits texts at |, into tokens in the byte-level alphabet of GPT-2."""

    bos_token_id, eos_token_id = 0, 1

    def __init__(self):
        self.words = ["<bos>", "<eos>"]

    def __call__(self, text, *, add_special_tokens):
        rows = [line.split("|") if line else [] for line in text]
        for word in [word for row in rows for word in row]:
            if word not in self.words:
                self.words.append(word)
        return {"input_ids": [[self.words.index(word) for word in row] for row in rows]}

    def convert_ids_to_tokens(self, ids):
        return [self.words[number] for number in ids]


def test_positions_are_counted_from_the_sentence_the_line_and_the_end():
    text = 'He|\u0120said|\u0120yes|."|\u0120Pi|\u0120is|\u01203|.|14|!|\u0120So|\u010a|It|\u0120is'
    tokens = pad([text, "Two|\u0120words"], Pieces(), 20)
    #                       He said yes ." Pi is 3 . 14 ! So \n It is
    assert tokens.sentence[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 1, 2, 1, 2, *[0] * 5]
    assert tokens.line[0].tolist() == [0, *range(1, 13), 1, 2, *[0] * 5]
    assert tokens.end[0].tolist() == [0, *range(14, 0, -1), *[0] * 5]
    assert tokens.end[1].tolist() == [0, 2, 1, *[0] * 17]
    packed = pack(["a|b|c.|\u0120d"] * 3, Pieces(), 8, 8)
    #                                     a b c. d EOS a b
    assert packed.sentence[0].tolist() == [0, 1, 2, 3, 1, 0, 1, 2]
    assert packed.line[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed.end[0].tolist() == [0, 4, 3, 2, 1, 0, 2, 1]  # the second text continues in the next context


def test_every_kept_token_has_a_position_from_every_origin(tokenizer):
    for tokens in (
        pack(make_texts(30), tokenizer, 16, 500),
        pad(make_texts(5), tokenizer, 16),
        shifted(make_texts(60), tokenizer, 16, n_texts=8, n_windows=4),
    ):
        for counted in (tokens.sentence, tokens.line, tokens.end):
            assert bool(((counted > 0) == tokens.keep).all())
            assert int(counted.max()) <= 15
