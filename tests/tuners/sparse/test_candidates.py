import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import LargestTensor
from sparse_peft import panel_limit
from sparse_peft.dynamics.collectives import Collectives
from sparse_peft.ops import support_grad
from sparse_peft.support import Support
from sparse_peft.tuners.sparse.candidates import CandidateWindow

ONE = 1.0
ALONE = Collectives()


def pair(tokens, shape, generator=None, dtype=torch.float64):
    return tuple(torch.randn(tokens, n, generator=generator, dtype=dtype) for n in shape)


def backward(window, left, right, support=None):
    s = support or window.support
    return window.support_grad(left, right, s)


def run(window, steps, factor=ONE):
    """Steps are lists of micro-batches; returns the dense float64 gradient of each step."""
    dense = []
    for step in steps:
        for left, right in step:
            values = backward(window, left, right)
            oracle = (left.double().t() @ right.double()).reshape(-1)[window.support.indices.long()]
            torch.testing.assert_close(values.double(), oracle, atol=1e-4, rtol=1e-4)
        dense.append(sum(left.double().t() @ right.double() for left, right in step).reshape(-1))
        window.reduce(ALONE)
        own = dense[-1][window.support.indices.long()]
        torch.testing.assert_close(window.own.double(), own, atol=1e-4, rtol=1e-4)
        window.commit(factor, own.float() * factor)
    return dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("limit_bytes", [None, 400])
def test_the_first_step_proposes_the_largest_gradients_outside_the_support(dtype, limit_bytes):
    shape = (13, 17)
    support = Support.random(shape, 40, seed=1, name="x")
    window = CandidateWindow(support, 25, 3)
    left, right = pair(6, shape, dtype=dtype)
    with panel_limit(limit_bytes or 2**26):
        (dense,) = run(window, [[(left, right)]])
    magnitude = dense.abs()
    magnitude[support.indices.long()] = -1
    best = magnitude.topk(25).indices.sort().values
    assert torch.equal(window.positions, best)
    torch.testing.assert_close(window.total.double(), dense[best], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=40)
def test_sums_are_of_steps_and_squares_too(rows, cols, seed, accumulation, data):
    generator = torch.Generator().manual_seed(seed)
    k = data.draw(st.integers(1, rows * cols))
    support = Support.random((rows, cols), k, seed=seed, name="x")
    window = CandidateWindow(support, rows * cols, 3)
    steps = [[pair(3, (rows, cols), generator) for _ in range(accumulation)] for _ in range(3)]
    dense = run(window, steps)
    assert window.positions.numel() == rows * cols - k, "all that do not train"
    assert not bool(window.late.any()), "all were candidates from the first pass on"
    at = window.positions
    torch.testing.assert_close(window.total.double(), sum(dense)[at], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(window.squares.double(), sum(g.square() for g in dense)[at], atol=1e-3, rtol=1e-4)
    own = sum(dense)[support.indices.long()]
    torch.testing.assert_close(window.own_total.double(), own, atol=1e-4, rtol=1e-4)
    assert window.counts().tolist() == [3.0] * at.numel()


def test_one_batch_or_its_parts_give_the_same_statistics():
    shape, generator = (11, 7), torch.Generator().manual_seed(3)
    support = Support.random(shape, 20, seed=1, name="x")
    steps = [pair(8, shape, generator) for _ in range(4)]
    whole, parts = CandidateWindow(support, 60, 4), CandidateWindow(support, 60, 4)
    run(whole, [[step] for step in steps])
    run(parts, [list(zip(left.split(1), right.split(1), strict=True)) for left, right in steps])
    assert torch.equal(whole.positions, parts.positions)
    torch.testing.assert_close(whole.total, parts.total)
    torch.testing.assert_close(whole.squares, parts.squares)


def one_hot_pass(shape, entries):
    """A pass whose gradient is these entries: {flat position: value}."""
    left = torch.zeros(len(entries), shape[0])
    right = torch.zeros(len(entries), shape[1])
    for token, (flat, value) in enumerate(entries.items()):
        left[token, flat // shape[1]] = value
        right[token, flat % shape[1]] = 1.0
    return left, right


def test_a_late_candidate_is_counted_from_the_second_step_on():
    support = Support((2, 4), torch.tensor([0]))
    window = CandidateWindow(support, 2, 3)
    # 1 and 2 are proposed first; 5 is larger than 2 afterwards and takes its place
    first = [one_hot_pass((2, 4), {1: 4.0, 2: 1.0, 5: 0.5}), one_hot_pass((2, 4), {1: 1.0, 5: 3.0})]
    run(window, [first, [one_hot_pass((2, 4), {1: 2.0, 5: -1.0})]])
    assert window.positions.tolist() == [1, 5]
    assert window.late.tolist() == [False, True]
    assert window.total.tolist() == [5.0 + 2.0, -1.0], "the step that 5 missed a part of does not count"
    assert window.squares.tolist() == [25.0 + 4.0, 1.0]
    assert window.counts().tolist() == [2.0, 1.0]


def test_the_only_step_of_a_window_counts_for_late_candidates_too():
    window = CandidateWindow(Support((2, 4), torch.tensor([0])), 2, 1)
    run(window, [[one_hot_pass((2, 4), {1: 4.0}), one_hot_pass((2, 4), {5: 3.0})]])
    assert window.positions.tolist() == [1, 5]
    assert window.total.tolist() == [4.0, 3.0] and window.counts().tolist() == [1.0, 1.0]


def test_entries_without_gradient_are_no_candidates():
    window = CandidateWindow(Support((3, 4), torch.tensor([0])), 5, 1)
    run(window, [[one_hot_pass((3, 4), {0: 9.0, 7: 0.5})]])
    assert window.positions.tolist() == [7]


def test_other_adapters_entries_are_no_candidates():
    own, active = Support((2, 4), torch.tensor([1, 6])), Support((2, 4), torch.tensor([0, 1, 5, 6]))
    window = CandidateWindow(own, 8, 2)
    left, right = pair(5, (2, 4))
    dense = (left.t() @ right).reshape(-1)
    for _ in range(2):
        values = backward(window, left, right, active)
        torch.testing.assert_close(values, dense[active.indices.long()])
        assert window.positions.tolist() == [2, 3, 4, 7]
        torch.testing.assert_close(window.own.double(), dense[own.indices.long()])
        window.commit(ONE, window.own)


def test_what_scales_the_gradients_scales_the_sums():
    shape, generator = (5, 6), torch.Generator().manual_seed(0)
    support = Support.random(shape, 6, seed=0, name="x")
    steps = [[pair(4, shape, generator)] for _ in range(2)]
    plain, scaled = CandidateWindow(support, 10, 2), CandidateWindow(support, 10, 2)
    run(plain, steps)
    run(scaled, steps, factor=0.25)
    assert torch.equal(scaled.total, plain.total * 0.25)
    assert torch.equal(scaled.squares, plain.squares * 0.0625)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 1])
