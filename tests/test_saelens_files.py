"""Import and export of SAELens folders without SAELens, and folders that raise an error."""

import json
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import D_MODEL, D_SAE, KINDS, N_POSITIONS, RULES, make_sae, make_vectors
from posmask.cli.commands import app
from posmask.errors import BadSetting, DamagedFolder, PosmaskError
from posmask.interop.reading import import_sae
from posmask.interop.readme import IMPORT_LINE
from posmask.interop.saelens_files import export_saelens
from posmask.masks import make_mask, mask_settings
from posmask.sae.files import read_origin, read_sae, write_sae
from posmask.storage.manifest import write_folder
from test_saelens import ORIGIN, SCALE, contexts, exported, scaled


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kind", "gating"),
    [case for case in KINDS if case[0] in ("soft", "importance", "switch") or case == ("slice", "gradient")],
)
def test_export_and_import_give_the_same_sae(rule, kind, gating, tmp_path):
    sae = scaled(make_sae(kind, gating, rule=rule))
    import_sae(exported(sae, tmp_path), tmp_path / "back")
    imported = read_sae(tmp_path / "back")
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    torch.testing.assert_close(imported.encode(vectors, position), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(imported(vectors, position), sae(vectors, position), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(imported.decoder.norm(dim=1), torch.ones(D_SAE))
    assert imported.mask.settings == sae.mask.settings
    assert imported.rule.settings == sae.rule.settings
    assert torch.equal(imported.mask.openness(), sae.mask.openness())
    origin = read_origin(tmp_path / "back")
    assert origin["layer"] == ORIGIN["layer"]
    assert origin["training_tokens"] == 1000
    assert origin["imported"]["architecture"] == "posmask"


def older(folder):
    """Rewrite an export as posmask did before codes were in the model's units: decoder rows of norm `SCALE`."""
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"]["posmask_scale"], cfg["unknown_position"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    weights = load_file(folder / "sae_weights.safetensors")
    factors = {"W_enc": 1 / SCALE, "W_dec": SCALE, "b_enc": 1 / SCALE, "rule.threshold": 1 / SCALE}
    factors["rule.magnitude_bias"] = 1 / SCALE
    scaled_weights = {name: tensor * factors.get(name, 1) for name, tensor in weights.items()}
    save_file(scaled_weights, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("rule", RULES)
def test_exports_of_before_unit_rows_are_read(saelens, rule, tmp_path):
    sae = scaled(make_sae("slice", rule=rule))
    folder = exported(sae, tmp_path)
    older(folder)
    imported, theirs = import_sae(folder, tmp_path / "back"), saelens.SAE.load_from_disk(folder)
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    torch.testing.assert_close(imported.encode(vectors, position), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(imported(vectors, position), sae(vectors, position), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs.encode(vectors), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(vectors), sae(vectors, position), atol=1e-4, rtol=1e-5)


def test_rescaled_rows_of_an_export_keep_the_codes_of_the_original(saelens, tmp_path):
    sae = scaled(make_sae("slice", rule="gated"))
    folder = exported(sae, tmp_path)
    weights = load_file(folder / "sae_weights.safetensors")
    for name, factor in {"W_dec": 3, "W_enc": 1 / 3, "b_enc": 1 / 3, "rule.magnitude_bias": 1 / 3}.items():
        weights[name] *= factor
    save_file(weights, folder / "sae_weights.safetensors")
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    imported = import_sae(folder, tmp_path / "back")
    torch.testing.assert_close(imported.encode(vectors, position), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), [2.5]])
def test_absurd_scales_raise_an_error(scale, tmp_path):
    folder = exported(scaled(make_sae("slice")), tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["posmask_scale"] = scale
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert_import_raises(folder, PosmaskError, "scale")


THEIRS = {"standard": {}, "topk": {"k": 4}, "topk rescaled": {"k": 4, "rescale_acts_by_decoder_norm": True}}
THEIRS |= {"jumprelu": {}, "gated": {}}


def random_tensors(architecture, *, unit):
    random = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    tensors = {"W_enc": draw(D_MODEL, D_SAE), "W_dec": draw(D_SAE, D_MODEL), "b_dec": draw(D_MODEL)}
    if unit:
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    if architecture == "gated":
        return tensors | {"b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": 0.3 * draw(D_SAE)}
    tensors["b_enc"] = draw(D_SAE)
    return tensors | ({"threshold": draw(D_SAE).abs()} if architecture == "jumprelu" else {})


def their_folder(folder, name="standard", *, unit=True, metadata=None, drop=(), **changes):
    folder.mkdir()
    architecture = name.partition(" ")[0]
    facts = {"sae_lens_version": "6.54.12", "context_size": N_POSITIONS, "hook_name": "blocks.1.hook_resid_post"}
    cfg = {"architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    cfg |= THEIRS.get(name, {}) | changes
    cfg["metadata"] = {**facts, **(metadata or {})}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {key: tensor for key, tensor in random_tensors(architecture, unit=unit).items() if key not in drop}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_sae_equals_the_sae_in_saelens(saelens, name, unit, subtracts, tmp_path):
    folder = their_folder(tmp_path / "theirs", name, unit=unit, apply_b_dec_to_input=subtracts)
    if name == "topk" and not unit:
        with pytest.raises(BadSetting, match=r"norms from \d\.\d+ to \d\.\d+ that topk does not account for"):
            import_sae(folder, tmp_path / "ours")
        return
    theirs, ours = saelens.SAE.load_from_disk(folder), import_sae(folder, tmp_path / "ours")
    vectors, position = contexts()
    expected = theirs.encode(vectors)
    norms = theirs.W_dec.norm(dim=1) if not unit and name != "topk rescaled" else 1
    torch.testing.assert_close(ours.encode(vectors, position), expected * norms, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(vectors, position), theirs(vectors), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decoder.norm(dim=1), torch.ones(D_SAE))
    assert ours.mask.settings.kind == "open"
    assert ours.mask.n_positions == N_POSITIONS
    origin = read_origin(tmp_path / "ours")
    assert (origin["layer"], origin["site"]) == (2, "residual_after")


HOOK_NAMES = {
    (2, "residual_after"): "blocks.1.hook_resid_post",
    (2, "residual_before"): "blocks.1.hook_resid_pre",
    (1, "residual_before"): "blocks.0.hook_resid_pre",
    (2, "attention"): "blocks.1.hook_attn_out",
    (2, "mlp"): "blocks.1.hook_mlp_out",
}


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize(("layer", "site"), HOOK_NAMES)
def test_the_site_survives_export_and_import(layer, site, lossy, tmp_path):
    cell = tmp_path / "cell"
    write_sae(scaled(make_sae("open")), cell, {"layer": layer, "site": site})
    cfg = export_saelens(cell, tmp_path / "theirs", lossy=lossy)
    assert cfg["metadata"]["hook_name"] == HOOK_NAMES[layer, site]
    import_sae(tmp_path / "theirs", tmp_path / "back")
    origin = read_origin(tmp_path / "back")
    # The stream before layer 2 is the stream after layer 1.
    expected = (1, "residual_after") if (layer, site) == (2, "residual_before") else (layer, site)
    assert (origin["layer"], origin["site"]) == expected


@pytest.mark.parametrize("lossy", [False, True])
def test_exports_state_how_the_model_is_read(lossy, tmp_path):
    cell, stated = tmp_path / "cell", {"prepend_bos": True, "exclude_special_tokens": True, "seqpos_slice": [None]}
    stated |= {"hook_head_index": None, "context_size": N_POSITIONS}
    stated |= {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    write_sae(scaled(make_sae("open")), cell, ORIGIN)
    metadata = export_saelens(cell, tmp_path / "theirs", lossy=lossy)["metadata"]
    assert stated.items() <= metadata.items()
    assert ("posmask_import" in metadata) != lossy


@pytest.mark.parametrize("lossy", [False, True])
def test_metadata_of_an_imported_sae_is_exported_again(lossy, tmp_path):
    kept = {"hook_name": "blocks.2.hook_resid_pre", "hook_name_out": "blocks.2.hook_resid_pre", "prepend_bos": False}
    kept |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "exclude_special_tokens": [0, 1]}
    kept |= {"seqpos_slice": [5, -5], "hook_head_index": None, "context_size": 1024}
    older = {"posmask_scale": 3.0}
    cell = tmp_path / "cell"
    write_sae(scaled(make_sae("open")), cell, {**ORIGIN, "metadata": {**kept, **older}})
    metadata = export_saelens(cell, tmp_path / "theirs", lossy=lossy)["metadata"]
    assert kept.items() <= metadata.items()
    assert metadata["posmask_scale"] == SCALE
    assert metadata["model_name"] == "tiny"


@pytest.mark.parametrize(
    ("to", "position", "expected"),
    [
        ("saelens", None, "If they are others, pass them"),
        ("saelens", "0", "unknown are encoded at position 0. Explained"),
        ("saelens", "typical", "unknown are encoded at position 8. Explained"),
        ("saelens", "middle", "unknown_position = 'middle' is not a position of the mask: choose 0 to 15"),
        ("saelens", "-1", "unknown_position = -1 is not a position of the mask: choose 0 to 15"),
        ("saelens", "lifted", "'lifted' is only for the lossy export"),
        ("saelens-lossy", None, "is fixed at position 8"),
        ("saelens-lossy", "0", "is fixed at position 0"),
        ("saelens-lossy", "lifted", "every latent is open everywhere"),
    ],
)
def test_the_command_exports_at_a_position(to, position, expected, tmp_path):
    write_sae(scaled(make_sae("slice")), tmp_path / "cell", ORIGIN)
    words = ["export", str(tmp_path / "cell"), str(tmp_path / "theirs"), "--to", to]
    words += [] if position is None else [f"--unknown-position={position}"]
    result = CliRunner().invoke(app, words)
    is_error = "unknown_position" in expected or "only for" in expected
    text = str(result.exception) if is_error else result.output
    assert expected in " ".join(text.split())
    assert (result.exit_code != 0) == is_error == (not (tmp_path / "theirs").exists())


@pytest.mark.parametrize("lossy", [False, True])
def test_the_folder_says_how_to_load_it(lossy, tmp_path):
    text = (exported(scaled(make_sae("slice")), tmp_path, lossy=lossy) / "README.md").read_text()
    assert text.startswith("# Sparse autoencoder of tiny at blocks.1.hook_resid_post\n")
    assert ("SAELens loads it without posmask" in text) == lossy
    assert (f"```python\n{IMPORT_LINE}\nfrom sae_lens" in text) != lossy
    assert "codes are 2.5 times those of posmask." in text


def write_scope(folder, **more):
    folder.mkdir(parents=True)
    tensors = random_tensors("jumprelu", unit=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()}, **more)
    return tensors


SCOPE = "layer_12/width_16k/average_l0_82"


@pytest.mark.parametrize(
    ("path", "site"),
    [
        (f"gemma-scope-2b-pt-res/{SCOPE}", (13, "residual_after")),
        (f"gemma-scope-2b-pt-mlp/{SCOPE}", (13, "mlp")),
        (f"models--google--gemma-scope-9b-it-res/snapshots/0a1b/{SCOPE}", (13, "residual_after")),
        (f"models--google--gemma-scope-2b-pt-mlp/snapshots/0a1b/{SCOPE}", (13, "mlp")),
        (f"gemma-scope-res/gemma-scope-2b-pt-mlp/{SCOPE}", (13, "mlp")),
        (f"Gemma-Scope-2b-pt-MLP/{SCOPE}", (13, "mlp")),
    ],
)
def test_the_site_is_inferred_from_a_gemma_scope_path(path, site, tmp_path):
    write_scope(tmp_path / path)
    import_sae(tmp_path / path, tmp_path / "ours", n_positions=N_POSITIONS)
    origin = read_origin(tmp_path / "ours")
    assert (origin["layer"], origin["site"]) == site


@pytest.mark.parametrize("path", [SCOPE, "gemma-scope-2b-pt-mlp/copied"])
def test_a_gemma_scope_file_of_an_unknown_site_needs_a_hook_name(path, tmp_path):
    """-res, -mlp, -att and -transcoders all have folders of these names."""
    write_scope(tmp_path / path)
    with pytest.raises(BadSetting, match="neither its files nor the names of its folders say which site"):
        import_sae(tmp_path / path, tmp_path / "ours", n_positions=N_POSITIONS)
    hook = "blocks.3.hook_mlp_out"
    import_sae(tmp_path / path, tmp_path / "ours", n_positions=N_POSITIONS, hook_name=hook)
    origin = read_origin(tmp_path / "ours")
    assert (origin["layer"], origin["site"]) == (4, "mlp")


def test_a_hook_name_that_contradicts_the_files_raises_an_error(tmp_path):
    write_scope(tmp_path / f"gemma-scope-2b-pt-res/{SCOPE}")
    with pytest.raises(BadSetting, match=r"its files say 'blocks.12.hook_resid_post', not hook_name = 'blocks.1.hook"):
        import_sae(
            tmp_path / f"gemma-scope-2b-pt-res/{SCOPE}",
            tmp_path / "ours",
            n_positions=N_POSITIONS,
            hook_name="blocks.1.hook_resid_post",
        )


def test_the_site_of_a_linked_gemma_scope_folder_is_that_of_its_target(tmp_path):
    write_scope(tmp_path / "gemma-scope-2b-pt-mlp" / SCOPE)
    (tmp_path / "link").symlink_to(tmp_path / "gemma-scope-2b-pt-mlp" / SCOPE)
    import_sae(tmp_path / "link", tmp_path / "ours", n_positions=N_POSITIONS)
    assert read_origin(tmp_path / "ours")["site"] == "mlp"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"gemma-scope-2b-pt-att/{SCOPE}", "gemma-scope-2b-pt-att holds SAEs of attention heads"),
        (f"gemma-scope-2b-pt-transcoders/{SCOPE}", "gemma-scope-2b-pt-transcoders holds transcoders"),
        ("gemma-scope-2b-pt-transcoders", "holds transcoders"),
        (f"models--google--gemma-scope-2b-pt-att/snapshots/0a1b/{SCOPE}", "holds SAEs of attention heads"),
        (f"models--me--my-transcoder/snapshots/0a1b/{SCOPE}", "models--me--my-transcoder holds transcoders"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "hook_name = 'hook_embed' is not a site"),
    ],
)
def test_gemma_scope_of_unsupported_sites_raises_an_error(path, message, tmp_path):
    write_scope(tmp_path / path)
    with pytest.raises(BadSetting, match=message) as caught:
        import_sae(tmp_path / path, tmp_path / "ours", n_positions=N_POSITIONS)
    assert "\n" not in str(caught.value)


