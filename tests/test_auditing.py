"""`posmask audit`: settings from the SAE, tables, resumption and refusals, on a tiny model."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import posmask
from conftest import D_MODEL, make_sae
from posmask.auditing import audit_all, measures, settings
from posmask.auditing.measures import ORDER_COLUMNS, POSITION_COLUMNS, REMOVAL_COLUMNS, order_table, removal_table
from posmask.auditing.subject import hub_model, named_saes
from posmask.auditing.summary import summarized
from posmask.cli.commands import app
from posmask.data.activations import Activations, evaluation_batches
from posmask.data.embedded_models import DEFAULT_MODEL
from posmask.errors import BadSetting, DamagedFolder, NothingToDo
from posmask.evaluation.downstream import Losses
from posmask.evaluation.latent_table import CLASSES, COLUMNS
from posmask.masks import make_mask, mask_settings
from posmask.results.rows import Row, Units, parse_slice, read_rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import write_sae
from posmask.sae.rules import rule_settings
from posmask.storage import layout
from simulated_latents import batch_of

N_POSITIONS, D_SAE = 16, 24
TOKENS = 1200


@pytest.fixture(autouse=True)
def toy_texts(texts, monkeypatch):
    monkeypatch.setattr(settings, "TABLES", ("words",))
    monkeypatch.setattr(settings, "ORDER_TASKS", ("toy_order",))


def toy_sae(kind="open", **options):
    mask = make_mask(mask_settings({"kind": kind, **options}), N_POSITIONS, D_SAE)
    return SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 4}), mask)


def audited(sae, model_folder, root, **options):
    options = {"model": str(model_folder), "layer": 2, "tokens": TOKENS, "order": False, "root": root} | options
    return posmask.audit(sae, **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("audits")


def test_an_audit_has_all_tables(model_folder, shared):
    report = audited(toy_sae(), model_folder, shared / "open", order=True)
    latents, positions, removal = report.latents, report.positions, report.removal
    assert list(COLUMNS) == list(latents.columns[: len(COLUMNS)])
    assert {"beyond_context", "promoted", "example"} <= set(latents.columns)
    assert len(latents) == D_SAE
    assert set(latents["class"]) <= set(CLASSES)
    assert list(positions.columns) == list(POSITION_COLUMNS)
    assert list(removal.columns) == list(REMOVAL_COLUMNS)
    assert list(report.order.columns) == list(ORDER_COLUMNS)
    # Twice the context, which the model reads.
    assert positions["position"].tolist() == [*range(1, N_POSITIONS), *range(N_POSITIONS, 2 * N_POSITIONS)]
    assert (positions["is_beyond"] == (positions["position"] >= N_POSITIONS)).all()
    pd.testing.assert_frame_equal(pd.read_csv(report.folder / layout.LATENT_CSV_FILE)[["latent", "class"]],
                                  latents[["latent", "class"]], check_dtype=False)  # fmt: skip
    summary = report.summary
    counts = [summary["classes"]["on"][name]["count"] for name in CLASSES]
    assert sum(counts) == D_SAE
    assert counts == [(latents["class"] == name).sum() for name in CLASSES]
    assert any("latents" in sentence for sentence in summary["sentences"])


def test_numbers_by_position_are_those_of_the_vectors(model_folder, shared):
    sae = toy_sae()
    report = audited(sae, model_folder, shared / "open", order=True)
    rows = read_rows(report.folder / layout.ROWS_FILE)
    by_position = {
        int(parse_slice(row.slice)["position"]): row.value
        for row in rows
        if row.metric == "explained_variance" and row.slice
    }
    within = report.positions[~report.positions["is_beyond"]].set_index("position")
    expected = [by_position[position] for position in range(1, N_POSITIONS)]
    assert within["explained_variance"].tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert np.isfinite(expected).sum() > N_POSITIONS / 2
    harvests = map(Activations, (shared / "open" / "activations").glob("evaluation-*"))
    activations = max(harvests, key=lambda harvest: harvest.n_kept)  # the other is that of longer contexts
    norms = torch.cat([batch.kept().vectors.norm(dim=1) for batch in evaluation_batches(activations)])
    position = torch.cat([batch.kept().position for batch in evaluation_batches(activations)])
    assert report.summary["tokens"] == activations.n_kept
    assert within["stream_norm"][3] == pytest.approx(float(norms[position == 3].mean()), rel=1e-5)
    assert within["tokens"].sum() == report.summary["tokens"]


def test_latents_that_fail_beyond_the_context_are_found(monkeypatch):
    random = torch.Generator().manual_seed(0)
    n_texts, n_positions, length, of_kind = 96, 64, 128, 60
    text = torch.arange(n_texts).repeat_interleave(length)
    position = torch.arange(length).repeat(n_texts)
    on_topic = (torch.rand(n_texts, of_kind, generator=random) < 0.4)[text]
    passage = torch.rand(n_texts, length // 32, of_kind, generator=random) < 0.05
    in_passage = passage.repeat_interleave(32, 1).flatten(0, 1)
    within, beyond = (position < n_positions)[:, None], (position >= n_positions)[:, None]
    rates = {
        "everywhere": torch.full((len(text), of_kind), 0.04),
        "on a topic": 0.1 * on_topic,
        "in passages": 0.9 * in_passage,
        "not beyond": 0.04 * within.expand(-1, of_kind),
        "four times as often beyond": 0.02 + 0.06 * beyond.expand(-1, of_kind),
        "on a topic, not beyond": 0.1 * on_topic * within,
        "too rare": torch.full((len(text), of_kind), 2e-4),
    }
    rate = torch.cat(list(rates.values()), 1)
    fires = torch.rand(rate.shape, generator=random) < rate
    sae = SparseAutoencoder(len(rates) * of_kind, rule_settings({"kind": "relu", "l1_coefficient": 0}),
                            make_mask(mask_settings({"kind": "open"}), n_positions, fires.shape[1]))  # fmt: skip
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(fires.shape[1]))
        sae.encoder_bias.zero_()
    texts_of = [slice(start, start + 12 * length) for start in range(0, len(text), 12 * length)]

    def batches(activations, device):
        for part in texts_of:
            batch = batch_of(position[part], text[part], position[part])
            yield dataclasses.replace(batch, vectors=fires[part] * 2.0 - 1)

    monkeypatch.setattr(measures, "evaluation_batches", batches)
    table = measures.beyond_context(sae, SimpleNamespace(position=position), n_positions)
    found = {kind: part["beyond_context"].value_counts() for kind, part in
             zip(rates, (table[i : i + of_kind] for i in range(0, len(table), of_kind)), strict=True)}  # fmt: skip
    fails = {kind: int(counts.get("fails", 0)) for kind, counts in found.items()}
    planted = ("not beyond", "four times as often beyond", "on a topic, not beyond")
    right = sum(fails[kind] for kind in planted)
    assert right >= 0.95 * len(planted) * of_kind, found
    assert right >= 0.99 * sum(fails.values()), found
    assert found["everywhere"]["holds"] >= 0.95 * of_kind
    assert fails["in passages"] <= 0.05 * of_kind, found["in passages"]  # Firings of one passage are not independent.
    assert found["too rare"]["undecided"] >= 0.95 * of_kind
    ratio = table["beyond_rate_ratio"][4 * of_kind : 5 * of_kind]
    assert abs(ratio.median() - 4) < 0.2


def test_a_masked_sae_is_audited_with_its_mask_on_and_lifted(model_folder, shared):
    report = audited(toy_sae("slice", n_slices=4), model_folder, shared / "masked")
    assert {"class", "lifted_class"} <= set(report.latents.columns)
    assert set(report.positions["mask"]) == {"on", "lifted"}
    assert not report.positions["is_beyond"].any()  # a mask says nothing about later positions
    assert set(report.summary["classes"]) == {"on", "lifted"}
    assert set(report.profiles["mask"]) == {"on", "lifted"}
    # A latent of a slice fires at no position outside of it.
    firing = report.profiles.query("mask == 'on' and firing_rate > 0").groupby("latent")["first_position"]
    assert (firing.max() - firing.min()).max() < N_POSITIONS // 2
    chart = report.plot_profile(int(report.profiles["latent"].iloc[0])).to_dict()
    assert "firing_rate" in json.dumps(chart)
    with pytest.raises(BadSetting, match=rf"latent {D_SAE} has no profile: the SAE has the latents 0 to {D_SAE - 1}"):
        report.plot_profile(D_SAE)


def test_a_finished_audit_is_read_and_vectors_are_shared(model_folder, shared, monkeypatch):
    root = shared / "open"
    first = audited(toy_sae(), model_folder, root, order=True)
    written = (first.folder / layout.SUMMARY_FILE).stat().st_mtime_ns
    harvested = sorted((root / "activations").iterdir())
    monkeypatch.setattr("posmask.study.harvests.harvest", None)
    second = audited(toy_sae(), model_folder, root, order=True)
    assert (second.folder / layout.SUMMARY_FILE).stat().st_mtime_ns == written
    assert sorted((root / "activations").iterdir()) == harvested
    # Another SAE of the site needs no vectors of its own.
    other = toy_sae()
    with torch.no_grad():
        other.encoder_bias += 0.001
    third = audited(other, model_folder, root, order=True)
    assert third.folder == first.folder  # of the same name
    assert [path.name for path in (root / "stale").iterdir()] == ["sae-1"]
    assert not [path for path in harvested if path.name.startswith("training")]


def test_names_settings_and_site_come_from_the_sae(model_folder, shared, tmp_path):
    folder = tmp_path / "mine"
    write_sae(toy_sae(), folder, {"model": str(model_folder), "layer": 2, "site": "residual_after"})
    report = posmask.audit(folder, tokens=TOKENS, order=False, root=shared / "folder")
    assert report.summary["name"] == "mine"
    assert report.summary["site"] == "blocks.1.hook_resid_post"
    assert report.summary["model"] == str(model_folder)
    assert posmask.read_audit(report.folder).summary == report.summary


def test_an_sae_of_saelens_is_audited(saelens, model_folder, shared):
    config = saelens.StandardSAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL, device="cpu")
    config.metadata.model_name, config.metadata.hook_name = str(model_folder), "blocks.1.hook_resid_post"
    config.metadata.context_size = N_POSITIONS
    sae = saelens.StandardSAE(config)
    with torch.no_grad():  # reconstructs every vector
        sae.W_dec[:] = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
        sae.W_enc[:] = sae.W_dec.T
    report = posmask.audit(sae, tokens=TOKENS, order=False, root=shared / "saelens")
    assert report.summary["rule"] == "relu"
    assert report.summary["explained_variance"]["value"] == pytest.approx(1)
    assert len(report.latents) == 2 * D_MODEL


def test_several_saes_are_audited_together(model_folder, shared, tmp_path):
    for name in ("a", "b"):
        write_sae(
            toy_sae(), tmp_path / name / "sae", {"model": str(model_folder), "layer": 2, "site": "residual_after"}
        )
    reports = audit_all(
        [tmp_path / "a" / "sae", tmp_path / "b" / "sae"], tokens=TOKENS, order=False, root=shared / "two"
    )
    assert [report.folder.name for report in reports] == ["sae", "sae-2"]
    assert len(list((shared / "two" / "activations").glob("evaluation-*"))) == 2  # within and beyond the context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, r"the files of sae do not state its model: give --model"),
        ({"layer": None}, r"the files of sae do not state its site: give --site or --layer"),
        ({"layer": 9}, r"layer = 9 does not exist: the model has 3 layers"),
        ({"site": "blocks.1.attn.hook_z", "layer": None}, r"'blocks.1.attn.hook_z' is not a site that posmask reads"),
        ({"site": "blocks.1.hook_resid_post"}, r"both name the site: give one of them"),
        ({"model": "no/such-model-here"}, r"no/such-model-here"),
        ({"tokens": 20}, r"20 tokens are too few: .* at least --tokens"),
        ({"context": 8}, r"--context 8 is not the 16 positions"),
        ({"device": "cuda:7"}, r"cuda:7"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_harvested(options, message, model_folder, tmp_path):
    with pytest.raises((BadSetting, posmask.PosmaskError), match=message):
        audited(toy_sae(), model_folder, tmp_path / "root", **options)
    assert not (tmp_path / "root" / "activations").exists()


def test_saes_that_do_not_fit_are_refused(model_folder, tmp_path):
    wide = SparseAutoencoder(D_MODEL + 1, toy_sae().rule.settings, toy_sae().mask)
    with pytest.raises(BadSetting, match=rf"codes vectors of {D_MODEL + 1} numbers, .* gives {D_MODEL}"):
        audited(wide, model_folder, tmp_path)
    long = SparseAutoencoder(D_MODEL, toy_sae().rule.settings, make_mask(mask_settings({"kind": "open"}), 128, D_SAE))
    with pytest.raises(BadSetting, match=r"n_positions = 128 is more than the 64 positions of the model"):
        audited(long, model_folder, tmp_path)
    write_sae(toy_sae(), tmp_path / "a", {"model": str(model_folder), "layer": 1, "site": "residual_after"})
    write_sae(toy_sae(), tmp_path / "b", {"model": str(model_folder), "layer": 2, "site": "residual_after"})
    with pytest.raises(BadSetting, match=r"the SAEs differ in their site .* audit them one at a time"):
        audit_all([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(NothingToDo, match=r"kept tokens are needed"):
        audited(toy_sae(), model_folder, tmp_path / "root", tokens=10**6)
    with pytest.raises(DamagedFolder):
        posmask.read_audit(tmp_path / "a")


def test_words_of_the_command_line_name_saes(tmp_path):
    folder = tmp_path / "sae"
    folder.mkdir()
    words = ["hf:me/mine", "gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", str(folder)]
    assert named_saes(words) == [
        "hf:me/mine", "saelens:gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", str(folder)
    ]  # fmt: skip
    with pytest.raises(BadSetting, match=r"'nothing-here' is neither a path nor followed by the id of an SAE"):
        named_saes(["nothing-here"])
    assert hub_model(DEFAULT_MODEL) == DEFAULT_MODEL


def order_row(source, accuracy, task="language_order"):
    return Row(source, "open", "", "", 0, "order_accuracy", f"task={task};k=5;pooling=mean", accuracy, 0, 1, 4)


def test_differences_of_order_are_paired_by_group():
    """Codes that are right on one group less lose exactly that share, and pairing makes the interval narrow."""
    right = np.tile([1.0, 0.0], 40)
    less = right.copy()
    less[0] = 0
    ones, name = np.ones(80), "order_accuracy|task=language_order;k=5;pooling=mean"
    table = order_table(
        {"codes": [order_row("sae", less.mean())], "stream": [order_row("llm", right.mean())]},
        {"codes": {name: Units(less, ones)}, "stream": {name: Units(right, ones)}},
    )
    line = table[table["task"] == "all"].iloc[0]
    assert line["about"] == "block"
    assert line["difference"] == pytest.approx(-1 / 80)
    assert -0.06 < line["difference_low"] <= line["difference"] <= line["difference_high"] <= 0


def test_removed_latents_are_matched_by_activity(monkeypatch):
    mass = np.array([10.0, 9.0, 100.0, 11.0, 8.0, 1.0])
    latents = pd.DataFrame({
        "firings": np.full(6, 50),
        "mean_activation": mass,
        "class": ["position-tracking", "position-tracking", "content", "content", "dense", "mixed"],
    })  # fmt: skip
    removed = []
    monkeypatch.setattr(measures, "_without", lambda sae, members: removed.append(sorted(members.tolist())))
    losses = Losses(torch.ones(3, N_POSITIONS - 1), torch.zeros(3, N_POSITIONS - 1))
    in_model = SimpleNamespace(losses=lambda replacements: [losses] * 3)
    table = removal_table(make_sae("open"), latents, SimpleNamespace(in_model=in_model))
    assert removed == [[0, 1], [3, 4]]  # 11 and 8 are the nearest to 10 and 9 among content and dense latents
    assert (table["latents"] == 2).all()
    assert table["cross_entropy_increase"].tolist() == [0.0] * 10  # all positions and four windows, of both kinds
    assert table["first_position"].tolist()[:5] == [1, 1, 4, 8, 12]


def test_the_sentence_on_removals_is_about_all_positions():
    """The first window begins at position 1, too."""

    def line(first, last, removed, increase):
        return dict(zip(REMOVAL_COLUMNS, (first, last, removed, 3, increase, increase - 1, increase + 1), strict=True))

    lines = [
        line(first, last, removed, increase)
        for removed, increases in (("position-tracking latents", (0.5, 7, 8)), ("matched latents", (0.25, 7, 8)))
        for (first, last), increase in zip(((1, 14), (1, 7), (8, 14)), increases, strict=True)
    ]
    nothing = pd.DataFrame({"kind": [], "task": [], "class": []})
    rows = [Row("sae", "open", "", "", 0, name, "", 0.5, 0.4, 0.6, 1) for name in ("explained_variance", "l0")]
    summary = summarized({"d_sae": 3}, rows, nothing, None, nothing, pd.DataFrame(lines))
    sentence = (
        "Cross-entropy without the 3 position-tracking latents: 0.5000 (-0.5000 to 1.5000) nats higher; without as "
        "many matched latents: 0.2500 (-0.7500 to 1.2500) nats higher."
    )
    assert sentence in summary["sentences"]


def test_without_position_tracking_latents_nothing_is_removed():
    latents = pd.DataFrame({"firings": [50], "mean_activation": [1.0], "class": ["content"]})
    assert removal_table(make_sae("open"), latents, SimpleNamespace()).empty


def test_the_command_prints_a_table_and_writes_the_page(model_folder, shared, tmp_path):
    for name in ("first", "second"):
        write_sae(toy_sae(), tmp_path / name, {"model": str(model_folder), "layer": 2, "site": "residual_after"})
    words = ["audit", str(tmp_path / "first"), str(tmp_path / "second"), "--tokens", "1.2k", "--no-order"]
    words += ["--root", str(shared / "command")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["position-", "expl."]
    assert lines[1].split() == [
        "SAE",
        "latents",
        "tracking",
        "mixed",
        "content",
        "dense",
        "dead",
        "undecided",
        "var.",
        "L0",
    ]
    report = posmask.read_audit(shared / "command" / "evaluated" / "first")
    counts = [str(report.summary["classes"]["on"][name]["count"]) for name in CLASSES]
    assert lines[2].split()[: 2 + len(CLASSES)] == ["first", str(D_SAE), *counts]
    for sentence in report.summary["sentences"]:
        assert f"- {sentence}" in lines
    page = shared / "command" / "audit.html"
    assert lines[-1] == f"The page: {page}"
    assert max(map(len, lines[:3])) <= 80
    text = page.read_text(encoding="utf8")
    assert "first" in text
    assert "second" in text
    assert "The audit of first, second harvests" in result.stderr


@pytest.mark.parametrize("count", ["", "0", "-5", "many", "1e5", "200 k tokens", "9" * 40])
def test_counts_of_tokens_are_checked(count):
    result = CliRunner().invoke(app, ["audit", "x", "y", "--tokens", count])
    assert result.exit_code != 0
    assert isinstance(result.exception, BadSetting) or "--tokens" in result.output
