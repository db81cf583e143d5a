"""Sparse autoencoders whose latents are tied to positions, and honest numbers for what that buys.

`import posmask` has what a notebook needs, each name loaded when it is first asked for; `__init__.pyi` lists them.
"""

import os

import lazy_loader

# Large tensors lie in huge pages where Linux gives them: some percent of a training step. torch reads this once, when
# it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
