"""K-means on a line, against exhaustive search."""

import itertools

import pytest
import torch

from sparse_peft.numerics.kmeans import SortedRows, lloyd, optimal, starts


def heavy(rows, cols):
    return torch.distributions.StudentT(3.0).sample((rows, cols)) * 0.02


def best_of_all_partitions(values, weights, entries):
    """Exhaustive search over the intervals of the sorted values, in float64."""
    values, order = values.double().sort()
    weights = weights.double()[order]
    n, best = len(values), float("inf")
    for cuts in itertools.combinations(range(1, n), min(entries, n) - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, n)):
            part, mass = values[a:b], weights[a:b]
            if mass.sum() > 0:
                total += float((mass * (part - (mass * part).sum() / mass.sum()).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cols", [5, 9, 12])
def test_dynamic_programming_finds_the_best_of_all_partitions(cols, weighted):
    weight = heavy(6, cols)
    weights = torch.rand(6, cols) ** 3 if weighted else torch.ones(6, cols)
    rows = SortedRows(weight, weights)

    found = rows.error(optimal(rows, 4, bins=cols))

    expected = torch.tensor(
        [best_of_all_partitions(w, c, 4) for w, c in zip(weight, weights, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("start", ["uniform", "quantile", "companded"])
def test_lloyds_error_never_grows(start):
    """Oracle 8."""
    weight, weights = heavy(9, 200), torch.rand(9, 200)
    rows = SortedRows(weight, weights)
    centers = starts(rows, 8)[start]
    errors = [rows.error(centers)]
    for _ in range(30):
        centers = lloyd(rows, centers, 1)
        errors.append(rows.error(centers))
        assert bool((centers.diff(dim=1) >= 0).all())

    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert bool((errors[-1] < errors[0]).all())
