"""SaRA: what trains, what the nuclear norm adds, what freezes; against dense computations."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from sparse_peft import SaRAConfig, SparsityController, panel_limit, sara_learning_rate, select_support
from sparse_peft.report import read_history, write_history
from sparse_peft.tuners.sara.records import Freezing
from tests.helpers.training_loop import batch_at, optimizer_of, train
from tests.helpers.two_layers import TwoLayers, assert_base_untouched, layers_of

NAMES = ["first", "second"]


def adapted(base=None, **config):
    torch.manual_seed(0)
    base = TwoLayers() if base is None else base
    config = {"progressive": None, "nuclear_weight": 0.0, "nuclear_min_size": 0, **config}
    reference = copy.deepcopy(base)
    return get_peft_model(base, SaRAConfig(target_modules=NAMES, scale=1.0, **config)), reference


def values(model):
    return {n: layer.deltas["default"].values.detach().clone() for n, layer in layers_of(model).items()}


def weights(model, reference):
    """The entries as they are now, in float32."""
    return {
        n: getattr(reference, n).weight.detach().reshape(-1)[layer.support("default").indices.long()]
        + layer.deltas["default"].values.detach()
        for n, layer in layers_of(model).items()
    }


# ---------------------------------------------------------------------- what trains


@pytest.mark.parametrize("threshold", [0.02, 0.1, 1.0])
def test_s1_a_threshold_takes_all_that_is_below_it(threshold):
    model, reference = adapted(threshold=threshold)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.support("default").to_mask(), getattr(reference, name).weight.abs() < threshold)


@pytest.mark.parametrize("allocation", ["numel", "global"])
def test_s1_a_density_takes_the_smallest(allocation):
    model, reference = adapted(density=0.1, allocation=allocation)
    chosen = torch.cat([layer.support("default").to_mask().reshape(-1) for layer in layers_of(model).values()])
    sizes = torch.cat([getattr(reference, n).weight.detach().abs().reshape(-1) for n in NAMES])
    assert int(chosen.sum()) == round(0.1 * sizes.numel())
    if allocation == "global":
        assert sizes[chosen].max() < sizes[~chosen].min()
    for name, layer in layers_of(model).items():
        mask, size = layer.support("default").to_mask(), getattr(reference, name).weight.abs()
        assert size[mask].max() < size[~mask].min()


def test_some_layers_may_have_nothing_below_the_threshold():
    base = TwoLayers()
    with torch.no_grad():
        base.first.weight.add_(base.first.weight.sign())
    model, reference = adapted(base, threshold=0.1, nuclear_weight=0.1, progressive=1)
    assert layers_of(model)["first"].deltas["default"].values.numel() == 0
    optimizer = optimizer_of(model)
    train(model, optimizer, SparsityController(model, optimizer), range(3))
    assert_base_untouched(model, reference)
    assert values(model)["second"].any()
    assert model(batch_at(0)[0]).isfinite().all()
    with pytest.raises(ValueError, match=r"threshold.*finds no entry in any layer, neither in layer first nor in 1"):
        adapted(threshold=1e-30)


def test_s2_s12_wrapping_and_disabling_change_no_bit():
    model, reference = adapted(threshold=0.1)
    x = batch_at(0)[0]
    assert torch.equal(model(x), reference(x))
    optimizer = optimizer_of(model)
    train(model, optimizer, SparsityController(model, optimizer), range(2))
    with model.disable_adapter():
        assert torch.equal(model(x), reference(x))
    assert not torch.equal(model(x), reference(x))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_s3_s4_s5_s9_adamw_on_the_values_is_masked_dense_adamw(accumulation, clip):
    model, reference = adapted(threshold=0.08)
    masks = {n: layer.support("default").to_mask() for n, layer in layers_of(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    dense = copy.deepcopy(reference).requires_grad_(False)
    trained = [getattr(dense, n).weight.requires_grad_() for n in NAMES]
    other = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    for step in range(4):
        x, y = batch_at(step)
        F.cross_entropy(dense(x), y).backward()
        for n in NAMES:
            getattr(dense, n).weight.grad *= masks[n]
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        other.step()
        other.zero_grad()
    train(model, optimizer, SparsityController(model, optimizer), range(4), accumulation, clip)
    merged = model.merge_and_unload()
    for n in NAMES:
        ours, theirs, own = (getattr(m, n).weight for m in (merged, dense, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours[~masks[n]], own[~masks[n]])


# ---------------------------------------------------------------------- nuclear norm


def by_svd(model, reference, name, frozen=None):
    layer = layers_of(model)[name]
    support = layer.support("default")
    now = weights(model, reference)[name].double()
    if frozen is not None:
        now = now.masked_fill(frozen, 0)
    dense = torch.zeros(support.shape, dtype=torch.float64)
    dense[support.rows.long(), support.cols.long()] = now
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    kept = s > 1e-9 * s[0]
    return (u[:, kept] @ vh[kept]).reshape(-1)[support.indices.long()]


def gradients_seen(model, optimizer):
    """What the optimizer is given, read after all hooks that come before its step."""
    seen = {}

    def look(*_):
        for n, layer in layers_of(model).items():
            seen[n] = layer.deltas["default"].values.grad.clone()

    optimizer.register_step_pre_hook(look)
    return seen


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("matrices", ["one", "all"])
def test_s6_its_gradient_is_added_once_for_each_optimizer_step(accumulation, matrices):
    """The reference's own is a silent no-op in its default mode, and is added once for each micro-batch."""
    runs = {}
    for weight in (0.0, 0.3):
        model, reference = adapted(density=0.4, nuclear_weight=weight, nuclear_matrices=matrices)
        optimizer = optimizer_of(model, "sgd", lr=0.1)
        controller = SparsityController(model, optimizer)
        seen = gradients_seen(model, optimizer)
        expected = {n: 0.3 * by_svd(model, reference, n) for n in NAMES}
        train(model, optimizer, controller, [0], accumulation)
        runs[weight] = seen
    added = [n for n in NAMES if not torch.equal(runs[0.3][n], runs[0.0][n])]
    assert len(added) == (2 if matrices == "all" else 1)
    for n in added:
        torch.testing.assert_close(runs[0.3][n].double(), runs[0.0][n].double() + expected[n], rtol=1e-2, atol=1e-3)


