"""The kernelised delta against dense float64 and torch's autograd; numbers are of the oracles in the method's spec."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import panel_limit
from sparse_peft.ops import (
    THRESHOLDS,
    Competition,
    ConvProduct,
    Factors,
    InitialDelta,
    LinearProduct,
    distance_delta,
    distance_entries,
    distance_layer,
    distance_matrix,
    find_threshold,
)
from sparse_peft.ops.distance import distances

INPUTS, OUTPUTS, RANK = 13, 7, 6


def factors(inputs=INPUTS, outputs=OUTPUTS, rank=RANK, mixed=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, n, rank // 2, generator=generator, dtype=dtype) for n in (inputs, outputs))
    mix = torch.tensor([0.7, 0.3, -0.1], dtype=dtype) if mixed else None
    return Factors(*(t if t is None else t.requires_grad_() for t in (a, b, mix)))


def dense_distance(f):
    """By the definition, with torch's differentiable cdist."""
    exact = "donot_use_mm_for_euclid_dist"
    d = [torch.cdist(b, a, compute_mode=exact) for a, b in zip(f.inputs, f.outputs, strict=True)]
    k = 0.1 * d[0] - 0.1 * d[1]
    if f.mix is None:
        return k
    return k + f.mix[0] * torch.softmax(k / f.mix[1].exp(), dim=0) + f.mix[2]


def dense_delta(k, tau, threshold):
    size = k.abs()
    if threshold == "soft":
        return k * torch.relu(size - tau)
    if threshold == "reference":
        return k * torch.where(size > tau, size, 0).detach()
    return k + (torch.where(size > tau, k, 0) - k).detach()


def how(threshold="soft", product=None, first=None):
    return Competition(product or LinearProduct(1), THRESHOLDS[threshold], first)


def gradients(out, wanted):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), wanted)


# ------------------------------------------------------------------------------------------------------------ kernel


def test_oracle_1_kernel_is_what_loops_say():
    f = factors()
    value = distance_matrix(f).value
    assert value.shape == (OUTPUTS, INPUTS)
    for o in range(OUTPUTS):
        for i in range(INPUTS):
            want = sum(
                sign * 0.1 * math.dist(f.inputs[p, i].tolist(), f.outputs[p, o].tolist())
                for p, sign in enumerate((1, -1))
            )
            assert value[o, i].item() == pytest.approx(want, abs=1e-12)


