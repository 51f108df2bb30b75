"""Order statistics of numbers that do not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Bits of the numbers that one pass distinguishes.
DIGIT = 16
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def order_statistics(chunks: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[Tensor]:
    """The numbers of given ranks, exactly and independent of the order and sizes of the chunks.

    Nonnegative floats have the order of their bits as integers. The result is found digit by digit, with one pass over
    the numbers and one histogram for each digit of 16 bits. NaNs come last.

    Args:
        chunks: returns all numbers in tensors of any shape, nonnegative float32 or float64. It is called once per pass
            and must return the same numbers each time.
        ranks: from 1 for the smallest number to the number of numbers.

    Returns:
        One 0-d tensor for each rank, in the numbers' dtype.

    Raises:
        ValueError: a rank that is out of range.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import order_statistics
        >>> chunks = [torch.tensor([5.0, 1.0]), torch.tensor([3.0])]
        >>> order_statistics(lambda: chunks, [1, 3])
        [tensor(1.), tensor(5.)]
    """
    wanted = [(0, rank) for rank in ranks]  # the digits found so far, and the rank among the numbers with these
    dtype = next(iter(chunks())).dtype
    integer = _INTEGERS[dtype]
    for shift in range(integer.itemsize * 8 - DIGIT, -1, -DIGIT):
        counts: dict[int, Tensor] = {}
        for chunk in chunks():
            bits = chunk.flatten().view(integer)
            for prefix in {prefix for prefix, _ in wanted}:
                inside = bits[bits >> (shift + DIGIT) == prefix] if shift + DIGIT < integer.itemsize * 8 else bits
                found = torch.bincount((inside >> shift).bitwise_and_(2**DIGIT - 1), minlength=2**DIGIT)
                counts[prefix] = counts[prefix] + found if prefix in counts else found
        for index, (prefix, rank) in enumerate(wanted):
            until = counts[prefix].cumsum(0)
            if not 1 <= rank <= int(until[-1]):
                raise ValueError(f"ranks={list(ranks)}: there are {int(until[-1])} numbers")
            digit = int(torch.searchsorted(until, rank))
            wanted[index] = prefix << DIGIT | digit, rank - int(until[digit] - counts[prefix][digit])
    device = until.device
    return [torch.tensor(prefix, dtype=_INTEGERS[dtype], device=device).view(dtype) for prefix, _ in wanted]
