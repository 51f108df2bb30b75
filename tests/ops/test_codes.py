"""Packed codes: every width comes back, in no more bytes than its bits take, and in the order that is documented."""

from __future__ import annotations

import pytest
import torch

from sparse_peft.ops import pack_codes, packed_width, unpack_codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("cols", [1, 2, 3, 5, 7, 8, 9, 31, 64, 101])
def test_packing_round_trip_at_odd_widths(bits, cols):
    """Oracle 2 of the sketches."""
    codes = torch.randint(0, 1 << bits, (5, cols), dtype=torch.uint8)
    codes[0], codes[1] = 0, (1 << bits) - 1

    packed = pack_codes(codes, bits)

    assert packed.shape == (5, -(-cols * bits // 8)) == (5, packed_width(cols, bits))
    assert torch.equal(unpack_codes(packed, bits, cols), codes)


def test_packed_codes_are_one_stream_of_bits_highest_first():
    assert pack_codes(torch.tensor([[0xA, 0x3, 0x7]]), 4).tolist() == [[0xA3, 0x70]]  # even columns are high halves
    assert pack_codes(torch.tensor([[0b10, 0b01, 0b11, 0b00, 0b11]]), 2).tolist() == [[0b10011100, 0b11000000]]
    assert pack_codes(torch.tensor([[0b101, 0b011, 0b110]]), 3).tolist() == [[0b10101111, 0b0 << 7]]
