"""Fast operations on the active codes of a batch, and settings of the CPU runtime.

`backend.compiled(tensor)` alone chooses the implementation, by the device of the tensor: loops that numba compiles for
tensors on the CPU, and torch operations for all other devices. Two modules call it. `operations` computes
reconstructions, gradients and sums; its compiled loops are in `cpu`. `posmask.sae.selection` selects the active
latents; its compiled loops are in `cpu_selection`. Both implementations compute the same results up to rounding, and
the torch operations define what the compiled loops compute.

numba compiles a loop at its first call and caches it in `__pycache__` beside the module, or in `NUMBA_CACHE_DIR`.
`runtime` sets threads, precision of products, and the memory allocator; it is independent of this choice.
"""
