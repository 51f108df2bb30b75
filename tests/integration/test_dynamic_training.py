"""Prune and regrow inside transformers' Trainer and the trainers of TRL."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparse_peft import SM3, SparseAdamW, SparsityCallback
from sparse_peft.tuners.delta_layer import SparseTunerLayer
from sparse_peft.tuners.files.positions import pack
from tests.helpers.language_models import llama, text
from tests.helpers.methods import config
from tests.helpers.optimizers import bnb_optimizers_run

trl = pytest.importorskip("trl")


def dynamic(selection="accumulated_gradient", **fields):
    window = {"set": 0, "rigl": 1}.get(selection, 2)
    return config(**{"selection": selection, "reselect_every": 4, "accumulate": window, **fields})


def arguments(folder, cls=TrainingArguments, **fields):
    fields = {
        "max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 0.02, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, **fields,
    }  # fmt: skip
    return cls(output_dir=folder, **fields)


def trainer_of(tokenizer, args, peft_config, callbacks=(), optimizer=None, rows=16, **fields):
    data = text(rows).map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    model = get_peft_model(llama(), peft_config)
    if optimizer is not None:
        cls, options = optimizer
        fields["optimizer_cls_and_kwargs"] = cls, {**options, **({"peft_model": model} if cls is SM3 else {})}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collator,
        callbacks=[SparsityCallback(), *callbacks], **fields,
    )  # fmt: skip


def callback_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SparsityCallback))


CASES = {
    "spiel-ag": ("accumulated_gradient", {}, None),
    "spiel-ag, ages": ("accumulated_gradient", {}, (SparseAdamW, {"lr": 0.02})),
    "spiel-ma, sm3": ("momentum", {}, (SM3, {"lr": 0.02})),
    "rigl, 8 bit": ("rigl", {"optim": "adamw_bnb_8bit"}, None),
    "set, adafactor": ("set", {"optim": "adafactor"}, None),
    "lift": ("principal", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(tokenizer, tmp_path, case):
    selection, options, optimizer = CASES[case]
    if "bnb" in options.get("optim", "") and not bnb_optimizers_run():
        pytest.skip("this version of bitsandbytes has no optimizers for the CPU")
    options = {
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "save_strategy": "steps",
        "lr_scheduler_type": "linear", **options,
    }  # fmt: skip

    def run(folder, seed, save_steps, **kwargs):
        args = arguments(folder, save_steps=save_steps, **options)
        # one epoch: transformers 5.0 does not find its place in a later one
        trainer = trainer_of(tokenizer, args, dynamic(selection, seed=seed), optimizer=optimizer, rows=64)
        trainer.train(**kwargs)
        return trainer

    whole = run(tmp_path / "whole", 0, save_steps=1)
    history = callback_of(whole).history
    assert [r.step for r in history] == ([2, 6, 10] if selection in ("accumulated_gradient", "momentum") else [4, 8])
    assert sum(r.replaced for r in history) > 0
    saved = torch.load(tmp_path / "whole" / "checkpoint-10" / "optimizer.pt", weights_only=True)
    for stop in (1, 5, 6):  # in the first window, in a later one, right after it
        checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
        seed = 0 if selection == "set" else 5
        resumed = run(tmp_path / f"resumed-{stop}", seed, save_steps=10, resume_from_checkpoint=checkpoint)
        for (name, a), (_, b) in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), f"{name} after resuming from step {stop}"
        other = torch.load(tmp_path / f"resumed-{stop}" / "checkpoint-10" / "optimizer.pt", weights_only=True)
        assert_same_tree(saved["state"], other["state"])
        assert callback_of(resumed).history == history


def assert_same_tree(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_the_best_model_is_loaded_with_its_own_positions(tokenizer, tmp_path):
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = trainer_of(tokenizer, args, dynamic())
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2"), "the loss falls, so the largest is the first"
    saved = load_file(f"{best}/adapter_model.safetensors")
    again = PeftModel.from_pretrained(llama(), best).eval()
    ids = torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)
    for name, module in trainer.model.named_modules():
        if isinstance(module, SparseTunerLayer):
            assert again.get_submodule(name).support("default") == module.support("default")
            for part, tensor in pack(module.support("default")).items():
                assert torch.equal(tensor, saved[f"{name}.sparse_peft_delta_adapter.{part}"])


def test_training_by_epochs_knows_its_length(tokenizer, tmp_path):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer = trainer_of(tokenizer, args, dynamic(first_replace_rate=0.2))
    trainer.train()
    # 16 rows, 2 a batch, 2 batches a step: 8 steps
    assert [(r.step, r.rate) for r in callback_of(trainer).history] == [
        (2, 0.2),
        (6, pytest.approx(0.2 * (1 - 6 / 8))),
    ]


def test_early_stopping_ends_it_tidily(tokenizer, tmp_path):
    args = arguments(
        tmp_path, learning_rate=5.0, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, max_steps=30,
    )  # fmt: skip
    trainer = trainer_of(tokenizer, args, dynamic(), [EarlyStoppingCallback(early_stopping_patience=3)])
    trainer.train()
    assert trainer.state.global_step < 30
    state = trainer.optimizer.state_dict()
    assert "sparse_peft" not in state["param_groups"][0], "the controller let go"
    trainer.train()  # and a second training begins a new one
    assert callback_of(trainer).controller.completed_steps == trainer.state.global_step


class Reporter(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def test_what_happened_is_logged(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, arguments(tmp_path, logging_steps=1), dynamic())
    trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if "sparsity/density" in row}
    assert sorted(rows) == [2, 6, 10]
    for record in callback_of(trainer).history:
        for key, value in record.logs().items():
            assert rows[record.step][key] == value
    json.dumps(trainer.state.log_history)


def test_several_reselections_between_two_logs_are_all_logged(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, arguments(tmp_path, logging_steps=10), dynamic())
    trainer.train()
    rows = [row["step"] for row in trainer.state.log_history if "sparsity/density" in row]
    assert rows == [2, 6, 10]


def test_reporters_see_it_through_the_trainer(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, arguments(tmp_path, logging_steps=100), dynamic())
    trainer.remove_callback(SparsityCallback)
    reporter = Reporter()
    trainer.add_callback(reporter)
    trainer.add_callback(SparsityCallback(trainer))
    trainer.train()
    assert [row["sparsity/replaced"] for row in reporter.rows if "sparsity/replaced" in row] == [
        record.replaced for record in callback_of(trainer).history
    ]


def test_sft(tokenizer, tmp_path):
    args = arguments(tmp_path, trl.SFTConfig, bf16=False, max_length=16, save_strategy="steps", save_steps=10)
    trainer = trl.SFTTrainer(
        model=llama(), args=args,
        train_dataset=text(), processing_class=tokenizer, peft_config=dynamic(), callbacks=[SparsityCallback()],
    )  # fmt: skip
    trainer.train()
    assert callback_of(trainer).history[0].replaced > 0
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-10").eval()
    ids = torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def test_sft_without_the_callback_says_what_is_missing(tokenizer, tmp_path):
    trainer = trl.SFTTrainer(
        model=llama(), args=arguments(tmp_path, trl.SFTConfig, bf16=False, max_length=16), train_dataset=text(),
        processing_class=tokenizer, peft_config=dynamic(),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("SparsityCallback()" in str(w.message) for w in caught) == 1
