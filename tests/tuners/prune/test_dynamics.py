"""Masks in training: counts, closed forms, decay, resumption, two processes."""

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model

from benchmarks.measure import LargestTensor
from sparse_peft import PruneConfig, SparsityController
from sparse_peft.numerics import panel_limit, unpack_bits
from sparse_peft.sparsify import NM
from sparse_peft.tuners.prune.layer import PruneLinear
from sparse_peft.tuners.prune.recipes import RECIPES
from tests.helpers.processes import join_group, run_on_two
from tests.helpers.training_loop import batch_at
from tests.helpers.two_layers import TwoLayers

SIZES = (16, 24, 8)
TOTAL = 20


def model_of(base=None, **fields):
    torch.manual_seed(0)
    base = TwoLayers(*SIZES) if base is None else base
    fields = {"target_modules": ["first", "second"], "r": 3, "density": 0.1, "mask_every": 3, **fields}
    return get_peft_model(base, PruneConfig(**fields))


def optimizer_of(model, kind=torch.optim.AdamW, lr=1e-2, **options):
    return kind([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def batch(step):
    x, y = batch_at(step, n_in=SIZES[0], n_out=SIZES[2])
    return x, y


def run(model, optimizer, controller, steps, look=lambda step: None):
    for step in steps:
        x, y = batch(step)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        look(step + 1)


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, PruneLinear)]


def mask_of(layer):
    return unpack_bits(layer.settled("default").mask, layer.sides[1])


def test_every_step_of_a_gradual_run_has_its_count_and_is_logged():
    model = model_of(recipe="gradual", pattern=0.75, start=4, stop=16, mask_every=2)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, TOTAL)
    timeline = model.peft_config["default"].timeline(TOTAL)
    in_use, numel = [], sum(math.prod(layer.sides) for layer in layers_of(model))

    def look(step):
        counts = [int(mask_of(layer).sum()) for layer in layers_of(model)]
        last = max([4, *(s for s in range(6, 17, 2) if s <= step)])  # masks stay between events
        assert counts == [timeline.wanted(last, math.prod(layer.sides))[1] for layer in layers_of(model)]
        in_use.append(sum(counts))

    run(model, optimizer, controller, range(TOTAL), look)
    assert [r.step for r in controller.history] == [6, 8, 10, 12, 14, 16]
    last = controller.history[-1]
    assert last.density == pytest.approx(0.25) and last.layers["first"].kept == 96
    # of a step counts what it ran with: the masks before its event
    assert last.mean_density == pytest.approx((numel + sum(in_use[:15])) / 16 / numel)


@pytest.mark.parametrize("trains", ["weights", "sparse"])
def test_masked_weights_and_their_moments_are_zero_after_each_event(trains):
    model = model_of(recipe="gradual", pattern=0.75, trains=trains, start=2, stop=14)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, TOTAL)
    for step in range(TOTAL):
        run(model, optimizer, controller, [step])
        if controller.history and controller.history[-1].step == step + 1:
            for layer in layers_of(model):
                state, mask = layer.settled("default"), mask_of(layer)
                assert not layer.weight_in_use(("default",))[~mask].any()
                kept = mask if trains == "weights" else mask.flatten()[state.positions.long()]
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensor = optimizer.state[state.watched][moment]
                    assert not tensor[~kept].any() and tensor[kept].any()


def test_sr_ste_decays_masked_weights_geometrically_and_moves_no_other():
    model = model_of(recipe="ast", trains="weights", pull=0.5, pull_ramp=0, mask_every=100, stop=TOTAL)
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.1)
    controller = SparsityController(model, optimizer, TOTAL)
    before = [layer.masked_weight(("default",)) for layer in layers_of(model)]
    before = [weight.inside([weight.parts[0].tensors], 0, weight.shape[0]).detach() for weight in before]
    for _ in range(4):  # no gradient of data
        (model(torch.zeros(1, SIZES[0])) * 0).sum().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    for layer, old in zip(layers_of(model), before, strict=True):
        weight, mask = layer.masked_weight(("default",)), mask_of(layer)
        new = weight.inside([weight.parts[0].tensors], 0, weight.shape[0])
        torch.testing.assert_close(new[~mask], old[~mask] * (1 - 0.1 * 0.5) ** 4)
        assert torch.equal(new[mask], old[mask])


def test_the_low_rank_pull_is_the_gradient_of_the_masked_weights_norm():
    model = model_of(recipe="ast", pull=0.5, pull_ramp=0, mask_every=100)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.settled("default").B.normal_()
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.0)
    SparsityController(model, optimizer, TOTAL)
    expected = []
    for layer in layers_of(model):
        state, mask = layer.settled("default"), mask_of(layer)
        a, b = (p.detach().double().requires_grad_() for p in (state.A, state.B))
        inside = layer.base_layer.weight.detach().double() + state.config.scale * b @ a
        (0.25 * (inside * ~mask).square().sum()).backward()
        expected += [a.grad, b.grad]
    (model(torch.zeros(1, SIZES[0])) * 0).sum().backward()
    optimizer.step()
    states = [layer.settled("default") for layer in layers_of(model)]
    found = [p.grad for state in states for p in (state.A, state.B)]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-5)


def test_cast_moves_masked_weights_to_zero_in_the_expected_number_of_steps_and_not_across():
    model = model_of(recipe="cast", pull=1.0, pull_ramp=0, mask_every=1000, stop=1000)
    lr = 0.01
    optimizer = optimizer_of(model, lr=lr, weight_decay=0.0)
    controller = SparsityController(model, optimizer, 1000)
    layer = layers_of(model)[0]
    start, mask = layer.base_layer.weight.detach().clone(), mask_of(layer)
    steps = torch.ceil(start.abs() / lr)
    for step in range(1, 30):
        (model(torch.zeros(1, SIZES[0])) * 0).sum().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        weight = layer.weight_in_use(("default",))
        clear = (start.abs() / lr - steps + 1) > 1e-3  # not at a boundary, where one rounding decides
        assert torch.equal((weight == 0)[~mask & clear], (steps <= step)[~mask & clear])
        assert not (weight.sign() * start.sign() < 0).any()
        assert torch.equal(weight[mask], start[mask])


