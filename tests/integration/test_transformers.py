"""transformers' own adapter methods, and what its Trainer does with checkpoints, with every method."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from sparse_peft import SparsityCallback
from sparse_peft.tuners.delta_layer import TunerLayer
from tests.helpers.language_models import llama, text
from tests.helpers.methods import METHODS, MOVING, ONE_OF_EACH_FAMILY, config
from tests.helpers.versions import transformers_adapters

IDS = torch.arange(3, 13).view(2, 5)


def logits(model):
    training = model.training
    with torch.no_grad():
        found = model.eval()(IDS).logits
    model.train(training)
    return found


@transformers_adapters
@pytest.mark.parametrize("method", METHODS)
def test_add_set_disable_save_load_and_delete(tmp_path, method):
    model, pristine = llama(), llama()
    wanted, base = {}, logits(pristine)
    for name in ("one", "two"):
        model.add_adapter(config(method, init_weights=False), adapter_name=name)
        model.set_adapter(name)
        wanted[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    assert not torch.equal(wanted["one"], wanted["two"])
    assert model.active_adapters() == ["two"]
    model.set_adapter("one")
    assert torch.equal(logits(model), wanted["one"])
    model.set_adapter(["one", "two"])
    both = logits(model)
    assert not torch.equal(both, wanted["one"]) and not torch.equal(both, wanted["two"])
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), both)

    again = llama()
    for name in ("two", "one"):
        again.load_adapter(str(tmp_path / name), adapter_name=name)
        again.set_adapter(name)
        assert torch.equal(logits(again), wanted[name]), name
    again.delete_adapter("one")
    again.set_adapter("two")
    assert torch.equal(logits(again), wanted["two"])
    again.delete_adapter("two")
    for name, module in again.named_modules():
        if isinstance(module, TunerLayer):
            assert not module.deltas
            assert torch.equal(module.get_base_layer().weight, pristine.get_submodule(name).weight)
    assert torch.equal(logits(again), base)
    by_peft = PeftModel.from_pretrained(llama(), tmp_path / "one")
    assert torch.equal(logits(by_peft), wanted["one"])


@transformers_adapters
@pytest.mark.parametrize("method", ONE_OF_EACH_FAMILY)
def test_an_added_adapter_trains_in_a_trainer(tokenizer, tmp_path, method):
    model, data = llama(), text().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.add_adapter(config(method, **MOVING.get(method, {})), adapter_name="mine")
    args = TrainingArguments(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_steps=4,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    callback = SparsityCallback()
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[callback])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert bool(callback.history) == (method in MOVING)
    again = llama()
    again.load_adapter(str(tmp_path / "checkpoint-4"), adapter_name="mine")
    assert torch.equal(logits(again), logits(model))
    model.disable_adapters()
    reference = llama()
    reference.load_state_dict(before)
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("method", METHODS)
def test_the_best_checkpoint_comes_back_whole(tokenizer, tmp_path, method):
    data = text().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    args = TrainingArguments(
        output_dir=tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_falling", greater_is_better=True,
    )  # fmt: skip
    falling = iter((3.0, 2.0, 1.0))
    # SaRA freezes what has grown after 4 steps, which is then between the best checkpoint and the last
    settings = {**MOVING.get(method, {}), **({"progressive": 4} if method == "sara" else {})}
    trainer = Trainer(
        model=get_peft_model(llama(), config(method, **settings)), args=args, train_dataset=data, eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), callbacks=[SparsityCallback()],
        compute_metrics=lambda _: {"falling": next(falling)},
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    assert torch.equal(logits(trainer.model), logits(PeftModel.from_pretrained(llama(), best)))
    for name, tensor in load_file(f"{best}/adapter_model.safetensors").items():
        assert torch.equal(get_peft_model_state_dict(trainer.model)[name], tensor), name
    last = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    assert not torch.equal(logits(trainer.model), logits(last))
