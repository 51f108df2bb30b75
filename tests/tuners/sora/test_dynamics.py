import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch import nn

from sparse_peft import SoRAConfig, SparsityController, rewarmed_schedule
from sparse_peft.dynamics.records import record_from_dict
from sparse_peft.ops import reference_threshold, soft_threshold
from sparse_peft.tuners.delta_layer import TunerLayer
from sparse_peft.tuners.sora.penalty import PenaltySchedule
from sparse_peft.tuners.sora.records import Ranks


def make(seed=0, **config):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    fields = {"target_modules": ["0", "2"], "r": 4, "alpha": 8, "prox_start": 0, **config}
    return get_peft_model(base, SoRAConfig(**fields))


def states(model):
    return {m.name: m.deltas["default"] for m in model.modules() if isinstance(m, TunerLayer)}


def gates(model):
    return torch.cat([state.gate.detach() for state in states(model).values()])


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 12, generator=generator), torch.randn(size, 6, generator=generator)


def train(model, optimizer, controller, steps, scheduler=None, micro=1):
    for step in steps:
        for x, y in zip(*(part.chunk(micro) for part in batch(step)), strict=True):
            ((model(x) - y).square().mean() / micro).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        controller.step()
        optimizer.zero_grad()


def adamw(model, **options):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, "weight_decay": 0.0, **options}
    )


@pytest.mark.parametrize("prox", ["lr", "constant", "adam"])
@pytest.mark.parametrize("operator", ["soft", "reference"])
def test_a_run_is_the_optimizer_and_then_the_operator(prox, operator):
    penalty = {"lr": 12.0, "constant": 0.06, "adam": 1e-3}[prox]
    model = make(prox=prox, operator=operator, penalty=penalty, prox_start=2, max_threshold=0.02)
    twin = copy.deepcopy(model)
    optimizer, other = adamw(model), adamw(twin)
    controller = SparsityController(model, optimizer, total_steps=20)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 5)) for o in (optimizer, other)]
    apply = {"soft": soft_threshold, "reference": reference_threshold}[operator]
    for step in range(20):
        # the controller may come after the schedule's step: the rate that counts is the one just used
        train(model, optimizer, controller, [step], schedules[0])
        x, y = batch(step)
        (twin(x) - y).square().mean().backward()
        rate = other.param_groups[0]["lr"]
        other.step()
        other.zero_grad()
        schedules[1].step()
        for state in states(twin).values():
            threshold = penalty if prox == "constant" else rate * penalty
            if prox == "adam":
                moments = other.state[state.gate]
                root = (moments["exp_avg_sq"] / (1 - 0.999 ** float(moments["step"]))).sqrt() + 1e-8
                threshold = (threshold / root).clamp(max=0.02)
            if step >= 2:
                state.gate.data = apply(state.gate.data, threshold)
        assert torch.allclose(gates(model), gates(twin), atol=1e-6), step
    assert bool((gates(model) == 0).any()) or prox == "adam"


def test_gates_are_kept_out_of_weight_decay_and_nothing_else_is():
    model = make(penalty=1e-9, gate_lr_scale=3.0)
    optimizer = adamw(model, weight_decay=0.5)
    controller = SparsityController(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    controller.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = before[name] if name.endswith("gate") else before[name] * (1 - 0.5e-2)
            assert torch.allclose(parameter, wanted, atol=1e-7), name
    assert len(optimizer.param_groups) == 1 and len(optimizer.state_dict()["param_groups"]) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(before)


def test_gates_have_their_own_learning_rate():
    model = make(penalty=1e-9, gate_lr_scale=3.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = SparsityController(model, optimizer)
    before = gates(model)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    controller.step()
    assert torch.allclose(gates(model), before - 0.3)


def test_a_step_that_fails_leaves_the_groups_for_the_next():
    model = make()
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=5)
    (model(batch(0)[0])).sum().backward()
    good = optimizer.param_groups[0]["params"][0].grad
    optimizer.param_groups[0]["params"][0].grad = good.to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.param_groups[0]["params"][0].grad = good
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    controller.close()
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and not optimizer._optimizer_step_pre_hooks


def test_total_shrink_of_a_gate_without_gradient():
    model = make(penalty=0.5)
    for state in states(model).values():
        state.A.data.zero_()  # so no gradient reaches the gate
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.04)
    controller = SparsityController(model, optimizer, total_steps=100)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
    for state in states(model).values():
        state.gate.data[0] = -0.05
    total, sizes = 0.0, gates(model).abs()
    for _ in range(30):
        total += optimizer.param_groups[0]["lr"] * 0.5
        for state in states(model).values():
            state.B.grad = None
        for state in states(model).values():
            state.gate.grad = torch.zeros_like(state.gate)
        optimizer.step()
        controller.step()
        schedule.step()
    assert torch.allclose(gates(model).abs(), (sizes - total).clamp(min=0), atol=1e-5)
    assert bool((gates(model) == 0).any()) and bool((gates(model) != 0).any())


