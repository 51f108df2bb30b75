"""What every implementation of an op must do; called for each backend, on the CPU and, where there is one, a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_peft.numerics import panel_limit, topk_indices
from sparse_peft.ops import (
    code_gather,
    code_scatter_add,
    delta_matmul_add_,
    effective_entries,
    expert_support_grad,
    masked_dw,
    pack_codes,
    restore_,
    resync_,
    scatter_add_,
    support_grad,
    take_,
    use_backend,
)
from sparse_peft.support import Support
from tests.ops.kernel_cases import ExpertProblem, Problem

NEAR = {"rtol": 1e-5, "atol": 2e-5}


def check_support_grad(backend: str, problem: Problem) -> None:
    with use_backend(backend), panel_limit(2048):
        got = support_grad(problem.left, problem.right, problem.support)
    wide = torch.float64 if problem.left.dtype == torch.float64 else torch.float32
    assert got.dtype == wide and got.shape == (problem.support.nnz,)
    # the operands are exact in float64, so what remains is the order of summation alone, in half precision too
    torch.testing.assert_close(got.double(), problem.at_support(), **NEAR)


def check_expert_support_grad(backend: str, problem: ExpertProblem) -> None:
    left, right, ends, support = problem.left, problem.right, problem.ends, problem.support
    with use_backend(backend), panel_limit(8192):
        got = expert_support_grad(left, right, ends, support, len(ends))
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    assert got.dtype == wide and got.shape == (support.nnz,)
    torch.testing.assert_close(got.double(), problem.at_support(), **NEAR)


def check_masked_dw(backend: str, problem: Problem, share: float) -> None:
    support = problem.support
    rows, cols = support.shape
    limit = round(share * (rows * cols - support.nnz))
    with use_backend(backend), panel_limit(4096):
        values, positions, found = masked_dw(problem.left, problem.right, support, limit)
    torch.testing.assert_close(values.double(), problem.at_support(), **NEAR)
    flat = problem.dense.reshape(-1)
    assert positions.shape == found.shape == (limit,) and not support.contains(positions).any()
    assert bool((positions[1:] > positions[:-1]).all())
    torch.testing.assert_close(found.double(), flat[positions], **NEAR)
    if limit:
        # the set is the exact one up to entries whose magnitudes rounding cannot tell apart
        rest = flat.abs().clone()
        rest[support.indices.long()] = -1
        last = rest[topk_indices(rest, limit)].amin()
        assert bool((flat[positions].abs() >= last - 1e-4).all())


def check_entries(backend: str, problems: list[Problem], dtype: torch.dtype) -> None:
    """scatter_add_, take_, resync_ and restore_ on several weights at once, against one entry at a time."""
    device = problems[0].left.device
    weights = [torch.randn(p.support.shape, device=device).to(dtype) for p in problems]
    before = [weight.clone() for weight in weights]
    indices = [p.support.indices for p in problems]
    values = [torch.randn(p.support.nnz, device=device) for p in problems]
    expected = [b.reshape(-1)[i.long()] for b, i in zip(before, indices, strict=True)]
    held = [effective_entries(e, v) for e, v in zip(expected, values, strict=True)]

    def inspect(entries: list[Tensor]) -> None:
        for weight, b, i, e in zip(weights, before, indices, entries, strict=True):
            assert torch.equal(weight, b.reshape(-1).scatter(0, i.long(), e).view(b.shape))

    with use_backend(backend):
        for weight, i, v in zip(weights, indices, values, strict=True):
            scatter_add_(weight, i, v)
        inspect(held)
        restore_(weights, indices, expected)
        inspect(expected)
        originals = [torch.full_like(e, torch.nan) for e in expected]
        take_(weights, indices, originals)
        inspect(expected)
        assert all(torch.equal(o, e) for o, e in zip(originals, expected, strict=True))
        resync_(weights, indices, originals, values)
        inspect(held)


def check_delta_matmul_add(backend: str, x: Tensor, support: Support) -> None:
    values = torch.randn(support.nnz, device=x.device)
    out = torch.randn(x.shape[0], support.shape[0], device=x.device).to(x.dtype)
    dense = torch.zeros(support.shape, dtype=torch.float64, device=x.device)
    dense.view(-1).index_copy_(0, support.indices.long(), values.double())
    expected = out.double() + x.double() @ dense.t()
    with use_backend(backend), panel_limit(2048):
        delta_matmul_add_(out, x, values, support.row_ptr, support.cols)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps + 1e-5, atol=2 * eps + 1e-5)


def check_codes(backend: str, rows: int, cols: int, groups: int, bits: int, dtype: torch.dtype, device: str) -> None:
    codes = torch.randint(0, 1 << bits, (rows, cols), device=device)
    packed = pack_codes(codes, bits)
    codebook = torch.randn(rows, groups, 1 << bits, device=device)
    grad = torch.randn(rows, cols, device=device).to(dtype)
    group = torch.arange(cols, device=device) * groups // cols
    with use_backend(backend), panel_limit(1024):
        weights = code_gather(codebook, packed, bits, cols, dtype)
        sums = code_scatter_add(grad, packed, bits, groups)
    places = group * (1 << bits) + codes
    assert torch.equal(weights, codebook.flatten(1).gather(1, places).to(dtype))
    expected = torch.zeros(rows, groups << bits, dtype=torch.float64, device=device)
    expected.scatter_add_(1, places, grad.double())
    torch.testing.assert_close(sums.double(), expected.view(rows, groups, -1), **NEAR)
