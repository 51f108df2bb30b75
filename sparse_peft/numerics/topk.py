"""Exact, deterministic top-k: among equal scores the lowest position wins, on every device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import layer_prefix

# Below this size `torch.topk` alone is as fast.
SAMPLING_MIN = 2**18
SAMPLE_SIZE = 2**16
# Largest share of the scores to choose by sampling; above it, the threshold excludes too few scores to save time.
SAMPLING_MAX_SHARE = 0.25
# 1 / golden ratio: multiples of it modulo n are spread evenly, without the period of rows or columns.
_SPREAD = 0.6180339887498949


def check_scores(scores: Tensor, name: str = "") -> None:
    """Check that scores can be ordered.

    Raises:
        ValueError: scores that are NaN or not 1-D.
    """
    where = layer_prefix(name)
    if scores.ndim != 1:
        raise ValueError(f"{where}scores of shape {tuple(scores.shape)}: a 1-D tensor is expected; flatten it first")
    if scores.numel() and scores.is_floating_point() and bool(scores.amax().isnan()):
        bad = int(scores.isnan().sum())
        raise ValueError(
            f"{where}{bad} of {scores.numel()} scores are NaN and have no rank; check the weight and the data "
            "they were computed from for NaN and infinite numbers"
        )


def _best(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Sorted positions of the ``k`` best: ``torch.topk`` finds the last value, and ties go to the lowest positions."""
    last = torch.topk(scores, k, largest=largest, sorted=False).values
    last = last.amin() if largest else last.amax()
    better = ((scores > last) if largest else (scores < last)).nonzero().squeeze(1)
    ties = (scores == last).nonzero().squeeze(1)[: k - better.numel()]
    return torch.cat((better, ties)).sort().values


