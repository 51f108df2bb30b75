"""Codes and tables for known inputs: against plain float64 loops, and what they guarantee about the output's error."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import LargestTensor
from sparse_peft.calibrate import (
    ascending,
    assign_codes,
    codes_checksum,
    compensated_sketch,
    fit_codebooks,
    output_error,
    refit_codebooks,
)
from sparse_peft.calibrate.codebooks import midpoints
from sparse_peft.numerics import panel_limit
from sparse_peft.ops import column_groups


def correlated(cols, samples=None, seed=0):
    """Second moment of inputs whose features have common causes and very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    mixing += 2 * torch.randn(cols, 1, generator=generator, dtype=torch.float64) / cols**0.5
    x = torch.randn(samples or 8 * cols, cols, generator=generator, dtype=torch.float64) @ mixing
    x *= torch.rand(cols, generator=generator, dtype=torch.float64) * 3 + 0.1
    return x.t() @ x / len(x)


def decode(codebooks, codes):
    group = column_groups(codes.shape[1], codebooks.shape[1])
    return codebooks[torch.arange(codes.shape[0])[:, None], group, codes.long()]


def error_of(weight, codebooks, codes, moment):
    """``tr(E H E^T)`` of each row, in float64."""
    error = weight.double() - decode(codebooks, codes).double()
    return ((error @ moment.double()) * error).sum(1)


def plain_sweep(weight, moment, codebooks, damping, order):
    """GPTQ's sweep, one row and one column at a time, in float64, from the inverse itself."""
    rows, cols = weight.shape
    group = column_groups(cols, codebooks.shape[1])
    permuted = moment[order][:, order].clone()
    permuted += damping * moment.diagonal().mean() * torch.eye(cols)
    upper = torch.linalg.cholesky(torch.linalg.inv(permuted)).mT
    torch.testing.assert_close(upper.mT @ upper, torch.linalg.inv(permuted))
    left, codes = weight.double()[:, order].clone(), torch.zeros(rows, cols, dtype=torch.uint8)
    for row in range(rows):
        for place, column in enumerate(order.tolist()):
            table = codebooks[row, group[column]].double()
            code = int((left[row, place] > midpoints(table)).sum())
            codes[row, column] = code
            error = (left[row, place] - table[code]) / upper[place, place]
            left[row, place:] -= error * upper[place, place:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows, cols, groups, block", [(5, 33, 1, 8), (3, 40, 7, 128), (9, 17, 4, 1)])
def test_the_sweep_is_the_plain_one(rows, cols, groups, block, act_order):
    weight, moment = torch.randn(rows, cols), correlated(cols)
    order = moment.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(cols)

    with panel_limit(2 * cols * 16):
        codebooks, codes = compensated_sketch(
            weight, moment, 3, groups, act_order=act_order, block=block, damping=0.02
        )

    assert torch.equal(codebooks, fit_codebooks(weight, 3, groups))
    assert torch.equal(codes, plain_sweep(weight, moment, codebooks, 0.02, order))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits, groups", [(2, 1), (3, 5), (4, 2)])
def test_the_sweep_beats_the_nearest_entries_and_the_refit_never_loses(bits, groups, act_order):
    """Oracle 7."""
    weight, moment = torch.randn(12, 240), correlated(240)
    nearest = fit_codebooks(weight, bits, groups)
    nearest_codes = assign_codes(weight, nearest)

    codebooks, codes = compensated_sketch(weight, moment, bits, groups, act_order=act_order)

    before = error_of(weight, nearest, nearest_codes, moment)
    swept = error_of(weight, codebooks, codes, moment)
    assert swept.sum() < 0.7 * before.sum()
    for tables, chosen, error in ((nearest, nearest_codes, before), (codebooks, codes, swept)):
        refitted = error_of(weight, refit_codebooks(weight, chosen, moment, tables), chosen, moment)
        assert bool((refitted <= error * (1 + 1e-6)).all())
        assert refitted.sum() < 0.99 * error.sum()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e5])
def test_without_correlation_the_sweep_is_the_nearest_entry(scale):
    """Oracle 7: H = c I."""
    weight = torch.randn(7, 50)

    codebooks, codes = compensated_sketch(weight, scale * torch.eye(50), 3, 3)

    assert torch.equal(codes, assign_codes(weight, codebooks))


def test_a_refit_without_correlation_is_the_mean_of_each_cluster():
    """Oracle 7: H = I."""
    weight = torch.randn(6, 41)
    codebooks = torch.randn(6, 3, 8).sort().values
    codes = assign_codes(weight, codebooks)

    refitted = refit_codebooks(weight, codes, torch.eye(41), codebooks)

    group = column_groups(41, 3)
    for row in range(6):
        for part in range(3):
            for entry in range(8):
                members = weight[row][(group == part) & (codes[row] == entry)]
                expected = members.mean() if members.numel() else codebooks[row, part, entry]
                torch.testing.assert_close(refitted[row, part, entry], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_refit_is_the_dense_least_squares_solution(groups):
    weight, moment = torch.randn(4, 37), correlated(37)
    codebooks = fit_codebooks(weight, 2, groups)
    codes = assign_codes(weight, codebooks)

    with panel_limit(1):
        refitted = refit_codebooks(weight, codes, moment, codebooks, ridge=1e-12)

    places = codes.long() + column_groups(37, groups) * 4
    for row in range(4):
        spread = torch.nn.functional.one_hot(places[row], 4 * groups).double()
        root = torch.linalg.cholesky(moment).mT
        expected = torch.linalg.lstsq(root @ spread, root @ weight[row].double()).solution
        torch.testing.assert_close(refitted[row].flatten().double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-5, 1e-3, 10.0])
