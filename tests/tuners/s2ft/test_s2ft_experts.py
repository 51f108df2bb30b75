"""S2FT on fused experts: channels of each expert, coupled, against a dense float64 reference."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from sparse_peft import S2FTConfig, select_support
from sparse_peft.adapters import compose, save_as_sparse
from sparse_peft.support import ChannelSupport, ExpertColumns
from sparse_peft.tuners.s2ft.experts import Gate
from tests.helpers.expert_models import CONFIGS, IDS, layers, mixture, reference

BATCH = {"input_ids": torch.arange(1, 31).view(2, 15), "labels": torch.arange(1, 31).view(2, 15)}


def config(**settings):
    return S2FTConfig(
        **{
            "ratio": 0.2, "target_modules": [], "target_experts": True, "init_weights": False, "scale": 1.0,
            "task_type": "CAUSAL_LM", **settings,
        }
    )  # fmt: skip


def adapted(name="qwen3_moe", implementation="eager", dtype=torch.float32, **settings):
    torch.manual_seed(1)
    return get_peft_model(mixture(name, implementation).to(dtype), config(**settings))


def hidden_channels(layer):
    """For each expert the hidden channels of ``(gate, up)``, or of down."""
    delta, base = layer.deltas["default"], layer.get_base_layer()
    rows = layer.stored_shape[0] // base.experts
    size = rows if delta.dim == 0 else layer.stored_shape[1]
    own = [delta.support.channels.long() - expert * size for expert in range(base.experts)]
    own = [channels[(channels >= 0) & (channels < size)] for channels in own]
    if "gate_up" not in layer.name:
        return [(channels,) for channels in own]
    parts = Gate.of(base.holder, base.parameter).parts(size)
    return [tuple(torch.isin(part, channels).nonzero().squeeze(1) for part in parts) for channels in own]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_expert_trains_the_same_hidden_channels_everywhere(name):
    model = adapted(name)
    for path, layer in layers(model).items():
        if "gate_up" not in path:
            continue
        down = layers(model)[path.replace("gate_up_proj", "down_proj")]
        experts = list(zip(hidden_channels(layer), hidden_channels(down), strict=True))
        size = down.stored_shape[1] if down.deltas["default"].dim == 1 else down.stored_shape[0] // 5
        for (gate, up), (own,) in experts:
            assert torch.equal(gate, own)
            assert torch.equal(up, own)
            assert len(own) == round(0.2 * size)
        assert len({tuple(own.tolist()) for _, (own,) in experts}) > 1, "experts choose by themselves"


def test_trained_channels_are_those_of_the_hidden_activation():
    """The delta acts as a wider expert: what is trained is rows of gate and up, and columns of down."""
    model = adapted("gpt_oss")
    for path, layer in layers(model).items():
        delta = layer.get_delta_weight("default").view(5, *layer.base_parameter.shape[1:])
        gate_up = "gate_up" in path
        lines = delta.any(1) if gate_up else delta.any(2)  # (in, out): outputs of gate and up, inputs of down
        down = layers(model)[path.replace("gate_up_proj", "down_proj")]
        hidden = down.get_delta_weight("default").view(5, *down.base_parameter.shape[1:]).any(2)
        wanted = hidden.repeat_interleave(2, 1) if gate_up else hidden  # gate and up take turns in gpt-oss
        assert torch.equal(lines, wanted)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("resident", [True, False])
def test_gradients_are_those_of_the_dense_loop(name, implementation, resident):
    model = adapted(name, implementation, torch.float64, resident=resident)
    dense = reference(name, model)
    loss, wanted = model(IDS, labels=IDS).loss, dense(IDS, labels=IDS).loss
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    for path, layer in layers(model).items():
        gradient = dict(dense.named_parameters())[path].grad.reshape(-1)[layer.support("default").indices.long()]
        assert torch.allclose(layer.deltas["default"].values.grad, gradient, rtol=1e-9, atol=1e-12), path


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_file_has_four_bytes_for_each_channel(tmp_path, name):
    model = adapted(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(name), tmp_path)
    kinds = set()
    for path, layer in layers(model).items():
        twin = layers(loaded)[path].settled("default")
        assert twin.support == layer.support("default")
        assert torch.equal(twin.values, layer.deltas["default"].values)
        kinds.add(type(twin.support))
    assert kinds == {ChannelSupport, ExpertColumns}
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    values = sum(layer.deltas["default"].values.numel() for layer in layers(model).values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4.5 * values + 3000
    save_as_sparse(model, tmp_path / "sparse")
    entries = PeftModel.from_pretrained(mixture(name), tmp_path / "sparse")
    with torch.no_grad():
        assert torch.allclose(entries(IDS).logits, model(IDS).logits, atol=1e-5)


def test_two_adapters_add_up_and_the_base_returns():
    base = mixture()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base.double(), config())
    model.add_adapter("other", config(seed=5, avoid=["default"]))
    for layer in layers(model).values():
        first, second = (layer.support(name).channels for name in ("default", "other"))
        assert not torch.isin(first, second).any()
    model.base_model.set_adapter(["default", "other"])
    dense = reference("qwen3_moe", model)
    with torch.no_grad():
        for path, layer in layers(model).items():
            dict(dense.named_parameters())[path].add_(layer.get_delta_weight("other"))
        assert torch.allclose(model(IDS).logits, dense(IDS).logits, rtol=1e-9, atol=1e-12)
    restored = model.unload().float().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in restored.items())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gradients_of_data_choose_channels_of_each_expert(name):
    made = select_support(mixture(name).double(), config(selection="gradient", ratio=0.25), [BATCH])
    model = get_peft_model(mixture(name), made)
    dense = mixture(name).double()
    dense(**BATCH).loss.backward()
    for path, layer in layers(model).items():
        if "gate_up" in path:
            continue
        scores = _channel_scores(dense, path, name)
        for expert, (own,) in enumerate(hidden_channels(layer)):
            if scores[expert].any():
                assert torch.equal(own, scores[expert].topk(len(own)).indices.sort().values), (path, expert)


def _channel_scores(dense, path, name):
    """``(experts, hidden)`` squared norms of the gradients of what a hidden channel has."""
    parameters = dict(dense.named_parameters())
    down = parameters[path].grad.square()
    up = parameters[path.replace("down_proj", "gate_up_proj")].grad.square()
    if name == "gpt_oss":
        return down.sum(2) + up.sum(1)[:, ::2] + up.sum(1)[:, 1::2]
    gate, up = up.sum(2).chunk(2, 1)
    return down.sum(1) + gate + up


@pytest.mark.parametrize("selection", ["activation", "product", "weight"])
def test_other_criteria_choose_channels(selection):
    made = config(selection=selection, ratio=0.25)
    if selection != "weight":
        made = select_support(mixture(), made, [BATCH])
    model = get_peft_model(mixture(), made)
    assert all(layer.deltas["default"].count > 0 for layer in layers(model).values())
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("budget", [{"k": 3}, {"r": 2}, {"num_params": 4000}, {"ratio": 0.3, "allocation": "global"}])
@pytest.mark.parametrize("settings", [{}, {"coupled": False}, {"side": "in"}, {"side": "out"}])
def test_budgets_and_sides(budget, settings):
    model = adapted(ratio=None, **budget, **settings) if "ratio" not in budget else adapted(**budget, **settings)
    trained = sum(layer.deltas["default"].values.numel() for layer in layers(model).values())
    if "r" in budget:
        wanted = sum(2 * 5 * (sum(layer.base_parameter.shape[1:])) for layer in layers(model).values())
        assert wanted <= trained <= 1.5 * wanted
    if "num_params" in budget:
        assert 0.6 * 4000 <= trained <= 4000
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(layer.deltas["default"].values.grad.isfinite().all() for layer in layers(model).values())


def test_folders_of_channels_of_experts_are_not_composed(tmp_path):
    for number in (0, 1):
        adapted(seed=number).save_pretrained(tmp_path / str(number))
    with pytest.raises(NotImplementedError, match=r"experts.*loaded model only.*save_as_sparse"):
        compose([tmp_path / "0", tmp_path / "1"], tmp_path / "sum")


def test_channels_of_experts_are_no_lora():
    model = adapted()
    layer = next(iter(layers(model).values()))
    with pytest.raises(ValueError, match=r"gate_up_proj: channels of fused experts are no LoRA"):
        layer.deltas["default"].lora_factors(1)


def test_columns_of_experts():
    support = ExpertColumns((6, 4), 2, torch.tensor([1, 3, 4]), name="w")
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0][:, [1, 3]] = True
    mask[1][:, 0] = True
    assert torch.equal(support.to_mask(), mask.view(6, 4))
    assert support.nnz == 9
    for start, stop in [(0, 3), (3, 6), (1, 5)]:
        part, first, last = support.of_rows(start, stop)
        assert torch.equal(part.to_mask(), mask.view(6, 4)[start:stop])
        assert last - first == part.nnz
    with pytest.raises(ValueError, match="columns contain 8"):
        ExpertColumns((6, 4), 2, torch.tensor([1, 8]), name="w")
    with pytest.raises(ValueError, match="6 rows are not those of 4"):
        ExpertColumns((6, 4), 4, torch.tensor([1]))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_single_expert_trains_its_channels(name):
    count = "num_experts" if name == "qwen3_moe" else "num_local_experts"
    model = get_peft_model(mixture(name, **{count: 1}, num_experts_per_tok=1), config())
    before = {
        key: tensor.clone() for key, tensor in mixture(name, **{count: 1}, num_experts_per_tok=1).named_parameters()
    }
    dense = mixture(name, **{count: 1}, num_experts_per_tok=1).double()
    with torch.no_grad():
        for path, layer in layers(model).items():
            dense.get_parameter(path).add_(layer.get_delta_weight("default"))
    loss, wanted = model(IDS, labels=IDS).loss, dense(IDS, labels=IDS).loss
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted.float(), atol=1e-5, rtol=1e-5)
    for path, layer in layers(model).items():
        state = layer.deltas["default"]
        expected = dense.get_parameter(path).grad.reshape(-1)[state.support.indices.long()]
        torch.testing.assert_close(state.values.grad.double(), expected.double(), atol=1e-6, rtol=1e-4)
    for key, tensor in model.unload().named_parameters():
        assert torch.equal(tensor, before[key]), key
