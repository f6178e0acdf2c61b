"""Run by `test_deformable_attention_triton.py` in separate processes, where Triton is imported for the first time.

python -m tests.triton_kernels run CASES RESULTS     the kernels, interpreted on the CPU
python -m tests.triton_kernels compile               the kernels, compiled without a device
"""

import json
import os
import sys

import torch

SIZES = {"HEADS": 8, "CHANNELS": 32, "LEVELS": 3, "POINTS": 4, "QUERY_BLOCK": 32, "CHANNEL_BLOCK": 32}


def run(cases, results):
    """Save the output and the gradients of values, positions and weights of each case."""
    os.environ["TRITON_INTERPRET"] = "1"
    from maskwright.models.ops.deformable_attention import deformable_attention

    found = []
    for values, shapes, positions, weights, upstream in torch.load(cases):
        leaves = [tensor.requires_grad_() for tensor in (values, positions, weights)]
        output = deformable_attention(leaves[0], shapes, leaves[1], leaves[2], "triton")
        found.append((output.detach(), *torch.autograd.grad(output, leaves, upstream)))
    torch.save(found, results)


def check_operator():
    """Run PyTorch's checks of a custom operator: that its schema, gradient and fake implementation are right."""
    os.environ["TRITON_INTERPRET"] = "1"
    from maskwright.models.ops.deformable_attention_triton import attend

    values, positions = torch.randn(1, 6, 2, 4, requires_grad=True), torch.rand(1, 3, 2, 1, 2, 2, requires_grad=True)
    weights = torch.rand(1, 3, 2, 1, 2, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attend, (values, [2, 3], positions, weights), test_utils=checks)


def compile_kernels():
    """Compile each kernel for CUDA compute capability 9.0 and print properties of the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from maskwright.models.ops import deformable_attention_triton as kernels

    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        types = {name: "*fp32" for name in kernel.arg_names}
        types |= dict.fromkeys(("values", "output", "gradient"), "*bf16")
        types |= dict.fromkeys(("queries", "cells"), "i32") | dict.fromkeys(SIZES, "constexpr")
        types |= dict.fromkeys(("heights", "widths"), ("i32",) * SIZES["LEVELS"])
        types |= dict.fromkeys(("strides", "gradient_strides"), ("i32",) * 6)
        signature = {name: types[name] for name in kernel.arg_names}
        fixed = {(kernel.arg_names.index(name),): size for name, size in SIZES.items()}
        made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32)).asm
        print(json.dumps({"atomic": "red.global" in made["ptx"], "bytes": len(made["cubin"])}))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", cases, results]:
            check_operator()
            run(cases, results)
        case ["compile"]:
            compile_kernels()
