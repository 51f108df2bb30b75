"""The config of SoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from ...constraints import Count, Limits, OneOf, Pattern, Positive, PositiveOrZero, Probability, Steps
from ...ops import PROXIMAL_OPERATORS
from ...support import steps_of
from ..base_config import BaseSparseConfig, explains_fields, required
from ..scale import LORA_RATE, LORA_SCALE
from .penalty import SPACINGS, PenaltySchedule
from .state import GATES

PROXIMALS = ("lr", "constant", "adam")
TargetRank = (
    Annotated[int, Limits(least=1, noun="a number of ranks (int)")]
    | Annotated[float, Limits(above=0, most=1, noun="a share of the ranks (float)")]
)
# Of a penalty that a learning rate multiplies, and of a threshold that is taken as it is.
DEFAULT_PENALTY = {"lr": 0.5, "adam": 0.5, "constant": 3e-4}


@explains_fields
@dataclass
class SoRAConfig(BaseSparseConfig):
    """SoRA (https://arxiv.org/abs/2311.11696): low rank with a gate, whose proximal step removes ranks.

    The effective weight is ``W + alpha / r * B diag(gate) A``, with ``A`` ``(r, in)``, ``B`` ``(out, r)`` and ``gate``
    ``(r,)`` trained.

    Training needs [`SparsityCallback`][sparse_peft.SparsityCallback] or a
    [`SparsityController`][sparse_peft.SparsityController], which takes the proximal step after each step of the
    optimizer, keeps the gates out of its weight decay, and reports the ranks. Use weight decay for ``A`` and ``B``:
    without it they grow as the gates shrink, and the penalty has little effect.

    Args:
        r: ranks that each layer starts with.
        alpha: the product is scaled by ``alpha / r``, for the whole run.
        dropout: probability with which an input is left out in training.
        rank_pattern: ``{layer name or regular expression: r}`` for layers with a rank of their own.
        init_gate: ``"ones"``: as LoRA at first, or ``"normal"``, as the authors do.
        prox: a gate's threshold. ``"lr"``: the learning rate times the penalty, the proximal gradient step of the
            gates' L1 norm; ``"constant"``: the penalty itself, as the authors do; ``"adam"``: as ``"lr"``,
            divided by the root of Adam's second moment, the proximal step in Adam's own metric.
        operator: ``"soft"``: soft thresholding, or ``"reference"``: the operator of the authors' code, which also
            zeroes gates below twice the threshold.
        penalty: the L1 norm's weight; by default 0.5, with ``prox="constant"`` the threshold 3e-4.
        first_penalty: of the first stage; by default 0.
        stages: number of equally long stages of the run, with penalties from the first to the last.
        stage_spacing: ``"linear"`` or ``"geometric"`` (from a first penalty above 0). A learning rate that rises anew
            in every stage is [`rewarmed_schedule`][sparse_peft.rewarmed_schedule].
        prox_start: optimizer steps (int), or share of the run (float), before the first proximal step: the warmup.
        max_threshold: with ``prox="adam"``: most that a step takes from a gate, whose second moment starts at zero.
        target_rank: remaining ranks of all layers together, as a number (int) or a share of the initial ones (float in
            (0, 1]); the penalty is adapted to reach it.
        target_step: when the target is reached: optimizer steps (int) or a share of the run (float). Ranks do not
            change afterwards.
        gate_lr_scale: the gates' learning rate, relative to that of ``A`` and ``B``.
        l1_weight: weight of the gates' mean absolute value in the loss, as in the authors' code besides the threshold;
            0 for none. Its gradient is added in backward, so that clipping includes it.
        compact_every: remove ranks that were zero for this many steps from the model, for good; None for never. In one
            process only.
        report_every: optimizer steps from one report of the ranks to the next.
        ranks: resolved ranks of each layer; filled in when the adapter is made, and used to rebuild a saved adapter.
            Not for setting by hand.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; likewise.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SoRAConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SoRAConfig(r=4, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in model.base_model.model[0].deltas["default"].named_parameters()}
        {'A': (4, 64), 'B': (32, 4), 'gate': (4,)}
    """

    method: ClassVar[str] = "SPARSE_PEFT_SORA"
    deciding_fields: ClassVar[frozenset[str]] = frozenset({"r", "rank_pattern"})
    resolved_fields: ClassVar[tuple[str, ...]] = ("ranks", "weight_shapes")

    r: Count = field(default=8, metadata={"help": "Ranks that each layer starts with."})
    alpha: Positive = field(default=16, metadata={"help": "The product is scaled by alpha / r."})
    dropout: Probability = field(
        default=0.0, metadata={"help": "Probability with which an input is left out in training."}
    )
    rank_pattern: dict[Pattern, Count] = field(
        default_factory=dict, metadata={"help": "{layer name or regular expression: r} for layers with their own."}
    )
    init_gate: Annotated[str, OneOf(GATES)] = field(default="ones", metadata={"help": "How gates start."})
    prox: Annotated[str, OneOf(PROXIMALS)] = field(default="lr", metadata={"help": "A gate's threshold."})
    operator: Annotated[str, OneOf(PROXIMAL_OPERATORS)] = field(
        default="soft", metadata={"help": "Soft thresholding, or the operator of the authors' code."}
    )
    penalty: PositiveOrZero | None = field(
        default=None, metadata={"help": "Weight of the gates' L1 norm; 0.5, or 3e-4 with prox='constant'."}
    )
    first_penalty: PositiveOrZero = field(default=0.0, metadata={"help": "Penalty of the first of several stages."})
    stages: Count = field(default=1, metadata={"help": "Number of equally long stages with rising penalties."})
    stage_spacing: Annotated[str, OneOf(SPACINGS)] = field(default="linear", metadata={"help": "How penalties rise."})
    prox_start: Steps = field(
        default=0.06, metadata={"help": "Steps (int) or share of the run (float) before the first proximal step."}
    )
    max_threshold: Positive = field(
        default=0.01, metadata={"help": "With prox='adam': most a step takes from a gate."}
    )
    target_rank: TargetRank | None = field(
        default=None, metadata={"help": "Remaining ranks of all layers: a number (int) or a share (float)."}
    )
    target_step: Steps = field(
        default=0.7, metadata={"help": "When target_rank is reached: steps (int) or a share of the run (float)."}
    )
    gate_lr_scale: Positive = field(
        default=1.0, metadata={"help": "The gates' learning rate relative to that of the factors."}
    )
    l1_weight: PositiveOrZero = field(
        default=0.0, metadata={"help": "Weight of the gates' mean absolute value in the loss."}
    )
    compact_every: Count | None = field(
        default=None, metadata={"help": "Remove ranks that were zero for this many optimizer steps; None: never."}
    )
    report_every: Count = field(default=50, metadata={"help": "Optimizer steps from one report of ranks to the next."})
    ranks: dict[str, int] | None = field(
        default=None, repr=False, metadata={"help": "Resolved ranks per layer; filled in, not set by hand."}
    )

    def fill_in(self) -> None:
        super().fill_in()
        if self.penalty is None:
            self.penalty = DEFAULT_PENALTY[self.prox]

    def check(self) -> None:
        super().check()
        if self.stage_spacing == "geometric" and self.stages > 1 and 0 in (self.first_penalty, self.penalty):
            raise ValueError(
                f"stage_spacing='geometric' with first_penalty={self.first_penalty} and penalty={self.penalty}: both "
                "must be above 0 for ratios"
            )

    @classmethod
    def paper(cls, **fields: Any) -> SoRAConfig:
        """The settings of the authors' script and the operations of their code, for comparisons."""
        return cls(
            **{
                "init_gate": "normal",
                "prox": "constant",
                "operator": "reference",
                "penalty": 3e-4,
                "prox_start": 0,
                "l1_weight": 10.0,
                **fields,
            }
        )

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / self.r

    def suited_rate(self) -> float:
        return LORA_RATE * LORA_SCALE / self.scale

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield "ranks", (self.ranks or {}).get(layer, 0), "A.0"

    def target_of(self, ranks: int) -> int | None:
        """Target rank count given ``ranks`` initial ranks; None if unset."""
        if isinstance(self.target_rank, float):
            return max(1, round(self.target_rank * ranks))
        return self.target_rank

    @property
    def changes_in_training(self) -> bool:
        return required(self.penalty, "penalty") > 0 or self.l1_weight > 0 or self.target_rank is not None

    @property
    def controller_role(self) -> str:
        return "pulls its gates to zero"

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        if total_steps is None:
            return
        pulls = required(self.penalty, "penalty") > 0 or self.target_rank is not None
        if pulls and steps_of(self.prox_start, total_steps, "prox_start") >= total_steps:
            yield f"no gate is ever pulled to zero: prox_start={self.prox_start!r} is not before step {total_steps}"
        if self.target_rank is not None and steps_of(self.target_step, total_steps, "target_step") > total_steps:
            yield f"target_rank is not reached: target_step={self.target_step!r} is after total_steps={total_steps}"
        if self.compact_every is not None and self.compact_every > total_steps:
            yield f"no rank is ever removed: compact_every={self.compact_every} is above total_steps={total_steps}"

    def penalty_schedule(self, total_steps: int | None) -> PenaltySchedule:
        """The penalties of a run of this many optimizer steps.

        Raises:
            ValueError: shares or stages of a run whose length is not known.
        """
        start = steps_of(self.prox_start, total_steps, "prox_start")
        penalty = required(self.penalty, "penalty")
        return PenaltySchedule.of(self.first_penalty, penalty, self.stages, self.stage_spacing, start, total_steps)
