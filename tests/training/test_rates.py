"""Learning rates beside what suits the adapters: one warning with the cure, and the first log entry."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparse_peft import SM3, SLTrainConfig, SoRAConfig, SparseConfig, SparsityCallback, SparsityController
from sparse_peft.training.rates import peak_rate
from tests.helpers.two_layers import TwoLayers

TARGETS = ["first", "second"]
# 2e-4 suits the automatic scale, which is 8 at this density
DENSITY = 0.02


def run_with(config, rate, optimizer=torch.optim.AdamW, **options):
    """The warnings about learning rates when a run begins."""
    model = get_peft_model(TwoLayers(), config)
    stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=rate, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SparsityController(model, stepper, total_steps=10).close()
    return [str(w.message) for w in caught if "what suits its config" in str(w.message)]


def sparse(**fields):
    return SparseConfig(**{"density": DENSITY, "target_modules": TARGETS, **fields})


@pytest.mark.parametrize("rate", [2.1e-5, 2e-4, 1.9e-3])
def test_rates_near_the_recommended_one_are_accepted(rate):
    assert run_with(sparse(), rate) == []


@pytest.mark.parametrize(
    "scale, rate, words",
    [
        ("auto", 2e-2, ["2.0e-02 is 100 times", "set the learning rate to 2.0e-04", "scale=0.0625"]),
        ("auto", 2e-5, ["2.0e-05 is 1/10 of", "set the learning rate to 2.0e-04", "scale=64"]),
        (1.0, 1e-4, ["1.0e-04 is 1/16 of", "set the learning rate to 1.6e-03", "scale=16"]),
        (512.0, 2e-4, ["2.0e-04 is 64 times", "set the learning rate to 3.1e-06", "scale=8"]),
    ],
)
def test_one_warning_says_what_to_set(scale, rate, words):
    (warning,) = run_with(sparse(scale=scale), rate)
    assert all(word in warning for word in ["adapter 'default'", *words])


def test_setting_what_the_warning_says_ends_it():
    assert run_with(sparse(scale=0.0625), 2e-2) == [] and run_with(sparse(scale=16.0), 1e-4) == []


def test_low_rank_is_compared_with_lora_and_has_no_scale_to_set():
    (warning,) = run_with(SoRAConfig(r=8, alpha=16, target_modules=TARGETS), 1e-2)
    assert "set the learning rate to 2.0e-04" in warning and "scale=" not in warning


def test_what_cannot_be_compared_is_not():
    assert run_with(sparse(), 1.0, torch.optim.SGD) == []
    assert run_with(SLTrainConfig(mode="pretrain", r=2, target_modules=TARGETS), 3e-2) == []
    model = get_peft_model(TwoLayers(), sparse())
    stepper = SM3([p for p in model.parameters() if p.requires_grad], lr=1.0, peft_model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparsityController(model, stepper, total_steps=10).close()
    lora = get_peft_model(TwoLayers(), LoraConfig(target_modules=TARGETS))
    stepper = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SparsityController(lora, stepper, total_steps=10).suited_rates == {}


def test_a_warmup_counts_with_its_highest_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0 and peak_rate(optimizer, parameter) == 3e-4
    optimizer = torch.optim.AdamW([parameter], lr=1e-9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=10)
    assert peak_rate(optimizer, parameter) == 5e-4


def test_only_adapters_that_the_optimizer_trains_are_stated():
    model = get_peft_model(TwoLayers(), sparse())
    model.add_adapter("other", sparse(scale=1.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    controller = SparsityController(model, optimizer, total_steps=10)
    assert controller.suited_rates == {"default": {"scale": 8.0, "recommended_rate": 2e-4}}
    controller.close()


def test_the_first_log_entry_states_scale_and_rate(tmp_path):
    model = get_peft_model(TwoLayers(), sparse(scale=2.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-4)
    callback, state = SparsityCallback(), TrainerState(max_steps=10)
    arguments, control = TrainingArguments(output_dir=tmp_path, use_cpu=True), TrainerControl()
    callback.on_train_begin(arguments, state, control, model=model, optimizer=optimizer)
    for loss in (3.0, 2.0):
        logs = {"loss": loss}
        state.log_history.append(dict(logs))
        callback.on_log(arguments, state, control, logs=logs)
    callback.on_train_end(arguments, state, control)
    first, second = state.log_history
    assert first == {"loss": 3.0, "sparsity/scale": 2.0, "sparsity/recommended_rate": pytest.approx(8e-4)}
    assert second == {"loss": 2.0}


def test_several_adapters_are_stated_by_name(tmp_path):
    model = get_peft_model(TwoLayers(), sparse())
    model.add_adapter("other", sparse(scale=1.0))
    model.base_model.set_adapter(["default", "other"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    callback, state, logged = SparsityCallback(), TrainerState(max_steps=10), []

    class Reporter:
        log = staticmethod(logged.append)

    callback.trainer = Reporter()
    arguments, control = TrainingArguments(output_dir=tmp_path, use_cpu=True), TrainerControl()
    callback.on_train_begin(arguments, state, control, model=model, optimizer=optimizer)
    callback.on_optimizer_step(arguments, state, control)
    callback.on_optimizer_step(arguments, state, control)
    callback.on_train_end(arguments, state, control)
    assert logged == [
        {
            "sparsity/default/scale": 8.0,
            "sparsity/default/recommended_rate": 2e-4,
            "sparsity/other/scale": 1.0,
            "sparsity/other/recommended_rate": pytest.approx(1.6e-3),
        }
    ]