@pytest.mark.parametrize("decay", [False, True])
def test_gradient_steps_converge_to_the_lasso_whatever_the_schedule(decay):
    """KKT conditions of ``|D g - y|^2 / 2 + penalty |g|_1`` with orthonormal D, where the solution is known."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 6, bias=False)),
        SoRAConfig(target_modules=["0"], r=6, alpha=6, penalty=0.3, prox_start=0),
    )
    (state,) = states(model).values()
    q = torch.linalg.qr(torch.randn(6, 6))[0]
    state.A.data, state.B.data = torch.eye(6), q.clone()
    state.A.requires_grad_(False), state.B.requires_grad_(False)
    y = q @ torch.tensor([1.0, -1.0, 0.2, -0.25, 0.5, 0.0])
    base = model.base_model.model[0].base_layer.weight.sum(1).detach()
    optimizer = torch.optim.SGD([state.gate], lr=0.2)
    controller = SparsityController(model, optimizer, total_steps=400)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / 500 if decay else 1.0)
    for _ in range(400):
        optimizer.zero_grad()
        (model(torch.ones(6)) - base - y).square().sum().div(2).backward()
        optimizer.step()
        controller.step()
        schedule.step()
    want = soft_threshold(q.t() @ y, 0.3)
    assert torch.allclose(state.gate, want, atol=1e-4)
    optimizer.zero_grad()
    (model(torch.ones(6)) - base - y).square().sum().div(2).backward()
    zero = state.gate == 0
    assert bool((state.gate.grad[zero].abs() <= 0.3 + 1e-4).all())
    assert torch.allclose(state.gate.grad[~zero], -0.3 * state.gate[~zero].sign(), atol=1e-3)


def test_one_proximal_step_for_each_optimizer_step():
    runs = []
    for micro in (1, 4):
        model = make(penalty=2.0)
        optimizer = adamw(model)
        controller = SparsityController(model, optimizer, total_steps=10)
        train(model, optimizer, controller, range(10), micro=micro)
        runs.append(gates(model))
    assert torch.allclose(*runs, atol=1e-4) and bool((runs[0] < 0.95).all())


def test_a_skipped_step_changes_no_gate():
    model = make(penalty=2.0)
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(model, optimizer, controller, range(2))
    before = gates(model)
    scaler.scale(model(batch(3)[0]).sum()).backward()
    states(model)["0"].A.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert controller.step() == [] and torch.equal(gates(model), before)


@pytest.mark.parametrize("cut", [3, 8, 12, 17])
def test_resume_is_exact(cut):
    fields = {"penalty": 1.0, "target_rank": 3, "target_step": 14, "stages": 2, "report_every": 4}
    whole = make(**fields)
    optimizer = adamw(whole)
    controller = SparsityController(whole, optimizer, total_steps=20)
    train(whole, optimizer, controller, range(20))

    first = make(**fields)
    optimizer = adamw(first)
    train(first, optimizer, SparsityController(first, optimizer, total_steps=20), range(cut))
    saved = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    second = make(seed=1, **fields)
    second.load_state_dict(saved[0])
    optimizer = adamw(second)
    optimizer.load_state_dict(saved[1])
    resumed = SparsityController(second, optimizer, total_steps=20)
    train(second, optimizer, resumed, range(cut, 20))
    assert torch.equal(gates(second), gates(whole))
    assert resumed.history == controller.history and resumed.completed_steps == 20


@pytest.mark.parametrize("penalty", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("target", [1, 3, 7, 0.5])
def test_target_rank_is_reached_at_its_step_and_kept(penalty, target):
    model = make(penalty=penalty, target_rank=target, target_step=0.5, report_every=1)
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=30)
    train(model, optimizer, controller, range(30))
    alive = [record.alive for record in controller.history]
    target = 4 if target == 0.5 else target
    assert alive[14:] == [target] * 16
    assert min(alive) == target
    assert int((gates(model) != 0).sum()) == target


def test_the_penalty_follows_the_target():
    model = make(penalty=0.05, target_rank=2, target_step=80, report_every=1, r=8, alpha=16)
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=100)
    train(model, optimizer, controller, range(100))
    by_step = {record.step: record for record in controller.history}
    assert by_step[60].penalty > 10 * by_step[1].penalty
    # most of the way was the penalty's doing, not the cut's at the end
    assert by_step[79].alive <= 8


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_compaction_changes_nothing_but_the_size(optimizer_cls, tmp_path):
    fields = {"penalty": 1.0, "target_rank": 3, "target_step": 6, "report_every": 5, "l1_weight": 0.1}
    options = {"lr": 1e-2, **({"momentum": 0.9} if optimizer_cls is torch.optim.SGD else {})}
    runs = []
    for compact in (None, 4):
        model = make(compact_every=compact, **fields)
        optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **options)
        controller = SparsityController(model, optimizer, total_steps=30)
        train(model, optimizer, controller, range(30))
        runs.append(model)
    x = batch(99)[0]
    assert torch.allclose(runs[0](x), runs[1](x), atol=1e-5)
    assert sum(state.rank for state in states(runs[1]).values()) == 3
    assert sum(state.rank for state in states(runs[0]).values()) == 8
    assert controller.history[-1].initial == 8 and controller.history[-1].alive == 3
    runs[1].save_pretrained(tmp_path)

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path))(x), runs[1](x))
    # a run resumed from the file continues with the remaining ranks
    fresh = make(compact_every=4, **fields)
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(fresh(x), runs[1](x))


def paper_groups(model):
    """As the authors' script: gates without weight decay."""
    gates = [p for n, p in model.named_parameters() if n.endswith(".gate")]
    others = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".gate")]
    return [{"params": others, "weight_decay": 0.1}, {"params": gates, "weight_decay": 0.0}]


