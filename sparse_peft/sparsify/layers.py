"""The layers whose weights are pruned."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibrate.layer_view import LayerView
from ..calibrate.weights import check_no_shared_weights
from ..support.budget import matches_layer

Names = str | list[str] | None


def layers_to_prune(
    model: nn.Module, target_modules: Names = None, exclude_modules: Names = None
) -> dict[str, LayerView]:
    """The linear layers of a model that match, in the model's order.

    Args:
        model: without adapters.
        target_modules: names, suffixes of names or regular expressions of layers. By default all linear layers except
            the output head; embeddings are no linear layers.
        exclude_modules: likewise, of layers to leave out.

    Raises:
        TypeError: a quantised weight.
        ValueError: a model with adapters, no layer, or a weight that something else in the model has too.
    """
    check_without_adapters(model)
    wanted, unwanted = _patterns(target_modules), _patterns(exclude_modules) or []
    heads = set(_heads(model)) if wanted is None else set()
    found: dict[str, LayerView] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name in heads:
            continue
        is_wanted = wanted is None or any(matches_layer(pattern, name) for pattern in wanted)
        if is_wanted and not any(matches_layer(pattern, name) for pattern in unwanted):
            found[name] = _checked_view(name, module)
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r}, exclude_modules={exclude_modules!r}: no linear layer of "
            f"{type(model).__name__} matches; give names such as ['q_proj'], or leave both out for all linear layers"
        )
    check_no_shared_weights(model, {name: layer.weight() for name, layer in found.items()})
    return found


def rows_of(layer: LayerView, stored: Tensor) -> Tensor:
    """A tensor of the stored weight's layout as ``(outputs, inputs)``, without a copy; and the reverse."""
    return stored if layer.in_dim == 1 else stored.t()


def shape_of(layer: LayerView) -> tuple[int, int]:
    """``(outputs, inputs)``."""
    rows, cols = layer.shape
    return (rows, cols) if layer.in_dim == 1 else (cols, rows)


def check_without_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters, which may have entries of theirs in its weights.

    Raises:
        ValueError: names the first layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"layer {name} has adapters; prune the base model before it gets adapters: take it from "
                "model.unload(), or merge them by model.merge_and_unload()"
            )


def _patterns(names: Names) -> list[str] | None:
    return [names] if isinstance(names, str) else names


def _heads(model: nn.Module) -> Iterator[str]:
    """Names of the output head: what transformers calls so, and weights that are an embedding's."""
    own = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        is_tied = id(getattr(module, "weight", None)) in embeddings
        if (own is not None and module is own) or is_tied or name in SEQ_CLS_HEAD_NAMES:
            yield name


def _checked_view(name: str, module: nn.Linear | Conv1D) -> LayerView:
    weight = module.weight
    if not weight.is_floating_point() or type(module) not in (
        nn.Linear,
        Conv1D,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    ):
        raise TypeError(
            f"layer {name} is a {type(module).__name__} with weights of {weight.dtype}; prune a model in float32, "
            "bfloat16 or float16 and quantise it afterwards, or leave the layer out with exclude_modules"
        )
    if weight.is_meta:
        raise ValueError(f"layer {name}: its weight is on the meta device and has no values; load the model first")
    return LayerView.of(name, module)
