"""The config of S2FT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Self

from ...calibrate import CHANNEL_CRITERIA
from ...constraints import Count, OneOf, Pattern, Share
from ..base_config import allocation_note, explains_fields, selection_note
from ..delta_config import DeltaConfig, Resident
from ..scale import Spread
from .budget import UNIT_ALLOCATIONS, UnitBudget

SIDES = ("auto", "in", "out")
UNITS = ("channel", "head")
BUDGETS = ("ratio", "k", "num_params", "r")
# Without a budget: the share of down_proj's channels that the paper's Llama 3 runs train.
DEFAULT_RATIO = 0.03

SELECTION_FIELDS = frozenset(
    {*BUDGETS, "ratio_pattern", "allocation", "granularity", "coupled", "selection", "largest", "side", "avoid"}
)


@explains_fields
@dataclass
class S2FTConfig(DeltaConfig):
    """Structured sparse fine-tuning, S2FT (https://arxiv.org/abs/2412.06289): train some channels of each layer.

    The effective weight is ``W`` ``(out, in)`` plus ``scale`` times the values: ``(out, k)`` at ``k`` of its columns,
    or ``(k, in)`` at ``k`` of its rows. Where ``o_proj`` and ``down_proj`` train input channels, as by default, a
    training step keeps only those channels of their inputs.

    The budget is one of ``ratio``, ``k``, ``num_params`` and ``r``; without any, 3 % of the channels.

    Args:
        side: which channels train: ``"in"`` (columns of an ``nn.Linear``'s weight), ``"out"`` (its rows), or
            ``"auto"``: inputs of ``o_proj`` and ``down_proj``, outputs of ``q``, ``k``, ``v``, ``up`` and ``gate``, by
            the names these have in the architecture; of other layers the side that is wider.
        ratio: share of the channels, in (0, 1].
        k: channels of each layer.
        num_params: trained parameters over all layers; the most that whole channels allow.
        r: LoRA-rank equivalent: at least as many parameters as LoRA of this rank.
        ratio_pattern: ``{layer name or regular expression: ratio}`` for layers with a ratio of their own.
        allocation: ``"per_layer"``: layers of one kind train equally many channels; ``"global"``: together as many,
            wherever the criterion finds them, in some layers maybe none.
        granularity: ``"channel"``, or ``"head"``: whole heads of attention layers, counted in heads; feed-forward
            layers train channels all the same.
        coupled: whether layers of a block train the same channels where they share them: ``up``, ``gate`` and ``down``
            their hidden ones. ``q``, ``k``, ``v`` and ``o`` share heads, and ``v`` and ``o`` share channels.
        selection: how channels are chosen: ``"random"``, ``"weight"`` (norm), or, from data by
            [`select_support`][sparse_peft.select_support] beforehand, ``"activation"`` (norm), ``"product"`` of the
            two, ``"gradient"`` (norm of the weight's gradient).
        largest: whether channels with large scores train; by default only with ``"gradient"``.
        avoid: adapters of the model whose channels do not train here: the deltas are then orthogonal, and fusing them
            changes neither.
        seed: of the random channels; every block draws its own from (seed, block name).
        resident: let the base weight hold the adapter's channels between steps where that is possible, which makes the
            forward pass as fast as the base's. ``False`` never writes to the base. ``"product"`` holds channels in
            training only while a layer multiplies: less memory, slower steps (``docs/memory.md``). It changes no
            result.
        scale: factor between the trained values and the delta: a number, or ``"auto"``, with which LoRA's learning
            rate of 2e-4 suits the selection and the density (``docs/learning_rate.md``); 1.0 is the papers'.
        compress_inputs: rounding of the inputs that are kept for the values' gradient in training: ``"bf16"``,
            ``"int8"``, or None (``docs/memory.md``).
        preserve_zeros: whether zeros of the base weight stay zero: entries there do not train.
        num_channels: resolved number of channels per layer; filled in when the adapter is made, and used to rebuild a
            saved adapter. Not for setting by hand.
        sides: resolved side per layer; likewise.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; likewise.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import S2FTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, S2FTConfig(ratio=0.25, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        512
    """

    method: ClassVar[str] = "SPARSE_PEFT_S2FT"
    why_no_experts: ClassVar[str | None] = None
    deciding_fields: ClassVar[frozenset[str]] = SELECTION_FIELDS
    resolved_fields: ClassVar[tuple[str, ...]] = ("num_channels", "sides", "weight_shapes")

    side: Annotated[str, OneOf(SIDES)] = field(default="auto", metadata={"help": "Which channels train."})
    ratio: Share | None = field(
        default=None, metadata={"help": "Share of the channels that trains; without any budget 0.03."}
    )
    k: Count | None = field(default=None, metadata={"help": "Number of trained channels of each layer."})
    num_params: Count | None = field(default=None, metadata={"help": "Number of trained parameters over all layers."})
    r: Count | None = field(
        default=None, metadata={"help": "LoRA-rank equivalent: at least as many parameters as LoRA of this rank."}
    )
    ratio_pattern: dict[Pattern, Share] = field(
        default_factory=dict,
        metadata={"help": "{layer name or regular expression: ratio} for layers with a ratio of their own."},
    )
    allocation: Annotated[str, OneOf(UNIT_ALLOCATIONS)] = field(
        default="per_layer", metadata={"help": "How layers share the budget."}
    )
    granularity: Annotated[str, OneOf(UNITS)] = field(default="channel", metadata={"help": "What trains."})
    coupled: bool = field(
        default=True, metadata={"help": "Whether layers of a block train the channels that they share."}
    )
    selection: Annotated[str, OneOf(CHANNEL_CRITERIA)] = field(
        default="random", metadata={"help": "How channels are chosen."}
    )
    largest: bool | None = field(
        default=None, metadata={"help": "Whether large scores train; by default only with selection='gradient'."}
    )
    avoid: list[str] | None = field(
        default=None, metadata={"help": "Adapters of the model whose channels do not train here."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random channels."})
    resident: Resident = field(
        default=True,
        metadata={
            "help": "Whether the base weight may hold the channels between steps, or in products only ('product')."
        },
    )
    num_channels: dict[str, int] | None = field(
        default=None,
        repr=False,
        metadata={"help": "Resolved number of channels per layer; filled in, not set by hand."},
    )
    sides: dict[str, str] | None = field(
        default=None, repr=False, metadata={"help": "Resolved side per layer; filled in, not set by hand."}
    )

    def fill_in(self) -> None:
        super().fill_in()
        self.avoid = self.avoid or None

    def check(self) -> None:
        super().check()
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            values = " and ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"{values} are both given: only one budget can be")
        if self.num_params is not None and self.ratio_pattern:
            raise ValueError(
                f"num_params={self.num_params} and ratio_pattern are both given: a number of parameters is shared by "
                "all layers; give ratio, k or r beside ratio_pattern"
            )
        if self.largest is not None and self.selection == "random":
            raise ValueError(f"largest={self.largest} with selection='random': random channels have no scores")

    @property
    def selection_needs(self) -> str:
        return CHANNEL_CRITERIA[self.selection][0]

    @property
    def spread(self) -> Spread:
        return "peaked" if self.selection_needs == "gradient" and self.trains_largest else "channels"

    @property
    def trains_largest(self) -> bool:
        """Whether channels with large scores train."""
        return CHANNEL_CRITERIA[self.selection][1] if self.largest is None else self.largest

    def countable(self) -> tuple[Self, list[str]]:
        config, notes = super().countable()
        if self.avoid:
            config.avoid = None
            notes.append("avoid=: that channels are taken by other adapters is left out; it changes no number")
        if self.allocation == "global":
            config.allocation = "per_layer"
            notes.append(allocation_note(config.allocation))
        if self.selection_needs != "none":
            config.selection, config.largest = "random", None
            notes.append(selection_note(self.selection, self.selection_needs))
        return config, notes

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        # inputs are the rows of transformers' Conv1D, and the columns of all other layers
        yield "num_channels", (self.num_channels or {}).get(layer, 0), "rows.0 or columns.0"

    def budget(self) -> UnitBudget:
        """The budget that the fields describe."""
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        return UnitBudget(
            **(given or {"ratio": DEFAULT_RATIO}), ratio_pattern=self.ratio_pattern, allocation=self.allocation
        )
