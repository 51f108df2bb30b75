"""Convolutions: the layer against F.conv with the dense effective weight, in float64."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import SparseConfig, SparsityController, panel_limit, select_support, use_backend

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 0.3},
}
CASES = {
    "1d": (nn.Conv1d(6, 8, 3), (2, 6, 11)),
    "1d strided": (nn.Conv1d(6, 8, 4, stride=3, padding=2, dilation=2), (3, 6, 20)),
    "2d": (nn.Conv2d(5, 7, 3, padding=1), (2, 5, 9, 7)),
    "2d no bias": (nn.Conv2d(5, 7, (3, 2), bias=False), (2, 5, 9, 7)),
    "2d strided": (nn.Conv2d(5, 7, 3, stride=(2, 1), padding=(1, 2)), (2, 5, 9, 8)),
    "2d dilated": (nn.Conv2d(5, 7, 3, dilation=2, padding=2), (1, 5, 9, 7)),
    "2d pointwise": (nn.Conv2d(5, 16, 1), (2, 5, 4, 3)),
    "2d groups": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "2d depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "2d same": (nn.Conv2d(5, 7, (3, 4), padding="same"), (2, 5, 6, 6)),
    "2d valid": (nn.Conv2d(5, 7, 2, padding="valid"), (2, 5, 6, 6)),
    "2d circular": (nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular"), (2, 5, 6, 6)),
    "2d reflect": (nn.Conv2d(5, 7, 3, padding=(1, 2), padding_mode="reflect"), (2, 5, 6, 6)),
    "2d one item": (nn.Conv2d(5, 7, 3), (5, 6, 6)),
    "3d": (nn.Conv3d(4, 6, 2, padding=1, stride=(1, 2, 1)), (2, 4, 4, 5, 3)),
}


def adapted_conv(conv, **config):
    model = nn.Sequential(copy.deepcopy(conv))
    config.setdefault("density", 0.2)
    return get_peft_model(model, SparseConfig(target_modules=["0"], scale=1.0, init_weights=False, **config))


def layer_of(model):
    return model.base_model.model[0]


def check(model, conv, x, tol, forward=None):
    layer = layer_of(model)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (forward or model)(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    reference = copy.deepcopy(conv).double()
    effective = (conv.weight.double() + layer.get_delta_weight("default").double()).to(conv.weight.dtype).double()
    reference.weight = nn.Parameter(effective)
    xd = x.detach().double().requires_grad_()
    yd = reference(xd)
    yd.backward(grad.double())
    torch.testing.assert_close(y.double(), yd, **tol)
    torch.testing.assert_close(x.grad.double(), xd.grad, **tol)
    wanted = reference.weight.grad.reshape(-1)[layer.support("default").indices.long()]
    torch.testing.assert_close(layer.deltas["default"].values.grad.double(), wanted, **tol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "panels", "sampled"])
def test_the_layer_is_the_convolution_with_its_effective_weight(case, backend):
    conv, shape = CASES[case]
    for resident in (True, False):
        model = adapted_conv(conv, resident=resident)
        with use_backend(backend):
            check(model, conv, torch.randn(shape), TOLERANCE[torch.float32])
            with panel_limit(300):
                check(model, conv, torch.randn(shape), TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", ["1d strided", "2d", "2d groups", "2d same", "3d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(case, dtype):
    conv, shape = CASES[case]
    conv = copy.deepcopy(conv).to(dtype)
    model = adapted_conv(conv)
    model.to(torch.float64) if dtype == torch.float64 else None
    for backend in ("sampled", "panels"):
        with use_backend(backend):
            check(model, conv, torch.randn(shape).to(dtype), TOLERANCE[dtype])


def test_autocast_runs_in_its_dtype():
    conv, shape = CASES["2d"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(adapted_conv(conv), conv, torch.randn(shape), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("case", ["2d", "2d groups", "3d"])
def test_channels_last(case):
    conv, shape = CASES[case]
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    conv = copy.deepcopy(conv).to(memory_format=layout)
    model = adapted_conv(conv)
    assert not layer_of(model).base_parameter.is_contiguous()
    before = layer_of(model).base_parameter.detach().clone(memory_format=torch.preserve_format)
    assert layer_of(model).path() == "resident"
    x = torch.randn(shape).contiguous(memory_format=layout)
    check(model, conv, x, TOLERANCE[torch.float32])
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_parameter, before)


@pytest.mark.parametrize("case", ["1d", "2d", "2d same", "3d"])
def test_merge_disable_and_mixed_batches(case):
    conv, shape = CASES[case]
    model = adapted_conv(conv)
    model.add_adapter("other", SparseConfig(target_modules=["0"], density=0.1, seed=3, init_weights=False))
    x = torch.randn(3, *shape[1:])
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(x).detach()
    with model.disable_adapter():
        expected["__base__"] = model(x).detach()
    torch.testing.assert_close(expected["__base__"], conv(x))
    model.eval()
    names = ["other", "__base__", "default"]
    mixed = model(x, adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], expected[name][i], rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert type(merged[0]) is type(conv)
    torch.testing.assert_close(merged(x), expected["default"])


def test_a_base_layer_with_hooks_runs_by_itself():
    conv, shape = CASES["2d"]
    model = adapted_conv(conv)
    calls = []
    layer_of(model).get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    with panel_limit(500):
        check(model, conv, torch.randn(shape), TOLERANCE[torch.float32])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, conv, torch.randn(shape), TOLERANCE[torch.bfloat16])
    assert calls and layer_of(model).path() == "additive"


@pytest.mark.parametrize("case", ["2d", "2d groups", "2d reflect", "1d strided"])
def test_compiled(case):
    conv, shape = CASES[case]
    model = adapted_conv(conv)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(model, conv, torch.randn(shape), TOLERANCE[torch.float32], forward=lambda x: compiled(x))


@pytest.mark.parametrize("backend", ["sampled", "panels"])
def test_no_temporary_of_a_step_is_larger_than_a_panel(backend):
    conv, limit = nn.Conv2d(128, 128, 3, padding=1), 96 * 1024
    model = adapted_conv(conv, density=0.01)
    x = torch.randn(1, 128, 12, 12).requires_grad_()
    activation = x.nbytes * 14**2 // 12**2  # padded
    with panel_limit(limit), use_backend(backend), LargestTensor() as largest:
        model(x).sum().backward()
    assert conv.weight.nbytes > 2 * max(limit, activation)
    assert 0 < largest.nbytes <= max(limit, activation)


def test_positions_that_change_in_training_see_the_convolutions_gradient():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    config = {"selection": "rigl", "reselect_every": 2, "accumulate": 1, "density": 0.1, "replace_rate": 0.5}
    model = adapted_conv(conv, **config)
    layer = layer_of(model)
    with torch.no_grad():
        layer.deltas["default"].values.zero_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller = SparsityController(model, optimizer, total_steps=10)
    x, target = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    before = layer.support("default").to_mask()
    for _ in range(2):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        records = controller.step()
        optimizer.zero_grad()
    reference = copy.deepcopy(conv)
    (reference(x) - target).square().mean().backward()
    scores = reference.weight.grad.reshape(4, -1).abs().masked_fill(before, 0)
    grown = layer.support("default").to_mask() & ~before
    assert records[0].replaced == int(grown.sum()) > 0
    best = scores.reshape(-1).topk(int(grown.sum())).indices
    assert grown.reshape(-1)[best].all()


def test_subclasses_train_unless_they_compute_their_own_way():
    class Named(nn.Conv2d):
        pass

    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(torch.nn.functional.pad(x, (1, 1, 1, 1)))

    conv = Named(5, 7, 3)
    check(adapted_conv(conv), conv, torch.randn(2, 5, 6, 6), TOLERANCE[torch.float32])
    with pytest.raises(TypeError, match="Target module 0 of type Padded is not supported"):
        adapted_conv(Padded(5, 7, 3))


def test_criteria_that_look_at_data_are_for_linear_layers():
    with pytest.raises(TypeError, match=r"0 of type Conv2d.*linear layers"):
        select_support(
            nn.Sequential(nn.Conv2d(3, 4, 3)), SparseConfig(selection="gradient", target_modules=["0"]), [1]
        )
