"""Steps inside the backward pass, against the plain optimizer."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparse_peft import SparseAdamW, SparseConfig, SparsityController, StepInBackward, step_in_backward
from tests.helpers.language_models import llama

CONFIGS = {
    "sparse": SparseConfig(density=0.1, target_modules="all-linear"),
    "lora": LoraConfig(r=2, target_modules="all-linear"),
}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "SparseAdamW": (SparseAdamW, {"lr": 1e-2}),
}


def tokens():
    return torch.randint(2, 32, (2, 12), generator=torch.Generator().manual_seed(1))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def groups(model):
    first, *others = trained(model)
    return [{"params": [first], "lr": 3e-2}, {"params": others}]


def run(optimizer_of, steps=5, config="sparse", checkpointing=False, dtype=torch.float32):
    model = get_peft_model(llama().to(dtype), CONFIGS[config]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = optimizer_of(groups(model))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    ids, losses = tokens(), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plain_run_bit_for_bit(name, config):
    if (name, config) == ("SparseAdamW", "lora"):
        pytest.skip("for entries")
    kind, options = OPTIMIZERS[name]
    model, _, losses = run(lambda params: StepInBackward(params, kind, **options), config=config)
    plain, _, expected = run(lambda params: kind(params, **options), config=config)
    assert losses == expected and losses[-1] != losses[0]
    for ours, theirs in zip(trained(model), trained(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradient_checkpointing(dtype):
    def of(*kind):
        return lambda params: kind[0](params, *kind[1:], lr=1e-2)

    expected = run(of(torch.optim.AdamW), checkpointing=True, dtype=dtype)[2]
    assert run(of(StepInBackward, torch.optim.AdamW), checkpointing=True, dtype=dtype)[2] == expected


def test_no_gradient_is_alive_beside_that_of_one_parameter():
    model = get_peft_model(llama(), CONFIGS["sparse"])
    alive = []
    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in trained(model)))
        )
    StepInBackward(trained(model), lr=1e-2)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    gc.collect()
    assert alive == [1] * len(trained(model))
    assert all(parameter.grad is None for parameter in trained(model))


def test_the_state_is_one_optimizer_s_and_resumes():
    def make(params):
        return StepInBackward(params, torch.optim.AdamW, lr=1e-2)

    model, optimizer, _ = run(make, steps=3)
    plain = run(lambda params: torch.optim.AdamW(params, lr=1e-2), steps=3)[1]
    ours, theirs = optimizer.state_dict(), plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    assert all(torch.equal(ours["state"][n][k], v) for n, state in theirs["state"].items() for k, v in state.items())
    other = get_peft_model(llama(), CONFIGS["sparse"])
    other.load_state_dict(model.state_dict())
    resumed = make(groups(other))
    resumed.load_state_dict(copy.deepcopy(ours))
    ids = tokens()
    for each, its in ((model, optimizer), (other, resumed)):
        each.train()(ids, labels=ids).loss.backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(trained(model), trained(other), strict=True))
    resumed.close()
    other(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in trained(other))


def test_a_trainer_s_run(tmp_path):
    def losses(**more):
        given = {"max_grad_norm": 0, "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1}
        args = TrainingArguments(tmp_path, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", **given)
        model = get_peft_model(llama(), CONFIGS["sparse"])
        data = [{"input_ids": row, "labels": row} for row in tokens().repeat(8, 1)]
        chosen = {"optimizer_cls_and_kwargs": step_in_backward(args)} if more else {}
        trainer = Trainer(model, args, train_dataset=data, callbacks=[Alive()], **chosen)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], Alive.found

    class Alive(TrainerCallback):
        found: list[bool]

        def on_train_begin(self, *args, **kwargs):
            Alive.found = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            Alive.found.append(any(parameter.grad is not None for parameter in model.parameters()))

    plain, had = losses()
    fused, have = losses(fused=True)
    assert fused == plain and all(had) and not any(have) and len(have) == 4


@pytest.mark.parametrize(
    ("field", "value"), [("max_grad_norm", 1.0), ("gradient_accumulation_steps", 2), ("fp16", True)]
)
def test_arguments_that_need_all_gradients_are_refused(tmp_path, field, value):
    args = TrainingArguments(tmp_path, max_grad_norm=0, report_to=[], use_cpu=True)
    setattr(args, field, value)
    with pytest.raises(ValueError, match=f"^{field}={value!r}: .* need {field}="):
        step_in_backward(args)


def test_what_does_not_go_with_it_is_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"optimizer_class=LBFGS: it calls a closure"):
        StepInBackward(layer.parameters(), torch.optim.LBFGS)
    optimizer = StepInBackward(layer.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="takes no closure"):
        optimizer.step(lambda: None)
    layer(torch.ones(4)).sum().backward()
    with pytest.raises(RuntimeError, match="a second backward pass before"):
        layer(torch.ones(4)).sum().backward()
    scaler = torch.amp.GradScaler("cpu")
    optimizer.step()
    scaler.scale(layer(torch.ones(4)).sum()).backward()
    with pytest.raises(RuntimeError, match="a gradient scaler cannot take back"):
        scaler.step(optimizer)


def test_a_changing_adapter_is_refused():
    config = SparseConfig(density=0.1, selection="rigl", reselect_every=2, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="'default' must act before and after a step"):
        SparsityController(model, StepInBackward(trained(model), lr=1e-2), total_steps=4)
    static = get_peft_model(llama(), CONFIGS["sparse"])
    SparsityController(static, StepInBackward(trained(static), lr=1e-2), total_steps=4)
