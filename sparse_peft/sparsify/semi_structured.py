"""2:4 weights in the form that the tensor cores of NVIDIA GPUs multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from ..calibrate.weights import base_of
from .files import masks_for
from .masks import masks_of
from .replaced import ReplacedLinear, weight_name_of

_GROUP, _MOST = 4, 2


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> list[str]:
    """Replace a model's 2:4 weights by torch's semi-structured tensors, for inference on CUDA.

    A weight then takes 9/16 of its memory in half precision, and ``nn.Linear`` multiplies it by sparse kernels. Gains
    depend on the GPU and on shapes: measure them. The weights can no longer be trained, saved or restored; keep
    the file of [`save_sparse`][sparse_peft.sparsify.save_sparse].

    Args:
        model: pruned by ``"2:4"``, in float16 or bfloat16 on a CUDA device of compute capability 8.0 or later.

    Returns:
        Names of the changed layers.

    Raises:
        ValueError: a layer without the pattern, on another device, or of a type or shape that torch has no kernel
            for. Layers before it may be changed where torch refuses the shape; otherwise none is.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune, to_semi_structured
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = prune(model, "2:4", progress=False)
        >>> if torch.cuda.is_available():
        ...     assert to_semi_structured(model.to("cuda", torch.bfloat16)) == ["0"]
    """
    if (recorded := masks_of(model)) is not None and recorded.removed:
        raise ValueError("the model keeps its original weights (restorable=True); prune it without them")
    weights = masks_for(model).weights_in(model)
    for name, weight in weights.items():
        _check(name, base_of(model.get_submodule(name)), weight)
    for name, weight in weights.items():
        try:
            made = to_sparse_semi_structured(weight)
        except RuntimeError as error:
            raise ValueError(f"layer {name}: {error}; leave it out of pruning with exclude_modules") from error
        module = base_of(model.get_submodule(name))
        setattr(module, weight_name_of(module), nn.Parameter(made, requires_grad=False))
    return list(weights)


def _check(name: str, module: nn.Module, weight: Tensor) -> None:
    if not isinstance(module.original if isinstance(module, ReplacedLinear) else module, nn.Linear):
        raise ValueError(
            f"layer {name} is a {type(module).__name__}, which multiplies its weight transposed; nn.Linear is expected"
        )
    inputs = weight.shape[1]
    most = _MOST + 1 if inputs % _GROUP else int((weight.view(-1, _GROUP) != 0).sum(1).max())
    if most > _MOST:
        raise ValueError(f"layer {name} does not have 2 of every 4 inputs at zero; prune(model, '2:4') it")
    if weight.device.type != "cuda":
        raise ValueError(
            f"layer {name} is on {weight.device}, and semi-structured kernels need a CUDA device; move the model "
            "there, or use save_sparse for a smaller file"
        )
