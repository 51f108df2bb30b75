"""S2FT against a dense float64 reference, and what it promises: saved activations, exact supports, mixed batches."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import sparse_peft
from sparse_peft import S2FTConfig, panel_limit, select_support
from sparse_peft.report import layer_paths
from sparse_peft.support import ChannelSupport
from tests.helpers.language_models import small_llama
from tests.helpers.memory import saved_bytes
from tests.helpers.two_layers import layers_of

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 0.3},
}


def layer(kind, bias=True):
    if kind == "conv1d":
        module = Conv1D(12, 9)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        return module, (2, 5, 9)
    if kind == "conv2d":
        return nn.Conv2d(9, 12, (3, 2), stride=(1, 2), padding=1, bias=bias), (2, 9, 6, 5)
    return nn.Linear(9, 12, bias=bias), (2, 5, 9)


def one(kind="linear", side="in", bias=True, dtype=torch.float32, adapter_name="default", **config):
    base, shape = layer(kind, bias)
    base = base.to(dtype)
    config.setdefault("k", 4)
    config.setdefault("init_weights", False)
    reference = copy.deepcopy(base)
    model = get_peft_model(
        nn.ModuleDict({"body": base}),
        S2FTConfig(target_modules=["body"], side=side, scale=1.0, **config),
        adapter_name,
    )
    if dtype == torch.float64:
        model.to(dtype)
    tuned = model.base_model.model["body"]
    return model, tuned, reference, torch.randn(shape).to(dtype)


def effective(tuned, reference, names=("default",)):
    delta = sum(tuned.get_delta_weight(name).double() for name in names)
    weight = (reference.weight.double() + delta).to(reference.weight.dtype).double()
    dense = copy.deepcopy(reference).double()
    dense.weight = nn.Parameter(weight)
    return dense


KINDS = ["linear", "conv1d", "conv2d"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_o2_o3_the_layer_and_its_gradients_are_those_of_the_dense_weight(kind, side, resident, dtype):
    _, tuned, reference, x = one(kind, side, dtype=dtype, resident=resident)
    for limit in (2**20, 200):
        tuned.zero_grad()
        x = x.detach().requires_grad_()
        with panel_limit(limit):
            y = tuned(x)
            grad = torch.randn_like(y)
            y.backward(grad)
        dense = effective(tuned, reference)
        xd = x.detach().double().requires_grad_()
        yd = dense(xd)
        yd.backward(grad.double())
        support = tuned.support("default")
        assert isinstance(support, ChannelSupport) and support.count == 4
        torch.testing.assert_close(y.double(), yd, **TOLERANCE[dtype])
        torch.testing.assert_close(x.grad.double(), xd.grad, **TOLERANCE[dtype])
        wanted = dense.weight.grad.reshape(-1)[support.indices.long()]
        torch.testing.assert_close(tuned.deltas["default"].values.grad.double(), wanted, **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["in", "out"])
def test_o1_o15_zero_values_change_nothing_and_others_only_the_channels(kind, side):
    model, tuned, reference, x = one(kind, side, init_weights=True)
    assert torch.equal(model.base_model.model["body"](x), reference(x))
    with torch.no_grad():
        tuned.deltas["default"].values.normal_()
    delta, chosen = tuned.get_delta_weight("default"), tuned.support("default").channels.long()
    in_dim = tuned.product.in_dim
    dim = in_dim if side == "in" else 1 - in_dim
    outside = torch.ones(delta.shape[dim], dtype=torch.bool)
    outside[chosen] = False
    assert not delta.transpose(0, dim)[outside].any()
    assert delta.transpose(0, dim)[~outside].any(dim=tuple(range(1, delta.ndim))).all()
    if kind != "conv2d":
        assert torch.linalg.matrix_rank(delta) <= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_compiled(kind, side, dtype, tolerance):
    torch._dynamo.reset()
    _, tuned, _reference, x = one(kind, side, dtype=dtype)
    compiled = torch.compile(tuned, backend="aot_eager", fullgraph=True)
    x = x.requires_grad_()
    y = compiled(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    got = [y.detach(), x.grad.clone(), tuned.deltas["default"].values.grad.clone()]
    x.grad = tuned.deltas["default"].values.grad = None
    z = tuned(x)
    z.backward(grad)
    for a, b in zip(got, [z.detach(), x.grad, tuned.deltas["default"].values.grad], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- saved activations


TOKENS, WIDTH, HIDDEN = 8, 64, 160


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_o4_only_the_trained_inputs_are_saved(kind):
    base = nn.Linear(HIDDEN, WIDTH) if kind == "linear" else Conv1D(WIDTH, HIDDEN)
    x = torch.randn(2, TOKENS // 2, HIDDEN, requires_grad=True)
    model = get_peft_model(nn.ModuleDict({"body": base}), S2FTConfig(target_modules=["body"], side="in", k=6))
    tuned = model.base_model.model["body"]
    assert saved_bytes(tuned, x.mul(1))[0] == TOKENS * 6 * 4
    tuned.resident = False
    assert saved_bytes(tuned, x.mul(1))[0] == TOKENS * 6 * 4


def test_o4_a_convolution_saves_its_trained_inputs():
    base = nn.Conv2d(32, 16, 3)
    model = get_peft_model(nn.ModuleDict({"body": base}), S2FTConfig(target_modules=["body"], side="in", k=3))
    x = torch.randn(2, 32, 7, 7, requires_grad=True)
    assert saved_bytes(model.base_model.model["body"], x.mul(1))[0] == 2 * 3 * 49 * 4


class Inputs(nn.Module):
    """A llama whose embedding's output requires a gradient, as an unfrozen first layer's would."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embeddings):
        return self.model(inputs_embeds=embeddings).logits


