"""DeepSpeed's ZeRO on two processes, against one process with the whole batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from sparse_peft import (
    SketchConfig,
    SparseAdamW,
    SparseConfig,
    SparsityCallback,
    SparsityController,
    select_support,
)
from sparse_peft.dynamics.full_tensor import full_tensor
from sparse_peft.tuners.traversal import tuner_layers
from tests.helpers.blocks import Net
from tests.helpers.deepspeed_engine import initialize, on_two, partitioned
from tests.integration import test_distributed_memory as memory
from tests.integration import test_distributed_table as table
from tests.integration.test_distributed_table import base
from tests.integration.test_distributed_training import STATIC, TOTAL, adapted, batch_at, half, leaves, look_at

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make deepspeed")
pytestmark = pytest.mark.distributed

STEPS, RATE, CLIP = 8, 1e-2, 0.1
OPTIMIZERS = {"adamw": torch.optim.AdamW, "by age": SparseAdamW}
CASES = [
    ("nonzero", "adamw", {}),
    ("accumulated_gradient", "adamw", {}),
    ("momentum", "adamw", {}),
    ("rigl", "by age", {}),
    ("set", "adamw", {}),
    ("principal", "adamw", {"principal_rank": 6, "reselect_every": 3}),
    ("s2ft", "adamw", {"k": 4}),
    ("sara", "adamw", {"density": 0.2, "progressive": 3, "nuclear_weight": 0.01, "nuclear_min_size": 4, "scale": 1.0}),
    ("sltrain", "adamw", {"r": 2, "density": 0.2}),
    (
        "snella",
        "adamw",
        {"r": 4, "target_sparsity": 0.6, "allocate_start": 0, "allocate_stop": 7, "allocate_every": 3},
    ),
    ("sketch", "adamw", {"bits": 2}),
]


def optimizer_of(model, kind):
    return OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=RATE)


def after_each_step(model, step):
    """Losses, and positions and values after each step."""
    seen = []
    for number in range(STEPS):
        loss = step(*batch_at(number))
        seen.append((loss, {name: state[:2] for name, state in look_at(model).items()}))
    return seen


def with_zero(rank, stage, selection, kind, fields):
    # stage 3: nothing stays gathered, but in two cases; half of the models are made in partitions
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 and selection not in ("rigl", "s2ft") else {}
    net = partitioned(Net, zero) if stage == 3 and selection not in ("momentum", "set", "sltrain") else None
    model = adapted(selection, net=net, **fields)
    engine, optimizer = initialize(
        model, optimizer_of(model, kind), stage, zero_optimization=zero, gradient_clipping=CLIP
    )
    controller = SparsityController(engine, optimizer, TOTAL)

    def step(x, y):
        loss = F.cross_entropy(engine(x[half(rank)]), y[half(rank)])
        engine.backward(loss)
        engine.step()
        controller.step()
        torch.distributed.all_reduce(loss.detach())
        return loss.item() / 2

    seen = after_each_step(model, step)
    for layer in tuner_layers(model):
        layer.release()
        own, weight = Net().get_submodule(layer.name).weight, layer.base_layer.weight
        assert torch.equal(full_tensor(weight), own), "the partitions have the base's own bits"
        assert weight.numel() == 0 or torch.equal(weight, own), "and so has what stays gathered"
    engine.destroy()
    return seen


def on_one(selection, kind, fields):
    model = adapted(selection, **fields)
    optimizer = optimizer_of(model, kind)
    controller = SparsityController(model, optimizer, TOTAL)

    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        return loss.item()

    return after_each_step(model, step)


def all_with_zero(rank, stage, cases):
    return [with_zero(rank, stage, *case) for case in cases]


def assert_same(found, expected):
    for number, ((loss, states), (own_loss, own)) in enumerate(zip(found, expected, strict=True)):
        assert loss == pytest.approx(own_loss, rel=1e-4), f"loss of step {number}"
        for name, (indices, values) in own.items():
            assert states[name][0] == indices, f"positions of {name} after {number + 1} steps"
            assert states[name][1] == pytest.approx(values, rel=1e-3, abs=2e-5), f"{name} after {number + 1} steps"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path, stage):
    first, second = on_two(all_with_zero, tmp_path, stage, CASES)
    assert first == second
    for (selection, kind, fields), found in zip(CASES, first, strict=True):
        assert_same(found, on_one(selection, kind, fields))
        if selection not in STATIC and selection not in ("sara", "snella"):
            assert found[0][1] != found[-1][1]


# ---------------------------------------------------------------------- transformers' Trainer

METHODS = {
    "static": {"selection": "random"},
    "dynamic": {"selection": "rigl", "candidates": 10, "reselect_every": 2, "replace_rate": 0.4, "reselect_stop": 1.0},
}


class Rows(Dataset):
    """Sentences of one length."""

    def __len__(self):
        return 32

    def __getitem__(self, number):
        ids = torch.randint(0, 31, (6,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}


def trained(folder, fields, batch, stage=None, steps=6, resume=None):
    """Losses, positions and values of a run of transformers' Trainer."""
    settings = None
    if stage is not None:
        auto = (
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        settings = {
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            **dict.fromkeys(auto, "auto"),
        }
        settings["zero_allow_untested_optimizer"] = True
        if stage == 3:
            settings["zero_optimization"] |= {"stage3_gather_16bit_weights_on_model_save": True}
            settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    args = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
        learning_rate=1e-3, save_steps=3, logging_steps=1, report_to=[], use_cpu=stage is None, disable_tqdm=True,
        deepspeed=settings, lr_scheduler_type="constant", gradient_checkpointing=stage is not None,
    )  # fmt: skip
    config = SparseConfig(density=0.1, target_modules="all-linear", init_weights=False, **fields)
    # under stage 3 transformers loads a model in partitions
    net = base() if stage != 3 else LlamaForCausalLM.from_pretrained(folder.parent / "base")
    torch.manual_seed(0)
    model = get_peft_model(net, config)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[SparsityCallback()])
    trainer.train(resume_from_checkpoint=resume)
    assert type(trainer.model_wrapped).__name__ == (type(model).__name__ if stage is None else "DeepSpeedEngine")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {
        name: (state.support.indices.tolist(), full_tensor(state.values).tolist())
        for name, state in leaves(model).items()
    }


