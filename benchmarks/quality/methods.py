"""The rows: how each method becomes a model, and the learning rates among which it finds its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn

from sparse_peft import (
    MonarchConfig,
    S2FTConfig,
    SaRAConfig,
    SLTrainConfig,
    SnellaConfig,
    SoRAConfig,
    SparseConfig,
    SparseIFTConfig,
    SSTConfig,
    select_support,
)
from sparse_peft.procedures import (
    FisherAnchor,
    GradientMask,
    ImportanceLearningRate,
    LayerSampling,
    Procedure,
    SplitMerge,
)

from .models import Base
from .tasks import Batch

FULL, LORA, RANDOM, DEFAULT = "full", "lora", "random", "default"
AROUND = "+"  # between the names of an adapter and a procedure
# About half a power of ten apart; each search starts where the method's best was in earlier ones.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CALIBRATION_BATCHES = 8
# Selections that also have a row with the automatic scale, for runs at LoRA's usual rate of 2e-4.
AUTOMATIC = ("magnitude_smallest", "magnitude", "principal", "residual", "fisher", "gradient", "gallop", "wanda")


@dataclass(frozen=True)
class Budget:
    """Trained parameters beside the head: those of LoRA of rank ``r``, or a ``density`` of the target weights."""

    field: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"r=16"`` or ``"density=0.01"``.

        Raises:
            ValueError: it is neither.
        """
        match = re.fullmatch(r"(r)=([1-9]\d*)|(density)=(0\.\d*[1-9])", text)
        if match is None:
            raise ValueError(f"budget={text!r} is none: write r=16 or density=0.01")
        field, value = (found for found in match.groups() if found)
        return cls(field, int(value) if field == "r" else float(value))

    @property
    def rank(self) -> int:
        """Raises ValueError where the budget is a density, which low-rank methods cannot have."""
        if self.field != "r":
            raise ValueError(f"budget {self} is no rank: low-rank methods need r=...")
        return int(self.value)

    @property
    def fields(self) -> dict[str, float]:
        return {self.field: self.value}

    def __str__(self) -> str:
        return f"{self.field}={self.value:g}"


@dataclass(frozen=True)
class Setting:
    """What a method is made for."""

    base: Base
    model: nn.Module
    budget: Budget
    seed: int
    steps: int

    @property
    def shared(self) -> dict:
        """Fields of every config."""
        head = list(self.base.head) or None
        return {"target_modules": self.base.targets, "task_type": self.base.task_type, "modules_to_save": head}

    def layers(self, targets: str) -> list[nn.Linear]:
        return [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(targets, name)
        ]

    def lora_size(self, rank: int, targets: str) -> int:
        return rank * sum(layer.in_features + layer.out_features for layer in self.layers(targets))

    @property
    def weights(self) -> int:
        return sum(layer.weight.numel() for layer in self.layers(self.base.targets))


@dataclass(frozen=True)
class Around:
    """Data of procedures: rows like those of the training, and text of other domains."""

    held: list[Batch]
    old: list[Batch]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        make: the config of a setting; None to train all weights of the base.
        start: learning rate at which the search for the best begins, one of ``RATES``.
        automatic: its scale is the config's own, for runs at LoRA's usual rate.
        procedures: what acts around the training; a row with some has the adapter of another.
    """

    make: Callable[[Setting], PeftConfig] | None
    start: float
    automatic: bool = False
    procedures: Callable[[Around], list[Procedure]] = lambda data: []


def _ours(config: type[PeftConfig], **fields: object) -> Callable[[Setting], PeftConfig]:
    """Rows of this package's deltas; with ``scale=1`` the trained numbers are the delta, and rates are the papers'."""
    return lambda at: config(**{**at.budget.fields, "scale": 1.0, "seed": at.seed, **fields}, **at.shared)


def _sparse(selection: str, **fields: object) -> Callable[[Setting], PeftConfig]:
    return _ours(SparseConfig, selection=selection, **fields)


def _dynamic(selection: str, accumulate: int) -> Callable[[Setting], PeftConfig]:
    def make(at: Setting) -> PeftConfig:
        every = max(accumulate, at.steps // 8, 1)
        return _sparse(selection, reselect_every=every, accumulate=accumulate)(at)

    return make


def _lift(at: Setting) -> PeftConfig:
    """Principal weights, chosen anew as often as dynamic selections reselect."""
    return _sparse("principal", reselect_every=max(at.steps // 8, 1))(at)


def _automatic(config: type[PeftConfig], **fields: object) -> Method:
    """The config as a user gets it who changes nothing but LoRA's class, and perhaps one field more."""
    return Method(lambda at: config(**at.budget.fields, seed=at.seed, **fields, **at.shared), 3e-4, automatic=True)


def _lora(**fields: object) -> Callable[[Setting], PeftConfig]:
    return lambda at: LoraConfig(r=at.budget.rank, lora_alpha=2 * at.budget.rank, **fields, **at.shared)


def _lora_on_mlp(at: Setting) -> PeftConfig:
    """LoRA on the feed-forward layers, of the rank that is nearest in parameters."""
    rank = round(at.lora_size(at.budget.rank, at.base.targets) / at.lora_size(1, at.base.mlp))
    return LoraConfig(r=rank, lora_alpha=2 * rank, **{**at.shared, "target_modules": at.base.mlp})


def _shira(at: Setting) -> PeftConfig:
    return ShiraConfig(r=at.budget.rank, random_seed=at.seed, **at.shared)


def _super_tuning(at: Setting) -> PeftConfig:
    density = at.budget.value
    if at.budget.field == "r":
        density = at.lora_size(at.budget.rank, at.base.targets) / at.weights
    return SupertuningConfig(sparsity=1 - density, **at.shared)


