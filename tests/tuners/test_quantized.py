"""bitsandbytes bases on CPU, and backends that cannot merge or are not known."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.tuners import base_layer, delta_layer, targets
from tests.helpers.quantized import build, check_against_the_dense_reference, dequantised

bnb = pytest.importorskip("bitsandbytes")


def adapted(kind, **config):
    config = {"density": 0.1, "init_weights": False, **config}
    return get_peft_model(build(kind), SparseConfig(target_modules=["first", "second"], **config))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_forward_and_gradients_equal_the_dense_reference(kind):
    check_against_the_dense_reference(adapted(kind))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_unmerge_gives_the_packed_weight_back_exactly(kind):
    model = adapted(kind)
    pristine = build(kind)
    x = torch.randn(3, 128)
    before = model(x).detach()
    with pytest.warns(UserWarning, match="quantisation again"):
        model.merge_adapter()
    assert not torch.equal(model.base_model.model.first.base_layer.weight, pristine.first.weight)
    assert (model(x) - before).abs().max() < 0.5 * before.abs().max()
    for _ in range(3):
        model.unmerge_adapter()
        for name in ("first", "second"):
            layer = getattr(model.base_model.model, name)
            assert torch.equal(layer.base_layer.weight, getattr(pristine, name).weight)
        assert torch.equal(model(x), before)
        with pytest.warns(UserWarning, match="quantisation again"):
            model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(model(x), pristine(x))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_only_the_input_is_saved(kind):
    model = adapted(kind)
    x = torch.randn(2, 128)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(x)
    assert max(sizes) <= 2 * 128


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_save_load_delete_and_disable(kind, tmp_path):
    model = adapted(kind)
    x = torch.randn(3, 128)
    y = model(x).detach()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind), tmp_path, is_trainable=True)
    pristine = build(kind)
    assert torch.equal(again(x), y)
    with again.disable_adapter():
        assert torch.equal(again(x), pristine(x))
    again.delete_adapter("default")
    assert torch.equal(again.base_model(x), pristine(x))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_base_passes_in_eval_mode_leave_the_packed_weight_alone(kind):
    base = build(kind).eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        base(x)  # bitsandbytes may repack a 4-bit weight for this CPU here
    model = get_peft_model(
        base, SparseConfig(target_modules=["first", "second"], density=0.1, init_weights=False)
    ).eval()
    with torch.no_grad():
        y = model(x)
        packed = model.base_model.model.first.base_layer.weight.clone()
        with model.disable_adapter():
            model(x)
        assert torch.equal(model(x), y)
    assert torch.equal(model.base_model.model.first.base_layer.weight, packed)
    layers = [model.base_model.model.first, model.base_model.model.second]
    weights = [dequantised(m) + m.get_delta_weight("default").double() for m in layers]
    expected = torch.relu(x.double() @ weights[0].t() + layers[0].bias.double()) @ weights[1].t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-2)


def test_a_whole_step_moves_the_values_only():
    model = adapted("4bit")
    packed = model.base_model.model.first.base_layer.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    values = model.base_model.model.first.deltas["default"].values
    before = values.detach().clone()
    model(torch.randn(8, 128)).pow(2).sum().backward()
    optimizer.step()
    assert (values != before).float().mean() > 0.9
    assert torch.equal(model.base_model.model.first.base_layer.weight, packed)


def test_values_rounded_behind_our_back_are_restored_before_the_first_step():
    model = adapted("4bit")
    model.train()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)  # as TRL does on quantised bases
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    with pytest.warns(UserWarning, match="were cast to torch.bfloat16"):
        model(torch.randn(4, 128)).sum().backward()
    optimizer.step()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())


@pytest.mark.parametrize("selection", ["magnitude", "principal", "random", "nonzero"])
def test_criteria_look_at_the_dequantised_weight(selection):
    model = adapted("4bit", selection=selection, density=0.05)
    layer = model.base_model.model.first
    assert layer.support("default").shape == (64, 128)
    if selection == "magnitude":
        score = layer.dequantised().abs().reshape(-1)
        chosen = score[layer.support("default").indices.long()]
        assert chosen.min() >= score.sort(descending=True).values[chosen.numel() - 1]


class ForwardOnly:
    """PEFT's backend of packed weights that nothing can be written to."""

    supports_merge, backend_name = False, "gptq"

    def maybe_clone_base_result(self, x):
        return x


def test_backend_without_merge_uses_base_plus_delta(monkeypatch):
    for module in (base_layer, targets):
        monkeypatch.setattr(module, "resolve_quantization_backend", lambda base, **kw: ForwardOnly())
    model = get_peft_model(
        nn.Sequential(nn.Linear(9, 7)), SparseConfig(target_modules=["0"], density=0.3, init_weights=False)
    )
    layer = model.base_model.model[0]
    x = torch.randn(4, 9, requires_grad=True)
    y = model(x)
    y.sum().backward()
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").t()
    torch.testing.assert_close(y, expected)
    assert (layer.deltas["default"].values.grad != 0).all()
    with pytest.raises(ValueError, match="layer 0: a gptq base cannot be merged into"):
        model.merge_adapter()


def test_unknown_quantised_layer_is_refused_by_name():
    class MysteryLinear(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(TypeError, match=r"Target module 0 of type .*MysteryLinear holds torch\.uint8 weights"):
        get_peft_model(nn.Sequential(MysteryLinear()), SparseConfig(target_modules=["0"]))


def test_deepcopy_while_merged():
    model = adapted("4bit")
    x = torch.randn(2, 128)
    before = model(x).detach()
    with pytest.warns(UserWarning):
        model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(twin(x), before)
    torch.save(twin.state_dict(), io.BytesIO())


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_positions_change_on_a_quantised_base(kind):
    config = {"selection": "accumulated_gradient", "reselect_every": 4, "accumulate": 2, "init_weights": True}
    model = adapted(kind, **config)
    layers = [m for m in model.modules() if isinstance(m, delta_layer.SparseTunerLayer)]
    packed = [layer.base_layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = SparsityController(model, optimizer, total_steps=12)
    x, target = torch.randn(16, 128), torch.randn(16, 32)
    losses = []
    for step in range(12):
        before = [layer.support("default") for layer in layers]
        y = model(x)
        loss = (y - target).square().mean()
        loss.backward()
        if step == 0:  # the candidates are the dense gradient's largest outside the support
            window = controller.parts["adapters"]["default"].tracks["second"].window
            hidden = torch.relu(layers[0](x)).detach()
            dense = (2 * (y - target) / y.numel()).detach().t() @ hidden
            dense = dense.reshape(-1).abs()
            dense[before[1].indices.long()] = 0
            best = dense.topk(window.positions.numel()).indices.sort().values
            assert torch.isin(window.positions, best).float().mean() > 0.97, "8-bit products round"
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [record.step for record in controller.history] == [2, 6, 10] and controller.history[1].replaced > 0
    for layer, weight in zip(layers, packed, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)
