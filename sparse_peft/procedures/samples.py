"""Which samples are worth another look: those that were learnt and never forgotten are not (SparCL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..constraints import Share, validated


class SampleHistory:
    """Counts how often each sample was forgotten, and tells which to keep.

    A sample is forgotten where it was learnt before and is not now (Toneva et al. 2019,
    https://arxiv.org/abs/1812.05159). SparCL (https://arxiv.org/abs/2209.09476, section 3.3) removes samples that were
    learnt and are hardly ever forgotten. Note each batch in training, and continue with the samples that are kept.

    Args:
        size: number of samples.

    Attributes:
        learnt: ``(size,)`` bool: whether it was learnt when it was last seen.
        seen: ``(size,)`` int64: how often it was seen.
        forgotten: ``(size,)`` int64: how often it was forgotten.
        loss: ``(size,)`` float32: its loss when it was last seen.

    Example:
        >>> import torch
        >>> from sparse_peft.procedures import SampleHistory
        >>> history = SampleHistory(4)
        >>> history.note(torch.tensor([0, 1, 2]), torch.tensor([True, True, False]))
        >>> history.note(torch.tensor([0, 1, 2]), torch.tensor([True, False, False]))
        >>> history.kept(0.75)  # without sample 0, which is known
        tensor([1, 2, 3])
    """

    def __init__(self, size: int):
        self.learnt = torch.zeros(size, dtype=torch.bool)
        self.seen = torch.zeros(size, dtype=torch.int64)
        self.forgotten = torch.zeros(size, dtype=torch.int64)
        self.loss = torch.full((size,), torch.inf)

    def note(self, samples: Tensor, learnt: Tensor, loss: Tensor | None = None) -> None:
        """Note what a pass showed of some samples.

        Args:
            samples: ``(n,)`` their numbers.
            learnt: ``(n,)`` bool: whether they are predicted correctly, or well enough.
            loss: ``(n,)`` their losses, which decide among equally often forgotten ones.

        Raises:
            ValueError: sizes that differ, or a number that is out of range.
        """
        samples, learnt = samples.detach().cpu(), learnt.detach().cpu()
        size = len(self.seen)
        if samples.shape != learnt.shape or not bool(((samples >= 0) & (samples < size)).all()):
            raise ValueError(
                f"samples of shape {tuple(samples.shape)} with learnt of shape {tuple(learnt.shape)}: one number from "
                f"0 to {size - 1} for each is expected"
            )
        self.forgotten[samples] += (self.learnt[samples] & ~learnt).long()
        self.learnt[samples] = learnt
        self.seen[samples] += 1
        if loss is not None:
            self.loss[samples] = loss.detach().float().cpu()

    def kept(self, share: float) -> Tensor:
        """The samples to go on with, ascending: without those that are learnt and were forgotten least.

        Samples that are not learnt, or were never seen, always stay, so that more than the share may be kept.

        Args:
            share: of all samples.

        Returns:
            ``(n,)`` int64 numbers.
        """
        share = validated("share", share, Share)
        size = len(self.seen)
        order = sorted(range(size), key=lambda i: (int(self.forgotten[i]), float(self.loss[i]), i))
        known = [number for number in order if self.learnt[number]]
        removed = torch.tensor(known[: size - round(share * size)], dtype=torch.int64)
        stays = torch.ones(size, dtype=torch.bool)
        stays[removed] = False
        return stays.nonzero().squeeze(1)

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in ("learnt", "seen", "forgotten", "loss")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``.

        Raises:
            ValueError: it is of another number of samples.
        """
        if len(state["seen"]) != len(self.seen):
            raise ValueError(f"the saved history is of {len(state['seen'])} samples, this one of {len(self.seen)}")
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
