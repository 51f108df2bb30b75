"""Memory of an adapter and its base model, layer by layer, counted on a model of the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import Compression, LinearProduct
from ..support import count_of_lines
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_layer import TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.forms import StateSizes
from ..tuners.traversal import modules_beside_adapters

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
    """Format of a model's frozen weights in memory.

    Attributes:
        name: one of [`FORMATS`][sparse_peft.planning.FORMATS].
        dtype: of the layers' computation, and of parameters that are not quantised.
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
    """Memory of a model's parameters and buffers that do not train and are no adapter's."""
    head = getattr(model, "get_output_embeddings", None)
    skip = head() if callable(head) else None
    packed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not skip}
    states = (state for layer in BaseSparseModel.sparse_layers(model) for state in layer.deltas.values())
    own = {id(tensor) for state in states for tensor in _tensors(state)}
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
    """Sizes of one layer and of its adapter.

    Attributes:
        name: the layer's.
        shape: ``(rows, cols)`` of its stored weight.
        in_dim: which dimension of the weight is the input's.
        state: sizes of the adapter's state.
        kept_bytes: the weight's own entries that are kept beside the values.
        tied: names of the other layers that have the weight.
        compression: rounding of the input that is kept for the entries.
        features: of the input, those that are kept for the entries; None for all.
    """

    name: str
    shape: tuple[int, int]
    in_dim: int
    state: StateSizes
    kept_bytes: int
    tied: tuple[str, ...] = ()
    compression: Compression | None = None
    features: int | None = None

    @property
    def entries(self) -> int:
        """Trained entries of the weight; 0 without a sparse part."""
        return self.state.entries or 0

    @property
    def rank(self) -> int:
        """Of the low-rank part; 0 without."""
        return self.state.rank or 0

    @property
    def is_known(self) -> bool:
        """Whether entries, channels or ranks train, whose work is known."""
        return self.state.entries is not None or self.state.rank is not None

    @property
    def position_bytes(self) -> int:
        """Positions in memory, and the weight's own entries that are kept."""
        return self.state.position_bytes + self.kept_bytes

    @property
    def trained(self) -> int:
        return sum(self.state.parameters)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """The layer's place in its block: its name behind the last number."""
        parts = self.name.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        return ".".join(parts[numbers[-1] + 1 :]) if numbers else self.name


def layer_sizes(model: nn.Module, config: BaseSparseConfig, adapter: str, form: BaseFormat) -> list[LayerSize]:
    """Every adapted layer's, in the model's order."""
    found = []
    layers: Iterator[TunerLayer] = BaseSparseModel.sparse_layers(model)
    for layer in (layer for layer in layers if adapter in layer.deltas):
        state: TrainedState = layer.deltas[adapter]
        sizes = state.sizes(getattr(torch, config.save_dtype))
        holds = layer.resident is True and not form.is_quantised
        kept = form.dtype.itemsize * (sizes.entries or 0) if holds else 0
        in_dim, tied = layer.product.in_dim, tuple(_tied_to(layer, model))
        state_compression = getattr(state, "compression", None)
        columns, features = getattr(config, "columns", None), None
        if columns is not None and isinstance(layer.product, LinearProduct):
            features = count_of_lines(layer.stored_shape, sizes.entries or 0, in_dim, columns)
        found.append(LayerSize(layer.name, layer.stored_shape, in_dim, sizes, kept, tied, state_compression, features))
    return found


def _tied_to(layer: TunerLayer, model: nn.Module) -> Iterator[str]:
    for module in modules_beside_adapters(model):
        if isinstance(module, TunerLayer) and module.owner is layer and module is not layer:
            yield module.name


def trains_entries(sizes: Iterable[LayerSize]) -> bool:
    """Whether single entries train in any layer, whose gradients are sampled or cut out of panels."""
    return any(size.entries and not size.state.channels for size in sizes)


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
                channels=sum(size.state.channels[1] for size in members if size.state.channels),
                density=trained / sum(size.weights for size in members),
                adapter_bytes=4 * trained,
                gradient_bytes=4 * trained,
                optimizer_bytes=optimizer_bytes(optimizer, [n for size in members for n in size.state.parameters]),
                file_bytes=sum(size.state.file_bytes for size in members),
            )
        )
    return kinds
