"""Products with experts as compiled graphs have them, called outside of a graph, against dense float64 products."""

import pytest
import torch

from benchmarks.measure import LargestTensor
from sparse_peft.numerics import panel_limit
from sparse_peft.ops import EveryExpert, SortedTokens, TokenwiseExperts, functional_experts, remember
from sparse_peft.support import ChannelSupport, ExpertColumns, Support

EXPERTS, ROWS, COLS = 8, 24, 40
SHAPE = EXPERTS * ROWS, COLS
SUPPORTS = {
    "entries": lambda: Support.random(SHAPE, 150, seed=1, name="w"),
    "rows": lambda: ChannelSupport(SHAPE, 0, torch.tensor([0, 3, 30, 31, 190])),
    "columns": lambda: ExpertColumns(SHAPE, EXPERTS, torch.tensor([1, 2, 79, 200])),
}
# A routing, and the expert of each row; some experts get none.
ROUTINGS = {
    "sorted": (SortedTokens(torch.tensor([2, 2, 5, 5, 5, 9, 9, 12])), [0] * 2 + [2] * 3 + [5] * 4 + [7] * 3),
    "tokenwise": (TokenwiseExperts(torch.tensor([7, 0, 3, 3, 6])), [7, 0, 3, 3, 6]),
    "every": (EveryExpert(EXPERTS, 2), [expert for expert in range(EXPERTS) for _ in range(2)]),
}


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("held", [True, False])
def test_results_gradients_and_temporaries(kind, routing, in_dim, held):
    torch.manual_seed(0)
    route, owners = ROUTINGS[routing]
    base, support = torch.randn(EXPERTS, ROWS, COLS, dtype=torch.float64), SUPPORTS[kind]()
    if held:
        remember(support)  # else it is made from its positions
    places = support.indices.long()
    values = torch.randn(support.nnz, dtype=torch.float64, requires_grad=True)
    x = torch.randn(len(owners), COLS if in_dim else ROWS, dtype=torch.float64, requires_grad=True)
    originals = base.reshape(-1)[places]
    dense = base.reshape(-1).index_add(0, places, values.detach()).view(base.shape).requires_grad_()
    weight = dense.detach().clone() if held else base.clone()
    before, limit = weight.clone(), base.nbytes // EXPERTS
    with panel_limit(limit // 2), LargestTensor() as largest:
        out = functional_experts(x, values, weight, originals, support, route, in_dim, key=0)
        out.square().sum().backward()
    assert 0 < largest.nbytes <= limit
    assert torch.equal(weight, before)

    inputs, matrices = x.detach().requires_grad_(), dense.transpose(1, 2) if in_dim else dense
    wanted = torch.stack([row @ matrices[owner] for row, owner in zip(inputs, owners, strict=True)])
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(x.grad, inputs.grad)
    torch.testing.assert_close(values.grad, dense.grad.reshape(-1)[places])
