import pytest
import torch
from torch import nn

from sparse_peft.dynamics.loss_term import LossTerm


def ones(parameter):
    return torch.ones_like(parameter)


def backward(parameter):
    (2 * parameter).sum().backward()
    return parameter.grad.tolist()


def test_the_gradient_is_added_once_per_step():
    parameter = nn.Parameter(torch.zeros(2))
    term = LossTerm([parameter], ones)
    assert term.misses(parameter)
    assert backward(parameter) == [3, 3]
    assert backward(parameter) == [5, 5]
    assert not term.misses(parameter)
    term.begin_step()
    parameter.grad = None
    assert term.misses(parameter) and backward(parameter) == [3, 3]


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_gradient_has_the_loss_scale(scale):
    parameter = nn.Parameter(torch.zeros(2))
    LossTerm([parameter], ones, torch.amp.GradScaler("cpu", init_scale=scale))
    assert backward(parameter) == [2 + scale] * 2


def test_another_parameter_in_place_of_one():
    old, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    term = LossTerm([old], ones)
    term.replace(old, new)
    assert backward(old) == [2, 2, 2] and backward(new) == [3, 3]
    assert not term.misses(old)
    term.close()
    new.grad = None
    assert backward(new) == [2, 2] and not term.misses(new)


def test_frozen_parameters_are_skipped():
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    term = LossTerm([frozen], ones)
    term.replace(frozen, nn.Parameter(torch.zeros(2)))
    assert not term.misses(frozen)
