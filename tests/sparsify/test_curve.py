"""The curve of a metric over sparsity, its knees, and what comes back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparse_peft.sparsify import CurvePoint, SparsityCurve, essential_sparsity, masks_of, prune, pruned
from tests.sparsify.models import batches, linear_layers, llama


def curve_of(losses, dense=10.0, higher_is_better=False):
    sign = -1 if higher_is_better else 1
    points = [CurvePoint(str(i), (i + 1) / 10, dense + sign * loss, None) for i, loss in enumerate(losses)]
    return SparsityCurve(dense, tuple(points), higher_is_better)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_knee_is_the_last_point_before_the_first_that_loses_too_much(higher_is_better):
    curve = curve_of([-0.1, 0.05, 0.1, 0.3, 0.02, 5.0], higher_is_better=higher_is_better)
    assert curve.knee() == pytest.approx(0.3) and curve.knee(0.05) == pytest.approx(0.5)
    assert curve.knee(0) == pytest.approx(0.1) and curve_of([1.0]).knee() == 0
    with pytest.raises(ValueError, match=r"tolerance=-0\.1"):
        curve.knee(-0.1)


def test_the_chord_knee_is_the_corner_of_a_curve_that_bends():
    assert curve_of([0, 0, 0, 0, 3, 6]).chord_knee() == pytest.approx(0.4)
    assert curve_of([0, 0, 0, 0, 3, 6, math.inf]).chord_knee() == pytest.approx(0.4)
    assert curve_of([0, 0, -1]).chord_knee() is None and curve_of([2.0, 3.0]).chord_knee() is None


def test_a_curve_as_json_has_no_numbers_that_json_lacks():
    content = curve_of([0.0, math.inf]).to_dict()
    assert [point["metric"] for point in content["points"]] == [10.0, None] and content["knee"] == pytest.approx(0.1)


def test_points_are_measured_in_order_and_the_model_comes_back():
    model, data = llama(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, sizes = linear_layers(model), sum(m.weight.numel() for m in linear_layers(model).values())
    seen = []

    def zeros(model):
        seen.append(sum(int((module.weight == 0).sum()) for module in layers.values()) / sizes)
        return seen[-1] + 1

    curve = essential_sparsity(model, zeros, ["2:4", 0.75, 0, 0.25], "wanda", higher_is_better=False,
                               calibration=iter(data), progress=False)  # fmt: skip
    assert [point.pattern for point in curve.points] == ["0", "0.25", "2:4", "0.75"]
    assert seen == pytest.approx([0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75], abs=0.01) and curve.dense == 1
    for point in curve.points:
        assert point.metric == pytest.approx(1 + point.sparsity, abs=1e-9) == point.random
    assert curve.points[0].metric == curve.dense
    assert masks_of(model) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_scores_beat_chance_and_chance_can_be_left_out():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(128, 64)
    y = model(x).detach()

    def error(model):
        return 1 + float((model(x) - y).square().mean().detach())

    curve = essential_sparsity(model, error, [0.2, 0.6], allocation="global", higher_is_better=False, progress=False)
    assert all(point.metric < point.random for point in curve.points)
    assert essential_sparsity(model, error, [0.5], baseline=False, progress=False).points[0].random is None


def test_an_exception_inside_gives_the_weights_back():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError, match="stopped"), pruned(model, 0.5):
        raise KeyError("stopped")
    with pytest.raises(ValueError, match="score='wanda' needs data"), pruned(model, 0.5, "wanda"):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_from_before_stay_with_the_model():
    model = llama()
    masks = prune(model, 0.3, progress=False)
    with pruned(model, 0.6) as more:
        assert masks_of(model) is more and more.kept < masks.kept
    assert masks_of(model) is masks and not masks.broken(model)


def test_requests_that_make_no_sense():
    with pytest.raises(ValueError, match="grid"):
        essential_sparsity(llama(), lambda model: 1.0, [])
    with pytest.raises(ValueError, match=r"evaluate\(model\) is nan"):
        essential_sparsity(llama(), lambda model: math.nan, [0.5])
