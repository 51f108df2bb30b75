"""The config of S2FT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...calibrate import CHANNEL_CRITERIA
from ..base_config import BaseSparseConfig
from .budget import ALLOCATIONS, UnitBudget

SIDES = ("auto", "in", "out")
GRANULARITIES = ("channel", "head")
BUDGETS = ("ratio", "k", "num_params", "r")
# Without a budget: the share of down_proj's channels that the paper's Llama 3 runs train.
DEFAULT_RATIO = 0.03

SELECTION_FIELDS = frozenset(
    {*BUDGETS, "ratio_pattern", "allocation", "granularity", "coupled", "selection", "largest", "side", "avoid"}
)


@dataclass
class S2FTConfig(BaseSparseConfig):
    """Structured sparse fine-tuning, S2FT (NeurIPS 2024): train some input or output channels of each layer.

    Where ``o_proj`` and ``down_proj`` train input channels, as by default, a training step keeps only those channels
    of their inputs. The budget is one of ``ratio``, ``k``, ``num_params`` and ``r``; without any, 3 % of the channels.

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
            their hidden ones; with heads ``q``, ``k``, ``v`` and ``o`` theirs, with channels ``v`` and ``o``.
        selection: how channels are chosen: ``"random"``, ``"weight"`` (norm), or, from data by
            [`select_support`][sparse_peft.select_support] beforehand, ``"activation"`` (norm), ``"product"`` of the
            two, ``"gradient"`` (norm of the weight's gradient).
        largest: whether channels with large scores train; by default only with ``"gradient"``.
        avoid: adapters of the model whose channels this one leaves alone: the deltas are then orthogonal, and fusing
            them changes neither.
        seed: of the random channels; every block draws its own from (seed, block name).
        resident: let the base weight hold the adapter's channels between steps where that is possible, which makes the
            forward pass as fast as the base's. ``False`` never writes to the base; it changes speed, not results.
        num_channels: resolved number of channels per layer; filled in when the adapter is made, and what a saved
            adapter is rebuilt from. Not for setting by hand.
        sides: resolved side per layer; likewise.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; likewise.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.
    """

    method: ClassVar[str] = "SPARSE_PEFT_S2FT"
    deciding_fields: ClassVar[frozenset[str]] = SELECTION_FIELDS
    resolved_fields: ClassVar[tuple[str, ...]] = ("num_channels", "sides", "weight_shapes")

    side: str = field(default="auto", metadata={"help": f"Which channels train: one of {', '.join(SIDES)}."})
    ratio: float | None = field(
        default=None, metadata={"help": "Share of the channels that trains, in (0, 1]; without any budget 0.03."}
    )
    k: int | None = field(default=None, metadata={"help": "Number of trained channels of each layer."})
    num_params: int | None = field(default=None, metadata={"help": "Number of trained parameters over all layers."})
    r: int | None = field(
        default=None, metadata={"help": "LoRA-rank equivalent: at least as many parameters as LoRA of this rank."}
    )
    ratio_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "{layer name or regular expression: ratio} for layers with a ratio of their own."},
    )
    allocation: str = field(
        default="per_layer", metadata={"help": f"How layers share the budget: one of {', '.join(ALLOCATIONS)}."}
    )
    granularity: str = field(default="channel", metadata={"help": f"What trains: one of {', '.join(GRANULARITIES)}."})
    coupled: bool = field(
        default=True, metadata={"help": "Whether layers of a block train the channels that they share."}
    )
    selection: str = field(
        default="random", metadata={"help": f"How channels are chosen: one of {', '.join(CHANNEL_CRITERIA)}."}
    )
    largest: bool | None = field(
        default=None, metadata={"help": "Whether large scores train; by default only with selection='gradient'."}
    )
    avoid: list[str] | None = field(
        default=None, metadata={"help": "Adapters of the model whose channels this one leaves alone."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random channels."})
    resident: bool = field(
        default=True,
        metadata={"help": "Whether the base weight may hold the adapter's channels between steps (speed only)."},
    )
    num_channels: dict[str, int] | None = field(
        default=None, metadata={"help": "Resolved number of channels per layer; filled in, not set by hand."}
    )
    sides: dict[str, str] | None = field(
        default=None, metadata={"help": "Resolved side per layer; filled in, not set by hand."}
    )
    weight_shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Resolved [rows, cols] of the layers' weights; filled in, not set by hand."}
    )

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "side": SIDES,
            "allocation": ALLOCATIONS,
            "granularity": GRANULARITIES,
            "selection": tuple(CHANNEL_CRITERIA),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r}: one of {', '.join(known)} is expected")
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            values = " and ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"{values} are both given: only one budget can be")
        self.ratio_pattern = dict(self.ratio_pattern or {})
        ratios = {f"ratio_pattern[{key!r}]": value for key, value in self.ratio_pattern.items()}
        for name, value in {"ratio": self.ratio, **ratios}.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: a number in (0, 1] is expected")
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value!r}: a share in (0, 1] is expected, such as 0.03 for 3 %")
        for name, least in (("k", 1), ("num_params", 1), ("r", 1), ("seed", None)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: an int is expected")
            if least is not None and value < least:
                raise ValueError(f"{name}={value}: at least {least} is expected")
        if self.num_params is not None and self.ratio_pattern:
            raise ValueError(
                f"num_params={self.num_params} and ratio_pattern are both given: a number of parameters is shared by "
                "all layers; give ratio, k or r beside ratio_pattern"
            )
        if self.largest is not None and self.selection == "random":
            raise ValueError(f"largest={self.largest} with selection='random': random channels have no scores")
        if isinstance(self.avoid, str):
            raise TypeError(f"avoid={self.avoid!r}: a list of adapter names is expected, [{self.avoid!r}]")
        self.avoid = list(self.avoid) if self.avoid else None

    @property
    def selection_needs(self) -> str:
        return CHANNEL_CRITERIA[self.selection][0]

    @property
    def trains_largest(self) -> bool:
        """Whether channels with large scores train."""
        return CHANNEL_CRITERIA[self.selection][1] if self.largest is None else self.largest

    def budget(self) -> UnitBudget:
        """The budget that the fields describe."""
        shared = {"ratio_pattern": self.ratio_pattern, "allocation": self.allocation}
        if all(getattr(self, name) is None for name in BUDGETS):
            return UnitBudget(DEFAULT_RATIO, **shared)
        return UnitBudget(self.ratio, self.k, self.num_params, self.r, **shared)
