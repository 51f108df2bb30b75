import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.measure import LargestTensor
from sparse_peft import MonarchConfig, monarch_project
from sparse_peft.adapters import compose, save_as_lora
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.quantized import build
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]


def monarch(model=None, random=True, **config):
    config = MonarchConfig(**{"target_modules": NAMES, "init_weights": not random, **config})
    return get_peft_model(TwoLayers() if model is None else model, config)


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def dense(first, second, rows, cols):
    """The delta in float64, from its definition: output s * n + l reads the numbers l, l + n, ..."""
    first, second = first.detach().double(), second.detach().double()
    nblocks, rank, width = first.shape
    whole = torch.zeros(nblocks * second.shape[1], nblocks * width, dtype=torch.float64)
    for number in range(nblocks * rank):
        k, upper = number // rank, number % nblocks
        column = second[upper, :, number // nblocks]
        whole[upper::nblocks, k * width : (k + 1) * width] += torch.outer(column, first[k, number % rank])
    return whole[:rows, :cols]


def delta(layer, adapter="default"):
    """As stored."""
    state = layer.deltas[adapter]
    made = dense(state.A, state.B, layer.out_features, layer.in_features)
    if state.subtracts:
        made = made - dense(state.A_start, state.B_start, layer.out_features, layer.in_features)
    return made if layer.product.in_dim == 1 else made.t()


@pytest.mark.parametrize("init", ["zero", "residual"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(17,), (4, 17), (2, 3, 17), (0, 17)])
def test_output_and_gradients_are_those_of_the_dense_delta(conv1d, shape, init):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d)
    model = monarch(copy.deepcopy(base), init=init)
    twin = copy.deepcopy(base).double()
    for name, layer in layers(model).items():
        getattr(twin, name).weight.data += delta(layer)
        assert torch.allclose(layer.get_delta_weight("default").double(), delta(layer), atol=1e-5)
    x = torch.randn(*shape, requires_grad=True)
    z = x.detach().double().requires_grad_()
    out, want = model(x), twin(z)
    assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-4)
    up = torch.randn_like(out)
    out.backward(up)
    want.backward(up.double())
    assert torch.allclose(x.grad.double(), z.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["zero", "residual"])
def test_starts_as_the_base_to_the_bit_and_the_base_stays(init):
    base = TwoLayers()
    model = monarch(copy.deepcopy(base), random=False, init=init)
    x = torch.randn(4, 17)
    assert torch.equal(model(x), base(x))
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_parameter, getattr(base, name).weight)
        assert not bool(layer.get_delta_weight("default").any())
    model(x).square().sum().backward()
    state = layers(model)["second"].deltas["default"]
    assert bool(state.B.grad.any()) and bool(state.A.grad.any()) == (init == "residual")


def test_the_residual_starts_as_the_projection_of_the_weight():
    model = monarch(random=False, init="residual", nblocks=3, blk_r=3)
    for layer in layers(model).values():
        state = layer.deltas["default"]
        made = monarch_project(layer.base_parameter.detach(), 3, 3)
        rows, cols = layer.stored_shape
        assert torch.allclose(dense(state.A, state.B, rows, cols).float(), made.to_dense(), atol=1e-6)


def test_parameters_are_as_many_as_loras():
    model = monarch(nn.Sequential(nn.Linear(64, 32)), target_modules=["0"], nblocks=4, blk_r=4)
    (layer,) = layers(model).values()
    assert sum(p.numel() for p in layer.deltas["default"].parameters()) == 4 * (64 + 32)
    assert torch.linalg.matrix_rank(delta(layer)) == 16


def test_no_step_makes_a_tensor_of_the_weights_size():
    model = monarch(nn.Sequential(nn.Linear(300, 200)), target_modules=["0"])
    x = torch.randn(8, 300)
    for action in (lambda: model(x).sum(), lambda: model(x).sum().backward()):
        with LargestTensor() as largest:
            action()
        assert 0 < largest.nbytes <= 4 * 8 * 300


@pytest.mark.parametrize("init", ["zero", "residual"])
def test_file_merge_and_unmerge(tmp_path, init):
    base = TwoLayers()
    model = monarch(copy.deepcopy(base), init=init)
    model.save_pretrained(tmp_path)
    tensors = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert tensors == {"A", "B", *(("A_start", "B_start") if init == "residual" else ())}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 17)
    want = model(x)
    assert torch.equal(loaded(x), want)
    loaded.merge_adapter()
    assert torch.allclose(loaded(x), want, atol=1e-4)
    loaded.unmerge_adapter()
    assert all(torch.equal(layer.base_parameter, getattr(base, name).weight) for name, layer in layers(loaded).items())
    assert torch.equal(loaded(x), want)
    assert torch.equal(loaded.unload()(x), base(x))


