"""The product with a coded weight; numbers of oracles are those of the method's specification, section 2h."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import LargestTensor
from sparse_peft import panel_limit
from sparse_peft.ops import CodedWeight, Codes, codebook_linear, pack_codes

KINDS = ("table", "beside a base", "two tables", "scaled")


def problem(bits, groups, rows=11, cols=13, kind="table", dtype=torch.float64, seed=0):
    """``(tables, coded weight, dense weight as a function of the tables)``."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 if kind == "two tables" else 1
    group = torch.arange(cols) * groups // cols
    codes = [torch.randint(0, 1 << bits, (rows, cols), generator=generator) for _ in range(count)]
    tables = [
        torch.randn(rows, groups, 1 << bits, generator=generator).to(dtype).requires_grad_() for _ in range(count)
    ]
    base = torch.randn(rows, cols, generator=generator).to(dtype) if kind != "table" else None
    scale = torch.rand(rows, cols, generator=generator).to(dtype) if kind == "scaled" else None

    def dense(tables):
        total = 0 if base is None else base
        for table, code in zip(tables, codes, strict=True):
            total = total + table[torch.arange(rows)[:, None], group, code]
        return total if scale is None else total * scale

    coded = CodedWeight(
        (rows, cols),
        tuple(Codes(pack_codes(code, bits), bits) for code in codes),
        None if base is None else lambda start, stop: base[start:stop],
        None if scale is None else lambda panel, start: panel.mul_(scale[start : start + len(panel)]),
    )
    return tables, coded, dense, codes, group


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits, groups", [(2, 1), (3, 3), (4, 1), (4, 5)])
@pytest.mark.parametrize("limit", [2**26, 200])
@pytest.mark.parametrize("shape", [(13,), (4, 13), (2, 3, 13), (0, 13)])
def test_oracles_3_and_4_output_and_gradients_are_those_of_plain_indexing(kind, bits, groups, limit, shape):
    tables, coded, dense, _, _ = problem(bits, groups, kind=kind)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    with panel_limit(limit):
        out = codebook_linear(x, tables, bias, coded)
        up = torch.randn_like(out)
        got = torch.autograd.grad(out, [x, bias, *tables], up)
    want = F.linear(x, dense(tables), bias)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, torch.autograd.grad(want, [x, bias, *tables], up), rtol=0, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 3])
def test_oracle_3_the_gradient_is_the_dense_one_summed_by_code_without_any_error(groups):
    (table,), coded, _, (codes,), group = problem(3, groups)
    x, up = torch.randn(7, 13, dtype=torch.float64), torch.randn(7, 11, dtype=torch.float64)
    (got,) = torch.autograd.grad(codebook_linear(x, [table], None, coded), [table], up)
    weight = up.t() @ x
    want = torch.zeros(11, groups * 8, dtype=torch.float64).scatter_add_(1, group * 8 + codes, weight)
    assert torch.equal(got.flatten(1), want)
    for g in range(groups):
        torch.testing.assert_close(got[:, g].sum(1), weight[:, group == g].sum(1), rtol=0, atol=1e-12)
        used = torch.zeros(11, 8, dtype=torch.bool).scatter_(1, codes[:, group == g], True)
        assert bool((got[:, g][~used] == 0).all()) and not bool(used.all())


def test_oracle_4_bit_for_bit_in_float32():
    (table,), coded, dense, _, _ = problem(4, 2, 64, 96, dtype=torch.float32)
    x, bias = torch.randn(3, 5, 96), torch.randn(64)
    assert torch.equal(codebook_linear(x, [table], bias, coded), F.linear(x, dense([table]), bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_gradients_in_float32(dtype):
    (table,), coded, dense, _, _ = problem(2, 1, 8, 4096, dtype=torch.float32)
    x, up = torch.randn(64, 4096).to(dtype), torch.randn(64, 8).to(dtype)
    out = codebook_linear(x, [table], None, coded)
    assert out.dtype == dtype
    torch.testing.assert_close(out, F.linear(x, dense([table]).to(dtype)))
    (got,) = torch.autograd.grad(out, [table], up)
    (want,) = torch.autograd.grad(F.linear(x.double(), dense([table]).double()), [table], up.double())
    assert got.dtype == torch.float32  # 1,024 weights an entry: half precision would be off by percents
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_oracle_14_nothing_larger_than_a_panel_whatever_the_batch():
    rows, cols, limit = 512, 256, 32 * 1024
    (table,), coded, _, _, _ = problem(2, 1, rows, cols, dtype=torch.float32)
    found = {}
    for batch in (1, 16):
        x = torch.randn(batch, 2, cols, requires_grad=True)
        with panel_limit(limit), LargestTensor() as largest:
            codebook_linear(x, [table], None, coded).sum().backward()
        found[batch] = largest.nbytes
        assert 0 < largest.nbytes <= max(limit, batch * 2 * rows * 4)
    assert found[16] == 16 * 2 * rows * 4 < rows * cols * 4  # activations, which a batch has to have


def test_only_input_and_tables_are_saved():
    (table,), coded, _, _, _ = problem(4, 1, 512, 256, dtype=torch.float32)
    x, kept = torch.randn(4, 256), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = codebook_linear(x, [table], None, coded)
    assert {t.data_ptr() for t in kept} <= {x.data_ptr(), table.data_ptr()} and kept
    out.sum().backward()


def test_a_step_between_forward_and_backward_is_noticed():
    (table,), coded, _, _, _ = problem(4, 1)
    out = codebook_linear(torch.randn(2, 13, dtype=torch.float64), [table], None, coded)
    with torch.no_grad():
        table += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