def test_a_step_that_is_not_finite_is_seen_and_can_be_forgotten(bad, step):
    shape, generator = (5, 6), torch.Generator().manual_seed(0)
    support = Support.random(shape, 6, seed=0, name="x")
    steps = [[pair(4, shape, generator)] for _ in range(3)]
    clean, window = CandidateWindow(support, 10, 3), CandidateWindow(support, 10, 3)
    run(clean, steps)
    run(window, steps[:step])
    left, right = pair(4, shape, generator)
    left[1, 2] = bad
    backward(window, left, right)
    assert not bool(window.is_finite())
    window.discard()
    run(window, steps[step:])
    for name, value in clean.state_dict().items():
        assert torch.equal(torch.as_tensor(getattr(window, name)), torch.as_tensor(value)), name


def test_a_window_saved_and_loaded_goes_on_equally():
    shape, generator = (9, 6), torch.Generator().manual_seed(0)
    support = Support.random(shape, 6, seed=0, name="x")
    steps = [[pair(4, shape, generator)] for _ in range(4)]
    whole, first = CandidateWindow(support, 10, 4), CandidateWindow(support, 10, 4)
    run(whole, steps)
    run(first, steps[:2])
    second = CandidateWindow(support, 10, 4)
    second.load_state_dict(first.state_dict())
    run(second, steps[2:])
    for name, value in whole.state_dict().items():
        assert torch.equal(torch.as_tensor(getattr(second, name)), torch.as_tensor(value)), name


def test_no_temporary_is_larger_than_a_panel():
    support = Support.random((512, 256), 600, seed=0, name="x")
    left, right = pair(16, support.shape, dtype=torch.float32)
    window = CandidateWindow(support, 600, 2)
    limit = 64 * 1024
    assert 4 * limit < 512 * 256 * 4
    with panel_limit(limit), LargestTensor() as largest:
        for _ in range(2):
            backward(window, left, right)
            window.commit(ONE, window.own)
    assert 0 < largest.nbytes <= limit


def test_the_values_gradient_is_the_same_as_without_a_window():
    support = Support.random((64, 48), 100, seed=0, name="x")
    left, right = pair(32, support.shape, dtype=torch.float32)
    plain = support_grad(left, right, support)
    window = CandidateWindow(support, 100, 2)
    for _ in range(2):
        torch.testing.assert_close(backward(window, left, right), plain)
        window.commit(ONE, window.own)
