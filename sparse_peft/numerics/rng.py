"""Random positions and numbers from a seed and a name: equal on every rank, device and library version.

A keyed permutation of ``range(n)`` is evaluated at ``0 .. k-1``. It is a balanced Feistel network (Luby and Rackoff,
1988) over the smallest even number of bits that holds ``n``, made a permutation of ``range(n)`` by cycle walking
(Black and Rogaway, 2002), with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014) as its round function.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
import torch

from ..constraints import CountOrZero, Limits, validated

ROUNDS = 8
MAX_BITS = 62
AnyInt = Annotated[int, Limits(finite=False)]
RangeSize = Annotated[int, Limits(least=0, most=2**MAX_BITS)]

# Positions per block; the temporaries of a block stay in the processor's cache.
_BLOCK = 2**16


def _round_keys(seed: int, name: str) -> np.ndarray:
    """``(ROUNDS,)`` 64-bit keys. A zero byte separates seed and name, so that no two pairs collide."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """One permutation of ``range(4**half)``, element by element."""
    mask = np.uint64((1 << half) - 1)
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return left << np.uint64(half) | right


def _permute(x: np.ndarray, n: int, half: int, keys: np.ndarray) -> np.ndarray:
    """One permutation of ``range(n)``: values outside the range are permuted again until they are inside."""
    x = _feistel(x, half, keys)
    outside = np.flatnonzero(x >= n)
    while outside.size:
        x[outside] = _feistel(x[outside], half, keys)
        outside = outside[x[outside] >= n]
    return x


def sample_without_replacement(n: int, k: int, *, seed: int, name: str) -> torch.Tensor:
    """``k`` different numbers of ``range(n)``, sorted, determined by ``seed`` and ``name``.

    Memory and time grow with ``k``, not with ``n``. No global random state is read or changed.

    Args:
        n: size of the range, at most 2**62.
        k: number of draws, ``0 <= k <= n``.
        seed: any int.
        name: the layer's name, so that layers of equal shape draw different positions.

    Returns:
        ``(k,)`` int64 on the CPU.

    Raises:
        TypeError: ``n``, ``k`` or ``seed`` is not an int.
        ValueError: ``n`` or ``k`` is out of range.

    Example:
        >>> from sparse_peft.numerics import sample_without_replacement
        >>> sample = sample_without_replacement(1000, 5, seed=0, name="layer")
        >>> len(set(sample.tolist())), bool((sample.diff() > 0).all())
        (5, True)
    """
    n = validated(f"layer {name}: n", n, RangeSize)
    k = validated(f"layer {name}: k", k, CountOrZero)
    seed = validated(f"layer {name}: seed", seed, AnyInt)
    if k > n:
        raise ValueError(f"layer {name}: k={k}: between 0 and n={n} different positions can be drawn")
    if k > n // 2:
        # draw the smaller part, which is left out
        chosen = np.ones(n, dtype=bool)
        chosen[sample_without_replacement(n, n - k, seed=seed, name=name).numpy()] = False
        return torch.from_numpy(np.flatnonzero(chosen))
    keys = _round_keys(seed, name)
    half = max(1, -(-max(0, n - 1).bit_length() // 2))
    drawn = np.empty(k, dtype=np.int64)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        drawn[start:stop] = _permute(np.arange(start, stop, dtype=np.uint64), n, half, keys)
    drawn.sort()
    return torch.from_numpy(drawn)


def uniform(n: int, *, seed: int, name: str) -> torch.Tensor:
    """``n`` uniform numbers in [-1, 1), determined by ``seed`` and ``name``.

    They are the output of SplitMix64 at the counters ``0 .. n-1``, from a start given by the name and the seed.

    Args:
        n: number of draws.
        seed: any int.
        name: the layer's name.

    Returns:
        ``(n,)`` float32 on the CPU, multiples of 2**-23.

    Example:
        >>> from sparse_peft.numerics import uniform
        >>> numbers = uniform(1000, seed=0, name="layer")
        >>> numbers.dtype, bool((numbers.abs() <= 1).all())
        (torch.float32, True)
    """
    start, *_ = _round_keys(seed, name)
    counters = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    drawn = (_mix(counters) >> np.uint64(40)).astype(np.float32)
    return torch.from_numpy(drawn * np.float32(2.0**-23) - np.float32(1))
