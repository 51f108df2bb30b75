"""Products of routed tokens with experts' weights, against dense float64 products."""

from dataclasses import dataclass

import pytest
import torch

from sparse_peft.ops import (
    EveryExpert,
    ExpertProduct,
    OneExpert,
    Recipe,
    SortedTokens,
    TokenwiseExperts,
    expert_parts,
    expert_product,
)
from sparse_peft.support import Support

EXPERTS, ROWS, COLS = 4, 5, 7


@dataclass
class One:
    weight: torch.Tensor

    @property
    def shape(self):
        return tuple(self.weight.shape)

    def panels(self, dtype):
        for start in range(0, self.shape[0], 2):
            stop = min(start + 2, self.shape[0])
            yield start, stop, self.weight[start:stop].to(dtype)


class Source:
    experts, key = EXPERTS, 0

    def __init__(self, weight):
        self.weight, self.dtype = weight, weight.dtype

    def expert(self, number):
        return One(self.weight[number].detach())

    def whole(self, dtype):
        return self.weight.detach() if self.dtype == dtype else None

    def read(self, act, *args):
        return act(*args)

    def after_backward(self):
        pass


# A name, the routing, and the expert of each row.
ROUTINGS = {
    "one": (OneExpert(2, 6), [2] * 6),
    "none": (OneExpert(1, 0), []),
    "every": (EveryExpert(EXPERTS, 3), [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3),
    "sorted": (SortedTokens(torch.tensor([3, 3, 4, 9])), [0] * 3 + [2] + [3] * 5),
    "tokenwise": (TokenwiseExperts(torch.tensor([3, 0, 3, 2, 0])), [3, 0, 3, 2, 0]),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_and_gradients(name, in_dim, dtype):
    routing, owners = ROUTINGS[name]
    torch.manual_seed(0)
    base = torch.randn(EXPERTS, ROWS, COLS).to(dtype)
    support = Support.random((EXPERTS * ROWS, COLS), 30, seed=1, name="w")
    values = torch.randn(30, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    effective = base.double().reshape(-1).index_add(0, support.indices, values.detach().double()).to(dtype)
    x = torch.randn(len(owners), COLS if in_dim else ROWS).to(dtype).requires_grad_()
    product = ExpertProduct(Source(effective.view(base.shape)), support, routing, in_dim)
    out = expert_product(x, values, product)
    seed = torch.randn(out.shape).to(dtype)
    out.backward(seed)

    dense = effective.view(base.shape).double().requires_grad_()
    inputs = x.detach().double().requires_grad_()
    matrices = dense.transpose(1, 2) if in_dim else dense
    wanted = torch.stack([row @ matrices[owner] for row, owner in zip(inputs, owners, strict=True)] or [inputs.sum(1)])
    (wanted * (seed.double() if owners else 0)).sum().backward()
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.1}
    if owners:
        torch.testing.assert_close(out.double(), wanted, **tolerance)
        torch.testing.assert_close(x.grad.double(), inputs.grad, **tolerance)
    expected = torch.zeros_like(dense) if dense.grad is None else dense.grad
    torch.testing.assert_close(values.grad.double(), expected.reshape(-1)[support.indices.long()], **tolerance)


@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize(
    ("cols", "dtype", "calls"), [(8, torch.float32, 1), (7, torch.float32, 0), (8, torch.bfloat16, 0)]
)
def test_the_inputs_gradient_is_one_grouped_product_where_nothing_is_copied(in_dim, cols, dtype, calls):
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, cols, cols)
    seen = []

    def grouped(x, weights, offs):
        seen.append(offs)
        starts = [0, *offs.tolist()[:-1]]
        return torch.cat([x[a:b] @ w for a, b, w in zip(starts, offs.tolist(), weights, strict=True)])

    routing, owners = ROUTINGS["sorted"]
    product = ExpertProduct(Source(weight), None, routing, in_dim, grouped=grouped)
    grad = torch.randn(len(owners), cols).to(dtype)
    found = product.input_grad(grad)
    matrices = weight.double() if in_dim else weight.double().transpose(1, 2)
    wanted = torch.stack([row @ matrices[owner] for row, owner in zip(grad.double(), owners, strict=True)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    assert len(seen) == calls


def test_a_recipe_takes_the_place_of_the_activation():
    source = Source(torch.randn(EXPERTS, ROWS, COLS))
    support = Support.random((EXPERTS * ROWS, COLS), 30, seed=1, name="w")
    a, b = torch.randn(6, COLS), torch.randn(6, COLS)
    found = []
    for recipe in (None, Recipe(torch.mul, (a, b))):
        values = torch.zeros(30, requires_grad=True)
        expert_product(
            a * b, values, ExpertProduct(source, support, OneExpert(1, 6), 1), None, recipe
        ).sum().backward()
        found.append(values.grad)
    assert torch.equal(*found)
    assert found[0].any()


def test_values_of_one_expert_begin_with_its_first_entry():
    source = Source(torch.randn(EXPERTS, ROWS, COLS))
    support = Support.random((EXPERTS * ROWS, COLS), 30, seed=1, name="w")
    parts = expert_parts(support, EXPERTS)
    assert [first for _, first, _ in parts] == [0, *(last for _, _, last in parts[:-1])]
    part, first, last = parts[2]
    x = torch.randn(6, COLS)
    every, own = torch.zeros(30, requires_grad=True), torch.zeros(last - first, requires_grad=True)
    expert_product(x, every, ExpertProduct(source, support, OneExpert(2, 6), 1)).sum().backward()
    expert_product(x, own, ExpertProduct(source, support, OneExpert(2, 6), 1, first)).sum().backward()
    assert torch.equal(every.grad[first:last], own.grad)
    assert part.shape == (ROWS, COLS)
    assert expert_parts(support, EXPERTS) is parts, "made once"
