import json
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import D_MODEL, N_POSITIONS, RULES, make_sae, make_vectors
from posmask import masks
from posmask.errors import BadSetting, DamagedFolder
from posmask.masks import make_mask, mask_settings
from posmask.masks.base import Copies
from posmask.masks.router import Switch
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_origin, read_sae, write_sae
from posmask.sae.rules import rule_settings
from posmask.sae.warm_start import copy_latents_, renormalize_, warm_start
from posmask.storage.manifest import write_folder


def test_closed_latents_are_not_selected():
    sae = make_sae("hard")
    vectors, position = make_vectors(200)
    closed = sae.mask.openness()[position.long()] == 0
    codes = sae.encode(vectors, position)
    preactivation = ((sae.normalize(vectors) - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).relu()
    n_candidates = ((preactivation > 0) & ~closed).sum(1)
    assert torch.equal((codes > 0).sum(1), n_candidates.clamp(max=4))


def test_k_above_the_number_of_latents_raises_an_error():
    with pytest.raises(BadSetting, match="k = 40 is more than the 32 latents"):
        SparseAutoencoder(
            8, rule_settings({"kind": "topk", "k": 40}), make_mask(mask_settings({"kind": "open"}), 16, 32)
        )


def test_an_unreadable_sae_raises_an_error(tmp_path):
    write_sae(make_sae("open"), tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"\x80\x04not a tensor")
    with pytest.raises(DamagedFolder, match="holds no readable SAE"):
        read_sae(tmp_path)
    with pytest.raises(DamagedFolder, match=r"sae\.json cannot be read"):
        read_origin(tmp_path / "elsewhere")


def test_a_mask_that_does_not_fit_its_sae_raises_an_error(tmp_path):
    """Kind, context length or number of latents in the description differ from the tensors."""
    for old, new in (('"n_positions": 16', '"n_positions": 8'), ('"d_sae": 32', '"d_sae": 64'), ('"slice"', '"soft"')):
        write_sae(make_sae("slice"), tmp_path)
        description = (tmp_path / "sae.json").read_text()
        assert old in description
        (tmp_path / "sae.json").write_text(description.replace(old, new))
        with pytest.raises(DamagedFolder, match="holds no readable SAE"):
            read_sae(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("open", "encoder", torch.nan, "encoder holds NaN or infinite numbers"),
        ("open", "decoder", torch.inf, "decoder holds NaN or infinite numbers"),
        ("open", "rule.threshold", torch.nan, "rule.threshold holds NaN or infinite numbers"),
        ("open", "center", torch.nan, "center holds NaN or infinite numbers"),
        ("open", "scale", -1.0, "scale = -1 is not above 0"),
        ("open", "scale", 0.0, "scale = 0 is not above 0"),
        ("slice", "mask.fixed_openness", torch.nan, "mask.fixed_openness holds NaN or infinite numbers"),
        ("slice", "mask.fixed_openness", 2.0, "openness is not within 0 and 1"),
        ("slice", "mask.fixed_openness", -1.0, "openness is not within 0 and 1"),
        ("soft", "mask.theta", torch.nan, "mask.theta holds NaN or infinite numbers"),
    ],
)
def test_invalid_tensors_raise_an_error(kind, name, value, message, tmp_path):
    write_sae(make_sae(kind, rule="jumprelu"), tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(DamagedFolder, match=f"holds no readable SAE \\({message}"):
        read_sae(tmp_path)


@pytest.mark.parametrize("kind", ["slice", "switch"])
def test_a_description_with_too_many_positions_raises_an_error(kind, tmp_path):
    write_sae(make_sae(kind, free_fraction=1.0), tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    if kind == "slice":
        tensors["mask.fixed_openness"] = torch.empty(10**12, 0)
    save_file(tensors, tmp_path / "sae.safetensors")
    description = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**description, "n_positions": 10**12}))
    with pytest.raises(DamagedFolder, match="a mask of 1000000000000 positions and 32 latents"):
        read_sae(tmp_path)


