"""Gradient masks: exact counts, entries that rest, and steps against a dense reference."""

import pytest
import torch

from sparse_peft import SparsityController
from sparse_peft.procedures import GradientMask
from tests.helpers.procedures import adapted, assert_resumes, batches, loss_of, optimizer_of, trained

pytestmark = pytest.mark.filterwarnings("ignore:adapter.*what suits its config")


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("lazy", [False, True])
def test_entries_with_large_gradients_step(kind, lazy):
    model = adapted(kind, torch.float64)
    optimizer = optimizer_of(model, torch.optim.SGD, momentum=0.9, weight_decay=0.1, lr=0.1)
    controller = SparsityController(model, optimizer, procedures=[GradientMask(0.7, every=3, lazy=lazy)])
    parameters = trained(model)
    buffers = {name: torch.zeros_like(p) for name, p in parameters.items()}
    masks = {}
    for step in range(7):
        loss_of(model, batches([step])[0]).backward()
        expected = {}
        for name, parameter in parameters.items():
            gradient = parameter.grad
            if step % 3 == 0:
                count = max(1, round(0.3 * gradient.numel()))
                masks[name] = torch.zeros_like(gradient, dtype=torch.bool)
                masks[name].view(-1)[gradient.abs().flatten().topk(count).indices] = True
            buffer = 0.9 * buffers[name] + gradient * masks[name] + 0.1 * parameter.detach()
            moved = parameter.detach() - 0.1 * buffer
            # torch makes the buffer in the first step, where there is none to be kept
            keeps = lazy and step > 0
            buffers[name] = torch.where(masks[name], buffer, buffers[name]) if keeps else buffer
            expected[name] = torch.where(masks[name], moved, parameter.detach()) if lazy else moved
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    assert_resumes(kind, GradientMask(every=3), stops=(1, 4))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"sparsity=1\.0"):
        GradientMask(1.0)
