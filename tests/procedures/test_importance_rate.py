"""Learning rates by importance, against dense float64 gradients and a plain step."""

import copy

import pytest
import torch

from sparse_peft import SparsityController
from sparse_peft.procedures import ImportanceLearningRate
from tests.helpers.procedures import adapted, assert_resumes, batches, loss_of, optimizer_of, run, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")
GENERAL = batches([70, 71])
RATES = ImportanceLearningRate(GENERAL, loss_of, every=2, floor=0.0)


def multipliers(model):
    """The formula, from gradients of a copy of the model."""
    found = copy.deepcopy(model).eval()
    for batch in GENERAL:
        (loss_of(found, batch) / len(GENERAL)).backward()
    importance = {n: float((p.detach().abs() * p.grad.abs()).mean()) for n, p in trained(found).items()}
    least, most = min(importance.values()), max(importance.values())
    return {name: 2 * (1 - (one - least) / (most - least)) for name, one in importance.items()}


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_are_multiplied_by_the_formula(kind, optimizer):
    model = adapted(kind, torch.float64)
    stepped = optimizer_of(model, optimizer)
    controller = SparsityController(model, stepped, procedures=[RATES])
    rates = controller.parts["procedures"]["ImportanceLearningRate"]
    for step in range(4):
        if step % 2 == 0:
            expected = multipliers(model)
        assert list(rates.multipliers.values()) == pytest.approx(list(expected.values()), rel=1e-9, abs=1e-12)
        assert min(expected.values()) == 0.0 and max(expected.values()) == 2.0
        plain = copy.deepcopy(model)
        other = optimizer_of(plain, optimizer)
        other.load_state_dict(copy.deepcopy({**stepped.state_dict()}))
        other.param_groups[0].pop("sparse_peft", None)
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        loss_of(plain, batches([step])[0]).backward()
        other.step()
        train(model, stepped, controller, [step])
        for (name, parameter), moved in zip(trained(model).items(), trained(plain).values(), strict=True):
            step_of = before[name] + expected[name] * (moved - before[name])
            torch.testing.assert_close(parameter, step_of, rtol=1e-9, atol=1e-12)
            if expected[name] == 0.0:
                assert torch.equal(parameter, before[name])
    assert [record.step for record in controller.history] == [2, 4]
    assert controller.history[-1].lowest == 0.0 and controller.history[-1].highest == 2.0


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    assert_resumes(kind, ImportanceLearningRate(GENERAL, loss_of, every=3), stops=(1, 3, 4))


def test_batches_that_are_used_up_are_refused():
    with pytest.raises(ValueError, match="batches has none"):
        run("lora", ImportanceLearningRate(iter(GENERAL), loss_of, every=1), steps=1)
