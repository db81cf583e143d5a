"""SAEs pushed to a stand-in for the hub and fetched from it, by huggingface_hub and SAELens themselves."""

import hashlib
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conftest import make_sae
from hub_stand_in import TOKEN, stand_in
from posmask.cli.commands import app
from posmask.errors import BadSetting, DamagedFolder, MissingAsset
from posmask.interop import hub
from posmask.interop.saelens_files import export_saelens
from posmask.results.rows import Measure, Row, write_rows
from posmask.sae.files import write_sae
from posmask.storage.manifest import write_folder
from test_saelens import ORIGIN, contexts, scaled
from test_saelens_files import flip_a_bit, random_tensors


@pytest.fixture
def whole_hub(monkeypatch, tmp_path):
    """The stand-in; huggingface_hub asks it, with a cache of its own, the token that may write, and git LFS."""
    with stand_in() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def server(whole_hub):
    """Its repositories."""
    return whole_hub.files


def cell_folder(folder, sae):
    folder.mkdir()
    write_sae(sae, folder, ORIGIN)
    measures = [
        Measure("explained_variance", 0.7512, 0.74, 0.76),
        Measure("train_tokens", 819200.0),
        Measure("order_accuracy", 0.625, slice={"task": "chronology", "k": 5, "pooling": "mean"}),
    ]
    where = {"cell": folder.name, "mask": "slice", "budget": "width", "gating": "forward", "seed": 0}
    write_rows(folder / "rows.csv", [Row.of(measure, **where) for measure in measures])
    return folder


def test_what_is_pushed_is_fetched_by_us_and_by_saelens(saelens, server, tmp_path):
    sae = scaled(make_sae("slice"))
    cell = cell_folder(tmp_path / "slice-seed0", sae)
    assert hub.push(cell, "user/new").endswith("/user/new")
    files = server["user/new"]
    assert set(files) == {"README.md"} | {
        f"slice-seed0/{n}" for n in ("cfg.json", "sae_weights.safetensors", "rows.csv")
    }
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    for ours in (hub.from_pretrained("user/new"), hub.from_pretrained("user/new", "slice-seed0")):
        torch.testing.assert_close(ours.encode(vectors, position), expected, atol=2e-5, rtol=1e-5)
        assert ours.mask.settings == sae.mask.settings
    theirs = saelens.SAE.from_pretrained("user/new", "slice-seed0")
    torch.testing.assert_close(theirs.encode(vectors), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("residual_after", "the residual stream after layer 2"),
        ("residual_before", "the residual stream before layer 2"),
        ("attention", "the attention output of layer 2"),
        ("mlp", "the MLP output of layer 2"),
    ],
)
def test_the_card_says_the_site(site, words, tmp_path):
    write_sae(make_sae("slice"), tmp_path, {**ORIGIN, "site": site})
    assert f"from tiny, {words}, trained on" in hub.model_card(tmp_path, "user/new", "cell", "tiny")


def test_a_damaged_cell_is_not_pushed(server, tmp_path):
    for name in ("sae.safetensors", "rows.csv"):
        cell_folder(tmp_path / "made", scaled(make_sae("slice")))
        with write_folder(tmp_path / "cell", {"what": name}) as draft:
            shutil.copytree(tmp_path / "made", draft, dirs_exist_ok=True)
        flip_a_bit(tmp_path / "cell" / name)
        with pytest.raises(DamagedFolder, match=f"{name} is not what was written"):
            hub.push(tmp_path / "cell", "user/new")
        shutil.rmtree(tmp_path / "made")
    assert not server.get("user/new")


def asked_for(hub, what):
    return [one for one in hub.asked if what in one]


def test_weights_go_and_come_by_git_lfs_and_only_where_they_are_new(whole_hub, tmp_path):
    cell = cell_folder(tmp_path / "cell", scaled(make_sae("slice")))
    hub.push(cell, "user/new")
    (weights,) = whole_hub.storage.values()
    assert weights == whole_hub.files["user/new"]["cell/sae_weights.safetensors"]
    steps = [len(asked_for(whole_hub, what)) for what in ("/objects/batch", "PUT /storage", "/lfs/verify")]
    assert steps == [1, 1, 1]
    (cell / "rows.csv").write_bytes((cell / "rows.csv").read_bytes().replace(b"0.7512", b"0.7777"))
    hub.push(cell, "user/new")
    assert len(asked_for(whole_hub, "PUT /storage")) == 1
    assert b"0.7777" in whole_hub.files["user/new"]["README.md"]
    assert hub.from_pretrained("user/new", "cell").mask.settings.kind == "slice"
    assert asked_for(whole_hub, "GET /storage")


def test_weights_go_and_come_by_xet_as_on_the_hub(whole_hub, tmp_path, monkeypatch):
    hf_xet = pytest.importorskip("hf_xet", reason="huggingface_hub brings hf_xet for common processors only")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    whole_hub.xet_folder = tmp_path / "xet"
    sae = scaled(make_sae("slice"))
    cell = cell_folder(tmp_path / "cell", sae)
    hub.push(cell, "user/new")
    weights = tmp_path / "again" / "sae_weights.safetensors"
    export_saelens(cell, weights.parent)
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert checksum.encode() in whole_hub.files["user/new"]["cell/sae_weights.safetensors"]
    whole_hub.xet_hashes[checksum] = hf_xet.hash_files([str(weights)])[0].hash
    ours = hub.from_pretrained("user/new", "cell")
    vectors, position = contexts()
    torch.testing.assert_close(ours.encode(vectors, position), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)
    assert not whole_hub.storage
    assert [len(asked_for(whole_hub, f"/xet-{what}-token/")) for what in ("write", "read")] == [1, 1]


