"""The controller in training loops: skipped steps, resuming, attachment and closing."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from sparse_peft import (
    SaRAConfig,
    SnellaConfig,
    SoRAConfig,
    SparseConfig,
    SparsityController,
)
from tests.helpers.reselection import adapted, assert_equal, snapshot
from tests.helpers.training_loop import batch_at, optimizer_of, train
from tests.helpers.two_layers import TwoLayers, layers_of

# ---------------------------------------------------------------------- skipped and failed steps


@pytest.mark.parametrize("selection", ["accumulated_gradient", "momentum"])
def test_a_loss_scaler_changes_nothing_and_its_skipped_steps_do_not_count(selection):
    plain = adapted(selection)
    optimizer = optimizer_of(plain)
    train(plain, optimizer, SparsityController(plain, optimizer, total_steps=12), range(12), clip=0.1)

    model = adapted(selection)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(12):
        if step in (0, 1, 4, 8):  # an overflow, before, in and after a window
            scaler.scale(F.cross_entropy(model(batch_at(99)[0] * 1e30), batch_at(99)[1]) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            assert controller.step() == []
            optimizer.zero_grad()
        train(model, optimizer, controller, [step], clip=0.1, scaler=scaler)
    assert controller.completed_steps == 12
    for n, (indices, values) in snapshot(plain).items():
        assert torch.equal(indices, snapshot(model)[n][0])
        torch.testing.assert_close(values, snapshot(model)[n][1], rtol=1e-4, atol=1e-6)


def test_accelerates_optimizer_skips_steps_too():
    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = AcceleratedOptimizer(optimizer_of(model), scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    controller = SparsityController(model, optimizer, total_steps=12)
    for step in range(8):
        x, y = batch_at(step)
        loss = F.cross_entropy(model(x), y) * (float("inf") if step in (1, 4) else 1.0)
        optimizer.scaler.scale(loss).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (step in (1, 4))
        controller.step()
        optimizer.zero_grad()
    assert accelerator.num_processes == 1 and controller.completed_steps == 6
    plain = adapted()
    other = optimizer_of(plain)
    train(plain, other, SparsityController(plain, other, total_steps=12), [0, 2, 3, 5, 6, 7])
    for n, (indices, values) in snapshot(plain).items():
        assert torch.equal(indices, snapshot(model)[n][0])
        torch.testing.assert_close(values, snapshot(model)[n][1], rtol=1e-4, atol=1e-6)


def about_to_reselect():
    """A model that changes by SET, after the backward pass before a reselection; its optimizer and controller."""
    model = adapted("set")
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=30)
    train(model, optimizer, controller, range(5))
    x, y = batch_at(5)
    F.cross_entropy(model(x), y).backward()
    return model, optimizer, controller


def test_a_diverged_run_is_stopped_before_anything_changes():
    model, optimizer, controller = about_to_reselect()
    optimizer.step()
    with torch.no_grad():
        layers_of(model)["second"].deltas["default"].values[3] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer second: values of adapter default are NaN.*diverged"):
        controller.step()
    for n, (indices, _) in snapshot(model).items():
        assert torch.equal(indices, before[n][0])


def test_a_loop_that_skips_a_step_says_so():
    runs = []
    for skips in (False, True):
        model = adapted()
        optimizer = optimizer_of(model)
        controller = SparsityController(model, optimizer, total_steps=12)
        for step in range(12):
            if skips and step in (0, 5, 7):
                x, y = batch_at(50 + step)
                F.cross_entropy(model(x), y).backward()
                optimizer.zero_grad()
                controller.discard_step()
            train(model, optimizer, controller, [step])
        runs.append(snapshot(model))
    assert_equal(*runs)


# ---------------------------------------------------------------------- resuming


def test_state_of_other_positions_is_refused():
    model = adapted()
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=16)
    train(model, optimizer, controller, range(4))
    state = optimizer.state_dict()
    fresh = adapted()
    other = optimizer_of(fresh)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"layer first: the adapter's positions are not those.*load the adapter"):
        SparsityController(fresh, other, total_steps=16)


def test_an_adapter_loaded_in_between_begins_a_new_window():
    model = adapted()
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=40)
    start = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    train(model, optimizer, controller, range(8))
    set_peft_model_state_dict(model, start)
    records = train(model, optimizer, controller, range(8, 16))
    assert [record.step for record in records] == [9, 15] and records[1].replaced > 0


# ---------------------------------------------------------------------- attachment to a run


def test_training_without_a_controller_warns_once():
    model = adapted()
    optimizer = optimizer_of(model)
    x, y = batch_at(0)
    with pytest.warns(UserWarning, match=r"callbacks=\[sparse_peft.SparsityCallback\(\)\].*controller.step\(\)"):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        static = get_peft_model(TwoLayers(), SparseConfig(target_modules=["first"]))
        F.cross_entropy(static(x), y).backward()
        optimizer_of(static).step()
        attended = adapted()
        other = optimizer_of(attended, lr=4e-4)
        train(attended, other, SparsityController(attended, other, total_steps=8), range(2))


def test_a_static_adapter_needs_no_controller_and_bears_one():
    model = get_peft_model(TwoLayers(), SparseConfig(target_modules=["first"], density=0.2))
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer)
    train(model, optimizer, controller, range(3))
    assert controller.history == [] and "sparse_peft" not in optimizer.state_dict()["param_groups"][0]


def test_after_closing_training_goes_on_without_it():
    model = adapted()
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=20)
    train(model, optimizer, controller, range(2))
    controller.close()
    before = snapshot(model)
    x, y = batch_at(5)
    for _ in range(8):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
    for n, (indices, _) in snapshot(model).items():
        assert torch.equal(indices, before[n][0])


def test_an_optimizer_without_the_values_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="does not train the values of adapter 'default'"):
        SparsityController(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), total_steps=10)


def test_an_unknown_length_is_refused_where_it_is_needed():
    model = adapted()
    with pytest.raises(ValueError, match="total_steps="):
        SparsityController(model, optimizer_of(model))
    model = adapted(reselect_stop=50)
    SparsityController(model, optimizer_of(model))


@pytest.mark.parametrize(
    ("config", "total_steps", "message"),
    [
        (SparseConfig(selection="rigl", reselect_every=20), 19, "first reselection would come after step 20"),
        (SparseConfig(selection="rigl", reselect_start=100, reselect_stop=110), None, "no position ever changes"),
        (SparseConfig(selection="momentum", reselect_stop=0.0), 100, "last possible one is after step 0"),
        (SaRAConfig(density=0.2, progressive=50), 49, "no entry ever freezes: progressive=50"),
        (SoRAConfig(prox_start=10), 10, "no gate is ever pulled to zero: prox_start=10"),
        (SoRAConfig(target_rank=4, target_step=20), 10, "target_rank is not reached: target_step=20"),
        (SoRAConfig(compact_every=20), 10, "no rank is ever removed: compact_every=20"),
        (SnellaConfig(target_sparsity=0.9, allocate_stop=20), 10, "target_sparsity is not reached: allocate_stop=20"),
    ],
)
def test_a_schedule_longer_than_the_run_is_named_when_training_begins(config, total_steps, message):
    model = get_peft_model(TwoLayers(), dataclasses.replace(config, target_modules=["first", "second"]))
    with pytest.warns(UserWarning, match=f"adapter 'default': .*{message}"):
        SparsityController(model, optimizer_of(model), total_steps)


def test_a_schedule_that_fits_the_run_has_no_warning():
    for config in (SparseConfig(selection="rigl", reselect_every=20), SaRAConfig(), SoRAConfig(target_rank=4)):
        model = get_peft_model(TwoLayers(), dataclasses.replace(config, target_modules=["first", "second"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SparsityController(model, optimizer_of(model, lr=2e-4), 20)


def test_a_controller_whose_optimizer_never_steps_says_so():
    model = adapted()
    controller = SparsityController(model, optimizer_of(model), total_steps=100)
    with pytest.warns(UserWarning, match="64 times in a row without a step of the AdamW"):
        for _ in range(64):
            controller.step()


def test_positions_of_merged_adapters_do_not_change():
    model, optimizer, controller = about_to_reselect()
    model.merge_adapter()
    optimizer.step()
    with pytest.raises(RuntimeError, match="layer first: positions cannot change while adapters are merged"):
        controller.step()


def test_records_say_what_happened():
    model = adapted()
    optimizer = optimizer_of(model)
    records = train(model, optimizer, SparsityController(model, optimizer, total_steps=30), range(9))
    first, second = records
    assert (first.step, first.rate, second.step) == (3, 1.0, 9)
    entries = sum(values.numel() for _, values in snapshot(model).values())
    logs = second.logs()
    assert logs["sparsity/density"] == pytest.approx(entries / (17 * 33 + 33 * 5))
    assert logs["sparsity/replaced"] == second.replaced
    assert logs["sparsity/overlap"] == pytest.approx(1 - second.replaced / entries)
    assert logs["sparsity/drop_threshold"] > 0 and logs["sparsity/grow_threshold"] > 0
    ages = [value for key, value in logs.items() if key.startswith("sparsity/age")]
    assert len(ages) == 5 and sum(ages) == pytest.approx(1)
    assert logs["sparsity/age_below_6"] == pytest.approx(second.replaced / entries)
    assert type(first).from_dict(first.to_dict()) == first
