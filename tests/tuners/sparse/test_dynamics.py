"""Reselection, against the algorithm written densely, and its invariants."""

import copy
import io

import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import (
    SparseConfig,
    SparsityController,
    base_weights,
    panel_limit,
)
from sparse_peft.ops.gradient_observers import observer_of
from sparse_peft.support import Support
from tests.helpers.reselection import adapted, assert_equal, snapshot
from tests.helpers.training_loop import batch_at, optimizer_of, train
from tests.helpers.two_layers import TwoLayers, layers_of

METHODS = ("accumulated_gradient", "momentum", "set", "rigl")


# ---------------------------------------------------------------------- the algorithm, densely


class DenseSpiel:
    """SpIEL-AG of TwoLayers in float64 with AdamW: dense weights, dense gradients, Python loops over entries."""

    def __init__(self, reference, supports, total, every, window, lr, clip, everything):
        self.w = {n: getattr(reference, n).weight.detach().double() for n in supports}
        self.bias = reference.first.bias.detach().double()
        self.v = {n: {int(i): 0.0 for i in s} for n, s in supports.items()}
        self.m = {n: dict.fromkeys(v, (0.0, 0.0)) for n, v in self.v.items()}
        self.total, self.every, self.window, self.lr, self.clip = total, every, window, lr, clip
        self.everything = everything
        self.t = 0
        self.seen = []

    def gradients(self, x, y):
        w = {}
        for name, base in self.w.items():
            flat = base.reshape(-1).clone()
            for i, value in self.v[name].items():
                flat[i] += value
            w[name] = flat.view_as(base).requires_grad_()
        hidden = torch.relu(x.double() @ w["first"].t() + self.bias)
        F.cross_entropy(hidden @ w["second"].t(), y).backward()
        return {name: weight.grad.reshape(-1) for name, weight in w.items()}

    def step(self, x, y):
        self.t += 1
        g = self.gradients(x, y)
        if self.clip is not None:
            norm = sum(float(g[n][i]) ** 2 for n in g for i in self.v[n]) ** 0.5
            g = {n: grad * min(1.0, self.clip / (norm + 1e-6)) for n, grad in g.items()}
        for n, entries in self.v.items():
            for i in entries:
                m, v = self.m[n][i]
                grad = float(g[n][i])
                m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
                self.m[n][i] = (m, v)
                update = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)) ** 0.5 + 1e-8)
                entries[i] = entries[i] * (1 - self.lr * 0.01) - self.lr * update
        if (self.t - self.window) % self.every > self.every - self.window or (self.t - self.window) % self.every == 0:
            self.seen.append(g)
        if self.t >= self.window and (self.t - self.window) % self.every == 0:
            self.event()

    def event(self):
        rate = 1.0 if self.t == self.window else 0.2 * (1 - self.t / self.total)
        seen, self.seen = self.seen, []
        assert len(seen) == self.window
        for n, entries in self.v.items():
            k = len(entries)
            inactive = [i for i in range(self.w[n].numel()) if i not in entries]
            candidates = sorted(inactive, key=lambda i: -abs(float(seen[0][n][i])))[: None if self.everything else k]
            total = {i: sum(float(g[n][i]) for g in seen) for i in [*candidates, *entries]}
            up = sorted(entries, key=lambda i: abs(entries[i]))[: int(k * rate)]
            best = sorted([*candidates, *up], key=lambda i: -abs(total[i]))[: len(up)]
            for i in set(up) - set(best):
                del entries[i], self.m[n][i]
            for i in set(best) - set(up):
                mean = total[i] / len(seen)
                square = sum(float(g[n][i]) ** 2 for g in seen) / len(seen)
                entries[i] = 0.0
                self.m[n][i] = (mean * (1 - 0.9**self.t), square * (1 - 0.999**self.t))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_spiel_ag_is_the_algorithm(accumulation, clip):
    # with all positions as candidates it does not matter which part of a batch proposed them
    model = adapted(candidates=1.0 if accumulation == 1 else 1e9)
    reference = copy.deepcopy(model.get_base_model())
    supports = {n: layer.support("default").indices for n, layer in layers_of(model).items()}
    base = TwoLayers()
    with base_weights(model):
        for n in ("first", "second"):
            getattr(base, n).weight.data.copy_(getattr(reference, n).base_layer.weight)
        base.first.bias.data.copy_(reference.first.base_layer.bias)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=30)
    dense = DenseSpiel(base, supports, 30, 6, 3, 1e-2, clip, everything=accumulation > 1)
    for step in range(30):
        train(model, optimizer, controller, [step], accumulation, clip)
        dense.step(*batch_at(step))
        for n, (indices, values) in snapshot(model).items():
            assert indices.tolist() == sorted(dense.v[n]), f"step {step + 1}, {n}"
            expected = torch.tensor([dense.v[n][i] for i in sorted(dense.v[n])])
            torch.testing.assert_close(values, expected, rtol=1e-3, atol=2e-5)
    assert [record.step for record in controller.history] == [3, 9, 15, 21, 27]


