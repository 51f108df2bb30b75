import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparse_peft.ops import reference_threshold, soft_threshold


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.7])
def test_soft_threshold_is_the_minimum(threshold):
    z = torch.linspace(-2, 2, 81, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    best = torch.stack([grid[((grid - value) ** 2 / 2 + threshold * grid.abs()).argmin()] for value in z])
    got = soft_threshold(z, threshold)
    assert torch.allclose(got, best, atol=1e-5)
    assert torch.allclose(got, F.softshrink(z, threshold), atol=1e-15)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20), st.floats(0, 3, width=32))
def test_soft_threshold_is_odd_and_brings_points_no_further_apart(values, threshold):
    z = torch.tensor(values, dtype=torch.float64)
    got = soft_threshold(z, threshold)
    assert torch.equal(soft_threshold(-z, threshold), -got)
    distance = (z[:, None] - z).abs()
    assert bool(((got[:, None] - got).abs() <= distance + 1e-12).all())
    assert bool((got[z.abs() <= threshold] == 0).all())
    assert threshold != 0 or torch.equal(got, z)


def test_soft_threshold_takes_one_for_each_value():
    z = torch.tensor([1.0, -1.0, 0.5])
    assert torch.equal(soft_threshold(z, torch.tensor([0.25, 0.5, 2.0])), torch.tensor([0.75, -0.5, 0.0]))


def test_reference_differs_between_one_and_two_thresholds_alone():
    # the published code looks again at what it has shrunk: SoRA, soft thresholding in three masks
    xi = 0.25
    z = torch.linspace(-1, 1, 801, dtype=torch.float64)
    by_hand = z.clone()
    by_hand[by_hand > xi] -= xi
    by_hand[by_hand < -xi] += xi
    by_hand[by_hand.abs() < xi] = 0
    got, soft = reference_threshold(z, xi), soft_threshold(z, xi)
    assert torch.equal(got, by_hand)
    differs = (z.abs() >= xi) & (z.abs() < 2 * xi)
    assert torch.equal(got != soft, differs)
