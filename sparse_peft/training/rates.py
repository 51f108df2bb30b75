"""Whether a run's learning rate suits the adapters that it trains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from ..tuners.base_config import BaseSparseConfig
from ..tuners.changes import stepped_by
from ..tuners.traversal import configs_of, tuner_layers

# From here on the run hardly learns, or diverges; less is a matter of the task.
TOO_FAR = 10


def suited_rates(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, float]]:
    """``{adapter: {"scale": ..., "recommended_rate": ...}}`` of the adapters that the optimizer trains.

    The scale is left out where a method has none; adapters without a known rate are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for name, config, _ in _trained(model, optimizer):
        if config.recommended_rate is not None:
            scale = getattr(config, "scale", None)
            found[name] = {} if scale is None else {"scale": float(scale)}
            found[name]["recommended_rate"] = config.recommended_rate
    return found


def check_rates(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn of a learning rate that is ten times too high or too low, and say what to set.

    Recommendations are for AdamW: optimizers that step by other numbers than a gradient's direction are not checked.
    """
    if "adam" not in type(getattr(optimizer, "stepped", optimizer)).__name__.lower():
        return
    for name, config, parameter in _trained(model, optimizer):
        suited = config.recommended_rate
        rate = peak_rate(optimizer, parameter)
        if suited is not None and rate and abs(math.log(rate / suited)) > math.log(TOO_FAR) - 1e-6:
            warnings.warn(_advice(name, config, rate, suited), UserWarning, stacklevel=4)


def _advice(name: str, config: BaseSparseConfig, rate: float, suited: float) -> str:
    how = f"{rate / suited:.3g} times" if rate > suited else f"1/{suited / rate:.3g} of"
    scale = getattr(config, "scale", None) if "scale" in config.__dataclass_fields__ else None
    cure = f"set the learning rate to {suited:.1e}"
    if scale is not None:
        cure += f", or make the adapter with scale={2.0 ** round(math.log2(scale * suited / rate)):g}"
    return f"adapter {name!r}: a learning rate of {rate:.1e} is {how} what suits its config with AdamW; {cure}"


def peak_rate(optimizer: Optimizer, parameter: Tensor) -> float:
    """The highest learning rate that a parameter is to have, whatever a scheduler's warmup begins with."""
    group = next(group for group in optimizer.param_groups if any(other is parameter for other in group["params"]))
    return max(float(group.get(name) or 0) for name in ("lr", "initial_lr", "max_lr"))


def _trained(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, BaseSparseConfig, Tensor]]:
    """``(name, config, a parameter)`` of each adapter of this package that the optimizer trains."""
    stepped = stepped_by(optimizer)
    layers = list(tuner_layers(model))
    for name, config in configs_of(model).items():
        watched = (layer.deltas[name].watched for layer in layers if name in layer.deltas)
        parameter = next((p for p in watched if p.requires_grad and id(p) in stepped), None)
        if isinstance(config, BaseSparseConfig) and parameter is not None:
            yield name, config, parameter
