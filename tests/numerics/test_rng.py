"""Random positions: reproducible, uniform, and free of global state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft.numerics import rng, sample_without_replacement

# from a second implementation, in plain Python integers
GOLDEN = {
    (40, 5, 0, "a"): [1, 2, 26, 38, 39],
    (4096 * 11008, 6, 0, "model.layers.0.self_attn.q_proj"): [
        6604025,
        9701263,
        10573332,
        23134026,
        23684112,
        33244038,
    ],
    (2**33, 4, 123456789, "lm_head"): [3041632631, 3718197987, 6700550233, 8283379094],
}


@pytest.mark.parametrize(("arguments", "expected"), GOLDEN.items())
def test_positions_are_the_same_on_every_machine_and_in_every_version(arguments, expected):
    n, k, seed, name = arguments
    assert sample_without_replacement(n, k, seed=seed, name=name).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3000), st.data(), st.integers(-(2**70), 2**70), st.text(max_size=8))
def test_sample_is_sorted_unique_and_in_range(n, data, seed, name):
    k = data.draw(st.integers(0, n))
    drawn = sample_without_replacement(n, k, seed=seed, name=name)
    assert drawn.dtype == torch.int64 and drawn.shape == (k,)
    values = drawn.tolist()
    assert values == sorted(set(values))
    assert all(0 <= value < n for value in values)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 1000, 2**16 + 1])
def test_all_of_the_range(n):
    assert sample_without_replacement(n, n, seed=3, name="x").tolist() == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 5, 31, 32, 33, 1000])
def test_the_underlying_permutation_is_one(n):
    half = max(1, -(-max(0, n - 1).bit_length() // 2))
    image = rng._permute(np.arange(n, dtype=np.uint64), n, half, rng._round_keys(0, "x"))
    assert sorted(image.tolist()) == list(range(n))


def test_names_and_seeds_draw_independently():
    n, k = 100_000, 1000
    draw = {key: set(sample_without_replacement(n, k, seed=key[0], name=key[1]).tolist())
            for key in [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (0, ""), (10, "")]}  # fmt: skip
    keys = list(draw)
    for i, first in enumerate(keys):
        for second in keys[:i]:
            # hypergeometric: mean 10, standard deviation 3.1
            assert len(draw[first] & draw[second]) < 30, (first, second)
    again = sample_without_replacement(n, k, seed=0, name="a")
    assert set(again.tolist()) == draw[0, "a"]


def test_a_smaller_sample_is_part_of_a_larger_one():
    small = sample_without_replacement(10_000, 100, seed=0, name="a").tolist()
    large = sample_without_replacement(10_000, 200, seed=0, name="a").tolist()
    assert set(small) < set(large)


@pytest.mark.parametrize("n", [2**20, 3 * 2**19 + 7, 2**33])
def test_positions_are_uniform_over_the_range(n):
    bins, k = 64, 2**15
    drawn = sample_without_replacement(n, k, seed=11, name="layer").numpy()
    observed = np.bincount(drawn * bins // n, minlength=bins)
    chi_square = ((observed - k / bins) ** 2 / (k / bins)).sum()
    # 63 degrees of freedom: 30 and 110 are the 1e-4 and 1 - 2e-4 quantiles
    assert 30 < chi_square < 110


@pytest.mark.parametrize(("n", "k"), [(3, 1), (5, 2), (40, 4), (257, 16)])
def test_small_ranges_are_uniform_over_seeds(n, k):
    trials = 4000
    counts = np.zeros(n)
    for seed in range(trials):
        counts[sample_without_replacement(n, k, seed=seed, name="tiny").numpy()] += 1
    expected = trials * k / n
    chi_square = ((counts - expected) ** 2 / (expected * (1 - k / n))).sum() * (n - 1) / n
    # mean n - 1, standard deviation sqrt(2 (n - 1))
    assert chi_square < (n - 1) + 4.5 * np.sqrt(2 * (n - 1)) + 5


def test_pairs_of_positions_are_independent_over_seeds():
    trials, n = 6000, 6
    pairs = np.zeros((n, n))
    for seed in range(trials):
        a, b = sample_without_replacement(n, 2, seed=seed, name="pair").tolist()
        pairs[a, b] += 1
    observed = pairs[np.triu_indices(n, 1)]
    chi_square = ((observed - trials / 15) ** 2 / (trials / 15)).sum()
    assert chi_square < 45  # 14 degrees of freedom


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sample_without_replacement(1000, 50, seed=0, name="a")
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(6)
    assert torch.equal(first, sample_without_replacement(1000, 50, seed=0, name="a"))


@pytest.mark.parametrize("field", ["n", "k", "seed"])
@pytest.mark.parametrize("value", [1.5, True, "3", None])
def test_wrong_types_are_refused(field, value):
    arguments = {"n": 10, "k": 2, "seed": 0} | {field: value}
    with pytest.raises(TypeError, match=f"{field}={value!r}"):
        sample_without_replacement(arguments["n"], arguments["k"], seed=arguments["seed"], name="q")


@pytest.mark.parametrize(("n", "k"), [(10, 11), (10, -1), (-1, 0), (2**63, 1)])
def test_out_of_range_is_refused(n, k):
    with pytest.raises(ValueError, match=r"layer.q"):
        sample_without_replacement(n, k, seed=0, name="layer.q")
