"""Which path computes a gradient."""

import logging

import torch

from sparse_peft.ops import GradientPlan, backends, plan_support_grad, use_backend
from sparse_peft.support import Support

CPU = torch.device("cpu")


def spread(density, size=1024):
    return Support.random((size, size), round(density * size * size), seed=0, name="layer")


def test_the_path_follows_structure_then_density():
    assert plan_support_grad(spread(0.01), torch.float32, CPU).path == "sampled"
    assert plan_support_grad(spread(0.5), torch.float32, CPU).path == "panels"
    columns = Support.from_columns((100, 100), range(0, 60))
    plan = plan_support_grad(columns, torch.float32, CPU)
    assert plan.path == "tiles" and "rows that train the same columns" in plan.why


def test_density_counts_within_the_rows_and_columns_that_are_used():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[::10, ::10] = torch.rand(10, 10) < 0.8
    crowded = Support.from_mask(mask)
    assert crowded.density < 0.01 and plan_support_grad(crowded, torch.float32, CPU).path == "panels"


def test_a_forced_backend_is_taken_and_named(monkeypatch):
    with use_backend("panels"):
        assert plan_support_grad(spread(0.01), torch.float32, CPU) == GradientPlan("panels", "forced")
    monkeypatch.setenv("SPARSE_PEFT_BACKEND", "sampled")
    assert plan_support_grad(spread(0.5), torch.float32, CPU).path == "sampled"


def test_tiles_without_groups_are_chosen_by_density_and_said_once(caplog):
    backends._logged.clear()
    with caplog.at_level(logging.INFO, logger="sparse_peft"), use_backend("tiles"):
        for _ in range(2):
            assert plan_support_grad(spread(0.01), torch.float32, CPU).path == "sampled"
    assert caplog.text.count("'tiles' is forced") == 1
