import pytest
import torch

from conftest import MASKS, N_POSITIONS, make_sae, make_vectors
from posmask.errors import BadSetting, DamagedFolder
from posmask.masks import make_mask, mask_settings
from posmask.sae import SparseAutoencoder, TopK, read_sae, without_mask, write_sae

KINDS = [(kind, apply) for kind in MASKS for apply in ("forward", "gradient")]


@pytest.mark.parametrize(("kind", "apply"), KINDS)
@pytest.mark.parametrize("lift", [False, True])
def test_sparse_encode_equals_the_definition(kind, apply, lift):
    sae = make_sae(kind, apply, dtype=torch.float64)
    vectors, position = make_vectors(200, dtype=torch.float64)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    vectors, position = vectors[shuffled], position[shuffled]  # any order of rows must do
    dense = sae.encode(vectors, position, lift=lift)
    codes = sae.sparse_encode(vectors, position, lift=lift)
    torch.testing.assert_close(codes.dense(), dense.detach())
    torch.testing.assert_close(sae.sparse_decode(codes), sae.decode(dense).detach())


@pytest.mark.parametrize("kind", MASKS)
def test_closed_latents_are_exactly_zero_and_take_no_place(kind):
    sae = make_sae(kind)
    vectors, position = make_vectors(200)
    closed = sae.mask.openness()[position.long()] == 0
    codes = sae.encode(vectors, position)
    assert bool((codes[closed] == 0).all())
    preactivation = ((sae.normalise(vectors) - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).relu()
    n_candidates = ((preactivation > 0) & ~closed).sum(1)
    assert torch.equal((codes > 0).sum(1), n_candidates.clamp(max=sae.rule.k))


def test_open_equals_no_mask_bit_for_bit():
    sae = make_sae("open")
    vectors, position = make_vectors(100)
    unmasked = ((sae.normalise(vectors) - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).relu()
    assert torch.equal(sae.encode(vectors, position), sae.rule(unmasked))


def test_gradient_masks_leave_the_code_alone():
    forward, gradient = make_sae("open"), make_sae("slice", "gradient")
    vectors, position = make_vectors(100)
    assert torch.equal(forward.encode(vectors, position), gradient.encode(vectors, position))


def test_texts_by_position_equal_single_tokens():
    sae = make_sae("hard")
    vectors = make_vectors(3 * N_POSITIONS)[0].reshape(3, N_POSITIONS, -1)
    position = torch.arange(N_POSITIONS).expand(3, -1)
    codes = sae.encode(vectors, position)
    torch.testing.assert_close(codes.flatten(0, 1), sae.encode(vectors.flatten(0, 1), position.flatten()))


@pytest.mark.parametrize(("kind", "apply"), KINDS)
def test_a_written_sae_reads_back_with_the_same_codes(kind, apply, tmp_path):
    sae = make_sae(kind, apply)
    sae.center += 1.5
    sae.scale *= 2
    write_sae(sae, tmp_path)
    vectors, position = make_vectors(50)
    back = read_sae(tmp_path)
    assert torch.equal(back(vectors, position), sae(vectors, position))
    assert torch.equal(back.sparse_encode(vectors, position).value, sae.sparse_encode(vectors, position).value)
    assert back.mask.settings == sae.mask.settings


def test_a_mask_for_another_context_length_is_refused():
    sae = make_sae("slice")
    with pytest.raises(BadSetting, match="positions 0 to 16 are not all within the 16 positions"):
        sae.encode(torch.zeros(17, 12), torch.arange(17))


def test_k_above_the_number_of_latents_is_refused():
    with pytest.raises(BadSetting, match="k = 40 is more than the 32 latents"):
        SparseAutoencoder(8, TopK(k=40), make_mask(mask_settings({"kind": "open"}), 16, 32))


def test_an_unreadable_sae_says_so(tmp_path):
    write_sae(make_sae("open"), tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"\x80\x04not a tensor")
    with pytest.raises(DamagedFolder, match="holds no readable SAE"):
        read_sae(tmp_path)


def test_loading_weights_into_an_sae_in_use_takes_the_new_mask():
    sae, other = make_sae("hard", seed=0), make_sae("hard", seed=1)
    vectors, position = make_vectors(50)
    sae.sparse_encode(vectors, position)
    sae.load_state_dict(other.state_dict())
    torch.testing.assert_close(sae.sparse_encode(vectors, position).dense(), sae.encode(vectors, position).detach())


@pytest.mark.parametrize("apply", ["forward", "gradient"])
@pytest.mark.parametrize("kind", MASKS)
def test_without_its_mask_an_sae_codes_as_with_the_mask_lifted(kind, apply):
    sae = make_sae(kind, apply)
    vectors, position = make_vectors(50)
    bare = without_mask(sae)
    assert torch.equal(bare.encode(vectors, position), sae.encode(vectors, position, lift=True))
    assert bool((bare.mask.openness() == 1).all())
    with torch.no_grad():
        bare.encoder.zero_()
    assert not bool((sae.encoder == 0).any())  # a copy
