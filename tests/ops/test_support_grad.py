"""The gradient at a support against dense float64 products, with poisoned and odd inputs."""

import pytest
import torch

from sparse_peft.numerics import panel_limit
from sparse_peft.ops import support_grad, use_backend
from sparse_peft.ops.gradient_paths import REGISTER_BYTES
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 15, 16, 17, 130])
def test_fewer_tokens_than_a_register_has_numbers_are_filled_up_with_zeros(dtype, tokens, monkeypatch):
    """Only a sampled product of at least as many takes no slow path of torch."""
    widths, sampled = [], torch.sparse.sampled_addmm

    def note(matrix, a, b, **more):
        widths.append(a.shape[1])
        return sampled(matrix, a, b, **more)

    monkeypatch.setattr(torch.sparse, "sampled_addmm", note)
    s = random_support((37, 29), 0.1)
    left, right = torch.randn(tokens, 37).to(dtype), torch.randn(tokens, 29).to(dtype)
    with use_backend("sampled"):
        got = support_grad(left, right, s)
    least = REGISTER_BYTES // got.element_size()
    assert widths == [max(least, width) for width in ([128, tokens - 128] if tokens > 128 else [tokens])]
    dense = (left.double().t() @ right.double()).reshape(-1)[s.indices.long()]
    torch.testing.assert_close(got.double(), dense, rtol=1e-5, atol=1e-5)
