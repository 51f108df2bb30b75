"""Reading and writing entries of weights."""

import pytest
import torch

from sparse_peft.numerics import panel_limit
from sparse_peft.ops import effective_entries, read_entries, write_entries_
from sparse_peft.support import Support


def random_support(shape, density):
    k = max(1, round(density * shape[0] * shape[1]))
    return Support.random(shape, k, seed=3, name="layer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_entries_are_written_and_given_back_bit_for_bit(dtype, contiguous):
    weight = torch.randn(31, 17).to(dtype)
    weight = weight if contiguous else torch.randn(17, 31).to(dtype).t()
    before = weight.clone()
    s = random_support((31, 17), 0.2)
    originals = read_entries(weight, s.indices)
    entries = effective_entries(originals, torch.randn(s.nnz))
    with panel_limit(64):
        write_entries_(weight, s.indices, entries)
    assert torch.equal(read_entries(weight, s.indices), entries)
    assert torch.equal(weight[~s.to_mask()], before[~s.to_mask()])
    write_entries_(weight, s.indices, originals)
    assert torch.equal(weight, before)


def test_effective_entries_round_once():
    original = torch.tensor([1.0], dtype=torch.bfloat16)
    small = torch.tensor([0.0035])  # rounded to bfloat16 first, it would be added as another number
    assert effective_entries(original, small) == (original.float() + small).to(torch.bfloat16)
    assert effective_entries(original.float(), small).dtype == torch.float32
