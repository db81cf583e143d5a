"""What other tools need beyond codes; tests/interop runs the tools themselves."""

import functools

import pytest
import torch

from conftest import D_SAE, RULES, make_sae
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
