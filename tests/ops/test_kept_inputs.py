"""What is kept of a layer's input, against the input."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_peft.ops import kept_inputs
from sparse_peft.ops.kept_inputs import BLOCK, cast_once, keep_input
from tests.helpers.versions import forms_inputs_again


def restored(kept):
    return kept.restore(*kept.tensors)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def norm(x, weight, eps=1e-6):
    """Llama's."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


MADE = {
    "norm": lambda x: norm(x, torch.randn(x.shape[-1], dtype=x.dtype)),
    "trained norm": lambda x: norm(x, leaf(x.shape[-1], dtype=x.dtype)),
    "gate": lambda x: nn.functional.silu(x) * (x + 1),
    "all of it": lambda x: (x * x.flip(0))[:, slice(0, None)],
    "cast": lambda x: (x * x.flip(0)).to(torch.float64),
    "of two dtypes": lambda x: x * x.detach().double().requires_grad_(),
}


@forms_inputs_again
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", MADE)
def test_products_of_kept_tensors_are_formed_again_bit_for_bit(made, dtype):
    x = MADE[made](leaf(3, 5, 7, dtype=dtype))
    for computing in (x.dtype, torch.bfloat16):
        kept = keep_input(x, cast_once(x, computing), "int8")
        assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept.tensors)
        again = restored(kept)
        assert again.dtype == computing and torch.equal(again, x.detach().to(computing))


@pytest.mark.parametrize("compression", [None, "bf16", "int8"])
@pytest.mark.parametrize(
    "made", [*(pytest.param(made, marks=forms_inputs_again) for made in ("gate", "cast")), "a sum"]
)
def test_what_restores_an_input_keeps_neither_it_nor_what_it_is_made_from(made, compression):
    x = {**MADE, **KEPT}[made](leaf(3, 5, 7))
    computed = cast_once(x, torch.float32)
    kept = keep_input(x, computed, compression)
    known = [weakref.ref(tensor) for tensor in (x, computed, *kept.tensors)]
    restore, is_itself = kept.restore, any(tensor is x for tensor in kept.tensors)
    if is_itself:
        assert made == "a sum" and compression is None
    del x, computed, kept
    gc.collect()
    assert not any(reference() is not None for reference in known) and callable(restore)


KEPT = {
    "a leaf": lambda x: x,
    "a sum": lambda x: x + 1,
    "with a number": lambda x: x * 2.5,
    "a part": lambda x: (x * x)[:, 1:],
    "of a frozen tensor": lambda x: (x.detach() * x.detach()).requires_grad_(),
    "of an unkept tensor": lambda x: torch.ones(7) * (x + 1),
    "overwritten since": lambda x: _overwritten(x),
    "changed in place since": lambda x: _changed(x * x.sin()),
}


def _changed(product):
    with torch.no_grad():
        product.clamp_(max=0.1)
    return product


def _overwritten(x):
    factor = x + 0
    product = factor * x
    with torch.no_grad():
        factor.mul_(2)
    return product


@pytest.mark.parametrize("made", KEPT)
def test_everything_else_is_kept_itself(made):
    x = KEPT[made](leaf(3, 7))
    (tensor,) = keep_input(x, x, None).tensors
    assert tensor is x


@forms_inputs_again
def test_where_saved_tensors_are_packed_the_input_is_kept():
    """Looking at them would bring offloaded tensors back."""
    x = leaf(3, 7)
    with torch.autograd.graph.save_on_cpu():
        product = x * x.sin()
        assert keep_input(product, product, None).tensors[0] is product


class Keeps(torch.autograd.Function):
    """The identity, which notes the input that backward restores."""

    @staticmethod
    def forward(ctx, x, compression, log):
        kept = keep_input(x, x, compression)
        ctx.restore, ctx.log = kept.restore, log
        ctx.save_for_backward(*kept.tensors)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append(ctx.restore(*ctx.saved_tensors))
        return grad, None, None


@pytest.mark.parametrize("made", [name for name in {**MADE, **KEPT} if "since" not in name])
@pytest.mark.parametrize("times", [1, 2])
def test_a_checkpointed_block_restores_every_input(made, times):
    """Also its own input, which a node made outside of the block in the first pass and none in the second."""
    log, x = [], leaf(3, 5, 7)
    outside = x * x.sin()

    def block(outside):
        inside = {**MADE, **KEPT}[made](outside)
        return Keeps.apply(outside, None, log).sum() + Keeps.apply(inside, None, log).double().sum()

    total = checkpoint(block, outside, use_reentrant=False)
    torch.manual_seed(1)
    for number in range(times):
        log.clear()
        total.backward(retain_graph=number + 1 < times)
        assert any(torch.equal(one, outside) for one in log) and len(log) == 2
    assert not kept_inputs._noted


