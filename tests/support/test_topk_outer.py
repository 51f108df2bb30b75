import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import LargestTensor
from sparse_peft.numerics import panel_limit
from sparse_peft.support import Support
from sparse_peft.support.topk_outer import topk_outer


def dense_topk(rows, cols, k, exclude=None):
    """Ascending positions of the k largest products above 0, lowest position first among equal ones, in float64."""
    products = torch.outer(rows.double(), cols.double()).reshape(-1)
    if exclude is not None:
        products[exclude.indices.long()] = 0
    order = sorted(range(products.numel()), key=lambda i: (-float(products[i]), i))
    best = sorted(i for i in order[:k] if products[i] > 0)
    return best, [float(products[i].float()) for i in best]


@st.composite
def vectors(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["random", "ties", "wide range", "thirds"]))
    out = []
    for size in (draw(st.integers(1, 14)), draw(st.integers(1, 14))):
        if kind == "ties":
            vector = torch.randint(0, 3, (size,), generator=generator).float()
        elif kind == "thirds":  # quotients of these round
            vector = torch.randint(1, 50, (size,), generator=generator) / 3
        else:
            vector = torch.rand(size, generator=generator)
            if kind == "wide range":
                vector = (60 * vector - 30).exp()
        out.append(vector)
    return out


@given(vectors(), st.data())
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("slack", [0, 4096])
def test_it_is_the_dense_top_k(slack, vectors, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[topk_outer.__module__], "SLACK", slack)
        rows, cols = vectors
        numel = rows.numel() * cols.numel()
        active = data.draw(st.integers(0, numel))
        exclude = Support.random((rows.numel(), cols.numel()), active, seed=1, name="x") if active else None
        k = data.draw(st.integers(0, numel + 2))
        with panel_limit(data.draw(st.sampled_from([64, 640, 2**20]))):
            positions, scores = topk_outer(rows, cols, k, exclude)
        expected, values = dense_topk(rows, cols, k, exclude)
        assert positions.tolist() == expected
        assert scores.tolist() == values
        assert positions.dtype == torch.int64 and scores.dtype == torch.float32


@pytest.mark.parametrize("equal", [True, False])
def test_nothing_of_the_matrix_size_is_made(equal):
    rows, cols = (torch.ones(3000), torch.ones(2500)) if equal else (torch.rand(3000), torch.rand(2500))
    exclude = Support.random((3000, 2500), 2000, seed=0, name="x")
    with LargestTensor() as largest, panel_limit(2**18):
        positions, _scores = topk_outer(rows, cols, 1500, exclude)
    assert largest.nbytes <= 2**18
    dense = torch.outer(rows.double(), cols.double()).reshape(-1)
    dense[exclude.indices.long()] = 0
    if equal:
        assert torch.equal(positions, (dense > 0).nonzero().squeeze(1)[:1500])
    else:
        assert torch.equal(positions, dense.topk(1500).indices.sort().values)
    assert not bool(exclude.contains(positions).any())


@pytest.mark.parametrize(
    ("rows", "cols", "k", "message"),
    [
        ([1.0, -1.0], [1.0], 1, "layer q: rows contain numbers that are negative"),
        ([1.0], [float("nan")], 1, "layer q: cols contain"),
        ([float("inf")], [1.0], 1, "rows contain"),
        ([], [1.0], 1, r"rows of shape \(0,\)"),
        ([1.0], [1.0], -1, "layer q: k=-1"),
    ],
)
def test_bad_input_is_refused(rows, cols, k, message):
    with pytest.raises(ValueError, match=message):
        topk_outer(torch.tensor(rows), torch.tensor(cols), k, name="q")
