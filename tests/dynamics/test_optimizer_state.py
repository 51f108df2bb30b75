import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.optimization import Adafactor

from sparse_peft import SparseAdamW
from sparse_peft.dynamics.optimizer_state import ObservedMoments, inner_optimizer, rearranged, remap_
from tests.helpers.optimizers import bnb_optimizers_run

SIZE = 60
needs_bnb = pytest.mark.skipif(not bnb_optimizers_run(), reason="this bitsandbytes has no optimizers for the CPU")


def cases(makes):
    """As parameters of a test, by name; those of bitsandbytes only where they run."""
    return [pytest.param(make, id=name, marks=[needs_bnb] if "bnb" in name else []) for name, make in makes.items()]


# elementwise optimizers: an entry's course does not depend on its neighbours
ELEMENTWISE = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-2),
    "sparse adamw": lambda p: SparseAdamW(p, lr=1e-2, weight_decay=0.01),
    "bnb adamw": lambda p: bnb.optim.AdamW32bit(p, lr=1e-2),
    "bnb lion": lambda p: bnb.optim.Lion32bit(p, lr=1e-3),
    "bnb paged": lambda p: bnb.optim.PagedAdamW32bit(p, lr=1e-2),
}
COUPLED = {
    "torch adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "bnb adam8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=16),
    "bnb paged adam8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=16),
    "bnb lion8bit": lambda p: bnb.optim.Lion8bit(p, lr=1e-3, min_8bit_size=16),
    "bnb ademamix8bit": lambda p: bnb.optim.AdEMAMix8bit(p, lr=1e-2, min_8bit_size=16),
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def trained(make, gradients, size=SIZE):
    parameter = nn.Parameter(torch.linspace(-1, 1, size))
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer


def move(parameter, optimizer, source, seeds=None):
    old_size = parameter.numel()
    values = rearranged(parameter.detach(), source)
    if values.numel() == old_size:
        with torch.no_grad():
            parameter.copy_(values)
    else:
        new = nn.Parameter(values)
        optimizer.param_groups[0]["params"] = [new]
        optimizer.state[new] = optimizer.state.pop(parameter, {})
        parameter = new
    remap_(optimizer, parameter, source, seeds, old_size=old_size)
    return parameter


def step(parameter, optimizer, gradient):
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("make", cases(ELEMENTWISE))
@given(data=st.data())
@settings(deadline=None, max_examples=8)
def test_entries_that_stay_go_on_as_if_nothing_had_happened(make, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.sampled_from([SIZE, SIZE, 47, 80]))
    order = torch.randperm(SIZE, generator=generator)[: min(size, SIZE)]
    source = torch.cat((order, torch.full((size - order.numel(),), -1)))
    source[torch.rand(size, generator=generator) < 0.2] = -1
    source = source[torch.randperm(size, generator=generator)]
    gradients = list(torch.randn(4, SIZE, generator=generator))
    parameter, optimizer = trained(make, gradients)
    twin, twin_optimizer = trained(make, gradients)
    parameter = move(parameter, optimizer, source)
    kept = source >= 0
    for gradient in torch.randn(3, SIZE, generator=generator):
        step(twin, twin_optimizer, gradient)
        step(parameter, optimizer, rearranged(gradient, source))
        # a vectorised kernel rounds otherwise at the end of a tensor, where a vector is not full
        torch.testing.assert_close(parameter[kept], twin[source[kept]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", cases(ELEMENTWISE | COUPLED))
def test_the_identity_changes_nothing_but_the_rounding_of_8_bit_states(make):
    torch.manual_seed(0)
    size = 600
    parameter, optimizer = trained(make, torch.randn(4, size), size)
    twin = copy.deepcopy(parameter)
    twin_optimizer = make([twin])
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    move(parameter, optimizer, torch.arange(size))
    gradient = torch.randn(size)
    ours, expected = step(parameter, optimizer, gradient), step(twin, twin_optimizer, gradient)
    if any(key.startswith("qmap") for key in optimizer.state[parameter]):
        torch.testing.assert_close(ours, expected, rtol=0.1, atol=1e-4)
    else:
        assert torch.equal(ours, expected)


@needs_bnb
@pytest.mark.parametrize("name", ["bnb adam8bit", "bnb paged adam8bit", "bnb lion8bit", "bnb ademamix8bit"])
@pytest.mark.parametrize("size", [256, 600])
@pytest.mark.parametrize("new_size", [None, 700])
def test_8_bit_states_are_moved_through_float32(name, size, new_size):
    torch.manual_seed(0)
    parameter, optimizer = trained(COUPLED[name], torch.randn(4, size), size)
    before = eight_bit(optimizer, parameter)
    codes = {key: value.clone() for key, value in optimizer.state[parameter].items() if key.startswith("qmap")}
    source = torch.randperm(size)
    if new_size is not None:
        source = torch.cat((source, torch.full((new_size - size,), -1)))
    source[:40] = -1
    parameter = move(parameter, optimizer, source)
    after = eight_bit(optimizer, parameter)
    for key, values in after.items():
        expected = rearranged(before[key], source)
        largest = expected.abs().max()
        torch.testing.assert_close(values, expected, atol=float(largest) * 0.02, rtol=0.1)
        assert bool((values[..., source < 0].abs() <= 1e-4 * largest).all()), "0, or the code next to it"
    for key, value in codes.items():
        assert torch.equal(optimizer.state[parameter][key], value)
    step(parameter, optimizer, torch.randn(source.numel()))


def eight_bit(optimizer, parameter):
    state = optimizer.state[parameter]
    out = {}
    for number in "12":
        if f"qmap{number}" not in state:
            continue
        codes, absmax = state[f"state{number}"], state[f"absmax{number}"]
        rows = [(codes, absmax)] if codes.ndim == 1 else list(zip(codes, absmax, strict=True))
        values = [
            bnb.functional.dequantize_blockwise(c.contiguous(), absmax=a, code=state[f"qmap{number}"], blocksize=256)
            for c, a in rows
        ]
        out[number] = torch.stack(values).squeeze(0)
    return out


def constant_seeds(source, g0, steps=5):
    new = source < 0
    return ObservedMoments(
        mean=torch.where(new, g0, 0.0),
        mean_square=torch.where(new, g0**2, 0.0),
        steps=torch.where(new, float(steps), 0.0),
    )


def regrown_step(make, steps_before, seeded, g0=0.37):
    """How far the first step takes a new entry, under a gradient that was g0 while it was observed too."""
    torch.manual_seed(0)
    parameter, optimizer = trained(make, torch.randn(steps_before, SIZE))
    source = torch.arange(SIZE)
    source[10:20] = -1
    move(parameter, optimizer, source, constant_seeds(source, torch.tensor(g0)) if seeded else None)
    return step(parameter, optimizer, torch.full((SIZE,), g0))[10:20]


ADAMS = {
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-14, weight_decay=0),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-14, amsgrad=True),
    "bnb": lambda p: bnb.optim.AdamW32bit(p, lr=1e-2, eps=1e-14, weight_decay=0),
    "by age": lambda p: SparseAdamW(p, lr=1e-2, eps=1e-14),
}