def test_load_state_dict_updates_the_mask():
    sae, other = make_sae("hard", seed=0), make_sae("hard", seed=1)
    vectors, position = make_vectors(50)
    sae.sparse_encode(vectors, position)
    sae.load_state_dict(other.state_dict())
    torch.testing.assert_close(sae.sparse_encode(vectors, position).dense(), sae.encode(vectors, position).detach())


def test_selected_codes_are_in_the_requested_order():
    sae = make_sae("hard")
    codes = sae.sparse_encode(*make_vectors(30))
    numbers = torch.tensor([7, 3, 29, 0])
    assert torch.equal(codes.select(numbers).dense(), codes.dense()[numbers])
    chosen = torch.arange(30) % 3 == 0
    assert torch.equal(codes.select(chosen).dense(), codes.dense()[chosen])
    assert torch.equal(codes.n_active(), (codes.dense() > 0).sum(1).float())


def test_codes_follow_the_given_positions():
    """With positions from the sentence start, codes depend on that position and not on the position in the context."""
    sae = make_sae("slice", position_origin="sentence")
    assert sae.mask.settings.position_origin == "sentence"
    vectors, position = make_vectors(20)
    assert not torch.equal(sae.encode(vectors, position), sae.encode(vectors, (position + 4) % N_POSITIONS))


UPCYCLED = {
    "slice": ({"kind": "slice", "n_slices": 4}, 32),
    "slice with free latents": ({"kind": "slice", "n_slices": 4, "free_fraction": 0.25}, 20),
    "band": ({"kind": "band", "growth": 1.5}, 7 * 8),
    "cohort": ({"kind": "cohort", "n_cohorts": 4, "positions_per_latent": 4}, 32),
    "split": ({"kind": "split", "start_latents": 8, "max_latents": 24, "n_windows": 4}, 24),
    "hard at equal width": ({"kind": "hard", "positions_per_latent": 16}, 8),
}


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "matryoshka", "gated"])
@pytest.mark.parametrize("name", UPCYCLED)
def test_an_upcycled_sae_equals_its_source(name, rule):
    """Exactly one copy of each latent is live at every position, so the initial function is the same."""
    values, d_sae = UPCYCLED[name]
    source = make_sae("open", rule=rule, d_sae=8, dtype=torch.float64)
    source.center += 1
    mask = make_mask(mask_settings(values), N_POSITIONS, d_sae)
    sae = warm_start(source, mask)
    vectors, position = make_vectors(200, dtype=torch.float64)
    torch.testing.assert_close(sae(vectors, position), source(vectors, position))
    codes, expected = sae.sparse_encode(vectors, position), source.sparse_encode(vectors, position)
    torch.testing.assert_close(codes.value.sort().values, expected.value.sort().values)
    with torch.no_grad():
        sae.encoder.zero_()
    assert bool((source.encoder != 0).any())


def test_an_incompatible_source_raises_an_error():
    source = make_sae("open", d_sae=8)
    slices = {"kind": "slice", "n_slices": 4}
    for values, d_sae, message in (
        ({"kind": "hard", "positions_per_latent": 4}, 32, "does not open one copy of each of the 8 latents"),
        (slices, 40, "does not open one copy of each of the 8 latents"),
        ({"kind": "split", "start_latents": 10, "max_latents": 24}, 24, "does not open one copy of each"),
    ):
        with pytest.raises(BadSetting, match=message):
            warm_start(source, make_mask(mask_settings(values), N_POSITIONS, d_sae))
    with pytest.raises(BadSetting, match="multiplies codes by its router's p"):
        warm_start(source, make_mask(mask_settings({"kind": "switch", "n_experts": 4}), N_POSITIONS, 32))
    with pytest.raises(BadSetting, match="has a 'slice' mask: start from one that is open everywhere"):
        warm_start(make_sae("slice"), make_mask(mask_settings(slices), N_POSITIONS, 32))
    with pytest.raises(BadSetting, match="contexts of 16 positions, not 12"):
        warm_start(source, make_mask(mask_settings(slices), 12, 32))


