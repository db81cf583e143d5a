"""SAELens loads exported SAEs with every rule and mask and computes the same codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import D_MODEL, D_SAE, FORWARD_ONLY, KINDS, N_POSITIONS, RULES, make_sae, make_vectors
from posmask.errors import BadSetting
from posmask.interop.positions import typical_position
from posmask.interop.saelens_files import export_saelens
from posmask.masks import make_mask, mask_settings
from posmask.sae.files import write_sae

ORIGIN = {"weights": "abc", "layer": 2, "model": "tiny", "training_tokens": 1000}
SCALE = 2.5


def scaled(sae):
    """Set non-trivial centering constants and decoder rows of norm 1, as after training."""
    with torch.no_grad():
        sae.center = torch.linspace(-1, 3, D_MODEL)
        sae.scale = torch.tensor(SCALE)
        sae.decoder /= sae.decoder.norm(dim=1, keepdim=True)
    return sae


def exported(sae, folder, **options):
    cell = folder / "cell"
    cell.mkdir()
    write_sae(sae, cell, ORIGIN)
    export_saelens(cell, folder / "theirs", **options)
    return folder / "theirs"


def contexts(n_contexts=5, length=N_POSITIONS):
    vectors = SCALE * make_vectors(n_contexts * length)[0].view(n_contexts, length, D_MODEL) + 1
    return vectors, torch.arange(length).expand(n_contexts, length)


def assert_scaled(codes, ours):
    """Decoder rows have norm 1 in the model's units, so codes are `SCALE` times as large."""
    torch.testing.assert_close(codes, SCALE * ours, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "gating"), KINDS)
def test_saelens_computes_the_same_codes(saelens, rule, kind, gating, tmp_path):
    sae = scaled(make_sae(kind, gating, rule=rule, free_fraction=0.125))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    assert theirs.cfg.architecture() == "posmask"
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    assert_scaled(theirs.encode(vectors), expected)
    torch.testing.assert_close(theirs.decode(SCALE * expected), sae.decode(expected), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs(vectors), sae(vectors, position), atol=1e-4, rtol=1e-5)
    flat = vectors.flatten(0, 1)
    flat_codes = theirs.encode(flat, positions=position.flatten())
    assert_scaled(flat_codes, expected.flatten(0, 1))
    torch.testing.assert_close(
        theirs(flat, positions=position.flatten()), sae(vectors, position).flatten(0, 1), atol=1e-4, rtol=1e-5
    )
    assert expected.count_nonzero() > 0
    assert theirs.W_enc.shape == (D_MODEL, D_SAE)
    assert torch.equal(theirs.W_dec, sae.decoder)
    assert theirs.cfg.metadata.posmask_scale == SCALE


@pytest.mark.parametrize(
    ("shape", "position_origin", "reason"),
    [
        ((80, D_MODEL), "context", r"vectors of shape \[80, 12\] have no position axis"),
        ((D_MODEL,), "context", r"vectors of shape \[12\] have no position axis"),
        ((5, 1, D_MODEL), "context", r"the one vector per text in shape \[5, 1, 12\] may be at any position"),
        ((5, N_POSITIONS, D_MODEL), "sentence", "position is counted from the sentence, which no shape shows"),
        ((5, N_POSITIONS, D_MODEL), "end", "position is counted from the end, which no shape shows"),
    ],
)
def test_unknown_positions_raise_an_error(saelens, shape, position_origin, reason, tmp_path):
    theirs = saelens.SAE.load_from_disk(exported(scaled(make_sae("slice", position_origin=position_origin)), tmp_path))
    vectors = torch.randn(shape)
    for call in (theirs.encode, theirs, theirs.run_with_cache):
        with pytest.raises(BadSetting, match=reason) as caught:
            call(vectors)
        message = str(caught.value)
        assert "sae.encode(x, positions=p)" in message
        assert "with sae.at(p):" in message
        assert "with sae.without_mask():" in message
        assert ("[batch, position, d_in] from position 0 on" in message) == (position_origin == "context")
        assert ("positions=0" in message) == (shape[-2:] == (1, D_MODEL))