def test_unknown_tensors_raise_an_error(tmp_path):
    skip = np.zeros((D_MODEL, D_MODEL), dtype=np.float32)
    write_scope(tmp_path / "gemma-scope-2b-pt-res" / SCOPE, W_skip=skip)
    with pytest.raises(BadSetting, match="'jumprelu' has no tensor W_skip"):
        import_sae(tmp_path / "gemma-scope-2b-pt-res" / SCOPE, tmp_path / "ours", n_positions=N_POSITIONS)
    folder = their_folder(tmp_path / "theirs")
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({**weights, "scaling_factor": torch.ones(D_SAE)}, folder / "sae_weights.safetensors")
    # Earlier versions of SAELens wrote scaling factors of 1, which SAELens ignores too.
    import_sae(folder, tmp_path / "ones")
    messages = {"scaling_factor": "a tensor scaling_factor other than 1", "W_skip": "'standard' has no tensor W_skip"}
    for name, tensor in (("scaling_factor", torch.full((D_SAE,), 2.0)), ("W_skip", torch.tensor(skip))):
        save_file({**weights, name: tensor}, folder / "sae_weights.safetensors")
        assert_import_raises(folder, BadSetting, messages[name])


@pytest.mark.parametrize("as_folder", [True, False])
def test_gemma_scope_arrays_are_imported(as_folder, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    tensors = write_scope(folder)
    source = folder if as_folder else folder / "params.npz"
    sae = import_sae(source, tmp_path / "ours", n_positions=N_POSITIONS)
    vectors, position = make_vectors(50)
    preactivation = vectors @ tensors["W_enc"] + tensors["b_enc"]
    expected = preactivation.relu() * (preactivation > tensors["threshold"])
    torch.testing.assert_close(sae.encode(vectors, position), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sae(vectors, position), expected @ tensors["W_dec"] + tensors["b_dec"], atol=1e-4, rtol=0
    )
    assert read_origin(tmp_path / "ours")["layer"] == 13


def assert_import_raises(folder, error, message, **options):
    with pytest.raises(error, match=message) as caught:
        import_sae(folder, folder.parent / "ours", **options)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "ours").exists()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"drop": ("b_enc",)}, DamagedFolder, "the weights lack b_enc, which 'standard' has: fetch them again"),
        ({"name": "gated", "drop": ("r_mag",)}, DamagedFolder, "the weights lack r_mag, which 'gated' has"),
        ({"name": "temporal"}, BadSetting, "architecture 'temporal' is not supported: choose an SAE of one of"),
        ({"d_sae": 8}, DamagedFolder, r"W_enc has the shape \[12, 32\], not \[12, 8\] as d_in = 12 and d_sae = 8"),
        (
            {"metadata": {"hook_name": "blocks.1.attn.hook_z"}},
            BadSetting,
            "hook_name = 'blocks.1.attn.hook_z' is not a",
        ),
        ({"metadata": {"hook_name": "hook_embed"}}, BadSetting, "hook_name = 'hook_embed' is not a site"),
        ({"metadata": {"hook_head_index": 3}}, BadSetting, "hook_head_index = 3: .* one attention head"),
        ({"metadata": {"hook_name_out": "blocks.1.hook_mlp_out"}}, BadSetting, "hook_name_out = .*: a transcoder"),
        ({"metadata": {"hook_name": ["blocks.1.hook_resid_post"]}}, BadSetting, "hook_name = .* is not a site"),
        ({"metadata": {"context_size": None}}, BadSetting, "metadata has no context_size: .* --n-positions"),
        (
            {"normalize_activations": "layer_norm"},
            BadSetting,
            "'layer_norm' uses each vector's mean and standard deviation",
        ),
        ({"reshape_activations": "hook_z"}, BadSetting, "reshape_activations = 'hook_z' reads attention heads"),
        ({"name": "topk", "k": None}, BadSetting, "k Input should be a valid integer"),
        ({"d_in": None}, BadSetting, "d_in = None is not a positive .*: fetch an SAE with complete settings"),
    ],
)
def test_folders_that_cannot_be_imported_raise_an_error(given, error, message, tmp_path):
    assert_import_raises(their_folder(tmp_path / "theirs", **given), error, message)


