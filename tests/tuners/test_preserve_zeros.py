"""Adapters on a pruned base that keep its zeros, and what merging says of those that do not."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

from sparse_peft import (
    PruneConfig,
    S2FTConfig,
    SaRAConfig,
    SLTrainConfig,
    SoRAConfig,
    SparseConfig,
    SparsityController,
)
from sparse_peft.sparsify import masks_of, prune
from tests.helpers.training_loop import batch_at
from tests.helpers.two_layers import TwoLayers

SIZES = (16, 24, 8)
CONFIGS = {
    "sparse": lambda: SparseConfig(density=0.3, preserve_zeros=True),
    "magnitude_smallest": lambda: SparseConfig(density=0.7, selection="magnitude_smallest", preserve_zeros=True),
    "rigl": lambda: SparseConfig(density=0.3, selection="rigl", reselect_every=2, preserve_zeros=True),
    "sara": lambda: SaRAConfig(density=0.7, nuclear_weight=0.0, preserve_zeros=True),
    "s2ft": lambda: S2FTConfig(ratio=0.4, preserve_zeros=True),
    "dsee": lambda: PruneConfig(recipe="dsee", score="nonzero", preserve_zeros=True, density=0.1, r=2),
    "low rank": lambda: PruneConfig(score="nonzero", r=2),
}


def pruned_base(conv1d=False):
    torch.manual_seed(0)
    model = TwoLayers(*SIZES, conv1d=conv1d)
    prune(model, "2:4", progress=False)
    return model


def adapted(name, base, **fields):
    config = CONFIGS[name]()
    config.target_modules = ["first", "second"]
    for field, value in fields.items():
        setattr(config, field, value)
    return get_peft_model(base, config)


def run(model, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    controller = SparsityController(model, optimizer, total_steps=8)
    for step in range(steps):
        x, y = batch_at(step, n_in=SIZES[0], n_out=SIZES[2])
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:adapter.*what suits its config")
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_zeros_stay_and_passes_are_those_of_the_merged_model(name, conv1d, tmp_path):
    base = pruned_base(conv1d)
    masks, before = masks_of(base), copy.deepcopy(base)
    model = adapted(name, base)
    run(model)
    x = batch_at(9, n_in=SIZES[0])[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(x)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path)
        assert torch.equal(again(x), out)
        merged = model.merge_and_unload()
        assert not masks.broken(merged)
        torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-4)
    changed = [(getattr(merged, n).weight != getattr(before, n).weight).sum() for n in ("first", "second")]
    assert sum(changed) > 50


@pytest.mark.parametrize("name", ["sparse", "s2ft"])
def test_random_values_and_foreign_files_are_projected(name, tmp_path):
    model = adapted(name, TwoLayers(*SIZES), init_weights=False)  # on a dense base, whose entries are all there
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pruned_base(), tmp_path)
    out = again(torch.ones(2, SIZES[0]))
    merged = again.merge_and_unload()
    assert not masks_of(merged).broken(merged)
    torch.testing.assert_close(merged(torch.ones(2, SIZES[0])), out, rtol=1e-4, atol=1e-4)


def test_merging_says_which_zeros_it_fills():
    for config in (SoRAConfig(r=2, init_gate="normal"), SparseConfig(density=0.3)):
        config.target_modules, config.init_weights = ["first", "second"], False
        model = get_peft_model(pruned_base(), config)
        with pytest.warns(UserWarning, match=r"fills \d+ zeros of 2 layers.*preserve_zeros=True"):
            merged = model.merge_and_unload()
        assert masks_of(merged).broken(merged)
    dense = get_peft_model(TwoLayers(*SIZES), SparseConfig(density=0.3, target_modules=["first"], init_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense.merge_and_unload()


def test_a_plain_lora_is_found_out_by_the_masks():
    base = pruned_base()
    model = get_peft_model(base, LoraConfig(target_modules=["first"], init_lora_weights=False))
    merged = model.merge_and_unload()
    assert set(masks_of(merged).broken(merged)) == {"first"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpointed_block_has_the_gradients_of_a_plain_one(name):
    torch.manual_seed(1)
    model, x = adapted(name, pruned_base(), init_weights=False), torch.randn(3, SIZES[0])
    twin = copy.deepcopy(model)
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    twin(x).square().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)


def test_an_adapter_whose_entries_are_all_zeros_says_so():
    config = SparseConfig(density=0.2, selection="magnitude_smallest", preserve_zeros=True, target_modules=["first"])
    with pytest.warns(UserWarning, match="layer first: all 77 trained entries are at zeros"):
        get_peft_model(pruned_base(), config)(torch.ones(1, SIZES[0]))


def test_low_rank_that_is_not_masked_is_refused():
    with pytest.raises(ValueError, match="low rank is masked"):
        SLTrainConfig(preserve_zeros=True)
    with pytest.raises(ValueError, match="slorb=4 with preserve_zeros=True"):
        PruneConfig(recipe="ast", slorb=4, preserve_zeros=True)
    with pytest.raises(TypeError, match="preserve_zeros"):
        SoRAConfig(preserve_zeros=True)
