"""SAEs pushed to and fetched from a local hub with huggingface_hub and SAELens."""

import hashlib
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers.utils.hub
from typer.testing import CliRunner

from conftest import make_sae
from hub_stand_in import TOKEN, serve_hub
from posmask.cli.commands import app
from posmask.errors import BadSetting, DamagedFolder, MissingAsset
from posmask.interop import hub
from posmask.interop.saelens_files import export_saelens
from posmask.results.rows import Measure, Row, write_rows
from posmask.sae.files import read_sae, write_sae
from posmask.storage.manifest import write_folder
from test_saelens import ORIGIN, assert_scaled, contexts, scaled
from test_saelens_files import flip_a_bit, random_tensors


def use_hub(address, cache, monkeypatch):
    """Let huggingface_hub and transformers use a hub at this address, with a separate cache."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    # transformers keeps a client, which keeps the address of the hub.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """Start a local hub; huggingface_hub uses it with a separate cache, a token with write access, and git LFS."""
    with serve_hub() as hub:
        use_hub(hub.address, tmp_path / "hub-cache", monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def server(local_hub):
    """Return the repositories of the local hub."""
    return local_hub.files


def cell_folder(folder, sae, explained=0.7512):
    """A finished folder as a study writes it; an earlier one is replaced."""
    if folder.exists():
        shutil.rmtree(folder)
    measures = [
        Measure("explained_variance", explained, 0.74, 0.76),
        Measure("train_tokens", 819200.0),
        Measure("order_accuracy", 0.625, slice={"task": "chronology", "about": "block", "k": 5, "pooling": "mean"}),
    ]
    where = {"cell": folder.name, "mask": "slice", "budget": "width", "gating": "forward", "seed": 0}
    with write_folder(folder, {"what": "test"}) as draft:
        write_sae(sae, draft, ORIGIN)
        write_rows(draft / "rows.csv", [Row.of(measure, **where) for measure in measures])
    return folder


def test_a_pushed_sae_is_loaded_by_posmask_and_saelens(saelens, server, tmp_path):
    sae = scaled(make_sae("slice"))
    cell = cell_folder(tmp_path / "slice-seed0", sae)
    assert hub.push(cell, "user/new").endswith("/user/new")
    files = server["user/new"]
    assert set(files) == {"README.md"} | {
        f"slice-seed0/{n}" for n in ("cfg.json", "sae_weights.safetensors", "README.md", "rows.csv")
    }
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    for ours in (hub.from_pretrained("user/new"), hub.from_pretrained("user/new", "slice-seed0")):
        torch.testing.assert_close(ours.encode(vectors, position), expected, atol=2e-5, rtol=1e-5)
        assert ours.mask.settings == sae.mask.settings
    theirs = saelens.SAE.from_pretrained("user/new", "slice-seed0")
    assert_scaled(theirs.encode(vectors), expected)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("residual_after", "the residual stream after layer 2"),
        ("residual_before", "the residual stream before layer 2"),
        ("attention", "the attention output of layer 2"),
        ("mlp", "the MLP output of layer 2"),
    ],
)
def test_the_card_describes_the_site(site, words, tmp_path):
    write_sae(make_sae("slice"), tmp_path, {**ORIGIN, "site": site})
    cfg = {"unknown_position": None, "metadata": {"model_name": "tiny"}}
    assert f"from tiny, {words}, trained on" in hub.model_card(tmp_path, "user/new", "cell", cfg)


def test_a_damaged_cell_is_not_pushed(server, tmp_path):
    for name in ("sae.safetensors", "rows.csv"):
        cell = cell_folder(tmp_path / "cell", scaled(make_sae("slice")))
        flip_a_bit(cell / name)
        with pytest.raises(DamagedFolder, match=f"{name} is not what was written"):
            hub.push(cell, "user/new")
    assert not server.get("user/new")


def requests_with(hub, text):
    return [request for request in hub.requests if text in request]


def test_only_new_weights_are_uploaded_with_git_lfs(local_hub, tmp_path):
    sae = scaled(make_sae("slice"))
    cell = cell_folder(tmp_path / "cell", sae)
    hub.push(cell, "user/new")
    (weights,) = local_hub.storage.values()
    assert weights == local_hub.files["user/new"]["cell/sae_weights.safetensors"]
    steps = [len(requests_with(local_hub, what)) for what in ("/objects/batch", "PUT /storage", "/lfs/verify")]
    assert steps == [1, 1, 1]
    cell_folder(cell, sae, explained=0.7777)
    hub.push(cell, "user/new")
    assert len(requests_with(local_hub, "PUT /storage")) == 1
    assert b"0.7777" in local_hub.files["user/new"]["README.md"]
    assert hub.from_pretrained("user/new", "cell").mask.settings.kind == "slice"
    assert requests_with(local_hub, "GET /storage")


def test_weights_are_transferred_with_xet(local_hub, tmp_path, monkeypatch):
    hf_xet = pytest.importorskip("hf_xet", reason="huggingface_hub brings hf_xet for common processors only")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    local_hub.xet_folder = tmp_path / "xet"
    sae = scaled(make_sae("slice"))
    cell = cell_folder(tmp_path / "cell", sae)
    hub.push(cell, "user/new")
    weights = tmp_path / "again" / "sae_weights.safetensors"
    export_saelens(cell, weights.parent)
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert checksum.encode() in local_hub.files["user/new"]["cell/sae_weights.safetensors"]
    local_hub.xet_hashes[checksum] = hf_xet.hash_files([str(weights)])[0].hash
    ours = hub.from_pretrained("user/new", "cell")
    vectors, position = contexts()
    torch.testing.assert_close(ours.encode(vectors, position), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)
    assert not local_hub.storage
    assert [len(requests_with(local_hub, f"/xet-{what}-token/")) for what in ("write", "read")] == [1, 1]


def test_a_failed_upload_raises_and_leaves_the_repository_unchanged(local_hub, tmp_path):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    local_hub.broken = "storage"
    with pytest.raises(MissingAsset, match="the hub returned status 400 to a request to write to user/new: try"):
        hub.push(cell, "user/new")
    assert local_hub.files["user/new"] == {}


def test_the_card_has_results_mask_and_loading_code(server, tmp_path):
    hub.push(cell_folder(tmp_path / "first", make_sae("slice")), "user/new")
    hub.push(cell_folder(tmp_path / "second", make_sae("soft")), "user/new")
    server["user/new"]["README.md"] += b"\nWritten by hand.\n"
    hub.push(tmp_path / "first", "user/new")
    card = server["user/new"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saelens\n")
    assert "base_model: tiny" in card
    assert card.count("\n## first\n") == card.count("\n## second\n") == card.count("Written by hand.") == 1
    assert "| explained_variance | 0.7512 | 0.74 to 0.76 |" in card
    assert "| train_tokens | 819,200 |  |" in card
    assert "| block order, k = 5, mean pooling | 0.625 | |" in card
    assert "Static slicing: the contiguous latent block b is open on the contiguous position block b only." in card
    assert 'from_pretrained("user/new", "first")' in card
    with pytest.raises(BadSetting, match=r"user/new holds 2 SAEs of known formats \(first, second\): name"):
        hub.from_pretrained("user/new")


def test_the_card_states_the_position_of_vectors_without_one(server, tmp_path):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    result = CliRunner().invoke(app, ["push", str(cell), "user/new", "--unknown-position", "3"])
    assert result.exit_code == 0, result.output
    for file in ("README.md", "cell/README.md"):
        text = server["user/new"][file].decode()
        assert "Vectors whose position is unknown are encoded at position 3." in text
        assert "is not measured: the cell's run folder has no held-out vectors." in text
    hub.push(cell, "user/new")
    assert "If they are others, pass them" in server["user/new"]["README.md"].decode()


def test_gemma_scope_is_loaded_from_the_hub(server, tmp_path):
    tensors = random_tensors("jumprelu", unit=True)
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    server["google/scope"] = {"layer_3/width_16k/average_l0_5/params.npz": (tmp_path / "params.npz").read_bytes()}
    hook = "blocks.3.hook_resid_post"
    sae = hub.from_pretrained("google/scope", "layer_3/width_16k/average_l0_5", n_positions=16, hook_name=hook)
    assert sae.rule.settings.kind == "jumprelu"
    assert sae.mask.n_positions == 16


@pytest.mark.parametrize(("folder", "name"), [("", ""), ("a/b", ""), ("a/b", "/a/b")])
def test_saes_on_the_hub_are_imported_from_the_command_line(server, tmp_path, folder, name):
    sae = scaled(make_sae("slice"))
    write_sae(sae, tmp_path / "cell", ORIGIN)
    export_saelens(tmp_path / "cell", tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir() if path.name != "manifest.json"}
    server["user/saes"] = {f"{folder}/{file}".lstrip("/"): content for file, content in files.items()}
    result = CliRunner().invoke(app, ["import", f"hf:user/saes{name}", str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    vectors, position = contexts()
    imported = read_sae(tmp_path / "ours")
    torch.testing.assert_close(imported.encode(vectors, position), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)


def test_the_site_is_inferred_from_the_repository_name(server, tmp_path):
    tensors = random_tensors("jumprelu", unit=True)
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    for repo in ("google/gemma-scope-2b-pt-att", "google/gemma-scope-2b-pt-transcoders", "me/saes-att"):
        server[repo] = {"layer_3/width_16k/params.npz": (tmp_path / "params.npz").read_bytes()}
        with pytest.raises(BadSetting, match=f"{repo.partition('/')[2]} holds"):
            hub.from_pretrained(repo, n_positions=16)


def test_hub_errors_are_one_line_with_a_remedy(server, tmp_path, monkeypatch):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    server["user/empty"] = {}
    cases = [
        (lambda: hub.from_pretrained("no repo!"), BadSetting, "'no repo!' is not a repository's name: write USER/NAME"),
        (lambda: hub.from_pretrained("user/none", "x"), MissingAsset, "user/none is not on the hub, or private: check"),
        (lambda: hub.from_pretrained("user/gated", "x"), MissingAsset, "user/gated is gated: accept its conditions"),
        (
            lambda: hub.from_pretrained("user/empty", "x"),
            MissingAsset,
            "user/empty has no SAE of a known format at x: look",
        ),
        (
            lambda: hub.from_pretrained("user/empty", "x", revision="none"),
            MissingAsset,
            "user/empty has no such revision: name a branch, tag or commit of it",
        ),
        (lambda: hub.from_pretrained("user/empty"), BadSetting, "user/empty holds 0 SAEs of known formats: name"),
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


def test_offline_the_cache_is_used_or_an_error_raised(server, tmp_path, monkeypatch):
    hub.push(cell_folder(tmp_path / "cell", scaled(make_sae("slice"))), "user/new")
    hub.from_pretrained("user/new", "cell")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.from_pretrained("user/new", "cell").mask.settings.kind == "slice"
    with pytest.raises(MissingAsset, match="could not be reached to read user/away, and the cache lacks it"):
        hub.from_pretrained("user/away", "cell")
    with pytest.raises(MissingAsset, match="could not be reached to write to user/new"):
        hub.push(tmp_path / "cell", "user/new")


def test_an_sae_at_the_root_of_a_repository_works_offline(server, tmp_path, monkeypatch):
    sae = scaled(make_sae("slice"))
    write_sae(sae, tmp_path / "cell", ORIGIN)
    export_saelens(tmp_path / "cell", tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    # A folder with an SAE in it does not make the one at the root ambiguous.
    server["user/root"] = {**files, **{f"others/{name}": content for name, content in files.items()}, "a/b/c.txt": b""}
    vectors, position = contexts()
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        ours = hub.from_pretrained("user/root")
        torch.testing.assert_close(ours.encode(vectors, position), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)
    with pytest.raises(MissingAsset, match="user/root has no SAE of a known format at x: name one of its SAEs"):
        hub.from_pretrained("user/root", "x")


def test_an_only_sae_of_a_repository_is_found_offline(server, tmp_path, monkeypatch):
    hub.push(cell_folder(tmp_path / "cell", scaled(make_sae("slice"))), "user/new")
    hub.from_pretrained("user/new")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.from_pretrained("user/new").mask.settings.kind == "slice"
    with pytest.raises(MissingAsset, match="could not be reached to read user/away, and the cache lacks it"):
        hub.from_pretrained("user/away")


@pytest.mark.slow  # huggingface_hub retries for 20 seconds.
def test_an_unreachable_hub_raises_an_error(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on this port
    with pytest.raises(MissingAsset, match="could not be reached to read user/away"):
        hub.from_pretrained("user/away")


def test_the_command_prints_no_token(local_hub, tmp_path):
    cell = cell_folder(tmp_path / "cell", make_sae("slice"))
    result = CliRunner().invoke(app, ["push", str(cell), "user/new", "--private"])
    assert result.exit_code == 0, result.output
    assert "Pushed: http" in result.output
    assert "cell/cfg.json" in local_hub.files["user/new"]
    assert local_hub.private == {"user/new"}
    assert TOKEN not in result.output
