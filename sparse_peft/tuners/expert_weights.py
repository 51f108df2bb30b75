"""Fused experts as target layers: bare parameters ``(experts, rows, cols)`` of the module that computes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

# How transformers marks a module of experts, besides the class's name.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class ExpertWeight(nn.Module):
    """One expert parameter as a base layer: it owns no parameter, and reads the one of its holder.

    Args:
        holder: the module that has the parameter.
        parameter: its name there.

    Attributes:
        experts: number of experts.
        in_dim: the dimension of input features of an expert's ``(rows, cols)``: 1 for ``(out, in)``.
        features: ``(inputs, outputs)`` of one expert.
    """

    def __init__(self, holder: nn.Module, parameter: str):
        super().__init__()
        self.parameter = parameter
        self.refer_to(holder)
        self.experts, rows, cols = self.weight.shape
        self.in_dim = 0 if getattr(holder, "is_transposed", False) or _multiplies_from_the_right(holder) else 1
        self.features = (cols, rows) if self.in_dim == 1 else (rows, cols)

    def refer_to(self, holder: nn.Module) -> None:
        """Read the parameter of this module from now on."""
        self.__dict__["_holder"] = (holder,)  # in a tuple: it is no submodule

    @property
    def holder(self) -> nn.Module:
        """The module that has the parameter, and computes with it."""
        return self.__dict__["_holder"][0]

    @property
    def weight(self) -> Tensor:
        """``(experts, rows, cols)``."""
        return self.by_name["weight"]

    @property
    def bias(self) -> None:
        """Experts' biases are parameters of the holder."""
        return

    @property
    def by_name(self) -> Mapping[str, Any]:
        """The parameter under the name that a layer has its own by."""
        return _Renamed(self.holder._parameters, self.parameter)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """``(experts * rows, cols)``: the experts' matrices one above the other."""
        experts, rows, cols = self.weight.shape
        return experts * rows, cols

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_holder"}

    def extra_repr(self) -> str:
        return f"{self.parameter}, experts={self.experts}, in={self.features[0]}, out={self.features[1]}"


class _Renamed(Mapping[str, Any]):
    """A mapping with one key ``"weight"``, which is read from another mapping under another name."""

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values_by_name, self.name = values, name

    def __getitem__(self, key: str) -> Any:
        if key != "weight":
            raise KeyError(key)
        return self.values_by_name[self.name]

    def get(self, key: str, default: Any = None) -> Any:
        # asked in every pass; the inherited one takes several times as long
        return self.values_by_name.get(self.name, default) if key == "weight" else default

    def __iter__(self) -> Iterator[str]:
        return iter(("weight",))

    def __len__(self) -> int:
        return 1


def _multiplies_from_the_right(holder: nn.Module) -> bool:
    """Whether experts are stored ``(in, out)`` by a class without transformers' decorator, as Llama 4's."""
    return not hasattr(type(holder), "_apply_gate") and hasattr(holder, "expert_dim")


def holds_experts(module: nn.Module) -> bool:
    """Whether bare parameters of three dimensions in a module are those of experts."""
    return _counts_experts(module) and bool(expert_parameters(module))


def _counts_experts(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), int) for name in _COUNTS)


def parametrised_experts(model: nn.Module) -> list[str]:
    """The names of experts' parameters that are computed from others at each use."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if is_parametrized(module) and _counts_experts(module)
        for parameter in cast("nn.ModuleDict", module.parametrizations)
    ]


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The bare parameters of three dimensions that a module has itself."""
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and name not in ("weight", "bias")
    }