@pytest.mark.parametrize("micro", [1, 2])
def test_the_papers_settings_clip_the_l1_norm_with_the_loss(micro):
    model = get_peft_model(make().unload(), SoRAConfig.paper(r=4, alpha=8, target_modules=["0", "2"]))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(paper_groups(model), lr=1e-3)
    controller = SparsityController(model, optimizer, total_steps=200)
    other = torch.optim.AdamW(paper_groups(twin), lr=1e-3)
    clipped = 0
    for step in range(200):
        for x, y in zip(*(part.chunk(micro) for part in batch(step)), strict=True):
            ((model(x) - y).square().mean() / micro).backward()
        x, y = batch(step)
        (10 * torch.cat([state.gate for state in states(twin).values()]).abs().mean()).backward()
        (twin(x) - y).square().mean().backward()
        for tuned, stepped in ((model, optimizer), (twin, other)):
            clipped += int(nn.utils.clip_grad_norm_(tuned.parameters(), 0.1) > 0.1)
            stepped.step()
            stepped.zero_grad()
        controller.step()
        for state in states(twin).values():
            state.gate.data = reference_threshold(state.gate.data, 3e-4)
    assert clipped == 2 * 200
    for mine, theirs in zip(states(model).values(), states(twin).values(), strict=True):
        for name in ("A", "B", "gate"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)


def test_the_l1_norm_has_the_loss_scale():
    runs = []
    for enabled in (False, True):
        model = make(penalty=0.0, l1_weight=4.0)
        optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", enabled=enabled)
        controller = SparsityController(model, optimizer, scaler=scaler)
        for step in range(5):
            x, y = batch(step)
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            controller.step()
            optimizer.zero_grad()
        runs.append(gates(model))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


