"""Compile SAELens's object into one graph and run it on tensors without values; test_saelens.py runs this script."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

warnings.simplefilter("ignore")  # of the dependencies of SAELens

from posmask.interop.saelens import as_saelens  # noqa: E402
from posmask.masks import make_mask, mask_settings  # noqa: E402
from posmask.sae.autoencoder import SparseAutoencoder  # noqa: E402
from posmask.sae.rules import rule_settings  # noqa: E402

CASES = [
    ("eager", {"kind": "slice", "n_slices": 4}, {"kind": "topk", "k": 4}),
    ("aot_eager", {"kind": "slice", "n_slices": 4}, {"kind": "gated", "l1_coefficient": 0.3}),
    ("aot_eager", {"kind": "switch", "n_experts": 4}, {"kind": "batchtopk", "k": 4}),
]

vectors = torch.randn(5, 16, 12)
positions = torch.arange(16).expand(5, 16)
flat, flat_positions = vectors.flatten(0, 1), positions.flatten()


def check_graph(sae, backend):
    torch.compiler.reset()
    forward = torch.compile(sae, fullgraph=True, backend=backend)
    for x in (vectors, flat):
        assert_close(forward(x), sae(x))
    with sae.at(3):
        assert_close(forward(flat), sae(flat))
    encode = torch.compile(sae.encode, fullgraph=True, backend=backend)
    assert_close(encode(flat, positions=flat_positions), sae.encode(flat, positions=flat_positions))
    if sae.cfg.mask["kind"] == "slice":
        with pytest.raises(RuntimeError, match="a position is negative"):
            encode(flat, positions=flat_positions - 1)


def check_without_values(sae):
    state = dict(sae.state_dict())
    with FakeTensorMode() as mode:
        parameters = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
        for arguments in ((vectors,), (vectors, positions), (flat, flat_positions)):
            fake = tuple(mode.from_tensor(tensor) for tensor in arguments)
            assert torch.func.functional_call(sae, parameters, fake).shape == arguments[0].shape


for backend, mask, rule in CASES:
    ours = SparseAutoencoder(12, rule_settings(rule), make_mask(mask_settings(mask), 16, 32))
    check_graph(as_saelens(ours, unknown_position="typical"), backend)
    check_without_values(as_saelens(ours))
