"""Tables and codes of weights: against exhaustive search and plain loops, and their guarantees."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft.calibrate import Sketch, assign_codes, codes_checksum, fit_codebooks
from sparse_peft.calibrate.codebooks import CODEBOOK_METHODS, midpoints
from sparse_peft.numerics import panel_limit
from sparse_peft.numerics.kmeans import SortedRows, starts
from sparse_peft.ops import column_groups

KMEANS = ("dp", "lloyd")


def decode(codebooks, codes):
    group = column_groups(codes.shape[1], codebooks.shape[1])
    return codebooks[torch.arange(codes.shape[0])[:, None], group, codes.long()]


def error_of(weight, codebooks, weights=None):
    """Weighted squared error of nearest assignment, in float64."""
    squares = (weight.double() - decode(codebooks, assign_codes(weight, codebooks)).double()).square()
    return float((squares if weights is None else squares * weights).sum())


def heavy(rows, cols):
    return torch.distributions.StudentT(3.0).sample((rows, cols)) * 0.02


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, groups, cols", [(2, 1, 33), (3, 4, 50), (4, 3, 64)])
@pytest.mark.parametrize("method", KMEANS)
def test_few_distinct_values_come_back_bit_for_bit(method, bits, groups, cols, dtype):
    """Oracle 1."""
    entries = 1 << bits
    group = column_groups(cols, groups)
    tables = torch.randn(7, groups, entries).to(dtype)
    tables[0, :, 1] = tables[0, :, 0]  # fewer than there are entries
    tables[1] = 0.5  # a constant row
    tables[2] = 0.0
    weight = tables[torch.arange(7)[:, None], group, torch.randint(0, entries, (7, cols))]

    codebooks = fit_codebooks(weight, bits, groups, method=method)

    assert torch.equal(decode(codebooks, assign_codes(weight, codebooks)).to(dtype), weight)
    assert error_of(weight, codebooks) == 0.0


@pytest.mark.parametrize("method", KMEANS)
def test_neighbouring_floats_keep_their_own_entries(method):
    """Their float32 middle is one of the two."""
    for first in (1.0, 1.0000001, -3.0, 1e-3):
        value = torch.tensor(first)
        weight = torch.stack([value, torch.nextafter(value, torch.tensor(9.0)), value]).repeat(2, 3)

        codebooks = fit_codebooks(weight, 2, method=method)

        assert torch.equal(decode(codebooks, assign_codes(weight, codebooks)), weight)


@pytest.mark.parametrize("method", KMEANS)
def test_clusters_of_equal_values_are_met_exactly_among_others(method):
    weight = torch.cat((torch.full((3, 200), 0.1), torch.randn(3, 40) * 1e-3 + 5), 1)

    codebooks = fit_codebooks(weight, 3, method=method)

    decoded = decode(codebooks, assign_codes(weight, codebooks))
    assert torch.equal(decoded[:, :200], weight[:, :200])


# ------------------------------------------------------------------ order of quality


@pytest.mark.parametrize("cols", [40, 72])
def test_more_entries_and_more_groups_never_cost_with_exact_tables(cols):
    """Oracle 5."""
    weight, weights = heavy(8, cols), torch.rand(8, cols)

    def error(bits, groups):
        return error_of(weight, fit_codebooks(weight, bits, groups, weights=weights, bins=None), weights)

    for bits, groups in itertools.product((1, 2, 3), (1, 2, 4)):
        assert error(bits + 1, groups) <= error(bits, groups) * (1 + 1e-6)
        assert error(bits, 2 * groups) <= error(bits, groups) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_beats_round_to_nearest_on_every_row(bits):
    """Oracle 6: from the grid of round to nearest, Lloyd's iteration can only improve; other starts must be better."""
    for weight in (torch.randn(16, 300), heavy(16, 300), torch.randint(-9, 9, (16, 300)).float()):
        rows = SortedRows(weight, torch.ones_like(weight))
        grid = rows.error(starts(rows, 1 << bits)["uniform"])
        for method in KMEANS:
            tables = fit_codebooks(weight, bits, method=method).squeeze(1).double()
            assert bool((rows.error(tables) <= grid * (1 + 1e-6)).all()), method
        if weight.unique().numel() > 1000:
            assert bool((rows.error(tables) < 0.9 * grid).all())


