"""Pruning whole models: against plain references in float64; exact counts; what comes back and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.measure import LargestTensor, bytes_of
from sparse_peft import SparseConfig
from sparse_peft.numerics import panel_limit
from sparse_peft.sparsify import NM, SCORES, Armor, Blocks, Channels, Masks, Unstructured, masks_of, prune, restore
from tests.helpers.memory import LiveBytes
from tests.sparsify.models import GRADIENT_SCORES, batches, gpt2, inputs_of, linear_layers, llama, rows

PATTERNS = [0.5, 0.3, "2:4", Blocks(0.5, 2, 4), Channels(0.25), Channels(0.25, "out")]
MODELS = {"llama": llama, "gpt2": gpt2}


def data_for(score):
    return batches(labels=score in GRADIENT_SCORES)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quietly(model, pattern, score="magnitude", **options):
    return prune(model, pattern, score, progress=False, **options)


def plain_keep(scores, pattern):
    """Kept positions of float64 scores ``(outputs, inputs)``, by sorting."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if pattern == "2:4":
        groups = scores.reshape(-1, 4).topk(2, 1).indices
        return kept.reshape(-1, 4).scatter(1, groups, True).view(scores.shape)
    count = round((1 - pattern) * scores.shape[1])
    return kept.scatter_(1, scores.topk(count, 1).indices, True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_wanda_block_by_block_is_the_plain_one(model, pattern):
    """Each block sees the outputs of the pruned ones before it; rows are compared within themselves."""
    model = MODELS[model]()
    reference, data = copy.deepcopy(model), batches()
    masks = quietly(model, pattern, "wanda", calibration=data)

    for block in (".0.", ".1."):
        names = [name for name in linear_layers(reference) if block in name]
        seen = inputs_of(reference, names, data)
        for name in names:
            module = reference.get_submodule(name)
            scores = rows(module).double().abs() * seen[name].square().sum(0).sqrt()
            kept = plain_keep(scores, pattern)
            assert torch.equal(rows(module, masks.layers[name].to_bool()), kept), name
            rows(module).masked_fill_(~kept, 0)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_without_sequence_all_inputs_are_the_dense_models():
    model, data = llama(), batches()
    seen = inputs_of(model, linear_layers(model), data)
    dense = copy.deepcopy(model)
    masks = quietly(model, 0.5, "wanda", calibration=data, sequential=False)
    for name, module in linear_layers(dense).items():
        scores = rows(module).double().abs() * seen[name].square().sum(0).sqrt()
        assert torch.equal(masks.layers[name].to_bool(), plain_keep(scores, 0.5))


@pytest.mark.parametrize("model, dtype", [("llama", torch.float32), ("gpt2", torch.bfloat16)])
@pytest.mark.parametrize("score", SCORES)
def test_counts_zeros_and_restoration(score, model, dtype):
    model = MODELS[model]().to(dtype)
    before, data = state_of(model), data_for(score)
    for pattern in PATTERNS:
        if score == "sparsegpt" and isinstance(pattern, (Blocks, Channels)):
            continue
        masks = quietly(model, pattern, score, calibration=data, restorable=True)
        assert masks is masks_of(model) and not masks.broken(model)
        assert set(masks.layers) == set(linear_layers(model))
        share = {"2:4": 0.5}.get(pattern, 1 - getattr(pattern, "sparsity", pattern if pattern != "2:4" else 0.5))
        sizes = sum(module.weight.numel() for module in linear_layers(model).values())
        assert abs(masks.kept - share * sizes) <= 64 * len(masks.layers) * isinstance(pattern, Channels) + 4
        for name, module in linear_layers(model).items():
            stays = masks.layers[name].to_bool()
            assert not bool(module.weight[~stays].any())
            if score != "sparsegpt":
                assert torch.equal(module.weight[stays], before[f"{name}.weight"][stays])
        restore(model)
        assert masks_of(model) is None
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), (pattern, name)


def test_only_linear_layers_change_and_the_tied_head_does_not():
    model = llama(tie_word_embeddings=True)
    before = state_of(model)
    quietly(model, 0.5)
    for name, tensor in model.state_dict().items():
        is_target = name.removesuffix(".weight") in linear_layers(model) and name.endswith("weight")
        assert torch.equal(tensor, before[name]) is not is_target, name