def test_an_upload_that_is_refused_half_way_is_said_and_leaves_the_repository_as_it_was(whole_hub, tmp_path):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    whole_hub.broken = "storage"
    with pytest.raises(MissingAsset, match="the hub returned status 400 to a request to write to user/new: try"):
        hub.push(cell, "user/new")
    assert whole_hub.files["user/new"] == {}


def test_the_card_has_the_cells_numbers_its_mask_and_how_to_load_it(server, tmp_path):
    hub.push(cell_folder(tmp_path / "one", make_sae("slice")), "user/new")
    hub.push(cell_folder(tmp_path / "two", make_sae("soft")), "user/new")
    server["user/new"]["README.md"] += b"\nWritten by hand.\n"
    hub.push(tmp_path / "one", "user/new")
    card = server["user/new"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saelens\n")
    assert "base_model: tiny" in card
    assert card.count("\n## one\n") == card.count("\n## two\n") == card.count("Written by hand.") == 1
    assert "| explained_variance | 0.7512 | 0.74 to 0.76 |" in card
    assert "| train_tokens | 819,200 |  |" in card
    assert "| order accuracy, k = 5, mean pooling | 0.625 | |" in card
    assert "Static slicing: the contiguous latent block b is open on the contiguous position block b only." in card
    assert 'from_pretrained("user/new", "one")' in card
    with pytest.raises(BadSetting, match=r"user/new holds 2 SAEs \(one, two\): name a folder"):
        hub.from_pretrained("user/new")


def test_gemma_scope_is_fetched_as_it_lies_on_the_hub(server, tmp_path):

    np.savez(
        tmp_path / "params.npz", **{name: one.numpy() for name, one in random_tensors("jumprelu", unit=True).items()}
    )
    server["google/scope"] = {"layer_3/width_16k/average_l0_5/params.npz": (tmp_path / "params.npz").read_bytes()}
    sae = hub.from_pretrained("google/scope", "layer_3/width_16k/average_l0_5", n_positions=16)
    assert sae.rule.settings.kind == "jumprelu"
    assert sae.mask.n_positions == 16


def test_the_name_of_a_repository_says_the_site(server, tmp_path):
    tensors = random_tensors("jumprelu", unit=True)
    np.savez(tmp_path / "params.npz", **{name: one.numpy() for name, one in tensors.items()})
    for repo in ("google/gemma-scope-2b-pt-att", "google/gemma-scope-2b-pt-transcoders", "me/saes-att"):
        server[repo] = {"layer_3/width_16k/params.npz": (tmp_path / "params.npz").read_bytes()}
        with pytest.raises(BadSetting, match=f"{repo.partition('/')[2]} holds"):
            hub.from_pretrained(repo, n_positions=16)


def test_what_the_hub_refuses_is_said_in_one_sentence_with_what_to_do(server, tmp_path, monkeypatch):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    server["user/empty"] = {}
    cases = [
        (lambda: hub.from_pretrained("no repo!"), BadSetting, "'no repo!' is not a repository's name: write USER/NAME"),
        (lambda: hub.from_pretrained("user/none", "x"), MissingAsset, "user/none is not on the hub, or private: check"),
        (lambda: hub.from_pretrained("user/gated", "x"), MissingAsset, "user/gated is gated: accept its conditions"),
        (lambda: hub.from_pretrained("user/empty", "x"), MissingAsset, "user/empty has no x/cfg.json: name one of its"),
        (
            lambda: hub.from_pretrained("user/empty", "x", revision="none"),
            MissingAsset,
            "user/empty has no such revision: name a branch, tag or commit of it",
        ),
        (lambda: hub.from_pretrained("user/empty"), BadSetting, "user/empty holds 0 SAEs: name a folder"),
        (lambda: hub.push(cell, "user/other"), MissingAsset, r"does not let you write to user/other \(status 403\)"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(MissingAsset, match="user/gated is gated: accept its conditions") as caught:
        hub.from_pretrained("user/gated", "x")
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(MissingAsset, match=r"\(status 401\): log in with `hf auth login` or set HF_TOKEN") as caught:
        hub.push(cell, "user/new")
    assert "hf_wrong" not in str(caught.value)


def test_without_a_network_the_cache_serves_and_else_it_says_so(server, tmp_path, monkeypatch):
    hub.push(cell_folder(tmp_path / "cell", scaled(make_sae("slice"))), "user/new")
    hub.from_pretrained("user/new", "cell")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.from_pretrained("user/new", "cell").mask.settings.kind == "slice"
    with pytest.raises(MissingAsset, match="could not be reached to read user/away, and the cache lacks it"):
        hub.from_pretrained("user/away", "cell")
    with pytest.raises(MissingAsset, match="could not be reached to write to user/new"):
        hub.push(tmp_path / "cell", "user/new")


@pytest.mark.slow  # huggingface_hub asks again and again, for 20 seconds.
def test_a_hub_that_does_not_answer_is_said_to_be_out_of_reach(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(MissingAsset, match="could not be reached to read user/away"):
        hub.from_pretrained("user/away")


def test_the_command_prints_no_token(whole_hub, tmp_path):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    result = CliRunner().invoke(app, ["push", str(cell), "user/new", "--private"])
    assert result.exit_code == 0, result.output
    assert "Pushed: http" in result.output
    assert "cell/cfg.json" in whole_hub.files["user/new"]
    assert whole_hub.private == {"user/new"}
    assert TOKEN not in result.output
