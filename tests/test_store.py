"""Vectors in a remote store: the same bits as on disk, a bounded local cache, and recovery from failures."""

import json
import sys
import time

import fsspec
import pytest
import torch

from conftest import N_POSITIONS, make_texts
from posmask.data import activations
from posmask.data import harvest as data_harvest
from posmask.data.activations import Activations, evaluation_batches, training_batches
from posmask.data.harvest import harvest
from posmask.data.tokens import pack
from posmask.errors import BadSetting, DamagedFolder, MissingAsset, MissingExtra
from posmask.storage import remote
from posmask.storage.manifest import identity, sealed_manifest
from posmask.storage.remote import Store
from posmask.study.run import run_study
from posmask.study.study_file import read_study
from posmask.study.targets import cell_states
from test_parallel import STUDY

MADE_FROM = {"what": "test"}
ROOM = 10**6


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use ten shards of about 300 tokens and no waiting between retries."""
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_FORWARD", 128)
    monkeypatch.setattr(data_harvest, "_TOKENS_PER_SHARD", 300)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.0)


@pytest.fixture(scope="session")
def s3():
    """Start an S3 server in this process and return the URL of a bucket."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e '.[dev]'")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/vectors"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.slow)])
def url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path / 'elsewhere'}"


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return pack(make_texts(200), tokenizer, N_POSITIONS, 3000)


@pytest.fixture
def local(tokens, language_model, tmp_path):
    return harvest(tokens, language_model, tmp_path / "local", MADE_FROM, "test")


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_same(batches, expected):
    for batch, expected_batch in zip(batches, expected, strict=True):
        for name, tensor in vars(batch).items():
            assert torch.equal(tensor, getattr(expected_batch, name)), name


