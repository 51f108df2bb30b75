"""The penalty of SoRA's gates over a run, and a learning rate schedule with the same stages."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...support.schedules import ENDLESS

SPACINGS = ("linear", "geometric")


@dataclass(frozen=True)
class PenaltySchedule:
    """Penalties over a run, one for each of its equally long stages.

    Attributes:
        penalties: of the stages.
        start: number of completed steps before the first penalty.
        total: steps of the whole run; None with one stage only.
    """

    penalties: tuple[float, ...]
    start: int
    total: int | None

    @classmethod
    def of(
        cls, first: float, last: float, stages: int, spacing: str, start: int, total: int | None
    ) -> PenaltySchedule:
        """From the first penalty to the last, in equal differences or equal ratios.

        Raises:
            ValueError: several stages, and the length of the run is not known.
        """
        if stages > 1 and total in (None, ENDLESS):
            raise ValueError(f"stages={stages}: cutting the run into stages needs its length: pass total_steps=")
        if stages == 1:
            return cls((last,), start, total)
        shares = [stage / (stages - 1) for stage in range(stages)]
        if spacing == "linear":
            return cls(tuple(first + (last - first) * share for share in shares), start, total)
        return cls(tuple(first * (last / first) ** share for share in shares), start, total)

    def stage(self, step: int) -> int:
        """The stage, from 0, that optimizer step number ``step``, counted from 1, belongs to."""
        if len(self.penalties) == 1 or self.total is None:
            return 0
        span = max(1, self.total - self.start)
        return min(len(self.penalties) - 1, max(0, step - 1 - self.start) * len(self.penalties) // span)

    def at(self, step: int) -> float:
        """The penalty of this step."""
        return 0.0 if step <= self.start else self.penalties[self.stage(step)]


def rewarmed_schedule(optimizer: Optimizer, total_steps: int, stages: int, warmup: float = 0.06) -> LambdaLR:
    """A learning rate that rises anew at the start of every stage and falls linearly to zero at its end.

    For [`SoRAConfig`][sparse_peft.SoRAConfig] with ``stages``: each stage learns again after its penalty has begun.
    Paper: https://arxiv.org/abs/2311.11696, section 3.3.

    Args:
        optimizer: whose learning rate it is.
        total_steps: of the whole run.
        stages: as in the config.
        warmup: share of a stage in which the rate rises.

    Raises:
        ValueError: fewer steps than stages, or a warmup that is no share.

    Example:
        >>> import torch
        >>> from sparse_peft import rewarmed_schedule
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = rewarmed_schedule(optimizer, total_steps=8, stages=2, warmup=0.25)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.0, 1.0, 0.67, 0.33, 0.0, 1.0, 0.67, 0.33]
    """
    if not 1 <= stages <= total_steps:
        raise ValueError(f"stages={stages}: between 1 and total_steps={total_steps} are possible")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup!r}: a share in [0, 1) is expected")

    def rate(step: int) -> float:
        stage = min(stages - 1, step * stages // total_steps)
        begin, end = math.ceil(stage * total_steps / stages), math.ceil((stage + 1) * total_steps / stages)
        rising = warmup * (end - begin)
        into = min(step, total_steps) - begin
        return into / rising if into < rising else max(0.0, (end - begin - into) / (end - begin - rising))

    return LambdaLR(optimizer, rate)
