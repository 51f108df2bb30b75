"""Exact, deterministic top-k, at once and from a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft.numerics import RunningTopK, topk, topk_indices


def oracle(scores, k, largest=True):
    """Positions by (score, position), with a stable sort in float64."""
    values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-values if largest else values, kind="stable")
    return sorted(order[:k].tolist())


scores_with_ties = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, float("inf"), float("-inf")]) | st.floats(-4, 4, width=16),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(scores_with_ties, st.data(), st.booleans())
def test_topk_matches_a_stable_sort(scores, data, largest):
    k = data.draw(st.integers(0, len(scores)))
    found = topk_indices(torch.tensor(scores, dtype=torch.float32), k, largest)
    assert found.dtype == torch.int64
    assert found.tolist() == oracle(scores, k, largest)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4000),
    st.sampled_from(["normal", "few", "equal", "infinite", "ramp", "column"]),
    st.floats(0, 0.25),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_sampled_threshold_changes_nothing(n, kind, share, largest, seed):
    rng = np.random.default_rng(seed)
    scores = {
        "normal": lambda: rng.standard_normal(n),
        "few": lambda: rng.integers(0, 3, n).astype(float),
        "equal": lambda: np.full(n, 0.5),
        "infinite": lambda: np.where(rng.random(n) < 0.5, -np.inf, rng.random(n)),
        "ramp": lambda: np.arange(n, dtype=float),
        "column": lambda: np.tile(np.arange(8.0), n // 8 + 1)[:n],
    }[kind]()
    scores = torch.tensor(scores, dtype=torch.float32)
    k = int(share * n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "SAMPLING_MIN", 1)
        patch.setattr(topk, "SAMPLE_SIZE", 64)
        found = topk_indices(scores, k, largest)
    assert found.tolist() == oracle(scores, k, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("largest", [True, False])
def test_large_inputs(dtype, largest):
    scores = torch.randn(300_007, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert topk_indices(scores, 3001, largest).tolist() == oracle(scores.double(), 3001, largest)


def test_a_misleading_sample_falls_back(monkeypatch):
    looks = []

    def none(scores, k, largest):
        looks.append(k)
        return torch.arange(k - 1)

    monkeypatch.setattr(topk, "_survivors", none)
    scores = torch.arange(float(topk.SAMPLING_MIN))
    assert topk_indices(scores, 3).tolist() == [scores.numel() - 3, scores.numel() - 2, scores.numel() - 1]
    assert looks == [3]


def test_the_sample_leaves_little_to_look_at():
    scores = torch.randn(2**20, generator=torch.Generator().manual_seed(1))
    survivors = topk._survivors(scores, 10_000, True)
    assert 10_000 <= survivors.numel() < 15_000


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"layer q: k={k}: between 0 and 3 of 3"):
        topk_indices(torch.zeros(3), k, name="q")


def test_nan_is_refused():
    with pytest.raises(ValueError, match="layer q: 2 of 3 scores are NaN"):
        topk_indices(torch.tensor([float("nan"), float("inf"), float("nan")]), 1, name="q")


def test_opposite_infinities_are_no_nan():
    assert topk_indices(torch.tensor([float("inf"), float("-inf"), 0.0]), 2).tolist() == [0, 2]


def test_matrices_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\): a 1-D tensor"):
        topk_indices(torch.zeros(2, 3), 1)


# ---------------------------------------------------------------------- streams


@settings(max_examples=150, deadline=None)
@given(scores_with_ties, st.data(), st.booleans())
def test_stream_is_independent_of_order_and_chunks(scores, data, largest):
    n = len(scores)
    k = data.draw(st.integers(0, n + 2))
    # keys that are neither dense nor in order
    keys = data.draw(st.permutations([7 * i + 2**33 for i in range(n)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    running = RunningTopK(k, largest)
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        chunk = torch.tensor(scores[start:stop], dtype=torch.float32)
        running.update(chunk, torch.tensor(keys[start:stop], dtype=torch.int64), chunk * 2)
    found_keys, found_scores = running.result()
    ranked = sorted(zip(keys, scores, strict=True), key=lambda pair: (-pair[1] if largest else pair[1], pair[0]))
    expected = sorted(ranked[:k])
    assert found_keys.tolist() == [key for key, _ in expected]
    assert found_scores.tolist() == [score for _, score in expected]
    assert running.payload().tolist() == [2 * score for _, score in expected]


def test_stream_keeps_no_more_than_a_few_times_k():
    running = RunningTopK(100)
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.rand(1000, generator=generator) for _ in range(50)]
    for i, chunk in enumerate(chunks):
        running.update(chunk, torch.arange(i * 1000, (i + 1) * 1000))
        assert sum(part[0].numel() for part in running._parts) <= 300
    assert running.result()[0].tolist() == oracle(torch.cat(chunks), 100)


def test_stream_can_go_on_after_a_result():
    running = RunningTopK(2)
    running.update(torch.tensor([1.0, 3.0, 2.0]), torch.arange(3))
    assert running.result()[0].tolist() == [1, 2]
    running.update(torch.tensor([2.0, 5.0]), torch.tensor([-1, 9]))
    assert running.result()[0].tolist() == [1, 9]
    running.update(torch.tensor([3.0]), torch.tensor([0]))  # a tie with the last one, and a lower key
    assert running.result()[0].tolist() == [0, 9]


def test_empty_stream():
    keys, scores = RunningTopK(3).result()
    assert keys.tolist() == scores.tolist() == []
    assert RunningTopK(3).payload().numel() == 0


def test_stream_refuses_bad_chunks():
    running = RunningTopK(2)
    with pytest.raises(ValueError, match="layer q: 1 of 1 scores are NaN"):
        running.update(torch.tensor([float("nan")]), torch.tensor([0]), name="q")
    with pytest.raises(ValueError, match=r"keys of shape \(2,\) for \(1,\) scores"):
        running.update(torch.zeros(1), torch.arange(2))
    running.update(torch.zeros(1), torch.arange(1))
    with pytest.raises(ValueError, match="every chunk must have one"):
        running.update(torch.zeros(1), torch.arange(1), torch.zeros(1))
    with pytest.raises(ValueError, match="k=-1"):
        RunningTopK(-1)
