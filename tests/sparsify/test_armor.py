"""ARMOR: each step against dense least squares in float64, and whole models."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_peft.sparsify import NM, Armor, ArmorLinear, load_sparse, masks_of, prune, restore, save_sparse
from sparse_peft.sparsify.armor import _weights_of
from sparse_peft.sparsify.block_fit import BlockFit, Factors
from tests.sparsify.models import batches, gpt2, inputs_of, linear_layers, llama, rows


def dense(blocks):
    return torch.block_diag(*blocks)


def problem(shape=(8, 16), block=4, n=2, m=4, seed=0):
    """A weight in float64, factors on the way, and weights of the loss."""
    generator = torch.Generator().manual_seed(seed)
    target, core = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = NM(n, m).keep(core.abs())
    left, right = (
        torch.eye(block) + 0.4 * torch.randn(size // block, block, block, generator=generator) for size in shape
    )
    outputs, inputs = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in shape)
    factors = Factors(core * kept, kept, left.double(), right.double())
    return target, factors, outputs, inputs, BlockFit(target, factors, outputs, inputs, n, m)


def plain_loss(target, factors, outputs, inputs):
    error = target - dense(factors.left) @ factors.core @ dense(factors.right)
    return float((error.square() * outputs[:, None] * inputs).sum() / outputs.mean() / inputs.mean())


def test_the_loss_is_that_of_nowags_normalised_weight():
    weight, square = torch.randn(6, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    columns = weight.norm(dim=0)
    normalised = weight / columns
    norms = normalised.norm(dim=1)
    outputs, inputs = _weights_of(weight, square)
    error = torch.randn(6, 8, dtype=torch.float64)
    expected = ((error / columns / norms[:, None]).square() * square).sum()
    assert float((error.square() * outputs[:, None] * inputs).sum()) == pytest.approx(float(expected))
    weight[2], weight[:, 3] = 0, 0
    outputs, inputs = _weights_of(weight, square)
    assert outputs[2] == 0 == inputs[3] and outputs.isfinite().all() and inputs.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_blocks_are_dense_least_squares(side):
    target, factors, outputs, inputs, fit = problem()
    assert fit.loss(factors) == pytest.approx(plain_loss(target, factors, outputs, inputs))
    size = 8 if side == "left" else 16
    root = (outputs[:, None] * inputs).sqrt()
    # one column of the system for each entry of the block-diagonal matrix
    columns = []
    for block, row, col in itertools.product(range(size // 4), range(4), range(4)):
        unit = torch.zeros(size, size, dtype=torch.float64)
        unit[4 * block + row, 4 * block + col] = 1
        if side == "left":
            changed = unit @ factors.core @ dense(factors.right)
        else:
            changed = dense(factors.left) @ factors.core @ unit
        columns.append((changed * root).flatten())
    found = torch.linalg.lstsq(torch.stack(columns, 1), (target * root).flatten()[:, None]).solution
    (fit._fit_left if side == "left" else fit._fit_right)()
    torch.testing.assert_close(getattr(factors, side), found.view(-1, 4, 4), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n, m, block", [(2, 4, 4), (2, 4, 8), (1, 4, 8), (4, 8, 8)])
def test_the_core_is_the_best_of_all_supports_group_by_group(n, m, block):
    target, factors, outputs, inputs, fit = problem((8, 16), block, n, m)
    left, right, core, kept = dense(factors.left), dense(factors.right), factors.core.clone(), factors.kept.clone()
    root = (outputs[:, None] * inputs).sqrt()
    # rows of one block in order, groups of one block in order; other blocks do not matter to them
    for row, group in itertools.product(range(8), range(16 // m)):
        at = range(m * group, m * group + m)
        core[row, list(at)] = 0
        rest = ((target - left @ core @ right) * root).flatten()
        best = None
        for support in itertools.combinations(at, n):
            system = torch.stack([(torch.outer(left[:, row], right[col]) * root).flatten() for col in support], 1)
            values = torch.linalg.lstsq(system, rest[:, None]).solution.squeeze(1)
            left_over = float((rest - system @ values).square().sum())
            if best is None or left_over < best[0]:
                best = left_over, support, values
        core[row, list(best[1])] = best[2]
        kept[row, list(at)] = False
        kept[row, list(best[1])] = True
    fit._fit_core()
    torch.testing.assert_close(factors.core, core, rtol=1e-7, atol=1e-7)
    assert torch.equal(factors.kept, kept)


@pytest.mark.parametrize("dtype, shape, block", [(torch.float64, (16, 24), 8), (torch.float32, (64, 32), 32)])
def test_no_sweep_raises_the_loss(dtype, shape, block):
    weight, square = torch.randn(shape, dtype=dtype), torch.rand(shape[1], dtype=torch.float64) ** 3
    weight[3], square[5], losses = 0, 0, []
    kept = NM(2, 4).keep(weight.abs())
    made = Armor(block, sweeps=15, tolerance=0).refine(weight, kept, square, NM(2, 4), losses)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0] and made.core.dtype == dtype
    assert made.kept.view(-1, 4).sum(1).eq(2).all() and not bool(made.core[~made.kept].any())


def test_a_weight_that_cannot_get_better_is_left_alone():
    weight = torch.randn(8, 8)
    kept = NM(2, 4).keep(weight.abs())
    made = Armor(4).refine(weight * kept, kept, torch.rand(8), NM(2, 4))
    assert torch.equal(made.core, weight * kept) and torch.equal(made.left, torch.eye(4).repeat(2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_factors_are_not_worse_than_the_start(dtype):
    weight, square = torch.randn(16, 16, dtype=dtype), torch.rand(16, dtype=torch.float64)
    kept, losses = NM(2, 4).keep(weight.abs()), []
    made = Armor(8).refine(weight, kept, square, NM(2, 4), losses)
    outputs, inputs = _weights_of(weight.float(), square)
    error = weight.double() - dense(made.left.double()) @ made.core.double() @ dense(made.right.double())
    loss = float((error.square() * outputs[:, None] * inputs).sum() / outputs.mean() / inputs.mean())
    assert made.core.dtype == dtype and loss < losses[0]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_is_replaced_saved_and_restored(tmp_path, make):
    model, data = make(), batches()
    before, modules = copy.deepcopy(model.state_dict()), linear_layers(model)
    dense_model, plain = copy.deepcopy(model), copy.deepcopy(model)
    masks = prune(model, "2:4", "nowag", refine=Armor(8), calibration=data, restorable=True, progress=False)
    prune(plain, "2:4", "nowag", calibration=data, progress=False)
    with torch.no_grad():
        error, worse = ((m(**data[0]).logits - dense_model(**data[0]).logits).square().mean() for m in (model, plain))
    assert error < worse and masks.density == 0.5 and not masks.broken(model)
    for name, module in modules.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, ArmorLinear) and layer.core is module.weight
        assert rows(module, masks.layers[name].to_bool()).reshape(-1, 4).sum(1).eq(2).all()

    x = torch.randn(2, 3, layer.in_features)
    weight = dense(layer.left) @ layer.rows() @ dense(layer.right)
    torch.testing.assert_close(layer.to_dense(), weight)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-4)

    save_sparse(model, tmp_path / "weights.safetensors")
    for other in (make(), copy.deepcopy(model)):  # linear layers, and replaced ones
        assert load_sparse(other, tmp_path / "weights.safetensors").kept == masks.kept
        assert torch.equal(other(**data[0]).logits, model(**data[0]).logits)

    for restored in (copy.deepcopy(model), model):
        restore(restored)
        assert masks_of(restored) is None and restored.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in restored.state_dict().items())
    assert all(model.get_submodule(name) is module for name, module in modules.items())


def test_later_blocks_see_the_replaced_ones():
    model, data = llama(), batches()
    reference = copy.deepcopy(model)
    prune(model, "2:4", "nowag", refine=Armor(8), calibration=data, progress=False)
    prune(reference, "2:4", "nowag", refine=Armor(8), calibration=data, progress=False, exclude_modules=r".*\.1\..*")
    name = "model.layers.1.mlp.down_proj"
    x = inputs_of(reference, [name], data)[name]
    weight = rows(reference.get_submodule(name))
    square, found = x.square().mean(0), model.get_submodule(name)
    columns = weight / weight.norm(dim=0)
    scores = columns / columns.norm(dim=1, keepdim=True)
    made = Armor(8).refine(weight, NM(2, 4).keep(scores.abs() * square.sqrt().float()), square, NM(2, 4))
    expected = dense(made.left) @ made.core @ dense(made.right)
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "pattern, options, message",
    [
        (0.5, {}, "refine='armor' tries all supports .* use '2:4'"),
        (NM(8, 16), {}, "at most 100 supports"),
        (NM(2, 3, pad=True), {}, "an m that divides block"),
        ("2:4", {"refine": Armor(12)}, r"layer model\.layers\.0\.self_attn\.q_proj: 32 outputs and 32 inputs do not"),
        ("2:4", {"score": "sparsegpt"}, "refine='armor' starts from original weights"),
        ("2:4", {"calibration": None}, "refine='armor' needs data"),
    ],
)
def test_requests_that_make_no_sense_leave_the_model_unchanged(pattern, options, message):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    arguments = {"score": "magnitude", "refine": "armor", "calibration": batches(), "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        prune(model, pattern, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_replaced_layers_do_not_take():
    layer, data = nn.Linear(8, 8), {"calibration": [torch.randn(4, 8)], "loss_fn": lambda model, x: model(x)}
    with pytest.raises(ValueError, match="put it into a model"):
        prune(layer, "2:4", refine=Armor(8), progress=False, **data)
    model = llama()
    prune(model, "2:4", refine=Armor(8), calibration=batches(), progress=False)
    with pytest.raises(ValueError, match="ArmorLinear"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="restorable=True"):
        restore(model)


@pytest.mark.parametrize(
    "replaced, message",
    [
        ([], "`replaced` is not the block of each layer"),
        ({"model.norm": 8}, r"layer model\.norm is in blocks of 8, and the model's of \[\]"),
        ({"model.layers.0.mlp.up_proj": 5}, r"in blocks of 5, and the model's of \[88, 32\]"),
        ({"model.layers.0.mlp.up_proj": True}, "in blocks of True"),
        ({"model.layers.0.mlp.up_proj": 4}, "up_proj.weight is .* not there in the model"),
    ],
)
def test_damaged_files_of_replaced_layers_are_refused(tmp_path, replaced, message):
    model, path = llama(), tmp_path / "weights.safetensors"
    prune(model, "2:4", progress=False)
    save_sparse(model, path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["sparse_peft_weights"]) | {"replaced": replaced}
    save_file(load_file(path), path, metadata={"sparse_peft_weights": json.dumps(content)})
    other = llama()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        load_sparse(other, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