def test_casts_projection_changes_little_and_its_scale_folds():
    model = model_of(recipe="cast", pull=20.0, pull_ramp=0, stop=16)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, TOTAL)
    run(model, optimizer, controller, range(15))
    assert all(float(layer.settled("default").beta) == 1 for layer in layers_of(model))
    before = model(batch(0)[0])
    norms = [record.masked_norm for record in controller.history]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 1e-3
    with torch.no_grad():
        for layer in layers_of(model):
            layer.settled("default").put(beta=0.0)
    torch.testing.assert_close(model(batch(0)[0]), before, rtol=1e-3, atol=1e-4)
    assert all(layer.settled("default").log_scale.any() for layer in layers_of(model))
    after, zeros = model(batch(0)[0]), [layer.weight_in_use(("default",)) == 0 for layer in layers_of(model)]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(batch(0)[0]), after)
    for module, zero in zip((merged.first, merged.second), zeros, strict=True):
        assert torch.equal(module.weight == 0, zero) and zero.view(zero.shape[0], -1, 4).sum(2).min() >= 2


def test_both_masks_of_bdwp_have_their_pattern():
    model = model_of(recipe="bdwp", pattern="2:8")
    optimizer = optimizer_of(model)
    run(model, optimizer, SparsityController(model, optimizer, TOTAL), range(6))  # the last event is after step 6
    for layer in layers_of(model):
        state, mask = layer.settled("default"), mask_of(layer)
        back = unpack_bits(state.back_mask, layer.sides[1])
        assert mask.view(mask.shape[0], -1, 8).sum(2).unique().tolist() == [2]
        assert back.t().reshape(mask.shape[1], -1, 8).sum(2).unique().tolist() == [2]
        inside = layer.masked_weight(("default",))
        scores = inside.inside([inside.parts[0].tensors], 0, mask.shape[0]).abs()
        assert torch.equal(back, NM(2, 8).keep(scores.t().contiguous()).t())


CASES = {
    **{recipe: {} for recipe, plan in RECIPES.items() if plan.changes},
    "ast, slorb": {"recipe": "ast", "slorb": 4},
    "ast, weights": {"recipe": "ast", "trains": "weights"},
    "gradual, sparse": {"recipe": "gradual", "trains": "sparse"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    fields = {"recipe": case, "start": 2, "stop": 14, "pull_ramp": 5, **CASES[case]}
    base, steps = TwoLayers(*SIZES), 17
    model = model_of(copy.deepcopy(base), **fields)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, TOTAL)

    def keep(step):
        if step in (1, 5, 6, 14):
            model.save_pretrained(tmp_path / str(step))
            torch.save(optimizer.state_dict(), tmp_path / str(step) / "optimizer.pt")

    run(model, optimizer, controller, range(steps), keep)
    final = [layer.weight_in_use(("default",)) for layer in layers_of(model)]
    for stop in (1, 5, 6, 14):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(stop), is_trainable=True)
        second = optimizer_of(again)
        second.load_state_dict(torch.load(tmp_path / str(stop) / "optimizer.pt"))
        resumed = SparsityController(again, second, TOTAL)
        run(again, second, resumed, range(stop, steps))
        assert resumed.history == controller.history
        for mine, wanted in zip(layers_of(again), final, strict=True):
            assert torch.equal(mine.weight_in_use(("default",)), wanted), stop


def test_steps_that_a_scaler_skips_do_not_count():
    model = model_of(recipe="gradual", start=0, stop=6, mask_every=2)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, TOTAL)
    for step in range(6):
        run(model, optimizer, controller, [step])
        controller.step()  # without a step of the optimizer
    assert [record.step for record in controller.history] == [2, 4, 6]


@pytest.mark.parametrize("recipe", ["pst", "ast", "mdgf", "bdwp"])
def test_no_temporary_of_a_step_and_its_event_is_larger_than_a_panel(recipe):
    size, limit = 256, 64 * 1024
    # a whole matrix's threshold takes a histogram of 512 KiB, whatever its size
    fields = {"recipe": recipe, "scope": "row", "mask_every": 1, "start": 0, "stop": 10, "r": 2}
    model = model_of(TwoLayers(size, size, size), **fields)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, TOTAL)
    x = torch.randn(4, size)
    with panel_limit(limit), LargestTensor() as largest:
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    assert len(controller.history) == 2
    assert 0 < largest.nbytes <= limit < size * size * 4


def _train_on(rank, folder):
    join_group(rank, f"{folder}/store")
    model = model_of(recipe="pst", start=0, stop=8, mask_every=2, pattern=0.6)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    controller = SparsityController(wrapped, optimizer, 10)
    for step in range(10):
        x, y = (part.chunk(2)[rank] for part in batch(step))
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    torch.save([layer.settled("default").mask for layer in layers_of(model)], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_have_equal_masks(tmp_path):
    run_on_two(_train_on, str(tmp_path))
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    model = model_of(recipe="pst", start=0, stop=8, mask_every=2, pattern=0.6)
    optimizer = optimizer_of(model)
    run(model, optimizer, SparsityController(model, optimizer, 10), range(10))
    alone = [layer.settled("default").mask for layer in layers_of(model)]
    assert all(torch.equal(a, b) for a, b in zip(one, alone, strict=True))
