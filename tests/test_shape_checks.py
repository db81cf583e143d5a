"""Shapes that annotations of posmask state are checked in the tests."""

import pytest
import torch
from jaxtyping import TypeCheckError

from conftest import make_sae, make_vectors
from posmask.sae.autoencoder import Codes


def test_a_wrong_shape_raises_an_error():
    sae, (vectors, position) = make_sae("slice"), make_vectors(20)
    with pytest.raises(TypeCheckError, match="vectors"):
        sae.sparse_encode(vectors[:, :-1, None], position)
    with pytest.raises(TypeCheckError, match="position"):
        sae.sparse_encode(vectors, position[:-1])
    with pytest.raises(TypeCheckError):
        Codes(torch.arange(3), torch.arange(3), torch.ones(2), 3, 3)
