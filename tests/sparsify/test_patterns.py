"""Patterns: exact counts, stable ties, and refusals, against plain loops."""

from __future__ import annotations

import pytest
import torch

from sparse_peft.numerics import panel_limit
from sparse_peft.sparsify import NM, Blocks, Channels, Unstructured, as_pattern


def best(scores: list[float], count: int) -> set[int]:
    """Positions of the largest, ties to the lowest position."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def with_ties(rows, cols, seed=0, dtype=torch.float32):
    """Few different scores, so that most of them tie."""
    return torch.randint(0, 4, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 13), (1, 9), (12, 5)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["row", "column", "matrix"])
def test_unstructured(scope, sparsity, shape, dtype):
    scores = with_ties(*shape, dtype=dtype)
    with panel_limit(3 * shape[1] * 24):
        kept = Unstructured(sparsity, scope).keep(scores)
    units = round((1 - sparsity) * scores.numel())
    assert int(kept.sum()) == units
    if scope == "matrix":
        assert set(kept.flatten().nonzero().flatten().tolist()) == best(scores.flatten().tolist(), units)
        return
    lines, found = (scores, kept) if scope == "row" else (scores.t(), kept.t())
    each, more = divmod(units, len(lines))
    for place, (line, stays) in enumerate(zip(lines, found, strict=True)):
        assert set(stays.nonzero().flatten().tolist()) == best(line.tolist(), each + (place < more))


@pytest.mark.parametrize("n, m, cols", [(2, 4, 16), (1, 4, 8), (4, 8, 24), (3, 3, 9), (1, 16, 32)])
def test_n_of_m_are_kept(n, m, cols):
    scores = with_ties(6, cols)
    kept = NM(n, m).keep(scores)
    for row in range(6):
        for first in range(0, cols, m):
            group = scores[row, first : first + m].tolist()
            assert set(kept[row, first : first + m].nonzero().flatten().tolist()) == best(group, n)


def test_groups_do_not_wrap_over_rows_and_padding_is_asked_for():
    scores = with_ties(3, 10)
    with pytest.raises(ValueError, match=r"layer q: 10 inputs are no multiple of m=4; .*NM\(2, 4, pad=True\)"):
        NM(2, 4).keep(scores, name="q")
    kept = NM(3, 4, pad=True).keep(scores)
    assert kept[:, :4].sum(1).eq(3).all() and kept[:, 4:8].sum(1).eq(3).all()
    assert kept[:, 8:].all()  # two real weights, and three of the filled up group would stay


@pytest.mark.parametrize(
    "pattern, block", [(Blocks(0.5, 2, 3), (2, 3)), (Channels(0.5), (6, 1)), (Channels(0.5, "out"), (1, 12))]
)
def test_blocks_and_channels(pattern, block):
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(1))
    kept = pattern.keep(scores)
    height, width = block
    sums, whole = [], []
    for top in range(0, 6, height):
        for left in range(0, 12, width):
            sums.append(float(scores[top : top + height, left : left + width].double().sum()))
            whole.append(kept[top : top + height, left : left + width])
    assert all(bool(part.all()) or not bool(part.any()) for part in whole)
    assert {i for i, part in enumerate(whole) if bool(part.all())} == best(sums, round(len(sums) / 2))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="layer q: 5 outputs and 6 inputs do not consist of blocks of 2 x 3"):
        Blocks(0.5, 2, 3).keep(torch.rand(5, 6), name="q")


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)])
def test_scores_that_are_nan_are_refused(pattern):
    scores = torch.rand(2, 8)
    scores[1, 3] = torch.nan
    with pytest.raises(ValueError, match="layer q: 1 of 16 scores are NaN"):
        pattern.keep(scores, name="q")


@pytest.mark.parametrize(
    "given, error, message",
    [
        ("2-4", ValueError, "pattern='2-4': a share of zeros such as 0.5, or n:m"),
        ("5:4", ValueError, "n=5, m=4: n of m weights stay"),
        ("0:4", ValueError, "n=0"),
        (1.0, ValueError, r"sparsity=1.0: a share of zeros in \[0, 1\) is expected"),
        (-0.1, ValueError, "sparsity=-0.1"),
        (True, TypeError, "pattern=True"),
        (None, TypeError, "pattern=None"),
    ],
)
def test_what_is_no_pattern_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        as_pattern(given)


def test_names_of_patterns():
    assert as_pattern("2:4") == NM(2, 4) and as_pattern(0) == Unstructured(0.0)
    assert as_pattern(0.5, "row") == Unstructured(0.5, "row")
    assert as_pattern(Unstructured(0.5, "column"), "row") == Unstructured(0.5, "column")
    with pytest.raises(ValueError, match=r"scope='colum'.*did you mean 'column'"):
        Unstructured(0.5, "colum")
