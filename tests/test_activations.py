import itertools
import shutil
import threading

import pytest
import torch

from conftest import N_POSITIONS, make_texts
from posmask.data import harvest as data_harvest
from posmask.data.activations import Activations, evaluation_batches, training_batches
from posmask.data.harvest import harvest
from posmask.data.reading import read_ahead
from posmask.data.sites import LanguageModel
from posmask.data.tokens import pack, pad
from posmask.errors import BadSetting, DamagedFolder, DegenerateResult, NothingToDo
from posmask.storage.manifest import Parts


def test_vectors_are_the_models_hidden_states(causal_lm, language_model, tokenizer):
    tokens = pack(make_texts(10), tokenizer, N_POSITIONS, 100)
    with torch.no_grad():
        expected = causal_lm(tokens.id, output_hidden_states=True).hidden_states[2]
    assert torch.equal(language_model.vectors(tokens.id), expected)


def test_a_missing_layer_raises_an_error(causal_lm):
    with pytest.raises(BadSetting, match="layer = 4 does not exist: the model has 3 layers"):
        LanguageModel(causal_lm, layer=4)


def test_contexts_longer_than_the_model_supports_raise_an_error(language_model, tokenizer, tmp_path):
    tokens = pad(make_texts(2), tokenizer, 65)
    with pytest.raises(BadSetting, match="n_positions = 65 is more than the 64 positions"):
        harvest(tokens, language_model, tmp_path / "a", {}, "long")


def test_harvested_tokens_carry_position_text_and_keep(causal_lm, language_model, tokenizer, tmp_path):
    texts = [*make_texts(5, n_words=4), *make_texts(5, n_words=40)]
    tokens = pad(texts, tokenizer, N_POSITIONS)
    harvested = harvest(tokens, language_model, tmp_path / "a", {}, "test")
    with torch.no_grad():
        expected = causal_lm(tokens.id, output_hidden_states=True).hidden_states[2]
    assert harvested.n_kept == tokens.n_kept == 5 * 4 + 5 * 15
    seen = set()
    for batch in evaluation_batches(harvested, batch_tokens=7):
        for vector, position, token, text, keep in zip(
            batch.vectors, batch.position, batch.token_id, batch.text, batch.keep, strict=True
        ):
            if keep:
                seen.add((int(text), int(position)))
                assert tokens.id[text, position] == token
                torch.testing.assert_close(vector, expected[text, position])
            else:
                assert (int(position), int(text)) == (0, -1)
    assert len(seen) == tokens.n_kept


def test_a_finished_harvest_is_not_recomputed(activations, tokenizer):
    tokens = pack(make_texts(40), tokenizer, N_POSITIONS, 500)
    again = harvest(tokens, None, activations.folder, {"what": "test"}, "test")
    assert again.n_tokens == activations.n_tokens


def test_a_flipped_byte_in_a_shard_is_detected_before_use(activations, tmp_path):
    shutil.copytree(activations.folder, tmp_path / "a")
    shard = next((tmp_path / "a").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedFolder, match=r"shard-00000\.safetensors is not what was written"):
        Activations(tmp_path / "a")


def test_an_empty_or_nan_harvest_raises_an_error(causal_lm, language_model, tokenizer, tmp_path):
    with pytest.raises(NothingToDo, match="none of the 16 tokens of empty is kept"):
        harvest(pad([""], tokenizer, N_POSITIONS), language_model, tmp_path / "a", {}, "empty")

    class Broken(LanguageModel):
        def vectors(self, ids):
            return super().vectors(ids) * torch.nan

    with pytest.raises(DegenerateResult, match="NaN or infinite vectors"):
        harvest(pad(["red house"], tokenizer, N_POSITIONS), Broken(causal_lm, 2), tmp_path / "a", {}, "broken")
    assert list(tmp_path.iterdir()) == []


