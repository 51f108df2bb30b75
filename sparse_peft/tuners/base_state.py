"""The trained state of one adapter in one layer, whatever the method."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from ..ops import Combination
from ..support import Support
from .files.checks import check_dtype, check_values
from .forms import Forms, StateSizes

UNSET = -1
"""First number of an integer buffer that is to be filled: by a file, or at first use."""


class TrainedState(Forms, nn.Module, ABC):
    """What one adapter trains in one layer.

    A module of its own, not bare parameters: TRL copies its reference adapter by names that contain ``.default.``,
    and FSDP and ZeRO hook modules. No parameter is called ``weight``, which FSDP1 would wrap.

    Its *values* are the parameter that the method watches during training; they are kept in the dtype they are
    trained in. ``value_name`` is the parameter's name.

    Args:
        name: the layer's name, for error messages.
    """

    value_name: ClassVar[str] = "values"
    full_precision: ClassVar[frozenset[str]] = frozenset()  # tensors that ``save_dtype`` does not round
    always_float32: ClassVar[frozenset[str]] = frozenset()  # parameters that no cast of the model makes narrower
    position_names: tuple[str, ...] = ()  # of all buffers that positions may lie in, in memory and in a file
    combinations: ClassVar[tuple[str, ...]] = ()  # the combinations of several adapters to one
    why_these_combinations: ClassVar[str] = ""  # for the error that refuses others
    trained_dtype: torch.dtype
    changes: int = 0  # of its tensors, in ways that torch may not count: by optimizers, by loading
    backwards: int = 0  # backward passes that reached it
    is_stepped: bool = False  # whether an optimizer is known to have its parameters

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def watched(self) -> nn.Parameter:
        """The parameter that the method watches."""
        return self.own_parameters[self.value_name]

    @property
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The state's parameters by name, without those of modules in it."""
        return {name: parameter for name, parameter in self._parameters.items() if parameter is not None}

    @property
    def own_buffers(self) -> dict[str, Tensor]:
        """The state's buffers by name, without those of modules in it."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def entry_support(self) -> Support | None:
        """The positions of the watched parameter's numbers, where each trains one entry of the weight.

        None where they are rows, columns, factors or tables; optimizers then treat the parameter as any other.
        """
        return None

    @abstractmethod
    def randomise(self) -> None:
        """Draw random values in place of those that start as the base model, for tests."""

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        """The states of several adapters in one layer made into one: its tensors as they lie in a file, float32.

        Args:
            states: of the adapters that have the layer, with their positions known.
            weights: one number for each.
            how: one of ``combinations``.

        Raises:
            ValueError: the states have no such combination.
        """
        raise ValueError(f"combination_type={how.combination_type!r}: {cls.__name__} has no combinations")

    def combines_with(self, other: TrainedState) -> bool:
        """Whether two states can become one of their own kind; those that cannot may combine as entries."""
        return type(self) is type(other) and bool(self.combinations)

    @property
    def stamped(self) -> Iterable[str]:
        """Names of the parameters that cached results are made from."""
        return self._parameters

    def kept_tensors(self) -> Iterator[Tensor]:
        """All tensors that it keeps in memory while the adapter is served."""
        yield from self.parameters()
        yield from self.buffers()

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        """Sizes for plans; parameters and buffers may be on the meta device.

        Args:
            save_dtype: of the values on disk.
        """
        return StateSizes(
            parameters=tuple(parameter.numel() for parameter in self.parameters()),
            position_bytes=sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()),
            file_bytes=self._file_bytes(save_dtype),
        )

    def _file_bytes(self, save_dtype: torch.dtype) -> int:
        total = sum(length * kind.itemsize for length, kind in self.position_layout().values())
        for name, parameter in self.named_parameters(recurse=False):
            kept = name in self.full_precision or parameter.dtype != torch.float32
            total += parameter.numel() * (parameter.dtype if kept else save_dtype).itemsize
        return total

    # ------------------------------------------------------------------ dtype

    def keep_dtype(self) -> None:
        """Note the values' dtype as the one they are trained in."""
        self.trained_dtype = self.watched.dtype

    def restore_dtype(self) -> None:
        """Undo a cast behind our back: TRL rounds trainable parameters to bfloat16 where the base is quantised.

        Small updates of bfloat16 values are lost. The parameter stays the same object, so an optimizer that was built
        on it goes on; under DDP its buckets have the other dtype already, so there it is only reported.
        """
        values = self.watched
        if values.dtype == self.trained_dtype:
            return
        sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
        warnings.warn(
            f"the {self.value_name} of the adapter in layer {self.name} (and maybe others) were cast to "
            f"{values.dtype} after the adapter was made; they are trained in {self.trained_dtype}: "
            + ("cast them back before the model is wrapped for distributed training." if sharded else "cast back."),
            stacklevel=2,
        )
        if sharded:
            self.keep_dtype()
        else:
            values.data = values.data.to(self.trained_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self.own_parameters[name].data for name in self.always_float32}
        module = super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self.own_parameters[name]
            if parameter.dtype in (torch.float16, torch.bfloat16) and data.device.type != "meta":
                parameter.data = data.to(parameter.device, torch.float32)
        self.keep_dtype()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.changes += 1
        super()._load_from_state_dict(*args, **kwargs)

    # ------------------------------------------------------------------ files

    def position_layout(self) -> dict[str, tuple[int, torch.dtype]]:
        """``{tensor name: (length, dtype)}`` of what ``file_tensors`` will have, known before positions are."""
        return {name: (math.prod(shape), dtype) for name, (shape, dtype) in self.file_buffers().items()}

    def file_buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """``{tensor name: (shape, dtype)}`` of the buffers that a file must have for this layer."""
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._stored_buffers().items()}

    def file_tensors(self) -> dict[str, Tensor]:
        """What takes the place of the buffers of ``position_names`` in a file; by default these."""
        return self._stored_buffers()

    def _stored_buffers(self) -> dict[str, Tensor]:
        buffers = self.own_buffers
        kept = {name: buffers[name] for name in self.position_names if name in buffers}
        return {name: tensor for name, tensor in kept.items() if name not in self._non_persistent_buffers_set}

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check what a file has for this layer, and give what it has in ``position_names`` as the buffers' next.

        Args:
            positions: the tensors of ``position_names`` that the file has.
            parameters: the parameters that it has.

        Raises:
            ValueError: tensors are missing, contradict each other or the weight's shape, or are not finite.
        """
        self._check_parameters(self._parameters, parameters)
        expected = self.file_buffers()
        self._required(**{name: positions.get(name) for name in expected})
        for name, tensor in positions.items():
            if name not in expected:
                self._refuse(name, tensor, "none")
            shape, dtype = expected[name]
            if dtype.is_floating_point:
                self._check_floats(name, tensor, shape)
            elif tensor.dtype != dtype or tuple(tensor.shape) != shape:
                self._refuse(name, tensor, f"{dtype} of shape {shape}")
        return positions

    def _check_parameters(self, names: Iterable[str], parameters: dict[str, Tensor]) -> None:
        own = self.own_parameters
        for name, tensor in self._required(**{name: parameters.get(name) for name in names}).items():
            self._check_floats(name, tensor, tuple(own[name].shape))

    def _check_floats(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        check_dtype(tensor, name, self.name)
        if tuple(tensor.shape) != shape:
            self._refuse(name, tensor, f"floats of shape {shape}")
        check_values(tensor, f"{self.name} ({name})", "load")

    def _refuse(self, name: str, tensor: Tensor, expected: str) -> NoReturn:
        raise ValueError(
            f"layer {self.name}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} in the adapter file, where "
            f"this model's adapter has {expected}; load it with the adapter_config.json it was saved with, on the "
            "base model it was made for"
        )

    def _required(self, **tensors: Tensor | None) -> dict[str, Tensor]:
        """The tensors, by name.

        Raises:
            ValueError: the file has not all of them.
        """
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        missing = [name for name in tensors if name not in found]
        if missing:
            raise ValueError(
                f"the adapter file has no {' and '.join(missing)} for layer {self.name}; it was saved for other "
                "target_modules, or it is damaged: load it with the adapter_config.json it was saved with"
            )
        return found