def trainers(rank, folder, stage):
    found = {}
    for kind, fields in METHODS.items():
        whole = trained(folder / kind, fields, 2, stage)
        found[kind] = whole
        again = trained(folder / kind, fields, 2, stage, resume=str(folder / kind / "checkpoint-3"))
        assert again == whole, "a resumed run is the uninterrupted one"
    return found


def assert_trained_alike(found, expected):
    (losses, states), (own_losses, own) = found, expected
    assert losses == pytest.approx(own_losses, abs=2e-4)
    for name, (indices, values) in own.items():
        assert states[name][0] == indices
        assert states[name][1] == pytest.approx(values, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_transformers_trainer(tmp_path, stage):
    base().save_pretrained(tmp_path / "base")
    first, second = on_two(trainers, tmp_path, tmp_path, stage)
    assert first == second
    for kind, fields in METHODS.items():
        assert_trained_alike(first[kind], trained(tmp_path / f"one {kind}", fields, 4))
        loaded = PeftModel.from_pretrained(base(), tmp_path / kind / "checkpoint-6")
        for name, (indices, values) in first[kind][1].items():
            state = leaves(loaded)[name]
            assert (state.support.indices.tolist(), state.values.tolist()) == (indices, values)


# ---------------------------------------------------------------------- the table of docs/parallel.md

ROWS = {"ZeRO stages 1 and 2": 2, "ZeRO stage 3": 3}


class ZeroCells(table.Cells):
    """The columns of one line, in DeepSpeed's engine."""

    def train(self, model, engine):
        controller = SparsityController(engine, engine.optimizer, total_steps=2)
        losses = []
        for _ in range(2):
            losses.append(table.loss(engine))
            engine.backward(losses[-1])
            engine.step()
            controller.step()
        return torch.stack(losses).detach()


def in_engine(stage, method, dynamic):
    fields = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    model = table.adapted(base(), method, dynamic)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, _ = initialize(model, optimizer, stage, zero_optimization=fields)
    return model, engine


def walked(rank):
    return {
        (wrapper, method): table.cells_of(ZeroCells(partial(in_engine, stage, method), method))
        for wrapper, stage in ROWS.items()
        for method in table.METHODS
    }


def test_the_table_says_what_happens(tmp_path):
    table.assert_as_said(ROWS, *on_two(walked, tmp_path))


# ---------------------------------------------------------------------- what looks at data


def chosen_from_data(rank):
    batches = [dict(zip("xy", batch_at(number), strict=True)) for number in range(2)]
    found = []
    for make in (Net, partial(partitioned, Net, {})):
        for selection in ("gradient", "wanda"):
            net = make()
            config = SparseConfig(selection=selection, density=0.1, target_modules=["up", "down"])
            config = select_support(
                net, config, batches, loss_fn=lambda m, batch: F.cross_entropy(m(batch["x"]), batch["y"])
            )
            assert make is Net or not any(p.numel() for p in net.parameters())
            layers = tuner_layers(get_peft_model(net, config))
            found.append({layer.name: layer.support("default").indices.tolist() for layer in layers})
    return found


def test_criteria_gather_one_layer_at_a_time(tmp_path):
    first, second = on_two(chosen_from_data, tmp_path)
    assert first == second
    assert first[:2] == first[2:]
    assert first[0] != first[1]


def refused(rank):
    errors = []
    for config in (
        SparseConfig(density=0.1, target_modules=["0"]),
        SketchConfig(mode="replace", target_modules=["1"]),
    ):
        net = partitioned(lambda: nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), {})
        with pytest.raises(NotImplementedError) as error:
            get_peft_model(net, config)
        errors.append(str(error.value))
    net = partitioned(lambda: nn.Sequential(nn.Linear(4, 4)), {})
    model = get_peft_model(net, SparseConfig(density=0.1, target_modules=["0"]))
    with pytest.raises(RuntimeError) as error:
        model(torch.ones(1, 4))
    errors.append(str(error.value))
    model = adapted("rigl")
    groups = [{"params": [p]} for p in model.parameters() if p.requires_grad]
    engine, optimizer = initialize(model, torch.optim.AdamW(groups, lr=RATE), 2)
    with pytest.raises(NotImplementedError) as error:
        SparsityController(engine, optimizer, TOTAL)
    return [*errors, str(error.value)]