def test_a_single_token_uses_the_given_position(saelens, tmp_path):
    sae = scaled(make_sae("slice"))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    first, last = vectors[:, :1], vectors[:, 9:10]
    expected = sae.encode(vectors, position)
    assert_scaled(theirs.encode(first, positions=0), expected[:, :1])
    with theirs.at(9):
        assert_scaled(theirs.encode(last), expected[:, 9:10])


@pytest.mark.parametrize("kind", ["slice", "soft", "switch"])
def test_the_mask_is_lifted_on_request_only(saelens, kind, tmp_path):
    sae = scaled(make_sae(kind))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    flat = vectors.flatten(0, 1)
    expected = sae.encode(flat, position.flatten(), use_mask=False)
    assert_scaled(theirs.encode(flat, use_mask=False), expected)
    with theirs.without_mask() as lifted:
        assert_scaled(lifted.encode(flat), expected)
        torch.testing.assert_close(lifted(flat), sae.decode(expected), atol=1e-4, rtol=1e-5)
        assert_scaled(lifted.encode(vectors).flatten(0, 1), expected)
        with theirs.at(3):  # The innermost context is used.
            here = theirs.encode(flat)
    assert_scaled(here, sae.encode(flat, torch.full((80,), 3)))
    assert_scaled(theirs.encode(vectors), sae.encode(vectors, position))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("open", {}),
        ("slice", {"gating": "gradient"}),
        ("slice", {"leak": 1.0}),
        ("slice", {"n_slices": 1}),
        ("switch", {}),
    ],
)
def test_positions_are_optional_if_codes_do_not_depend_on_them(saelens, kind, changes, tmp_path):
    sae = scaled(make_sae(kind, **changes))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    assert_scaled(theirs.encode(vectors.flatten(0, 1)), expected.flatten(0, 1))
    assert_scaled(theirs.encode(vectors[:, 7:8]), expected[:, 7:8])
    assert theirs.encode(vectors[0, 0]).shape == (D_SAE,)


def test_invalid_positions_raise_and_large_ones_are_clamped(saelens, tmp_path):
    sae = scaled(make_sae("slice"))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    flat = vectors.flatten(0, 1)
    with theirs.at(3):
        codes, output = theirs.encode(flat), theirs(flat)
    given_position = torch.full((len(flat),), 3)
    assert_scaled(codes, sae.encode(flat, given_position))
    torch.testing.assert_close(output, sae(flat, given_position), atol=1e-4, rtol=1e-5)
    longer, position = contexts(2, N_POSITIONS + 4)
    with pytest.warns(UserWarning, match="positions up to 19 are beyond the mask's last, 15, and count as it"):
        clamped = theirs.encode(longer)
    assert_scaled(clamped, sae.encode(longer, position.clamp(max=N_POSITIONS - 1)))
    assert torch.equal(theirs.encode(longer), clamped)
    with pytest.raises(BadSetting, match="position -1 is negative: count from 0"):
        theirs.encode(flat, positions=-1)
    with pytest.raises(BadSetting, match=r"shape \[3\] do not fit vectors \[80, 12\]"):
        theirs.encode(flat, positions=torch.tensor([1, 2, 3]))
    for fraction in (2.5, torch.full((len(flat),), 2.0), True):
        with pytest.raises(BadSetting, match=r"positions of type .* are not whole numbers"):
            theirs.encode(flat, positions=fraction)


def test_a_mask_with_another_origin_uses_given_positions(saelens, tmp_path):
    sae = scaled(make_sae("slice", position_origin="sentence"))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    codes = theirs.encode(vectors, positions=position)
    assert_scaled(codes, sae.encode(vectors, position))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["slice", "soft", "switch"])