def test_copied_latents_have_all_parameters_of_their_source():
    sae = make_sae("open", rule="matryoshka", d_model=32)  # d_model = d_sae: decoder_bias looks like a latent parameter
    bias = sae.decoder_bias.detach().clone()
    copy_latents_(sae, Copies(torch.tensor([1, 2]), torch.tensor([30, 31])))
    assert torch.equal(sae.decoder_bias, bias)
    for tensor in (sae.encoder, sae.encoder_bias, sae.decoder, sae.rule.level):
        assert torch.equal(tensor[30:], tensor[1:3])
    sae = make_sae("open", rule="jumprelu")
    copy_latents_(sae, Copies(torch.tensor([1]), torch.tensor([30])))
    assert sae.rule.threshold[30] == sae.rule.threshold[1]


@pytest.mark.parametrize("rule", RULES)
def test_renormalizing_changes_only_the_units_of_codes(rule):
    sae = make_sae("open", rule=rule, dtype=torch.float64)
    sae.center, sae.scale = torch.linspace(-1, 2, D_MODEL).double(), torch.tensor(1.5).double()
    vectors, position = make_vectors(60, dtype=torch.float64)
    codes, out = sae.encode(vectors, position).detach(), sae(vectors, position).detach()
    renormalize_(sae, torch.linspace(3, 0, D_MODEL).double(), torch.tensor(0.5).double())
    torch.testing.assert_close(sae(vectors, position), out)
    torch.testing.assert_close(sae.encode(vectors, position), 3 * codes)


def test_a_custom_router_is_saved_and_cannot_be_warm_started(tmp_path, monkeypatch):
    class Experts(Switch):
        class Settings(Switch.Settings):
            kind: Literal["experts"] = "experts"

    monkeypatch.setitem(masks.MASKS, "experts", Experts)
    mask = make_mask(mask_settings({"kind": "experts", "n_experts": 4}), N_POSITIONS, 32)
    sae = SparseAutoencoder(D_MODEL, rule_settings(RULES["topk"]), mask)
    write_sae(sae, tmp_path)
    vectors, position = make_vectors(60)
    assert torch.equal(read_sae(tmp_path).encode(vectors, position), sae.encode(vectors, position))
    with pytest.raises(BadSetting, match="multiplies codes by its router's p"):
        warm_start(make_sae("open", d_sae=8), mask)


def test_an_sae_overwrites_only_an_sae(tmp_path):
    write_sae(make_sae("open"), tmp_path)
    write_sae(make_sae("slice"), tmp_path)
    assert read_sae(tmp_path).mask.settings.kind == "slice"
    for name in ("sae.safetensors", "openness.safetensors", "sae.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"years of work")
        with pytest.raises(BadSetting, match=f"{name} is a file, which posmask did not write"):
            write_sae(make_sae("open"), folder)
        assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [(name, b"years of work")]
    with write_folder(tmp_path / "cell", {}) as draft:
        write_sae(make_sae("open"), draft)
    with pytest.raises(BadSetting, match="cell is finished"):
        write_sae(make_sae("slice"), tmp_path / "cell")
    assert read_sae(tmp_path / "cell").mask.settings.kind == "open"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["open", "slice", "soft", "switch"])
def test_an_sae_in_half_precision_computes_in_float32(kind, rule, dtype):
    half = make_sae(kind, rule=rule).to(dtype)
    wide = make_sae(kind, rule=rule).to(dtype).float()
    vectors, position = make_vectors(40)
    assert torch.equal(half.encode(vectors, position), wide.encode(vectors, position))
    codes = half.sparse_encode(vectors, position)
    assert codes.value.dtype == torch.float32
    assert torch.equal(codes.dense(), wide.sparse_encode(vectors, position).dense())
    assert torch.equal(half(vectors, position), wide(vectors, position))
    assert torch.equal(half.sparse_decode(codes), wide.sparse_decode(codes))
    assert torch.equal(half.share_of(codes), wide.share_of(codes))
    assert half.encoder.dtype == dtype
