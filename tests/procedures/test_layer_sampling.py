"""Layer sampling: what trains, the importance against its formula, and that nothing of it stays behind."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparse_peft import SparsityController
from sparse_peft.procedures import LayerSampling
from sparse_peft.procedures.layer_sampling import draw, place_state
from tests.helpers.procedures import Net, adapted, assert_resumes, batches, loss_of, optimizer_of, run, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")
IST = LayerSampling("ist", share=0.5, batches=batches([70, 71]), loss_fn=loss_of, every=2)
ALL = {"ist": IST, "random": LayerSampling("random"), "lisa": LayerSampling("lisa", share=0.5, hold_steps=3)}


def block_of(name):
    return int(name.split("layers.")[1][0])


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("strategy", ALL)
def test_only_the_chosen_blocks_train(kind, strategy):
    model = adapted(kind)
    parameters = trained(model)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, 12, procedures=[ALL[strategy]])
    sampler = controller.parts["procedures"]["LayerSampling"]
    choices = []
    for step in range(12):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        choices.append(tuple(sampler.active))
        assert len(sampler.active) == (1 if strategy == "random" else 2)
        loss_of(model, batches([step])[0]).backward()
        assert {block_of(n) for n, p in parameters.items() if p.grad is not None} == set(sampler.active)
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        moved = {block_of(n) for n, p in parameters.items() if not torch.equal(p, before[n])}
        assert moved == set(choices[-1])
    held = 3 if strategy == "lisa" else 1
    assert all(len(set(choices[i : i + held])) == 1 for i in range(0, 12, held))
    assert len(set(choices)) > 2
    controller.close()
    assert all(parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_importance_follows_the_formula(kind):
    model, controller = run(kind, IST, steps=1, dtype=torch.float64)
    sampler = controller.parts["procedures"]["LayerSampling"]
    logits = torch.zeros(4, dtype=torch.float64)
    for step, batch in ((2, 70), (4, 71), (6, 70)):
        train(model, controller.optimizer, controller, range(step - 1, step))
        chance = torch.sigmoid(logits)
        weakened = [draw(chance.tolist(), 2, f"0 weaken {step} {trial}") for trial in range(3)]
        losses = torch.stack([weakened_loss(model, numbers, batches([batch])[0]) for numbers in weakened])
        reward = (-losses).exp() - (-losses).exp().mean()
        for numbers, r in zip(weakened, reward, strict=True):
            for number in numbers:
                logits[number] += 10 * r * chance[number] * (1 - chance[number])
        torch.testing.assert_close(sampler.logits, logits, rtol=1e-9, atol=1e-12)
        train(model, controller.optimizer, controller, range(step, step + 1))
    assert logits.abs().min() > 0
    record = controller.history[-1]
    torch.testing.assert_close(
        torch.tensor(record.probabilities, dtype=torch.float64), torch.sigmoid(-logits) / torch.sigmoid(-logits).sum()
    )
    assert record.logs().keys() == {"sparsity/loss", "sparsity/lowest", "sparsity/highest"}


def weakened_loss(model, numbers, batch):
    """The loss with a quarter of these blocks' deltas, from the dense weights."""
    plain = Net().double()
    found = copy.deepcopy(model)
    for number, block in enumerate(found.base_model.model.layers):
        for name in ("up", "down"):
            layer = getattr(block, name)
            weight = getattr(plain.layers[number], name).weight
            weight.data += (0.25 if number in numbers else 1.0) * layer.get_delta_weight("default")
    with torch.no_grad():
        return loss_of(plain, batch)


def test_a_block_that_matters_trains_more_often():
    model = adapted()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.mul_(4.0 if "layers.2" in name else 1e-3)
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.0)
    x = batches([0])[0][0]
    with torch.no_grad():
        labels = model(x).argmax(1)  # what this block has learnt
    procedure = LayerSampling("ist", batches=[(x, labels)], loss_fn=loss_of, every=1, trials=5)
    controller = SparsityController(model, optimizer, 200, procedures=[procedure])
    train(model, optimizer, controller, range(60))
    weights = controller.history[-1].probabilities
    assert weights.index(max(weights)) == 2 and weights[2] > 1.2 / 4


def test_a_failed_measurement_leaves_the_model_as_it_was():
    def fails(model, batch):
        model(batch[0])
        raise KeyboardInterrupt

    model = adapted("sparse")
    optimizer = optimizer_of(model)
    broken = LayerSampling("ist", batches=batches([0]), loss_fn=fails, every=1)
    controller = SparsityController(model, optimizer, 9, procedures=[broken])
    with torch.no_grad():
        expected = model(batches([5])[0][0])
    loss_of(model, batches([0])[0])  # no backward: the step changes nothing
    optimizer.step()
    with pytest.raises(KeyboardInterrupt):
        controller.step()
    with torch.no_grad():
        assert torch.equal(model(batches([5])[0][0]), expected)
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    for procedure in (IST, ALL["lisa"], LayerSampling("random", offload=True)):
        assert_resumes(kind, procedure, stops=(1, 4))


def test_state_of_resting_adapters_waits_elsewhere():
    model, controller = run("lora", LayerSampling("random", offload=True), steps=4)
    (parameter, state), *_ = controller.optimizer.state.items()
    place_state(controller.optimizer, [parameter], torch.device("meta"))
    assert state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta and not state["step"].is_meta
    assert model.training


def test_modules_that_train_whole_always_train():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, procedures=[LayerSampling("random")])
    for step in range(4):
        before = model.base_model.model.head.modules_to_save["default"].weight.detach().clone()
        train(model, optimizer, controller, [step])
        assert not torch.equal(model.base_model.model.head.modules_to_save["default"].weight, before)


def test_draws_have_the_given_chances():
    counts = torch.zeros(3)
    for seed in range(4000):
        counts[draw([1.0, 2.0, 5.0], 1, str(seed))] += 1
    torch.testing.assert_close(counts / 4000, torch.tensor([1, 2, 5]) / 8, atol=0.03, rtol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="strategy='ist' without batches"):
        LayerSampling()
    with pytest.raises(ValueError, match=r"strategy='izt'.*did you mean 'ist'"):
        LayerSampling("izt")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"1 numbered blocks.*at least 2"):
        SparsityController(model, optimizer_of(model), procedures=[LayerSampling("random")])
    _, controller = run("lora", ALL["lisa"], steps=2)
    sampler = controller.parts["procedures"]["LayerSampling"]
    with pytest.raises(ValueError, match="is of 1 blocks, and the model has 4"):
        sampler.load_state_dict({**sampler.state_dict(), "blocks": ["a"]})
