"""``python -m tests.ops.aot 80 90``: compile every Triton kernel to machine code, without a GPU; a line for each."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_peft.ops import triton_kernels

MODULES = (
    "support_grad", "support_grad_tiles", "entries", "masked_dw", "delta_matmul", "codes", "expert_support_grad"
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(architectures: list[int], dtypes=DTYPES) -> None:
    done = set()
    for name in MODULES:
        for dtype in dtypes:
            for kernel, types, constants in triton_kernels.kernels(name).signatures(dtype):
                case = (kernel.__name__, *types.values(), *constants.values())
                if case in done:
                    continue
                done.add(case)
                for architecture in architectures:
                    everything = {**types, **dict.fromkeys(constants, "constexpr")}
                    source = ASTSource(kernel, everything, constants)
                    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
                    print(kernel.__name__, dtype, f"sm_{architecture}", len(compiled.asm["cubin"]), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