@pytest.mark.parametrize("conv1d", [False, True])
def test_spiel_ma_grows_by_the_product_of_the_covers(conv1d):
    model = adapted("momentum", TwoLayers(conv1d=conv1d))
    optimizer = optimizer_of(model, "sm3")
    controller = SparsityController(model, optimizer, total_steps=30)
    for step in range(9):
        if step in (2, 8):  # the step before an event
            before = snapshot(model)
        train(model, optimizer, controller, [step])
        if step not in (2, 8):
            continue
        for n, layer in layers_of(model).items():
            state = optimizer.state[layer.deltas["default"].values]
            scores = torch.outer(state["row"], state["col"]).reshape(-1)
            old = before[n][0].long()
            scores[old] = -1
            new = layer.support("default").indices.long()
            grown = new[~torch.isin(new, old)]
            count = int(old.numel() * (1.0 if step == 2 else 0.2 * (1 - 9 / 30)))
            assert torch.equal(grown, scores.topk(count).indices.sort().values)


@pytest.mark.parametrize("conv1d", [False, True])
def test_candidates_lie_in_the_stored_layout(conv1d):
    """GPT-2's Conv1D stores (in, out): its candidates are the largest of that weight's own gradient."""
    model = adapted(base=TwoLayers(conv1d=conv1d))
    dense = copy.deepcopy(model.get_base_model())
    SparsityController(model, optimizer_of(model), total_steps=12)
    x, y = batch_at(0)
    F.cross_entropy(model(x), y).backward()
    plain = TwoLayers(conv1d=conv1d)
    for n in ("first", "second"):
        plain.get_submodule(n).load_state_dict(dense.get_submodule(n).base_layer.state_dict())
    F.cross_entropy(plain(x), y).backward()
    for n, layer in layers_of(model).items():
        gradient = plain.get_submodule(n).weight.grad.reshape(-1).abs()
        gradient[layer.support("default").indices.long()] = 0
        window = observer_of(layer.observer_key)
        best = gradient.topk(window.positions.numel()).indices.sort().values
        assert window.positions.numel() > 0 and torch.equal(window.positions, best)


def test_momentum_needs_no_sm3():
    """The covers do not depend on their owner."""
    model = adapted("momentum")
    controller = SparsityController(model, optimizer_of(model), total_steps=30)
    train(model, controller.optimizer, controller, range(2))
    for n, track in controller.parts["adapters"]["default"].tracks.items():
        layer = layers_of(model)[n]
        for accumulator, size in zip(track.accumulators, (layer.out_features, layer.in_features), strict=True):
            assert bool((accumulator > 0).any()) and accumulator.shape == (size,)


# ---------------------------------------------------------------------- invariants