def test_training_batches_contain_every_kept_token_once_per_epoch_by_position(activations):
    n_batches = activations.n_kept // 100
    seen = []
    for batch in training_batches(activations, 100, n_batches, seed=0):
        assert bool(batch.keep.all())
        assert bool((batch.position.diff() >= 0).all())
        seen += [tuple(vector.tolist()) for vector in batch.vectors]
    assert len(seen) == n_batches * 100
    stored = {tuple(vector.tolist()) for vector in activations.batch(activations.keep.nonzero()[:, 0]).vectors}
    assert set(seen) <= stored
    again = next(iter(training_batches(activations, 100, 1, seed=0)))
    other = next(iter(training_batches(activations, 100, 1, seed=1)))
    assert tuple(again.vectors[0].tolist()) == seen[0]
    assert not torch.equal(again.vectors, other.vectors)


def test_a_batch_larger_than_the_data_raises_an_error(activations):
    with pytest.raises(NothingToDo, match=r"batch_tokens = 100,000 is more than the [\d,]+ kept tokens"):
        next(iter(training_batches(activations, 100_000, 1, seed=0)))


def test_dropped_tokens_have_no_effect_on_training_batches(activations, language_model, tokenizer, tmp_path):
    tokens = pack(make_texts(200), tokenizer, N_POSITIONS, 3000)

    class NanWhereDropped(LanguageModel):
        def vectors(self, ids):
            hidden = super().vectors(ids)
            special = (ids == tokenizer.bos_token_id) | (ids == tokenizer.eos_token_id)
            return hidden.masked_fill(special[..., None], torch.nan)

    from transformers import AutoModelForCausalLM

    model = NanWhereDropped(AutoModelForCausalLM.from_pretrained(tokenizer_folder(language_model)).eval(), 2)
    broken = harvest(tokens, model, tmp_path / "a", {}, "test")
    assert isinstance(broken, Activations)
    for constant, expected in zip(broken.center_and_scale, activations.center_and_scale, strict=True):
        assert torch.equal(constant, expected)
    batches = training_batches(broken, 64, 50, 0)
    for batch, expected in zip(batches, training_batches(activations, 64, 50, 0), strict=True):
        assert torch.equal(batch.vectors, expected.vectors)


def tokenizer_folder(language_model):
    return language_model._body.config._name_or_path


def test_training_batches_resume_after_a_number_of_batches(activations):
    all_batches = list(training_batches(activations, 512, 12, seed=3))
    resumed = list(training_batches(activations, 512, 7, seed=3, after=5))
    assert len(resumed) == 7
    for batch, expected in zip(resumed, all_batches[5:], strict=True):
        assert torch.equal(batch.vectors, expected.vectors)


@pytest.mark.parametrize(
    ("stored", "dtype", "worst"), [("bfloat16", torch.bfloat16, 2**-8), ("int8", torch.int8, 0.00394)]
)
def test_vectors_stored_in_fewer_bits_are_nearly_equal(
    stored, dtype, worst, language_model, tokenizer, activations, tmp_path
):
    tokens = pack(make_texts(40), tokenizer, N_POSITIONS, 300)
    exact = harvest(tokens, language_model, tmp_path / "exact", {}, "test")
    low = harvest(tokens, language_model, tmp_path / "low", {}, "test", stored)
    assert low._shards[0]["vectors"].dtype == dtype
    index = torch.randperm(exact.n_tokens, generator=torch.Generator().manual_seed(0))
    expected, batch = exact.batch(index), low.batch(index)
    assert torch.equal(batch.position, expected.position)
    assert torch.equal(batch.end, expected.end)
    error = (batch.vectors.float() - expected.vectors).abs().amax(1) / expected.vectors.abs().amax(1)
    assert 0 < float(error.max()) < worst  # half a step of 1/127 of the largest value
    assert low.d_model == exact.d_model
    again = harvest(tokens, language_model, tmp_path / "again", {}, "test", stored)
    assert again.made_from == low.made_from != exact.made_from
    torch.testing.assert_close(low.center_and_scale[1], exact.center_and_scale[1], rtol=0.01, atol=0)


