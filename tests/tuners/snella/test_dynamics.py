"""SNELLA's shares of layers; numbers are of the oracles in the method's spec."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import SnellaConfig, SparsityController
from sparse_peft.dynamics.records import record_from_dict
from sparse_peft.procedures.driver import unpacked
from sparse_peft.support import BudgetSchedule
from sparse_peft.tuners.delta_layer import TunerLayer
from sparse_peft.tuners.snella.records import Allocation

SIZES = {"0": 12 * 16, "2": 16 * 6, "4": 6 * 6}


def make(seed=0, **config):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 6))
    fields = {"r": 4, "target_sparsity": 0.8, "allocate_start": 2, "allocate_stop": 12, "allocate_every": 2}
    return get_peft_model(base, SnellaConfig(target_modules=list(SIZES), seed=seed, **{**fields, **config}))


def states(model):
    return {m.name: m.deltas["default"] for m in model.modules() if isinstance(m, TunerLayer)}


def counts(model):
    return {name: state.entries for name, state in states(model).items()}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)


def train(model, optimizer, controller, steps, micro=1):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randn(8, 6, generator=generator)
        for a, b in zip(x.chunk(micro), y.chunk(micro), strict=True):
            ((model(a) - b).square().mean() / micro).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()


def dynamics(model, total_steps=20):
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=total_steps)
    return controller, controller.parts["adapters"]["default"], optimizer


@pytest.mark.parametrize("initial, target", [(1000, 100), (500, 500), (7, 3)])
def test_oracle_5_the_budget_falls_cubically(initial, target):
    schedule = BudgetSchedule(initial, target, 10, 110, 10)
    assert schedule.at(0) == schedule.at(10) == initial
    assert schedule.at(110) == schedule.at(10_000) == target
    assert schedule.at(60) == target + round((initial - target) / 8)
    course = [schedule.at(step) for step in range(130)]
    assert all(a >= b for a, b in itertools.pairwise(course))
    assert [step for step in range(200) if schedule.is_event(step)] == [*range(20, 111, 10)]
    assert BudgetSchedule(9, 3, 0, 25, 10).is_event(25)


@pytest.mark.parametrize("initial", [0.0, 0.25])
@pytest.mark.parametrize("kernel", ["distance", "mixed"])
def test_oracle_5_every_sharing_gives_exactly_the_budget(initial, kernel):
    model = make(sparsity=initial, kernel=kernel)
    controller, _, optimizer = dynamics(model)
    seen = []
    for step in range(20):
        train(model, optimizer, controller, [step])
        seen.append(counts(model))
    began = sum(size - -int(-initial * size // 1) for size in SIZES.values())
    target = sum(SIZES.values()) - 260  # 80 % of 324, rounded up
    schedule = BudgetSchedule(began, target, 2, 12, 2)
    for step, found in enumerate(seen, start=1):
        last_event = max((s for s in range(step + 1) if schedule.is_event(s)), default=0)
        assert sum(found.values()) == schedule.at(last_event), step
        assert all(1 <= found[name] <= SIZES[name] for name in SIZES)
    assert seen[11] == seen[19] and len({tuple(found.values()) for found in seen}) > 3
    steps = [record.step for record in controller.history]
    assert steps == [4, 6, 8, 10, 12]
    for record in controller.history:
        assert record.budget == sum(layer.entries for layer in record.layers.values()) == schedule.at(record.step)
        assert sum(layer.score for layer in record.layers.values()) == pytest.approx(1)
    model(torch.randn(2, 12))
    for state in states(model).values():
        assert int((state.dense() != 0).sum()) == state.entries


def test_oracle_6_sharing():
    model = make(at_least=0)
    _, own, _ = dynamics(model)
    share = own.share
    own.parts = {name: SimpleNamespace(state=SimpleNamespace(numel=100)) for name in ("a", "b", "c")}
    assert share({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 90) == {"a": 30, "b": 30, "c": 30}
    even, doubled = share({"a": 1.0, "b": 1.0, "c": 2.0}, 120), share({"a": 2.0, "b": 1.0, "c": 2.0}, 120)
    assert even == {"a": 30, "b": 30, "c": 60} and doubled["a"] > even["a"]
    # what a full layer cannot take goes to the others, in proportion
    assert share({"a": 8.0, "b": 1.0, "c": 3.0}, 180) == {"a": 100, "b": 20, "c": 60}
    assert share({"a": 0.0, "b": 0.0, "c": 0.0}, 90) == {"a": 30, "b": 30, "c": 30}
    own.parts["a"].state.numel = 400
    assert share({"a": 0.0, "b": 0.0, "c": 0.0}, 60) == {"a": 40, "b": 10, "c": 10}
    own.config.weigh_by_size = True
    assert share({"a": 1.0, "b": 1.0, "c": 1.0}, 60) == {"a": 40, "b": 10, "c": 10}


def test_scores_are_sensitivity_times_uncertainty_of_this_steps_gradients():
    model = make(beta1=0.7, beta2=0.6)
    _, own, optimizer = dynamics(model)
    averages = {name: [(0.0, 0.0), (0.0, 0.0)] for name in SIZES}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        for name, state in states(model).items():
            for i, parameter in enumerate((state.A, state.B)):
                seen = (parameter * parameter.grad).abs().detach().double()
                mean, off = averages[name][i]
                mean = 0.7 * mean + 0.3 * seen
                averages[name][i] = mean, 0.6 * off + 0.4 * (seen - mean).abs()
        optimizer.step()
        optimizer.zero_grad()
    scores = {name: sum(float((mean * off).mean()) for mean, off in parts) for name, parts in averages.items()}
    total = sum(scores.values())
    assert own.scores() == pytest.approx({name: score / total for name, score in scores.items()}, rel=1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_oracle_10_a_step_that_is_not_finite_leaves_scores_and_shares(bad):
    model = make()
    controller, own, optimizer = dynamics(model)
    train(model, optimizer, controller, range(4))
    before = copy.deepcopy(own.state_dict())
    model(torch.randn(4, 12)).square().mean().backward()
    states(model)["2"].B.grad[0, 0, 0] = bad
    own.before_step(5)
    after = own.state_dict()
    for name in SIZES:
        assert all(torch.equal(after["layers"][name][key], value) for key, value in before["layers"][name].items())
    assert all(0 < score < 1 for score in own.scores().values())
    assert min(counts(model).values()) > 1


def test_a_step_that_a_scaler_skips_does_not_count():
    model = make()
    controller, own, optimizer = dynamics(model)
    train(model, optimizer, controller, range(3))
    before, found = own.scores(), counts(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.randn(4, 12)).sum()).backward()
    states(model)["0"].A.grad[0, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert controller.step() == [] and own.scores() == before and counts(model) == found
    assert controller.completed_steps == 3


def test_gradients_are_looked_at_without_their_scale():
    plain, scaled = (make() for _ in range(2))
    found = []
    for model, scale in ((plain, None), (scaled, 1024.0)):
        _, own, optimizer = dynamics(model)
        generator = torch.Generator().manual_seed(0)
        (model(torch.randn(8, 12, generator=generator)).square().mean() * (scale or 1)).backward()
        if scale:
            optimizer.grad_scale = torch.tensor(scale)  # as a fused optimizer finds it
        own.before_step(1)
        found.append(own.state_dict()["layers"]["0"]["sensitivity_A"])
    torch.testing.assert_close(*found)


def test_without_any_gradient_all_layers_are_equally_sparse():
    model = make()
    _, own, _ = dynamics(model)
    found = own.share(own.scores(), 162)
    assert found == {"0": 96, "2": 48, "4": 18}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("cut", [1, 5, 8, 15])
@pytest.mark.parametrize("fields", [{}, {"tau_interval": 3, "kernel": "mixed"}])
def test_resume_is_exact(cut, fields, micro):
    whole = make(**fields)
    optimizer = adamw(whole)
    controller = SparsityController(whole, optimizer, total_steps=20)
    train(whole, optimizer, controller, range(20), micro)

    first = make(**fields)
    optimizer = adamw(first)
    train(first, optimizer, SparsityController(first, optimizer, total_steps=20), range(cut), micro)
    saved = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    second = make(**fields)
    second.load_state_dict(saved[0])
    optimizer = adamw(second)
    optimizer.load_state_dict(saved[1])
    resumed = SparsityController(second, optimizer, total_steps=20)
    train(second, optimizer, resumed, range(cut, 20), micro)
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.history == controller.history and resumed.completed_steps == 20
    assert controller.history == [record_from_dict(record.to_dict()) for record in controller.history]


def test_a_state_of_another_rank_is_refused():
    model = make()
    optimizer = adamw(model)
    train(model, optimizer, SparsityController(model, optimizer, total_steps=20), range(3))
    saved = unpacked(optimizer.state_dict()["param_groups"][0]["sparse_peft"])
    other = make(r=2)
    with pytest.raises(ValueError, match=r"layer 0.*\(2, 12, 2\).*\(2, 12, 1\)"):
        SparsityController(other, adamw(other), total_steps=20).load_state_dict(saved)


def test_shares_need_the_length_of_the_run_and_room():
    model = make(allocate_start=0.1)
    with pytest.raises(ValueError, match=r"allocate_start=0\.1"):
        SparsityController(model, adamw(model))
    model = make(allocate_start=9, allocate_stop=9)
    with pytest.raises(ValueError, match=r"allocate_stop=9.*later"):
        SparsityController(model, adamw(model))
    model = make(target_sparsity=0.99, at_least=3)
    with pytest.raises(ValueError, match=r"target_sparsity=0\.99.*3 of 324.*at_least=3"):
        SparsityController(model, adamw(model))


def test_training_without_a_controller_warns_where_layers_compete():
    model = make()
    model(torch.randn(4, 12)).sum().backward()
    with pytest.warns(UserWarning, match="shares the entries among the layers"):
        adamw(model).step()
    quiet = make(target_sparsity=None)
    quiet(torch.randn(4, 12)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = adamw(quiet)
        optimizer.step()
    assert SparsityController(quiet, optimizer).state_dict()["adapters"] == {}


def test_what_is_logged():
    record = Allocation(3, "default", 30, {})
    assert record_from_dict(record.to_dict()) == record
    model = make()
    controller, _, optimizer = dynamics(model)
    train(model, optimizer, controller, range(12))
    logs = controller.history[-1].logs()
    assert logs["sparsity/density"] == pytest.approx(64 / 324)
    assert logs["sparsity/lowest_layer_density"] <= logs["sparsity/density"] <= logs["sparsity/highest_layer_density"]
