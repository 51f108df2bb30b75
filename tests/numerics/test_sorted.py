"""Membership in sorted vectors."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_peft.numerics import among

NUMBERS = st.lists(st.integers(-20, 20), max_size=30)


@given(NUMBERS, NUMBERS, st.sampled_from([torch.int32, torch.int64]))
def test_numbers_among_sorted_ones(numbers, others, dtype):
    found = among(torch.tensor(numbers, dtype=dtype), torch.tensor(sorted(others), dtype=dtype))
    assert found.dtype == torch.bool
    assert found.tolist() == [number in others for number in numbers]
