"""Monarch matrices against dense matrices in float64."""

import pytest
import torch

from sparse_peft.ops import (
    block_sizes,
    monarch_dense,
    monarch_factors,
    monarch_product,
    monarch_projection,
    monarch_sum,
)

# inputs, outputs, blocks, rank: divisible and not, ranks below, at and above the blocks, and no multiple of them
CASES = [(12, 8, 4, 4), (13, 7, 4, 4), (5, 1, 4, 2), (16, 16, 4, 1), (10, 21, 3, 5), (9, 9, 3, 6), (6, 10, 1, 3)]


def factors(inputs, outputs, nblocks, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width, height = block_sizes(inputs, outputs, nblocks)
    sizes = (nblocks, rank, width), (nblocks, height, rank)
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]


def dense(first, second, inputs, outputs):
    """Two block-diagonal matrices and the permutation between them, written out."""
    nblocks, rank, _ = first.shape
    number = torch.arange(nblocks * rank)
    permutation = torch.eye(nblocks * rank, dtype=first.dtype)[number.view(rank, nblocks).t().reshape(-1)]
    height = second.shape[1]
    last = torch.eye(nblocks * height, dtype=first.dtype)[
        torch.arange(nblocks * height).view(nblocks, height).t().reshape(-1)
    ]
    whole = last @ torch.block_diag(*second) @ permutation @ torch.block_diag(*first)
    return whole[:outputs, :inputs]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_factors_and_gradients_are_those_of_the_dense_matrix(case):
    inputs, outputs, nblocks, rank = case
    first, second = (tensor.requires_grad_() for tensor in factors(*case))
    want = dense(first, second, inputs, outputs)
    assert torch.allclose(monarch_dense(first, second, inputs, outputs), want, atol=1e-12)
    down, up = monarch_factors(first, second, inputs, outputs)
    assert down.shape == (nblocks * rank, inputs) and up.shape == (outputs, nblocks * rank)
    for shape in ((inputs,), (3, inputs), (2, 3, inputs), (0, inputs)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = monarch_product(x, first, second, outputs)
        assert torch.allclose(out, x @ want.t(), atol=1e-12)
        up = torch.randn_like(out)
        tensors = (x, first, second)
        got = torch.autograd.grad(out, tensors, up, retain_graph=True)
        wanted = torch.autograd.grad(x @ want.t(), tensors, up, retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got, wanted, strict=True))


def test_gradcheck():
    first, second = (tensor.requires_grad_() for tensor in factors(5, 7, 3, 2))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: monarch_product(*tensors, 7), (x, first, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    first, second = (tensor.to(dtype) for tensor in factors(13, 7, 4, 4))
    x = torch.randn(6, 13, dtype=dtype)
    want = x.double() @ dense(first.double(), second.double(), 13, 7).t()
    out = monarch_product(x, first, second, 7)
    assert out.dtype == dtype
    assert torch.allclose(
        out.double(),
        want,
        rtol=0.05 if dtype == torch.bfloat16 else 1e-5,
        atol=0.1 if dtype == torch.bfloat16 else 1e-5,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projection_of_a_monarch_matrix_is_itself_and_its_error_is_known(case):
    inputs, outputs, nblocks, rank = case
    matrix = monarch_dense(*factors(*case), inputs, outputs)
    again = monarch_dense(*monarch_projection(matrix, nblocks, rank), inputs, outputs)
    assert torch.allclose(again, matrix, atol=1e-10)

    other = torch.randn(outputs, inputs, dtype=torch.float64)
    first, second = monarch_projection(other, nblocks, rank)
    assert first.dtype == torch.float64
    width, height = block_sizes(inputs, outputs, nblocks)
    padded = torch.zeros(nblocks * height, nblocks * width, dtype=torch.float64)
    padded[:outputs, :inputs] = other
    reaches = dense(*(torch.ones_like(t) for t in (first, second)), nblocks * width, nblocks * height)
    left = torch.tensor(0.0, dtype=torch.float64)
    for k in range(nblocks):
        for upper in range(nblocks):
            part = padded[upper::nblocks, k * width : (k + 1) * width]
            count = int(reaches[upper, k * width])  # how many numbers between the factors belong to this pair
            left += torch.linalg.svdvals(part)[count:].square().sum()
    error = (monarch_dense(first, second, nblocks * width, nblocks * height) - padded).square().sum()
    assert torch.allclose(error, left, atol=1e-9)


def test_the_share_that_blocks_reach():
    for nblocks, rank, share in ((4, 1, 0.25), (4, 2, 0.5), (4, 4, 1.0), (4, 8, 1.0), (16, 4, 0.25)):
        matrix = monarch_dense(*factors(32, 48, nblocks, rank), 32, 48)
        assert (matrix != 0).double().mean().item() == share
        assert torch.linalg.matrix_rank(matrix) == min(32, nblocks * rank)


@pytest.mark.parametrize("ranks", [(4,), (1, 2), (4, 4), (3, 6, 1)], ids=str)
def test_sum(ranks):
    parts = [factors(13, 7, 4, rank, seed) for seed, rank in enumerate(ranks)]
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    first, second = monarch_sum(parts, weights)
    assert first.shape[1] == 4 * sum(-(-rank // 4) for rank in ranks)
    want = sum(weight * dense(*part, 13, 7) for weight, part in zip(weights, parts, strict=True))
    assert torch.allclose(monarch_dense(first, second, 13, 7), want, atol=1e-12)
