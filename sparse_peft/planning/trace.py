"""Activations and operations of a forward pass, from one pass over tensors without memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel, masking_utils
from transformers.pytorch_utils import Conv1D

from ..ops import is_convolution, is_formed_again
from ..tuners.targets import in_dim_of, stored_shape


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


FUSED_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class Kept:
    """One tensor's memory that lives until the backward pass.

    Attributes:
        bytes: its size.
        block: number of the block that keeps it; None outside of all blocks.
    """

    bytes: int
    block: int | None


@dataclass(frozen=True)
class LayerPass:
    """One linear layer's part in a forward pass, or a norm's, which has no product.

    Attributes:
        source: which tensor is its input; layers of one input have the same.
        input: that tensor's memory.
        input_itemsize: bytes of one of its numbers.
        tokens: rows that it multiplies.
        flops: of its product.
        is_formed: whether the input can be formed again from tensors that autograd keeps.
    """

    source: Hashable
    input: Kept
    input_itemsize: int
    tokens: int
    flops: int
    is_formed: bool = False


@dataclass
class Trace:
    """One forward pass of a model whose weights are all frozen and whose embeddings have gradients.

    Attributes:
        kept: ``{tensor: its memory}`` kept for backward by norms, attention, activation functions and the loss.
        layers: ``{layer name: its part}`` of linear layers, convolutions and norms.
        flops: of the whole pass, two for each multiplication and addition.
        block_inputs: bytes of the blocks' inputs, which gradient checkpointing keeps.
    """

    kept: dict[Hashable, Kept] = field(default_factory=dict)
    layers: dict[str, LayerPass] = field(default_factory=dict)
    flops: int = 0
    block_inputs: int = 0

    @property
    def product_flops(self) -> int:
        """Of the linear layers; the rest is attention's."""
        return sum(product.flops for product in self.layers.values())


class _Recorder:
    """Hooks that fill a trace. Storages are told apart by their address, so all of them are kept alive."""

    def __init__(self, weights: list[Tensor]):
        self.trace = Trace()
        self.block: int | None = None
        self._alive: list[Tensor] = list(weights)
        # products save their weights, transposed or not, for the gradients of their inputs
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def _memory(self, tensor: Tensor) -> tuple[int, Kept]:
        self._alive.append(tensor)
        storage = tensor.untyped_storage()
        return storage._cdata, Kept(storage.nbytes(), self.block)

    def save(self, tensor: Tensor) -> Tensor:
        key, kept = self._memory(tensor)
        if key not in self._weights:
            self.trace.kept.setdefault(key, kept)
        return tensor

    def enter_block(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.block = number
            hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if hidden is not None:
                self.trace.block_inputs += hidden.numel() * hidden.element_size()

        return hook

    def leave_block(self, *_: Any) -> None:
        self.block = None

    def see_product(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            source, kept = self._memory(args[0])
            tokens = output.numel() // max(1, outputs_of(module))
            flops = 2 * tokens * math.prod(stored_shape(module))
            is_formed = is_formed_again(args[0])
            self.trace.layers[name] = LayerPass(source, kept, args[0].element_size(), tokens, flops, is_formed)

        return hook

    def see_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            # the normalised input is kept for the scale's gradient alone
            kept = Kept(output.numel() * output.element_size(), self.block)
            self.trace.layers[name] = LayerPass(name, kept, output.element_size(), 0, 0)

        return hook


def outputs_of(module: nn.Module) -> int:
    """Output features or channels of a linear layer or convolution."""
    return stored_shape(module)[1 - in_dim_of(module)]


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm with a scale alone; ``nn.LayerNorm`` keeps its input in any case."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not isinstance(module, nn.LayerNorm)


def is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or is_convolution(module)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the modules of the longest lists, none of which lies in another."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        return []
    kind = type(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))[0])
    return [block for found in lists for block in found if type(block) is kind]


def _hooks(model: PreTrainedModel, recorder: _Recorder) -> list[Any]:
    def needs_grad(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.requires_grad_()

    # encoders and decoders may wrap one embedding in modules
    handles = [m.register_forward_hook(needs_grad) for m in model.modules() if isinstance(m, nn.Embedding)]
    for number, block in enumerate(blocks_of(model)):
        handles.append(block.register_forward_pre_hook(recorder.enter_block(number), with_kwargs=True))
        handles.append(block.register_forward_hook(recorder.leave_block))
    for name, module in model.named_modules():
        if is_product(module):
            handles.append(module.register_forward_hook(recorder.see_product(name)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(recorder.see_norm(name)))
    return handles


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        inputs |= {"labels": ids, "use_cache": False}
    return inputs


@contextmanager
def _rows_without_padding() -> Iterator[None]:
    """A traced model makes attention masks, as it cannot look whether a row is padded; here none is, and none is made.

    With masks attention keeps them, and repeats keys and values where heads share them, which training does not.
    """
    wanted = {"is_tracing": lambda *_: False, "find_packed_sequence_indices": lambda *_, **__: None}
    real = {name: getattr(masking_utils, name) for name in wanted if hasattr(masking_utils, name)}
    for name in real:
        setattr(masking_utils, name, wanted[name])
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(masking_utils, name, function)


def trace_forward(model: PreTrainedModel, batch: int, length: int) -> Trace:
    """Run a model of the meta device over ``batch`` rows of ``length`` tokens, with labels where it takes them.

    The model's parameters are frozen afterwards.

    Raises:
        RuntimeError: the model does not take token ids, or its computation depends on values of tensors.
    """
    model.requires_grad_(False)
    model.train()
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with ExitStack() as stack:
        # on the meta device attention would be taken apart; as fake tensors of a CPU it is the fused one
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_rows_without_padding())
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        recorder = _Recorder(list(fakes.values()))
        for handle in _hooks(model, recorder):
            stack.callback(handle.remove)
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda tensor: tensor))
        try:
            torch.func.functional_call(model, fakes, kwargs=_inputs(model, batch, length))
        except Exception as error:  # a model's own code may raise any kind
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RuntimeError(
                f"a forward pass of {type(model).__name__} over {batch} x {length} token ids fails ({reason}): what "
                "its activations take, and its time, is not known"
            ) from error
    recorder.trace.flops = counter.get_total_flops()
    return recorder.trace
