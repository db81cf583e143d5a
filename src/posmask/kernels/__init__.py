"""Fast operations on the active codes of a batch, and settings of the CPU runtime.

`backend.implementation(tensor)` alone chooses what computes, by the device of the tensor: loops that numba compiles for
tensors on the CPU, Triton kernels for CUDA devices of capability 8.0 or higher, and torch operations for all other
devices and where Triton is not installed. Three modules call it. `operations` computes reconstructions, gradients and
sums; its compiled loops are in `cpu`, its Triton kernels in `triton_rows`. `posmask.sae.selection` selects the active
latents; its compiled loops are in `cpu_selection`, its Triton kernels in `triton_selection`. On processors with AVX2
and without AVX-512 it selects by products of 16-bit integers (`integers`, `cpu_integers`) and computes undecided and
selected ones in float32 again: the result is the same.
`posmask.training.optimizer` updates the parameters. All implementations compute the same results up to rounding, and
the torch operations define what the others compute.

numba compiles a loop at its first call and caches it in `__pycache__` beside the module, or in `NUMBA_CACHE_DIR`.
Triton compiles a kernel at its first call and caches it in `~/.triton`, or in `TRITON_CACHE_DIR`. `runtime` sets
threads, precision of products, and the memory allocator; it is independent of this choice.
"""
