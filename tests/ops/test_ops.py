"""Ops against dense float64 products, every implementation, with poisoned and odd inputs."""

import pytest
import torch

from sparse_peft.numerics import panel_limit, panels
from sparse_peft.ops import delta_matmul, effective_entries, read_entries, support_grad, use_backend, write_entries_
from sparse_peft.support import Support

SHAPES = [(1, 1), (1, 7), (13, 1), (20, 2), (37, 29), (64, 48), (5, 211)]


def random_support(shape, density):
    k = max(1, round(density * shape[0] * shape[1]))
    return Support.random(shape, k, seed=3, name="layer")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["sampled", "panels"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_support_grad_is_the_gathered_dense_gradient(shape, density, backend, dtype):
    s = random_support(shape, density)
    left, right = torch.randn(11, shape[0]).to(dtype), torch.randn(11, shape[1]).to(dtype)
    dense = (left.double().t() @ right.double()).reshape(-1)[s.indices.long()]
    with use_backend(backend), panel_limit(256):
        got = support_grad(left, right, s)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the operands are exact in float64, so what remains is the order of summation alone, in half precision too
    torch.testing.assert_close(got.double(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sampled", "panels"])
def test_support_grad_accepts_strided_views_and_no_tokens(backend):
    s = random_support((12, 10), 0.2)
    left, right = torch.randn(12, 6).t(), torch.randn(6, 20)[:, ::2]
    with use_backend(backend):
        got = support_grad(left, right, s)
        none = support_grad(left[:0], right[:0], s)
    torch.testing.assert_close(got, (left.t() @ right).reshape(-1)[s.indices.long()])
    assert none.shape == (s.nnz,) and not none.any()


def test_support_grad_ignores_entries_outside_the_support_even_if_they_are_nan():
    s = Support.from_indices((4, 4), torch.tensor([0, 5]))
    left, right = torch.ones(3, 4), torch.ones(3, 4)
    left[:, 2:] = float("nan")
    for backend in ("sampled", "panels"):
        with use_backend(backend):
            assert torch.equal(support_grad(left, right, s), torch.full((2,), 3.0))


def test_unknown_backend_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'fast' is not a backend.*auto, panels, sampled"), use_backend("fast"):
        pass
    s = random_support((4, 4), 0.5)
    monkeypatch.setenv("SPARSE_PEFT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="SPARSE_PEFT_BACKEND='nonsense'"):
        support_grad(torch.ones(1, 4), torch.ones(1, 4), s)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_delta_matmul_and_its_gradients(shape, in_dim, dtype):
    s = random_support(shape, 0.3)
    n = shape[in_dim]
    x = torch.randn(2, 5, n).to(dtype).requires_grad_()
    values = torch.randn(s.nnz, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    with panel_limit(1024):
        y = delta_matmul(x, values, s, in_dim)
        grad = torch.randn_like(y)
        y.backward(grad)
    xd, vd = x.detach().double().requires_grad_(), values.detach().double().requires_grad_()
    dense = torch.zeros(shape, dtype=torch.float64).view(-1).index_copy(0, s.indices.long(), vd).view(shape)
    yd = xd @ (dense.t() if in_dim == 1 else dense)
    yd.backward(grad.double())
    tol = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(y.double(), yd, **tol)
    torch.testing.assert_close(x.grad.double(), xd.grad, **tol)
    torch.testing.assert_close(values.grad.double(), vd.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_entries_are_written_and_given_back_bit_for_bit(dtype, contiguous):
    weight = torch.randn(31, 17).to(dtype)
    weight = weight if contiguous else torch.randn(17, 31).to(dtype).t()
    before = weight.clone()
    s = random_support((31, 17), 0.2)
    originals = read_entries(weight, s.indices)
    entries = effective_entries(originals, torch.randn(s.nnz))
    with panel_limit(64):
        write_entries_(weight, s.indices, entries)
    assert torch.equal(read_entries(weight, s.indices), entries)
    assert torch.equal(weight[~s.to_mask()], before[~s.to_mask()])
    write_entries_(weight, s.indices, originals)
    assert torch.equal(weight, before)


def test_effective_entries_round_once():
    original = torch.tensor([1.0], dtype=torch.bfloat16)
    small = torch.tensor([0.0035])  # rounded to bfloat16 first, it would be added as another number
    assert effective_entries(original, small) == (original.float() + small).to(torch.bfloat16)
    assert effective_entries(original.float(), small).dtype == torch.float32


def test_panels_cover_the_range_within_the_limit():
    with panel_limit(100):
        assert panels(10, 30) == [(0, 3), (3, 6), (6, 9), (9, 10)]
        assert panels(2, 1000) == [(0, 1), (1, 2)]
        assert panels(0, 8) == []
    with pytest.raises(ValueError, match="num_bytes=0"), panel_limit(0):
        pass