class Counted(LanguageModel):
    """A model that counts its passes and is interrupted after some."""

    device = torch.device("cpu")

    def __init__(self, model, most=10**6):
        self.n, self.n_tokens, self.most, self._model, self._longest = 0, [], most, model, None
        self.sink_norm = model.sink_norm

    def check_ids(self, ids):
        pass

    def vectors(self, ids):
        self.n += 1
        self.n_tokens.append(ids.numel())
        if self.n > self.most:
            raise KeyboardInterrupt
        return self._model.vectors(ids)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_written_while_the_next_is_computed(language_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_SHARD", 256)
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_FORWARD", 128)
    tokens = pack(make_texts(80), tokenizer, N_POSITIONS, 1200)
    next_begins, written, at_once = threading.Event(), [], threading.Barrier(data_harvest._WRITERS)
    model = Counted(language_model)
    add = Parts.add

    def add_when_the_next_begins(parts, name, write):
        written.append(name)
        assert threading.current_thread() is not threading.main_thread()
        if name <= "shard-00002.safetensors":
            assert next_begins.wait(10)
            at_once.wait(10)
        return add(parts, name, write)

    def vectors(ids):
        if model.n == 7:  # of 128 tokens, so the fourth shard has begun
            next_begins.set()
        return Counted.vectors(model, ids)

    monkeypatch.setattr(model, "vectors", vectors)
    monkeypatch.setattr(Parts, "add", add_when_the_next_begins)
    folder = harvest(tokens, model, tmp_path / "a", {}, "test").folder
    assert sorted(written) == sorted(path.name for path in folder.glob("shard*"))
    assert len(written) > 4
    complete = harvest(tokens, language_model, tmp_path / "b", {}, "test").folder
    assert files(folder) == files(complete)


def test_an_error_while_a_shard_is_written_stops_the_harvest(language_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_SHARD", 256)
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_FORWARD", 128)
    tokens = pack(make_texts(80), tokenizer, N_POSITIONS, 1200)
    complete = harvest(tokens, language_model, tmp_path / "complete", {}, "test").folder
    save = data_harvest.save_file

    def full_disk(shard, path):
        if path.name == "shard-00002.safetensors":
            raise OSError(28, "No space left on device")
        save(shard, path)

    model = Counted(language_model)
    monkeypatch.setattr(data_harvest, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        harvest(tokens, model, tmp_path / "a", {}, "test")
    monkeypatch.setattr(data_harvest, "save_file", save)
    kept = {path.name for path in (tmp_path / ".a.parts").glob("shard*")}
    assert {"shard-00000.safetensors", "shard-00001.safetensors"} <= kept
    assert kept < {path.name for path in complete.glob("shard*")} - {"shard-00002.safetensors"}
    harvest(tokens, language_model, tmp_path / "a", {}, "test")
    assert files(tmp_path / "a") == files(complete)


def test_larger_passes_give_shards_of_the_same_tokens(language_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_SHARD", 256)
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_FORWARD", 48)
    tokens = pad(make_texts(60, n_words=3) + make_texts(60, n_words=9), tokenizer, N_POSITIONS)
    small, large = Counted(language_model), Counted(language_model)
    expected = harvest(tokens, small, tmp_path / "small", {}, "test")
    monkeypatch.setitem(data_harvest._JOINED_TOKENS, "cpu", 150)
    found = harvest(tokens, large, tmp_path / "large", {}, "test")
    assert max(small.n_tokens) <= 48 < 100 < max(large.n_tokens) <= 150
    assert large.n < small.n / 2
    for one, other in zip(expected._shards, found._shards, strict=True):
        for name in one.keys() - {"vectors"}:
            assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one["vectors"], other["vectors"], rtol=1e-5, atol=1e-5)


def test_a_harvest_resumes_after_its_last_shard_and_recomputes_only_lost_shards(
    language_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_SHARD", 256)
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_FORWARD", 128)
    tokens = pack(make_texts(80), tokenizer, N_POSITIONS, 1200)
    complete = harvest(tokens, language_model, tmp_path / "complete", {}, "complete").folder
    n_shards = len(list(complete.glob("shard*")))
    assert n_shards > 4

    uninterrupted = Counted(language_model)
    harvest(tokens, uninterrupted, tmp_path / "again", {}, "again")
    with pytest.raises(KeyboardInterrupt):
        harvest(tokens, Counted(language_model, uninterrupted.n - 1), tmp_path / "part", {}, "part")
    resumed = Counted(language_model)
    harvest(tokens, resumed, tmp_path / "part", {}, "part")
    assert resumed.n < uninterrupted.n / n_shards + 2
    assert files(tmp_path / "part") == files(complete)
    lost = tmp_path / "part" / "shard-00002.safetensors"
    lost.write_bytes(lost.read_bytes()[:-1])
    mended = Counted(language_model)
    harvest(tokens, mended, tmp_path / "part", {}, "part")
    assert mended.n < uninterrupted.n / n_shards + 2
    assert files(tmp_path / "part") == files(complete)


def test_shard_size_changes_no_bit_and_model_batch_size_only_rounding(language_model, tokenizer, tmp_path, monkeypatch):
    tokens = pack(make_texts(80), tokenizer, N_POSITIONS, 1200)

    def harvested(name, **sizes):
        for constant, size in sizes.items():
            monkeypatch.setattr(data_harvest, constant, size)
        stored = harvest(tokens, language_model, tmp_path / name, {}, name)
        return stored.batch(torch.arange(stored.n_tokens))

    expected = harvested("expected")
    small = harvested("small", _TOKENS_PER_SHARD=100)
    other = harvested("other", _TOKENS_PER_FORWARD=48)
    for batch in (small, other):
        for name in ("token_id", "position", "text", "keep", "sentence", "line", "end", "text_position"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
    assert torch.equal(small.vectors, expected.vectors)
    difference = float((other.vectors - expected.vectors).abs().max() / expected.vectors.abs().max())
    assert difference < 1e-5  # relative to the largest value: float32 sums in another order


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tokens_are_read_shard_by_shard_and_returned_in_the_order_of_the_batch(
    dtype, language_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_SHARD", 100)
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_FORWARD", 48)
    tokens = pack(make_texts(40), tokenizer, N_POSITIONS, 500)
    activations = harvest(tokens, language_model, tmp_path / "a", {}, "test", dtype)
    shards = [shard["vectors"] * shard["scale"][:, None] if dtype == "int8" else shard["vectors"]
              for shard in activations._shards]  # fmt: skip
    assert len(shards) > 3
    index = torch.randperm(activations.n_tokens, generator=torch.Generator().manual_seed(0))[:50]
    stored = activations.read(index)
    assert stored.vectors.dtype == getattr(torch, dtype)
    batch = stored.to(torch.device("cpu"))
    assert torch.equal(batch.vectors, torch.cat(shards)[index])
    assert torch.equal(batch.text, activations.text[index])


def test_a_thread_reads_no_more_than_allowed_ahead_and_ends_with_the_iteration():
    produced, wanted = [], threading.Event()

    def items():
        for number in itertools.count():
            produced.append(number)
            if number == 3:
                wanted.set()
            yield number

    iterator = read_ahead(items(), 2)
    assert next(iterator) == 0
    assert wanted.wait(10)  # one returned, two ahead, one in the hands of the thread
    assert produced == [0, 1, 2, 3]
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_an_error_of_the_thread_is_raised_where_its_item_was_expected():
    def items():
        yield 1
        raise OSError("the shard is gone")

    iterator = read_ahead(items(), 2)
    assert next(iterator) == 1
    with pytest.raises(OSError, match="the shard is gone"):
        next(iterator)