def test_other_precisions_and_folded_norms(saelens, rule, kind, tmp_path):
    sae = scaled(make_sae(kind, rule=rule))
    folder = exported(sae, tmp_path)
    theirs = saelens.SAE.load_from_disk(folder)
    vectors, position = contexts()
    half = saelens.SAE.load_from_disk(folder, dtype="bfloat16")
    moved = saelens.SAE.load_from_disk(folder).to(torch.bfloat16)
    assert half.dtype == moved.dtype == torch.bfloat16
    assert half.cfg.dtype == "bfloat16"
    assert half.encode(vectors).dtype == torch.bfloat16
    assert torch.equal(half.encode(vectors), moved.encode(vectors))
    closed = half.encode(vectors)[sae.encode(vectors, position, use_mask=True) == 0]
    assert float((closed != 0).float().mean()) < 0.05  # Rounding selects a few other latents near ties.
    exact = saelens.SAE.load_from_disk(folder, dtype="float64")
    codes = exact.encode(vectors)
    assert_scaled(codes.float(), sae.encode(vectors, position))
    torch.testing.assert_close(exact.W_dec.norm(dim=1), torch.ones(D_SAE).double(), rtol=1e-6, atol=0)
    exact.fold_W_dec_norm()
    torch.testing.assert_close(exact.encode(vectors), codes, rtol=1e-6, atol=1e-6)
    exact.W_dec.data.mul_(3)
    rows = exact.W_dec.detach().clone()
    exact.fold_W_dec_norm()
    torch.testing.assert_close(exact.encode(vectors), 3 * codes, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact.decode(exact.encode(vectors)), codes @ rows + exact.b_dec, rtol=1e-6, atol=1e-6)
    assert theirs.encode(vectors).dtype == torch.float32


@pytest.mark.parametrize("rule", ["jumprelu", "gated", "batchtopk"])
def test_all_tensors_have_the_configured_precision(saelens, rule):
    from posmask.interop.saelens import PosmaskSAE, PosmaskSAEConfig, as_saelens

    settings = as_saelens(make_sae("soft", rule=rule), ORIGIN).cfg.to_dict()
    made = PosmaskSAE(PosmaskSAEConfig.from_dict({**settings, "dtype": "float64"}))
    kinds = {name: tensor.dtype for name, tensor in made.state_dict().items() if tensor.is_floating_point()}
    assert any(name.startswith("mask.") for name in kinds)
    assert any(name.startswith("rule.") for name in kinds)
    assert set(kinds.values()) == {torch.float64}, kinds


def test_folding_norms_raises_if_it_changes_codes(saelens, tmp_path):
    sae = scaled(make_sae("slice"))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    theirs.W_dec.data[0] *= 2
    with pytest.raises(NotImplementedError, match="folding them would change which latents topk chooses"):
        theirs.fold_W_dec_norm()


def test_saelens_hooks_read_and_change_activations(saelens, tmp_path):
    theirs = saelens.SAE.load_from_disk(exported(scaled(make_sae("slice", rule="relu")), tmp_path))
    vectors, _ = contexts()
    out, cache = theirs.run_with_cache(vectors)
    assert torch.equal(cache["hook_sae_input"], vectors)
    assert torch.equal(cache["hook_sae_acts_post"], theirs.encode(vectors))
    assert torch.equal(cache["hook_sae_recons"], out)
    assert torch.equal(cache["hook_sae_output"], out)
    assert cache["hook_sae_acts_pre"].shape == (5, N_POSITIONS, D_SAE)
    silenced = theirs.run_with_hooks(vectors, fwd_hooks=[("hook_sae_acts_post", lambda codes, hook: codes * 0)])
    torch.testing.assert_close(silenced, theirs.b_dec.expand_as(silenced))


def test_saelens_saves_a_loaded_sae(saelens, tmp_path):
    sae = scaled(make_sae("importance", rule="matryoshka"))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    theirs.save_model(tmp_path / "again")
    again = saelens.SAE.load_from_disk(tmp_path / "again")
    vectors, _ = contexts()
    assert torch.equal(again.encode(vectors), theirs.encode(vectors))
    assert again.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert again.cfg.metadata.context_size == N_POSITIONS
    assert not again.rule.level.is_floating_point()


def test_in_memory_conversion_equals_the_export(saelens, tmp_path):
    from posmask.interop.saelens import as_saelens

    sae = scaled(make_sae("slice", rule="gated"))
    theirs, vectors = saelens.SAE.load_from_disk(exported(sae, tmp_path)), contexts()[0]
    converted = as_saelens(sae, ORIGIN)
    assert torch.equal(converted.encode(vectors), theirs.encode(vectors))
    assert converted.cfg.to_dict() == theirs.cfg.to_dict()


LOSSY_KINDS = [("open", "forward"), ("slice", "forward"), ("slice", "gradient"), ("soft", "forward")]


