"""Running a model over batches, for statistics: the model is unchanged afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .partitions import gathered_by_layer


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of every parameter to False, and restore it afterwards, also after an exception."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device.

    Args:
        batch: tensors in nested mappings, lists and tuples; other objects are returned as they are.
        device: of the result.
    """
    if callable(getattr(batch, "to", None)):  # tensors, and transformers' own mappings
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each batch, and whether it is the last."""
    iterator = iter(batches)
    try:
        held = next(iterator)
    except StopIteration:
        return
    for batch in iterator:
        yield held, False
        held = batch
    yield held, True


def run_model(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)``.

    Raises:
        TypeError: the batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch of type {type(batch).__name__} cannot be passed as model(**batch); give batches that are dicts, "
            "or loss_fn=lambda model, batch: ..."
        )
    return model(**batch)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """``model(**batch).loss``.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: the model returned no loss.
    """
    output = run_model(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch with {', '.join(map(str, batch))}; add labels to "
            "the batches, or give loss_fn=lambda model, batch: ..."
        )
    return loss


@dataclass(frozen=True)
class ModelPass:
    """One pass of a model over batches.

    Attributes:
        model: the base model, without adapters. It runs in its current mode (training or evaluation).
        batches: iterated once; their tensors are moved to the model's device. A batch is a micro-batch.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default ``model(**batch).loss``. Where no gradients are
            needed, its result is not used, and the default is ``model(**batch)``.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Any] | None = None

    def loss(self, batch: Any) -> Any:
        """The loss of a batch."""
        return (self.loss_fn or model_loss)(self.model, batch)

    def forward(self, batch: Any) -> Any:
        """Run the model on a batch."""
        return (self.loss_fn or run_model)(self.model, batch)

    def each_batch(self, use: Callable[[Any, bool], str | None]) -> None:
        """Call a function for each batch.

        Args:
            use: ``use(batch, is_last)``, for a batch on the model's device; returns the reason to skip the batch, or
                None.

        Warns:
            RuntimeWarning: a skipped batch.

        Raises:
            ValueError: no batches, or all were skipped.
        """
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        total = used = 0
        with gathered_by_layer(self.model) as gathering:
            for batch, is_last in _with_last(self.batches):
                fault = use(to_device(batch, device), is_last)
                gathering.release_all()
                if fault is None:
                    used += 1
                else:
                    warnings.warn(f"batch {total} is skipped: {fault}", RuntimeWarning, stacklevel=4)
                total += 1
        if total == 0:
            raise ValueError("no batches to look at; the data is empty, or an iterator already used up")
        if used == 0:
            raise ValueError(
                f"all {total} batches were skipped because of NaN or infinite numbers; check the data, and try "
                "float32 or bfloat16 where the model runs in float16"
            )


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear layer, passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def token_mask(batch: Any) -> Tensor | None:
    """The batch's attention mask ``(batch, seq)`` as booleans; None if it has none of two dimensions."""
    given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