def test_layers_are_chosen_by_name():
    model = llama()
    masks = quietly(model, 0.5, target_modules=["q_proj", "down_proj"], exclude_modules=r"model\.layers\.0\..*")
    assert set(masks.layers) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert set(quietly(llama(), 0.5, target_modules="lm_head").layers) == {"lm_head"}
    with pytest.raises(ValueError, match=r"target_modules=\['nope'\].*no linear layer of LlamaForCausalLM"):
        quietly(model, 0.5, target_modules=["nope"])


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global"])
def test_allocations_share_the_same_total(allocation):
    model = llama()
    layers = linear_layers(model)
    magnitudes = torch.cat([module.weight.detach().abs().flatten() for module in layers.values()])
    masks = quietly(model, 0.6, allocation=allocation)
    total = round(0.4 * magnitudes.numel())
    assert masks.kept == total
    densities = {name: mask.density for name, mask in masks.layers.items()}
    if allocation == "uniform":
        assert max(abs(density - 0.4) for density in densities.values()) < 1 / 300
    elif allocation == "erk":
        raw = {name: sum(mask.shape) / (mask.shape[0] * mask.shape[1]) for name, mask in masks.layers.items()}
        scale = total / sum(sum(mask.shape) for mask in masks.layers.values())
        for name, density in densities.items():
            assert density == pytest.approx(scale * raw[name], abs=1 / 300)
    else:
        least = magnitudes.sort(descending=True).values[total - 1]
        for name, module in layers.items():
            assert int((module.weight != 0).sum()) == masks.layers[name].kept
            assert float(module.weight.detach().abs()[module.weight != 0].min()) >= float(least)


def test_global_scores_from_data_are_those_of_the_dense_model():
    model, data = llama(), batches()
    seen = inputs_of(model, linear_layers(model), data)
    scores = {n: rows(m).double().abs() * seen[n].square().sum(0).sqrt() for n, m in linear_layers(model).items()}
    masks = quietly(model, 0.5, "wanda", allocation="global", calibration=data)
    flat = torch.cat([score.flatten() for score in scores.values()])
    least = flat.sort(descending=True).values[round(0.5 * flat.numel()) - 1]
    for name, score in scores.items():
        assert torch.equal(masks.layers[name].to_bool(), score >= least)


def test_gradient_scores_are_sums_over_the_batches():
    model, data = llama(), batches(labels=True)
    dense = copy.deepcopy(model)
    for batch in data:
        dense(**batch).loss.backward()
    masks = quietly(model, 0.5, "snip", calibration=data)
    for name, module in linear_layers(dense).items():
        scores = (module.weight * module.weight.grad).abs().detach().flatten()
        kept = masks.layers[name].to_bool().flatten()
        assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_masks_depend_on_seed_and_name_alone():
    first, again, other = (quietly(llama(), "2:4", "random", seed=seed) for seed in (3, 3, 4))
    for name, mask in first.layers.items():
        assert torch.equal(mask.bits, again.layers[name].bits) and not torch.equal(mask.bits, other.layers[name].bits)
    q, o = (first.layers[f"model.layers.0.self_attn.{name}"].bits for name in ("q_proj", "o_proj"))
    assert not torch.equal(q, o)


def test_padded_tokens_do_not_count():
    plain, padded = llama(), llama()
    ids = batches(1, 2, 8)[0]["input_ids"]
    wider = torch.cat((ids, torch.full((2, 5), 7)), 1)
    mask = torch.cat((torch.ones(2, 8), torch.zeros(2, 5)), 1).long()
    alike = [
        quietly(model, 0.5, "wanda", calibration=[{"use_cache": False, **batch}])
        for model, batch in ((plain, {"input_ids": ids}), (padded, {"input_ids": wider, "attention_mask": mask}))
    ]
    differing = sum(int((a.bits != b.bits).sum()) for a, b in zip(*(m.layers.values() for m in alike), strict=True))
    assert differing <= 4  # rounding may change the order of close scores


@pytest.mark.parametrize("score", ["magnitude", "wanda", "nowag", "sparsegpt"])
def test_no_temporary_is_larger_than_one_layer(score):
    """A model of many equal layers is not copied: the largest temporary does not grow with its depth."""
    width = 128
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(12)])
    data = [torch.randn(4, width) for _ in range(40)]
    with LargestTensor() as largest, panel_limit(2**16):
        quietly(model, 0.5, score, calibration=data, loss_fn=lambda model, x: model(x))
    one_layer = width * width * 4
    assert largest.nbytes <= 2 * one_layer  # positions of the best are twice as wide as weights


def test_adapters_on_a_pruned_base_keep_its_zeros():
    model = llama()
    masks = quietly(model, 0.6, "magnitude")
    with pytest.raises(ValueError, match=r"has adapters; prune the base model before"):
        prune(get_peft_model(copy.deepcopy(model), SparseConfig(density=0.1)), 0.5)
    adapted = get_peft_model(model, SparseConfig(selection="nonzero", density=0.2, init_weights=False))
    assert masks_of(adapted) is masks
    batch = batches(1, labels=True)[0]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batch).loss.backward()
    optimizer.step()
    merged = adapted.merge_and_unload()
    assert not masks.broken(merged)


