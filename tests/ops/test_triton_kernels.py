"""Triton kernels by themselves: row groups, and machine code for two architectures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_peft.ops import triton_kernels
from sparse_peft.support import Support, layout_of

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not triton_kernels.usable(CPU), reason="needs Triton and TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_of_row_groups(dtype):
    kernels = triton_kernels.kernels("support_grad_tiles")
    for support in (
        Support.from_blocks((150, 140), (16, 32), [0, 2, 3, 7, 8, 20, 33, 49]),
        Support.from_columns((130, 90), list(range(0, 90, 1))),
    ):
        layout = layout_of(support)
        rows = torch.arange(support.shape[0]) if layout.rows is None else layout.rows
        cols = torch.arange(support.shape[1]) if layout.cols is None else layout.cols
        left, right = (torch.randn(45, n).to(dtype) for n in support.shape)
        out = torch.full((support.nnz,), torch.nan)
        kernels.support_grad_tiles_(out, left[:, rows], right[:, cols], *layout.work(kernels.work_list))
        expected = (left.double().t() @ right.double()).view(-1)[support.indices.long()]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.compile
@pytest.mark.skipif(not triton_kernels.installed(), reason="needs Triton")
def test_every_kernel_compiles_for_sm_80_and_sm_90(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.aot", "80", "90"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines() if "_kernel" in line}
    assert len(kernels) == 9, kernels
    for kernel in kernels:
        for dtype in ("float32", "bfloat16", "float16"):
            assert done.stdout.count(f"{kernel} torch.{dtype} sm_80") >= 1
            assert done.stdout.count(f"{kernel} torch.{dtype} sm_90") >= 1