@given(
    selection=st.sampled_from(METHODS),
    every=st.integers(1, 7),
    window=st.integers(1, 7),
    rate=st.floats(0.01, 1.0),
    decay=st.sampled_from(["linear", "cosine", "cubic", "constant"]),
    start=st.integers(0, 6),
    redistribute=st.booleans(),
    kind=st.sampled_from(["adamw", "by age", "sm3"]),
    density=st.sampled_from([0.05, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=25)
def test_whatever_the_schedule_the_invariants_hold(
    selection, every, window, rate, decay, start, redistribute, kind, density
):
    redistribute = redistribute and selection != "set"
    model = adapted(
        selection,
        reselect_every=every,
        accumulate=0 if selection == "set" else min(window, every),
        density=density,
        replace_rate=rate,
        schedule=decay,
        reselect_start=start,
        redistribute=redistribute,
    )
    base = {n: layer.base_parameter.detach().clone() for n, layer in layers_of(model).items()}
    optimizer = optimizer_of(model, kind)
    controller = SparsityController(model, optimizer, total_steps=16)
    total = sum(values.numel() for _, values in snapshot(model).values())
    for step in range(16):
        x, y = batch_at(step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        before = snapshot(model)
        states = {n: _states(optimizer, model, n) for n in before}
        records = controller.step()
        optimizer.zero_grad()
        after = snapshot(model)
        assert sum(values.numel() for _, values in after.values()) == total
        for n, (indices, values) in after.items():
            rows, cols = base[n].shape
            assert indices.numel() == values.numel() and indices.dtype == torch.int32
            assert bool((indices[1:] > indices[:-1]).all()) and indices[0] >= 0 and indices[-1] < rows * cols
            assert redistribute or indices.numel() == before[n][0].numel()
            old = Support((rows, cols), before[n][0])
            kept = old.contains(indices)
            slots = old.slots(indices[kept])
            assert torch.equal(values[kept], before[n][1][slots]), "entries that stay keep their value"
            assert not bool(values[~kept].any()), "new ones begin at 0"
            for key, tensor in _states(optimizer, model, n).items():
                assert torch.equal(tensor[kept], states[n][key][slots]), key
            if records:
                change = records[0].layers[n]
                assert change.replaced == int((~kept).sum()) and change.entries == indices.numel()
                weight = model.get_submodule(f"base_model.model.{n}").get_delta_weight("default")
                assert int((weight.reshape(-1)[(~old.to_mask()).reshape(-1)] != 0).sum()) == 0
        with base_weights(model):
            for n, layer in layers_of(model).items():
                assert torch.equal(layer.base_parameter, base[n]), "the base is the base"
        assert [r.step for r in records] == (
            [step + 1] if controller.parts["adapters"]["default"].schedule.is_event(step + 1) else []
        )
    assert sum(controller.history[-1].ages) == total if controller.history else True


def _states(optimizer, model, name):
    values = layers_of(model)[name].deltas["default"].values
    state = optimizer.state.get(values, {})
    return {k: t.expand(values.shape).clone() for k, t in state.items() if k not in ("row", "col", "step")}


def test_hundreds_of_updates_with_hardly_any_gradient():
    """RigL where only one input is ever on: candidates run out, the budget must not."""
    model = adapted("rigl", reselect_every=1, accumulate=1, schedule="constant", replace_rate=0.5)
    optimizer = optimizer_of(model, "sgd")
    controller = SparsityController(model, optimizer, total_steps=400)
    counts = {n: indices.numel() for n, (indices, _) in snapshot(model).items()}
    x, y = batch_at(0)
    x[:, 1:] = 0
    seen = set()
    for _ in range(400):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        seen |= set(snapshot(model)["first"][0].tolist())
    for n, (indices, _) in snapshot(model).items():
        assert indices.numel() == counts[n] == indices.unique().numel()
    assert len(seen) == 17 * 33, "what has no gradient is filled up at random, and comes to all positions"


def test_rigl_finds_the_entries_that_matter():
    """A regression whose target differs from the base in 20 of 561 entries."""
    model = adapted("rigl", reselect_every=5, schedule="cosine", replace_rate=0.5, density=60 / 726, reselect_stop=0.8)
    layer = layers_of(model)["first"]
    target = copy.deepcopy(layer.base_layer)
    truth = torch.randperm(17 * 33)[:20]
    target.weight.data.view(-1)[truth] += 1.0
    optimizer = optimizer_of(model, lr=3e-2)
    controller = SparsityController(model, optimizer, total_steps=300)
    for step in range(300):
        x = torch.randn(64, 17, generator=torch.Generator().manual_seed(step))
        F.mse_loss(layer(x), target(x)).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert bool(layer.support("default").contains(truth).all())


# ---------------------------------------------------------------------- accumulated and failed steps


def test_gradient_accumulation_does_not_change_the_statistics():
    """One batch, or its parts: the same positions (all are candidates), the same values but for rounding."""
    runs = []
    for parts in (1, 4):
        model = adapted(candidates=1e9)
        optimizer = optimizer_of(model)
        controller = SparsityController(model, optimizer, total_steps=12)
        train(model, optimizer, controller, range(12), parts)
        runs.append(snapshot(model))
    for n in runs[0]:
        assert torch.equal(runs[0][n][0], runs[1][n][0])
        torch.testing.assert_close(runs[0][n][1], runs[1][n][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("selection", ["accumulated_gradient", "momentum", "rigl"])
def test_a_step_that_is_not_finite_does_not_enter_the_statistics(selection):
    """The gradients are NaN, the loop zeroes them and steps all the same."""
    model = adapted(selection)
    optimizer = optimizer_of(model, "sgd", lr=0.1)
    controller = SparsityController(model, optimizer, total_steps=30)
    for step in range(9):
        x, y = batch_at(step)
        if step in (0, 1, 6):
            x = x * float("nan")
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_(0.0)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert [record.step for record in controller.history] == ([3, 9] if selection != "rigl" else [6])
    for _, values in snapshot(model).values():
        assert bool(values.isfinite().all())
    for record in controller.history:
        assert record.replaced > 0


@pytest.mark.parametrize("selection", ["accumulated_gradient", "rigl"])
def test_without_a_finite_step_in_the_window_nothing_is_replaced(selection):
    model = adapted(selection, accumulate=1)
    optimizer = optimizer_of(model, "sgd")
    controller = SparsityController(model, optimizer, total_steps=30)
    start = snapshot(model)
    for step in range(6):
        x, y = batch_at(step)
        F.cross_entropy(model(x * float("nan")), y).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.history and not any(record.replaced for record in controller.history)
    assert_equal(snapshot(model), start)


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", ["adamw", "by age", "sm3"])
@pytest.mark.parametrize("selection", METHODS)
def test_a_run_resumed_after_any_step_is_the_uninterrupted_one(selection, kind):
    whole = adapted(selection)
    optimizer = optimizer_of(whole, kind)
    controller = SparsityController(whole, optimizer, total_steps=16)
    saved = []
    for step in range(16):
        train(whole, optimizer, controller, [step])
        file = io.BytesIO()
        torch.save({"adapter": get_peft_model_state_dict(whole), "optimizer": optimizer.state_dict()}, file)
        saved.append(file)
    for stop in (0, 1, 2, 4, 6, 7, 8, 14):
        saved[stop].seek(0)
        state = torch.load(saved[stop], weights_only=True)
        model = adapted(selection)
        set_peft_model_state_dict(model, state["adapter"])
        other = optimizer_of(model, kind)
        late = stop % 2 == 0
        if late:  # whichever comes first
            other.load_state_dict(state["optimizer"])
        resumed = SparsityController(model, other, total_steps=16)
        if not late:
            other.load_state_dict(state["optimizer"])
        assert resumed.completed_steps == stop + 1
        train(model, other, resumed, range(stop + 1, 16))
        assert_equal(snapshot(model), snapshot(whole))
        assert resumed.history == controller.history


def test_a_redistributed_run_is_saved_loaded_and_resumed(tmp_path):
    whole = adapted(redistribute=True, candidates=2.0)
    optimizer = optimizer_of(whole)
    controller = SparsityController(whole, optimizer, total_steps=16)
    train(whole, optimizer, controller, range(10))
    sizes = {n: values.numel() for n, (_, values) in snapshot(whole).items()}
    assert sizes != {n: values.numel() for n, (_, values) in snapshot(adapted()).items()}, "entries moved"
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    x, _ = batch_at(0)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    assert torch.equal(loaded(x), whole.eval()(x))
    whole.train()

    model = adapted(redistribute=True, candidates=2.0)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    other = optimizer_of(model)
    other.load_state_dict(state)
    resumed = SparsityController(model, other, total_steps=16)
    train(whole, optimizer, controller, range(10, 16))
    train(model, other, resumed, range(10, 16))
    assert_equal(snapshot(model), snapshot(whole))


# ---------------------------------------------------------------------- other forward paths


@pytest.mark.parametrize("path", ["overlay", "additive", "checkpointing", "panels", "compiled"])
def test_every_forward_path_shows_the_same_gradients(path):
    def run(path):
        model = adapted(resident=path != "overlay")
        if path == "additive":
            for layer in layers_of(model).values():
                layer.base_layer.register_forward_hook(lambda *_: None)
        called = torch.compile(model, backend="aot_eager") if path == "compiled" else model
        optimizer = optimizer_of(model)
        controller = SparsityController(model, optimizer, total_steps=12)
        for step in range(10):
            x, y = batch_at(step)
            x.requires_grad_()
            out = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
                if path == "checkpointing"
                else called(x)
            )
            F.cross_entropy(out, y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        return snapshot(model)

    expected = run("resident")
    with panel_limit(2000 if path == "panels" else 2**26):
        found = run(path)
    for n, (indices, values) in expected.items():
        assert torch.equal(indices, found[n][0])
        torch.testing.assert_close(values, found[n][1], rtol=1e-3, atol=1e-5)


def test_compiled_training_is_not_compiled_anew_for_each_reselection():
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=30)
    frames = []
    for step in range(28):
        x, y = batch_at(step)
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        frames.append(dynamo.utils.counters["frames"]["ok"])
    assert len(controller.history) == 5
    assert frames[-1] == frames[3], frames


def test_a_frozen_adapter_beside_it_is_left_alone():
    model = adapted()
    model.add_adapter(
        "other", SparseConfig(target_modules=["first", "second"], density=0.1, scale=1.0, seed=9, init_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    for layer in layers_of(model).values():
        layer.deltas["other"].requires_grad_(False)
    other = {
        n: (layer.support("other").indices.clone(), layer.deltas["other"].values.clone())
        for n, layer in layers_of(model).items()
    }
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=12)
    train(model, optimizer, controller, range(10))
    for n, layer in layers_of(model).items():
        assert torch.equal(layer.support("other").indices, other[n][0])
        assert torch.equal(layer.deltas["other"].values, other[n][1])
    grown = sum(record.replaced for record in controller.history)
    assert grown > 0


def test_no_step_makes_a_tensor_of_the_weights_size():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(512, 768, bias=False)
            self.second = nn.Linear(768, 64, bias=False)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    limit = 192 * 1024
    for selection in METHODS:
        model = adapted(selection, Wide(), density=0.005, reselect_every=3, accumulate=0 if selection == "set" else 2)
        optimizer = optimizer_of(model)
        with panel_limit(limit):
            controller = SparsityController(model, optimizer, total_steps=12)
            x, y = torch.randn(8, 512), torch.randint(0, 64, (8,))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            controller.step()
            with LargestTensor() as largest:
                for _ in range(6):
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    controller.step()
                    optimizer.zero_grad()
        assert controller.history
        assert largest.nbytes <= limit < 512 * 768 * 4 / 4, selection
