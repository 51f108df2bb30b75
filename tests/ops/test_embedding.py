"""Looked-up rows and their gradients, against dense one-hot products in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft import panel_limit
from sparse_peft.ops import EmbeddingProduct, OneHot, embedding_delta, gradient_panels, masked_dw, support_grad
from sparse_peft.support import Support

PANELS = (2**26, 100)


@st.composite
def problems(draw):
    """``(ids, output gradient, support)``; -1 among the ids is a row of zeros."""
    rows, cols, tokens = (draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(0, 20)))
    torch.manual_seed(draw(st.integers(0, 99)))
    entries = draw(st.integers(0, rows * cols))
    support = Support((rows, cols), torch.randperm(rows * cols)[:entries].sort().values)
    return torch.randint(-1, rows, (tokens,)), torch.randn(tokens, cols, dtype=torch.float64), support


def dense_gradient(ids, grad, rows):
    one_hot = F.one_hot(ids.clamp(min=0), rows).double() * (ids >= 0)[:, None]
    return one_hot.t() @ grad


@given(problems(), st.sampled_from(PANELS))
@settings(deadline=None, max_examples=60)
def test_gradients_at_a_support_and_in_panels(problem, limit):
    ids, grad, support = problem
    left, dense = OneHot(ids, support.shape[0]), dense_gradient(ids, grad, support.shape[0])
    with panel_limit(limit):
        found = support_grad(left, grad, support)
        parts = [panel for _, _, panel in gradient_panels([(left, grad), (left, grad)], support.shape)]
    torch.testing.assert_close(found, dense.view(-1)[support.indices.long()], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(parts), 2 * dense, rtol=1e-12, atol=1e-12)


@given(problems(), st.floats(0, 1), st.sampled_from(PANELS))
@settings(deadline=None, max_examples=60)
def test_the_largest_other_gradients(problem, share, limit):
    ids, grad, support = problem
    wanted = int(share * (support.shape[0] * support.shape[1] - support.nnz))
    dense = dense_gradient(ids, grad, support.shape[0]).view(-1)
    with panel_limit(limit):
        values, positions, others = masked_dw(OneHot(ids, support.shape[0]), grad, support, wanted)
    torch.testing.assert_close(values, dense[support.indices.long()], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(others, dense[positions], rtol=1e-12, atol=1e-12)
    left = dense.abs().index_fill(0, torch.cat((support.indices.long(), positions)), 0)
    assert positions.unique().numel() == positions.numel() <= wanted
    assert not torch.isin(positions, support.indices).any()
    if len(positions) < wanted:
        assert not left.any()  # all others are zero
    elif wanted:
        assert left.max() <= others.abs().min() + 1e-12


@given(problems())
@settings(deadline=None, max_examples=40)
def test_rows_of_a_delta(problem):
    ids, grad, support = problem
    ids = ids.clamp(min=0)
    values = torch.randn(support.nnz, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(support.shape, dtype=torch.float64).view(-1)
    dense = dense.scatter(0, support.indices.long(), values.detach()).view(support.shape)
    found = embedding_delta(ids, values, support, EmbeddingProduct(support.shape[0]))
    assert torch.equal(found, dense[ids])
    found.backward(grad)
    wanted = dense_gradient(ids, grad, support.shape[0]).view(-1)[support.indices.long()]
    torch.testing.assert_close(values.grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_gives_nan_for_all_candidates(value):
    grad = torch.ones(3, 4)
    grad[1, 2] = value
    _, _, others = masked_dw(OneHot(torch.tensor([0, 1, 1]), 5), grad, Support((5, 4), torch.tensor([0])), 3)
    assert others.isnan().all()


def test_half_precision_is_summed_in_float32():
    ids, grad = torch.zeros(4096, dtype=torch.int64), torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    found = support_grad(OneHot(ids, 2), grad, Support((2, 1), torch.tensor([0, 1])))
    assert found.dtype == torch.float32 and found.tolist() == [4096, 0]