def test_unreadable_files_raise_an_error(tmp_path):
    assert_import_raises(tmp_path, DamagedFolder, r"holds no SAE of a known format \(SAELens: cfg.json, sae_weights")
    assert_import_raises(tmp_path / "none", DamagedFolder, "none does not exist: give a folder, hf:USER/NAME/PATH or")
    folder = their_folder(tmp_path / "theirs")
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["W_dec"][3, 4] = torch.nan
    save_file(tensors, weights)
    assert_import_raises(folder, DamagedFolder, "W_dec holds NaN or infinite numbers")
    weights.write_bytes(b"\x00\x01")
    assert_import_raises(folder, DamagedFolder, "sae_weights.safetensors cannot be read")
    weights.unlink()
    assert_import_raises(
        folder,
        DamagedFolder,
        r"holds cfg.json, but not sae.safetensors or sae_weights.safetensors: fetch the folder again",
    )
    folder = their_folder(tmp_path / "others")
    (folder / "cfg.json").write_text("{")
    assert_import_raises(folder, DamagedFolder, "is not readable JSON")


@pytest.mark.parametrize("name", THEIRS)
def test_a_zero_decoder_row_becomes_a_latent_that_never_fires(saelens, name, tmp_path):
    folder = their_folder(tmp_path / "theirs", name)
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][[0, 5]] = 0
    save_file(weights, folder / "sae_weights.safetensors")
    if name == "topk":  # In SAELens, it may be one of the k selected latents.
        assert_import_raises(folder, BadSetting, "norms from 0 to 1 that topk does not account for")
        return
    theirs, ours = saelens.SAE.load_from_disk(folder), import_sae(folder, tmp_path / "ours")
    vectors, position = contexts()
    expected = theirs.encode(vectors)
    expected[..., [0, 5]] = 0
    torch.testing.assert_close(ours.encode(vectors, position), expected, atol=1e-4, rtol=1e-4)
    reconstruction = theirs(vectors)
    if name == "topk rescaled":  # SAELens divides by the norms of rows, so its own reconstruction is NaN everywhere.
        assert bool(reconstruction.isnan().all())
        units = theirs.W_dec / theirs.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
        reconstruction = expected @ units + theirs.b_dec
    torch.testing.assert_close(ours(vectors, position), reconstruction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decoder.norm(dim=1), torch.ones(D_SAE))
    sparse = read_sae(tmp_path / "ours").sparse_encode(vectors.flatten(0, 1), position.flatten())
    torch.testing.assert_close(sparse.dense(), ours.encode(vectors, position).flatten(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_decoder_row_of_a_masked_sae_never_fires(rule, tmp_path):
    sae = scaled(make_sae("slice", rule=rule))
    folder = exported(sae, tmp_path)
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][5] = 0
    save_file(weights, folder / "sae_weights.safetensors")
    if rule in ("topk", "batchtopk", "matryoshka", "temporal"):
        assert_import_raises(folder, BadSetting, f"norms from 0 to 1 that {rule} does not account for")
        return
    vectors, position = contexts()
    expected = sae.encode(vectors, position).detach()
    expected[..., 5] = 0
    imported = import_sae(folder, tmp_path / "back")
    torch.testing.assert_close(imported.encode(vectors, position), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(imported(vectors, position), sae.decode(expected), atol=1e-4, rtol=1e-5)


def test_an_sae_with_only_zero_decoder_rows_gives_its_bias(tmp_path):
    folder = their_folder(tmp_path / "theirs")
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({**weights, "W_dec": torch.zeros(D_SAE, D_MODEL)}, folder / "sae_weights.safetensors")
    vectors, position = make_vectors(20)
    reconstruction = import_sae(folder, tmp_path / "ours")(vectors, position)
    torch.testing.assert_close(reconstruction, weights["b_dec"].expand(20, D_MODEL))


HUGE = 10**12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"d_sae": HUGE}, r"W_enc has the shape \[12, 32\], not \[12, 1000000000000\]"),
        ({"d_in": HUGE}, r"W_enc has the shape \[12, 32\], not \[1000000000000, 32\]"),
        ({"d_in": HUGE, "d_sae": HUGE}, "W_enc has the shape"),
        ({"d_sae": 10**400}, "W_enc has the shape"),
        ({"d_sae": -32}, "d_sae = -32 is not a positive whole number"),
        ({"d_sae": 0}, "d_sae = 0 is not a positive whole number"),
        ({"d_sae": "32"}, "d_sae = '32' is not a positive whole number"),
        ({"d_sae": 32.0}, "d_sae = 32.0 is not a positive whole number"),
        ({"d_sae": True}, "d_sae = True is not a positive whole number"),
        ({"d_sae": float("inf")}, "d_sae = inf is not a positive whole number"),
        ({"d_in": float("nan")}, "d_in = nan is not a positive whole number"),
        ({"d_in": [12]}, r"d_in = \[12\] is not a positive whole number"),
        ({"metadata": {"context_size": HUGE}}, "a mask of 1000000000000 positions and 32 latents"),
        ({"metadata": {"context_size": 10**400}}, "a mask of 10+"),
        ({"metadata": {"context_size": -1}}, "n_positions = -1 is not a positive whole number"),
        ({"metadata": {"context_size": "16"}}, "n_positions = '16' is not a positive whole number"),
        ({"metadata": {"context_size": float("inf")}}, "n_positions = inf is not a positive whole number"),
        ({"metadata": {"training_tokens": float("inf")}}, "cannot convert float infinity to integer"),
        ({"metadata": ["context_size"]}, "is not a table"),
        ({"name": "topk", "k": HUGE}, "k = 1000000000000 is more than the 32 latents"),
        ({"architecture": ["standard"]}, "architecture \\['standard'\\]|unhashable"),
    ],
)
def test_absurd_sizes_raise_before_allocation(given, message, tmp_path):
    metadata = given.pop("metadata", {})
    folder = their_folder(tmp_path / "theirs", given.pop("name", "standard"), **{"metadata": {}, **given})
    cfg = json.loads((folder / "cfg.json").read_text())
    if isinstance(metadata, dict):
        metadata = {**cfg["metadata"], **metadata}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "metadata": metadata}))
    assert_import_raises(folder, PosmaskError, message)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("slice", {"n_positions": HUGE}, "a mask of 1000000000000 positions"),
        ("switch", {"n_positions": HUGE}, "a mask of 1000000000000 positions"),
        ("slice", {"n_positions": 8}, r"mask.fixed_openness has the shape \[16, 32\], not \[8, 32\]"),
        ("slice", {"n_positions": None}, "n_positions = None is not a positive whole number"),
        ("split", {"mask": {"n_splittings": 10**10}}, "n_splittings"),
        ("switch", {"mask": {"n_experts": HUGE}}, "n_experts = 1000000000000 is more than the 32 latents"),
        ("switch", {"mask": {"n_experts": HUGE, "free_fraction": 1.0}}, "n_experts = 1000000000000 is more than"),
        ("cohort", {"mask": {"n_cohorts": HUGE, "free_fraction": 1.0}}, "n_cohorts = 1000000000000"),
        ("slice", {"mask": "slice"}, "fetch an SAE with complete settings"),
        ("slice", {"rule": None}, "fetch an SAE with complete settings"),
        ("slice", {"rule": {"l1_coefficient": 10**400}}, "l1_coefficient"),
        ("slice", {"rule": {"l1_coefficient": float("inf")}}, "l1_coefficient"),
    ],
)
def test_absurd_sizes_of_an_exported_sae_raise_an_error(kind, changes, message, tmp_path):
    folder = exported(scaled(make_sae(kind, rule="relu")), tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())
    for name, value in changes.items():
        cfg[name] = {**cfg[name], **value} if isinstance(value, dict) else value
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert_import_raises(folder, PosmaskError, message)


