"""Procedures inside transformers' Trainer and the trainers of TRL."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from sparse_peft import SparsityCallback
from sparse_peft.procedures import FisherAnchor, GradientMask, ImportanceLearningRate, LayerSampling, SplitMerge
from tests.helpers.language_models import llama, text
from tests.helpers.methods import config
from tests.integration.test_trl import JUDGED, LOOPS, PAIRS, logits

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")
GENERAL = [{"input_ids": torch.arange(3, 13).view(2, 5), "labels": torch.arange(4, 14).view(2, 5)}]
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def all_of_them():
    return [
        LayerSampling("ist", share=0.5, batches=GENERAL, every=2),
        SplitMerge(2),
        ImportanceLearningRate(GENERAL, every=3),
        FisherAnchor(GENERAL, weight=1.0),
        GradientMask(0.5),
    ]


def arguments(folder, cls=TrainingArguments, **fields):
    return cls(
        output_dir=folder, per_device_train_batch_size=2, learning_rate=0.02, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, **{"max_steps": 7, "save_strategy": "no", **fields},
    )  # fmt: skip


@pytest.mark.parametrize("peft_config", [LORA, config(density=0.1)], ids=["lora", "sparse"])
def test_a_resumed_run_with_all_procedures_is_the_uninterrupted_one(tokenizer, tmp_path, peft_config):
    data = text(32).map(lambda row: tokenizer(row["text"]), remove_columns=["text"])

    def run(folder, **given):
        args = arguments(folder, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
        callback = SparsityCallback(procedures=all_of_them())
        trainer = Trainer(
            model=get_peft_model(llama(), peft_config), args=args, train_dataset=data, eval_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), callbacks=[callback],
        )  # fmt: skip
        trainer.train(**given)
        return trainer, callback

    whole, callback = run(tmp_path / "whole")
    rows = [row for row in whole.state.log_history if "sparsity/highest" in row]
    assert len(rows) >= 3 and [record.step for record in callback.history] == [2, 3, 4, 6, 6]
    assert all(p.requires_grad for name, p in whole.model.named_parameters() if "default" in name)
    resumed, again = run(tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert again.history == callback.history
    assert whole.evaluate()["eval_loss"] == resumed.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "loop", ["sft", "dpo", pytest.param("kto", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow)]
)
def test_trls_trainers(tokenizer, tmp_path, loop):
    rows = {"dpo": PAIRS, "kto": JUDGED}
    if loop == "sft":
        trainer_cls, args_cls, settings, data, more = trl.SFTTrainer, trl.SFTConfig, {"max_length": 16}, text(), {}
    else:
        trainer_cls, args_cls, settings, data, more = LOOPS[loop]
        data = Dataset.from_list(rows.get(loop, data))
    callback = SparsityCallback(procedures=[LayerSampling("random", share=0.5), SplitMerge(2)])
    model = llama()
    args = args_cls(
        output_dir=tmp_path, max_steps=4, learning_rate=0.05, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, save_strategy="no", **{"per_device_train_batch_size": 2, **settings},
    )  # fmt: skip
    trainer = trainer_cls(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=LORA,
        callbacks=[callback], **more,
    )  # fmt: skip
    start = logits(trainer.model)
    trainer.train()
    assert callback.controller.completed_steps == 4
    assert not torch.equal(logits(trainer.model), start)
    assert not any(module._forward_pre_hooks for name, module in trainer.model.named_modules() if "proj" in name)
