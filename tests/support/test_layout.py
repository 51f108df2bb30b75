import pytest
import torch

from sparse_peft.support import Support, layout_of


def test_a_spread_support_is_left_as_it_is():
    support = Support.random((64, 48), 300, seed=0, name="layer")
    layout = layout_of(support)
    assert layout.inner is support and layout.rows is layout.cols is None and layout.groups == ()
    assert layout_of(support) is layout


def test_empty_rows_and_columns_are_left_out_and_the_order_stays():
    mask = torch.zeros(40, 50, dtype=torch.bool)
    mask[3:20:2, 7:30:3] = torch.rand(9, 8) < 0.7
    support = Support.from_mask(mask)
    layout = layout_of(support)
    assert layout.inner.nnz == support.nnz
    weight = torch.randn(40, 50)
    part = weight[layout.rows][:, layout.cols]
    assert torch.equal(part.reshape(-1)[layout.inner.indices.long()], weight.view(-1)[support.indices.long()])


@pytest.mark.parametrize(
    ("support", "groups"),
    [
        (Support.from_columns((33, 20), [1, 5, 6]), 1),
        (Support.from_rows((64, 20), list(range(1, 64, 3))), 1),
        (Support.from_blocks((64, 64), (16, 16), [0, 1, 2, 3, 5, 7, 13, 15]), 3),
        (Support.from_blocks((50, 30), (16, 8), [0, 3, 4, 5, 6, 8, 13, 15]), 4),
        (Support.from_mask(torch.ones(16, 16, dtype=torch.bool)), 1),
    ],
)
def test_groups_are_the_support(support, groups):
    layout = layout_of(support)
    assert len(layout.groups) == groups
    mask = torch.zeros(layout.inner.shape, dtype=torch.bool)
    last = 0
    for group in layout.groups:
        rows = mask[group.start : group.stop]
        assert group.first == last
        last = group.last
        rows[:, slice(None) if group.cols is None else group.cols] = True
    assert last == support.nnz and Support.from_mask(mask) == layout.inner


def test_rows_that_differ_in_one_column_are_no_group():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, ::2] = True
    mask[1::2, 0], mask[1::2, 1] = False, True
    assert layout_of(Support.from_mask(mask)).groups == ()


def test_entry_ranges_and_transposed():
    support = Support.random((31, 17), 80, seed=1, name="layer")
    ranges = support.entry_ranges([(0, 10), (10, 20), (20, 31)])
    for (first, last), (start, stop) in zip(ranges, [(0, 10), (10, 20), (20, 31)], strict=True):
        rows = support.rows[first:last]
        assert bool(((rows >= start) & (rows < stop)).all())
    assert ranges[0][0] == 0 and ranges[-1][1] == 80
    other, order = support.transposed
    values = torch.randn(80)
    dense = torch.zeros(31, 17).view(-1).index_copy(0, support.indices.long(), values).view(31, 17)
    assert torch.equal(dense.t().reshape(-1)[other.indices.long()], values[order])


def test_an_empty_support_has_a_layout():
    layout = layout_of(Support((4, 4), torch.empty(0, dtype=torch.int64)))
    assert layout.groups == () and layout.rows is None
