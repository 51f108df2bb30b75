"""Running a model's blocks one by one on recorded inputs.

Most models hold their blocks in an ``nn.ModuleList`` and pass each the output of the previous one. A block can then
be run again alone, on the current outputs of the blocks before it, without the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache


@dataclass
class _Call:
    """The arguments of a block other than the hidden states.

    Attributes:
        args: by position, after the hidden states.
        kwargs: by name.
        by_name: the name under which the hidden states were passed; None for the first position.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.by_name is not None:
            return hidden_states(block(*self.args, **{self.by_name: hidden}, **self.kwargs))
        return hidden_states(block(hidden, *self.args, **self.kwargs))


@dataclass
class _Batch:
    """The state of one batch in a chain.

    Attributes:
        hidden: input of the next block; the first block's while recording.
        calls: of each block.
        returned: the last block's output while recording.
    """

    hidden: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)
    returned: Tensor | None = None


def _without_cache(argument: Any) -> Any:
    """A block that runs again must not see the cache that holds its own keys."""
    return None if isinstance(argument, Cache) else argument


def hidden_states(output: Any) -> Tensor:
    """A block's output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


class Chain:
    """A list of blocks, each of which takes the output of the previous one.

    Args:
        name: of the list in the model.
        blocks: in order.

    Attributes:
        places: ``{layer name: index of its block}``.
        fault: the reason why the blocks cannot be run one by one, or None.
    """

    def __init__(self, name: str, blocks: nn.ModuleList) -> None:
        self.name, self.blocks = name, blocks
        self.places: dict[str, int] = {}
        self.fault: str | None = None
        self._batches: list[_Batch] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block of code the model runs over batches, each between ``begin`` and ``end``."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                before = block.register_forward_pre_hook(self._before(index), with_kwargs=True, prepend=True)
                stack.callback(before.remove)
                stack.callback(block.register_forward_hook(self._after).remove)
            yield

    def begin(self) -> None:
        """Start a batch."""
        self._batches.append(_Batch())

    def end(self) -> str | None:
        """Finish the batch. Returns the reason to skip it, if its hidden states are not finite."""
        batch = self._batches[-1]
        if self.fault is None and len(batch.calls) != len(self.blocks):
            self.fault = f"{len(batch.calls)} of the {len(self.blocks)} blocks of {self.name} ran for a batch"
        if self.fault is not None:
            self._batches.clear()
            return None
        ends, batch.returned = (batch.hidden, batch.returned), None
        if not all(hidden is not None and bool(hidden.isfinite().all()) for hidden in ends):
            return f"the hidden states in {self.name} are not finite"
        return None

    def drop(self) -> None:
        """Remove the last batch."""
        del self._batches[-1:]

    def _before(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.fault is not None:
                return
            batch = self._batches[-1]
            if index != len(batch.calls):
                self.fault = f"the blocks of {self.name} do not run once each and in order"
                return
            by_name = None if args else next(iter(kwargs), None)
            hidden = args[0] if args else None if by_name is None else kwargs[by_name]
            if not isinstance(hidden, Tensor) or (index > 0 and hidden is not batch.returned):
                self.fault = f"block {index} of {self.name} does not take the output of the block before it"
                return
            if index == 0:
                batch.hidden = hidden.detach()
            rest = {key: _without_cache(value) for key, value in kwargs.items() if key != by_name}
            batch.calls.append(_Call(tuple(map(_without_cache, args[1:])), rest, by_name))

        return see

    def _after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.fault is None:
            self._batches[-1].returned = hidden_states(output)

    def run_block(self, index: int, batch: int) -> Tensor:
        """A block's current output for a batch that has reached it.

        Raises:
            RuntimeError: the batch was not recorded.
        """
        state = self._batches[batch]
        if state.hidden is None:
            raise RuntimeError(f"batch {batch} was not recorded in {self.name}; run the model inside recording()")
        return state.calls[index].run(self.blocks[index], state.hidden)

    def advance(self, index: int) -> None:
        """Pass every batch through a block."""
        for number, batch in enumerate(self._batches):
            batch.hidden = self.run_block(index, number)


def chains_of(model: nn.Module, layers: list[str]) -> list[Chain]:
    """The outermost lists of blocks that contain the layers of these names."""
    found: dict[str, Chain] = {}
    for layer in layers:
        module, names = model, layer.split(".")
        for depth, part in enumerate(names):
            if isinstance(module, nn.ModuleList):
                name = ".".join(names[:depth])
                found.setdefault(name, Chain(name, module)).places[layer] = int(part)
                break
            module = module.get_submodule(part)
    return list(found.values())
