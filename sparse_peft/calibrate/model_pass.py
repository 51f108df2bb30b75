"""Running a model over batches to look at it: nothing of the model is different afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch ``requires_grad`` of every parameter off, and back to what it was, also after an exception."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def with_last(batches: Iterable) -> Iterator[tuple[Any, bool]]:
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


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it, in mappings, lists and tuples, on the device; other objects as they are."""
    if callable(getattr(batch, "to", None)):  # tensors, and transformers' own mappings
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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


def each_batch(model: nn.Module, batches: Iterable, use: Callable[[Any, bool], str | None]) -> None:
    """Call ``use(batch, is_last)`` for each batch on the model's device; what it returns is why it skipped the batch.

    Raises:
        ValueError: no batches, or all were skipped.
    """
    device = device_of(model)
    total = used = 0
    for batch, is_last in with_last(batches):
        fault = use(to_device(batch, device), is_last)
        if fault is None:
            used += 1
        else:
            warnings.warn(f"batch {total} is skipped: {fault}", RuntimeWarning, stacklevel=4)
        total += 1
    if total == 0:
        raise ValueError("no batches to look at; the data is empty, or an iterator already used up")
    if used == 0:
        raise ValueError(
            f"all {total} batches were skipped because of NaN or infinite numbers; check the data, and try float32 or "
            "bfloat16 where the model runs in float16"
        )


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear layer, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def tiles(length: int, bytes_per_item: int, limit: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of ``range(length)`` whose items take at most ``limit`` bytes; each holds at least one."""
    step = max(1, limit // max(1, bytes_per_item))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def transposed_product(left: Tensor, right: Tensor, limit: int) -> Tensor:
    """``left.T @ right`` in at least float32; other types are cast a tile of tokens, of ``limit`` bytes, at a time."""
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    if left.dtype == right.dtype == dtype:
        return left.t() @ right
    product = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for start, stop in tiles(left.shape[0], max(left.shape[1], right.shape[1]) * dtype.itemsize, limit):
        product.addmm_(left[start:stop].to(dtype).t(), right[start:stop].to(dtype))
    return product


def token_mask(batch: Any) -> Tensor | None:
    """``(batch, seq)`` which tokens of a batch count, as booleans; None where it does not say so for each token."""
    given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