@pytest.mark.parametrize("init", ["zero", "residual"])
def test_exact_as_plain_lora(tmp_path, init):
    base = TwoLayers()
    model = monarch(copy.deepcopy(base), init=init)
    config = save_as_lora(model, tmp_path)
    assert config.r == (16 if init == "zero" else 32)
    x = torch.randn(3, 17)
    assert torch.allclose(PeftModel.from_pretrained(base, tmp_path)(x), model(x), atol=1e-4)


def test_sums_of_adapters_are_exact(tmp_path):
    base = TwoLayers()
    configs = [{"blk_r": 4}, {"blk_r": 2, "target_modules": ["second"]}, {"init": "residual", "blk_r": 4}]
    parts = []
    for n, config in enumerate(configs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = monarch(copy.deepcopy(base), **config)
        model.save_pretrained(tmp_path / str(n))
        parts.append({name: delta(layer) for name, layer in layers(model).items()})
    weights = [1.0, -0.5, 2.0]
    config = compose([tmp_path / str(n) for n in range(3)], tmp_path / "sum", weights=weights)
    assert (config.nblocks, config.blk_r, config.init) == (4, 16, "zero")
    model = PeftModel.from_pretrained(base, tmp_path / "sum")
    for name, layer in layers(model).items():
        want = sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)
        assert torch.allclose(layer.get_delta_weight("default").double(), want, atol=1e-4)
    monarch(copy.deepcopy(base), nblocks=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"layer first: adapters with nblocks of 2 and 4.*save_as_lora"):
        compose([tmp_path / "0", tmp_path / "other"], tmp_path / "no")
    with pytest.raises(ValueError, match="combination_type='ties'"):
        compose([tmp_path / "0", tmp_path / "0"], tmp_path / "no", combination_type="ties")


def test_a_mixed_batch():
    base = TwoLayers()
    model = monarch(copy.deepcopy(base))
    model.add_adapter("other", MonarchConfig(nblocks=2, blk_r=2, target_modules=NAMES, init_weights=False))
    x = torch.randn(4, 17)
    names = ["other", "__base__", "default", "other"]
    mixed = model.eval()(x, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        want = base(x[row]) if name == "__base__" else model(x[row])
        assert torch.allclose(mixed[row], want, atol=1e-5)


def test_half_precision_starts_as_the_base():
    base = TwoLayers().to(torch.bfloat16)
    model = monarch(copy.deepcopy(base), random=False, init="residual")
    x = torch.randn(4, 17, dtype=torch.bfloat16)
    assert torch.equal(model(x), base(x)) and model(x).dtype == torch.bfloat16
    assert layers(model)["first"].deltas["default"].A.dtype == torch.float32


def test_blocks_that_do_not_mix_cause_a_warning_once(tmp_path):
    with pytest.warns(UserWarning, match=r"blk_r=2 with nblocks=4: the blocks do not mix, and 50% of each delta"):
        model = monarch(blk_r=2)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(TwoLayers(), tmp_path)
        monarch(blk_r=4)


def test_convolutions_and_ranks_that_no_layer_has_are_refused():
    with pytest.raises(TypeError, match=r"Target module 0 of type Conv2d: Monarch matrices are for.*exclude_modules"):
        monarch(nn.Sequential(nn.Conv2d(4, 4, 3)), target_modules=["0"])
    with pytest.raises(ValueError, match=r"nblocks \* blk_r: a rank of 400 for layer first"):
        monarch(nblocks=20, blk_r=20)
    with pytest.raises(ValueError, match=r"init='svd'.*'residual'"):
        MonarchConfig(init="svd")


def test_projections_of_other_things_are_refused():
    with pytest.raises(ValueError, match=r"weight of shape \(2, 2, 2\)"):
        monarch_project(torch.ones(2, 2, 2))
    with pytest.raises(TypeError, match=r"dtype torch.int8.*dequantise"):
        monarch_project(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="nblocks=0"):
        monarch_project(torch.ones(2, 2), nblocks=0)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("init", ["zero", "residual"])
def test_a_quantised_base(kind, init):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = monarch(build(kind), init=init)
    x = torch.randn(6, 128)
    out, want = model(x), x.double()
    for name in NAMES:
        layer = layers(model)[name]
        bias = layer.get_base_layer().bias
        want = want @ (layer.dequantised().double() + delta(layer)).t() + (0 if bias is None else bias.double())
        want = torch.relu(want) if name == "first" else want
    scale = want.abs().max().item()
    assert (out.double() - want).abs().max().item() < (2e-2 if kind == "8bit" else 1e-3) * scale
    out.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        before = model(x)
        with pytest.warns(UserWarning, match="rounds the merged weight"):
            model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(x), before)


def test_trl_trains_it(stand_in, tmp_path):
    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    base = LlamaForCausalLM.from_pretrained(stand_in)
    rows = [{"input_ids": [(start + n) % 32 for n in range(12)]} for start in range(8)]
    arguments = SFTConfig(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        base, arguments, train_dataset=Dataset.from_list(rows), peft_config=MonarchConfig(target_modules="all-linear"),
        processing_class=AutoTokenizer.from_pretrained(stand_in),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