def test_distances_of_equal_rows_are_zero_on_every_path(monkeypatch):
    a = torch.randn(30, 4) * 100
    exact = distances(a, a.flip(0))
    assert bool((exact.flip(1).diagonal() == 0).all())

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    by_product = distances(a.as_subclass(Elsewhere), a.flip(0)).as_subclass(torch.Tensor)
    assert bool((by_product.flip(1).diagonal() == 0).all())
    torch.testing.assert_close(by_product, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("limit", [None, 8 * 8 * OUTPUTS, 3 * 8 * 8 * OUTPUTS])
@pytest.mark.parametrize("fused", [False, True])
def test_oracles_2_and_7_layer_and_gradients_are_autograds_whatever_the_parts(mixed, threshold, limit, fused):
    f = factors(mixed=mixed)
    with torch.no_grad():
        f.outputs[:, 2] = f.inputs[:, 4]  # a distance of 0 in both pieces
        f.outputs[0, 3] = f.inputs[0, 5]  # and in one
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, INPUTS, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    bias = torch.randn(OUTPUTS, generator=generator, dtype=torch.float64, requires_grad=True)
    tau = find_threshold(f, 40, THRESHOLDS[threshold]).detach()
    wanted = [t for t in (*f, x, *([bias] if fused else [])) if t is not None]
    base = (weight, bias) if fused else (None, None)
    with panel_limit(limit or 2**26):
        assert len(f.parts()) == {None: 1, 8 * 8 * OUTPUTS: INPUTS, 3 * 8 * 8 * OUTPUTS: 5}[limit]
        out = distance_layer(x, f, tau, how(threshold), *base)
        found = gradients(out, wanted)
    delta = dense_delta(dense_distance(f), tau, threshold)
    want = F.linear(x, weight + delta, bias) if fused else F.linear(x, delta)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, gradients(want, wanted), strict=True):
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_oracle_3_gradcheck_of_the_papers_map():
    f = factors(5, 4, 4, mixed=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    tau = find_threshold(f, 12, THRESHOLDS["soft"]).detach() * 0.999  # between two values: not where it has a kink
    assert torch.autograd.gradcheck(
        lambda x, a, b, mix: distance_layer(x, Factors(a, b, mix), tau, how()), (x, *f), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_half_precision(transposed, dtype):
    f = factors(dtype=torch.float32)
    weight, x = torch.randn(OUTPUTS, INPUTS), torch.randn(6, INPUTS).to(dtype)
    tau = find_threshold(f, 30, THRESHOLDS["soft"])
    stored = weight.t().contiguous() if transposed else weight
    with panel_limit(4 * 8 * 4 * OUTPUTS):
        out = distance_layer(x, f, tau, how(product=LinearProduct(0 if transposed else 1)), stored)
    want = x.double() @ (weight.double() + dense_delta(dense_distance(f), tau, "soft")).t()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=0.05)
    gradient = torch.autograd.grad(out.sum(), f.inputs)[0]
    theirs = torch.autograd.grad(want.sum(), f.inputs)[0]
    torch.testing.assert_close(gradient, theirs, rtol=1e-3 if dtype == torch.float32 else 0.1, atol=1e-2)


@pytest.mark.parametrize("module", [nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2)),
                                    nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect")])  # fmt: skip
@pytest.mark.parametrize("limit", [2**26, 8 * 8 * 6 * 7])
def test_convolutions(module, limit):
    module = module.double()
    product = ConvProduct.of(module)
    f = factors(4 * product.taps, 6)
    x = torch.randn(2, 4, *[9] * len(product.kernel), dtype=torch.float64, requires_grad=True)
    tau = find_threshold(f, 30, THRESHOLDS["soft"]).detach()
    with panel_limit(limit):
        out = distance_layer(x, f, tau, how(product=product), module.weight.detach(), module.bias)
        found = gradients(out, [*f[:2], x, module.bias])
    delta = dense_delta(dense_distance(f), tau, "soft").view_as(module.weight)
    want = module._conv_forward(x, module.weight.detach() + delta, module.bias)
    torch.testing.assert_close(out, want)
    for mine, theirs in zip(found, gradients(want, [*f[:2], x, module.bias]), strict=True):
        torch.testing.assert_close(mine, theirs)


# -------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("limit", [2**26, 8 * 8 * OUTPUTS])
def test_oracle_4_the_papers_map_keeps_exactly_what_it_says(sparsity, limit):
    f = factors()
    numel = INPUTS * OUTPUTS
    kept = numel - math.ceil(sparsity * numel)
    with panel_limit(limit):
        tau = find_threshold(f, kept, THRESHOLDS["soft"])
        delta = distance_delta(f, tau, how(), torch.float64)
        positions, values = distance_entries(f, tau, how())
    k = dense_distance(f).detach()
    assert int((delta != 0).sum()) == kept
    on = k.abs() > tau
    torch.testing.assert_close(delta[on], (k * k.abs() - tau * k)[on])
    assert torch.equal(positions, on.flatten().nonzero().squeeze(1)) and torch.equal(values, delta[on])


def test_oracle_4_the_papers_map_is_continuous_in_tau_and_the_reference_is_not():
    k = torch.tensor([-3.0, -2.0, -1.0, 0.5, 2.5], dtype=torch.float64)
    for tau in (1.0, 2.0, 2.5):
        below, above = (THRESHOLDS["soft"].apply(k, torch.tensor(tau + e, dtype=k.dtype)) for e in (-1e-9, 1e-9))
        assert torch.allclose(below, above, atol=1e-8)
    jump = [THRESHOLDS["reference"].apply(k, torch.tensor(2.0 + e, dtype=k.dtype)) for e in (-1e-9, 1e-9)]
    assert (jump[0] - jump[1]).abs().max() > 3.9


def test_oracle_4_the_reference_map_as_measured_of_the_authors_code():
    k, tau = torch.tensor([-3.0, -2.0, -1.0, 0.5, 2.5]), torch.tensor(1.6)
    assert torch.allclose(THRESHOLDS["reference"].apply(k, tau), torch.tensor([-9.0, -4.0, 0.0, 0.0, 6.25]))
    assert torch.equal(THRESHOLDS["reference"].slope(k, tau), torch.tensor([3.0, 2.0, 0.0, 0.0, 2.5]))


@pytest.mark.parametrize("dropped", [1, 17, 45, 90])
@pytest.mark.parametrize("limit", [2**26, 8 * 8 * OUTPUTS])
def test_the_references_threshold_is_torchs_quantile(dropped, limit):
    f = factors()
    numel = INPUTS * OUTPUTS
    with panel_limit(limit):
        tau = find_threshold(f, numel - dropped, THRESHOLDS["reference"])
    torch.testing.assert_close(tau, dense_distance(f).abs().flatten().quantile(dropped / numel))


def test_oracle_8_the_kernel_has_a_higher_rank_than_its_factors():
    f = factors(256, 256, 8)
    assert torch.linalg.matrix_rank(dense_distance(f).detach()) > 200
    a, b = torch.randn(256, 8, dtype=torch.float64), torch.randn(256, 8, dtype=torch.float64)
    assert torch.linalg.matrix_rank(b @ a.t()) == 8


def test_a_first_delta_is_subtracted_from_what_is_kept_only():
    f, first = factors(), factors(seed=1)
    tau, first_tau = (find_threshold(each, 40, THRESHOLDS["soft"]) for each in (f, first))
    delta = distance_delta(f, tau, how(first=InitialDelta(first, first_tau)), torch.float64)
    k = dense_distance(f).detach()
    want = dense_delta(k, tau, "soft") - dense_delta(dense_distance(first).detach(), first_tau, "soft") * (
        k.abs() > tau
    )
    torch.testing.assert_close(delta, want)
    assert int((delta != 0).sum()) == 40
    same = distance_delta(first, first_tau, how(first=InitialDelta(first, first_tau)), torch.float64)
    assert bool((same == 0).all())


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_oracle_7_only_input_factors_and_tau_are_saved(fused, mixed):
    f = factors(64, 48, 8, mixed=mixed, dtype=torch.float32)
    x = torch.randn(10, 64, requires_grad=True)
    weight = torch.randn(48, 64) if fused else None
    saved = []
    tau = find_threshold(f, 100, THRESHOLDS["soft"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = distance_layer(x, f, tau, how(), weight)
    own = [t for t in saved if weight is None or t.data_ptr() != weight.data_ptr()]
    scalars = 3 if mixed else 0
    assert sum(t.nbytes for t in own) == x.nbytes + f.inputs.nbytes + f.outputs.nbytes + 4 + 4 * scalars
    out.sum().backward()


@pytest.mark.parametrize("fused, mixed", [(False, False), (True, True)])
def test_no_temporary_is_larger_than_a_panel_whatever_the_batch(fused, mixed):
    limit, n = 16 * 1024, 128
    f = factors(n, n, 8, mixed=mixed, dtype=torch.float32)
    first = InitialDelta(factors(n, n, 8, mixed=mixed, dtype=torch.float32, seed=1), torch.tensor(0.1))
    weight = torch.randn(n, n) if fused else None
    with panel_limit(limit):
        tau = find_threshold(f, 3000, THRESHOLDS["soft"])
        for tokens in (2, 32):
            x = torch.randn(tokens, n, requires_grad=True)
            with LargestTensor() as largest:
                distance_layer(x, f, tau, how(first=first), weight).sum().backward()
            assert limit // 8 <= largest.nbytes <= limit < n * n * 4
        # the threshold's histograms are of one size, whatever the weight's is
        with LargestTensor() as largest:
            find_threshold(f, 3000, THRESHOLDS["soft"])
        assert largest.nbytes == 2**16 * 8


def test_oracle_12_more_entries_than_torchs_quantile_took():
    """Before torch 2.15."""
    f = factors(4100, 4100, 2, dtype=torch.float32)
    numel = 4100 * 4100
    assert numel > 2**24
    kept = numel // 10
    tau = find_threshold(f, kept, THRESHOLDS["soft"])
    count = sum(int((distance_matrix(f, *part).value.abs() > tau).sum()) for part in f.parts())
    assert kept - 3 <= count <= kept  # equal floats at the threshold are left out together
    x = torch.randn(2, 4100)
    out = distance_layer(x, f, tau, how())
    out.sum().backward()
    assert bool(f.inputs.grad.isfinite().all()) and bool((f.inputs.grad != 0).any())


def test_an_input_without_gradient_is_no_obstacle():
    f = factors()
    out = distance_layer(torch.randn(3, INPUTS, dtype=torch.float64), f, torch.tensor(0.0), how())
    assert all(bool((g != 0).any()) for g in torch.autograd.grad(out.sum(), f[:2]))
