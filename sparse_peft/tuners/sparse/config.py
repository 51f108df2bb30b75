"""The config of a sparse delta."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from ...constraints import Count, CountOrZero, OneOf, Positive, Share, Steps
from ...support import (
    CRITERIA,
    DECAYS,
    REFRESH,
    REGROWTHS,
    Block,
    Criterion,
    Regrowth,
    ReselectionSchedule,
    as_block,
    get_criterion,
    steps_of,
)
from ...support.schedules import ENDLESS
from ..base_config import explains_fields, required
from ..entry_config import EntryConfig
from ..scale import Spread

SEED_MOMENTS = ("gradient", "zero")
GRANULARITIES = ("entry", "block")
# Of dynamic selections, in optimizer steps.
RESELECT_EVERY = 20


@explains_fields
@dataclass
class SparseConfig(EntryConfig):
    """Train a sparse delta: chosen entries of each weight; the others stay frozen.

    The effective weight is ``W + scale * scatter(values)``: of ``W`` ``(out, in)`` only the ``k`` values ``(k,)`` at
    the chosen positions train. Positions are fixed, as in LT-SFT (https://arxiv.org/abs/2110.07560), or change during
    training, as in SpIEL (https://arxiv.org/abs/2401.16405), SET and RigL.

    The budget is one of ``density``, ``num_params`` and ``r``; without any, 1 % of the target weights train, and at
    least 16 entries of each layer.

    Args:
        density: share of the target layers' weights that trains, in (0, 1].
        num_params: number of trained entries over all target layers.
        r: LoRA-rank equivalent: as many entries as LoRA of this rank has parameters, ``r * (out + in)`` a layer.
        density_pattern: ``{layer name or regular expression: density}`` for layers with a density of their own.
        allocation: how layers share the budget: ``"numel"`` (equal density), ``"uniform"`` (equal counts), ``"erk"``
            (Erdos-Renyi kernel: density in proportion to (out + in) / (out * in)), ``"global"`` (by the highest scores
            of all layers together; needs a criterion with scores).
        selection: which entries train: ``"random"``, ``"magnitude"`` (largest), ``"magnitude_smallest"``,
            ``"threshold"``, ``"principal"``, ``"residual"``, ``"nonzero"`` (random among the entries that are not
            zero). [`select_support`][sparse_peft.select_support] chooses from data beforehand with ``"gradient"``,
            ``"fisher"``, ``"gallop"``, ``"wanda"``, ``"movement"``, and takes positions of your own with ``"given"``.
            With ``"accumulated_gradient"`` (SpIEL-AG), ``"momentum"`` (SpIEL-MA), ``"set"`` or ``"rigl"`` they start
            at random and change during training: add [`SparsityCallback`][sparse_peft.SparsityCallback] to the
            trainer, or drive a [`SparsityController`][sparse_peft.SparsityController] in a loop of your own.
        granularity: ``"entry"``: single entries train, or ``"block"``: whole blocks of the stored weight, chosen by
            the sums of their entries' scores. At densities of tens of percent the gradient of blocks is much cheaper.
        block_size: with blocks: their size, one number or ``[rows, cols]`` of the stored weight.
        columns: share of a layer's inputs at which all its entries lie, in (0, 1]: those with the best sums of scores,
            or random ones. Only these inputs are kept for the backward pass (``docs/memory.md``).
        threshold: with ``selection="threshold"``: train the entries with absolute value below it (SaRA, section 3.2).
        principal_rank: with ``selection="principal"``: rank of the approximation whose largest entries train (LIFT);
            with ``"residual"``: of the one whose error selects (as in DSEE, whose decomposition is another).
        seed: of the random positions; every layer draws its own from (seed, layer name).
        reselect_every: optimizer steps from one reselection to the next (SpIEL's S); by default 20 for dynamic
            selections. Given with ``"principal"``, positions are chosen anew from the trained weight (LIFT's refresh),
            and the callback is needed; by default they stay.
        accumulate: optimizer steps before a reselection whose gradients count for it (the paper's gamma); by default 5
            for SpIEL, 1 for RigL. With ``"momentum"`` and ``"accumulated_gradient"`` the first reselection comes after
            this many steps.
        replace_rate: share of each layer's entries that a reselection at the start puts up for replacement.
        first_replace_rate: share at the first reselection; by default 1 for SpIEL, whose first positions are random,
            and the schedule's for SET and RigL.
        schedule: how the share falls from the start to the stop: ``"linear"``, ``"cosine"``, ``"cubic"`` or
            ``"constant"``.
        reselect_start: where the first window or period begins: a number of optimizer steps (int), or a share of the
            run (float in [0, 1]).
        reselect_stop: end of the reselections; likewise.
        candidates: with gradients: candidate positions in a window per trained entry.
        redistribute: whether entries may move between layers: one ranking over all layers, with a constant total.
        seed_moments: the optimizer's first moments of a new entry: ``"gradient"``: from its observed gradients,
            ``"zero"``: none.
        resident: let the base weight hold the adapter's entries between steps where that is possible, which makes the
            forward pass as fast as the base's. ``False`` never writes to the base. ``"product"`` holds entries in
            training only while a layer multiplies: less memory, slower steps (``docs/memory.md``). It changes no
            result.
        scale: factor between the trained values and the delta: a number, or ``"auto"``, with which LoRA's learning
            rate of 2e-4 suits the selection and the density (``docs/learning_rate.md``); 1.0 is the papers'.
        compress_inputs: rounding of the inputs that are kept for the values' gradient in training: ``"bf16"``,
            ``"int8"``, or None (``docs/memory.md``).
        preserve_zeros: whether zeros of the base weight stay zero: entries there do not train. Fewer entries train
            then than the budget says; ``selection="nonzero"`` draws all of them among the others.
        num_entries: resolved number of entries per layer; filled in when the adapter is made, and used to rebuild a
            saved adapter. Not for setting by hand.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; likewise.

    Raises:
        ValueError: a budget, allocation or criterion that does not exist or does not fit the others.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseConfig(density=0.1, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        205
    """

    method: ClassVar[str] = "SPARSE_PEFT_DELTA"
    deciding_fields: ClassVar[frozenset[str]] = EntryConfig.deciding_fields | {
        "selection",
        "threshold",
        "granularity",
        "block_size",
    }

    selection: Annotated[str, OneOf(CRITERIA, REGROWTHS)] = field(
        default="random", metadata={"help": "The criterion that chooses the trained entries."}
    )
    granularity: Annotated[str, OneOf(GRANULARITIES)] = field(
        default="entry", metadata={"help": "Whether single entries or whole blocks train."}
    )
    block_size: Count | list[Count] = field(
        default=16, metadata={"help": "With granularity='block': size of a block, or its [rows, cols]."}
    )
    columns: Share | None = field(
        default=None, metadata={"help": "Share of a layer's inputs at which all its entries lie; None for all."}
    )
    principal_rank: Count = field(
        default=32, metadata={"help": "With selection='principal' or 'residual': rank of the approximation."}
    )
    reselect_every: Count | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps from one reselection to the next: 20 for dynamic selections; "
            "'principal' is chosen anew if it is given."
        },
    )
    accumulate: CountOrZero | None = field(
        default=None,
        metadata={"help": "Optimizer steps observed before a reselection; by default 5 for SpIEL and 1 for RigL."},
    )
    replace_rate: Share = field(
        default=0.2, metadata={"help": "Share of the entries up for replacement at the start of the schedule."}
    )
    first_replace_rate: Share | None = field(
        default=None,
        metadata={"help": "Share at the first reselection; by default 1 for SpIEL, else the schedule's."},
    )
    schedule: Annotated[str, OneOf(DECAYS)] = field(
        default="linear", metadata={"help": "How the share falls over the run."}
    )
    reselect_start: Steps = field(
        default=0, metadata={"help": "Where reselection begins: optimizer steps (int) or a share of the run (float)."}
    )
    reselect_stop: Steps = field(
        default=1.0, metadata={"help": "Where reselection ends: optimizer steps (int) or a share of the run (float)."}
    )
    candidates: Positive = field(
        default=1.0, metadata={"help": "Positions watched in a window for each trained entry."}
    )
    redistribute: bool = field(
        default=False, metadata={"help": "Whether entries may move between layers, the total being fixed."}
    )
    seed_moments: Annotated[str, OneOf(SEED_MOMENTS)] = field(
        default="gradient", metadata={"help": "Optimizer moments of new entries: what was observed, or none."}
    )

    def fill_in(self) -> None:
        super().fill_in()
        if self.selection in REGROWTHS and self.reselect_every is None:
            self.reselect_every = RESELECT_EVERY
        if self.sparse_peft_version is not None and self.selection == REFRESH.name and self.accumulate is None:
            # a file without a refresh: 0.1.0 wrote the default of dynamic selections here
            self.reselect_every = None
        if self.regrowth is not None and self.accumulate is None:
            self.accumulate = self.regrowth.accumulate

    def check(self) -> None:
        super().check()
        if (self.selection == "threshold") != (self.threshold is not None):
            raise ValueError(
                f"selection={self.selection!r} with threshold={self.threshold!r}: a threshold is given exactly when "
                "selection='threshold'"
            )
        as_block(self.block_size)
        if self.granularity == "block":
            self._check_blocks()
        if self.columns is not None:
            self._check_columns()
        if self.regrowth is not None:
            self._check_reselection(self.regrowth)

    @property
    def regrowth(self) -> Regrowth | None:
        """How the positions change during training; None if they do not."""
        if self.selection == REFRESH.name:
            return None if self.reselect_every is None else REFRESH
        return REGROWTHS.get(self.selection)

    @property
    def changes_in_training(self) -> bool:
        return self.regrowth is not None

    @property
    def spread(self) -> Spread:
        # positions that start at random and grow where gradients are large
        grown_by_data = self.regrowth is not None and self.regrowth.observes in ("gradients", "covers")
        return "peaked" if grown_by_data else super().spread

    @property
    def block(self) -> Block | None:
        """``(rows, cols)`` of the blocks that train whole; None for single entries."""
        return as_block(self.block_size) if self.granularity == "block" else None

    @property
    def criterion(self) -> Criterion:
        """What chooses the first positions."""
        return get_criterion("random" if self.selection in REGROWTHS else self.selection)

    @property
    def criterion_options(self) -> dict[str, Any]:
        name = self.criterion.name
        if name in ("principal", "residual"):
            return {"r": self.principal_rank}
        return {"threshold": self.threshold} if name == "threshold" else {}

    def countable(self) -> tuple[Self, list[str]]:
        config, notes = super().countable()
        if self.selection_needs != "none":
            config.selection = "random"
        return config, notes

    def reselection_schedule(self, total_steps: int | None) -> ReselectionSchedule:
        """When entries are replaced in a run of this many optimizer steps.

        Raises:
            ValueError: start or stop are shares of a run whose length is not known, the stop comes before the start,
                or the selection is one that does not change positions.
        """
        regrowth = self.regrowth
        if regrowth is None:
            raise ValueError(
                f"selection={self.selection!r}: only {', '.join(REGROWTHS)}, and principal with reselect_every, "
                "change positions in training"
            )
        start = steps_of(self.reselect_start, total_steps, "reselect_start")
        stop = steps_of(self.reselect_stop, total_steps, "reselect_stop")
        if start > stop:
            raise ValueError(
                f"reselect_start={self.reselect_start!r} is step {start}, after reselect_stop={self.reselect_stop!r}, "
                f"step {stop}"
            )
        every, window = required(self.reselect_every, "reselect_every"), required(self.accumulate, "accumulate")
        if regrowth is REFRESH:
            return ReselectionSchedule(every, window, regrowth.leads, 1.0, None, "constant", start, stop)
        first = regrowth.replaces_first if self.first_replace_rate is None else self.first_replace_rate
        return ReselectionSchedule(every, window, regrowth.leads, self.replace_rate, first, self.schedule, start, stop)

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        if self.regrowth is None:
            return
        schedule = self.reselection_schedule(total_steps)
        if total_steps == ENDLESS and not isinstance(self.reselect_stop, int):
            yield (
                f"reselect_stop={self.reselect_stop!r} is a share of a run of unknown length: reselection goes on to "
                f"its end, with replace_rate={self.replace_rate!r} throughout; pass total_steps="
            )
        last = schedule.stop if total_steps is None else min(schedule.stop, total_steps)
        if schedule.first_event > last:
            yield (
                f"no position ever changes: the first reselection would come after step {schedule.first_event}, and "
                f"the last possible one is after step {last} (reselect_every={self.reselect_every}, "
                f"accumulate={self.accumulate}, reselect_start={self.reselect_start!r}, "
                f"reselect_stop={self.reselect_stop!r}, total_steps={total_steps})"
            )

    def _check_columns(self) -> None:
        criterion = self.criterion
        if self.granularity == "block":
            raise ValueError(
                f"columns={self.columns} with granularity='block': the two place entries in different ways; use one"
            )
        if self.regrowth is not None:
            raise ValueError(
                f"columns={self.columns} with selection={self.selection!r}: positions that change in training need "
                "all inputs; use 'random' or 'magnitude', or leave out columns"
            )
        if criterion.needs not in ("none", "weight") or criterion.decides_count or criterion.restricts:
            raise ValueError(
                f"columns={self.columns} with selection={self.selection!r}: columns are chosen at random or by the "
                "sums of weights' scores; use 'random', 'magnitude', 'magnitude_smallest', 'principal' or 'residual'"
            )

    def _check_blocks(self) -> None:
        if self.selection in REGROWTHS:
            raise ValueError(
                f"granularity='block' with selection={self.selection!r}: positions that change are single entries; "
                "use a fixed selection for blocks, or granularity='entry'"
            )
        if self.criterion.decides_count:
            cure = "positions of whole blocks" if self.selection == "given" else "'magnitude_smallest' with a density"
            raise ValueError(
                f"granularity='block' with selection={self.selection!r}: it is for single entries; use {cure} instead"
            )

    def _check_reselection(self, regrowth: Regrowth) -> None:
        accumulate = required(self.accumulate, "accumulate")
        if accumulate == 0 and regrowth.observes in ("gradients", "covers"):
            raise ValueError(
                f"accumulate=0: at least 1 observed step is expected with selection={self.selection!r}, which chooses "
                "new positions from observed steps"
            )
        if accumulate > required(self.reselect_every, "reselect_every"):
            raise ValueError(
                f"accumulate={accumulate} and reselect_every={self.reselect_every}: the steps that are observed "
                "before a reselection must fit between two of them"
            )
        if self.redistribute and regrowth.observes in ("nothing", "weights"):
            raise ValueError(
                f"redistribute=True with selection={self.selection!r}: layers are compared by observed gradients, and "
                "it observes none; use accumulated_gradient, momentum or rigl"
            )