@forms_inputs_again
def test_a_checkpointed_block_keeps_the_factors_of_a_product_and_not_the_product(monkeypatch):
    kept, log = [], []
    note = kept_inputs._note
    monkeypatch.setattr(kept_inputs, "_note", lambda each: kept.append(each) or note(each))

    def block(x, compression):
        return Keeps.apply(x * x.sin(), compression, log).sum() + Keeps.apply(x + 1, compression, log).sum()

    x = leaf(3, 7)
    for compression, of_sum in ((None, torch.float32), ("int8", torch.int8)):
        checkpoint(block, x, compression, use_reentrant=False).backward()
        assert [len(each.tensors) for each in kept] == [2, 1 if compression is None else 2]
        assert torch.equal(kept[0].tensors[0], x) and kept[1].tensors[0].dtype == of_sum
        assert torch.equal(log[1], x * x.sin())
        kept.clear()
        log.clear()


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    def fail(grad):
        raise RuntimeError("no memory")

    def block(x):
        inner = x * x.sin()
        inner.register_hook(fail)
        return Keeps.apply(Keeps.apply(inner, None, []) * inner, None, []).sin().sum()

    total = checkpoint(block, leaf(3, 7), use_reentrant=False)
    with pytest.raises(RuntimeError, match="no memory"):
        total.backward()
    del total
    gc.collect()
    assert not kept_inputs._noted


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, BLOCK), (5, 2 * BLOCK + 3), (0, 9), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_int8_is_off_by_less_than_a_step_of_its_block(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    kept = keep_input(x, x, "int8")
    again, rows = restored(kept), x.reshape(-1, shape[-1])
    assert again.shape == x.shape and again.dtype == dtype
    step = torch.cat(
        [part.double().abs().amax(-1, keepdim=True).expand_as(part) / 127 for part in rows.split(BLOCK, -1)], -1
    )
    rounding = torch.finfo(dtype).eps * rows.double().abs()
    assert ((again.double().view_as(rows) - rows.double()).abs() <= step * 1.001 + rounding).all()
    codes, scales = kept.tensors
    width = min(BLOCK, shape[-1])
    assert codes.dtype == torch.int8 and codes.numel() == rows.shape[0] * -(-shape[-1] // width) * width
    assert scales.numel() == codes.numel() // width


@pytest.mark.parametrize("compression", ["int8", "bf16"])
def test_rounding_has_the_input_as_its_mean(compression):
    torch.manual_seed(0)
    x, draws = torch.randn(3, 70), 4000
    total = sum(restored(keep_input(x, x, compression)).double() for _ in range(draws))
    step = x.abs().amax(-1, keepdim=True) / 127 if compression == "int8" else x.abs() * 2**-7
    # a rounded number's deviation is at most half a step
    assert ((total / draws - x).abs() <= 5 * 0.5 * step / draws**0.5 + 1e-7).all()


def test_bfloat16_rounds_to_a_neighbour():
    x = torch.randn(50, 60)
    (kept,) = keep_input(x, x, "bf16").tensors
    assert kept.dtype == torch.bfloat16
    assert ((kept.float() - x).abs() < x.abs() * 2**-7).all()
    narrow = x.half()
    assert keep_input(narrow, narrow, "bf16").tensors[0] is narrow
    exact = torch.tensor([0.0, 1.0, -2.5, torch.inf])
    assert torch.equal(restored(keep_input(exact, exact, "bf16")), exact)


def test_a_zero_row_stays_zero():
    x = torch.zeros(2, 5)
    assert torch.equal(restored(keep_input(x, x, "int8")), x)


def test_one_cast_for_layers_of_one_input():
    x = leaf(3, 7)
    first = cast_once(x, torch.bfloat16)
    assert cast_once(x, torch.bfloat16) is first and not first.requires_grad
    assert cast_once(x, torch.float64).dtype == torch.float64
    again = cast_once(x, torch.bfloat16)
    with torch.no_grad():
        x.add_(1)
    changed = cast_once(x, torch.bfloat16)
    assert changed is not again and torch.equal(changed, x.detach().bfloat16())
    other = x.detach().clone()
    assert cast_once(other, torch.bfloat16) is not changed
    assert cast_once(x, torch.float32) is x
