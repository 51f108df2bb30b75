"""Exact, deterministic top-k: among equal scores the lowest position wins, on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this size `torch.topk` alone is as fast.
SAMPLING_MIN = 2**18
SAMPLE_SIZE = 2**16
# The sample stands for a share of the scores; above this one too little is ruled out to pay for the second look.
SAMPLING_MAX_SHARE = 0.25
# 2**64 / golden ratio: multiples of it modulo n are spread evenly and share no period with rows or columns.
_SPREAD = 0.6180339887498949


def check_scores(scores: Tensor, name: str = "") -> None:
    """Refuse scores that have no order.

    Raises:
        ValueError: not 1-D, or NaN among them.
    """
    where = f"layer {name}: " if name else ""
    if scores.ndim != 1:
        raise ValueError(f"{where}scores of shape {tuple(scores.shape)}: a 1-D tensor is expected; flatten it first")
    if scores.numel() and scores.is_floating_point() and bool(scores.amax().isnan()):
        bad = int(scores.isnan().sum())
        raise ValueError(
            f"{where}{bad} of {scores.numel()} scores are NaN and have no rank; check the weight and the data "
            "they were computed from for NaN and infinite numbers"
        )


def _best(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Sorted positions of the ``k`` best; ``torch.topk`` gives the last value taken, the ties are settled here."""
    last = torch.topk(scores, k, largest=largest, sorted=False).values
    last = last.amin() if largest else last.amax()
    better = ((scores > last) if largest else (scores < last)).nonzero().squeeze(1)
    ties = (scores == last).nonzero().squeeze(1)[: k - better.numel()]
    return torch.cat((better, ties)).sort().values