def _survivors(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Sorted positions of the scores at or above a threshold; by a sample, slightly more than ``k`` reach it."""
    n = scores.numel()
    step = max(1, int(n * _SPREAD))
    while math.gcd(step, n) != 1:
        step += 1
    sample = scores[torch.arange(SAMPLE_SIZE, device=scores.device).mul_(step).remainder_(n)]
    expected = SAMPLE_SIZE * k / n
    # four standard deviations more than expected: too few survivors are very rare
    rank = min(SAMPLE_SIZE, math.ceil(expected + 4 * math.sqrt(expected)) + 8)
    threshold = torch.topk(sample, rank, largest=largest, sorted=False).values
    passed = scores >= threshold.amin() if largest else scores <= threshold.amax()
    return passed.nonzero().squeeze(1)


def topk_indices(scores: Tensor, k: int, largest: bool = True, *, name: str = "") -> Tensor:
    """Positions of the ``k`` largest (or smallest) scores, ascending; among equal scores the lowest positions win.

    Large inputs are reduced first, by a threshold from a sample; the result is the same.

    Args:
        scores: ``(n,)``; may be infinite.
        k: number of positions, ``0 <= k <= n``.
        largest: whether the largest scores are the best.
        name: the layer's name, for error messages.

    Returns:
        ``(k,)`` int64 on the scores' device.

    Raises:
        ValueError: scores that are NaN or not 1-D, or ``k`` out of range.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import topk_indices
        >>> topk_indices(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2)
        tensor([0, 2])
    """
    check_scores(scores, name)
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"{layer_prefix(name)}k={k}: between 0 and {n} of {n} scores can be chosen")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if k == n:
        return torch.arange(n, device=scores.device)
    if n >= SAMPLING_MIN and k <= n * SAMPLING_MAX_SHARE:
        survivors = _survivors(scores, k, largest)
        # with fewer than k, the sample was unlucky; otherwise all ties of the last value are among the survivors
        if survivors.numel() >= k:
            return survivors[_best(scores[survivors], k, largest)]
    return _best(scores, k, largest)


class _Part(NamedTuple):
    """Some scores of a stream, with ascending keys.

    Attributes:
        scores: ``(n,)``.
        keys: ``(n,)`` int64.
        payload: ``(n,)`` numbers carried along; None for none.
    """

    scores: Tensor
    keys: Tensor
    payload: Tensor | None

    def take(self, positions: Tensor) -> _Part:
        payload = None if self.payload is None else self.payload[positions]
        return _Part(self.scores[positions], self.keys[positions], payload)

    def to(self, device: torch.device) -> _Part:
        payload = None if self.payload is None else self.payload.to(device)
        return _Part(self.scores.to(device), self.keys.to(device), payload)

    def best(self, k: int, largest: bool) -> _Part:
        """The ``k`` best, keys ascending."""
        part, keys = self, self.keys
        if keys.numel() > 1 and bool((keys[1:] < keys[:-1]).any()):
            part = self.take(keys.argsort())
        return part.take(topk_indices(part.scores, min(k, keys.numel()), largest))

    @staticmethod
    def join(parts: list[_Part]) -> _Part:
        payloads = [part.payload for part in parts if part.payload is not None]
        return _Part(
            torch.cat([part.scores for part in parts]),
            torch.cat([part.keys for part in parts]),
            torch.cat(payloads) if payloads else None,
        )


class RunningTopK:
    """The ``k`` best of a stream of scores, each with its key; among equal scores the lowest keys win.

    The result does not depend on the order or the sizes of the chunks. Memory is O(k + chunk).

    Args:
        k: number of scores to keep.
        largest: whether the largest scores are the best.

    Raises:
        ValueError: ``k`` is negative.
    """

    def __init__(self, k: int, largest: bool = True) -> None:
        if k < 0:
            raise ValueError(f"k={k}: at least 0 is expected")
        self.k = k
        self.largest = largest
        self._parts: list[_Part] = []
        self._waiting = 0
        self._last: Tensor | None = None

    def update(self, scores: Tensor, keys: Tensor, payload: Tensor | None = None, *, name: str = "") -> None:
        """Take in a chunk.

        Args:
            scores: ``(n,)``.
            keys: ``(n,)`` int64; unique in the stream.
            payload: ``(n,)`` numbers to carry along, in every chunk or in none.
            name: the layer's name, for error messages.

        Raises:
            ValueError: NaN scores, or lengths that differ.
        """
        check_scores(scores, name)
        for field, tensor in (("keys", keys), ("payload", payload)):
            if tensor is not None and tensor.shape != scores.shape:
                raise ValueError(f"{field} of shape {tuple(tensor.shape)} for {tuple(scores.shape)} scores: one each")
        if self._parts and (payload is None) != (self._parts[0].payload is None):
            raise ValueError("payload: every chunk must have one, or none")
        part = _Part(scores, keys, payload)
        if self._last is not None:
            part = part.take(self._candidates(scores, self._last))
        part = part.best(self.k, self.largest)
        self._parts.append(part.to(self._parts[0].scores.device) if self._parts else part)
        self._waiting += part.scores.numel()
        # many small chunks are cheap: they are merged once they add up to the size of the result
        if self._waiting > 2 * self.k:
            self._merge()

    def update_block(self, scores: Tensor, first_key: int, payload: Tensor, *, name: str = "") -> None:
        """Take in a long chunk with consecutive keys, without a tensor of all its keys.

        Args:
            scores: ``(n,)``.
            first_key: of the first score; the others follow.
            payload: ``(n,)`` numbers to carry along.
            name: the layer's name, for error messages.

        Raises:
            ValueError: NaN scores.
        """
        check_scores(scores, name)
        if self._last is None:
            keep = topk_indices(scores, min(self.k, scores.numel()), self.largest, name=name)
        else:
            keep = self._candidates(scores, self._last)
        self.update(scores[keep], keep + first_key, payload[keep], name=name)

    def _candidates(self, scores: Tensor, last: Tensor) -> Tensor:
        """Positions of scores that may be among the best, given the last of the best so far."""
        last = last.to(scores.device)
        return (scores >= last if self.largest else scores <= last).nonzero().squeeze(1)

    def _merge(self) -> _Part:
        if not self._parts:
            return _Part(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0))
        if len(self._parts) > 1:
            self._parts = [_Part.join(self._parts).best(self.k, self.largest)]
        scores = self._parts[0].scores
        self._waiting = scores.numel()
        if scores.numel() == self.k and self.k:
            self._last = scores.amin() if self.largest else scores.amax()
        return self._parts[0]

    def result(self) -> tuple[Tensor, Tensor]:
        """``(keys, scores)`` of the best, keys ascending: ``(min(k, seen),)`` each."""
        best = self._merge()
        return best.keys, best.scores

    def payload(self) -> Tensor:
        """``(min(k, seen),)`` numbers carried along with the best, in the order of ``result``.

        Raises:
            ValueError: the chunks had no payload.
        """
        payload = self._merge().payload
        if payload is None:
            raise ValueError("payload: the chunks had none; pass it to update")
        return payload
