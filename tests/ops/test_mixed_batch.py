"""Several adapters' entries on one batch, against dense float64 products item by item."""

import pytest
import torch

from sparse_peft.ops import BatchOrder, add_entry_deltas_, diagonal_of, suits_one_product
from sparse_peft.support import Support

OUT, IN = 7, 5
COUNTS = (9, 0, 35)  # entries of three adapters: some, none and all


def deltas(dtype):
    generator = torch.Generator().manual_seed(0)
    supports = [
        Support((OUT, IN), torch.randperm(OUT * IN, generator=generator)[:count].sort().values) for count in COUNTS
    ]
    return supports, [torch.randn(count, generator=generator).to(dtype) for count in COUNTS]


def dense(support, values):
    weight = torch.zeros(OUT * IN, dtype=torch.float64)
    weight[support.indices.long()] = values.double()
    return weight.view(OUT, IN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("users", [
    (0, 1, 2), (2, 0, 1), (0, 0, 1, 1, 2, 2), (2, 2, 2, 0, 1), (0, 1, 2, -1, 2), (-1, 2, 1, 0),
], ids=str)  # fmt: skip
def test_each_item_gets_what_its_adapter_makes_of_it(users, shape, dtype):
    supports, values = deltas(dtype)
    x = torch.randn(len(users), *shape, IN).to(dtype)
    result = torch.randn(len(users), *shape, OUT).to(dtype)
    expected = result.double()
    for item, user in enumerate(users):
        if user >= 0:
            expected[item] += x[item].double() @ dense(supports[user], values[user]).t()
    diagonal = diagonal_of(supports, values, dtype)
    assert diagonal.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    add_entry_deltas_(result, x, diagonal, BatchOrder.of(users, len(COUNTS), x.device))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_many_tokens_are_left_to_each_adapter():
    order = BatchOrder.of((0, 1, 1), 2, torch.device("cpu"))
    assert order.places == 2 and suits_one_product(order, 64) and not suits_one_product(order, 65)
