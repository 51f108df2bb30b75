"""Distillation inside transformers' Trainer and TRL's SFT."""

import copy

import pytest
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from sparse_peft.procedures import DistillationLoss
from tests.helpers.language_models import llama, text
from tests.procedures.test_distillation import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_trainer(kind, tokenizer, tmp_path):
    data = text(16).map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS[kind]))
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, learning_rate=0.02,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, compute_loss_func=DistillationLoss(model),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] and trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("packing", [False, True])
def test_trls_sft(packing, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS["prune"]))
    args = trl.SFTConfig(
        output_dir=tmp_path, per_device_train_batch_size=2, max_steps=3, learning_rate=0.02, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", bf16=False, max_length=16,
        packing=packing, packing_strategy="wrapped", gradient_checkpointing=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=text(16), processing_class=tokenizer,
        compute_loss_func=DistillationLoss(model, squarehead=0.1),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
