"""Supports in few rows or columns, against counting in dense matrices."""

import pytest
import torch

from sparse_peft.support import Support, best_in_lines, count_of_lines, random_in_lines, within_lines

SHAPE = (7, 12)


def lines_with_entries(support, dim):
    return support.to_mask().any(1 - dim).nonzero().squeeze(1)


@pytest.mark.parametrize("dim", [0, 1])
def test_random_positions_lie_in_the_share_of_lines(dim):
    found = random_in_lines(SHAPE, 15, dim, 0.3, seed=1, name="layer")
    again = random_in_lines(SHAPE, 15, dim, 0.3, seed=1, name="layer")
    other = random_in_lines(SHAPE, 15, dim, 0.3, seed=1, name="another")
    assert torch.equal(found.indices, again.indices) and not torch.equal(found.indices, other.indices)
    assert found.nnz == 15 and bool((found.indices.diff() > 0).all())
    assert lines_with_entries(found, dim).numel() <= count_of_lines(SHAPE, 15, dim, 0.3)


def test_there_are_lines_enough_for_the_entries():
    assert count_of_lines(SHAPE, 1, 1, 0.01) == 1
    assert count_of_lines(SHAPE, 22, 1, 0.01) == 4  # three columns have room for 21
    assert count_of_lines(SHAPE, 84, 1, 0.5) == 12
    assert random_in_lines(SHAPE, 84, 1, 0.1, seed=0, name="").nnz == 84


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("largest", [True, False])
def test_the_best_entries_of_the_best_lines(dim, largest):
    scores = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    signed = scores if largest else -scores
    count = count_of_lines(SHAPE, 6, dim, 0.25)
    lines = signed.sum(1 - dim).topk(count).indices
    outside = torch.ones(SHAPE[dim], dtype=torch.bool).index_fill_(0, lines, False)
    masked = signed.masked_fill(outside[:, None] if dim == 0 else outside, -torch.inf)
    expected = masked.flatten().topk(6).indices.sort().values
    assert torch.equal(best_in_lines(scores, 6, dim, 0.25, largest).indices.long(), expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("entries", [0, 5, 40])
def test_the_support_within_its_lines(dim, entries):
    support = Support.random(SHAPE, entries, seed=2, name="")
    lines, inner = within_lines(support, dim)
    assert torch.equal(lines, lines_with_entries(support, dim))
    assert torch.equal(inner.to_mask(), support.to_mask().index_select(dim, lines))
    assert within_lines(support, dim)[1] is inner
