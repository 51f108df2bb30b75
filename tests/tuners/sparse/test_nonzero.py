"""`selection="nonzero"`: a pruned base keeps its zeros, from the budget to the merged weight."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_peft import SparseConfig
from sparse_peft.support import select, whole_blocks
from tests.helpers.quantized import build
from tests.helpers.two_layers import TwoLayers, layers_of

NAMES = ["first", "second"]


def pruned(share=0.6, dtype=torch.float32, **options):
    """TwoLayers with this share of each weight at zero, scattered."""
    torch.manual_seed(0)
    model = TwoLayers(**options).to(dtype)
    for name in NAMES:
        weight = getattr(model, name).weight.data
        weight[torch.rand(weight.shape) < share] = 0
    return model


def adapted(model, **config):
    return get_peft_model(model, SparseConfig(selection="nonzero", **{"target_modules": NAMES, **config}))


def train(model, steps=5, n_in=17, dtype=torch.float32):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.randn(6, n_in, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("conv1d", [False, True])
def test_the_merged_weight_has_the_zeros_of_the_base(tmp_path, dtype, conv1d):
    base = pruned(dtype=dtype, conv1d=conv1d)
    before = copy.deepcopy(base)
    model = adapted(base, density=0.2)
    train(model, dtype=dtype)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path).merge_and_unload()
    for name in NAMES:
        old, new = getattr(before, name).weight, getattr(merged, name).weight
        support = layers_of(model)[name].support("default").to_mask()
        assert not bool((support & (old == 0)).any())
        assert torch.equal(new == 0, old == 0)
        changed = new != old  # all but the entries behind a unit that no input reaches
        assert not bool((changed & ~support).any()) and changed.sum() > 0.8 * support.sum()
    assert isinstance(merged.first, Conv1D if conv1d else nn.Linear)


@pytest.mark.parametrize("allocation", ["numel", "uniform", "erk"])
def test_the_budget_is_exact_and_a_full_layer_passes_the_rest_on(allocation):
    base = pruned(0.5)
    base.second.weight.data[:, 3:] = 0  # hardly anything is left to train here
    left = {name: int((getattr(base, name).weight != 0).sum()) for name in NAMES}
    model = adapted(base, num_params=200, allocation=allocation)
    counts = model.peft_config["default"].num_entries
    assert sum(counts.values()) == 200 and all(counts[name] <= left[name] for name in NAMES)
    assert counts["second"] == min(left["second"], {"numel": 46, "uniform": 100, "erk": 87}[allocation])


def test_budgets_that_do_not_fit():
    base = pruned()
    left = sum(int((getattr(base, name).weight != 0).sum()) for name in NAMES)
    with pytest.raises(ValueError, match=rf"a budget of 363 is more than the {left} entries that are not zero"):
        adapted(copy.deepcopy(base), density=0.5)
    with pytest.raises(ValueError, match=r"allocation='global' needs scores to compare"):
        adapted(copy.deepcopy(base), density=0.1, allocation="global")
    base.second.weight.data.zero_()
    with pytest.raises(ValueError, match=r"layer second: a budget of 1 is more than its 0 entries.*exclude_modules"):
        adapted(copy.deepcopy(base), density=0.1)
    with pytest.raises(ValueError, match=r"layer first: selection='nonzero' counts .* meta device"):
        adapted(TwoLayers().to("meta"), density=0.1)


def test_all_that_is_left_can_train():
    base = pruned()
    left = {name: getattr(base, name).weight != 0 for name in NAMES}
    model = adapted(base, num_params=sum(int(mask.sum()) for mask in left.values()))
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.support("default").to_mask(), left[name])


@pytest.mark.parametrize("block", [(4, 8), (3, 3)])
def test_blocks_without_a_zero(block):
    torch.manual_seed(0)
    layer = nn.Linear(65, 50)
    keep = torch.rand(-(-50 // block[0]), -(-65 // block[1])) < 0.4
    layer.weight.data *= keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:50, :65]
    layer.weight.data[:: block[0] * 5, 7] = 0  # single zeros, in blocks that are whole otherwise
    whole = whole_blocks(layer.weight != 0, block)
    reference = torch.stack([
        torch.stack([(layer.weight[i:i + block[0], j:j + block[1]] != 0).all()
                     for j in range(0, 65 - 65 % block[1], block[1])])
        for i in range(0, 50 - 50 % block[0], block[0])
    ])  # fmt: skip
    assert torch.equal(whole, reference)
    config = {"target_modules": ["0"], "granularity": "block", "block_size": list(block)}
    zeros = layer.weight == 0
    support = adapted(nn.Sequential(layer), density=0.1, **config).base_model.model[0].support("default")
    assert not bool((support.to_mask() & zeros).any())
    assert torch.equal(whole_blocks(support.to_mask(), block).sum() * block[0] * block[1], torch.tensor(support.nnz))
    most = int(whole.sum())
    with pytest.raises(ValueError, match=rf"more than the {most} blocks of {block[0]} x {block[1]} without a zero in"):
        adapted(nn.Sequential(copy.deepcopy(layer)), density=0.6, **config)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_keeps_the_zeros_that_it_dequantises_to(kind):
    model = adapted(build(kind, zeros=0.7), density=0.2)
    for layer in layers_of(model).values():
        weight = layer.dequantised()
        assert 0.6 < float((weight == 0).float().mean()) < 0.9
        assert not bool((layer.support("default").to_mask() & (weight == 0)).any())
    train(model, n_in=128)
    zeros = {name: layer.dequantised() == 0 for name, layer in layers_of(model).items()}
    with pytest.warns(UserWarning, match="quantisation again"):
        model.merge_adapter()
    for name, layer in layers_of(model).items():
        assert bool((layer.dequantised()[zeros[name]] == 0).all())


def test_positions_are_those_of_select_and_of_seed_and_name():
    base = pruned()
    weight = base.first.weight.detach().clone()
    model = adapted(base, density=0.1, seed=7)
    support = layers_of(model)["first"].support("default")
    assert support == select("nonzero", weight, support.nnz, seed=7, name="first")
