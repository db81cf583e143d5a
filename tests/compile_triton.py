"""Compile every Triton kernel for GPUs that are not there, as the host functions launch it; prints a line per kernel.

test_triton.py runs this in a process of its own, since TRITON_INTERPRET=1 would keep Triton from compiling.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from posmask.kernels import triton_rows, triton_selection

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32"}
CAPABILITIES = [int(word) for word in sys.argv[1:] if word.isdigit()]


def compile_instead(kernel, *args, grid, warmup, **options):
    arguments = kernel.signature.bind(*args, **{n: options.pop(n) for n in list(options) if n in kernel.arg_names})
    names = list(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for name, value in arguments.arguments.items():
        if "constexpr" in str(kernel.signature.parameters[name].annotation):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if name not in constants and (not isinstance(value, int | float) or value % 16 == 0):
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    for capability in CAPABILITIES:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"]
        print(kernel.__name__, capability, constants, "shared", compiled.metadata.shared)


def compile_selection(product_type, number_type, d_sae, k):
    product, bias, latents = (
        torch.empty(4, d_sae, dtype=product_type), torch.empty(d_sae, dtype=number_type), torch.arange(d_sae)
    )  # fmt: skip
    gate = torch.empty(2, d_sae, dtype=number_type), torch.zeros(4, dtype=torch.int64)
    latent, preactivation = torch.empty(4, k, dtype=torch.int64), torch.empty(4, k, dtype=number_type)
    for openness in (None, gate):
        triton_selection.largest_of_rows(product, bias, latents, openness, latent, preactivation)
        triton_selection.above_floor(product, bias, latents, openness, 0.0)


def compile_rows(number_type, d, k):
    rows, index = torch.empty(256, d, dtype=number_type), torch.zeros(256, dtype=torch.int64)
    weight = torch.empty(256, dtype=number_type)
    triton_rows.explain_rows(rows, index[:k].repeat(256, 1), weight[:k].repeat(256, 1), rows)
    triton_rows.dot_rows(rows, index, rows, index)
    for add in (False, True):
        triton_rows.sum_rows(weight, rows, index, index, index, torch.arange(257), rows, add)
    triton_rows.sum_entries(weight, index, torch.arange(257))
    step = triton_rows.AdamStep(1e-3, (0.9, 0.999), 1e-8, 1)
    if number_type == torch.float32:
        for unit_rows, low, clip in ((True, None, weight), (False, rows.bfloat16(), None)):
            triton_rows.adam_rows(*[rows] * 4, step, clip, unit_rows=unit_rows, low=low)


triton.runtime.jit.JITFunction.run = compile_instead
compile_selection(torch.bfloat16, torch.float32, 16384, 64)
compile_rows(torch.float32, 2304, 64)
if "every-type" in sys.argv:
    compile_selection(torch.float32, torch.float32, 64, 4)
    compile_selection(torch.float64, torch.float64, 64, 4)
    compile_rows(torch.float64, 48, 4)
