"""What merging and unmerging over and over does to a bfloat16 model's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sparse_peft import S2FTConfig, SparseConfig

# Of the delta's root mean square relative to the weight's: what a short fine-tuning makes.
DELTA_SIZE = 0.02


@dataclass(frozen=True)
class Drift:
    """Entries of the target weights that differ from the base model's after so many cycles.

    Attributes:
        changed: their share.
        largest: the largest change relative to the weights' root mean square.
    """

    method: str
    cycles: int
    changed: float
    largest: float


def configs(rank: int, targets: str) -> dict[str, PeftConfig]:
    return {
        "lora": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets),
        "sparse": SparseConfig(r=rank, target_modules=targets),
        "s2ft": S2FTConfig(r=rank, target_modules=targets),
    }


def fill(model: PeftModel, seed: int) -> None:
    """Give the adapter values that make deltas of ``DELTA_SIZE``, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.to(parameter))
        for layer in layers_of(model):
            delta, weight = layer.get_delta_weight("default"), layer.get_base_layer().weight
            factor = DELTA_SIZE * rms(weight) / rms(delta)
            for parameter in scaled_parameters(layer):
                parameter.mul_(factor)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "get_delta_weight")]


def scaled_parameters(layer: nn.Module) -> list[Tensor]:
    """Those that the delta is proportional to: LoRA's B, or all values."""
    trained = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    return [value for name, value in trained.items() if "lora_A" not in name]


def rms(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight for layer in layers_of(model)]


def measure(base: nn.Module, method: str, config: PeftConfig, cycles: int, seed: int = 0) -> Drift:
    """Merge and unmerge an adapter of a copy of the model so many times, as reinforcement learning does for rollouts.

    The adapter has other values in every cycle, as training gives it: rounding repeats itself where they stay.

    Args:
        base: the model, in bfloat16.
        method: the row's name.
        config: its adapter.
        cycles: how often.
        seed: of the adapter's values.
    """
    model = get_peft_model(copy.deepcopy(base), config)
    # before the adapter is active: an active one's entries may lie in the base weight
    with model.disable_adapter():
        before = [weight.detach().clone() for weight in weights(model)]
    for cycle in range(cycles):
        fill(model, seed + cycle)
        model.merge_adapter()
        model.unmerge_adapter()
    with model.disable_adapter():
        return _compared(method, cycles, before, weights(model))


def _compared(method: str, cycles: int, before: list[Tensor], after: list[Tensor]) -> Drift:
    changed = sum(int((new != old).sum()) for new, old in zip(after, before, strict=True))
    total = sum(old.numel() for old in before)
    largest = max(
        float((new.float() - old.float()).abs().max()) / rms(old) for new, old in zip(after, before, strict=True)
    )
    return Drift(method, cycles, changed / total, largest)