def test_accelerates_optimizer_brings_its_scaler():
    model = make(penalty=0.0, l1_weight=4.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    Accelerator(cpu=True)
    try:
        SparsityController(model, AcceleratedOptimizer(adamw(model), scaler=scaler))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    (0 * model(batch(0)[0]).sum()).backward()
    assert torch.equal(states(model)["0"].gate.grad, 8.0 * 4.0 / 8 * gates(model)[:4].sign())


def test_the_l1_norm_counts_once_in_a_step():
    model = make(penalty=0.0, l1_weight=4.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    controller = SparsityController(model, optimizer)
    gate = states(model)["0"].gate
    gate.data[0] = -1
    want = 4 / 8 * gate.detach().sign()

    def backward():
        (0 * model(batch(0)[0]).sum()).backward()
        return gate.grad

    assert torch.equal(backward(), want) and torch.equal(backward(), want)
    optimizer.zero_grad()
    controller.discard_step()
    assert torch.equal(backward(), want)
    before = gates(model)
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
    assert torch.allclose(gates(model), before - before.sign() * 0.5 * 4 / 8)
    assert torch.equal(backward(), 4 / 8 * gate.detach().sign())
    optimizer.zero_grad()
    controller.close()
    assert not backward().any()


def test_the_l1_norm_of_gates_that_no_backward_pass_reaches():
    model = make(penalty=0.0, l1_weight=4.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    controller = SparsityController(model, optimizer)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    states(model)["0"].gate.data[0] = -1
    before = gates(model)
    optimizer.step()
    controller.step()
    assert torch.allclose(gates(model), before - before.sign() * 0.5 * 4 / 8)


def test_coarse_gates_are_refused():
    model = make()
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=5)
    states(model)["0"].gate.data = states(model)["0"].gate.data.bfloat16()
    model(batch(0)[0]).sum().backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"layer 0.*torch\.bfloat16"):
        controller.step()


def test_adam_mode_needs_a_second_moment():
    model = make(prox="adam")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = SparsityController(model, optimizer, total_steps=5)
    model(batch(0)[0]).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"prox='adam'.*SGD.*layer 0"):
        controller.step()


def test_shares_need_the_length_of_the_run():
    model = make(prox_start=0.1)
    with pytest.raises(ValueError, match=r"prox_start=0\.1"):
        SparsityController(model, adamw(model))
    model = make(stages=3)
    with pytest.raises(ValueError, match=r"stages=3.*total_steps"):
        SparsityController(model, adamw(model))


def test_training_without_a_controller_warns():
    model = make()
    optimizer = adamw(model)
    model(batch(0)[0]).sum().backward()
    with pytest.warns(UserWarning, match="pulls its gates to zero"):
        optimizer.step()
    quiet = make(penalty=0.0)
    quiet(batch(0)[0]).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamw(quiet).step()


def test_stages():
    linear = PenaltySchedule.of(0.0, 1.0, 3, "linear", 10, 100)
    assert [linear.at(step) for step in (1, 10, 11, 40, 41, 70, 71, 100, 200)] == [0, 0, 0, 0, 0.5, 0.5, 1, 1, 1]
    geometric = PenaltySchedule.of(0.01, 1.0, 3, "geometric", 0, 9)
    assert [round(geometric.at(step), 9) for step in (1, 4, 7)] == [0.01, 0.1, 1.0]


def test_the_learning_rate_rises_anew_in_every_stage():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = rewarmed_schedule(optimizer, total_steps=20, stages=2, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0] and rates[10:13] == [0.0, 0.5, 1.0]
    assert rates[9] == pytest.approx(1 / 8) and schedule.get_last_lr()[0] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="stages=30"):
        rewarmed_schedule(optimizer, 20, 30)


def test_reports():
    model = make(penalty=1.0, report_every=2)
    optimizer = adamw(model)
    controller = SparsityController(model, optimizer, total_steps=4)
    train(model, optimizer, controller, range(4))
    assert [record.step for record in controller.history] == [2, 4]
    record = controller.history[-1]
    assert isinstance(record, Ranks) and record_from_dict(record.to_dict()) == record
    assert record.logs()["sparsity/rank"] == float((gates(model) != 0).sum())
    assert record.layers["0"].size == 4