def test_a_refit_never_loses_where_few_samples_leave_the_system_singular(ridge):
    weight, moment = torch.randn(8, 64), correlated(64, samples=5)
    codebooks, codes = compensated_sketch(weight, moment, 2, 3)

    refitted = refit_codebooks(weight, codes, moment, codebooks, ridge=ridge)

    before, after = (error_of(weight, tables, codes, moment) for tables in (codebooks, refitted))
    assert bool(refitted.isfinite().all())
    assert bool((after <= before * (1 + 1e-6) + 1e-7).all())
    assert after.sum() < before.sum()


def test_entries_without_weights_keep_their_value():
    weight, moment = torch.randn(5, 30), correlated(30)
    codebooks = torch.linspace(-1, 1, 16).repeat(5, 2, 1)
    codes = assign_codes(weight, codebooks).clamp_(min=4)

    refitted = refit_codebooks(weight, codes, moment, codebooks)

    assert torch.equal(refitted[..., :4], codebooks[..., :4])
    assert not torch.equal(refitted[..., 4:], codebooks[..., 4:])


def test_inputs_that_are_always_zero_compensate_nothing():
    weight, moment = torch.randn(6, 40), correlated(40)
    dead = torch.tensor([0, 7, 39])
    moment[dead] = 0
    moment[:, dead] = 0
    live = torch.ones(40, dtype=torch.bool)
    live[dead] = False
    tables = fit_codebooks(weight, 3)

    _, codes = compensated_sketch(weight, moment, 3, codebooks=tables, damping=1e-9, act_order=False)
    _, alone = compensated_sketch(
        weight[:, live], moment[live][:, live], 3, codebooks=tables, damping=1e-9, act_order=False
    )

    assert torch.equal(codes[:, dead], assign_codes(weight, tables)[:, dead])
    assert torch.equal(codes[:, live], alone)
    nothing = compensated_sketch(weight, torch.zeros(40, 40), 3)[1]
    assert torch.equal(nothing, assign_codes(weight, tables))


def test_too_few_samples_are_damped():
    weight, moment = torch.randn(6, 64), correlated(64, samples=4)

    _, codes = compensated_sketch(weight, moment, 3)

    assert int(codes.max()) <= 7
    with pytest.raises(ValueError, match=r"layer a.b: .*singular with damping=0.0; give more data"):
        compensated_sketch(weight, moment.float(), 3, damping=0.0, name="a.b")


def test_output_error_is_that_of_the_outputs():
    weight, other = torch.randn(5, 12), torch.randn(5, 12)
    x = torch.randn(500, 12, dtype=torch.float64)

    found = output_error(weight, other, x.t() @ x / 500)

    clean, off = x @ weight.double().t(), x @ other.double().t()
    assert found == pytest.approx(float((clean - off).square().sum() / clean.square().sum()), rel=1e-9)


def test_wrong_moments_are_refused_by_name():
    weight = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"layer a.b: a second moment of shape \(5, 5\) for 6 inputs"):
        compensated_sketch(weight, torch.eye(5), 2, name="a.b")
    bad = torch.eye(6)
    bad[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer a.b: the second moment .* not finite"):
        refit_codebooks(weight, torch.zeros(4, 6, dtype=torch.uint8), bad, torch.zeros(4, 1, 4), name="a.b")
    with pytest.raises(ValueError, match=r"layer a.b: codebooks of shape \(4, 1, 4\)"):
        compensated_sketch(weight, torch.eye(6), 3, codebooks=torch.zeros(4, 1, 4), name="a.b")
    with pytest.raises(ValueError, match="ridge=0"):
        refit_codebooks(weight, torch.zeros(4, 6, dtype=torch.uint8), torch.eye(6), torch.zeros(4, 1, 4), ridge=0)


def test_no_temporary_is_larger_than_a_panel():
    """Codes, a byte a weight, are the largest thing that is made."""
    rows, cols, panel = 4096, 64, 2**17
    weight, moment = torch.randn(rows, cols), correlated(cols)

    with LargestTensor() as seen, panel_limit(panel):
        codebooks = fit_codebooks(weight, 2, 2, method="quantile")
        nearest = assign_codes(weight, codebooks)
        codes_checksum(nearest)
        _, codes = compensated_sketch(weight, moment, 2, 2, codebooks=codebooks)
        refitted = refit_codebooks(weight, codes, moment, codebooks)
        ascending(refitted, codes)

    assert panel // 4 < seen.nbytes <= rows * cols < weight.nbytes