@pytest.mark.parametrize("make", cases(ADAMS))
@pytest.mark.parametrize("steps_before", [1, 7, 400])
def test_a_seeded_entry_begins_with_one_learning_rate(make, steps_before):
    torch.testing.assert_close(regrown_step(make, steps_before, True), torch.full((10,), -1e-2), rtol=1e-4, atol=0)


def test_an_unseeded_entry_begins_with_three_learning_rates_unless_its_age_counts():
    long = 20000  # the shared step count's corrections are 1 by then
    parameter, optimizer = trained(ADAMS["torch"], torch.randn(1, SIZE))
    optimizer.state[parameter]["step"].fill_(long)
    source = torch.full((SIZE,), -1)
    move(parameter, optimizer, source)
    expected = -1e-2 * 0.1 / 0.001**0.5
    torch.testing.assert_close(
        step(parameter, optimizer, torch.full((SIZE,), 0.37)), torch.full((SIZE,), expected), rtol=1e-3, atol=0
    )
    first = regrown_step(ADAMS["by age"], 50, False)
    torch.testing.assert_close(first, torch.full((10,), -1e-2), rtol=1e-4, atol=0)


AVERAGES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0),
    "torch adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-9),
    "transformers adafactor": lambda p: Adafactor(p, lr=1e-9, relative_step=False, beta1=0.9, clip_threshold=1e9),
    "bnb lion": lambda p: bnb.optim.Lion32bit(p, lr=1e-9),
    "bnb sgd": lambda p: bnb.optim.SGD32bit(p, lr=1e-9, momentum=0.9),
}
SEEDED = {"momentum_buffer", "square_avg", "grad_avg", "state1", "sum", "variance", "exp_avg_sq"}


@pytest.mark.parametrize("make", cases(AVERAGES))
def test_seeds_of_averages_are_those_of_an_entry_that_trained_as_long(make):
    """Constant gradients: what the state of an entry is after as many steps as were observed."""
    g0, steps = torch.tensor(0.3), 5
    parameter, optimizer = trained(make, g0.expand(steps, SIZE))
    other, other_optimizer = trained(make, torch.randn(9, SIZE))
    source = torch.full((SIZE,), -1)
    move(other, other_optimizer, source, constant_seeds(source, g0, steps))
    compared = SEEDED & set(optimizer.state[parameter])
    assert compared
    for key in compared:
        found, expected = other_optimizer.state[other][key], optimizer.state[parameter][key]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_half_precision_moments_stay_so():
    parameter = nn.Parameter(torch.randn(SIZE, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    source = torch.arange(SIZE).flip(0)
    source[0] = -1
    before = optimizer.state[parameter]["exp_avg"].clone()
    remap_(optimizer, parameter, source, constant_seeds(source, torch.tensor(1.0)), old_size=SIZE)
    after = optimizer.state[parameter]["exp_avg"]
    assert after.dtype == torch.bfloat16 and torch.equal(after[1:], before.flip(0)[1:])


def test_an_optimizer_that_has_not_stepped_has_nothing_to_move():
    parameter = nn.Parameter(torch.zeros(4))
    for optimizer in (torch.optim.AdamW([parameter]), SparseAdamW([parameter])):
        remap_(optimizer, parameter, torch.tensor([0, -1, 2, 3]), old_size=4)
        assert not optimizer.state.get(parameter)


def test_the_inner_optimizer_is_found_or_missed():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    assert inner_optimizer(Accelerator(cpu=True).prepare(optimizer)) is optimizer
    with pytest.raises(TypeError, match=r"builtins\.object: a torch\.optim\.Optimizer is expected.*DeepSpeed"):
        inner_optimizer(object())
