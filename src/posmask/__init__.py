"""Sparse autoencoders (SAEs) whose latents are gated by token position, and measures of position dependence.

`import posmask` exports what a notebook needs; each name is imported on first use. `__init__.pyi` lists them.
"""

import os

import lazy_loader

# Huge pages for large tensors save a few percent of a training step. torch reads this with its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
