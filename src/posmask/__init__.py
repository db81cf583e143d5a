import os

# Large tensors lie in huge pages where Linux gives them: some percent of a training step. torch reads this once, when
# it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
