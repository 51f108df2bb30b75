"""The gradient of experts' entries, each expert's from its own tokens, against dense float64 products."""

import pytest
import torch

from sparse_peft.numerics import panel_limit
from sparse_peft.ops import expert_support_grad, use_backend
from sparse_peft.ops.gradient_paths import REGISTER_BYTES
from sparse_peft.support import Support

SMALL = REGISTER_BYTES // 4  # most tokens of experts that share a product, in float32
# Tokens of each expert.
COUNTS = {
    "few": [3, 1, 2, 5, 1, 4, 2, 1, 3, 2, 2],
    "some without": [0, 2, 0, 0, 3, 1, 0, 4, 0],
    "few and many": [2, SMALL, SMALL + 1, 1, 150, 3, 0, 7],
    "one": [9],
    "none": [0, 0, 0],
}


def problem(counts, rows, cols, dtype, entries=0.3):
    torch.manual_seed(0)
    experts, tokens = len(counts), sum(counts)
    size = experts * rows * cols
    support = Support.random((experts * rows, cols), max(1, round(entries * size)), seed=1, name="w")
    left, right = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
    return support, left, right, torch.tensor(counts).cumsum(0)


def wanted(support, left, right, ends):
    starts = [0, *ends.tolist()[:-1]]
    each = [left[a:b].double().t() @ right[a:b].double() for a, b in zip(starts, ends.tolist(), strict=True)]
    return torch.cat(each).view(-1)[support.indices.long()]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (33, 20), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sampled", "panels"])
@pytest.mark.parametrize("compact", [True, False])
def test_each_experts_gradient_is_of_its_own_tokens(name, rows, cols, dtype, backend, compact):
    support, left, right, ends = problem(COUNTS[name], rows, cols, dtype)
    stored = support.compact() if compact else support
    with use_backend(backend):
        found = expert_support_grad(left, right, ends, stored, len(ends))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), wanted(support, left, right, ends), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [64, 4096])
def test_tiles_are_within_the_panel_limit(limit):
    support, left, right, ends = problem(COUNTS["few and many"], 33, 20, torch.float32)
    with use_backend("sampled"), panel_limit(limit):
        found = expert_support_grad(left, right, ends, support, len(ends))
    torch.testing.assert_close(found.double(), wanted(support, left, right, ends), rtol=1e-5, atol=1e-5)


def test_experts_without_entries_and_tokens_after_the_last_are_left_out():
    """Rows 10 to 14 are those of expert 2, which has no entry; its tokens and the last two are not read."""
    counts = [2, 3, 4, 1]
    full, left, right, ends = problem(counts, 5, 7, torch.float32)
    flat = full.indices[(full.indices < 70) | (full.indices >= 105)]
    support = Support(full.shape, flat)
    left[5:9] = float("nan")
    more = torch.full((2, 5), float("nan")), torch.full((2, 7), float("nan"))
    with use_backend("sampled"):
        found = expert_support_grad(torch.cat((left, more[0])), torch.cat((right, more[1])), ends, support, 4)
    expected = wanted(support, left.nan_to_num(), right, ends)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_finite_stay_with_their_expert():
    support, left, right, ends = problem([2, 3, 1], 5, 7, torch.float32, entries=1.0)
    left[0, 0], right[5, 0] = float("inf"), float("nan")
    with use_backend("sampled"):
        found = expert_support_grad(left, right, ends, support, 3).view(3, 5, 7)
    assert not found[0, 0].isfinite().any() and found[2, :, 0].isnan().all()
    assert found[0, 1:].isfinite().all() and found[1].isfinite().all() and found[2, :, 1:].isfinite().all()


@pytest.fixture
def products(monkeypatch):
    """``(groups, tokens)`` of each sampled product."""
    seen, sampled = [], torch.sparse.sampled_addmm

    def count(matrix, left, right, **more):
        seen.append((matrix.shape[1] // 7, left.shape[1]))
        return sampled(matrix, left, right, **more)

    monkeypatch.setattr(torch.sparse, "sampled_addmm", count)
    return seen


def test_neighbours_with_few_tokens_share_a_product(products):
    support, left, right, ends = problem([1, 2, 1, 0, 3, 1, SMALL + 1, 2], 5, 7, torch.float32)
    with use_backend("sampled"):
        expert_support_grad(left, right, ends, support, len(ends))
    assert products == [(3, SMALL), (2, SMALL), (1, SMALL + 1), (1, SMALL)]


def test_a_shared_product_has_no_more_tokens_than_a_tile(products):
    support, left, right, ends = problem([2] * 40, 5, 7, torch.float32)
    with use_backend("sampled"):
        expert_support_grad(left, right, ends, support, 40)
    assert sum(groups for groups, _ in products) == 40
    assert {tokens for _, tokens in products} == {SMALL} and max(products)[0] == 128 // SMALL
