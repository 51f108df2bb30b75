"""Gradients of one layer at candidate positions, summed over the optimizer steps of a window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dynamics.collectives import Collectives
from ...dynamics.optimizer_state import ObservedMoments
from ...numerics import topk_indices
from ...ops import Factor, expert_parts, masked_dw, support_grad
from ...support import Support


class CandidateWindow:
    """Observes one layer's backward passes; see ``sparse_peft.ops.observe``.

    In the first step every backward pass proposes candidates: it computes the dense gradient a panel at a time and
    keeps the positions with the largest sums. From the second step on, the gradient at these positions is computed
    together with the support's own. Sums are float32, over whole optimizer steps; squares are taken per step.

    A position that a later backward pass of the first step proposed may lack gradients of the earlier passes. That
    step does not count for it, unless it is the window's only one.

    Args:
        support: the adapter's trained positions.
        limit: number of candidates.
        length: number of steps in the window.
    """

    def __init__(self, support: Support, limit: int, length: int):
        rows, cols = support.shape
        self.support, self.length = support, length
        self.limit = min(limit, rows * cols - support.nnz)
        device = support.device
        self.steps = 0
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self.late = torch.empty(0, dtype=torch.bool, device=device)
        self.total = torch.empty(0, device=device)
        self.squares = torch.empty(0, device=device)
        self.own_total = torch.zeros(support.nnz, device=device)
        self._begin_step()

    def _begin_step(self) -> None:
        if self.steps == 0:
            self.positions, self.late = self.positions[:0], self.late[:0]
        self.partial = torch.zeros(self.positions.numel(), device=self.positions.device)
        self.own = torch.zeros(self.support.nnz, device=self.support.device)
        self._rejected = False  # whether any position with a gradient was not kept in this step
        self._joint: tuple[Support, Support, Tensor, Tensor] | None = None

    @property
    def observers(self) -> list[CandidateWindow]:
        """The observer of the layer's one matrix."""
        return [self]

    # ------------------------------------------------------------------ during the backward pass

    def support_grad(self, left: Factor, right: Tensor, active: Support) -> Tensor:
        """The gradient at the active adapters' support, as ``support_grad``; adds the candidates' to the sums."""
        if left.shape[0] == 0:
            return support_grad(left, right, active)
        compute = self._propose if self.steps == 0 else self._follow
        values = compute(left, right, active)
        self.own += values[self._slots(active)].to(torch.float32)
        return values

    def _slots(self, active: Support) -> Tensor | slice:
        """The slots of the adapter's entries among those of all active adapters."""
        return slice(None) if active.nnz == self.support.nnz else active.slots(self.support.indices)

    def _propose(self, left: Factor, right: Tensor, active: Support) -> Tensor:
        rows, cols = active.shape
        watched = Support(active.shape, self.positions, validate=False)
        joint, (own, theirs) = active.union(watched)
        limit = min(self.limit, rows * cols - joint.nnz)
        gradient, positions, sums = masked_dw(left, right, joint, limit)
        found = gradient[theirs].to(torch.float32)
        if sums.numel() and bool(sums[0].isnan()):
            # numbers that are not finite discard the whole step
            self.own.fill_(torch.nan)
        nonzero = sums.abs() > 0
        self._merge(positions[nonzero], sums[nonzero].to(torch.float32), found)
        full = int(nonzero.sum()) == self.limit
        self._rejected |= full and self.limit < rows * cols - active.nnz
        return gradient[own]

    def _merge(self, positions: Tensor, sums: Tensor, found: Tensor) -> None:
        """Keep the largest absolute sums of new and earlier candidates."""
        late = torch.full_like(positions, self._rejected, dtype=torch.bool)
        joined = torch.cat((self.positions, positions)).sort()
        sums = torch.cat((self.partial + found, sums))[joined.indices]
        late = torch.cat((self.late, late))[joined.indices]
        self._keep(joined.values, sums, late)

    def _keep(self, positions: Tensor, sums: Tensor, late: Tensor) -> None:
        self._rejected |= sums.numel() > self.limit
        magnitude = sums.abs().nan_to_num_(torch.inf)
        keep = topk_indices(magnitude, min(self.limit, magnitude.numel()))
        self.positions, self.partial, self.late = positions[keep], sums[keep], late[keep]

    def _follow(self, left: Factor, right: Tensor, active: Support) -> Tensor:
        if self._joint is None or self._joint[0] is not active:
            candidates = Support(active.shape, self.positions, validate=False)
            joint, (own, theirs) = active.union(candidates)
            self._joint = active, joint, own, theirs
        _, joint, own, theirs = self._joint
        gradient = support_grad(left, right, joint)
        self.partial += gradient[theirs].to(torch.float32)
        return gradient[own]

    # ------------------------------------------------------------------ at the end of an optimizer step

    def reduce(self, collectives: Collectives) -> None:
        """Average this step's sums over the processes, which then have the same candidates."""
        if collectives.alone:
            return
        self.own = collectives.mean(self.own)
        if self.steps:
            self.partial = collectives.mean(self.partial)
            return
        parts = collectives.gather_ragged(self.positions, self.partial, self.late)
        rejected = collectives.gather_ragged(self.positions.new_tensor([self._rejected]))
        union = torch.cat([positions for positions, _, _ in parts]).unique(sorted=True)
        sums = torch.zeros(union.numel(), device=union.device)
        seen = torch.zeros(union.numel(), dtype=torch.int32, device=union.device)
        for (positions, partial, late), (others_lost,) in zip(parts, rejected, strict=True):
            slots = torch.searchsorted(union, positions)
            sums[slots] += partial
            whole = (1 - others_lost.int()).expand_as(seen).clone()
            whole[slots] = (~late).int()
            seen += whole
        self._keep(union, sums / len(parts), seen < len(parts))

    def is_finite(self) -> Tensor:
        """Whether this step's sums are finite: a bool tensor with one number."""
        return self.partial.isfinite().all() & self.own.isfinite().all()

    def commit(self, factor: float, gradient: Tensor) -> None:
        """Add this step to the window's sums.

        Args:
            factor: the optimizer's gradient relative to that of backward: one over a loss scale, times a clipping
                coefficient.
            gradient: ``(entries,)`` the optimizer's gradient of the trained entries.
        """
        step = self.partial * factor
        if self.steps == 0:
            if self.length == 1:
                self.late.zero_()
            step = step.masked_fill(self.late, 0)
            self.total, self.squares = step, step.square()
        else:
            self.total = self.total + step
            self.squares = self.squares + step.square()
        self.own_total += gradient
        self.steps += 1
        self._begin_step()

    def discard(self) -> None:
        """Forget this step."""
        self._begin_step()

    def counts(self) -> Tensor:
        """``(candidates,)`` number of steps in each candidate's sums."""
        return self.steps - self.late.to(torch.float32)

    # ------------------------------------------------------------------ at the end of the window

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates with a gradient, and the mean absolute gradients.

        Returns:
            ``(candidates,)`` positions, ascending, their scores, and ``(entries,)`` scores of the trained entries.
        """
        scores = (self.total / self.counts().clamp(min=1)).abs()
        seen = scores > 0
        return self.positions[seen].long(), scores[seen], (self.own_total / self.steps).abs()

    def moments_of(self, support: Support, is_new: Tensor) -> ObservedMoments | None:
        """The observed gradients of new entries; zeros for others, None without any candidate.

        Args:
            support: the positions after an exchange.
            is_new: ``(entries,)`` bool, whether an entry is new.
        """
        if self.positions.numel() == 0:
            return None
        # looked up by position: entries that were filled in at random are not among the candidates
        positions = support.indices.long()
        slots = torch.searchsorted(self.positions, positions).clamp_(max=self.positions.numel() - 1)
        known = (self.positions[slots] == positions) & is_new
        steps = torch.where(known, self.counts()[slots], 0)
        divisor = steps.clamp(min=1)
        return ObservedMoments(
            mean=torch.where(known, self.total[slots] / divisor, 0),
            mean_square=torch.where(known, self.squares[slots] / divisor, 0),
            steps=steps,
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Tensor | int]:
        names = ("positions", "late", "total", "squares", "own_total")
        return {"steps": self.steps, **{name: getattr(self, name).clone() for name in names}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        device = self.support.device
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
        self._begin_step()


class ExpertWindows:
    """The candidates of fused experts, each expert's in a window of its own; see ``CandidateWindow``.

    An expert proposes an equal part of the candidates. Experts without trained entries are not observed.

    Args:
        support: the adapter's trained positions in all experts.
        limit: number of candidates.
        length: number of steps in the window.
        experts: number of experts.
    """

    def __init__(self, support: Support, limit: int, length: int, experts: int):
        self.support, self.experts = support, experts
        self.observers = [
            CandidateWindow(part, math.ceil(limit / experts), length) for part, _, _ in expert_parts(support, experts)
        ]

    @property
    def steps(self) -> int:
        return self.observers[0].steps

    @property
    def own(self) -> Tensor:
        return torch.cat([window.own for window in self.observers])

    def _of_all(self, positions: list[Tensor]) -> Tensor:
        """Positions in experts as positions in the matrix of all of them."""
        numel = self.support.shape[0] // self.experts * self.support.shape[1]
        return torch.cat([part.long() + number * numel for number, part in enumerate(positions)])

    def reduce(self, collectives: Collectives) -> None:
        for window in self.observers:
            window.reduce(collectives)

    def is_finite(self) -> Tensor:
        return torch.stack([window.is_finite() for window in self.observers]).all()

    def commit(self, factor: float, gradient: Tensor) -> None:
        for window, (_, first, last) in zip(self.observers, expert_parts(self.support, self.experts), strict=True):
            window.commit(factor, gradient[first:last])

    def discard(self) -> None:
        for window in self.observers:
            window.discard()

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        positions, scores, own = zip(*(window.scores() for window in self.observers), strict=True)
        return self._of_all(list(positions)), torch.cat(scores), torch.cat(own)

    def moments_of(self, support: Support, is_new: Tensor) -> ObservedMoments | None:
        found = []
        for window, (part, first, last) in zip(self.observers, expert_parts(support, self.experts), strict=True):
            zeros = torch.zeros(last - first, device=support.device)
            found.append(window.moments_of(part, is_new[first:last]) or ObservedMoments(zeros, zeros, zeros))
        parts = ([one.mean for one in found], [one.mean_square for one in found], [one.steps for one in found])
        return ObservedMoments(*map(torch.cat, parts))

    def state_dict(self) -> dict[str, Tensor | int]:
        states = {number: window.state_dict() for number, window in enumerate(self.observers)}
        return {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        for number, window in enumerate(self.observers):
            prefix = f"{number}."
            window.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )


Window = CandidateWindow | ExpertWindows


def window_size(state: dict[str, Tensor | int]) -> int:
    """The number of candidates in a window's ``state_dict``."""
    found = [value for name, value in state.items() if name.rpartition(".")[2] == "positions"]
    return sum(value.numel() for value in found if isinstance(value, Tensor))
