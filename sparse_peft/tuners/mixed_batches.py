"""Batches whose inputs use several adapters: their names are handed to the layers for one call of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_layer import TunerLayer
from .expert_layer import ExpertsLayer
from .files.checks import BASE_ADAPTER
from .traversal import modules_beside_adapters, tuner_layers


@contextmanager
def mixed_batch(tuner: BaseTuner, names: list[str], beams: int) -> Iterator[None]:
    """Inside the block each layer gets the adapters of its inputs.

    Args:
        tuner: with the model and its adapters.
        names: an adapter for each of the model's inputs.
        beams: repetitions of each input by beam search.

    Raises:
        TypeError: no list of names.
        ValueError: the model trains, or does not have one of the adapters.
    """
    check_adapter_names(tuner, names)
    in_encoder = set(_repeated_later(tuner.model, beams))
    repeated = [name for name in names for _ in range(beams)]
    with ExitStack() as stack:
        for module in modules_beside_adapters(tuner):
            if isinstance(module, (TunerLayer, ExpertsLayer, AuxiliaryTrainingWrapper)):
                given = list(names) if module in in_encoder else repeated
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, given=given: (args, {**kwargs, "adapter_names": given}),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
        yield


def check_adapter_names(tuner: BaseTuner, names: list[str]) -> None:
    """Refuse names that no mixed batch can use; see ``mixed_batch``."""
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names={names!r}: a list with one adapter name for each input is expected")
    layers = list(tuner_layers(tuner))
    others = sorted(set(names) - {BASE_ADAPTER})
    unknown = [name for name in others if not any(name in layer.deltas for layer in layers)]
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _repeated_later(model: nn.Module, beams: int) -> Iterator[nn.Module]:
    """The encoder's modules: beam search repeats each input in the decoder, the encoder still sees it once."""
    get_encoder = getattr(model, "get_encoder", None)
    if beams > 1 and get_encoder is not None:
        encoder = get_encoder()
        if encoder is not model:
            yield from encoder.modules()
