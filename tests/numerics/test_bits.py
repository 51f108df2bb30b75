"""Booleans in bits, compared with numpy's."""

import numpy as np
import pytest
import torch

from sparse_peft.numerics import count_bits, pack_bits, panel_limit, unpack_bits


@pytest.mark.parametrize("shape", [(1, 1), (7, 8), (5, 17), (64, 33)])
def test_bits_are_numpys_and_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    with panel_limit(64):
        packed = pack_bits(mask)
        count = count_bits(packed)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1))
    assert torch.equal(unpack_bits(packed, shape[1]), mask) and count == int(mask.sum())
