"""SAEs of published releases, read by name, from the hub and from folders, and compared with SAELens's own loaders."""

import dataclasses
import importlib.util
import io
import json
import re
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from typer.testing import CliRunner

import posmask
from conftest import D_MODEL, N_POSITIONS, make_sae
from posmask.cli.commands import app
from posmask.errors import BadSetting, DamagedFolder, MissingExtra, PosmaskError
from posmask.interop.reading import from_saelens, read_external, remarks, sources
from posmask.interop.reading.formats import FORMATS, UNREADABLE_CONVERSIONS
from posmask.interop.reading.releases import _releases
from posmask.interop.sites import layer_and_site
from posmask.sae.files import read_origin, read_sae
from published_saes import OVERRIDES, PUBLISHED, npz, pickled
from test_model_hub import local_hub, server  # noqa: F401
from test_saelens import ORIGIN, contexts, scaled


@pytest.fixture
def theirs(saelens, server, monkeypatch):  # noqa: F811
    """Load a published SAE by its name with SAELens, from the local hub."""

    def load_it(published):
        from sae_lens.saes import sae as module

        server[published.repo] = published.files
        if published.needs_overrides:
            monkeypatch.setattr(module, "get_config_overrides", lambda release, sae_id: dict(OVERRIDES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return saelens.SAE.from_pretrained(published.release, published.sae_id)

    return load_it


@pytest.fixture
def unpickled_here(monkeypatch):
    """Read pickles in this process, because another takes seconds to import torch."""
    from posmask.interop import unpickle, weights

    def run(command, **options):
        try:
            unpickle.convert(Path(command[-2]), Path(command[-1]))
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", unpickle._reason(error))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", run)


def folder_with(published, folder):
    """Write the files of a published SAE to a folder with the name of its repository."""
    for name, content in published.files.items():
        file = folder / published.repo.partition("/")[2] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / published.repo.partition("/")[2] / published.path


def assert_equal(ours, theirs, published):
    """Codes, up to the norms of decoder rows, and reconstructions are equal."""
    vectors, position = contexts()
    seen = vectors - vectors.mean(-1, keepdim=True) if published.centered else vectors
    codes = theirs.encode(seen)
    norms = theirs.W_dec.norm(dim=1)
    if bool(((norms / norms.mean() - 1).abs() < 1e-3).all()):
        norms = torch.ones(())
    assert float((codes > 0).float().mean()) > 0.02
    torch.testing.assert_close(ours.encode(vectors, position), codes * norms, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(ours(vectors, position), theirs(seen), atol=2e-4, rtol=1e-4)
    flat, flat_position = vectors.flatten(0, 1), position.flatten()
    sparse = ours.sparse_encode(flat, flat_position).dense()
    torch.testing.assert_close(sparse, (codes * norms).flatten(0, 1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: f"{published.release}-{published.rule}")
def test_a_published_sae_equals_that_of_saelens(theirs, published, unpickled_here, tmp_path):
    expected = theirs(published)
    sources = [published.name, f"hf:{published.repo}/{published.path}"]
    if not published.only_listed:
        sources.append(folder_with(published, tmp_path))
    for source in sources:
        ours, origin = read_external(source, n_positions=N_POSITIONS, allow_pickle=published.is_pickled)
        assert_equal(ours, expected, published)
        assert (origin["layer"], origin["site"]) == published.site
        assert origin["model"] == published.model
        assert ours.rule.settings.kind == published.rule
        assert origin.get("metadata", {}).get("context_size") == published.context_size
        assert published.metadata.items() <= origin.get("metadata", {}).items()
    if not published.centered:
        converted = from_saelens(expected, n_positions=N_POSITIONS)
        assert_equal(converted, expected, published)


REFUSED = [
    ("saelens:gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104", "holds SAEs of attention heads"),
    ("saelens:gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76", "holds transcoders"),
    ("saelens:gemma-scope-2-270m-pt-att/layer_12_width_16k_l0_big", "attn_out holds SAEs of attention heads"),
    ("saelens:gemma-scope-2-270m-pt-transcoders-all/layer_0_width_16k_l0_big", "transcoder_all holds transcoders"),
    ("saelens:mwhanna-qwen3-4b-transcoders/layer_0", "holds transcoders, which posmask does not read"),
    ("saelens:mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_0", "holds cross-layer transcoders"),
    ("saelens:gpt2-small-hook-z-kk/blocks.0.hook_z", "holds SAEs of attention heads"),
    ("saelens:temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "depend on earlier tokens by attention"),
    ("hf:google/gemma-scope-2b-pt-att/layer_3/width_16k", "gemma-scope-2b-pt-att holds SAEs of attention heads"),
    ("saelens:gemma-scope-2b-pt-ers/x", r"no release 'gemma-scope-2b-pt-ers' \(did you mean 'gemma-scope-2b-pt-res'\?"),
    ("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pr", r"no SAE .* \(did you mean 'blocks.8.hook_resid_pre'\?\)"),
    ("saelens:gpt2-small-res-jb", "release gpt2-small-res-jb holds several SAEs: choose one of its 13, such as"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_before_it_is_downloaded(local_hub, source, message):  # noqa: F811
    release, _, sae_id = source.partition(":")[2].partition("/")
    if release in _releases() and sae_id:
        listed = _releases()[release]
        path = next((str(sae["path"]) for sae in listed["saes"] if sae["id"] == sae_id), "")
        end = "safetensors" if listed.get("conversion_func") == "gemma_3" else "npz"
        local_hub.files[listed["repo_id"]] = {f"{path}/params.{end}": b""}
    local_hub.files.setdefault("google/gemma-scope-2b-pt-att", {})["layer_3/width_16k/params.npz"] = b""
    with pytest.raises(BadSetting, match=message) as caught:
        read_external(source, n_positions=N_POSITIONS)
    assert "\n" not in str(caught.value)
    assert not [request for request in local_hub.requests if "/resolve/" in request]


def test_a_pickle_is_neither_downloaded_nor_read_unless_allowed(local_hub, tmp_path):  # noqa: F811
    for published in PUBLISHED:
        if not published.is_pickled:
            continue
        local_hub.files[published.repo] = published.files
        for source in (published.name, folder_with(published, tmp_path)):
            with pytest.raises(BadSetting, match=r"is a pickle, which can run code .*: pass --allow-pickle"):
                read_external(source, n_positions=N_POSITIONS)
    assert not [request for request in local_hub.requests if "/resolve/" in request]


class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/posmask-was-here"),))


HUGE = torch.zeros(1).expand(10**7, 10**7)
HOSTILE_PICKLES = [
    ({"encoder.weight": RunsCode()}, "it holds more than tensors and containers, which could run code"),
    ({"W_enc": HUGE, "W_dec": HUGE}, r"its tensors have 800,000,000,000,000 bytes, the file [\d,]+"),
    ([torch.zeros(3)], "it holds a list, not tensors by name"),
    ({"step": 3}, "it holds no tensors by name"),
    ({"W_enc": torch.eye(3).to_sparse()}, "W_enc is not a dense tensor"),
    (None, r"^\n\w+Error: "),
]


@pytest.mark.parametrize(("content", "reason"), HOSTILE_PICKLES)
def test_hostile_pickles_raise_an_error(content, reason, tmp_path, monkeypatch):
    from posmask.interop import unpickle

    monkeypatch.setattr(unpickle, "_limit_memory", lambda more: None)
    path = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    path.write_bytes(b"PK\x03\x04 not a zip") if content is None else torch.save(content, path)
    with pytest.raises(SystemExit) as caught:
        unpickle.main(path, tmp_path / "out")
    assert re.search(reason, str(caught.value.code))
    assert not (tmp_path / "out").exists()


def test_pickles_are_read_in_a_process_with_limited_memory(tmp_path):
    qwen = next(published for published in PUBLISHED if published.release.startswith("qwen"))
    ours, _ = read_external(folder_with(qwen, tmp_path), n_positions=N_POSITIONS, allow_pickle=True)
    assert ours.d_sae == OVERRIDES["d_sae"]
    path = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save({"encoder.weight": RunsCode()}, path)
    with pytest.raises(DamagedFolder, match=r"\.pth cannot be read \(it holds more than tensors and") as caught:
        read_external(path, n_positions=N_POSITIONS, allow_pickle=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow  # It compresses 1.5 GiB.
def test_a_pickle_that_unpacks_to_more_memory_than_its_size_raises_an_error(tmp_path):
    torch.save({"W_enc": torch.zeros(3)}, tmp_path / "small.pt")
    path, n_numbers = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", 3 * 2**27
    with zipfile.ZipFile(tmp_path / "small.pt") as small, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in small.namelist():
            content = small.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"K\x03", b"J" + n_numbers.to_bytes(4, "little"))
            with bomb.open(name, "w") as file:
                if name.endswith("data/0"):
                    for _ in range(24):
                        file.write(bytes(2**26))
                else:
                    file.write(content)
    assert path.stat().st_size < 2**22
    with pytest.raises(DamagedFolder, match=r"it needs more memory than its size justifies|its process ended"):
        read_external(path, n_positions=N_POSITIONS, allow_pickle=True)


SPARSIFY = Path(__file__).parent / "data" / "sparsify"


def sparsify_folder(folder, module="layers.5", run=None, **changes):
    shutil.copytree(SPARSIFY / "layers.5", folder / module)
    settings = json.loads((SPARSIFY / "layers.5" / "cfg.json").read_text()) | changes
    (folder / module / "cfg.json").write_text(json.dumps(settings))
    if run is not None:
        (folder / "config.json").write_text(json.dumps(run))
    return folder / module


def test_an_sae_of_sparsify_1_3_equals_its_own(server):  # noqa: F811
    expected = load((SPARSIFY / "expected.safetensors").read_bytes())
    files = {
        file.relative_to(SPARSIFY).as_posix(): file.read_bytes() for file in SPARSIFY.rglob("*.*") if file.is_file()
    }
    server["EleutherAI/sae-pythia-70m-32k"] = {**files, "layers.1/other.json": b""}
    position = torch.arange(40) % N_POSITIONS
    for source in (
        SPARSIFY / "layers.5",
        "hf:EleutherAI/sae-pythia-70m-32k/layers.5",
        "hf:EleutherAI/sae-pythia-70m-32k",
    ):
        ours, origin = read_external(source, n_positions=N_POSITIONS)
        torch.testing.assert_close(ours.encode(expected["vectors"], position), expected["codes"], atol=1e-5, rtol=1e-5)
        reconstructions = ours(expected["vectors"], position)
        torch.testing.assert_close(reconstructions, expected["reconstructions"], atol=1e-5, rtol=1e-5)
        assert (origin["model"], origin["layer"], origin["site"]) == ("EleutherAI/pythia-70m", 6, "residual_after")
        assert origin["metadata"]["context_size"] == 2049


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transcode": True}, "transcode = True: a transcoder"),
        ({"skip_connection": True}, "skip_connection = True: a sparse coder with a linear skip"),
        ({"signed": True}, "signed = True: an SAE whose codes may be negative"),
        ({"activation": "groupmax"}, "activation = 'groupmax' takes one latent per group"),
        ({"module": "embed_tokens"}, "hook_name = 'embed_tokens' is not a site"),
        ({"module": "copied"}, "neither its files nor the names of its folders say which site"),
        ({"module": "layers.5.mlp"}, "'layers.5.mlp' is the output of a module, and the model's name is unknown"),
        (
            {"module": "layers.5.mlp", "run": {"model": "google/gemma-2-2b"}},
            "a module that google/gemma-2-2b normalizes",
        ),
        ({"d_in": 10**12}, r"W_enc has the shape \[12, 60\], not \[1000000000000, 60\]"),
        ({"num_latents": 10**12}, r"W_enc has the shape \[12, 60\]"),
        ({"d_in": None}, "d_in = None is not a positive whole number"),
    ],
)
def test_saes_of_sparsify_that_cannot_be_read_raise_an_error(given, message, tmp_path):
    with pytest.raises(PosmaskError, match=message) as caught:
        read_external(sparsify_folder(tmp_path, **given), n_positions=N_POSITIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "model", "site"),
    [
        ("model.layers.3", None, (4, "residual_after")),
        ("transformer.h.3", None, (4, "residual_after")),
        ("gpt_neox.layers.3", None, (4, "residual_after")),
        ("h.3", None, (4, "residual_after")),
        ("model.layers.3.mlp", "meta-llama/Llama-3.1-8B", (4, "mlp")),
        ("model.layers.3.self_attn", "meta-llama/Llama-3.1-8B", (4, "attention")),
        ("gpt_neox.layers.3.attention", "pythia-70m", (4, "attention")),
    ],
)
def test_names_of_modules_are_sites(module, model, site):
    assert layer_and_site(module, model) == site


@pytest.mark.parametrize(
    "name", ["model.layers", "model.layers.3.mlp.up_proj", "layers.3.q_proj", "h.99999", "lm_head"]
)
def test_other_modules_raise_an_error(name):
    with pytest.raises(BadSetting, match="is not a site that posmask reads"):
        layer_and_site(name, "meta-llama/Llama-3.1-8B")


def one(release, rule=None):
    return next(p for p in PUBLISHED if p.release.startswith(release) and rule in (None, p.rule))


def changed_settings(published, folder, **changes):
    """Write a published SAE with other settings; those of None are left out."""
    path = folder_with(published, folder)
    file = path / "cfg.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return path


def test_a_factor_of_the_vectors_is_folded(saelens, tmp_path):
    path = changed_settings(
        one("gemma-2-2b-res-matryoshka"), tmp_path, normalize_activations="expected_average_only_in"
    )
    with pytest.raises(
        BadSetting, match="by a factor that is in none of its files: read the SAE by its name in SAELens"
    ):
        read_external(path)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37}))
    theirs = saelens.SAE.load_from_disk(path)
    theirs.fold_activation_norm_scaling_factor(0.37)
    assert_equal(read_external(path, n_positions=N_POSITIONS)[0], theirs, one("gemma-2-2b-res-matryoshka"))
    for factor in (0, -1, float("nan"), float("inf"), "2", True):
        (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        with pytest.raises(BadSetting, match=r"the factor of the vectors' norm is .*, not a number above 0"):
            read_external(path)


@pytest.mark.parametrize(
    ("normalize", "lost"),
    [
        ("layer_norm", "each vector's mean and standard deviation"),
        ("constant_norm_rescale", "each vector's norm"),
        ("covariance_whitening", "the mean and covariance of the training vectors"),
        ("other", "'other' is unknown"),
    ],
)
def test_normalizations_that_cannot_be_folded_say_what_would_be_lost(normalize, lost, tmp_path):
    path = changed_settings(one("gemma-2-2b-res-matryoshka"), tmp_path, normalize_activations=normalize)
    with pytest.raises(BadSetting, match=lost):
        read_external(path)


def test_settings_of_saelens_s_list_replace_those_of_the_files(server, tmp_path):  # noqa: F811
    published = one("gpt2-small-res-jb")
    content = {
        name.replace(published.path, "mistral_7b_layer_8"): value.replace(b"gpt2-small", b"mistral-7b")
        for name, value in published.files.items()
    }
    server["JoshEngels/Mistral-7B-Residual-Stream-SAEs"] = content
    for source in (
        "saelens:mistral-7b-res-wg/blocks.8.hook_resid_pre",
        "hf:JoshEngels/Mistral-7B-Residual-Stream-SAEs",
    ):
        with pytest.raises(BadSetting, match="'constant_norm_rescale' uses each vector's norm"):
            read_external(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "tanh-relu"}, "activation_fn = 'tanh-relu' is not supported"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4, "signed": True}}, "signed = True"),
        ({"hook_point": "blocks.8.attn.hook_z"}, "reshape_activations = 'hook_z' reads attention heads"),
        ({"hook_point_head_index": 3}, "hook_head_index = 3: an SAE of one attention head"),
        ({"hook_point": "blocks.8.hook_resid_mid"}, "'blocks.8.hook_resid_mid' is not a site"),
        ({"architecture": "gated"}, "the weights lack b_gate"),
        ({"d_sae": None}, "cfg.json lacks 'd_sae'"),
        ({"model_from_pretrained_kwargs": [1]}, r"model_from_pretrained_kwargs = \[1\] is not a table"),
        (
            {"model_name": "gemma-2b", "model_from_pretrained_kwargs": {"center_writing_weights": True}},
            r"center_writing_weights = True: .* for models with LayerNorm only \(gpt2, pythia, ..\), not for gemma-2b",
        ),
    ],
)
def test_folders_of_saelens_before_6_that_cannot_be_read(changes, message, tmp_path):
    with pytest.raises(PosmaskError, match=message) as caught:
        read_external(changed_settings(one("gpt2-small-res-jb"), tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_factors_of_finetuning_are_folded(tmp_path):
    published, factor = one("gpt2-small-res-jb"), torch.linspace(0.5, 2, OVERRIDES["d_sae"])
    path = changed_settings(published, tmp_path, finetuning_scaling_factor=True)
    weights = load((path / "sae_weights.safetensors").read_bytes())
    (path / "sae_weights.safetensors").write_bytes(save({**weights, "scaling_factor": factor}))
    vectors, position = contexts()
    codes = ((vectors - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    expected = (codes * factor) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(read_external(path)[0](vectors, position), expected, atol=2e-4, rtol=1e-4)


def test_metadata_is_kept_and_explained(tmp_path):
    changes = {
        "prepend_bos": False,
        "seqpos_slice": [1, 64],
        "exclude_special_tokens": [0, 1],
        "model_from_pretrained_kwargs": {"center_writing_weights": True, "checkpoint_index": 3, "fold_ln": True},
    }
    sae, origin = read_external(changed_settings(one("gpt2-small-res-jb"), tmp_path, **changes), n_positions=200)
    kept = {"context_size": 128, "dataset_path": "Skylion007/openwebtext", "hook_name": "blocks.8.hook_resid_pre"}
    assert origin["metadata"] == {**changes, **kept}
    said = " ".join(remarks(origin, sae.mask.n_positions))
    assert "on contexts without BOS" in said
    assert "on the positions [1, 64] (start, stop, step)" in said
    assert "contexts of 128 tokens and is used at 200 positions" in said
    assert "vectors without their mean over d_model (center_writing_weights)" in said
    assert "loaded with {'checkpoint_index': 3}: check" in said
    _, plain = read_external(folder_with(one("gemma-2-2b-res-matryoshka"), tmp_path))
    assert list(remarks(plain, 1024)) == []
    assert list(remarks({"layer": 3}, 16)) == []  # a cell of a study


def test_an_early_sae_says_that_its_centering_is_unknown_unless_it_is_listed(server, tmp_path):  # noqa: F811
    published = one("gpt2-small-res-jb")
    server[published.repo] = published.files
    _, unlisted = read_external(folder_with(published, tmp_path))
    assert "do not say whether vectors were centered" in " ".join(remarks(unlisted, 128))
    for source in (published.name, f"hf:{published.repo}/{published.path}"):
        assert "do not say" not in " ".join(remarks(read_external(source)[1], 128))
    with_rms_norm = read_external(changed_settings(published, tmp_path, model_name="gemma-2b"))[1]
    assert "do not say" not in " ".join(remarks(with_rms_norm, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saes_of_other_precisions_encode_in_float32(saelens, dtype, tmp_path):
    published = one("gemma-2-2b-res-matryoshka")
    path = folder_with(published, tmp_path)
    weights = load((path / "sae_weights.safetensors").read_bytes())
    rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
    (path / "sae_weights.safetensors").write_bytes(save(rounded))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = saelens.SAE.load_from_disk(path)
    for ours in (
        read_external(path, n_positions=N_POSITIONS)[0],
        from_saelens(theirs.to(dtype), n_positions=N_POSITIONS),
    ):
        assert ours.encoder.dtype == torch.float32
        vectors, position = contexts()
        assert ours.encode(vectors.to(dtype), position).dtype == torch.float32
        assert_equal(ours, theirs.to(torch.float32), published)
        sparse = ours.sparse_encode(vectors.flatten(0, 1).to(dtype), position.flatten())
        assert sparse.value.dtype == torch.float32


VALUES = [None, "", "x", -1, 0, 1.5, 10**12, 10**400, True, [], [1], {}, float("nan")]


def settings_with(published, changes):
    """The files of a published SAE with one setting, or one setting of a table in it, replaced or left out."""
    for name, content in published.files.items():
        if not name.endswith(".json"):
            continue
        settings = json.loads(content)
        tables = [(key,) for key in settings]
        tables += [(key, inner) for key, value in settings.items() if isinstance(value, dict) for inner in value]
        for where in tables:
            for value in changes:
                changed = json.loads(content)
                table = changed if len(where) == 1 else changed[where[0]]
                table[where[-1]] = value
                if value == "":
                    del table[where[-1]]
                yield {**published.files, name: json.dumps(changed).encode()}


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: f"{published.release}-{published.rule}")
def test_hostile_settings_and_weights_raise_one_sentence(published, tmp_path, unpickled_here):
    """Every setting gets absurd values, and every tensor is dropped, misshapen or not a number."""
    versions = [*settings_with(published, VALUES), *weights_with(published)]
    messages = []
    for files in versions:
        folder = folder_with(dataclasses.replace(published, files=files), tmp_path)
        try:
            read_external(folder, n_positions=N_POSITIONS, allow_pickle=True)
        except PosmaskError as error:
            messages.append(str(error))
    assert len(messages) >= 9
    assert not [message for message in messages if "\n" in message]


def weights_with(published):
    read = {
        ".safetensors": load,
        ".npz": lambda data: {k: torch.from_numpy(v) for k, v in np.load(io.BytesIO(data)).items()},
    }
    read |= dict.fromkeys((".pt", ".pth"), lambda data: torch.load(io.BytesIO(data), weights_only=True))
    write = {".safetensors": save, ".npz": npz, ".pt": pickled, ".pth": pickled}
    for name, content in published.files.items():
        if (ending := Path(name).suffix) not in read:
            continue
        tensors = read[ending](content)
        for key in tensors:
            others = {other: tensor for other, tensor in tensors.items() if other != key}
            values = [tensors[key][..., None].contiguous(), torch.full_like(tensors[key].float(), torch.nan)]
            yield from (
                {**published.files, name: write[ending](changed)}
                for changed in (others, *({**others, key: v} for v in values))
            )
        yield {**published.files, name: write[ending]({**tensors, "W_unknown": torch.zeros(3)})}
        yield {**published.files, name: content[: len(content) // 2]}
        yield {**published.files, name: b""}


def is_read(release, listed, sae):
    """Whether a listed SAE can be read, as far as names say it; layer_norm is known of OpenAI's SAEs (v5)."""
    conversion, place = listed.get("conversion_func"), f"models--{listed['repo_id']}/{sae['path']}"
    if conversion in UNREADABLE_CONVERSIONS or "embedding" in place:
        return False
    (format,) = [format for format in FORMATS if conversion in format.conversions]
    try:
        format.check_names([*reversed(place.split("/"))])
    except BadSetting:
        return False
    unsupported = "hook_resid_mid" in sae["id"] or re.search(r"gpt2-small-.*-v5-", release)
    return not unsupported and "normalize_activations" not in (listed.get("config_overrides") or {})


def test_the_page_has_the_number_of_listed_saes_that_are_read(saelens):
    if saelens.__version__ != "6.54.12":
        pytest.skip("the page counts the list of SAELens 6.54.12")
    counts = {}
    for release, listed in _releases().items():
        of_loader = counts.setdefault(listed.get("conversion_func") or "SAELens's own", [0, 0])
        of_loader[0] += len(listed["saes"])
        of_loader[1] += sum(is_read(release, listed, sae) for sae in listed["saes"])
    page = (Path(__file__).parent.parent / "docs" / "saelens.md").read_text(encoding="utf8")
    total = [sum(numbers) for numbers in zip(*counts.values(), strict=True)]
    text = " ".join(page.split())
    assert (
        f"Of the {total[0]:,} SAEs that SAELens 6.54.12 lists, posmask has a reader for {total[1]:,}, by name" in text
    )
    rows = re.findall(r"^\| (.*?) \| ([\d,]+) \|\s*([\d,]*)\s*\| .*\|$", page, re.MULTILINE)
    for loaders, listed, read in rows:
        names = [name.strip("`") for name in loaders.split(", ")]
        expected = [sum(numbers) for numbers in zip(*(counts.pop(name) for name in names), strict=True)]
        assert [int(number.replace(",", "") or 0) for number in (listed, read)] == expected, loaders
    assert not counts


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "topk", "standard", "gated", "jumprelu"])
def test_an_sae_in_training_is_converted_as_saelens_saves_it(saelens, architecture, tmp_path):
    from sae_lens.registry import get_sae_training_class

    of_class = {
        "batchtopk": {"k": 4},
        "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [30, 60]},
        "topk": {"k": 4},
    }
    sae_class, cfg_class = get_sae_training_class(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_class(cfg_class(d_in=D_MODEL, d_sae=OVERRIDES["d_sae"], **of_class.get(architecture, {})))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
            if hasattr(sae, "topk_threshold"):
                sae.topk_threshold.fill_(0.5)
        before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
        if architecture == "topk":
            sae.cfg.rescale_acts_by_decoder_norm = True
        sae.save_inference_model(tmp_path)
        theirs = saelens.SAE.load_from_disk(tmp_path)
    ours = from_saelens(sae, n_positions=N_POSITIONS)
    vectors, position = contexts()
    torch.testing.assert_close(ours(vectors, position), theirs(vectors), atol=2e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("kind", ["slice", "soft"])
def test_an_sae_of_posmask_in_saelens_is_converted_back(saelens, kind):
    from posmask.interop.saelens import as_saelens

    sae = scaled(make_sae(kind))
    vectors, position = contexts()
    ours = posmask.from_saelens(as_saelens(sae, ORIGIN))
    assert ours.mask.settings == sae.mask.settings
    torch.testing.assert_close(ours.encode(vectors, position), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)


def test_other_objects_raise_an_error(saelens):
    with pytest.raises(BadSetting, match="a str is not an SAE of SAELens: give what SAE"):
        from_saelens("gpt2-small-res-jb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = saelens.StandardSAEConfig(d_in=4, d_sae=8, normalize_activations="layer_norm")
        with pytest.raises(BadSetting, match="this SAE: normalize_activations = 'layer_norm' uses each vector's mean"):
            from_saelens(saelens.StandardSAE(cfg), n_positions=8)


def test_a_format_without_a_reader_is_loaded_with_saelens(theirs, monkeypatch):
    """Newer versions of SAELens may list formats that posmask does not know."""
    published = one("gemma-2-2b-res-matryoshka")
    expected = theirs(published)
    monkeypatch.setattr(sources, "FORMATS", ())
    ours, origin = read_external(published.name, n_positions=N_POSITIONS)
    assert_equal(ours, expected, published)
    assert (origin["layer"], origin["site"]) == published.site


def test_names_of_saelens_s_list_need_saelens(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _releases.cache_clear()
    try:
        with pytest.raises(MissingExtra, match=r"need SAELens: pip install 'posmask\[saelens\]', or give hf:USER/NAME"):
            read_external("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
    finally:
        _releases.cache_clear()


def test_the_command_imports_by_name_and_prints_remarks(server, unpickled_here, tmp_path):  # noqa: F811
    def run(*words):
        return CliRunner().invoke(app, ["import", *map(str, words)])

    jb, relu = one("gpt2-small-res-jb"), one("sae_bench_pythia70m_sweep_standard")
    server[jb.repo], server[relu.repo] = jb.files, relu.files
    result = run(jb.name, tmp_path / "jb", "--model-name", "openai-community/gpt2")
    assert result.exit_code == 0, result.output
    assert "Written: " in result.output
    assert "60 latents, rule relu, mask open, 128 positions" in result.output
    assert "reconstructions lack that mean" in " ".join(result.output.split())
    assert read_origin(tmp_path / "jb")["model"] == "openai-community/gpt2"
    refused = run(relu.name, tmp_path / "relu")
    assert isinstance(refused.exception, BadSetting)
    assert not (tmp_path / "relu").exists()
    assert run(relu.name, tmp_path / "relu", "--allow-pickle", "--n-positions", 16).exit_code == 0
    assert read_sae(tmp_path / "relu").mask.n_positions == 16


@pytest.mark.parametrize(
    ("release", "file", "changes", "message"),
    [
        (
            "gemma-scope-2-270m-pt-res",
            "config.json",
            {"hf_hook_point_in": "model.layers.9.output"},
            "of layer 12, but its",
        ),
        (
            "gemma-scope-2-270m-pt-res",
            "config.json",
            {"hf_hook_point_in": "model.layers.12.post_feedforward_layernorm.output"},
            "is named resid_post of layer 12, but its config.json says mlp_out",
        ),
        (
            "gemma-scope-2-270m-pt-mlp",
            "config.json",
            {"hf_hook_point_out": "model.layers.13.output"},
            "is named mlp_out of layer 12, but its config.json says transcoder",
        ),
        ("gemma-scope-2-270m-pt-res", "config.json", {"architecture": "topk"}, "'topk' .* is not jump_relu"),
        ("llama_scope_lxr", "hyperparams.json", {"hook_point_out": "blocks.16.hook_mlp_out"}, "a transcoder"),
        ("llama_scope_lxr", "hyperparams.json", {"use_glu_encoder": True}, "use_glu_encoder = True multiplies two"),
        ("llama_scope_lxr", "hyperparams.json", {"d_sae": 10**12}, r"W_enc has the shape \[12, 60\]"),
        (
            "llama-3.1-8b-instruct-andyrdt",
            "config.json",
            {"trainer": {"dict_class": "CrossCoder"}},
            "'CrossCoder' is not",
        ),
        ("llama-3.1-8b-instruct-andyrdt", "config.json", {"buffer": {"io": "in_and_out"}}, "io = 'in_and_out'"),
    ],
)
def test_settings_that_contradict_names_or_need_more_raise_an_error(
    release, file, changes, message, tmp_path, unpickled_here
):
    path = folder_with(one(release), tmp_path)
    settings = json.loads((path / file).read_text())
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    (path / file).write_text(json.dumps(settings))
    with pytest.raises(PosmaskError, match=message) as caught:
        read_external(path, n_positions=N_POSITIONS, allow_pickle=True)
    assert "\n" not in str(caught.value)


def test_a_site_in_settings_wins_over_assumptions(tmp_path, unpickled_here):
    """SAELens takes every SAE of dictionary_learning for one of the residual stream."""
    path = folder_with(one("llama-3.1-8b-instruct-andyrdt"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["trainer"]["submodule_name"] = "mlp_out_layer_7"
    (path / "config.json").write_text(json.dumps(config))
    _, origin = read_external(path, n_positions=N_POSITIONS, allow_pickle=True)
    assert (origin["layer"], origin["site"]) == (8, "mlp")
    config["trainer"]["submodule_name"] = "resid_mid_layer_7"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadSetting, match=r"'blocks\.7\.resid_mid' is not a site"):
        read_external(path, n_positions=N_POSITIONS, allow_pickle=True)