def test_binned_tables_are_near_the_exact_ones_and_below_lloyd():
    weight = heavy(8, 300)

    exact, binned, lloyds = (
        error_of(weight, fit_codebooks(weight, 4, method=method, bins=bins))
        for method, bins in (("dp", None), ("dp", 128), ("lloyd", None))
    )

    assert exact <= binned <= 1.01 * exact
    assert binned < lloyds


# ------------------------------------------------------------------ invariances (oracle 8)


@pytest.mark.parametrize("method", CODEBOOK_METHODS)
def test_scaling_scales_tables_and_keeps_codes(method):
    weight = heavy(5, 70)
    codebooks = fit_codebooks(weight, 3, 2, method=method)

    scaled = fit_codebooks(weight * 4, 3, 2, method=method)

    assert torch.equal(scaled, codebooks * 4)
    assert torch.equal(assign_codes(weight * 4, scaled), assign_codes(weight, codebooks))


@pytest.mark.parametrize("method", CODEBOOK_METHODS)
def test_equal_weights_are_no_weights(method):
    weight = heavy(5, 70)

    weighted = fit_codebooks(weight, 3, 3, weights=torch.ones(70), method=method)

    assert torch.equal(weighted, fit_codebooks(weight, 3, 3, method=method))


@pytest.mark.parametrize("method", KMEANS)
def test_permuting_columns_within_a_group_permutes_codes(method):
    weight, weights = heavy(5, 60), torch.rand(60)
    order = torch.cat([torch.randperm(20) + 20 * group for group in range(3)])

    codebooks = fit_codebooks(weight, 3, 3, weights=weights, method=method)
    permuted = fit_codebooks(weight[:, order], 3, 3, weights=weights[order], method=method)

    torch.testing.assert_close(permuted, codebooks, rtol=1e-6, atol=0)
    assert torch.equal(assign_codes(weight[:, order], codebooks), assign_codes(weight, codebooks)[:, order])


@pytest.mark.parametrize("method", CODEBOOK_METHODS)
def test_panels_change_nothing(method):
    weight, weights = heavy(13, 37), torch.rand(13, 37)
    codebooks = fit_codebooks(weight, 2, 5, weights=weights, method=method)
    codes = assign_codes(weight, codebooks)

    checksum = codes_checksum(codes)
    with panel_limit(1):
        assert torch.equal(fit_codebooks(weight, 2, 5, weights=weights, method=method), codebooks)
        assert torch.equal(assign_codes(weight, codebooks), codes)
        assert codes_checksum(codes) == checksum


def test_weights_draw_the_tables_to_what_counts():
    weight = heavy(4, 400)
    weights = (weight.abs() > 0.02).float() + 1e-3

    plain, drawn = fit_codebooks(weight, 2), fit_codebooks(weight, 2, weights=weights)

    assert error_of(weight, drawn, weights) < 0.8 * error_of(weight, plain, weights)
    assert error_of(weight, plain) < error_of(weight, drawn)


def test_weights_of_zero_count_like_no_weight_at_all():
    weight = torch.cat((heavy(4, 60), torch.full((4, 5), 9.0)), 1)
    weights = torch.cat((torch.ones(60), torch.zeros(5)))
    rows = SortedRows(weight, weights.expand_as(weight))

    found = rows.error(fit_codebooks(weight, 3, weights=weights, bins=None).squeeze(1).double())

    alone = SortedRows(weight[:, :60].contiguous(), torch.ones(4, 60))
    expected = alone.error(fit_codebooks(weight[:, :60], 3, bins=None).squeeze(1).double())
    assert bool((found <= expected * (1 + 1e-6)).all())
    # a part in which nothing counts still gets a table of its own weights
    nothing = fit_codebooks(weight, 3, weights=torch.zeros(65))
    assert torch.equal(nothing, fit_codebooks(weight, 3))


# ------------------------------------------------------------------ codes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_codes_are_the_nearest_entries(rows, cols, groups, bits, seed):
    torch.manual_seed(seed)
    groups = min(groups, cols)
    weight = torch.randn(rows, cols)
    codebooks = torch.randn(rows, groups, 1 << bits).sort().values

    codes = assign_codes(weight, codebooks)

    tables = codebooks[torch.arange(rows)[:, None], column_groups(cols, groups)].double()
    distances = (tables - weight.double()[..., None]).abs()
    chosen = distances.gather(2, codes.long()[..., None]).squeeze(2)
    torch.testing.assert_close(chosen, distances.amin(2), rtol=0, atol=1e-6)