def llama_saved(config=None):
    model = small_llama().requires_grad_(False)
    if config is not None:
        model = get_peft_model(model, config)
    torch.manual_seed(1)
    x = torch.randn(2, 16, 32, requires_grad=True)
    return saved_bytes(Inputs(model), x * 1)[0]


def test_o4_a_model_keeps_the_frozen_body_and_the_trained_inputs_alone():
    frozen = llama_saved()
    ours = llama_saved(S2FTConfig(target_modules=["down_proj"], k=5))
    assert ours - frozen == 2 * (2 * 16) * 5 * 4
    both = llama_saved(S2FTConfig(k=2))
    assert both - frozen == 2 * 2 * (2 * 16) * 2 * 4
    lora = llama_saved(LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
    assert both - frozen <= 0.1 * (lora - frozen)


# ---------------------------------------------------------------------- training


def test_o5_o12_sgd_is_dense_sgd_masked_to_the_channels_and_state_is_small():
    model, tuned, reference, x = one("linear", "in", init_weights=True)
    support = tuned.support("default")
    dense = copy.deepcopy(reference)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * 12
    ours = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        for module in (tuned, dense):
            module(x).square().mean().backward()
        with torch.no_grad():
            dense.weight -= 0.1 * dense.weight.grad * support.to_mask()
        dense.zero_grad()
        ours.step()
        ours.zero_grad()
    delta = tuned.get_delta_weight("default")
    torch.testing.assert_close(reference.weight + delta, dense.weight, rtol=1e-5, atol=1e-6)
    adam = torch.optim.AdamW(trained)
    tuned(x).sum().backward()
    adam.step()
    moments = [t for state in adam.state.values() for t in state.values() if t.ndim]
    assert sum(t.numel() for t in moments) == 2 * 4 * 12


@pytest.mark.parametrize("side", ["in", "out"])
def test_o13_o14_accumulation_and_checkpointing(side):
    _, tuned, _, x = one("linear", side)
    values = tuned.deltas["default"].values
    tuned(x).square().sum().backward()
    whole, values.grad = values.grad.clone(), None
    for part in x.split(1):
        tuned(part).square().sum().backward()
    torch.testing.assert_close(values.grad, whole)
    for reentrant in (True, False):
        values.grad = None
        checkpoint(tuned, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(values.grad, whole)


# ---------------------------------------------------------------------- merging, several adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_o7_o8_merging_is_exact_both_ways(kind, side, dtype):
    model, tuned, reference, x = one(kind, side, dtype=dtype)
    with torch.no_grad():
        expected = tuned(x)
        for _ in range(20):
            model.merge_adapter()
            assert torch.equal(tuned.base_layer(x), expected)
            model.unmerge_adapter()
        assert torch.equal(tuned.get_base_layer().weight, reference.weight)
        with model.disable_adapter():
            assert torch.equal(tuned(x), reference(x))


@pytest.mark.parametrize("kind", KINDS)
def test_o9_adapters_that_avoid_one_another_are_orthogonal_and_fuse_in_any_order(kind):
    model, tuned, reference, x = one(kind, k=4)
    model.add_adapter(
        "other", S2FTConfig(target_modules=["body"], side="in", k=5, avoid=["default"], init_weights=False)
    )
    first, second = (tuned.support(name).channels.tolist() for name in ("default", "other"))
    assert not set(first) & set(second) and len(second) == 5
    deltas = [tuned.get_delta_weight(name) for name in ("default", "other")]
    assert float((deltas[0] * deltas[1]).sum()) == 0
    outputs = []
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        outputs.append(tuned(x).detach())
        model.merge_adapter()
        torch.testing.assert_close(tuned.base_layer(x), outputs[-1])
        model.unmerge_adapter()
    assert torch.equal(*outputs)
    assert isinstance(tuned.active_support(), ChannelSupport) and tuned.active_support().count == 9
    torch.testing.assert_close(
        outputs[0].double(), effective(tuned, reference, ("default", "other"))(x.double()), rtol=1e-4, atol=1e-4
    )


def test_adapters_that_overlap_add_up():
    model, tuned, reference, x = one(k=4)
    model.add_adapter("other", S2FTConfig(target_modules=["body"], side="in", k=7, seed=1, init_weights=False))
    model.add_adapter("rows", S2FTConfig(target_modules=["body"], side="out", k=3, init_weights=False))
    for names in (["default", "other"], ["default", "rows"], ["rows", "other", "default"]):
        model.base_model.set_adapter(names)
        expected = effective(tuned, reference, names)(x.double())
        torch.testing.assert_close(tuned(x).double(), expected, rtol=1e-4, atol=1e-4)
        tuned(x).sum().backward()


def test_avoid_that_cannot_be_met():
    model, *_ = one(k=6)
    with pytest.raises(ValueError, match=r"layer body: 4 units .*only 3 of 9 are left by avoid=\['default'\]"):
        model.add_adapter("other", S2FTConfig(target_modules=["body"], side="in", k=4, avoid=["default"]))
    with pytest.raises(ValueError, match=r"avoid=.*no adapter 'nobody'.*'default'"):
        model.add_adapter("third", S2FTConfig(target_modules=["body"], side="in", k=2, avoid=["nobody"]))
    with pytest.raises(ValueError, match=r"avoid=.*does not train output channels"):
        model.add_adapter("fourth", S2FTConfig(target_modules=["body"], side="out", k=2, avoid=["default"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("names", ["a b c", "c a a", "__base__ b b a __base__", "b b", "__base__"])
def test_o11_a_mixed_batch_is_each_item_by_itself(kind, side, names):
    model, tuned, _, x = one(kind, side, adapter_name="a")
    for n, name in enumerate("bc"):
        model.add_adapter(
            name, S2FTConfig(target_modules=["body"], side=side, k=2 + 3 * n, seed=n + 1, init_weights=False)
        )
    names = names.split()
    x = torch.randn(len(names), *x.shape[1:])
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            mixed = tuned(x, adapter_names=names)
            for i, name in enumerate(names):
                model.base_model.set_adapter([] if name == "__base__" else name)
                torch.testing.assert_close(mixed[i], tuned(x)[i], rtol=1e-4, atol=1e-4)
            for delta in tuned.deltas.values():
                delta.values.mul_(1.5)  # the adapters side by side are made anew


def test_mixed_batches_with_both_sides():
    model, tuned, _, x = one(adapter_name="a")
    model.add_adapter("b", S2FTConfig(target_modules=["body"], side="out", k=2, init_weights=False))
    model.eval()
    mixed = tuned(x, adapter_names=["a", "b"])
    for i, name in enumerate("ab"):
        model.base_model.set_adapter(name)
        torch.testing.assert_close(mixed[i], tuned(x)[i], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- budgets and structures


def channels(model, name="default"):
    return {n.rpartition("layers.")[2]: m.support(name).channels for n, m in layers_of(model).items()}


def test_o16_per_layer_counts_are_constant_and_seeds_decide():
    first = channels(get_peft_model(small_llama(), S2FTConfig(ratio=0.1)))
    assert {n: c.numel() for n, c in first.items()} == {
        "0.self_attn.o_proj": 3,
        "0.mlp.down_proj": 9,
        "1.self_attn.o_proj": 3,
        "1.mlp.down_proj": 9,
    }
    again = channels(get_peft_model(small_llama(), S2FTConfig(ratio=0.1)))
    other = channels(get_peft_model(small_llama(), S2FTConfig(ratio=0.1, seed=1)))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["0.mlp.down_proj"], other["0.mlp.down_proj"])
    assert not torch.equal(first["0.mlp.down_proj"], first["1.mlp.down_proj"])


@pytest.mark.parametrize("selection", ["random", "weight"])
def test_o16_a_global_budget_is_met_exactly(selection):
    model = get_peft_model(
        small_llama(num_hidden_layers=6), S2FTConfig(ratio=0.03, allocation="global", selection=selection)
    )
    found = channels(model)
    downs = [c.numel() for n, c in found.items() if "down" in n]
    outs = [c.numel() for n, c in found.items() if "o_proj" in n]
    assert sum(downs) == round(6 * 0.03 * 88) and len(set(downs)) > 1
    assert sum(outs) == round(6 * 0.03 * 32)
    x = torch.randint(0, 40, (1, 5))
    model(x, labels=x).loss.backward()  # layers without any channel take part


def test_budgets():
    def trained(**budget):
        model = get_peft_model(small_llama(), S2FTConfig(**budget))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trained(k=7) == 2 * 2 * 7 * 32
    lora = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    lora = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert lora <= trained(r=2) < lora + 4 * 32
    for wanted in (128, 1000, 1024, 5000):
        for allocation in ("per_layer", "global"):
            got = trained(num_params=wanted, allocation=allocation)
            assert wanted - (64 if allocation == "per_layer" else 32) < got <= wanted
    found = channels(
        get_peft_model(small_llama(), S2FTConfig(ratio=0.1, ratio_pattern={"o_proj": 0.5, r"0\.mlp.*": 1}))
    )
    assert [c.numel() for c in found.values()] == [16, 88, 16, 9]
    with pytest.raises(ValueError, match=r"num_params=100.*128"):
        trained(num_params=100)
    with pytest.raises(ValueError, match=r"k=40: layer .*o_proj has 32 channels"):
        trained(k=40)
    with pytest.warns(RuntimeWarning, match="ratio_pattern: no target layer matches 'nothing'"):
        trained(ratio_pattern={"nothing": 0.1})


def test_heads_are_blocks_of_channels():
    found = channels(get_peft_model(small_llama(), S2FTConfig(ratio=0.25, granularity="head")))
    for name, chosen in found.items():
        if "o_proj" in name:
            assert chosen.numel() == 8 and chosen[0] % 8 == 0 and torch.equal(chosen, chosen[0] + torch.arange(8))
        else:
            assert chosen.numel() == 22


def test_coupled_heads_follow_the_groups_of_queries():
    config = S2FTConfig(ratio=0.5, granularity="head", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    found = channels(get_peft_model(small_llama(), config))
    for n in "01":
        group = int(found[f"{n}.self_attn.v_proj"][0]) // 8
        assert found[f"{n}.self_attn.k_proj"].tolist() == list(range(8 * group, 8 * group + 8))
        for name in "qo":
            wanted = range(16 * group, 16 * group + 16)
            assert found[f"{n}.self_attn.{name}_proj"].tolist() == list(wanted)
    config = S2FTConfig(ratio=0.25, granularity="head", target_modules=["q_proj", "o_proj"])
    found = channels(get_peft_model(small_llama(), config))
    assert found["0.self_attn.q_proj"].tolist() == found["0.self_attn.o_proj"].tolist()
    assert found["0.self_attn.q_proj"].numel() == 8


def test_coupled_channels_are_those_that_meet():
    every = ["v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "q_proj"]
    model = get_peft_model(small_llama(), S2FTConfig(ratio=0.2, target_modules=every))
    found = channels(model)
    for n in "01":
        assert torch.equal(found[f"{n}.mlp.up_proj"], found[f"{n}.mlp.down_proj"])
        assert torch.equal(found[f"{n}.mlp.up_proj"], found[f"{n}.mlp.gate_proj"])
        v, o = found[f"{n}.self_attn.v_proj"].tolist(), found[f"{n}.self_attn.o_proj"].tolist()
        # head g of the values serves the query heads 2g and 2g + 1
        assert o == sorted((2 * (c // 8) + r) * 8 + c % 8 for c in v for r in (0, 1))
        assert found[f"{n}.self_attn.q_proj"].numel() == 6
    free = channels(get_peft_model(small_llama(), S2FTConfig(ratio=0.2, target_modules=every, coupled=False)))
    assert not torch.equal(free["0.mlp.up_proj"], free["0.mlp.down_proj"])


def test_o6_a_coupled_unit_is_a_part_of_the_function():
    """Zeroing a unit of v changes nothing if its columns of o are zero: they belong together."""
    every = ["v_proj", "o_proj"]
    model = small_llama()
    x = torch.randint(0, 40, (2, 7))
    tuned = get_peft_model(copy.deepcopy(model), S2FTConfig(ratio=0.3, target_modules=every))
    for wrong in (False, True):
        first, second = copy.deepcopy(model), None
        with torch.no_grad():
            for n, block in enumerate(first.model.layers):
                columns = channels(tuned)[f"{n}.self_attn.o_proj"].long()
                block.self_attn.o_proj.weight[:, (columns + 1) % 32 if wrong else columns] = 0
            second = copy.deepcopy(first)
            for n, block in enumerate(second.model.layers):
                rows = channels(tuned)[f"{n}.self_attn.v_proj"].long()
                block.self_attn.v_proj.weight[rows] = 0
        same = torch.allclose(first(x).logits, second(x).logits, atol=1e-6)
        assert same != wrong


def test_gpt2s_conv1d_and_defaults():
    model = get_peft_model(
        GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)), S2FTConfig(ratio=0.25)
    )
    names = {n.rpartition("h.0.")[2]: m for n, m in layers_of(model).items()}
    assert set(names) == {"attn.c_proj", "mlp.c_proj"}
    for module in names.values():
        support = module.support("default")
        assert support.dim == 0 and support.count == module.in_features // 4


@pytest.mark.parametrize("largest", [None, True, False])
@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
def test_criteria_choose_what_their_formulas_say(selection, largest):
    model, x = small_llama(), torch.randint(0, 40, (3, 9))
    batches = [{"input_ids": x[i : i + 1], "labels": x[i : i + 1]} for i in range(3)]
    config = S2FTConfig(k=3, selection=selection, largest=largest, target_modules=["down_proj", "q_proj"])
    if selection != "weight":
        with pytest.raises(ValueError, match=r"neither chosen nor loaded.*select_support"):
            get_peft_model(small_llama(), copy.copy(config))
        config = select_support(model, config, batches)
    found = channels(get_peft_model(copy.deepcopy(model), config))
    for n in range(2):
        for kind, module in (("mlp.down_proj", model.model.layers[n].mlp.down_proj),
                             ("self_attn.q_proj", model.model.layers[n].self_attn.q_proj)):  # fmt: skip
            is_input = "down" in kind
            weights = module.weight.norm(dim=0 if is_input else 1)
            seen, scores = [], 0
            handle = module.register_forward_hook(
                lambda m, a, y, seen=seen, is_input=is_input: seen.append((a[0] if is_input else y).detach())
            )
            for batch in batches:
                model.zero_grad()
                model(**batch).loss.backward()
                scores = scores + module.weight.grad.square().sum(0 if is_input else 1)
            handle.remove()
            activations = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).norm(dim=0)
            score = {"weight": weights, "activation": activations, "product": weights * activations,
                     "gradient": scores.sqrt()}[selection]  # fmt: skip
            take_largest = selection == "gradient" if largest is None else largest
            wanted = score.topk(3, largest=take_largest).indices.sort().values
            assert found[f"{n}.{kind}"].tolist() == wanted.tolist()


def test_gradients_that_are_known_already():
    model = small_llama()
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    config = S2FTConfig(k=3, selection="gradient", target_modules=["down_proj"])
    found = channels(get_peft_model(model, select_support(model, config, gradients=gradients)))
    wanted = gradients["model.layers.1.mlp.down_proj.weight"].norm(dim=0).topk(3).indices.sort().values
    assert found["1.mlp.down_proj"].tolist() == wanted.tolist()
    gradients["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.down_proj: its gradient has NaN"):
        select_support(small_llama(), config, gradients=gradients)
    with pytest.raises(ValueError, match="gradients= with selection='activation'"):
        select_support(small_llama(), S2FTConfig(selection="activation"), gradients=gradients)


@pytest.mark.parametrize("largest", [True, False])
def test_a_units_score_is_the_norm_over_its_channels_in_all_its_layers(largest):
    model = small_llama()
    config = S2FTConfig(
        ratio=0.5,
        granularity="head",
        selection="weight",
        largest=largest,
        target_modules=["v_proj", "o_proj", "up_proj"],
    )
    found = channels(get_peft_model(copy.deepcopy(model), config))
    for n, block in enumerate(model.model.layers):
        v, o = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight
        scores = v.view(2, -1).square().sum(1) + o.view(32, 2, -1).square().sum((0, 2))
        head = int(scores.argmax() if largest else scores.argmin())
        assert found[f"{n}.self_attn.v_proj"].tolist() == list(range(8 * head, 8 * head + 8))
        assert found[f"{n}.self_attn.o_proj"].tolist() == list(range(16 * head, 16 * head + 16))


def test_activations_of_a_coupled_unit_are_those_at_the_input_of_down():
    model, x = small_llama(), torch.randint(0, 40, (3, 9))
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, y: seen.append(a[0].detach()))
    model(x)
    handle.remove()
    config = S2FTConfig(k=4, selection="activation", target_modules=["up_proj", "gate_proj", "down_proj"])
    config = select_support(model, config, [{"input_ids": x}])
    wanted = seen[0].reshape(-1, 88).norm(dim=0).topk(4, largest=False).indices.sort().values
    found = channels(get_peft_model(model, config))
    for name in ("up_proj", "gate_proj", "down_proj"):
        assert found[f"0.mlp.{name}"].tolist() == wanted.tolist()


# ---------------------------------------------------------------------- files and errors


@pytest.mark.parametrize("config", [
    {"k": 3}, {"ratio": 0.25, "granularity": "head"}, {"selection": "weight"}, {"ratio": 0.05, "allocation": "global"},
    {"target_modules": ["up_proj", "down_proj", "q_proj"], "k": 2},
], ids=str)  # fmt: skip
def test_files(tmp_path, config):
    model = get_peft_model(small_llama(), S2FTConfig(init_weights=False, **config))
    x = torch.randint(0, 40, (1, 6))
    expected = model(x).logits
    model.save_pretrained(tmp_path)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    values = sum(t.numel() for n, t in tensors.items() if n.endswith("values"))
    assert sum(t.nbytes for t in tensors.values()) <= 4 * values + 4 * 3 * 2 * 88
    again = PeftModel.from_pretrained(small_llama(), tmp_path)
    assert torch.equal(again(x).logits, expected)
    plain = small_llama()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(plain(x).logits, expected)


def test_a_data_driven_adapter_reloads_without_data(tmp_path):
    model, x = small_llama(), torch.randint(0, 40, (2, 6))
    config = select_support(model, S2FTConfig(k=3, selection="gradient"), [{"input_ids": x, "labels": x}])
    tuned = get_peft_model(model, config)
    expected = channels(tuned)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small_llama(), tmp_path)
    assert all(torch.equal(expected[n], c) for n, c in channels(again).items())


def test_the_other_side_or_another_base_is_refused(tmp_path):
    get_peft_model(small_llama(), S2FTConfig(k=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight_shapes: .*\(32, 32\).*layer model.layers.0.self_attn.q_proj"):
        PeftModel.from_pretrained(small_llama(hidden_size=64), tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    content["sides"] = {name: "in" for name in content["sides"]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has rows where this model's adapter trains columns"):
        PeftModel.from_pretrained(small_llama(), tmp_path)


@pytest.mark.parametrize("kwargs, message", [
    ({"ratio": 1.5}, "ratio=1.5: a share in"),
    ({"ratio": "much"}, "ratio='much': a share"),
    ({"k": 0}, "k=0: an int of at least 1"),
    ({"k": 2.5}, "k=2.5: an int"),
    ({"k": 2, "r": 3}, "k=2 and r=3 are both given"),
    ({"side": "left"}, "side='left': one of 'auto', 'in', 'out'"),
    ({"granularity": "row"}, "granularity='row'"),
    ({"allocation": "even"}, "allocation='even': one of 'per_layer', 'global'"),
    ({"selection": "magnitude"}, "selection='magnitude': one of 'random', 'weight'"),
    ({"largest": True}, "largest=True with selection='random'"),
    ({"avoid": "default"}, r"avoid='default': a list"),
    ({"ratio_pattern": {"a": 2}}, r"ratio_pattern\['a'\]=2"),
    ({"num_params": 10, "ratio_pattern": {"a": 0.5}}, "num_params=10 and ratio_pattern"),
])  # fmt: skip
def test_configs_that_are_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        S2FTConfig(**kwargs)


def test_heads_where_there_are_none():
    with pytest.raises(ValueError, match=r"granularity='head': the 9 channels of layer o_proj.*config names none"):
        get_peft_model(
            nn.ModuleDict({"o_proj": nn.Linear(9, 9)}), S2FTConfig(granularity="head", target_modules=["o_proj"])
        )
    with pytest.raises(ValueError, match=r"granularity='head': layer .*q_proj has its heads on its output side"):
        get_peft_model(small_llama(), S2FTConfig(granularity="head", side="in", target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="body is a Conv2d of 3 groups"):
        get_peft_model(nn.ModuleDict({"body": nn.Conv2d(6, 6, 3, groups=3)}), S2FTConfig(target_modules=["body"]))


def test_pickled_models_work():
    model, tuned, _, x = one()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.base_model.model["body"](x), tuned(x))


def test_layer_paths_name_the_channels():
    model, *_ = one()
    assert "columns=4" in repr(model)
    (path,) = layer_paths(model)
    assert path.gradient == "channels" and "4 whole columns" in path.why
    assert sparse_peft.S2FTModel.target_module_mapping["llama"] == ["o_proj", "down_proj"]
