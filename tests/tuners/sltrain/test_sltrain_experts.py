"""The sparse part of SLTrain on fused experts, beside both parts on linear layers."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from sparse_peft import SLTrainConfig, select_support
from sparse_peft.adapters import compose
from sparse_peft.tuners.sltrain.delta import SLTrainDelta
from tests.helpers.expert_models import IDS, layers, mixture, reference, train


def config(**settings):
    return SLTrainConfig(
        **{
            "r": 2, "density": 0.1, "target_modules": ["q_proj", "o_proj"], "target_experts": True, "scale": 1.0,
            "init_weights": False, "task_type": "CAUSAL_LM", **settings,
        }
    )  # fmt: skip


def adapted(name="qwen3_moe", implementation="eager", dtype=torch.float64, **settings):
    torch.manual_seed(1)
    return get_peft_model(mixture(name, implementation).to(dtype), config(**settings))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_layers_have_both_parts_and_experts_the_sparse_one(name):
    model = adapted(name)
    dense = reference(name, model)
    loss, wanted = model(IDS, labels=IDS).loss, dense(IDS, labels=IDS).loss
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)
    for path, layer in layers(model).items():
        state = layer.deltas["default"]
        assert isinstance(state, SLTrainDelta) == ("experts" not in path)
        parameter = dict(dense.named_parameters()).get(path, dict(dense.named_parameters()).get(f"{path}.weight"))
        gradient = parameter.grad.reshape(-1)[state.support.indices.long()]
        assert torch.allclose(state.values.grad, gradient, rtol=1e-6, atol=1e-10), path


def test_files_copies_and_compositions(tmp_path):
    for number in (0, 1):
        model = adapted(dtype=torch.float32, seed=number)
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(mixture(), tmp_path / str(number))
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "sum")
    joined = PeftModel.from_pretrained(mixture(), tmp_path / "sum")
    parts = [layers(PeftModel.from_pretrained(mixture(), tmp_path / str(number))) for number in (0, 1)]
    for path, layer in layers(joined).items():
        wanted = sum(one[path].get_delta_weight("default") for one in parts)
        assert torch.allclose(layer.get_delta_weight("default"), wanted, atol=1e-5), path


def test_a_second_adapter_switching_merging_and_unloading():
    base = mixture()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, config())
    with torch.no_grad():
        first = model(IDS).logits
        model.add_adapter("other", config(seed=4))
        model.set_adapter("other")
        assert not torch.equal(model(IDS).logits, first)
        model.set_adapter("default")
        assert torch.equal(model(IDS).logits, first)
        model.merge_adapter()
        assert torch.allclose(model(IDS).logits, first, atol=1e-5)
        model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unload().state_dict().items())


def test_positions_change_and_come_from_data():
    batches = [{"input_ids": IDS, "labels": IDS}]
    made = select_support(mixture(), config(selection="gradient", density=0.02), batches)
    assert {path for path in made.supports if "experts" in path}
    model = adapted(dtype=torch.float32, init_weights=True, selection="set", reselect_every=2).train()
    before = {path: layer.support("default").indices.clone() for path, layer in layers(model).items()}
    losses = train(model, 6, total_steps=6)
    assert losses[-1] < losses[0]
    assert all(
        not torch.equal(layer.support("default").indices, before[path]) for path, layer in layers(model).items()
    )


@pytest.mark.parametrize("fields", [{"target_experts": True}, {"target_parameters": ["experts.down_proj"]}])
def test_pretraining_leaves_experts_alone(fields):
    with pytest.raises(ValueError, match=rf"{next(iter(fields))}=.*mode='pretrain'.*use mode='finetune'"):
        SLTrainConfig(mode="pretrain", r=4, **fields)
