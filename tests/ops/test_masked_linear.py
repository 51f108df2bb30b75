"""Layers with masked weights against dense float64 autograd."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import LargestTensor
from sparse_peft.numerics import pack_bits, panel_limit
from sparse_peft.ops import MaskedPart, MaskedWeight, masked_linear
from sparse_peft.support import Support

OUT, IN, RANK, GROUP = 23, 18, 3, 4


def part_of(seed, *, scores=False, dtype=torch.float32, beta=0.3, **fields):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    support = Support.random((OUT, IN), 31, seed=seed, name="here")
    tensors = {"down": draw(RANK, IN), "up": draw(OUT, RANK), "values": draw(31), "dense": draw(OUT, IN)}
    tensors |= {"residual": draw(OUT, -(-IN // GROUP)), "log_scale": draw(OUT)}
    if scores:
        tensors |= {"score_down": draw(2, IN), "score_up": draw(OUT, 2)}
        tensors |= {"score_rows": draw(OUT), "score_cols": draw(IN)}
    mask, back = (torch.rand((OUT, IN), generator=generator) < 0.5 for _ in range(2))
    part = MaskedPart(
        tensors, pack_bits(mask), torch.tensor(beta), support=support, group=GROUP,
        **{**fields, "back_mask": pack_bits(back) if fields.get("back_mask") else None},
    )  # fmt: skip
    return part, mask.double(), back.double()


def dense_parts(parts):
    """Float64 copies of the parts' tensors, and their deltas."""
    copies = [{name: t.detach().double().requires_grad_() for name, t in part.tensors.items()} for part in parts]
    deltas = []
    for part, own in zip(parts, copies, strict=True):
        flat = torch.zeros(OUT * IN, dtype=torch.float64).scatter(0, part.support.indices.long(), own["values"])
        deltas.append(own["up"] @ own["down"] + flat.view(OUT, IN) + own["dense"])
    return copies, deltas


def straight_through(value, gradient_of):
    """``value`` in the forward pass, the gradient of ``gradient_of``."""
    return gradient_of + (value - gradient_of).detach()


def dense_weight(base, parts, masks):
    """The weight in float64, with gradients as the methods define them."""
    copies, deltas = dense_parts(parts)
    inside = base.double() + sum(
        (d for d, part in zip(deltas, parts, strict=True) if not part.outside), torch.zeros(OUT, IN).double()
    )
    flow = torch.ones(OUT, IN, dtype=torch.float64)
    for part, mask in zip(parts, masks, strict=True):
        flow = flow * (mask + float(part.beta) * (1 - mask))
    kept = flow * inside
    if parts[0].straight:
        kept = straight_through(kept, inside)
    if "score_rows" in parts[0].tensors:
        own = copies[0]
        scores = inside.abs() + own["score_up"] @ own["score_down"] + own["score_rows"][:, None] + own["score_cols"]
        kept = kept + (scores - scores.detach()) * inside.detach()  # the mask's gradient is the scores'
    scale = torch.exp(sum(own["log_scale"] for own in copies))[:, None]
    weight = straight_through(scale * (flow * inside), scale.detach() * kept + scale * (flow * inside).detach())
    for part, own, delta in zip(parts, copies, deltas, strict=True):
        weight = weight + own["residual"].repeat_interleave(GROUP, 1)[:, :IN] + (delta if part.outside else 0)
    return weight, copies


CASES = {
    "mask": [{}],
    "straight": [{"straight": True}],
    "outside": [{"outside": True}],
    "scores": [{"scores": True, "straight": True}],
    "two adapters": [{}, {"outside": True}],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_dense_weight(case, bias):
    made = [part_of(seed, **fields) for seed, fields in enumerate(CASES[case])]
    parts, masks = tuple(part for part, _, _ in made), [mask for _, mask, _ in made]
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(OUT, IN, generator=generator)
    x = torch.randn(2, 7, IN, generator=generator).requires_grad_()
    b = torch.randn(OUT, generator=generator).requires_grad_() if bias else None
    rate = torch.randn(2, 7, OUT, generator=generator)
    with panel_limit(4 * 4 * IN * 5):  # five rows
        out = masked_linear(x, b, MaskedWeight((OUT, IN), lambda i, j: base[i:j], parts))
        out.backward(rate)
    weight, copies = dense_weight(base, parts, masks)
    x64 = x.detach().double().requires_grad_()
    b64 = None if b is None else b.detach().double().requires_grad_()
    expected = F.linear(x64, weight, b64)
    expected.backward(rate.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    if bias:
        torch.testing.assert_close(b.grad.double(), b64.grad, rtol=1e-4, atol=1e-4)
    for part, own in zip(parts, copies, strict=True):
        for name, tensor in part.tensors.items():
            if part.straight and name == "log_scale":
                continue  # its gradient sees the mask, which the reference's trick hides
            torch.testing.assert_close(tensor.grad.double(), own[name].grad, rtol=2e-4, atol=2e-4, msg=name)


def test_a_second_mask_multiplies_the_outputs_gradient_alone():
    part, _, back = part_of(0, beta=0.0, back_mask=True)
    part = MaskedPart({"dense": part.tensors["dense"]}, part.mask, part.beta, back_mask=part.back_mask)
    base, x, rate = torch.randn(OUT, IN), torch.randn(5, IN).requires_grad_(), torch.randn(5, OUT)
    masked_linear(x, None, MaskedWeight((OUT, IN), lambda i, j: base[i:j], (part,))).backward(rate)
    expected = rate.double() @ ((base + part.tensors["dense"].detach()).double() * back)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_an_open_mask_is_the_dense_weight_bit_for_bit_and_a_closed_one_has_zeros():
    part, mask, _ = part_of(0)
    base = torch.randn(OUT, IN)
    for beta in (1.0, 0.0):
        bare = MaskedPart({}, part.mask, torch.tensor(beta))
        weight = MaskedWeight((OUT, IN), lambda i, j: base[i:j], (bare,)).rows([{}], 0, OUT)
        assert torch.equal(weight, base if beta else base * mask.float())


def test_no_temporary_is_larger_than_a_panel():
    size, tokens, limit = 256, 8, 64 * 1024
    down, up = torch.randn(2, size).requires_grad_(), torch.randn(size, 2).requires_grad_()
    packed = pack_bits(torch.rand(size, size) < 0.5)
    part, base = MaskedPart({"down": down, "up": up}, packed, torch.tensor(0.0)), torch.randn(size, size)
    x = torch.randn(tokens, size).requires_grad_()
    with panel_limit(limit), LargestTensor() as largest:
        masked_linear(x, None, MaskedWeight((size, size), lambda i, j: base[i:j], (part,))).sum().backward()
    assert 0 < largest.nbytes <= limit < size * size * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    part, mask, _ = part_of(0, beta=0.0)
    part = MaskedPart({n: part.tensors[n] for n in ("down", "up")}, part.mask, part.beta)
    base, x = torch.randn(OUT, IN).to(dtype), torch.randn(5, IN).to(dtype).requires_grad_()
    out = masked_linear(x, None, MaskedWeight((OUT, IN), lambda i, j: base[i:j], (part,)))
    out.sum().backward()
    low_rank = part.tensors["up"].double() @ part.tensors["down"].double()
    expected = F.linear(x.double(), ((base.double() + low_rank) * mask).to(dtype).double())
    assert out.dtype == dtype == x.grad.dtype and part.tensors["up"].grad.dtype == torch.float32
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
