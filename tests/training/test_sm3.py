import io

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import SM3, SparseConfig
from sparse_peft.dynamics.sm3_accumulators import accumulate_
from sparse_peft.support import Support


def dense_sm3(shape, gradients, lr, eps=1e-8, wd=0.0, momentum=0.0, mask=None):
    """SM3-II over a matrix in float64; entries outside the mask have no gradient and no part in the covers."""
    value, row, col = torch.zeros(shape).double(), torch.zeros(shape[0]).double(), torch.zeros(shape[1]).double()
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    buffer = torch.zeros(shape).double()
    for g in gradients:
        g = g.double()
        nu = torch.zeros(shape).double()
        for i in range(shape[0]):
            for j in range(shape[1]):
                nu[i, j] = min(row[i], col[j]) + g[i, j] ** 2
        for i in range(shape[0]):
            row[i] = max([row[i], *nu[i][mask[i]]])
        for j in range(shape[1]):
            col[j] = max([col[j], *nu[:, j][mask[:, j]]])
        update = g / (nu + eps).sqrt()
        buffer = momentum * buffer + (1 - momentum) * update if momentum else update
        value = (value - lr * buffer) * (1 - lr * wd)
    return value, row, col


def model_of(density, **config):
    base = nn.Sequential(nn.Linear(7, 5))
    return get_peft_model(base, SparseConfig(target_modules=["0"], density=density, scale=1.0, **config))


def leaf(model):
    return model.base_model.model[0].deltas["default"]


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}])
def test_it_is_sm3_over_the_matrix(density, options):
    model = model_of(density)
    delta = leaf(model)
    optimizer = SM3([delta.values], lr=0.1, peft_model=model, **options)
    mask, at = delta.support.to_mask(), delta.support.indices.long()
    gradients = [torch.randn(5, 7) * mask for _ in range(6)]
    for gradient in gradients:
        delta.values.grad = gradient.reshape(-1)[at]
        optimizer.step()
    named = {"wd" if k == "weight_decay" else k: v for k, v in options.items()}
    value, row, col = dense_sm3((5, 7), gradients, 0.1, mask=mask, **named)
    torch.testing.assert_close(delta.values.detach().double(), value.reshape(-1)[at], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(optimizer.state[delta.values]["row"].double(), row, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.state[delta.values]["col"].double(), col, rtol=1e-5, atol=1e-7)


def test_other_parameters_are_matrices_and_vectors_of_their_own():
    weight, bias = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4))
    optimizer = SM3([weight, bias], lr=0.1, peft_model=nn.Linear(3, 4))
    gradients = [(torch.randn(4, 3), torch.randn(4)) for _ in range(4)]
    total = torch.zeros(4).double()
    expected = torch.zeros(4).double()
    for g, b in gradients:
        weight.grad, bias.grad = g, b
        optimizer.step()
        total += b.double() ** 2
        expected -= 0.1 * b.double() / (total + 1e-8).sqrt()
    value, _, _ = dense_sm3((4, 3), [g for g, _ in gradients], 0.1)
    torch.testing.assert_close(weight.detach().double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_not_finite_leave_their_entries_alone():
    model = model_of(0.5)
    delta = leaf(model)
    optimizer = SM3([delta.values], lr=0.1, peft_model=model)
    gradient = torch.randn(delta.values.numel())
    gradient[3], gradient[5] = float("nan"), float("inf")
    delta.values.grad = gradient
    optimizer.step()
    assert delta.values[[3, 5]].tolist() == [0, 0] and bool(delta.values.isfinite().all())
    assert all(bool(t.isfinite().all()) for t in optimizer.state[delta.values].values())


def test_covers_bound_the_sums_of_squares():
    support = Support.random((6, 9), 20, seed=0, name="x")
    row, col, total = torch.zeros(6), torch.zeros(9), torch.zeros(20)
    for _ in range(10):
        gradient = torch.randn(20)
        total += gradient**2
        entries = accumulate_(row, col, support, gradient)
        assert bool((entries >= total - 1e-4).all())
        assert bool((torch.minimum(row[support.rows.long()], col[support.cols.long()]) >= entries - 1e-6).all())


def test_momentum_goes_with_its_entry_and_the_covers_stay():
    model = model_of(0.5)
    delta = leaf(model)
    optimizer = SM3([delta.values], lr=0.1, peft_model=model, momentum=0.5)
    delta.values.grad = torch.randn(delta.values.numel())
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[delta.values].items()}
    source = torch.arange(delta.values.numel()).roll(1)
    source[2] = -1
    optimizer.remap_state(delta.values, source)
    moved = optimizer.state[delta.values]
    assert torch.equal(moved["row"], state["row"]) and torch.equal(moved["col"], state["col"])
    expected = state["momentum_buffer"].roll(1)
    expected[2] = 0
    assert torch.equal(moved["momentum_buffer"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_bit_for_bit(dtype):
    def run(model, optimizer, steps):
        values = leaf(model).values
        for i in steps:
            values.grad = torch.randn(values.numel(), generator=torch.Generator().manual_seed(i)).to(dtype)
            optimizer.step()

    whole, resumed = (model_of(0.5) for _ in range(2))
    for model in (whole, resumed):
        leaf(model).values.data = leaf(model).values.data.to(dtype)
    make = lambda m: SM3([leaf(m).values], lr=0.1, peft_model=m, momentum=0.9)  # noqa: E731
    optimizer = make(whole)
    run(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"values": leaf(whole).values.detach(), "optimizer": optimizer.state_dict()}, file)
    run(whole, optimizer, range(3, 7))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make(resumed)
    leaf(resumed).values.data.copy_(saved["values"])
    other.load_state_dict(saved["optimizer"])
    run(resumed, other, range(3, 7))
    assert torch.equal(leaf(whole).values, leaf(resumed).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1}, "lr=-1"), ({"momentum": 1.0}, "momentum=1.0"), ({"weight_decay": -1}, "weight_")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SM3([nn.Parameter(torch.zeros(1))], peft_model=nn.Linear(1, 1), **options)
