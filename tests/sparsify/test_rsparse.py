"""R-Sparse: both paths against the formula in float64, budgets, counts, and models that come back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from sparse_peft.sparsify import SHARES, RSparseLinear, masks_of, prune, r_sparse, restore
from tests.sparsify.models import batches, gpt2, linear_layers, llama


def one_layer(make=nn.Linear, inputs=48, outputs=20, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    layer = Conv1D(outputs, inputs) if make is Conv1D else nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight)
    return nn.Sequential(layer).to(dtype)


def tokens(count=300, inputs=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(inputs, generator=generator).mul(4).exp()
    return torch.randn(count, inputs, generator=generator) * scale


def sparsified(model, sparsity=0.5, data=None, **options):
    data = [tokens().to(model[0].weight.dtype)] if data is None else data
    return r_sparse(model, data, sparsity, loss_fn=lambda model, x: model(x), progress=False, **options)


def plain(layer, x):
    """The formula in float64."""
    weight, x = layer.rows().detach().double(), x.double()
    counts = x.abs() * weight.norm(dim=0) >= layer.threshold
    low_rank = layer.left.double() @ layer.right.double()
    out = (x * counts) @ weight.t() + (x * ~counts) @ low_rank.t()
    return out if layer.bias is None else out + layer.bias.detach().double()


@pytest.mark.parametrize("make, bias", [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_both_paths_are_the_formula(make, bias, dtype, tolerance, share):
    model = one_layer(make, dtype=dtype, bias=bias)
    sparsified(model, share=share)
    x = tokens(7, seed=2).to(dtype).view(7, 1, 48)
    with torch.no_grad():
        masked = model(x)
        gathered = torch.cat([model(token[None]) for token in x])
        expected = plain(model[0], x)
    scale = expected.abs().max()
    for found in (masked, gathered):
        assert found.shape == (7, 1, 20) and found.dtype == dtype
        # in half precision a score may reach the threshold or not by its rounding
        assert ((found.double() - expected).abs().amax((1, 2)) <= tolerance * scale).sum() >= (
            7 if dtype.itemsize > 2 else 5
        )


def test_nothing_is_saved_and_nothing_changes_at_sparsity_0():
    model = one_layer()
    x, dense = tokens(5), copy.deepcopy(model)
    report = sparsified(model, 0)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    assert report.layers["0"].kept == 1 and report.layers["0"].rank == 0 and report.layers["0"].error == 0


@pytest.mark.parametrize("sparsity, share", [(0.3, 1.0), (0.5, 0.6), (0.8, 1.0), (0.7, 0.2)])
def test_the_budget_is_met_in_calibration(sparsity, share):
    model, x = one_layer(inputs=96, outputs=64), tokens(400, 96)
    report = sparsified(model, sparsity, [x], share=share)
    made, layer = report.layers["0"], model[0]
    assert made.kept == pytest.approx((1 - sparsity) * share, abs=0.01) and made.share == share
    assert made.rank == round((1 - sparsity) * (1 - share) * 96 * 64 / 160) == layer.right.shape[0]
    counts = report.multiplications
    assert counts["dense"] == 96 * 64
    assert counts["gathered"] == pytest.approx((1 - sparsity) * 96 * 64 + 96, rel=0.04)
    assert report.low_rank_numbers == layer.left.numel() + layer.right.numel()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        layer(x[:8])
    assert flops.get_total_flops() == 2 * 8 * (counts["masked"] - 96)  # all but the scores


@pytest.mark.parametrize("inputs, outputs", [(96, 64), (48, 80)])
def test_the_low_rank_is_the_truncated_svd(inputs, outputs):
    model = one_layer(inputs=inputs, outputs=outputs)
    sparsified(model, 0.6, share=0.4, data=[tokens(200, inputs)])
    layer = model[0]
    weight = layer.rows().detach().double()
    s = torch.linalg.svdvals(weight)
    rank = layer.right.shape[0]
    best = s[rank:].square().sum()
    found = (weight - layer.left.double() @ layer.right.double()).square().sum()
    assert rank > 3 and float(found) == pytest.approx(float(best), rel=1e-5)


def test_the_share_is_the_one_of_least_error():
    data = [tokens(200, 96), tokens(100, 96, seed=5)]
    errors = {}
    for share in SHARES:
        model = one_layer(inputs=96, outputs=64)
        report = sparsified(model, 0.5, data, share=share, tokens=1000)
        x = torch.cat(data)
        dense = x.double() @ model[0].rows().detach().double().t()
        wrong = plain(model[0], x) - model[0].bias.detach().double() - dense
        errors[share] = float(wrong.square().sum() / dense.square().sum())
        assert report.layers["0"].error == pytest.approx(errors[share], rel=1e-3)
    chosen = sparsified(one_layer(inputs=96, outputs=64), 0.5, data, tokens=1000).layers["0"]
    assert chosen.share == min(errors, key=errors.get) and len(set(errors.values())) == len(SHARES)


def test_prompts_can_take_the_whole_weight():
    model = one_layer()
    x, dense = tokens(3), copy.deepcopy(model)
    sparsified(model, decode_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
        assert not torch.allclose(model(x[:1]), dense(x[:1]))


def test_one_token_with_gradients_has_them():
    model = one_layer()
    sparsified(model, share=0.5)
    x = tokens(1).requires_grad_()
    model(x).sum().backward()
    counted = model[0].counts(x.detach())
    assert torch.equal(model[0].weight.grad.abs().sum(0) > 0, counted[0]) and bool(x.grad.ne(0).all())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_comes_back(make):
    model, data = make(), batches()
    before, modules = copy.deepcopy(model.state_dict()), linear_layers(model)
    logits = model(**data[0]).logits
    report = r_sparse(model, data, 0.3, progress=False)
    assert report.layers.keys() == modules.keys() and model.state_dict().keys() == before.keys()
    assert all(isinstance(model.get_submodule(name), RSparseLinear) for name in modules)
    changed = model(**data[0]).logits
    assert not torch.equal(changed, logits) and torch.nn.functional.cosine_similarity(changed, logits, -1).mean() > 0.8
    model.generate(data[0]["input_ids"][:1], max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=r"r_sparse already; restore\(model\) it first"):
        r_sparse(model, data, 0.3, progress=False)
    for restored in (copy.deepcopy(model), model):
        restore(restored)
        for name, tensor in restored.state_dict().items():
            assert torch.equal(tensor, before[name]) and tensor.is_contiguous(), name
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert torch.equal(model(**data[0]).logits, logits)


def test_a_pruned_model_stays_pruned():
    model, data = llama(), batches()
    masks = prune(model, 0.5, restorable=True, progress=False)
    r_sparse(model, data, 0.2, share=1.0, target_modules=["down_proj"], sequential=False, progress=False)
    assert masks_of(model) is masks and not masks.broken(model)
    restore(model)
    assert masks_of(model) is masks and not any(isinstance(module, RSparseLinear) for module in model.modules())
    restore(model)
    assert masks_of(model) is None


@pytest.mark.parametrize(
    "make, options, message",
    [
        (llama, {"sparsity": 1.0}, "sparsity=1.0"),
        (llama, {"share": 0}, "share=0"),
        (llama, {"tokens": 0}, "tokens=0"),
        (llama, {"calibration": []}, "no batches"),
        (lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), {}, "has adapters"),
        (lambda: nn.Linear(3, 3), {}, "put it into a model"),
    ],
)
def test_requests_that_make_no_sense(make, options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        r_sparse(model, **{"calibration": batches(), "sparsity": 0.5, "progress": False, **options})
    assert not any(isinstance(module, RSparseLinear) for module in model.modules())
