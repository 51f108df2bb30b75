"""Training with transformers' Trainer and TRL on small random models."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from small import METHODS, config, llama, text
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from sparse_peft import SparsityCallback
from sparse_peft.tuners.tuner_layer import TunerLayer

trl = pytest.importorskip("trl")


def base_is_untouched(model):
    pristine = dict(llama().named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, TunerLayer):
            module.release()
            name = name.removeprefix("base_model.model.")
            assert torch.equal(module.base_layer.weight, pristine[f"{name}.weight"]), name


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "_adapter.default." in n}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_saves_and_leaves_the_base_alone(tokenizer, tmp_path, checkpointing, method):
    args = trl.SFTConfig(
        output_dir=tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        logging_steps=1, save_steps=3, use_cpu=True, gradient_accumulation_steps=2, bf16=False,
        gradient_checkpointing=checkpointing, disable_tqdm=True, max_length=16,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=llama(),
        args=args,
        train_dataset=text(),
        processing_class=tokenizer,
        peft_config=config(method),
        callbacks=[SparsityCallback()],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert [row["step"] for row in trainer.state.log_history if "sparsity/frozen" in row] == [3] * (method == "sara")
    ranks = [row["step"] for row in trainer.state.log_history if "sparsity/rank" in row]
    assert ranks == ([2, 4, 6] if method == "sora" else [])
    base_is_untouched(trainer.model)
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6").eval()
    ids = torch.randint(0, 20, (2, 5))
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model(ids).logits)


@pytest.mark.parametrize("method", METHODS)
def test_trainer_resume_equals_the_uninterrupted_run(tokenizer, tmp_path, method):
    data = text().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])

    def run(folder, seed, steps=6, **kwargs):
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
            save_steps=3, use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        own = {"sara": {"progressive": 3, "seed": seed}, "sora": {}, "sketch": {}}.get(method, {"seed": seed})
        model = llama()
        torch.manual_seed(seed)
        model = get_peft_model(model, config(method, **own))
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(
            model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[SparsityCallback()]
        )
        trainer.train(**kwargs)
        return trainer.model

    whole = run(tmp_path / "whole", 0)
    # SaRA's seed picks the layers of its nuclear norms and is part of the config, not of a checkpoint
    seed = 0 if method == "sara" else 77
    resumed = run(
        tmp_path / "resumed", seed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )  # this model drew other positions: the checkpoint's are the ones that count
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items()):
        assert torch.equal(a, b), name


def dpo_arguments(folder, **fields):
    return trl.DPOConfig(
        output_dir=folder, per_device_train_batch_size=2, report_to=[], logging_steps=1, use_cpu=True,
        disable_tqdm=True, bf16=False, max_length=16, **{"learning_rate": 0.05, **fields},
    )  # fmt: skip


def test_dpo_with_the_base_as_reference(tokenizer, tmp_path):
    rows = [{"prompt": "the quick", "chosen": "brown fox jumps", "rejected": "lazy dog runs"}] * 8
    args = dpo_arguments(tmp_path, max_steps=4)
    trainer = trl.DPOTrainer(
        model=llama(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "rewards/margins" in row]
    # at the first step policy and reference are the same model
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["rewards/margins"] > 0.01
    base_is_untouched(trainer.model)


@pytest.mark.parametrize("method", METHODS)
def test_dpo_with_a_trained_adapter_as_reference(tokenizer, tmp_path, method):
    rows = [{"prompt": "the quick", "chosen": "brown fox jumps", "rejected": "lazy dog runs"}] * 8
    policy = get_peft_model(llama(), config(method, init_weights=False))
    started = values(policy)
    args = dpo_arguments(tmp_path, max_steps=2)
    trainer = trl.DPOTrainer(
        model=policy,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[SparsityCallback()],
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    compared = []
    for name, parameter in trainer.model.named_parameters():
        if "_adapter.ref." in name:
            assert torch.equal(parameter, started[name.replace(".ref.", ".default.")]), name
            compared.append(name)
    assert len(compared) == len(started)


def test_tables_in_the_place_of_the_weights(tokenizer, tmp_path):
    """The reference model of DPO is the first sketch, so its margins begin at zero."""
    rows = [{"prompt": "the quick", "chosen": "brown fox jumps", "rejected": "lazy dog runs"}] * 8
    args = dpo_arguments(tmp_path, max_steps=4, learning_rate=0.01, save_steps=4)
    trainer = trl.DPOTrainer(
        model=llama(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config("sketch", mode="replace", bits=4),
    )
    first = {m.name: m.base_layer.codebook.clone() for m in trainer.model.modules() if isinstance(m, TunerLayer)}
    trainer.train()
    log = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["rewards/margins"] > 0.001
    trained = {m.name: m for m in trainer.model.modules() if isinstance(m, TunerLayer)}
    for name, layer in trained.items():
        assert torch.equal(layer.base_layer.codebook, first[name])
        assert not torch.equal(layer.deltas["default"].codebook, first[name])
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-4").eval()
    ids = torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def test_accelerate_state_and_compiled_training(tmp_path, tokenizer):
    data = text().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    results = []
    for backend in (None, "eager"):
        args = TrainingArguments(
            output_dir=tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
            use_cpu=True, disable_tqdm=True, torch_compile=backend is not None, torch_compile_backend=backend,
        )  # fmt: skip
        trainer = Trainer(
            model=get_peft_model(llama(), config()), args=args, train_dataset=data, data_collator=copy.copy(collator)
        )
        trainer.train()
        results.append(values(trainer.model))
        torch._dynamo.reset()
    for (name, a), (_, b) in zip(results[0].items(), results[1].items()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