def test_it_comes_after_clipping():
    seen = {}
    for weight in (0.0, 5.0):
        model, _ = adapted(density=0.4, nuclear_weight=weight, nuclear_matrices="all")
        optimizer = optimizer_of(model, "sgd")
        controller = SparsityController(model, optimizer)
        seen[weight] = gradients_seen(model, optimizer)
        train(model, optimizer, controller, [0], clip=1e-3)
    assert sum(float(g.norm() ** 2) for g in seen[0.0].values()) ** 0.5 <= 1.001e-3
    assert float(seen[5.0]["first"].norm()) > 1


def test_one_matrix_at_a_time_every_so_often_and_the_same_again():
    picked = []
    for _ in range(2):
        model, _ = adapted(density=0.4, nuclear_weight=10.0, nuclear_every=2)
        optimizer = optimizer_of(model, "sgd", lr=0.0)
        controller = SparsityController(model, optimizer)
        seen = gradients_seen(model, optimizer)
        run = []
        for step in range(12):
            train(model, optimizer, controller, [step])
            run.append(tuple(n for n in NAMES if float(seen[n].norm()) > 2))
        picked.append(run)
    assert picked[0] == picked[1]
    assert all(len(names) == step % 2 for step, names in enumerate(picked[0]))
    assert {name for names in picked[0] for name in names} == set(NAMES)


def test_small_matrices_have_no_part_in_it():
    model, _ = adapted(density=0.4, nuclear_weight=10.0, nuclear_min_size=5)  # of 33 x 17 and 5 x 33
    optimizer = optimizer_of(model, "sgd", lr=0.0)
    controller = SparsityController(model, optimizer)
    seen = gradients_seen(model, optimizer)
    for step in range(4):
        train(model, optimizer, controller, [step])
        assert float(seen["first"].norm()) > 2 > float(seen["second"].norm())


def test_s7_it_changes_the_trajectory_and_lowers_the_norm():
    norms = {}
    for weight in (0.0, 0.05):
        model, reference = adapted(density=0.5, nuclear_weight=weight, nuclear_matrices="all")
        optimizer = optimizer_of(model, "sgd", lr=0.05)
        train(model, optimizer, SparsityController(model, optimizer), range(15))
        dense = torch.zeros(33, 17)
        dense[layers_of(model)["first"].support("default").to_mask()] = weights(model, reference)["first"]
        norms[weight] = float(torch.linalg.matrix_norm(dense, "nuc"))
    assert norms[0.05] < 0.97 * norms[0.0]


