"""The declared harvests of a study: identities without texts, and texts that change under a declared name."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import WORDS
from posmask.data import embedded
from posmask.probing import order_tasks
from posmask.study import harvests
from posmask.study.harvests import prepare
from posmask.study.run import run_study
from posmask.study.source import Source, texts_identity
from posmask.study.study_file import read_study
from posmask.study.targets import cell_states


def declared(study):
    return harvests.harvests(study, Source(study.model).made_from, texts_identity(study))


@pytest.mark.parametrize("n_texts", [400, 36])
def test_heldout_tokens_come_from_many_texts_if_there_are_many(study_file, tmp_path, capsys, n_texts):
    texts = tmp_path / "texts.jsonl"
    long = [" ".join([WORDS[number % 17], WORDS[number % 13], str(number)] * 100) for number in range(n_texts)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    settings = study_file.read_text().replace('tables = ["words"]', f'texts = "{texts}"')
    study_file.write_text(settings)
    study = read_study(study_file, ["evaluation.shift_texts=10"])
    data = prepare(study, Source(study.model), tmp_path / "run")
    kept = data.heldout.text[data.heldout.keep]
    n_read = len(kept.unique())
    if n_texts == 400:
        assert n_read >= harvests.HELDOUT_TEXTS
        assert int(kept.unique(return_counts=True)[1].max()) <= -(-1500 // harvests.HELDOUT_TEXTS)
    else:
        assert n_read < harvests.HELDOUT_TEXTS
        assert "too few or short for 1,500 tokens with at most 47 of each" in capsys.readouterr().err


def test_identities_need_no_texts(study_file, tmp_path, monkeypatch):
    study = read_study(study_file)
    run_study(study, tmp_path / "run", say=lambda line: None)

    def forbidden(*args, **kwargs):
        raise AssertionError("a text was read for an identity")

    for module, name in ((embedded, "read_table"), (harvests, "make_order_task"), (harvests, "read_probe_dataset")):
        monkeypatch.setattr(module, name, forbidden)
    items = declared(study)
    assert [item.kind for item in items] == ["training", "heldout", "shift", "order", "probes"]
    assert all((item.folder(tmp_path / "run") / "manifest.json").is_file() for item in items)
    assert {state for _, state in cell_states(study, tmp_path / "run")} == {"finished"}
    run_study(study, tmp_path / "run", say=lambda line: None)


@pytest.mark.parametrize(
    "change",
    [
        "corpus.training_tokens=1400", "corpus.heldout_tokens=1400", "evaluation.shift_texts=39",
        "evaluation.order_train_groups=29", "evaluation.probe_train=38", "corpus.eval_split=validation",
        "corpus.max_characters=900", "corpus.packing=one_text_per_context", "corpus.n_positions=15", "model.layer=1",
    ],
)  # fmt: skip
def test_every_setting_that_affects_vectors_is_in_an_identity(study_file, change):
    folders = [
        {item.folder(study_file.parent) for item in declared(read_study(study_file, changes))}
        for changes in ([], [change])
    ]
    assert folders[0] != folders[1]


def test_vectors_are_recomputed_if_a_dataset_has_other_texts(study_file, tmp_path, monkeypatch):
    study = read_study(study_file)
    source = Source(study.model)
    before = prepare(study, source, tmp_path / "run").probes["toy"][1]
    kept = before.position[before.keep].clone()
    read = harvests.read_probe_dataset

    def with_other_texts(*args):
        dataset = read(*args)
        return replace(dataset, texts=(*dataset.texts[1:], dataset.texts[0]))

    monkeypatch.setattr(harvests, "read_probe_dataset", with_other_texts)
    after = prepare(study, source, tmp_path / "run").probes["toy"][1]
    assert after.made_from["texts_sha256"] != before.made_from["texts_sha256"]
    assert len(after.position[after.keep]) == len(kept)


def test_order_tasks_are_token_fields_as_declared(study_file, tmp_path):
    study = read_study(study_file)
    task, vectors = prepare(study, Source(study.model), tmp_path / "run").order["toy_order"]
    assert isinstance(task, order_tasks.OrderTask)
    assert vectors.made_from["groups"] == [30, 10]


def test_positions_in_the_text_and_one_text_per_context(study_file, tmp_path):
    study_file.write_text(study_file.read_text().replace("n_slices = 4", 'n_slices = 4, position_origin = "text"'))
    study = read_study(study_file, ["corpus.packing=one_text_per_context"])
    data = prepare(study, Source(study.model), tmp_path / "run")
    for vectors in (data.training, data.heldout):
        assert torch.equal(vectors.text_position[vectors.keep], vectors.position[vectors.keep])
        starts = (vectors.position == 1).nonzero()[:, 0]
        assert len(vectors.text[starts].unique()) == len(starts)
    in_text = prepare(read_study(study_file, ["corpus.n_positions=20"]), Source(study.model), tmp_path / "run").training
    assert not torch.equal(in_text.text_position, in_text.position)
    batch = in_text.batch(torch.arange(40))
    assert torch.equal(batch.positions("text"), in_text.text_position[:40])
    assert torch.equal(batch.select(torch.arange(3)).positions("text"), in_text.text_position[:3])