def _sora(at: Setting) -> PeftConfig:
    rank = at.budget.rank
    return SoRAConfig(r=rank, alpha=2 * rank, target_rank=0.5, **at.shared)


def _sltrain(at: Setting) -> PeftConfig:
    """Half of the parameters in the low-rank part, half in entries."""
    rank = at.budget.rank // 2
    entries = at.lora_size(at.budget.rank, at.base.targets) - at.lora_size(rank, at.base.targets)
    return SLTrainConfig(r=rank, alpha=2 * rank, num_params=entries, seed=at.seed, scale=1.0, **at.shared)


def _monarch(at: Setting) -> PeftConfig:
    """Blocks that mix: no more of them than ranks."""
    return MonarchConfig(nblocks=4, blk_r=at.budget.rank, **at.shared)


def _sparse_ift(at: Setting) -> PeftConfig:
    every = max(at.steps // 8, 1)
    return SparseIFTConfig(r=at.budget.rank, sparsity=0.75, reselect_every=every, seed=at.seed, **at.shared)


def _doped(at: Setting) -> PeftConfig:
    return SLTrainConfig(r=at.budget.rank, doped=0.5, seed=at.seed, **at.shared)


def _sst(at: Setting) -> PeftConfig:
    return SSTConfig(r=at.budget.rank, resample_every=max(at.steps // 8, 1), seed=at.seed, **at.shared)


def _snell(**fields: object) -> Callable[[Setting], PeftConfig]:
    def make(at: Setting) -> PeftConfig:
        return SnellaConfig(r=at.budget.rank, seed=at.seed, **fields, **at.shared)

    return make


METHODS: dict[str, Method] = {
    LORA: Method(_lora(), 3e-4),
    FULL: Method(None, 1e-4),
    DEFAULT: _automatic(SparseConfig),
    RANDOM: Method(_sparse("random"), 1e-3),
    "magnitude_smallest": Method(_sparse("magnitude_smallest"), 1e-3),
    "fisher": Method(_sparse("fisher"), 3e-4),
    "s2ft": Method(_ours(S2FTConfig), 1e-3),
    "lora-mlp": Method(_lora_on_mlp, 3e-4),
    "magnitude": Method(_sparse("magnitude"), 1e-3),
    "principal": Method(_sparse("principal"), 1e-3),
    "shira": Method(_shira, 1e-3),
    "super-tuning": Method(_super_tuning, 1e-3),
    "residual": Method(_sparse("residual"), 1e-3),
    "accumulated_gradient": Method(_dynamic("accumulated_gradient", 3), 3e-4),
    "blocks": Method(_sparse("random", granularity="block"), 1e-3),
    "blocks-fisher": Method(_sparse("fisher", granularity="block"), 3e-4),
    "sara": Method(_ours(SaRAConfig), 1e-3),
    "gradient": Method(_sparse("gradient"), 3e-4),
    "sltrain": Method(_sltrain, 3e-4),
    "sora": Method(_sora, 3e-4),
    "snella": Method(_snell(kernel="mixed", target_sparsity=0.9), 3e-3),
    "snell": Method(_snell(sparsity=0.9), 3e-3),
    "rslora": Method(_lora(use_rslora=True), 3e-4),
    "dora": Method(_lora(use_dora=True), 3e-4),
    "momentum": Method(_dynamic("momentum", 3), 3e-4),
    "rigl": Method(_dynamic("rigl", 1), 3e-4),
    "set": Method(_dynamic("set", 0), 1e-3),
    "movement": Method(_sparse("movement"), 3e-4),
    "gallop": Method(_sparse("gallop"), 3e-4),
    "lift": Method(_lift, 1e-3),
    "wanda": Method(_sparse("wanda"), 1e-3),
    "s2ft-product": Method(_ours(S2FTConfig, selection="product"), 1e-3),
    "s2ft-uncoupled": Method(_ours(S2FTConfig, coupled=False), 1e-3),
    "monarch": Method(_monarch, 1e-3),
    "sparse-ift": Method(_sparse_ift, 1e-3),
    "doped": Method(_doped, 1e-3),
    "sst": Method(_sst, 1e-3),
    **{f"auto-{name}": _automatic(SparseConfig, selection=name) for name in AUTOMATIC},
    "auto-s2ft": _automatic(S2FTConfig),
}


PROCEDURES: dict[str, Callable[[Around], list[Procedure]]] = {
    "ist": lambda data: [LayerSampling("ist", batches=data.held)],
    "random-layers": lambda data: [LayerSampling("random")],
    "split": lambda data: [SplitMerge(4, parameters="lora_B|values")],
    "rates": lambda data: [ImportanceLearningRate(data.old, every=20)],
    "anchor": lambda data: [FisherAnchor(data.old)],
    "mask": lambda data: [GradientMask(0.8)],
}
METHODS |= {
    f"{name}{AROUND}{around}": replace(METHODS[name], procedures=procedures)
    for name in (LORA, DEFAULT)
    for around, procedures in PROCEDURES.items()
}


def adapted(name: str, at: Setting, batches: list[Batch]) -> nn.Module:
    """The setting's model, changed in place: with an adapter, or all its weights trained.

    Args:
        name: a key of ``METHODS``.
        at: the setting.
        batches: training data for criteria that need it.
    """
    make = METHODS[name].make
    if make is None:
        return at.model.requires_grad_(True)
    config = make(at)
    if getattr(config, "selection_needs", "none") in ("gradient", "activation"):
        config = select_support(at.model, config, batches)
    return get_peft_model(at.model, config)
