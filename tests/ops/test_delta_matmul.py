"""Products with a sparse delta against dense float64 products."""

import pytest
import torch

from sparse_peft.numerics import panel_limit
from sparse_peft.ops import delta_matmul
from sparse_peft.support import Support

SHAPES = [(1, 1), (1, 7), (13, 1), (20, 2), (37, 29), (64, 48), (5, 211)]


def random_support(shape, density):
    k = max(1, round(density * shape[0] * shape[1]))
    return Support.random(shape, k, seed=3, name="layer")


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