def test_a_band_over_many_positions_raises_quickly():
    with pytest.raises(BadSetting, match="makes 299999 windows of 300000 positions, more than the 2 latents"):
        make_mask(mask_settings({"kind": "band", "growth": 1.0, "free_fraction": 1.0}), 300_000, 2)


def zeros_npz(path, shapes, *, claimed=None):
    """Write a compressed params.npz of zeros; `claimed` gives other shapes for the headers."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (claimed or shapes)[name]}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(bytes(4 * math.prod(shape)))


def scope_shapes(d_in, d_sae):
    return {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}


def test_an_npz_with_an_excessive_compression_ratio_raises_an_error(tmp_path):
    (tmp_path / "scope").mkdir()
    path = tmp_path / "scope" / "params.npz"
    zeros_npz(path, scope_shapes(64, 100_000))
    assert path.stat().st_size < 100_000
    assert_import_raises(path.parent, DamagedFolder, r"unpack to 52,\d+,\d+ bytes, more than 8 times", n_positions=16)
    zeros_npz(path, scope_shapes(4, 8), claimed=scope_shapes(10**6, 10**6))
    assert_import_raises(
        path.parent, DamagedFolder, r"W_enc has the shape \[1000000, 1000000\] in its header", n_positions=16
    )
    shapes = scope_shapes(12, 32)
    zeros_npz(path, {**shapes, "W_enc": (12, 31)})
    assert_import_raises(path.parent, DamagedFolder, r"W_enc has the shape \[12, 31\], not \[12, 32\]", n_positions=16)


def test_a_compressed_npz_is_read(tmp_path):
    (tmp_path / "scope").mkdir()
    tensors = random_tensors("jumprelu", unit=True)
    np.savez_compressed(tmp_path / "scope" / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    hook = "blocks.0.hook_resid_post"
    assert import_sae(tmp_path / "scope", tmp_path / "ours", n_positions=16, hook_name=hook).d_sae == D_SAE


def test_weights_that_overflow_raise_an_error(tmp_path):
    folder = their_folder(tmp_path / "theirs", unit=False)
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"] *= 1e30
    weights["W_enc"] *= 1e30
    save_file(weights, folder / "sae_weights.safetensors")
    assert_import_raises(folder, DamagedFolder, "encoder holds NaN or infinite numbers")


@pytest.mark.parametrize("lossy", [False, True])
def test_a_damaged_cell_is_not_exported(lossy, tmp_path):
    cell = tmp_path / "cell"
    with write_folder(cell, {"what": "test"}) as draft:
        write_sae(scaled(make_sae("slice")), draft, ORIGIN)
    export_saelens(cell, tmp_path / "exported", lossy=lossy)
    flip_a_bit(cell / "sae.safetensors")
    with pytest.raises(DamagedFolder, match=r"sae.safetensors is not what was written"):
        export_saelens(cell, tmp_path / "damaged", lossy=lossy)
    assert not (tmp_path / "damaged").exists()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in the last tensor
    path.write_bytes(content)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_raise_an_error_and_are_never_loaded(tmp_path):
    folder = their_folder(tmp_path / "theirs")
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    (folder / "sae_weights.pt").write_bytes(pickle.dumps(Bomb()))
    assert_import_raises(
        folder, DamagedFolder, r"holds pickled weights \(sae_weights.pt\) of no known format, which are never"
    )
    folder = tmp_path / "scope"
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    assert_import_raises(
        folder, DamagedFolder, r"cannot be read \(W_enc holds pickled objects, which are never", n_positions=16
    )


def test_nothing_is_overwritten(tmp_path):
    folder = their_folder(tmp_path / "theirs")
    with pytest.raises(BadSetting, match="exists and is not empty: name a new folder"):
        import_sae(folder, folder)