def test_a_store_gives_the_same_vectors_as_the_disk_with_a_small_cache(
    url, local, tokens, language_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(activations, "_SHARDS_PER_WINDOW", 3)
    shard_bytes = max(path.stat().st_size for path in local.folder.glob("*.safetensors"))
    cache_bytes = 5 * shard_bytes
    store = Store(url, tmp_path / "cache", cache_bytes)
    most_bytes = 0

    def watched(batches):
        nonlocal most_bytes
        for batch in batches:
            most_bytes = max(most_bytes, sum(path.stat().st_size for path in files_in(tmp_path / "cache")))
            yield batch

    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert len(local._shards) == len(stored._shards) >= 9
    assert_same(watched(evaluation_batches(stored, 100)), evaluation_batches(local, 100))
    assert_same(watched(training_batches(stored, 200, 16, seed=1)), training_batches(local, 200, 16, seed=1))
    assert 3 * shard_bytes < most_bytes <= cache_bytes
    for constant, expected in zip(stored.center_and_scale, local.center_and_scale, strict=True):
        assert torch.equal(constant, expected)
    # Another process or machine needs neither the model nor the tokens, and writes nothing to the store.
    again = harvest(tokens, None, Store(url, tmp_path / "other", ROOM).folder("vectors"), MADE_FROM, "test")
    assert again.made_from == local.made_from
    assert_same(evaluation_batches(again), evaluation_batches(local))
    assert Store(url, tmp_path / "other", ROOM).folder("vectors").finished({"what": "else"}) is None


def test_shuffled_windows_contain_each_token_once_per_epoch_in_a_new_order(local, monkeypatch):
    single_window = torch.cat([batch.vectors for batch in training_batches(local, 100, 29, seed=2)])
    monkeypatch.setattr(activations, "_SHARDS_PER_WINDOW", 3)
    kept = local.keep.nonzero()[:, 0]
    random = torch.Generator().manual_seed(0)
    first_order, second_order = local.shuffled(kept, random), local.shuffled(kept, random)
    assert torch.equal(first_order.sort().values, kept)
    assert not torch.equal(first_order, second_order)
    shard = torch.searchsorted(local._ends, first_order, right=True)
    first = shard[: len(kept) // 5].unique()
    assert len(first) <= 3 < len(shard.unique())
    assert not torch.equal(first, torch.searchsorted(local._ends, second_order[: len(kept) // 5], right=True).unique())
    assert int((shard[1:] != shard[:-1]).sum()) > len(kept) // 2  # the shards of a window are mixed
    monkeypatch.setattr(activations, "_SHARDS_PER_WINDOW", len(local._shards))
    assert torch.equal(torch.cat([batch.vectors for batch in training_batches(local, 100, 29, seed=2)]), single_window)


class Failing:
    """A file system whose method `name` fails the first `times` calls."""

    def __init__(self, fs, name, times):
        self._fs, self._name, self.left = fs, name, times

    def __getattr__(self, name):
        work = getattr(self._fs, name)
        if name != self._name:
            return work

        def call(*args, **options):
            if self.left:
                self.left -= 1
                raise OSError("the line is cut")
            return work(*args, **options)

        return call


def test_failed_requests_are_retried_and_reported(tokens, language_model, local, tmp_path, capsys):
    store = Store(f"memory://{tmp_path.name}", tmp_path / "cache", ROOM)
    store._fs = Failing(store._fs, "put_file", 2)
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert store._fs.left == 0
    lines = capsys.readouterr().err.splitlines()
    assert (
        len([line for line in lines if "could not write vectors/shard-00000.safetensors (OSError: the line" in line])
        == 2
    )
    assert "number 3 of 6" in lines[1]
    store._fs = Failing(store._fs, "get_file", 1)
    assert_same(evaluation_batches(stored), evaluation_batches(local))


def test_a_permanent_failure_raises_an_error_and_keeps_stored_shards(
    tokens, language_model, local, tmp_path, monkeypatch
):
    store = Store(f"memory://{tmp_path.name}", tmp_path / "cache", ROOM)
    working, n_added = store._fs, 0
    add = remote.StoredFolder.add

    def until_the_fourth(folder, *arguments):
        nonlocal n_added
        n_added += 1
        if n_added == 4:
            store._fs = Failing(working, "put_file", 100)
        return add(folder, *arguments)

    monkeypatch.setattr(remote.StoredFolder, "add", until_the_fourth)
    with pytest.raises(
        MissingAsset, match=r"could not write vectors/shard-00003.* check the address, your permissions"
    ):
        harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert files_in(tmp_path / "cache") == []
    assert store.folder("vectors").manifest() is None
    store._fs, n_added = working, 10
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert n_added == 10 + len(local._shards) - 3
    assert_same(evaluation_batches(stored), evaluation_batches(local))


def test_a_slow_store_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "_SLOW_SECONDS", 0.01)
    store = Store(f"memory://{tmp_path.name}", tmp_path / "cache", ROOM)
    monkeypatch.setattr(store, "_fs", Failing(store._fs, "none", 0))
    put = store._fs._fs.put_file
    monkeypatch.setattr(store._fs, "put_file", lambda *args: (time.sleep(0.02), put(*args)), raising=False)
    (tmp_path / "a").write_text("a")
    store.write("a", tmp_path / "a")
    assert "is slow: to write a took 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_only_a_damaged_shard_is_recomputed(url, tokens, language_model, local, tmp_path, damage, monkeypatch):
    store = Store(url, tmp_path / "cache", ROOM)
    harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    path_in_store = f"{store._root}/vectors/shard-00002.safetensors"
    content = store._fs.cat_file(path_in_store)
    if damage == "missing":
        store._fs.rm_file(path_in_store)
    else:
        store._fs.pipe_file(
            path_in_store, content[:-1] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1])
        )
    for path in files_in(tmp_path / "cache"):
        path.unlink()
    if damage == "flipped":  # The size is right, so the damage is detected on download.
        with pytest.raises(DamagedFolder, match=r"shard-00002.safetensors is missing or damaged .* removed"):
            list(evaluation_batches(Activations(store.folder("vectors"))))
    with pytest.raises(DamagedFolder, match=r"shard-00002.safetensors missing or not of the size"):
        store.folder("vectors").manifest()
    batch_sizes = []
    vectors = language_model.vectors

    monkeypatch.setattr(language_model, "vectors", lambda ids: (batch_sizes.append(len(ids)), vectors(ids))[1])
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert 0 < sum(batch_sizes) < 0.2 * len(tokens.id)
    assert_same(evaluation_batches(stored), evaluation_batches(local))
    assert store._fs.cat_file(path_in_store) == content


def test_a_folder_with_a_damaged_manifest_is_not_finished(tokens, language_model, local, tmp_path):
    store = Store(f"memory://{tmp_path.name}", tmp_path / "cache", ROOM)
    harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    path_in_store = f"{store._root}/vectors/manifest.json"
    store._fs.pipe_file(path_in_store, store._fs.cat_file(path_in_store).replace(b'"bytes": ', b'"bytes": 1', 1))
    with pytest.raises(DamagedFolder, match=r"manifest.json cannot be read \(it is not what was written\)"):
        store.folder("vectors").finished(MADE_FROM)
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert_same(evaluation_batches(stored), evaluation_batches(local))


def test_a_store_and_the_disk_have_the_same_identity_and_files(tokens, language_model, local, tmp_path):
    store = Store(f"memory://{tmp_path.name}", tmp_path / "cache", ROOM)
    harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    manifest = store.folder("vectors").manifest()
    assert manifest is not None
    assert manifest["identity"] == identity(local.made_from)
    for path in local.folder.glob("*.safetensors"):
        assert store._fs.cat_file(f"{store._root}/vectors/{path.name}") == path.read_bytes()


def test_a_cache_too_small_for_random_batches_raises_an_error(tokens, language_model, tmp_path):
    store = Store(f"memory://{tmp_path.name}", tmp_path / "cache", 50_000)
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    with pytest.raises(
        BadSetting, match=r"activations_cache_gb allows 5e-05 GB here, but random batches are drawn from"
    ):
        next(training_batches(stored, 200, 16, seed=1))


def test_unknown_urls_and_missing_packages_raise_an_error(tmp_path, monkeypatch):
    with pytest.raises(BadSetting, match=r"activations_url = 'nowhere://x' is not a URL that fsspec knows"):
        Store("nowhere://x", tmp_path, ROOM)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtra, match=r"gcsfs.*pip install 'posmask\[remote\]' for s3://"):
        Store("gs://bucket/x", tmp_path, ROOM)


@pytest.mark.slow
def test_a_study_with_vectors_in_a_store_gives_the_same_cells(model_folder, tmp_path):
    texts, file = tmp_path / "texts.jsonl", tmp_path / "tiny.toml"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(1200)))
    file.write_text(STUDY.replace("MODEL", str(model_folder)).replace("TEXTS", str(texts)))
    plain = read_study(file)
    stored = read_study(file, [f"activations_url=memory://{tmp_path.name}", "activations_cache_gb=0.001"])
    roots = tmp_path / "plain", tmp_path / "stored"
    for study, root in zip((plain, stored), roots, strict=True):
        run_study(study, root, say=lambda text: None)
    weights_plain, weights_stored = (
        (root / "cells" / "slice-seed0" / "sae.safetensors").read_bytes() for root in roots
    )
    assert weights_plain == weights_stored
    # A cell that one study has finished is finished for the other.
    assert {state for _, state in cell_states(plain, roots[1])} == {"finished"}
    folders = {path.name for path in (roots[0] / "activations").iterdir()}
    in_store = fsspec.filesystem("memory").ls(f"/{tmp_path.name}", detail=False)
    assert {path.rpartition("/")[2] for path in in_store} == folders
    assert [path.name for path in (roots[1] / "activations").iterdir()] == [".store"]
    assert sum(path.stat().st_size for path in files_in(roots[1] / "activations")) <= 10**6


