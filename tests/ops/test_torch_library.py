"""The ops as nodes of compiled graphs."""

import pytest
import torch

from sparse_peft.ops import torch_library as library
from sparse_peft.support import Support


def spread(density, size=100):
    return Support.random((size, size), round(density * size * size), seed=0, name="layer")


def cases():
    s = spread(0.1, 12)
    packed = list(s.compact().stored)
    left, right = torch.randn(5, 12), torch.randn(5, 12)
    values, entries = torch.randn(s.nnz), torch.randn(s.nnz)
    codes = torch.randint(0, 255, (3, 4), dtype=torch.uint8)
    return {
        "support_grad": (left, right, packed, 12, 12, 0),
        "masked_dw": (left, right, packed, 12, 12, 7),
        "embedding_rows": (torch.tensor([[3, 3], [0, 11]]), torch.randn(12, 12), entries, packed),
        "embedding_grad": (torch.tensor([3, 3, 0, 11, 5]), left, [s.indices], 12, 5, True, 0),
        "delta_matmul_add_": (torch.randn(5, 12), right, values, s.row_ptr, s.cols),
        "scatter_add_": (torch.randn(12, 12), s.indices, values),
        "resync_": ([torch.randn(12, 12)], [s.indices], [entries], [values]),
        "take_": ([torch.randn(12, 12)], [s.indices], [entries]),
        "restore_": ([torch.randn(12, 12)], [s.indices], [entries]),
        "code_gather": (torch.randn(3, 2, 16), codes, 4, 8, torch.float32),
        "code_scatter_add": (torch.randn(3, 8), codes, 4, 2),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name):
    torch.library.opcheck(getattr(library, name), cases()[name])
    assert getattr(torch.ops.sparse_peft, name)
