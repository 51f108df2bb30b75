"""Activations that layers share are transposed once."""

import pytest
import torch

from sparse_peft.ops import gradient_paths, support_grad, transposed, triton_kernels, use_backend
from sparse_peft.support import Support

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not triton_kernels.usable(CPU), reason="needs Triton and TRITON_INTERPRET=1")


@interpreted
def test_layers_with_one_input_transpose_it_once(monkeypatch):
    monkeypatch.setattr(gradient_paths, "KERNEL_TILE", 8)
    made = []
    original = transposed._Kept.__init__

    def count(self, x, result):
        made.append(tuple(x.shape))
        original(self, x, result)

    monkeypatch.setattr(transposed._Kept, "__init__", count)
    support = Support.random((64, 48), 200, seed=0, name="layer")

    class Weighted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, values):
            ctx.save_for_backward(x)
            return x.new_ones(x.shape[0], 64)

        @staticmethod
        def backward(ctx, grad):
            with use_backend("triton"):
                return None, support_grad(grad, ctx.saved_tensors[0], support)

    x, other = torch.randn(20, 48), torch.randn(20, 48)
    values = [torch.zeros(support.nnz, requires_grad=True) for _ in range(4)]
    outputs = [Weighted.apply(x, value) for value in values[:3]] + [Weighted.apply(other, values[3])]
    gradient = torch.randn(20, 64)
    sum((output * gradient).sum() for output in outputs).backward()
    # three tiles of 20 tokens, of two inputs; nothing outlives the backward pass
    assert made == [(8, 48), (8, 48), (4, 48)] * 2 and transposed._kept == {}
    for value, source in zip(values, (x, x, x, other), strict=True):
        expected = (gradient.t() @ source).view(-1)[support.indices.long()]
        torch.testing.assert_close(value.grad, expected)


def test_an_activation_that_was_written_to_is_transposed_anew():
    kept = transposed._Kept(x := torch.randn(8, 4), x.t().contiguous())
    assert kept.is_of(x, torch.float32)
    x.mul_(2)
    assert not kept.is_of(x, torch.float32)
