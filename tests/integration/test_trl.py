"""TRL's preference and reward trainers with every method, while its positions, ranks or frozen entries change.

The reference of DPO, KTO and GRPO is the policy as it was at the start, to the bit: without the adapter where training
starts with a new one, and in TRL's copy of it, the adapter "ref", where it goes on with one.
"""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel, get_peft_model

from sparse_peft import SparsityCallback
from sparse_peft.tuners.base_state import TrainedState
from tests.helpers.language_models import WORDS, llama, sequence_classifier
from tests.helpers.methods import ALWAYS, METHODS, MOVING, ONE_OF_EACH_FAMILY, config

trl = pytest.importorskip("trl")

PAIRS = [{"prompt": "the quick", "chosen": "brown fox jumps", "rejected": "lazy dog runs"}] * 8
JUDGED = [
    {"prompt": "the quick", "completion": completion, "label": label}
    for completion, label in (("brown fox jumps", True), ("lazy dog runs", False), ("fox jumps", True), ("dog", False))
] * 4
IDS = torch.arange(3, 13).view(2, 5)


def counts_known_words(completions, **_):
    """Verifiable without a model: how many different words of the text there are in it."""
    return [float(len(set(text.split()) & set(WORDS))) for text in completions]


GRPO = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "per_device_train_batch_size": 4}
LOOPS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"max_length": 16}, PAIRS, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"max_length": 16, "per_device_train_batch_size": 4}, JUDGED, {}),
    "grpo": (
        trl.GRPOTrainer, trl.GRPOConfig, GRPO, [{"prompt": "the quick"}] * 8, {"reward_funcs": counts_known_words}
    ),
}  # fmt: skip


def moving(method, **fields):
    return config(method, **{**MOVING.get(method, {}), **fields})


def trained(loop, model, folder, tokenizer, **given):
    trainer_cls, args_cls, settings, rows, more = LOOPS[loop]
    settings = {"per_device_train_batch_size": 2, **settings}
    args = args_cls(
        output_dir=folder, max_steps=5, learning_rate=0.05, report_to=[], logging_steps=1, use_cpu=True, bf16=False,
        disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    callback = SparsityCallback()
    trainer = trainer_cls(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[callback], **more, **given,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SparsityCallback")
        trainer.train()
    assert trainer.state.global_step == 5
    return trainer, callback


def logits(model):
    training = model.training
    with torch.no_grad():
        found = model.eval()(IDS).logits
    model.train(training)
    return found


def states(model, adapter):
    """Everything one adapter has, ``{layer: {tensor: values}}``."""
    return {
        module.name: {key: tensor.clone() for key, tensor in module.state_dict().items()}
        for name, module in model.named_modules()
        if isinstance(module, TrainedState) and name.endswith(f".{adapter}")
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and found
    for layer, tensors in wanted.items():
        assert found[layer].keys() == tensors.keys(), layer
        for key, tensor in tensors.items():
            assert torch.equal(found[layer][key], tensor), f"{layer}: {key}"


def assert_structure_changed(method, policy, start, history):
    """That the run did what the method does besides stepping values, so that the reference was put to the test."""
    end = states(policy, "default")
    if method in ("sparse", "sltrain"):
        assert sum(record.replaced for record in history) > 0
        assert any(not torch.equal(end[layer]["packed"], start[layer]["packed"]) for layer in start)
    elif method == "sora":
        assert sum(int((state["gate"] == 0).sum()) for state in end.values()) > 0
    elif method == "sara":
        assert history and history[0].frozen > 0


# DPO with every method, the others with one of each family; the rest of them is slow.
CASES = [
    pytest.param(loop, method, marks=() if loop == "dpo" or method in ALWAYS else pytest.mark.slow)
    for loop in LOOPS
    for method in METHODS
]


def log_of(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(("loop", "method"), CASES)
def test_the_reference_of_a_trained_adapter_is_the_policy_it_was(tokenizer, tmp_path, loop, method):
    policy = get_peft_model(llama(), moving(method, init_weights=False))
    start, before = logits(policy), states(policy, "default")
    trainer, callback = trained(loop, policy, tmp_path, tokenizer)
    policy = trainer.model
    if loop == "kto" and Version(trl.__version__) < Version("1.16"):
        pytest.skip("the KTO of TRL 1.0 keeps no copy of a trained adapter")
    assert_structure_changed(method, policy, before, callback.history)
    assert not torch.equal(logits(policy), start)
    assert_same(states(policy, "ref"), before)
    if loop == "dpo":
        # at the first step policy and reference are the same model, so that no answer has an edge
        assert log_of(trainer)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    policy.set_adapter("ref")
    assert torch.equal(logits(policy), start), "the reference is the starting policy to the bit"
    policy.set_adapter("default")
    policy.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert torch.equal(logits(again), logits(policy))


@pytest.mark.parametrize(("loop", "method"), CASES)
def test_the_reference_of_a_new_adapter_is_the_base(tokenizer, tmp_path, loop, method):
    base = logits(llama())
    trainer, _ = trained(loop, llama(), tmp_path, tokenizer, peft_config=moving(method))
    policy = trainer.model
    assert not torch.equal(logits(policy), base)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), base), "the reference is the starting policy to the bit"
    log = log_of(trainer)
    if loop == "dpo":
        assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6) and log[-1]["rewards/margins"] > 0
    if loop == "grpo":
        assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[-1]["kl"] > 0
        rewards = [row["reward"] for row in log]
        assert max(rewards) > 0 and len(set(rewards)) > 1, "the function judged different completions"


def test_tables_in_the_place_of_the_weights(tokenizer, tmp_path):
    """Without its adapter such a model is the first sketch, and that is DPO's reference."""
    sketched = config("sketch", mode="replace", bits=4)
    first = logits(get_peft_model(llama(), copy.copy(sketched)))
    trainer, _ = trained("dpo", llama(), tmp_path, tokenizer, peft_config=sketched)
    policy, log = trainer.model, log_of(trainer)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6) and log[-1]["rewards/margins"] > 0
    assert not torch.equal(logits(policy), first)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), first)
    policy.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "saved")), logits(policy))


@pytest.mark.parametrize("method", ONE_OF_EACH_FAMILY)
def test_reward_models(tokenizer, tmp_path, method):
    rows = [{side: f"{pair['prompt']} {pair[side]}" for side in ("chosen", "rejected")} for pair in PAIRS]
    args = trl.RewardConfig(
        output_dir=tmp_path, max_steps=5, per_device_train_batch_size=4, learning_rate=0.05, report_to=[],
        logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, max_length=16, save_steps=5,
        lr_scheduler_type="constant",
    )  # fmt: skip
    base = sequence_classifier()
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft_config = moving(method, task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = trl.RewardTrainer(
        model=base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft_config, callbacks=[SparsityCallback()],
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in log_of(trainer)]
    assert losses[-1] < losses[0]
    with trainer.model.disable_adapter():
        wanted = sequence_classifier()
        wanted.load_state_dict(pristine)
        assert torch.equal(logits(trainer.model), logits(wanted))
    again = PeftModel.from_pretrained(sequence_classifier(), tmp_path / "checkpoint-5")
    assert torch.equal(logits(again), logits(trainer.model))