def test_a_second_pruning_goes_on_from_the_first():
    model = llama()
    first = quietly(model, 0.3)
    second = quietly(model, 0.6)
    for name, mask in second.layers.items():
        assert not bool((mask.to_bool() & ~first.layers[name].to_bool()).any())
    restorable = llama()
    quietly(restorable, 0.3, restorable=True)
    with pytest.raises(ValueError, match=r"pruned already .* restore\(model\) it first"):
        quietly(restorable, 0.6)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"score": "wand"}, ValueError, "score='wand'.*did you mean 'wanda'"),
        ({"score": "wanda"}, ValueError, "score='wanda' needs data: pass calibration="),
        ({"refine": "dsnot"}, ValueError, "refine='dsnot' needs data"),
        ({"allocation": "sensitivity"}, ValueError, "allocation='sensitivity'.*densities"),
        ({"refine": "dsn"}, ValueError, "refine='dsn'.*did you mean 'dsnot'"),
        ({"allocation": "even"}, ValueError, "allocation='even'"),
        ({"pattern": "2:4", "allocation": "erk"}, ValueError, "allocation='erk': NM.* has its own count"),
        ({"pattern": Unstructured(0.5, "row"), "allocation": "global"}, ValueError, "scope='row'"),
        ({"score": "random", "allocation": "global"}, ValueError, "random ones say nothing"),
        ({"score": "sparsegpt", "pattern": Blocks(0.5, 2, 2)}, ValueError, "score='sparsegpt' prunes n:m or single"),
        ({"score": "sparsegpt", "allocation": "global"}, ValueError, "scores a layer while it prunes"),
        ({"score": "sparsegpt", "refine": "dsnot"}, ValueError, "refine='dsnot' starts from original weights"),
        ({"pattern": Blocks(0.5, 2, 2), "refine": "dsnot"}, ValueError, "does not allow; use n:m"),
        ({"pattern": Unstructured(0.5, "column"), "refine": "dsnot"}, ValueError, "scope 'row' or 'matrix'"),
        ({"pattern": NM(3, 5)}, ValueError, r"layer model\.layers\.0\.self_attn\.q_proj: 32 inputs are no multiple"),
        ({"calibration": [], "score": "wanda"}, ValueError, "no batches"),
    ],
)
def test_requests_that_make_no_sense_leave_the_model_unchanged(options, error, message):
    model = llama()
    before = state_of(model)
    options = {"pattern": 0.5, **options}
    with pytest.raises(error, match=message):
        quietly(model, **options)
    assert masks_of(model) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_without_dense_weights_of_their_own_are_refused():
    class Packed(nn.Linear):
        pass

    model = nn.Sequential(Packed(4, 4))
    with pytest.raises(TypeError, match=r"layer 0 is a Packed with weights of torch\.float32; prune a model in"):
        quietly(model, 0.5)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer 0: its weight is on the meta device"):
        quietly(model, 0.5)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"Target module 0 shares its weight with 1\.weight"):
        quietly(model, 0.5)


def test_a_run_that_fails_half_way_can_be_undone(monkeypatch):
    model = llama()
    before = state_of(model)
    data, calls = batches(), []
    monkeypatch.setattr(Unstructured, "keep", _failing_after(Unstructured.keep, 5, calls))
    with pytest.raises(KeyError, match="stopped"):
        quietly(model, 0.5, "wanda", calibration=data, restorable=True)
    monkeypatch.undo()
    assert len(masks_of(model).layers) == 5
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    restore(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _failing_after(function, count, calls):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > count:
            raise KeyError("stopped")
        return function(*args, **kwargs)

    return call


def test_masks_of_another_model_are_applied(tmp_path):
    model, fresh = llama(), llama()
    quietly(model, 0.5, "wanda", calibration=batches()).save(tmp_path / "masks.safetensors")
    Masks.load(tmp_path / "masks.safetensors").apply(fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": 0.5},
        {"pattern": 0.5, "score": "wanda", "refine": "dsnot"},
        {"pattern": "2:4", "score": "sparsegpt"},
        {"pattern": "2:4", "score": "nowag", "refine": Armor(4, sweeps=1)},
    ],
    ids=["magnitude", "dsnot", "sparsegpt", "armor"],
)
def test_a_model_is_never_copied(options):
    """The peak of memory grows with the depth by masks, and by ARMOR's blocks, but not by weights."""
    peaks, sizes = [], []
    for depth in (2, 4):
        model, data = llama(hidden_size=64, num_hidden_layers=depth), batches(6)
        weights = bytes_of(module.weight for module in linear_layers(model).values())
        with LiveBytes() as live:
            masks = quietly(model, calibration=data, **options)
        blocks = bytes_of(tensor for name, tensor in model.named_parameters() if name.endswith(("left", "right")))
        bits = bytes_of(mask.bits for mask in masks.layers.values())
        assert live.now >= bits + blocks  # what stays is seen
        peaks.append(live.peak)
        sizes.append((bits + blocks, weights))
    stays, weights = (after - before for before, after in zip(*sizes, strict=True))
    assert peaks[1] - peaks[0] <= stays + 0.05 * weights
