"""What an adapter and the model below it take, layer by layer, counted on a model of the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..support import index_dtype
from ..tuners.base_layer import TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.delta import Delta
from ..tuners.low_rank import LowRankState
from ..tuners.s2ft.delta import ChannelDelta

OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
"""Optimizers whose state is counted: AdamW, AdamW of bitsandbytes in 8 bits, and SGD without momentum."""
# bitsandbytes: two states of a byte each, with a float32 scale for each block of 256; small tensors stay in float32
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096


def optimizer_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """State of an optimizer for tensors of these numbers of elements, in bytes."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return sum(8 * size for size in sizes)
    return sum(8 * size if size < SMALLEST_8BIT else 2 * size + 2 * 4 * math.ceil(size / BLOCK_8BIT) for size in sizes)


@dataclass(frozen=True)
class BaseFormat:
    """How the frozen weights of a model lie in memory.

    Attributes:
        name: one of [`FORMATS`][sparse_peft.planning.FORMATS].
        dtype: that layers compute in, and that what is not quantised has.
        bytes_per_weight: of a linear layer's weight, with its scales.
    """

    name: str
    dtype: torch.dtype
    bytes_per_weight: float

    @property
    def is_quantised(self) -> bool:
        return self.bytes_per_weight < self.dtype.itemsize


# nf4: a float32 scale for 64 weights, or (double quantisation) a byte for 64 and a float32 for 256 of those
FORMATS = {
    "float32": BaseFormat("float32", torch.float32, 4),
    "bfloat16": BaseFormat("bfloat16", torch.bfloat16, 2),
    "float16": BaseFormat("float16", torch.float16, 2),
    "int8": BaseFormat("int8", torch.bfloat16, 1),
    "nf4": BaseFormat("nf4", torch.bfloat16, 0.5 + 4 / 64),
    "nf4-double": BaseFormat("nf4-double", torch.bfloat16, 0.5 + 1 / 64 + 4 / (64 * 256)),
}
"""Formats of the frozen weights: ``float32``, ``bfloat16``, ``float16``, ``int8``, ``nf4`` and ``nf4-double``."""


def frozen_bytes(model: nn.Module, form: BaseFormat) -> int:
    """What the parameters and buffers of a model take that are no adapter's and do not train."""
    skip = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    packed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not skip}
    own = {id(tensor) for layer in BaseSparseModel.sparse_layers(model) for tensor in _tensors(layer.deltas)}
    total = 0.0
    for tensor in dict.fromkeys(_tensors(model)):
        if id(tensor) in own or tensor.requires_grad:
            continue
        is_packed = form.is_quantised and id(tensor) in packed
        total += tensor.numel() * (form.bytes_per_weight if is_packed else tensor.element_size())
    return math.ceil(total)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@dataclass(frozen=True)
class LayerSize:
    """What one layer's adapter has.

    Attributes:
        name: the layer's.
        shape: ``(rows, cols)`` of its stored weight.
        parameters: numbers of elements of the trained tensors.
        entries: trained entries of the weight; 0 without a sparse part.
        rank: of the low-rank part; 0 without.
        channels: ``(dim, count)`` where whole rows (0) or columns (1) train.
        in_dim: which dimension of the weight is the input's.
        is_known: whether it is entries, channels or ranks that train, whose work is known.
        position_bytes: positions in memory, and the weights' own entries that are kept beside the values.
        file_bytes: of its tensors in a file.
    """

    name: str
    shape: tuple[int, int]
    parameters: tuple[int, ...]
    entries: int
    rank: int
    channels: tuple[int, int] | None
    in_dim: int
    is_known: bool
    position_bytes: int
    file_bytes: int

    @property
    def trained(self) -> int:
        return sum(self.parameters)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """The layer's place in its block: its name behind the last number."""
        parts = self.name.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        return ".".join(parts[numbers[-1] + 1 :]) if numbers else self.name


def _position_bytes(state: TrainedState, kept_itemsize: int) -> int:
    if not isinstance(state, Delta):
        return sum(buffer.numel() * buffer.element_size() for buffer in state.buffers())
    entries = state.values.numel()
    if isinstance(state, ChannelDelta):
        return 4 * state.count + kept_itemsize * entries
    # flat positions, and the columns and row pointers of their compressed sparse rows
    return entries * (index_dtype(state.shape).itemsize + 4 + kept_itemsize) + 4 * (state.shape[0] + 1)


def _file_bytes(state: TrainedState, save_dtype: torch.dtype) -> int:
    total = sum(length * kind.itemsize for length, kind in state.position_layout().values())
    for name, parameter in state.named_parameters(recurse=False):
        kind = parameter.dtype if name in state.full_precision or parameter.dtype != torch.float32 else save_dtype
        total += parameter.numel() * kind.itemsize
    return total


def layer_sizes(model: nn.Module, config, adapter: str, form: BaseFormat) -> list[LayerSize]:
    """Every adapted layer's, in the model's order."""
    found = []
    resident = getattr(config, "resident", False) and not form.is_quantised
    layers: Iterator[TunerLayer] = BaseSparseModel.sparse_layers(model)
    for layer in (layer for layer in layers if adapter in layer.deltas):
        state: TrainedState = layer.deltas[adapter]
        is_sparse = isinstance(state, Delta)
        found.append(
            LayerSize(
                name=layer.name,
                shape=layer.stored_shape,
                parameters=tuple(parameter.numel() for parameter in state.parameters()),
                entries=state.values.numel() if is_sparse else 0,
                rank=state.rank if isinstance(state, LowRankState) else 0,
                channels=(state.dim, state.count) if isinstance(state, ChannelDelta) else None,
                in_dim=layer.product.in_dim,
                is_known=is_sparse or isinstance(state, LowRankState),
                position_bytes=_position_bytes(state, form.dtype.itemsize if resident else 0),
                file_bytes=_file_bytes(state, getattr(torch, config.save_dtype)),
            )
        )
    return found


@dataclass(frozen=True)
class LayerKind:
    """Layers of one place in the blocks and of one shape, together; bytes are of all of them.

    Attributes:
        kind: the layers' name in their block.
        layers: how many there are.
        shape: ``[rows, cols]`` of each stored weight.
        trained: trained parameters.
        entries: trained entries of the weights.
        ranks: ranks of low-rank parts.
        channels: whole channels.
        density: trained parameters over weights.
        adapter_bytes: of the values, in float32.
        gradient_bytes: of their gradients.
        optimizer_bytes: of the optimizer's state.
        file_bytes: of the saved tensors.
    """

    kind: str
    layers: int
    shape: list[int]
    trained: int
    entries: int
    ranks: int
    channels: int
    density: float
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int


def kinds_of(sizes: list[LayerSize], optimizer: str) -> list[LayerKind]:
    groups: dict[tuple, list[LayerSize]] = {}
    for size in sizes:
        groups.setdefault((size.kind, size.shape), []).append(size)
    kinds = []
    for (kind, shape), members in groups.items():
        trained = sum(size.trained for size in members)
        kinds.append(
            LayerKind(
                kind=kind,
                layers=len(members),
                shape=list(shape),
                trained=trained,
                entries=sum(size.entries for size in members),
                ranks=sum(size.rank for size in members),
                channels=sum(size.channels[1] for size in members if size.channels),
                density=trained / sum(size.weights for size in members),
                adapter_bytes=4 * trained,
                gradient_bytes=4 * trained,
                optimizer_bytes=optimizer_bytes(optimizer, [n for size in members for n in size.parameters]),
                file_bytes=sum(size.file_bytes for size in members),
            )
        )
    return kinds
