"""Attachments: the run of a controller or callback, bit for bit, in loops that know of neither."""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

import sparse_peft
from sparse_peft import SaRAConfig, SnellaConfig, SoRAConfig, SparseConfig, SparsityCallback, SparsityController
from tests.helpers.language_models import llama
from tests.helpers.methods import MOVING, config
from tests.helpers.reselection import adapted, assert_equal, snapshot
from tests.helpers.training_loop import batch_at, optimizer_of, train
from tests.helpers.two_layers import TwoLayers

KINDS = {"accumulated_gradient": "adamw", "momentum": "sm3", "rigl": "by age", "set": "sgd"}


class Silent:
    """A loop's controller that does nothing."""

    def step(self):
        return []


@pytest.mark.parametrize("selection", KINDS)
@pytest.mark.parametrize("options", [{}, {"accumulation": 3, "clip": 0.1}], ids=["plain", "accumulation and clipping"])
def test_a_loop_that_knows_nothing_runs_as_with_a_controller(selection, options):
    one, other = adapted(selection), adapted(selection)
    optimizer = optimizer_of(one, KINDS[selection])
    controller = SparsityController(one, optimizer, total_steps=14)
    train(one, optimizer, controller, range(14), **options)
    attached = sparse_peft.attach(other, total_steps=14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*what suits its config with AdamW")  # toy rates
        train(other, optimizer_of(other, KINDS[selection]), Silent(), range(14), **options)
    assert_equal(snapshot(one), snapshot(other))
    assert attached.history == controller.history and sum(record.replaced for record in attached.history) > 0


def with_skipped_steps(model, optimizer, controller):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(12):
        if step in (0, 1, 4, 8):  # before, in and after a window
            loss = F.cross_entropy(model(batch_at(99)[0] * 1e30), batch_at(99)[1])
            scaler.scale(loss * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            controller.step()
            optimizer.zero_grad(set_to_none=step < 4)
        train(model, optimizer, controller, [step], scaler=scaler)


def test_steps_that_a_loss_scaler_skips_do_not_count():
    one, other = adapted(), adapted()
    optimizer = optimizer_of(one)
    controller = SparsityController(one, optimizer, total_steps=12)
    attached = sparse_peft.attach(other, total_steps=12)
    with_skipped_steps(one, optimizer, controller)
    with_skipped_steps(other, optimizer_of(other), Silent())
    assert_equal(snapshot(one), snapshot(other))
    assert attached.controller.completed_steps == 12 and len(attached.history) == 2


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_a_resumed_run_is_the_uninterrupted_one(stop):
    whole = adapted()
    sparse_peft.attach(whole, total_steps=14)
    train(whole, optimizer_of(whole), Silent(), range(14))
    first = adapted()
    sparse_peft.attach(first, total_steps=14)
    optimizer = optimizer_of(first)
    train(first, optimizer, Silent(), range(stop))
    saved, state = copy.deepcopy(get_peft_model_state_dict(first)), copy.deepcopy(optimizer.state_dict())
    resumed = adapted(seed=9)
    attached = sparse_peft.attach(resumed, total_steps=14)
    set_peft_model_state_dict(resumed, saved)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, Silent(), range(stop, 14))
    assert_equal(snapshot(whole), snapshot(resumed))
    assert attached.controller.completed_steps == 14


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m == "sora" else pytest.mark.slow) for m in MOVING])
def test_a_trainer_without_the_callback_runs_as_with_it(method, tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 20, (16, 6))]

    def run(attach):
        model = get_peft_model(llama(), config(method, **MOVING[method]))
        attached = sparse_peft.attach(model, total_steps=6) if attach else None
        args = TrainingArguments(
            tmp_path, max_steps=6, learning_rate=0.02, use_cpu=True, report_to=[], save_strategy="no",
            gradient_accumulation_steps=2, max_grad_norm=0.1, per_device_train_batch_size=1, disable_tqdm=True,
        )  # fmt: skip
        callback = SparsityCallback()
        Trainer(model, args, train_dataset=data, callbacks=[] if attach else [callback]).train()
        return get_peft_model_state_dict(model), (attached or callback).history

    (one, history), (other, attached) = run(False), run(True)
    assert history == attached and history
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()) and one.keys() == other.keys()