def test_a_fused_optimizer_under_a_scaler_gets_it_scaled():
    model, reference = adapted(density=0.4, nuclear_weight=1.0, nuclear_matrices="all")
    optimizer = optimizer_of(model, "sgd")
    SparsityController(model, optimizer)
    seen = gradients_seen(model, optimizer)
    expected = by_svd(model, reference, "first")
    optimizer.grad_scale = torch.tensor(64.0)
    optimizer.register_step_pre_hook(lambda *_: setattr(optimizer, "grad_scale", None))  # not fused on the CPU
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    torch.testing.assert_close(seen["first"].double(), 64 * expected, rtol=1e-2, atol=0.1)


# ---------------------------------------------------------------------- freezing


@pytest.mark.parametrize("kind", ["adamw", "by age", "sgd"])
@pytest.mark.parametrize("budget", [{"threshold": 0.05}, {"density": 0.2}, {"density": 0.2, "allocation": "global"}])
def test_s8_what_has_grown_freezes_and_the_rest_goes_on_as_if_nothing_had_happened(kind, budget):
    lr = 0.3 if kind == "sgd" else 1e-2
    model, reference = adapted(progressive=4, **budget)
    twin, _ = adapted(**budget)
    runs = []
    for each in (model, twin):
        optimizer = optimizer_of(each, kind, lr=lr)
        controller = SparsityController(each, optimizer)
        records = train(each, optimizer, controller, range(4))
        runs.append((optimizer, controller, records))
    assert runs[1][2] == [] and len(runs[0][2]) == 1
    record = runs[0][2][0]
    assert isinstance(record, Freezing) and record.step == 4 and record.frozen > 0
    now, at = weights(model, reference), values(model)
    frozen = {}
    for n, layer in layers_of(model).items():
        original = getattr(reference, n).weight.detach().reshape(-1)[layer.support("default").indices.long()]
        largest = original.abs().max()
        if budget.get("allocation") == "global":
            largest = max(
                getattr(reference, m).weight.detach().reshape(-1)[other.support("default").indices.long()].abs().max()
                for m, other in layers_of(model).items()
            )
        frozen[n] = now[n].abs() >= 0.05 if "threshold" in budget else now[n].abs() > largest
        assert record.layers[n].frozen == int(frozen[n].sum())
        assert record.layers[n].entries == frozen[n].numel()
    # the step that follows is the same, moments and all, for what goes on, and no step at all for the rest
    before = {n: v.clone() for n, v in values(twin).items()}
    assert all(torch.equal(before[n], at[n]) for n in NAMES)
    for each, (optimizer, controller, _) in zip((model, twin), runs, strict=True):
        train(each, optimizer, controller, [4])
    for n in NAMES:
        ours, theirs = values(model)[n], values(twin)[n]
        assert torch.equal(ours[~frozen[n]], theirs[~frozen[n]])
        assert torch.equal(ours[frozen[n]], at[n][frozen[n]])
        assert not torch.equal(theirs, at[n])
    train(model, *runs[0][:2], range(5, 12))
    for n in NAMES:
        assert torch.equal(values(model)[n][frozen[n]], at[n][frozen[n]])


def test_frozen_entries_have_no_part_in_the_nuclear_norm():
    model, reference = adapted(density=0.4, nuclear_weight=1.0, nuclear_matrices="all", progressive=2)
    optimizer = optimizer_of(model, "sgd", lr=0.5)
    controller = SparsityController(model, optimizer)
    seen = gradients_seen(model, optimizer)
    train(model, optimizer, controller, range(2))
    frozen = controller.parts["adapters"]["default"].parts["first"].frozen.mask
    assert frozen.any()
    expected = by_svd(model, reference, "first", frozen)
    for p in model.parameters():
        p.grad = None
    optimizer.step()
    torch.testing.assert_close(seen["first"][~frozen].double(), expected[~frozen], rtol=1e-2, atol=1e-3)
    assert not seen["first"][frozen].any()


def test_a_share_of_the_run_needs_its_length():
    model, _ = adapted(progressive=0.5)
    with pytest.raises(ValueError, match=r"progressive=0.5 is a share of the run.*total_steps"):
        SparsityController(model, optimizer_of(model))
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=7)
    records = train(model, optimizer, controller, range(7))
    assert [record.step for record in records] == [3]


@pytest.mark.parametrize("kind", ["adamw", "by age", "sgd"])
@pytest.mark.parametrize("at", [2, 4, 6])
def test_resuming_is_exact(kind, at, tmp_path):
    config = {"density": 0.3, "progressive": 4, "nuclear_weight": 0.05}

    def start():
        model, _ = adapted(**config)
        optimizer = optimizer_of(model, kind)
        return model, optimizer, SparsityController(model, optimizer, total_steps=8)

    model, optimizer, controller = start()
    train(model, optimizer, controller, range(at))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, controller, range(at, 8))

    other = PeftModel.from_pretrained(adapted()[1], tmp_path, is_trainable=True)
    resumed = optimizer_of(other, kind)
    resumed.load_state_dict(state)
    again = SparsityController(other, resumed, total_steps=8)
    train(other, resumed, again, range(at, 8))
    for n in NAMES:
        assert torch.equal(values(model)[n], values(other)[n])
    assert [r.to_dict() for r in again.history] == [r.to_dict() for r in controller.history]
    assert read_history(write_history(again.history, tmp_path)) == controller.history


