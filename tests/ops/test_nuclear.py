"""The nuclear norm and its gradient against singular value decompositions in float64."""

import pytest
import torch

from benchmarks.measure import LargestTensor
from sparse_peft import panel_limit
from sparse_peft.ops import nuclear_norm
from sparse_peft.support import Support


def dense_of(entries, support):
    flat = torch.zeros(support.shape[0] * support.shape[1], dtype=torch.float64)
    return flat.scatter(0, support.indices.long(), entries.double()).view(support.shape)


def by_svd(entries, support):
    """The norm, and the subgradient that leaves out what has no singular value."""
    u, s, vh = torch.linalg.svd(dense_of(entries, support), full_matrices=False)
    kept = s > 1e-9 * s[0]
    return s.sum(), (u[:, kept] @ vh[kept]).reshape(-1)[support.indices.long()]


@pytest.mark.parametrize("shape, density", [((40, 90), 0.3), ((90, 40), 0.1), ((33, 200), 0.02), ((70, 71), 0.5)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-5), (torch.float32, 2e-3)])
@pytest.mark.parametrize("limit", [2**26, 900])
def test_norm_and_gradient(shape, density, dtype, tolerance, limit):
    support = Support.random(shape, round(density * shape[0] * shape[1]), seed=0, name="a")
    entries = (1e-3 * torch.randn(support.nnz)).to(dtype)
    with panel_limit(limit):
        norm, gradient = nuclear_norm(entries, support)
    expected, wanted = by_svd(entries, support)
    torch.testing.assert_close(norm.double(), expected, rtol=tolerance, atol=0)
    assert float((gradient.double() - wanted).norm() / wanted.norm()) < tolerance


def test_gradient_is_the_difference_quotient_at_full_rank():
    support = Support.random((12, 30), 150, seed=1, name="a")
    entries = torch.randn(150, dtype=torch.float64)
    _, gradient = nuclear_norm(entries, support)
    for i in (0, 17, 149):
        step = torch.zeros_like(entries)
        step[i] = 1e-6
        difference = (by_svd(entries + step, support)[0] - by_svd(entries - step, support)[0]) / 2e-6
        torch.testing.assert_close(gradient[i], difference, rtol=1e-3, atol=1e-4)


def test_zero_has_no_gradient_and_scale_none():
    support = Support.random((50, 20), 100, seed=0, name="a")
    norm, gradient = nuclear_norm(torch.zeros(100), support)
    assert float(norm) == 0 and not gradient.any()
    entries = torch.randn(100)
    one, other = nuclear_norm(entries, support), nuclear_norm(1e-4 * entries, support)
    torch.testing.assert_close(other[0], 1e-4 * one[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(other[1], one[1], rtol=1e-3, atol=1e-4)


def test_bounds_by_the_frobenius_norm():
    support = Support.random((40, 60), 700, seed=0, name="a")
    entries = torch.randn(700)
    norm, frobenius = float(nuclear_norm(entries, support)[0]), float(entries.norm())
    assert frobenius <= norm <= 40**0.5 * frobenius


def test_low_rank_and_single_entries():
    """The null space stays without a gradient."""
    u, v = torch.randn(30, 1, dtype=torch.float64), torch.randn(1, 50, dtype=torch.float64)
    support = Support.from_mask(torch.ones(30, 50, dtype=torch.bool))
    _, gradient = nuclear_norm((u @ v).reshape(-1), support)
    torch.testing.assert_close(gradient.view(30, 50), u @ v / u.norm() / v.norm(), rtol=1e-4, atol=1e-6)
    one = Support((30, 50), torch.tensor([77]))
    norm, gradient = nuclear_norm(torch.tensor([-3.0]), one)
    torch.testing.assert_close((float(norm), float(gradient)), (3.0, -1.0), rtol=1e-4, atol=0)


def test_nothing_is_larger_than_a_panel_or_the_gram_matrix():
    support = Support.random((3000, 40), 6000, seed=0, name="a")
    with panel_limit(50_000), LargestTensor() as largest:
        nuclear_norm(torch.randn(6000), support)
    assert largest.nbytes <= 50_000
