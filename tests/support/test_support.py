"""Sets of positions, against dense masks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft import panel_limit
from sparse_peft.support import ChannelSupport, Support, check_indices, check_stored, index_dtype
from sparse_peft.support.support import PIECE_ENTRIES

SHAPES = [(1, 1), (1, 7), (7, 1), (20, 2), (5, 13)]


@st.composite
def masks(draw, shape=None):
    rows, cols = shape or draw(st.sampled_from(SHAPES))
    bits = draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(bits).view(rows, cols)


@settings(max_examples=80, deadline=None)
@given(masks())
def test_views_match_the_mask(mask):
    support = Support.from_mask(mask, "q")
    rows, cols = np.nonzero(mask.numpy())
    assert support.shape == tuple(mask.shape) and support.name == "q"
    assert support.nnz == len(rows) and support.density == pytest.approx(mask.double().mean().item())
    assert support.indices.tolist() == (rows * mask.shape[1] + cols).tolist()
    assert support.rows.tolist() == rows.tolist() and support.cols.tolist() == cols.tolist()
    assert support.row_ptr.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert {support.indices.dtype, support.rows.dtype, support.cols.dtype, support.row_ptr.dtype} == {torch.int32}
    assert torch.equal(support.to_mask(), mask)
    assert support == Support(support.shape, support.indices)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_set_operations_match_the_masks(data):
    shape = data.draw(st.sampled_from(SHAPES))
    parts = [data.draw(masks(shape)) for _ in range(3)]
    supports = [Support.from_mask(part) for part in parts]
    union, slots = supports[0].union(*supports[1:])
    assert torch.equal(union.to_mask(), parts[0] | parts[1] | parts[2])
    for support, slot in zip(supports, slots, strict=True):
        assert slot.dtype == torch.int64
        assert torch.equal(union.indices[slot], support.indices)
    assert supports[0].intersection_size(supports[1]) == int((parts[0] & parts[1]).sum())
    flat = torch.arange(shape[0] * shape[1])
    assert torch.equal(supports[0].contains(flat), parts[0].reshape(-1))
    assert torch.equal(supports[0].contains(flat.view(shape)), parts[0])
    assert torch.equal(supports[0].slots(supports[0].indices), torch.arange(supports[0].nnz))


@settings(max_examples=80, deadline=None)
@given(masks(), st.integers(0, 5))
def test_free_positions_are_the_lowest_outside(mask, count):
    support, outside = Support.from_mask(mask), (~mask).flatten().nonzero().flatten()
    if count > outside.numel():
        with pytest.raises(ValueError, match=f"{count} free places of {mask.numel()}"):
            support.free(count)
        return
    assert support.free(count).indices.tolist() == outside[:count].tolist()


@pytest.mark.parametrize("dim, width", [(0, 1), (1, 1), (1, 3)])
def test_free_channels_are_the_lowest_outside(dim, width):
    support = ChannelSupport((5, 12), dim, torch.tensor([0, 2]), width)
    each = support.nnz // 2
    assert support.free(2 * each).channels.tolist() == [1, 3]
    assert support.free(0).nnz == 0
    with pytest.raises(ValueError, match=f"{each + 1} entries: a channel has {each}"):
        support.free(each + 1)
    with pytest.raises(ValueError, match="free places"):
        support.free(each * support.size)


def test_union_of_one():
    support = Support.from_indices((3, 3), torch.tensor([5, 1]))
    union, (slots,) = support.union()
    assert union == support and slots.tolist() == [0, 1]


def test_positions_beyond_the_weight_are_not_contained():
    support = Support.from_indices((3, 4), torch.tensor([0, 11]))
    flat = torch.tensor([-1, 0, 11, 12, 2**32, 2**32 + 11])
    assert support.contains(flat).tolist() == [False, True, True, False, False, False]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(1, 6), st.integers(1, 6), st.data())
def test_blocks_rows_and_columns_match_the_masks(shape, height, width, data):
    rows, cols = shape
    grid = -(-rows // height), -(-cols // width)
    ids = data.draw(st.permutations(range(grid[0] * grid[1])))[: data.draw(st.integers(0, grid[0] * grid[1]))]
    expected = torch.zeros(shape, dtype=torch.bool)
    for block in ids:
        r, c = divmod(block, grid[1])
        expected[r * height : (r + 1) * height, c * width : (c + 1) * width] = True
    assert torch.equal(Support.from_blocks(shape, (height, width), ids).to_mask(), expected)

    chosen = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(0, rows))]
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[chosen] = True
    assert torch.equal(Support.from_rows(shape, torch.tensor(chosen, dtype=torch.int32)).to_mask(), expected)

    chosen = data.draw(st.permutations(range(cols)))[: data.draw(st.integers(0, cols))]
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[:, chosen] = True
    assert torch.equal(Support.from_columns(shape, chosen).to_mask(), expected)


def test_random_depends_on_name_seed_and_nothing_else():
    first = Support.random((64, 32), 100, seed=0, name="a")
    torch.manual_seed(99)
    assert first == Support.random((64, 32), 100, seed=0, name="a")
    assert first != Support.random((64, 32), 100, seed=0, name="b")
    assert first != Support.random((64, 32), 100, seed=1, name="a")
    assert first.nnz == 100 and first.name == "a"


def test_from_scores_takes_the_best_and_settles_ties_by_position():
    scores = torch.tensor([[1.0, 3.0, 1.0], [3.0, 0.0, 1.0]])
    assert Support.from_scores(scores, 3).indices.tolist() == [0, 1, 3]
    assert Support.from_scores(scores, 2, largest=False).indices.tolist() == [0, 4]


def test_from_indices_sorts():
    assert Support.from_indices((2, 3), torch.tensor([4, 0, 2])).indices.tolist() == [0, 2, 4]


def test_wide_positions_for_large_weights():
    shape = (2**17, 2**15)
    assert index_dtype(shape) == torch.int64
    assert index_dtype((2**16, 2**15 - 1)) == torch.int32
    assert index_dtype((2**16, 2**15)) == torch.int64
    assert index_dtype((2**10, 2**6, 2**15)) == torch.int64  # of experts
    assert index_dtype((2**10, 2**6, 2**15 - 1)) == torch.int32
    support = Support(shape, torch.tensor([0, 2**31 + 3, 2**32 - 1]))
    assert support.indices.dtype == torch.int64
    assert support.rows.tolist() == [0, 2**16, 2**17 - 1] and support.cols.tolist() == [0, 3, 2**15 - 1]
    assert support.cols.dtype == support.rows.dtype == support.row_ptr.dtype == torch.int32
    assert support.row_ptr[[0, 1, 2**16, 2**16 + 1, 2**17]].tolist() == [0, 1, 1, 2, 3]
    assert support.contains(torch.tensor([3, 2**31 + 3], dtype=torch.int64)).tolist() == [False, True]
    assert support.contains(torch.tensor([0, 3], dtype=torch.int32)).tolist() == [True, False]


def test_the_largest_weight_with_narrow_positions():
    shape = (1, 2**31 - 1)
    support = Support(shape, torch.tensor([0, 2**31 - 2]))
    assert support.indices.dtype == torch.int32 and support.row_ptr.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("shape", "entries", "dtypes"),
    [
        ((9, 9), 40, [torch.int32, torch.uint16]),
        ((9, 9), 20, [torch.int32]),  # flat: fewer than two entries a row
        ((7, 65_536), 30, [torch.int32, torch.uint16]),
        ((7, 65_537), 30, [torch.int32]),  # columns of four bytes, with pointers, would take more
        ((1, 2**31), 30, [torch.int32, torch.int32]),  # flat positions would have eight
        ((1, 1), 0, [torch.int32]),
    ],
)
def test_compact_positions_are_the_same(shape, entries, dtypes):
    flat = Support.random(shape, entries, seed=0, name="a")
    compact = flat.compact()
    assert [tensor.dtype for tensor in compact.stored] == dtypes and compact.compact() is compact
    assert compact == flat and compact.name == "a" and compact.nnz == entries and compact.device == flat.device
    for view in ("indices", "row_ptr", "cols", "rows"):
        own, other = getattr(compact, view), getattr(flat, view)
        assert own.dtype == other.dtype and torch.equal(own, other), view
    chosen = torch.randperm(entries)[:7]
    assert torch.equal(compact.cols_of(chosen), flat.cols.long()[chosen])
    assert torch.equal(flat.cols_of(chosen), flat.cols.long()[chosen])
    middle = shape[0] // 2
    (part, *bounds), (expected, *others) = compact.of_rows(middle, shape[0]), flat.of_rows(middle, shape[0])
    assert part == expected and bounds == others
    assert compact.to("meta").stored[-1].dtype == dtypes[-1]
    again = pickle.loads(pickle.dumps(compact))
    assert again == flat and [tensor.dtype for tensor in again.stored] == dtypes


@pytest.mark.parametrize("entries", [20, 40])
@pytest.mark.parametrize("limit", [8, 100, 2**20])
def test_flat_pieces_are_no_larger_than_a_panel(entries, limit):
    support = Support.random((9, 9), entries, seed=0, name="a")
    for kind in (support, support.compact()):
        with panel_limit(limit):
            pieces = list(kind.flat_pieces())
        assert torch.equal(torch.cat([flat for *_, flat in pieces]), support.indices.long())
        assert all(last - first == flat.numel() for first, last, flat in pieces)
        assert all(flat.numel() * 8 <= max(limit, 8) for *_, flat in pieces)


@pytest.mark.parametrize("density", [0.02, 0.9])
def test_flat_pieces_are_short_on_a_cpu(density):
    shape = (3, PIECE_ENTRIES) if density > 0.5 else (2000, 7000)  # pieces within one row, and with rows without any
    support = Support.random(shape, int(shape[0] * shape[1] * density), seed=0, name="a")
    for kind in (support, support.compact()):
        pieces = list(kind.flat_pieces())
        assert len(pieces) > 2 and max(flat.numel() for *_, flat in pieces) == PIECE_ENTRIES
        assert torch.equal(torch.cat([flat for *_, flat in pieces]), support.indices.long())
        assert [first for first, *_ in pieces] == [0, *(last for _, last, _ in pieces[:-1])]


@pytest.mark.parametrize(
    ("pointers", "columns", "message"),
    [
        ([0, 2, 3], [0, 1, 5], "columns contain 5, but a 2 x 4 weight"),
        ([0, 2, 3], [1, 1, 0], "1 occurs twice"),
        ([0, 2, 3], [2, 1, 0], "1 stands after 2"),
        ([0, 4, 3], [0, 1, 2], "row pointers do not lead from 0 to 3"),
        ([1, 2, 3], [0, 1, 2], "row pointers do not lead from 0 to 3"),
        ([0, 2, 4], [0, 1, 2], "row pointers do not lead from 0 to 3"),
    ],
)
def test_damaged_row_pointers_and_columns(pointers, columns, message):
    stored = torch.tensor(pointers, dtype=torch.int32), torch.tensor(columns).to(torch.uint16)
    check_stored((2, 4), (torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 2]).to(torch.uint16)))
    with pytest.raises(ValueError, match=message):
        check_stored((2, 4), stored, name="layer")


def test_same_device_is_the_same_object():
    support = Support.random((9, 9), 5, seed=0, name="a")
    assert support.to("cpu") is support
    moved = support.to("meta")
    assert moved.device.type == "meta" and moved.nnz == 5 and moved.name == "a"


def test_equality_and_repr():
    support = Support((2, 6), torch.tensor([1, 5]), name="a")
    assert support == Support((2, 6), torch.tensor([1, 5]), name="other")
    assert support != Support((3, 4), torch.tensor([1, 5]))
    assert support != Support((2, 6), torch.tensor([1]))
    assert support != "support"
    assert repr(support) == "Support('a', shape=(2, 6), nnz=2, density=0.167, device=cpu)"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], r"layer q: indices contain 6, but a 2 x 3 weight has positions 0 to 5"),
        ([-1, 2], r"layer q: indices contain -1"),
        ([0, 3, 2], r"layer q: .* 2 stands after 3 \(at position 2\).*from_indices"),
        ([0, 3, 3, 1], r"layer q: .* 3 occurs twice \(at position 2\)"),
    ],
)
def test_bad_positions(indices, message):
    with pytest.raises(ValueError, match=message):
        Support((2, 3), torch.tensor(indices), name="q")
    with pytest.raises(ValueError, match=message):
        check_indices(torch.tensor(indices), (2, 3), "q")


def test_wide_positions_do_not_wrap_into_range():
    with pytest.raises(ValueError, match=f"contain {2**32 + 1}"):
        Support((2, 3), torch.tensor([2**32 + 1]))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0.0]), TypeError, "dtype torch.float32: integers"),
        (torch.tensor([True]), TypeError, "from_mask"),
        ([0, 1], TypeError, "type list: a tensor"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, r"shape \(1, 1\): a 1-D"),
    ],
)
@pytest.mark.parametrize(
    "build", [lambda i: Support((2, 3), i, name="q"), lambda i: Support.from_indices((2, 3), i, "q")]
)
def test_no_positions_at_all(indices, error, message, build):
    with pytest.raises(error, match=f"layer q: .*{message}"):
        build(indices)


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 3, 4), (2.0, 3), (True, 3), (-1, 2)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=r"shape=.*rows, cols"):
        Support(shape, torch.tensor([0]))


def test_bad_constructors():
    shape = (4, 6)
    with pytest.raises(ValueError, match=r"layer q: .*5 occurs twice"):
        Support.from_indices(shape, torch.tensor([5, 1, 5]), "q")
    with pytest.raises(TypeError, match=r"layer q: mask of dtype torch.float32"):
        Support.from_mask(torch.ones(2, 2), "q")
    with pytest.raises(ValueError, match="layer q: rows contain 4, but a 4 x 6 weight has positions 0 to 3"):
        Support.from_rows(shape, [0, 4], "q")
    with pytest.raises(ValueError, match="layer q: cols contain 2 twice"):
        Support.from_columns(shape, [2, 0, 2], "q")
    with pytest.raises(TypeError, match=r"layer q: rows of dtype torch.float32"):
        Support.from_rows(shape, [0.5], "q")
    with pytest.raises(ValueError, match="layer q: block_ids contain 4, but a grid of 2 x 2 blocks"):
        Support.from_blocks(shape, (3, 4), [4], "q")
    with pytest.raises(ValueError, match=r"layer q: block_size=\(0, 4\)"):
        Support.from_blocks(shape, (0, 4), [0], "q")
    with pytest.raises(ValueError, match="k=25"):
        Support.random(shape, 25, seed=0, name="q")
    with pytest.raises(ValueError, match="layer q: 1 of 4 scores are NaN"):
        Support.from_scores(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]), 1, name="q")
    with pytest.raises(ValueError, match="rows, cols"):
        Support.from_scores(torch.zeros(4), 1)


def test_supports_of_different_weights_do_not_mix():
    first, second = Support((2, 6), torch.tensor([1]), name="a"), Support((3, 4), torch.tensor([1]), name="b")
    for operation in (first.union, first.intersection_size):
        with pytest.raises(ValueError, match=r"layer a: supports over \(2, 6\) and \(3, 4\) \(b\)"):
            operation(second)


def test_validation_can_be_left_out():
    assert Support((2, 3), torch.tensor([5, 0]), validate=False).nnz == 2
