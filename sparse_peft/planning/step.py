"""Cost of one training step: peak memory and floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..ops import rounded_bytes
from .sizes import LayerSize
from .trace import Kept, LayerPass, Trace

GPU_SIZES = (8, 16, 24, 40, 48, 80, 141)
"""Memory of common GPUs, in GB."""
MEASURED_SIZE = 768  # of the matrices that a machine's speed is measured with


# The density from which gradients at single entries of a weight take as long as dense ones, by the weight's shape.
CrossoverOf = Callable[[tuple[int, int]], float]


@dataclass(frozen=True)
class Work:
    """Addition of one trained layer to a step of the frozen model.

    Attributes:
        keeps_input: whether its input lives until backward.
        own_copy: whether it keeps a copy, not the tensor that layers of the same input share.
        extra_bytes: of other tensors that it keeps.
        flops: in the time of a dense product's operations.
    """

    keeps_input: bool
    own_copy: bool
    extra_bytes: int
    flops: float


def low_rank_work(rank: int, sides: int, tokens: int, itemsize: int) -> Work:
    """Three products with two thin factors; a cast of the input, where computing is not in float32."""
    return Work(True, itemsize < 4, tokens * rank * itemsize, 6.0 * tokens * rank * sides)


def sparse_work(
    size: LayerSize, product: LayerPass, itemsize: int, crossover: CrossoverOf, checkpointing: bool = False
) -> Work:
    """Of a layer of one of this package's methods."""
    tokens = product.tokens
    keeps, own, extra, flops = False, False, size.state.formed_bytes, 0.0
    if size.state.channels is not None:
        dim, _ = size.state.channels
        if dim == size.in_dim:
            extra += tokens * (size.entries // size.shape[1 - dim]) * itemsize
        else:
            keeps = True
        flops += 2.0 * tokens * size.entries
    elif size.entries:
        is_formed = product.is_formed and not checkpointing
        keeps = not is_formed and size.compression is None and size.features is None
        features = size.features or size.shape[size.in_dim]
        if not is_formed and size.compression is not None:
            extra += rounded_bytes(tokens, features, size.compression, itemsize)
        elif not is_formed and size.features is not None:
            extra += tokens * features * itemsize
        density, at_crossover = size.entries / size.weights, crossover(size.shape)
        flops += product.flops * min(1.0, density / at_crossover if at_crossover else 1.0)
    if size.rank:
        low = low_rank_work(size.rank, sum(size.shape), tokens, itemsize)
        # a sparse part beside it keeps the input itself as well
        copy = tokens * size.shape[size.in_dim] * itemsize if keeps and low.own_copy else 0
        extra, own = extra + low.extra_bytes + copy, low.own_copy and not keeps
        keeps, flops = True, flops + low.flops
    if not size.is_known:
        keeps, flops = True, float(product.flops)
    return Work(keeps, own, extra, flops)


class Step:
    """A step of a model, of which any layers may train.

    Args:
        trace: of the frozen model; None where it could not be run.
        itemsize: bytes of a number that layers compute with.
        checkpointing: whether activations are recomputed, block by block.
        speed: operations a second; None if it is not known.
    """

    def __init__(self, trace: Trace | None, itemsize: int, checkpointing: bool, speed: float | None):
        self.trace, self.itemsize, self.checkpointing, self.speed = trace, itemsize, checkpointing, speed

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers, convolutions and norms that run."""
        return [] if self.trace is None else list(self.trace.layers)

    def _works(self, work: Callable[[LayerSize, LayerPass], Work], sizes: Iterable[LayerSize]) -> dict[str, Work]:
        if self.trace is None:
            return {}
        layers = self.trace.layers
        names = ((name, size) for size in sizes for name in (size.name, *size.tied))
        return {name: work(size, layers[name]) for name, size in names if name in layers}

    def sparse(self, sizes: Iterable[LayerSize], crossover: CrossoverOf) -> dict[str, Work]:
        """Of an adapter of this package."""
        shared = self.itemsize, crossover, self.checkpointing
        return self._works(lambda size, product: sparse_work(size, product, *shared), sizes)

    def lora(self, sizes: Iterable[LayerSize], rank: int) -> dict[str, Work]:
        """Of LoRA on the same layers."""
        return self._works(
            lambda size, product: low_rank_work(rank, sum(size.shape), product.tokens, self.itemsize), sizes
        )

    def dense(self, names: Iterable[str]) -> dict[str, Work]:
        """Of layers whose whole weights train."""
        if self.trace is None:
            return {}
        layers = self.trace.layers
        return {name: Work(True, False, 0, layers[name].flops) for name in names if name in layers}

    def activations(self, works: Mapping[str, Work]) -> int | None:
        """Bytes that are kept for backward, by the frozen model and by the trained layers.

        With checkpointing: every block's input, and all of the one block that keeps most.
        """
        if self.trace is None:
            return None
        kept = dict(self.trace.kept)
        for name, part in works.items():
            product = self.trace.layers[name]
            if part.keeps_input and part.own_copy:
                size = product.input.bytes // product.input_itemsize * self.itemsize
                kept[name, "copy"] = Kept(size, product.input.block)
            elif part.keeps_input:
                kept.setdefault(product.source, product.input)
            if part.extra_bytes:
                kept[name, "extra"] = Kept(part.extra_bytes, product.input.block)
        blocks: dict[int | None, int] = {}
        for memory in kept.values():
            blocks[memory.block] = blocks.get(memory.block, 0) + memory.bytes
        outside = blocks.pop(None, 0)
        if not self.checkpointing or not blocks:
            return outside + sum(blocks.values())
        return outside + self.trace.block_inputs + max(blocks.values())

    def flops(self, works: Mapping[str, Work]) -> float | None:
        """Of forward and backward: the inputs' gradients, attention's two, and the trained layers' own."""
        if self.trace is None:
            return None
        trace = self.trace
        forward = trace.flops * (2 if self.checkpointing else 1)
        backward = trace.product_flops + 2 * (trace.flops - trace.product_flops)
        return forward + backward + sum(part.flops for part in works.values())

    def seconds(self, flops: float | None) -> float | None:
        return None if flops is None or self.speed is None else flops / self.speed


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of this machine in a square matrix product, the best of three."""
    left = torch.randn(MEASURED_SIZE, MEASURED_SIZE, device=device).to(dtype)

    def seconds() -> float:
        _wait(device)
        start = time.perf_counter()
        left @ left
        _wait(device)
        return time.perf_counter() - start

    seconds()
    return 2 * MEASURED_SIZE**3 / min(seconds() for _ in range(3))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Need:
    """Cost of one way of training, in bytes; None where it is not known.

    Attributes:
        name: of the way.
        trained: trained parameters.
        share: of the model's parameters that is.
        base_bytes: frozen weights.
        trained_bytes: trained parameters in float32.
        position_bytes: positions, and the base's own entries kept beside the values.
        gradient_bytes: gradients.
        optimizer_bytes: the optimizer's state.
        activation_bytes: kept by forward for backward.
        temporary_bytes: the largest temporary of a step.
        file_bytes: the saved adapter's tensors.
        flops: of a step.
        seconds: of a step, at the machine's speed in dense products.
    """

    name: str
    trained: int
    share: float
    base_bytes: int
    trained_bytes: int
    position_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    temporary_bytes: int
    file_bytes: int
    flops: float | None
    seconds: float | None

    @property
    def peak_bytes(self) -> int:
        """All of it together; without activations where these are not known."""
        resting = self.base_bytes + self.trained_bytes + self.position_bytes + self.optimizer_bytes
        return resting + self.gradient_bytes + (self.activation_bytes or 0) + self.temporary_bytes

    @property
    def smallest_gpu(self) -> int | None:
        """The smallest of the common GPU sizes that holds the peak, in GB; None if none does, or it is not known.

        A GB counts as 10⁹ bytes. GPUs have 7 % more, which the CUDA context and fragmentation take.
        """
        fitting = [size for size in GPU_SIZES if self.peak_bytes <= size * 1e9]
        return fitting[0] if fitting and self.activation_bytes is not None else None