def lossy_metadata(folder):
    return json.loads((folder / "cfg.json").read_text())["metadata"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "gating"), LOSSY_KINDS)
@pytest.mark.parametrize("position", [None, 3])
def test_the_lossy_export_encodes_at_one_position(saelens, rule, kind, gating, position, tmp_path):
    sae = scaled(make_sae(kind, gating, rule=rule))
    folder = exported(sae, tmp_path, lossy=True, unknown_position=position)
    theirs = saelens.SAE.load_from_disk(folder)
    vectors, _ = contexts()
    used = N_POSITIONS // 2 if position is None else position
    expected = sae.encode(vectors, torch.full(vectors.shape[:-1], used))
    assert_scaled(theirs.encode(vectors), expected)
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(theirs(vectors), sae.decode(expected), atol=1e-4, rtol=1e-5)
    assert type(theirs).__module__.startswith("sae_lens.")
    torch.testing.assert_close(theirs.W_dec.norm(dim=1), torch.ones(D_SAE))
    theirs.fold_W_dec_norm()
    assert_scaled(theirs.encode(vectors), expected)
    if kind == "slice" and gating == "forward":
        closed = sae.mask.openness()[used] == 0
        assert closed.sum() == 24
        assert theirs.encode(1000 * torch.randn(50, D_MODEL))[:, closed].count_nonzero() == 0
    lost = lossy_metadata(folder)["posmask_lossy"]
    n_open = {"slice": 8, "soft": 32}.get(kind)
    words = f"is fixed at position {used}: every token is encoded as if it were there, with the {n_open} of 32 latents"
    assert (words in lost) == (kind != "open" and gating == "forward")
    assert lost in (folder / "LOSSY.md").read_text()
    assert lost in (folder / "README.md").read_text()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "gating"), LOSSY_KINDS)
def test_the_lossy_export_lifts_the_mask_on_request_only(saelens, rule, kind, gating, tmp_path):
    sae = scaled(make_sae(kind, gating, rule=rule))
    folder = exported(sae, tmp_path, lossy=True, unknown_position="lifted")
    theirs = saelens.SAE.load_from_disk(folder)
    vectors, position = contexts()
    expected = sae.encode(vectors, position, use_mask=False)
    assert_scaled(theirs.encode(vectors), expected)
    torch.testing.assert_close(theirs(vectors), sae.decode(expected), atol=1e-4, rtol=1e-5)
    assert ("is lifted" in lossy_metadata(folder)["posmask_lossy"]) == (kind != "open" and gating == "forward")


def test_the_lossy_export_loses_nothing_if_rows_are_equal(tmp_path):
    sae = make_sae("slice", n_slices=1)
    assert lossy_metadata(exported(scaled(sae), tmp_path, lossy=True))["posmask_lossy"].startswith("nothing: ")


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("position", [-1, N_POSITIONS, True, 2.0, "middle"])
def test_positions_outside_the_mask_are_not_exported(lossy, position, tmp_path):
    with pytest.raises(BadSetting, match=r"unknown_position = .* is not a position of the mask: choose 0 to 15, or"):
        exported(scaled(make_sae("slice")), tmp_path, lossy=lossy, unknown_position=position)


def test_positions_without_open_latents_are_not_exported(tmp_path):
    sae = scaled(make_sae("slice"))
    sae.mask.fixed_openness[3] = 0
    with pytest.raises(BadSetting, match="no latent is open at position 3, so the SAE would be silent"):
        exported(sae, tmp_path, lossy=True, unknown_position=3)


def test_only_a_lossy_export_lifts_the_mask(tmp_path):
    with pytest.raises(BadSetting, match=r"'lifted' is only for the lossy export: .*`with sae.without_mask\(\):`"):
        exported(scaled(make_sae("slice")), tmp_path, unknown_position="lifted")