@pytest.mark.parametrize("name", ["/../../victim.txt", "../victim.txt", "VICTIM", "a/../../victim.txt", "victim.txt"])
def test_a_hostile_manifest_cannot_write_outside_the_cache(
    tokens, language_model, local, tmp_path, url, name, monkeypatch
):
    """An attacker with write access to the store lists a file outside the folder."""
    victim = tmp_path / "victim.txt"
    victim.write_text("years of work")
    name = name.replace("VICTIM", str(victim))
    store = Store(url, tmp_path / "cache", ROOM)
    harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    path_in_store = f"{store._root}/vectors/manifest.json"
    manifest = json.loads(store._fs.cat_file(path_in_store))
    for listed in (name, f"{name}.tokens.safetensors"):
        manifest["files"][listed] = {"bytes": 13, "sha256": "0" * 64}
    facts = {key: value for key, value in manifest.items() if key not in ("identity", "made_from", "files", "sha256")}
    store._fs.pipe_file(path_in_store, sealed_manifest(manifest["made_from"], facts, manifest["files"]).encode())
    sizes = Store.sizes
    monkeypatch.setattr(Store, "sizes", lambda *arguments: dict.fromkeys(manifest["files"], 13) | sizes(*arguments))
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    with pytest.raises(DamagedFolder, match=r"manifest.json lists '.*', which"):
        Activations(store.folder("vectors"))
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert_same(evaluation_batches(stored), evaluation_batches(local))
    assert victim.read_text() == "years of work"
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before


def test_freeing_cache_space_removes_only_cached_shards(tokens, language_model, tmp_path):
    cache, weights = tmp_path / "cache", tmp_path / "model.safetensors"
    weights.write_bytes(b"years of work")
    cache.mkdir()
    (cache / "sae.safetensors").write_bytes(b"years of work")
    (cache / "shard-00000.safetensors").symlink_to(weights)
    (cache / "linked").symlink_to(tmp_path)
    store = Store(f"memory://{tmp_path.name}", cache, 50_000)
    stored = harvest(tokens, language_model, store.folder("vectors"), MADE_FROM, "test")
    assert len(list(evaluation_batches(stored))) > 0
    assert (cache / "shard-00000.safetensors").is_symlink()
    assert (cache / "sae.safetensors").read_bytes() == weights.read_bytes() == b"years of work"
