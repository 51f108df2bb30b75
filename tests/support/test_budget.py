"""How many entries each layer trains: exact totals, bounds, and errors that teach."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft.support import ALLOCATIONS, Budget, apportion, resolve_counts

SHAPES = {"a.q_proj": (8, 8), "a.k_proj": (2, 8), "b.q_proj": (8, 8), "b.up_proj": (20, 8), "head": (20, 2)}
NUMEL = {name: rows * cols for name, (rows, cols) in SHAPES.items()}

shapes = st.dictionaries(
    st.sampled_from([f"layer{i}" for i in range(8)]), st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1
)


def random_scores(shapes, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(0, 4, s).astype(np.float32)) if ties else (lambda s: rng.random(s, np.float32))
    return {name: torch.tensor(draw(shape)) for name, shape in shapes.items()}


# ---------------------------------------------------------------------- caps


@settings(max_examples=100, deadline=None)
@given(shapes, st.sampled_from(["numel", "uniform", "erk"]), st.data())
def test_no_layer_gets_more_than_its_cap(shapes, allocation, data):
    caps = {name: data.draw(st.integers(1, rows * cols)) for name, (rows, cols) in shapes.items()}
    total = data.draw(st.integers(len(shapes), sum(caps.values())))
    budget = Budget(num_params=total, allocation=allocation)
    counts = resolve_counts(shapes, budget, caps=caps)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= caps[name] for name in shapes)
    free = resolve_counts(shapes, budget)
    if all(free[name] <= caps[name] for name in shapes):
        assert counts == free


def test_budgets_above_the_caps_are_refused():
    caps = {"a": 10, "b": 3}
    layers = {"a": (10, 10), "b": (2, 5)}
    with pytest.raises(ValueError, match=r"a budget of 22 is more than the 13 entries that are not zero in 2 layers"):
        resolve_counts(layers, Budget(density=0.2), caps=caps)
    with pytest.raises(ValueError, match=r"layer b: a budget of 5 is more than its 3 entries.*density_pattern"):
        resolve_counts(layers, Budget(density=0.05, density_pattern={"b": 0.5}), caps=caps)
    with pytest.raises(ValueError, match=r"layer b: a budget of 1 is more than its 0 entries.*exclude_modules"):
        resolve_counts(layers, Budget(density=0.05), caps={"a": 10, "b": 0})
    # a minimum that a layer has not is lowered to what it has
    assert resolve_counts(layers, Budget(density=0.01, at_least=16), caps=caps) == {"a": 10, "b": 3}


# ---------------------------------------------------------------------- apportion


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=9), st.data())
def test_apportion_is_exact_bounded_and_proportional(parts, data):
    weights, caps = [w for w, _ in parts], [c for _, c in parts]
    floor = data.draw(st.integers(0, 3))
    floors = [min(floor, cap) for cap in caps]
    total = data.draw(st.integers(sum(floors), sum(caps)))
    shares = apportion(weights, caps, total, floor)
    assert sum(shares) == total
    assert all(low <= share <= cap for low, share, cap in zip(floors, shares, caps, strict=True))
    # of two parts strictly inside their bounds, the ratio of shares is that of the weights, up to rounding
    inside = [i for i in range(len(caps)) if floors[i] < shares[i] < caps[i] and weights[i] > 0]
    for i in inside:
        for j in inside:
            low, high = (shares[j] - 1) / weights[j], (shares[j] + 1) / weights[j]
            assert (shares[i] - 1) / weights[i] <= high and (shares[i] + 1) / weights[i] >= low


def test_apportion_by_hand():
    assert apportion([1, 1, 1], [9, 9, 9], 10) == [4, 3, 3]  # a tie of remainders: the lowest position
    assert apportion([1, 2, 3], [9, 9, 9], 7) == [1, 2, 4]
    assert apportion([1, 1, 8], [9, 9, 3], 9) == [3, 3, 3]  # what does not fit goes to the others
    assert apportion([0, 0, 8], [9, 9, 9], 9) == [1, 1, 7]
    assert apportion([1, 0], [2, 10], 8) == [2, 6]
    assert apportion([100, 1, 1], [50, 50, 2], 54) == [50, 2, 2]
    assert apportion([], [], 0) == []


def test_apportion_keeps_the_last_unit_of_billions():
    caps = [10**11] * 3
    assert apportion([1, 1, 1], caps, 10**11 + 1) == [33333333334, 33333333334, 33333333333]


def test_apportion_refuses():
    with pytest.raises(ValueError, match="total=7: between 2 and 6"):
        apportion([1, 1], [3, 3], 7)
    with pytest.raises(ValueError, match="total=1: between 2 and 6"):
        apportion([1, 1], [3, 3], 1)
    with pytest.raises(ValueError, match="weights contain nan"):
        apportion([1, float("nan")], [3, 3], 4)
    with pytest.raises(ValueError, match="weights contain -1"):
        apportion([1, -1], [3, 3], 4)
    with pytest.raises(ValueError, match="1 weights for 2 caps"):
        apportion([1], [3, 3], 4)


# ---------------------------------------------------------------------- totals


@settings(max_examples=150, deadline=None)
@given(shapes, st.floats(1e-6, 1), st.sampled_from(ALLOCATIONS), st.booleans())
def test_density_is_met_exactly(shapes, density, allocation, ties):
    scores = random_scores(shapes, ties=ties)
    counts = resolve_counts(shapes, Budget(density=density, allocation=allocation), scores.__getitem__)
    numel = sum(math.prod(shape) for shape in shapes.values())
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == max(len(shapes), round(density * numel))
    assert all(1 <= counts[name] <= math.prod(shapes[name]) for name in shapes)
    assert all(type(count) is int for count in counts.values())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("n", [1, 5, 6, 100, sum(NUMEL.values())])
def test_num_params_is_met_exactly(allocation, n):
    scores = random_scores(SHAPES)
    counts = resolve_counts(SHAPES, Budget(num_params=n, allocation=allocation), scores.__getitem__)
    assert sum(counts.values()) == max(n, len(SHAPES))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("r", [1, 2, 3])
def test_r_counts_as_lora_of_that_rank(allocation, r):
    scores = random_scores(SHAPES)
    counts = resolve_counts(SHAPES, Budget(r=r, allocation=allocation), scores.__getitem__)
    assert sum(counts.values()) == r * (16 + 10 + 16 + 28 + 22)
    assert all(counts[name] <= NUMEL[name] for name in SHAPES)


def test_r_that_is_too_much_for_one_small_layer_spills_over():
    shapes = {"big": (100, 100), "small": (20, 2)}
    counts = resolve_counts(shapes, Budget(r=4, allocation="erk"))
    assert counts == {"big": 4 * 222 - 40, "small": 40}


def test_numel_is_equal_density():
    counts = resolve_counts({"a": (100, 10), "b": (300, 10)}, Budget(density=0.01))
    assert counts == {"a": 10, "b": 30}


def test_uniform_is_equal_counts_as_far_as_they_fit():
    counts = resolve_counts({"a": (10, 10), "b": (2, 2), "c": (10, 10)}, Budget(num_params=40, allocation="uniform"))
    assert counts == {"a": 18, "b": 4, "c": 18}


def test_erk_matches_the_published_rule():
    shapes = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048), "up": (8192, 2048)}
    for density in (0.05, 0.5):
        counts = resolve_counts(shapes, Budget(density=density, allocation="erk"))
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
        dense: set[str] = set()
        while True:
            budget = density * sum(numel.values()) - sum(numel[name] for name in dense)
            scale = budget / sum(raw[name] * numel[name] for name in shapes if name not in dense)
            over = {name for name in shapes if name not in dense and scale * raw[name] > 1}
            if not over:
                break
            # all that share the largest raw density
            top = max(raw[name] for name in over)
            dense |= {name for name in over if raw[name] == top}
        for name in shapes:
            expected = 1.0 if name in dense else scale * raw[name]
            assert counts[name] / numel[name] == pytest.approx(expected, abs=2 / numel[name])
        assert bool(dense) == (density == 0.5)


@settings(max_examples=100, deadline=None)
@given(shapes, st.data(), st.booleans(), st.booleans())
def test_global_is_the_global_topk_with_one_for_every_layer(shapes, data, ties, largest):
    scores = random_scores(shapes, seed=data.draw(st.integers(0, 99)), ties=ties)
    numel = sum(math.prod(shape) for shape in shapes.values())
    total = data.draw(st.integers(len(shapes), numel))
    asked = []

    def score(name):
        asked.append(name)
        return scores[name]

    counts = resolve_counts(shapes, Budget(num_params=total, allocation="global"), score, largest)
    assert asked == list(shapes)
    sign = -1 if largest else 1
    ranked = sorted(
        (sign * value, i, j)
        for i, name in enumerate(shapes)
        for j, value in enumerate(scores[name].reshape(-1).tolist())
    )
    # every layer's best comes first, the rest of the budget goes by rank
    best = {min(entry for entry in ranked if entry[1] == i) for i in range(len(shapes))}
    taken = [*best, *[entry for entry in ranked if entry not in best][: total - len(best)]]
    expected = {name: sum(entry[1] == i for entry in taken) for i, name in enumerate(shapes)}
    assert counts == expected


def test_global_with_scores_of_candidates_only():
    scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([4.5, 1.0])}
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert resolve_counts(shapes, Budget(num_params=3, allocation="global"), scores.__getitem__) == {"a": 2, "b": 1}


def test_global_needs_scores_that_can_be_ranked():
    budget = Budget(density=0.1, allocation="global")
    with pytest.raises(ValueError, match=r"allocation='global' needs scores.*magnitude, magnitude_smallest.*wanda"):
        resolve_counts(SHAPES, budget)
    with pytest.raises(ValueError, match=r"layer a.k_proj: 16 of 16 scores are NaN"):
        resolve_counts(SHAPES, budget, lambda name: torch.full(SHAPES[name], math.nan if "k_proj" in name else 1.0))


# ---------------------------------------------------------------------- patterns


def test_patterns_match_names_suffixes_and_expressions_first_match_first():
    budget = Budget(density=0.1, density_pattern={"a.q_proj": 0.5, "q_proj": 0.25, r"b\..*": 1.0})
    counts = resolve_counts(SHAPES, budget)
    assert counts["a.q_proj"] == 32 and counts["b.q_proj"] == 16 and counts["b.up_proj"] == 160
    assert counts["a.k_proj"] + counts["head"] == round(0.1 * (16 + 40))


def test_a_suffix_is_whole_names():
    with pytest.warns(RuntimeWarning, match="no target layer matches 'proj'"):
        resolve_counts(SHAPES, Budget(density=0.1, density_pattern={"proj": 0.5}))


def test_unmatched_patterns_are_named():
    budget = Budget(density=0.1, density_pattern={"v_proj": 0.5, "q_proj": 0.5, "nothing": 0.1})
    with pytest.warns(RuntimeWarning, match="'v_proj', 'nothing'; the layers are a.q_proj, a.k_proj, b.q_proj, ..."):
        resolve_counts(SHAPES, budget)


def test_matched_patterns_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the second is hidden by the first, yet it matches
        resolve_counts(SHAPES, Budget(density=0.1, density_pattern={".*q_proj": 0.5, "a.q_proj": 0.5}))


def test_num_params_includes_the_patterns():
    counts = resolve_counts(SHAPES, Budget(num_params=100, density_pattern={"head": 1.0}))
    assert counts["head"] == 40 and sum(counts.values()) == 100


def test_r_and_density_are_of_the_other_layers():
    assert sum(resolve_counts(SHAPES, Budget(r=1, density_pattern={"head": 1.0})).values()) == 70 + 40


@pytest.mark.parametrize("budget", [{"density": 0.5}, {"r": 100}, {"num_params": 86}])
def test_all_layers_by_pattern(budget):
    counts = resolve_counts(SHAPES, Budget(**budget, density_pattern={".*": 0.25}))
    assert counts == {name: numel // 4 for name, numel in NUMEL.items()}


def test_a_pattern_of_almost_nothing_is_one_entry():
    assert resolve_counts(SHAPES, Budget(density=0.5, density_pattern={"head": 1e-9}))["head"] == 1


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of density, num_params and r .* none of them"),
        ({"density": 0.1, "r": 4}, ValueError, "exactly one .* density=0.1, r=4"),
        ({"density": 0}, ValueError, r"density=0: a share in \(0, 1\]"),
        ({"density": -0.1}, ValueError, "density=-0.1"),
        ({"density": 1.5}, ValueError, "density=1.5"),
        ({"density": math.nan}, ValueError, "density=nan"),
        ({"density": True}, TypeError, "density=True"),
        ({"density": "0.1"}, TypeError, "density='0.1'"),
        ({"num_params": 0}, ValueError, "num_params=0: an int of at least 1"),
        ({"num_params": 1.0}, TypeError, "num_params=1.0: an int"),
        ({"num_params": True}, TypeError, "num_params=True"),
        ({"r": 2.5}, TypeError, "r=2.5"),
        ({"r": -1}, ValueError, "r=-1"),
        (
            {"density": 0.1, "allocation": "even"},
            ValueError,
            "allocation='even': one of 'numel', 'uniform'",
        ),
        ({"density": 0.1, "density_pattern": {"q": 2}}, ValueError, r"density_pattern\['q'\]=2"),
        ({"density": 0.1, "density_pattern": {"q": None}}, TypeError, r"density_pattern\['q'\]=None"),
        ({"density": 0.1, "density_pattern": {3: 0.1}}, TypeError, "density_pattern: key=3"),
        (
            {"density": 0.1, "density_pattern": {"(": 0.1}},
            ValueError,
            r"density_pattern: key='\(': a name or regular",
        ),
        ({"density": 0.1, "density_pattern": [0.1]}, TypeError, r"density_pattern=\[0.1\]: a dict with a share"),
    ],
)
def test_bad_budgets(arguments, error, message):
    with pytest.raises(error, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(num_params=345), "num_params=345: the target layers have 344 weights; at most num_params=344"),
        (Budget(r=4), r"r=4: 368 entries .* 344 weights; the largest r that fits is 3"),
        (
            Budget(num_params=345, density_pattern={"head": 0.5}),
            "num_params=345, of which density_pattern takes 20: .* 304 weights left; at most num_params=324",
        ),
        (
            Budget(num_params=40, density_pattern={"head": 1.0}),
            "num_params=40, of which density_pattern takes 40: none are left .* at least num_params=44",
        ),
        (Budget(num_params=9, density_pattern={".*": 1.0}), "num_params=9: density_pattern sets every .* 344 entries"),
        (Budget(num_params=345, density_pattern={".*": 1.0}), "num_params=345: density_pattern sets every layer"),
    ],
)
def test_budgets_that_do_not_fit(budget, message):
    with pytest.raises(ValueError, match=message):
        resolve_counts(SHAPES, budget)


def test_vectors_are_too_small_for_any_rank():
    with pytest.raises(ValueError, match="not even r=1 fits, use density or num_params"):
        resolve_counts({"a": (1, 5)}, Budget(r=1))


def test_no_layers():
    with pytest.raises(ValueError, match=r"no target layers.*target_modules"):
        resolve_counts({}, Budget(density=0.1))
    with pytest.raises(ValueError, match="layer a: a weight of shape"):
        resolve_counts({"a": (0, 5)}, Budget(density=0.1))


def test_numpy_numbers_are_numbers():
    assert sum(resolve_counts(SHAPES, Budget(num_params=np.int64(50))).values()) == 50
    assert sum(resolve_counts(SHAPES, Budget(density=np.float32(0.5))).values()) == 172


def test_at_least_so_many_entries_in_every_layer_that_has_them():
    shapes = {"tiny": (2, 3), "small": (20, 2), "large": (200, 100)}
    for allocation in ("numel", "uniform", "erk"):
        counts = resolve_counts(shapes, Budget(density=0.01, allocation=allocation, at_least=16))
        assert counts["tiny"] == 6 and counts["small"] >= 16
        assert sum(counts.values()) == round(0.01 * 20046)
    assert resolve_counts({"small": (20, 2)}, Budget(density=0.01, at_least=16)) == {"small": 16}


def test_each_matrix_of_a_layer_counts_as_a_layer():
    shapes = {"experts": (4 * 10, 20), "linear": (10, 20)}
    apart = {f"expert {i}": (10, 20) for i in range(4)} | {"linear": (10, 20)}
    for options in ({"r": 2}, {"num_params": 100, "allocation": "uniform"}, {"density": 0.1, "allocation": "erk"}):
        together = resolve_counts(shapes, Budget(**options, matrices={"experts": 4}))
        counts = resolve_counts(apart, Budget(**options))
        assert together == {"experts": sum(counts[f"expert {i}"] for i in range(4)), "linear": counts["linear"]}
    assert resolve_counts(shapes, Budget(num_params=2, matrices={"experts": 4})) == {"experts": 1, "linear": 1}