def _survivors(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Sorted positions of all scores at or above a threshold that a sample says about ``k`` of them reach."""
    n = scores.numel()
    step = max(1, int(n * _SPREAD))
    while math.gcd(step, n) != 1:
        step += 1
    sample = scores[torch.arange(SAMPLE_SIZE, device=scores.device).mul_(step).remainder_(n)]
    expected = SAMPLE_SIZE * k / n
    # four standard deviations and a few more, so that the survivors are all but never too few
    rank = min(SAMPLE_SIZE, math.ceil(expected + 4 * math.sqrt(expected)) + 8)
    threshold = torch.topk(sample, rank, largest=largest, sorted=False).values
    passed = scores >= threshold.amin() if largest else scores <= threshold.amax()
    return passed.nonzero().squeeze(1)


def topk_indices(scores: Tensor, k: int, largest: bool = True, *, name: str = "") -> Tensor:
    """Positions of the ``k`` largest (or smallest) scores, ascending. Among equal scores the lowest positions win.

    Large inputs are first cut down by a threshold taken from a sample of them; the result is the same.

    Args:
        scores: ``(n,)``; infinite scores are fine.
        k: how many, ``0 <= k <= n``.
        largest: whether large scores are the good ones.
        name: the layer's name, for error messages.

    Returns:
        ``(k,)`` int64 on the scores' device.

    Raises:
        ValueError: scores that are NaN or not 1-D, or ``k`` out of range.
    """
    check_scores(scores, name)
    n = scores.numel()
    if not 0 <= k <= n:
        where = f"layer {name}: " if name else ""
        raise ValueError(f"{where}k={k}: between 0 and {n} of {n} scores can be chosen")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if k == n:
        return torch.arange(n, device=scores.device)
    if n >= SAMPLING_MIN and k <= n * SAMPLING_MAX_SHARE:
        survivors = _survivors(scores, k, largest)
        # fewer than k: the sample was misleading. More than enough: all ties of the last value are among them.
        if survivors.numel() >= k:
            return survivors[_best(scores[survivors], k, largest)]
    return _best(scores, k, largest)


class RunningTopK:
    """The ``k`` best of a stream of scores, each with its key; among equal scores the lowest keys win.

    The result does not depend on the order or the sizes of the chunks. Memory is O(k + chunk).

    Args:
        k: how many to keep.
        largest: whether large scores are the good ones.

    Raises:
        ValueError: ``k`` is negative.
    """

    def __init__(self, k: int, largest: bool = True):
        if k < 0:
            raise ValueError(f"k={k}: at least 0 is expected")
        self.k = k
        self.largest = largest
        self._parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._waiting = 0
        self._last: Tensor | None = None

    def update(self, scores: Tensor, keys: Tensor, payload: Tensor | None = None, *, name: str = "") -> None:
        """Take in a chunk.

        Args:
            scores: ``(n,)``.
            keys: ``(n,)`` int64; no key may occur twice in the stream.
            payload: ``(n,)`` a number to carry along with each score, in every chunk or in none.
            name: the layer's name, for error messages.

        Raises:
            ValueError: NaN scores, or lengths that differ.
        """
        check_scores(scores, name)
        for field, part in (("keys", keys), ("payload", payload)):
            if part is not None and part.shape != scores.shape:
                raise ValueError(f"{field} of shape {tuple(part.shape)} for {tuple(scores.shape)} scores: one each")
        if self._parts and (payload is None) != (self._parts[0][2] is None):
            raise ValueError("payload: every chunk must have one, or none")
        if self._last is not None:
            last = self._last.to(scores.device)
            keep = (scores >= last if self.largest else scores <= last).nonzero().squeeze(1)
            scores, keys, payload = _take((scores, keys, payload), keep)
        part = _select((scores, keys, payload), self.k, self.largest)
        if self._parts:
            device = self._parts[0][0].device
            part = tuple(None if t is None else t.to(device) for t in part)
        self._parts.append(part)
        self._waiting += part[0].numel()
        # merging only once as much as the result has come in makes many small chunks cheap
        if self._waiting > 2 * self.k:
            self._merge()

    def update_block(self, scores: Tensor, first_key: int, payload: Tensor, *, name: str = "") -> None:
        """Take in a long run of scores with consecutive keys, without making a key for each.

        Args:
            scores: ``(n,)``.
            first_key: key of the first; the others follow it.
            payload: ``(n,)`` a number to carry along with each score.
            name: the layer's name, for error messages.

        Raises:
            ValueError: NaN scores.
        """
        check_scores(scores, name)
        if self._last is None:
            keep = topk_indices(scores, min(self.k, scores.numel()), self.largest, name=name)
        else:
            last = self._last.to(scores.device)
            keep = (scores >= last if self.largest else scores <= last).nonzero().squeeze(1)
        self.update(scores[keep], keep + first_key, payload[keep], name=name)

    def _merge(self) -> None:
        if not self._parts:
            return
        if len(self._parts) > 1:
            joined = tuple(
                None if column[0] is None else torch.cat(column) for column in zip(*self._parts, strict=True)
            )
            self._parts = [_select(joined, self.k, self.largest)]
        scores = self._parts[0][0]
        self._waiting = scores.numel()
        if scores.numel() == self.k and self.k:
            self._last = scores.amin() if self.largest else scores.amax()

    def result(self) -> tuple[Tensor, Tensor]:
        """``(keys, scores)`` of the best, keys ascending: ``(min(k, seen),)`` each."""
        self._merge()
        if not self._parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return self._parts[0][1], self._parts[0][0]

    def payload(self) -> Tensor | None:
        """What was carried along with the best, in the order of ``result``."""
        self._merge()
        return self._parts[0][2] if self._parts else None


def _take(part: tuple[Tensor | None, ...], positions: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if column is None else column[positions] for column in part)


def _select(part: tuple[Tensor, Tensor, Tensor | None], k: int, largest: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ``k`` best rows of ``(scores, keys, payload)``, keys ascending."""
    keys = part[1]
    if keys.numel() > 1 and bool((keys[1:] < keys[:-1]).any()):
        part = _take(part, keys.argsort())
    return _take(part, topk_indices(part[0], min(k, keys.numel()), largest))