def test_ties_go_to_the_lower_entry_and_the_first_of_equals():
    codebooks = torch.tensor([[[-1.0, 1.0, 3.0, 3.0]]])
    weight = torch.tensor([[0.0, 2.0, 2.0001, 3.0, 99.0, -99.0]])

    assert assign_codes(weight, codebooks).tolist() == [[0, 1, 2, 2, 3, 0]]


def test_midpoints_lie_below_the_upper_entry():
    one = torch.tensor(1.0)
    up = torch.nextafter(one, torch.tensor(2.0))
    up2 = torch.nextafter(up, torch.tensor(2.0))

    assert midpoints(torch.stack([one, up, up2])).tolist() == [1.0, up.item()]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_is_bitsandbytes_table(bits):
    weight = torch.randn(3, 64)
    table = fit_codebooks(weight, bits, method="nf4")

    assert torch.equal(table.abs().amax(2).squeeze(1), weight.abs().amax(1))
    assert bool((table == 0).any(2).all())
    if bits == 4:
        functional = pytest.importorskip("bitsandbytes.functional")
        scaled = table[:, 0] / weight.abs().amax(1, keepdim=True)
        nf4 = functional.get_4bit_type("nf4", device="cpu")
        torch.testing.assert_close(scaled, nf4.expand(3, -1), rtol=0, atol=2e-6)


def test_a_checksum_sees_every_code_and_its_place():
    codes = torch.randint(0, 16, (9, 21), dtype=torch.uint8)
    sums = {codes_checksum(codes)}
    for row, col, bit in itertools.product((0, 3, 8), (0, 7, 8, 20), (0, 3)):
        changed = codes.clone()
        changed[row, col] ^= 1 << bit
        sums.add(codes_checksum(changed))
    assert len(sums) == 1 + 3 * 4 * 2

    others = [codes.flip(0), codes.flip(1), codes.t(), codes[:8], codes[:, :20], codes.roll(1, 0)]
    assert len(sums | {codes_checksum(other) for other in others}) == len(sums) + len(others)
    assert codes_checksum(codes) == codes_checksum(codes.clone())
    assert -(2**63) <= codes_checksum(codes) < 2**63


def test_a_checksum_is_the_same_for_ever():
    """It is stored in files."""
    assert codes_checksum(torch.arange(60, dtype=torch.uint8).view(4, 15)) == -8398542716989012009


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 9}, "layer a.b: bits=9: 1 to 8"),
        ({"bits": 2, "groups": 7}, "layer a.b: groups=7: 1 to 6"),
        ({"bits": 2, "groups": 0}, "layer a.b: groups=0"),
        ({"bits": 2, "method": "best"}, "layer a.b: method='best': one of dp, lloyd"),
        ({"bits": 2, "bins": 0}, "layer a.b: bins=0"),
        ({"bits": 2, "weights": torch.ones(5)}, r"layer a.b: weights of shape \(5,\)"),
        ({"bits": 2, "weights": -torch.ones(6)}, "layer a.b: weights that are negative"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_codebooks(torch.randn(4, 6), name="a.b", **arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    weight = torch.randn(4, 6)
    weight[2, 3] = bad

    with pytest.raises(ValueError, match=r"layer a.b: 1 of 24 weights are NaN or infinite"):
        fit_codebooks(weight, 2, name="a.b")


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        fit_codebooks(torch.ones(4, 6, dtype=torch.int8), 2)
    with pytest.raises(ValueError, match="do not ascend"):
        assign_codes(torch.randn(1, 3), torch.tensor([[[1.0, 0.0]]]))
    with pytest.raises(ValueError, match=r"codebooks \(2, 1, 4\) for a weight of shape \(3, 5\)"):
        assign_codes(torch.randn(3, 5), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"codes \(3, 4\) for 9 columns at 4 bits"):
        Sketch(torch.zeros(3, 1, 16), torch.zeros(3, 4, dtype=torch.uint8), 4, 1, 9)
