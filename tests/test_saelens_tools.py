"""What other tools need beyond codes; tests/interop runs the tools themselves."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import D_SAE, RULES, make_sae
from interop import small_sae
from posmask.interop.positions import positions_of
from posmask.interop.saelens_files import export_saelens
from posmask.sae.files import write_sae


@pytest.mark.parametrize("rule", RULES)
def test_activation_fn_tells_tools_to_encode_with_all_latents(saelens, rule, tmp_path):
    from sae_lens.saes.topk_sae import TopK

    (tmp_path / "cell").mkdir()
    write_sae(make_sae("slice", rule=rule), tmp_path / "cell", {"model": "tiny", "layer": 2})
    export_saelens(tmp_path / "cell", tmp_path / "theirs")
    activation_fn = saelens.SAE.load_from_disk(tmp_path / "theirs").activation_fn
    assert type(activation_fn) is TopK  # SAEDashboard refuses the architecture otherwise.
    preactivation = torch.randn(7, D_SAE, generator=torch.Generator().manual_seed(0))
    largest = preactivation.topk(4).values[:, -1:]
    expected = preactivation.where(preactivation >= largest, 0) if rule == "topk" else preactivation
    torch.testing.assert_close(activation_fn(preactivation), expected.relu())


def test_positions_follow_a_model_whose_forward_a_tool_replaced(causal_lm, monkeypatch):
    base = causal_lm.base_model
    unbound = type(base).forward

    @functools.wraps(unbound)  # as nnsight does: the signature then has `self`
    def replaced(*args, **kwargs):
        return unbound(base, *args, **kwargs)

    monkeypatch.setattr(base, "forward", replaced)
    attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with positions_of(causal_lm) as positions:
        base(torch.ones(2, 4, dtype=torch.long), attention_mask)
    assert positions().tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


FIXTURE = Path(__file__).parent / "data" / "saebench_hooks.json"  # written by interop/record_saebench_hooks.py
RECORDED = json.loads(FIXTURE.read_text(encoding="utf8"))


def near(expected):
    return pytest.approx(np.array(expected), rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_unlearning_changes_vectors_as_sae_bench_did(saelens):
    from posmask.interop.saelens import as_saelens

    sae, vectors = as_saelens(small_sae.make_sae()), small_sae.make_vectors()
    codes = sae.encode(vectors)
    codes[:, 0] = 0
    rest = vectors - sae.decode(codes)
    clamped = codes[..., small_sae.CLAMPED]
    assert (clamped > 0).any()
    codes[..., small_sae.CLAMPED] = clamped.where(clamped <= 0, -small_sae.MULTIPLIER)
    assert (rest + sae.decode(codes)).numpy() == near(RECORDED["unlearning"])


@torch.no_grad()
def test_ravel_exchanges_codes_as_sae_bench_did(saelens):
    from posmask.interop.saelens import as_saelens

    vectors = small_sae.make_vectors()
    with as_saelens(small_sae.make_sae()).at(small_sae.POSITION) as sae:
        codes, source = sae.encode(vectors[:, small_sae.POSITION]), sae.encode(vectors[:, 1])
    codes[:, ::2] = source[:, ::2]
    assert sae.decode(codes).numpy() == near(RECORDED["ravel"])


@torch.no_grad()
def test_absorption_projects_codes_as_sae_bench_did(saelens):
    from posmask.interop.saelens import as_saelens

    sae, vectors = as_saelens(small_sae.make_sae()), small_sae.make_vectors()
    direction = vectors[:, small_sae.POSITION].sum(0)
    codes = sae.encode(vectors[:, small_sae.POSITION], positions=small_sae.POSITION)
    projections = codes * torch.nn.functional.cosine_similarity(direction, sae.W_dec, dim=-1)
    for word, recorded in zip(projections, RECORDED["absorption"], strict=True):
        assert word[recorded["features"]].numpy() == near(recorded["projections"])
        assert word.max() > 1
