"""Engines that fuse projections, stack experts and shard by tensor parallelism get the same entries."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_peft.sync import FusedLayout, PatchError, PlainLayout, Publisher, Receiver, checkpoint_shapes
from tests.helpers.expert_models import CONFIGS, adapted, mixture
from tests.helpers.fused_engine import KV_HEADS, assert_same, fuse
from tests.helpers.language_models import small_llama
from tests.helpers.methods import config


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("method", ["sparse", "s2ft", "sora"])
def test_fused_and_sharded_engines_have_the_merged_models_entries(method, size):
    base = small_llama(num_key_value_heads=KV_HEADS)
    engines = [fuse(base.state_dict(), rank, size) for rank in range(size)]
    own = copy.deepcopy(engines)
    model = get_peft_model(base, config(method, init_weights=False))
    publisher, shapes = Publisher(model), checkpoint_shapes(model)
    known = None if size == 1 else publisher.base
    receivers = [
        Receiver(engine, FusedLayout(engine, shapes, rank=rank, size=size), base=known)
        for rank, engine in enumerate(engines)
    ]
    for _ in range(2):
        publication = publisher.publish()
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        for rank, receiver in enumerate(receivers):
            receiver.apply_(publication)
            assert_same(engines[rank], fuse(merged, rank, size))
        publisher.acknowledge(publication.sequence)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for rank, receiver in enumerate(receivers):
        receiver.restore_()
        assert_same(engines[rank], own[rank])


class Expert(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name, shape in zip(names, [(6, 8), (6, 8), (8, 6)], strict=True):
            self.add_module(name, nn.Linear(shape[1], shape[0], bias=False))

    def forward(self, x):
        gate, up, down = self.children()
        return down(torch.relu(gate(x)) * up(x))


class Experts(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.experts = nn.ModuleList(Expert(names) for _ in range(3))

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")], ids=str)
def test_experts_are_stacked(names):
    base = nn.ModuleDict({"mlp": Experts(names)})
    base.forward = base["mlp"].forward

    def stack(model):
        experts = [list(expert.children()) for expert in model["mlp"].experts]
        return {
            "mlp.experts.w13_weight": torch.stack([torch.cat([g.weight, u.weight]) for g, u, _ in experts]).detach(),
            "mlp.experts.w2_weight": torch.stack([d.weight for *_, d in experts]).detach(),
        }

    engine = stack(base)
    fields = {"target_modules": list(names), "task_type": None}
    model = get_peft_model(base, config("sparse", init_weights=False, **fields))
    Receiver(engine, FusedLayout(engine, checkpoint_shapes(model))).apply_(Publisher(model).publish())
    assert_same(engine, stack(copy.deepcopy(model).merge_and_unload()))


def test_parameters_of_all_experts_are_stacked():
    names = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}

    def stack(model):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".experts." in name}
        return {name.replace(leaf := name.rpartition(".")[2], names[leaf]): state[name] for name in state}

    engine, model = stack(mixture("qwen3_moe")), adapted("qwen3_moe")
    Receiver(engine, FusedLayout(engine, checkpoint_shapes(model))).apply_(Publisher(model).publish())
    assert_same(engine, stack(copy.deepcopy(model).merge_and_unload()))
    shard = {name: tensor[:, :8].contiguous() for name, tensor in engine.items()}
    with pytest.raises(PatchError, match="the trainer's"):
        Receiver(shard, FusedLayout(shard, checkpoint_shapes(model))).apply_(Publisher(model).publish())


@pytest.mark.parametrize(
    "settings",
    [
        config("sparse", modules_to_save=["lm_head"]),
        config("sora"),
        config("sparse", trainable_token_indices=[1, 2]),
        LoraConfig(target_modules="all-linear"),
    ],
    ids=["saved whole", "factors", "trained tokens", "lora"],
)
def test_checkpoint_shapes_are_those_without_adapters(settings):
    shapes = {name: tuple(tensor.shape) for name, tensor in small_llama().state_dict().items()}
    model = get_peft_model(small_llama(), settings)
    assert checkpoint_shapes(model) == checkpoint_shapes(model.get_base_model()) == shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_shapes_of_experts(name):
    shapes = {key: tuple(tensor.shape) for key, tensor in mixture(name).state_dict().items()}
    assert checkpoint_shapes(adapted(name)) == shapes


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("first.weight", (3, 4), "no parameter"),
        ("model.layers.0.self_attn.q_proj.weight", (32, 31), "the trainer's"),
        ("model.layers.0.self_attn.z_proj.weight", (32, 32), "no layout is known"),
        ("model.layers.0.mlp.experts.3.w1.weight", (32, 32), "no parameter"),
        ("model.layers.0.mlp.experts.3.w9.weight", (32, 32), "no layout is known for 'w9'"),
    ],
)
def test_unknown_parameters_are_refused(name, shape, message):
    state = small_llama().state_dict()
    engine = fuse(state)
    layout = FusedLayout(engine, {name: tuple(tensor.shape) for name, tensor in state.items()})
    with pytest.raises(PatchError, match=message if "first" not in name else "no layout is known"):
        layout.place(name, shape)


def test_a_plain_layout_points_to_the_fused_one():
    with pytest.raises(PatchError, match="FusedLayout"):
        PlainLayout(fuse(small_llama().state_dict())).place("model.layers.0.self_attn.q_proj.weight", (32, 32))


def test_a_shards_base_cannot_be_checked():
    base = small_llama()
    engine = fuse(base.state_dict(), 0, 2)
    model = get_peft_model(base, config("sparse"))
    with pytest.raises(PatchError, match=r"base=publisher\.base"):
        Receiver(engine, FusedLayout(engine, checkpoint_shapes(model), size=2)).apply_(Publisher(model).publish())


def test_ranks_are_checked():
    with pytest.raises(ValueError, match="rank=2"):
        FusedLayout({}, {}, rank=2, size=2)