def test_it_finds_the_optimizer_that_accelerate_wraps():
    model = adapted("rigl")
    accelerator = Accelerator(cpu=True)
    attached = sparse_peft.attach(model, total_steps=14)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    train(model, optimizer, Silent(), range(14))
    assert len(attached.history) == 2


def test_it_stands_back_for_a_controller_or_a_callback(tmp_path):
    before, later = adapted("rigl"), adapted("rigl")
    attached = sparse_peft.attach(before, total_steps=14)
    optimizer = optimizer_of(before)
    controller = SparsityController(before, optimizer, total_steps=14)
    train(before, optimizer, controller, range(14))
    assert attached.controller is None and attached.history == [] and len(controller.history) == 2

    attached = sparse_peft.attach(later, total_steps=14)
    optimizer = optimizer_of(later)
    train(later, optimizer, Silent(), range(7))
    assert len(attached.history) == 1
    controller = SparsityController(later, optimizer, total_steps=14, completed_steps=7)
    train(later, optimizer, controller, range(7, 14))
    assert len(attached.history) == 1 and len(controller.history) == 1
    assert_equal(snapshot(before), snapshot(later))


def test_a_second_training_has_a_controller_of_its_own():
    model = adapted("rigl")
    first = sparse_peft.attach(model, total_steps=8)
    train(model, optimizer_of(model), Silent(), range(8))
    second = sparse_peft.attach(model, total_steps=8)
    optimizer = optimizer_of(model)
    train(model, optimizer, Silent(), range(8))
    assert len(first.history) == len(second.history) == 1 and second.controller.optimizer is optimizer
    second.close()
    train(model, optimizer, Silent(), range(8))
    assert len(second.history) == 1


def test_without_the_length_reselection_goes_on_at_its_first_rate():
    model = adapted("rigl", replace_rate=0.25)
    attached = sparse_peft.attach(model)
    with pytest.warns(UserWarning, match=r"reselect_stop=1.0 is a share of a run of unknown length.*total_steps="):
        train(model, optimizer_of(model), Silent(), range(20))
    assert [(record.step, round(record.rate, 6)) for record in attached.history] == [(6, 0.25), (12, 0.25), (18, 0.25)]
    known = adapted("rigl", reselect_stop=12)
    attached = sparse_peft.attach(known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*what suits its config with AdamW")  # toy rates
        train(known, optimizer_of(known), Silent(), range(20))
    assert [record.step for record in attached.history] == [6, 12]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (SparseConfig(selection="rigl", reselect_start=0.5), "reselect_start=0.5"),
        (SaRAConfig(progressive=0.5), "progressive=0.5"),
        (SoRAConfig(prox_start=0, target_rank=4, target_step=0.5), "target_step=0.5"),
        (SoRAConfig(prox_start=0, stages=3), "stages=3"),
        (SnellaConfig(target_sparsity=0.95), "allocate_st"),
    ],
)
def test_other_shares_of_an_unknown_length_are_refused(changes, field):
    model = get_peft_model(TwoLayers(), dataclasses.replace(changes, target_modules=["first", "second"]))
    sparse_peft.attach(model)
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match=f"{field}.*total_steps="):
        train(model, optimizer, Silent(), range(1))


def test_an_adapter_that_does_not_change_is_refused():
    model = get_peft_model(TwoLayers(), SparseConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r"no adapter of the model changes during training \(its adapters: default"):
        sparse_peft.attach(model)


def test_evaluation_begins_nothing():
    model = adapted("rigl")
    attached = sparse_peft.attach(model, total_steps=14)
    optimizer = optimizer_of(model)
    model.eval()(batch_at(0)[0])
    with torch.no_grad():
        model.train()(batch_at(0)[0])
    assert attached.controller is None
    train(model, optimizer, Silent(), range(1))
    assert attached.controller is not None
