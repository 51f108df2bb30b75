import io

import pytest
import torch
from torch import nn

from sparse_peft import SparseAdamW
from sparse_peft.dynamics.optimizer_state import ObservedMoments, rearranged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_until_positions_change_it_is_torchs_adamw(dtype, weight_decay):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 31, dtype=dtype)) for _ in range(2))
    a = SparseAdamW([ours], lr=3e-3, weight_decay=weight_decay)
    b = torch.optim.AdamW([theirs], lr=3e-3, weight_decay=weight_decay)
    for _ in range(50):
        ours.grad = torch.randn(31, dtype=dtype)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


def oracle_step(value, m, v, age, g, lr, betas, eps):
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    age = age + 1
    return value - lr * (m / (1 - betas[0] ** age)) / ((v / (1 - betas[1] ** age)).sqrt() + eps), m, v, age


def test_each_entry_has_its_own_age():
    betas, lr, eps = (0.8, 0.95), 1e-2, 1e-8
    parameter = nn.Parameter(torch.randn(12))
    optimizer = SparseAdamW([parameter], lr=lr, betas=betas, eps=eps)
    value = parameter.detach().double()
    m, v, age = torch.zeros(12).double(), torch.zeros(12).double(), torch.zeros(12).double()
    source = torch.tensor([3, -1, 0, 5, -1, 7, 8, 9, -1, 10, 11, -1])
    new = source < 0
    seeds = ObservedMoments(
        torch.where(new, torch.randn(12), 0),
        torch.where(new, torch.rand(12), 0),
        torch.where(new, torch.arange(12) % 3, 0),
    )
    for i in range(9):
        if i == 4:
            with torch.no_grad():
                parameter.copy_(rearranged(parameter, source))
            optimizer.remap_state(parameter, source, seeds)
            value = rearranged(value, source)
            m = rearranged(m, source, (seeds.mean * (1 - betas[0] ** seeds.steps)).double())
            v = rearranged(v, source, (seeds.mean_square * (1 - betas[1] ** seeds.steps)).double())
            age = rearranged(age, source, seeds.steps.double())
        parameter.grad = torch.randn(12)
        value, m, v, age = oracle_step(value, m, v, age, parameter.grad.double(), lr, betas, eps)
        optimizer.step()
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_bit_for_bit(moved, dtype):
    def make():
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(20).to(dtype))
        return parameter, SparseAdamW([parameter], lr=1e-2)

    def run(parameter, optimizer, steps):
        for i in steps:
            parameter.grad = torch.randn(20, generator=torch.Generator().manual_seed(i)).to(dtype)
            optimizer.step()

    source = torch.arange(20).roll(3)
    source[4] = -1
    whole, optimizer = make()
    run(whole, optimizer, range(3))
    if moved:
        optimizer.remap_state(whole, source)
    file = io.BytesIO()
    torch.save({"value": whole.detach(), "optimizer": optimizer.state_dict()}, file)
    run(whole, optimizer, range(3, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = make()
    resumed.data.copy_(saved["value"])
    other.load_state_dict(saved["optimizer"])
    assert other.state[resumed]["exp_avg"].dtype == torch.float32
    run(resumed, other, range(3, 8))
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr=-1"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": -1}, "eps=-1"),
        ({"weight_decay": -1}, "weight_"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAdamW([nn.Parameter(torch.zeros(1))], **options)