@pytest.mark.parametrize(
    ("position", "position_origin", "used"), [("typical", "context", 8), ("typical", "sentence", 8), (0, "context", 0)]
)
def test_vectors_of_unknown_position_are_encoded_at_the_exported_one(
    saelens, position, position_origin, used, tmp_path
):
    sae = scaled(make_sae("slice", position_origin=position_origin))
    folder = exported(sae, tmp_path, unknown_position=position)
    theirs = saelens.SAE.load_from_disk(folder)
    assert theirs.cfg.unknown_position == used
    vectors, right = contexts()
    flat = vectors.flatten(0, 1)
    expected = sae.encode(flat, torch.full((80,), used))
    assert_scaled(theirs.encode(flat), expected)
    assert_scaled(theirs.encode(flat[0]), expected[0])
    torch.testing.assert_close(theirs(flat), sae.decode(expected), atol=1e-4, rtol=1e-5)
    assert_scaled(theirs.encode(flat, positions=right.flatten()), sae.encode(flat, right.flatten()))
    known = right if position_origin == "context" else torch.full((5, 16), used)
    assert_scaled(theirs.encode(vectors), sae.encode(vectors, known))
    if position_origin == "context":
        with pytest.warns(UserWarning, match=rf"\[5, 1, 12\] are all encoded at position {used} .*positions_of"):
            assert_scaled(theirs.encode(vectors[:, 5:6]), expected.view(5, 16, -1)[:, 5:6])
        theirs.encode(vectors[:, 5:6])  # a single warning
    assert f"unknown are encoded at position {used}." in " ".join((folder / "README.md").read_text().split())
    theirs.save_model(tmp_path / "again")
    assert saelens.SAE.load_from_disk(tmp_path / "again").cfg.unknown_position == used


def test_texts_padded_on_the_left_are_refused_where_their_zeros_show_it(saelens, tmp_path):
    """SAEBench sets the vectors of BOS and padding to 0, and pads on the side of the model's tokenizer."""
    theirs = saelens.SAE.load_from_disk(exported(make_sae("slice"), tmp_path))
    vectors, right = contexts()
    padded = vectors.clone()
    padded[1, :3] = 0
    with pytest.raises(BadSetting, match=r"1 of 5 texts begin with vectors of zeros.*padding_side = 'right'"):
        theirs.encode(padded)
    theirs.encode(padded, positions=right)
    padded[1] = 0  # a text of padding alone
    padded[2, 0], padded[3, 9:] = 0, 0  # BOS; padding on the right
    codes = theirs.encode(padded)
    torch.testing.assert_close(codes[4], theirs.encode(vectors)[4])


def test_the_typical_position_is_the_middle_of_what_positions_count():
    def typical(n_positions, origin):
        settings = mask_settings({"kind": "slice", "n_slices": 4, "position_origin": origin})
        return typical_position(make_mask(settings, n_positions, D_SAE))

    assert [typical(128, origin) for origin in ("context", "text", "end")] == [64] * 3
    assert [typical(128, origin) for origin in ("sentence", "line")] == [10] * 2
    assert typical(16, "line") == 8


@pytest.mark.slow  # Compiling takes some 20 s.
def test_encoding_has_no_branch_on_values():
    """It compiles into one graph and infers shapes; without the type checks of tests, which do not compile."""
    script = Path(__file__).parent / "compile_saelens.py"
    result = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_lossy_export_of_a_switch_raises_an_error(tmp_path):
    assert "switch" in FORWARD_ONLY
    with pytest.raises(BadSetting, match="'switch' mask chooses latents by a router"):
        exported(make_sae("switch"), tmp_path, lossy=True)


@pytest.mark.parametrize("error", ["ImportError('libcudart')", "RuntimeError('operator torchvision::nms')"])
def test_a_broken_package_is_not_reported_as_missing_saelens(error, tmp_path):
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("import torchvision")
    (tmp_path / "torchvision.py").write_text(f"raise {error}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import posmask.interop.saelens"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    name, _, message = error.partition("(")
    expected = f"MissingExtra: SAELens is installed, but a package that it imports is broken ({name}: {message[1:-2]})"
    assert expected in result.stderr
    assert "needs SAELens" not in result.stderr


def test_missing_saelens_raises_an_error_with_the_pip_command():
    code = """
import sys, posmask, posmask.cli, posmask.interop.saelens_files
assert "sae_lens" not in sys.modules
sys.modules["sae_lens"] = None
import posmask.interop.saelens
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "MissingExtra: posmask.interop.saelens needs SAELens" in result.stderr
    assert "pip install 'posmask[saelens]'" in result.stderr