def test_a_step_that_a_scaler_skips_counts_for_nothing():
    model, _ = adapted(density=0.3, progressive=1, nuclear_weight=0.1)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = values(model)
    x, y = batch_at(0)
    scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert controller.step() == [] and controller.completed_steps == 0
    assert all(torch.equal(before[n], values(model)[n]) for n in NAMES)


def test_without_a_controller_there_is_a_warning():
    model, _ = adapted(density=0.3, progressive=1, nuclear_weight=0.1)
    optimizer = optimizer_of(model)
    model(batch_at(0)[0]).sum().backward()
    with pytest.warns(UserWarning, match="nothing applies its progressive and nuclear_weight.*SparsityCallback"):
        optimizer.step()
    plain, _ = adapted(density=0.3)
    optimizer = optimizer_of(plain)
    plain(batch_at(0)[0]).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_merged_adapters_are_in_the_way():
    model, _ = adapted(density=0.3, nuclear_weight=0.1, nuclear_matrices="all")
    optimizer = optimizer_of(model)
    SparsityController(model, optimizer)
    model(batch_at(0)[0]).sum().backward()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"layer first: .*unmerge_adapter"):
        optimizer.step()


# ---------------------------------------------------------------------- files, rates, errors


@pytest.mark.parametrize("budget", [{"threshold": 0.05}, {"density": 0.1}])
def test_s11_a_rounded_base_gets_the_same_positions_from_the_file(tmp_path, budget):
    model, _ = adapted(**budget)
    optimizer = optimizer_of(model)
    train(model, optimizer, SparsityController(model, optimizer), range(2))
    model.save_pretrained(tmp_path)
    rounded = TwoLayers().to(torch.bfloat16)
    again = PeftModel.from_pretrained(rounded, tmp_path)
    for n, layer in layers_of(again).items():
        assert layer.support("default") == layers_of(model)[n].support("default")
        assert torch.equal(layer.deltas["default"].values.float(), values(model)[n])


def test_s10_panels_change_nothing():
    gradients = []
    for limit in (2**26, 2000, 150):
        model, _ = adapted(density=0.3)
        with panel_limit(limit):
            F.cross_entropy(model(batch_at(0)[0]), batch_at(0)[1]).backward()
        gradients.append(torch.cat([layer.deltas["default"].values.grad for layer in layers_of(model).values()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_s15_the_authors_learning_rate():
    assert sara_learning_rate(2e-3) == pytest.approx(4.966e-4, rel=1e-3)
    assert sara_learning_rate(8e-4) == pytest.approx(7.558e-4, rel=1e-3)
    with pytest.raises(ValueError, match="threshold=0: a number above 0"):
        sara_learning_rate(0)


def test_its_positions_need_no_data():
    with pytest.raises(ValueError, match="selection='magnitude_smallest' needs no data"):
        select_support(TwoLayers(), SaRAConfig(target_modules=NAMES), [batch_at(0)])


@pytest.mark.parametrize("kwargs, message", [
    ({"threshold": -1.0}, "threshold=-1.0: a number above 0"),
    ({"threshold": 0.1, "density": 0.1}, "threshold=0.1 and density are both given"),
    ({"density": 2}, "density=2: a share"),
    ({"progressive": 0}, "progressive=0: a number of optimizer steps .int. of at least 1"),
    ({"progressive": 1.0}, "progressive=1.0: .*a share of the run .float. in .0, 1."),
    ({"progressive": "half"}, "progressive='half': a number of optimizer steps"),
    ({"nuclear_weight": -1}, "nuclear_weight=-1: a number of at least 0"),
    ({"nuclear_weight": None}, "nuclear_weight=None: a number"),
    ({"nuclear_matrices": "some"}, "nuclear_matrices='some'"),
    ({"nuclear_every": 0}, "nuclear_every=0: an int of at least 1"),
    ({"nuclear_min_size": 1.5}, "nuclear_min_size=1.5: an int"),
])  # fmt: skip
def test_configs_that_are_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SaRAConfig(**kwargs)
