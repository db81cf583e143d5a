"""SAELens loads exported SAEs with every rule and mask and computes the same codes."""

import json
import subprocess
import sys

import pytest
import torch

from conftest import D_MODEL, D_SAE, FORWARD_ONLY, KINDS, N_POSITIONS, RULES, make_sae, make_vectors
from posmask.errors import BadSetting
from posmask.interop.saelens_files import export_saelens
from posmask.sae.files import write_sae

ORIGIN = {"weights": "abc", "layer": 2, "model": "tiny", "training_tokens": 1000}


def scaled(sae):
    """Set non-trivial centering constants and decoder rows of norm 1, as after training."""
    with torch.no_grad():
        sae.center = torch.linspace(-1, 3, D_MODEL)
        sae.scale = torch.tensor(2.5)
        sae.decoder /= sae.decoder.norm(dim=1, keepdim=True)
    return sae


def exported(sae, folder, **options):
    cell = folder / "cell"
    cell.mkdir()
    write_sae(sae, cell, ORIGIN)
    export_saelens(cell, folder / "theirs", **options)
    return folder / "theirs"


def contexts(n_contexts=5, length=N_POSITIONS):
    vectors = 2.5 * make_vectors(n_contexts * length)[0].view(n_contexts, length, D_MODEL) + 1
    return vectors, torch.arange(length).expand(n_contexts, length)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "gating"), KINDS)
def test_saelens_computes_the_same_codes(saelens, rule, kind, gating, tmp_path):
    sae = scaled(make_sae(kind, gating, rule=rule, free_fraction=0.125))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    assert theirs.cfg.architecture() == "posmask"
    vectors, position = contexts()
    expected = sae.encode(vectors, position)
    torch.testing.assert_close(theirs.encode(vectors), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(expected), sae.decode(expected), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(theirs(vectors), sae(vectors, position), atol=1e-4, rtol=1e-5)
    flat = vectors.flatten(0, 1)
    flat_codes = theirs.encode(flat, positions=position.flatten())
    torch.testing.assert_close(flat_codes, expected.flatten(0, 1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        theirs(flat, positions=position.flatten()), sae(vectors, position).flatten(0, 1), atol=1e-4, rtol=1e-5
    )
    assert expected.count_nonzero() > 0
    assert theirs.W_enc.shape == (D_MODEL, D_SAE)
    assert theirs.W_dec.shape == (D_SAE, D_MODEL)


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
    torch.testing.assert_close(theirs.encode(first, positions=0), expected[:, :1], atol=2e-5, rtol=1e-5)
    with theirs.at(9):
        torch.testing.assert_close(theirs.encode(last), expected[:, 9:10], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["slice", "soft", "switch"])
def test_the_mask_is_lifted_on_request_only(saelens, kind, tmp_path):
    sae = scaled(make_sae(kind))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    flat = vectors.flatten(0, 1)
    expected = sae.encode(flat, position.flatten(), use_mask=False)
    torch.testing.assert_close(theirs.encode(flat, use_mask=False), expected, atol=2e-5, rtol=1e-5)
    with theirs.without_mask() as lifted:
        torch.testing.assert_close(lifted.encode(flat), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(lifted(flat), sae.decode(expected), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(lifted.encode(vectors).flatten(0, 1), expected, atol=2e-5, rtol=1e-5)
        with theirs.at(3):  # The innermost context is used.
            here = theirs.encode(flat)
    torch.testing.assert_close(here, sae.encode(flat, torch.full((80,), 3)), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.encode(vectors), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)


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
    torch.testing.assert_close(theirs.encode(vectors.flatten(0, 1)), expected.flatten(0, 1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.encode(vectors[:, 7:8]), expected[:, 7:8], atol=2e-5, rtol=1e-5)
    assert theirs.encode(vectors[0, 0]).shape == (D_SAE,)


def test_invalid_positions_raise_and_large_ones_are_clamped(saelens, tmp_path):
    sae = scaled(make_sae("slice"))
    theirs = saelens.SAE.load_from_disk(exported(sae, tmp_path))
    vectors, position = contexts()
    flat = vectors.flatten(0, 1)
    with theirs.at(3):
        codes, output = theirs.encode(flat), theirs(flat)
    given_position = torch.full((len(flat),), 3)
    torch.testing.assert_close(codes, sae.encode(flat, given_position), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output, sae(flat, given_position), atol=1e-4, rtol=1e-5)
    longer, position = contexts(2, N_POSITIONS + 4)
    with pytest.warns(UserWarning, match="positions up to 19 are beyond the mask's last, 15, and count as it"):
        clamped = theirs.encode(longer)
    torch.testing.assert_close(clamped, sae.encode(longer, position.clamp(max=N_POSITIONS - 1)), atol=2e-5, rtol=1e-5)
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
    torch.testing.assert_close(codes, sae.encode(vectors, position), atol=2e-5, rtol=1e-5)


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
    codes, rows = exact.encode(vectors), exact.W_dec.detach().clone()
    torch.testing.assert_close(codes.float(), sae.encode(vectors, position), atol=2e-5, rtol=1e-5)
    exact.fold_W_dec_norm()
    torch.testing.assert_close(exact.W_dec.norm(dim=1), torch.ones(D_SAE).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(exact.encode(vectors), 2.5 * codes, rtol=1e-6, atol=1e-6)
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kind", "gating"), [("open", "forward"), ("slice", "forward"), ("slice", "gradient"), ("soft", "forward")]
)
def test_the_lossy_export_equals_lifting_the_mask(saelens, rule, kind, gating, tmp_path):
    sae = scaled(make_sae(kind, gating, rule=rule))
    folder = exported(sae, tmp_path, lossy=True)
    theirs = saelens.SAE.load_from_disk(folder)
    vectors, position = contexts()
    expected = sae.encode(vectors, position, use_mask=False)
    torch.testing.assert_close(theirs.encode(vectors), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(vectors), sae.decode(expected), atol=1e-4, rtol=1e-5)
    assert type(theirs).__module__.startswith("sae_lens.")
    lost = json.loads((folder / "cfg.json").read_text())["metadata"]["posmask_lossy"]
    gated = kind != "open" and gating == "forward"
    assert ("is lifted" in lost) == gated
    assert (folder / "LOSSY.md").exists()


def test_lossy_export_of_a_switch_raises_an_error(tmp_path):
    assert "switch" in FORWARD_ONLY
    with pytest.raises(BadSetting, match="'switch' mask chooses latents by a router"):
        exported(make_sae("switch"), tmp_path, lossy=True)


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
