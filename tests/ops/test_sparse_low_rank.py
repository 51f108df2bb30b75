import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import LargestTensor
from sparse_peft.numerics import panel_limit, sample_without_replacement
from sparse_peft.ops import cheaper_way, compose_weight, sparse_low_rank_linear
from sparse_peft.support import Support

WAYS = ("composed", "factored")


def problem(rows, cols, rank, entries, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    indices = sample_without_replacement(rows * cols, entries, seed=seed, name="layer").to(torch.int32)
    return Support((rows, cols), indices), draw(rank, cols), draw(rows, rank), draw(entries), draw(rows)


def dense(support, down, up, values):
    weight = torch.zeros(support.shape, dtype=values.dtype).view(-1)
    return up @ down + weight.index_put((support.indices.long(),), values).view(support.shape)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(WAYS),
    st.integers(1, 9),
    st.integers(1, 11),
    st.integers(1, 4),
    st.floats(0, 1),
    st.sampled_from([(5,), (1,), (7, 5), (2, 3, 5), (0, 5)]),
    st.booleans(),
    st.sampled_from([1, 200, 10**6]),
)
def test_output_and_gradients_are_the_dense_weights(way, rows, cols, rank, share, shape, bias, limit):
    support, down, up, values, offset = problem(rows, cols, rank, round(share * rows * cols))
    offset = offset if bias else None
    x = torch.randn(*shape[:-1], cols, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, down, up, values, offset) if t is not None]
    with panel_limit(limit):
        out = sparse_low_rank_linear(x, down, up, values, offset, support, way=way)
        want = torch.nn.functional.linear(x, dense(support, down, up, values), offset)
        assert torch.allclose(out, want, atol=1e-11)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, inputs, grad)
    for mine, theirs in zip(got, torch.autograd.grad(want, inputs, grad, allow_unused=True), strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way):
    support, down, up, values, bias = problem(5, 4, 2, 6)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with panel_limit(100):
        assert torch.autograd.gradcheck(
            lambda *tensors: sparse_low_rank_linear(*tensors, support, way=way), (x, down, up, values, bias)
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(way, dtype, tolerance):
    support, down, up, values, bias = problem(37, 53, 7, 100, dtype)
    x = torch.randn(29, 53).to(dtype)
    out = sparse_low_rank_linear(x, down, up, values, bias, support, way=way)
    want = x.double() @ dense(support, down.double(), up.double(), values.double()).t() + bias.double()
    assert out.dtype == dtype
    assert (out.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_needed_is_computed(way):
    support, down, up, values, _ = problem(6, 5, 2, 7)
    x = torch.randn(4, 5, dtype=torch.float64)
    for wanted in (down, up, values):
        inputs = [t.detach().requires_grad_(t is wanted) for t in (down, up, values)]
        out = sparse_low_rank_linear(x, *inputs, None, support, way=way)
        out.sum().backward()
        full = sparse_low_rank_linear(x, down, up, values, None, support, way=way)
        (expected,) = torch.autograd.grad(full.sum(), [wanted])
        assert [t.grad is not None for t in inputs] == [t.requires_grad for t in inputs]
        assert torch.allclose(next(t.grad for t in inputs if t.requires_grad), expected)


@pytest.mark.parametrize("way", WAYS)
def test_only_inputs_factors_and_values_are_saved(way):
    support, down, up, values, bias = problem(64, 48, 4, 90, torch.float32)
    x = torch.randn(16, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sparse_low_rank_linear(x, down, up, values, bias, support, way=way)
    known = {t.data_ptr() for t in (x, down, up, values)}
    extra = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in extra] == ([] if way == "composed" else [(16, 4)])


def test_no_temporary_is_larger_than_a_panel():
    support, down, up, values, _ = problem(400, 300, 8, 3600, torch.float32)
    x = torch.randn(20, 300, requires_grad=True)
    with panel_limit(40 * 300 * 4), LargestTensor() as largest:
        sparse_low_rank_linear(x, down, up, values, None, support).sum().backward()
    # a panel, or the activations, factors and their gradients
    assert 0 < largest.nbytes <= 4 * max(40 * 300, 20 * 400, 400 * 8)


def test_compose_gives_rows():
    support, down, up, values, _ = problem(9, 7, 3, 20)
    want = dense(support, down, up, values)
    assert torch.allclose(compose_weight(up.detach(), down.detach(), values.detach(), support, 2, 6), want[2:6])


def test_the_cheaper_way_follows_tokens_and_density():
    def choice(tokens, rank, density):
        support, *_ = problem(512, 512, 1, int(density * 512 * 512), torch.float32)
        return cheaper_way(rank, support, tokens, torch.float32, torch.device("cpu"))

    assert choice(1, 128, 0.03) == "factored"  # composing a weight for one token
    assert choice(10**6, 500, 0.5) == "composed"