def test_what_cannot_work_is_refused(tmp_path):
    embedding, replaced, outside, groups = on_two(refused, tmp_path)[0]
    assert "Target module 0: ZeRO stage 3 has partitioned its weight (Embedding)" in embedding
    assert "layer 1: mode='replace' drops the base weight" in replaced
    assert "layer 0: ZeRO stage 3 has partitioned its weight, which only DeepSpeed's engine gathers" in outside
    assert "ZeRO stage 2 steps 4 groups of an adapter's parameters one after another" in groups


def after_a_pass(rank):
    """A pass writes entries into weights; DeepSpeed moves the model, which takes them out, and then partitions it."""
    found = []
    for is_first in (False, True):
        model = adapted("nonzero", init_weights=False)
        x = batch_at(0)[0]
        if is_first:
            model(x).sum().backward()
            model.zero_grad()
        engine, _ = initialize(model, optimizer_of(model, "adamw"), 3)
        for layer in tuner_layers(model):
            assert torch.equal(full_tensor(layer.base_layer.weight), Net().get_submodule(layer.name).weight)
        loss = engine(x).square().mean()
        engine.backward(loss)
        found.append(loss.item())
    assert found[0] == found[1]


def test_a_pass_before_the_engine_leaves_no_entries_in_the_partitions(tmp_path):
    on_two(after_a_pass, tmp_path)


def with_small_buffers(rank):
    def make():
        model = memory.adapted(LlamaForCausalLM(memory.LLAMA))
        block = sum(p.numel() for p in model.base_model.model.model.layers[0].parameters())
        sizes = dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_max_live_parameters"), block)
        sizes |= {"reduce_bucket_size": 1_000, "stage3_param_persistence_threshold": 0}
        engine, _ = initialize(model, memory.trained(model), 3, zero_optimization=sizes)

        def step():
            engine.backward(engine(memory.IDS, labels=memory.IDS).loss)
            engine.step()

        return step

    return memory.compare("zero3", make)


@pytest.mark.slow
def test_a_plan_s_memory_of_one_process(tmp_path):
    (peak, planned), _ = on_two(with_small_buffers, tmp_path)
    # DeepSpeed's own buffers come on top of a plan: docs/scaling.md
    assert 1 < peak / planned < 1.6, (peak, planned)


# ---------------------------------------------------------------------- bfloat16


def in_bfloat16(rank, stage):
    """Of each step its loss, and whether the model's values are those that DeepSpeed trains, rounded."""
    model = adapted("rigl")
    engine, optimizer = initialize(
        model, optimizer_of(model, "adamw"), stage, gradient_clipping=CLIP, bf16={"enabled": True}
    )
    controller, seen = SparsityController(engine, optimizer, TOTAL), []
    for number in range(STEPS):
        x, y = batch_at(number)
        loss = F.cross_entropy(engine(x.bfloat16()).float(), y)
        engine.backward(loss)
        engine.step()
        controller.step()
        for state in leaves(model).values():
            master = full_tensor(state.values)
            assert master.dtype == torch.float32
            assert state.values.dtype == torch.bfloat16
            assert torch.equal(state.values, master.bfloat16())
        seen.append(loss.item())
    assert len(controller.history) == 2
    return seen


def both_in_bfloat16(rank):
    return [in_bfloat16(rank, stage) for stage in (2, 3)]


def test_bfloat16_keeps_float32_values_through_reselections(tmp_path):
    first, second = on_two(both_in_bfloat16, tmp_path)
    assert first == second
    expected = [loss for loss, _ in on_one("rigl", "adamw", {})]
    for losses in first:
        assert losses == pytest.approx(expected, rel=5e-3)


# ---------------------------------------------------------------------- files


def loaded_into_partitions(rank, folder):
    model = PeftModel.from_pretrained(partitioned(Net, {}), folder, is_trainable=True)
    engine, _ = initialize(model, optimizer_of(model, "adamw"), 3)
    with torch.no_grad():
        found = [engine(batch_at(0)[0])]
        with model.disable_adapter():
            found.append(engine(batch_at(0)[0]))
        model.save_pretrained(folder / str(rank))
        found.append(PeftModel.from_pretrained(Net(), folder / str(rank))(batch_at(0)[0]))
    return [output.tolist() for output in found]


@torch.no_grad()
def test_a_file_of_one_process_loads_into_partitions_and_back(tmp_path):
    model = adapted("nonzero", init_weights=False)
    model.save_pretrained(tmp_path)
    first, second = on_two(loaded_into_partitions, tmp_path, tmp_path)
    assert first == second
    x = batch_at(0)[0]
    for found, expected in zip(first, (model(x), Net()(x), model(x)), strict=True):
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)
