"""The anchor: its pull against autograd of the term in float64, and entries that return to the start."""

import copy

import pytest
import torch
from torch import nn

from sparse_peft import SparsityController
from sparse_peft.procedures import FisherAnchor
from tests.helpers.procedures import adapted, assert_resumes, batches, loss_of, optimizer_of, run, trained

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")
OLD = batches([70, 71, 72])


def fisher_of(model):
    found = copy.deepcopy(model).eval()
    sums = {name: torch.zeros_like(p) for name, p in trained(found).items()}
    for batch in OLD:
        found.zero_grad()
        loss_of(found, batch).backward()
        for name, parameter in trained(found).items():
            sums[name] += parameter.grad**2 / len(OLD)
    return sums


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_training_is_that_of_the_loss_with_the_term(kind):
    """With accumulation and clipping, which both see the term once."""
    model, plain = adapted(kind, torch.float64), adapted(kind, torch.float64)
    start = {name: p.detach().clone() for name, p in trained(plain).items()}
    fisher = fisher_of(plain)
    optimizer, other = optimizer_of(model), optimizer_of(plain)
    procedure = FisherAnchor(OLD, loss_of, weight=50.0, restore=0.0)
    controller = SparsityController(model, optimizer, procedures=[procedure])
    for step in range(4):
        for half in (slice(0, 6), slice(6, 12)):
            (loss_of(model, [t[half] for t in batches([step])[0]]) / 2).backward()
        term = sum((fisher[name] * (p - start[name]) ** 2).sum() for name, p in trained(plain).items())
        (loss_of(plain, batches([step])[0]) + 50 * term).backward()
        for one, parameters in ((optimizer, model), (other, plain)):
            nn.utils.clip_grad_norm_(parameters.parameters(), 0.1)
            one.step()
            one.zero_grad()
        controller.step()
        for (name, parameter), expected in zip(trained(model).items(), trained(plain).values(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_entries_with_small_gradients_return_to_the_start(kind):
    model = adapted(kind)
    optimizer = optimizer_of(model)
    procedure = FisherAnchor(weight=0, restore=0.25, every=2)
    controller = SparsityController(model, optimizer, procedures=[procedure])
    start = torch.cat([p.detach().clone().flatten() for p in trained(model).values()])
    for step in range(4):
        loss_of(model, batches([step])[0]).backward()
        gradients = torch.cat([p.grad.flatten().abs() for p in trained(model).values()])
        optimizer.step()
        moved = torch.cat([p.detach().clone().flatten() for p in trained(model).values()])
        controller.step()
        optimizer.zero_grad()
        rank = int(0.25 * gradients.numel())
        returns = gradients <= gradients.sort().values[rank - 1]
        found = torch.cat([p.detach().flatten() for p in trained(model).values()])
        expected = torch.where(returns, start, moved) if step % 2 else moved
        assert torch.equal(found, expected) and int(returns.sum()) >= rank


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    assert_resumes(kind, FisherAnchor(OLD, loss_of), stops=(1, 4))
    assert_resumes(kind, FisherAnchor(weight=0, restore=0.2), stops=(3,))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="weight=500 without batches"):
        FisherAnchor()
    with pytest.raises(ValueError, match="nothing is held and nothing returns"):
        FisherAnchor(weight=0, restore=0)
    with pytest.raises(ValueError, match=r"adapter 'default' changes what its parameters mean.*static selection"):
        run("sparse", FisherAnchor(weight=0), steps=1, selection="set", reselect_every=2)
    with pytest.raises(ValueError, match="batches has none"):
        run("lora", FisherAnchor([], loss_of), steps=1)
