"""Running a model's blocks one after the other on inputs that are kept, as the model itself would.

Most models hold their blocks in an ``nn.ModuleList`` and give each what the one before it returned. Then a block can
be run again alone, on what blocks before it return now, without the rest of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache


@dataclass
class _Call:
    """What a block was given besides the hidden states, which are the first argument."""

    args: tuple
    kwargs: dict[str, Any]
    by_name: str | None  # under which the hidden states were passed; None for the first place

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.by_name is not None:
            return hidden_states(block(*self.args, **{self.by_name: hidden}, **self.kwargs))
        return hidden_states(block(hidden, *self.args, **self.kwargs))


@dataclass
class _Batch:
    """One batch on its way through a chain."""

    hidden: Tensor | None = None
    calls: list[_Call] = field(default_factory=list)
    returned: Tensor | None = None


def _without_cache(argument: Any) -> Any:
    """A block that runs again with a cache would find its own keys in it."""
    return None if isinstance(argument, Cache) else argument


def hidden_states(output: Any) -> Tensor:
    """What a block hands on: its output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


class Chain:
    """Blocks of which each is given what the one before it returned.

    Args:
        name: of the list that the blocks are in.
        blocks: theirs, in order.

    Attributes:
        places: ``{layer name: index of the block it is in}``.
        fault: why the blocks cannot be run one by one; None as long as they can.
    """

    def __init__(self, name: str, blocks: nn.ModuleList):
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
        """The next batch begins."""
        self._batches.append(_Batch())

    def end(self) -> str | None:
        """The batch is over. Returns what is wrong with it, if its hidden states are not finite."""
        batch = self._batches[-1]
        if self.fault is None and len(batch.calls) != len(self.blocks):
            self.fault = f"{len(batch.calls)} of the {len(self.blocks)} blocks of {self.name} ran for a batch"
        if self.fault is not None:
            self._batches.clear()
            return None
        ends, batch.returned = (batch.hidden, batch.returned), None
        if not all(bool(hidden.isfinite().all()) for hidden in ends):
            return f"the hidden states in {self.name} are not finite"
        return None

    def drop(self) -> None:
        """Forget the last batch."""
        del self._batches[-1:]

    def _before(self, index: int):
        def see(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.fault is not None:
                return
            batch = self._batches[-1]
            if index != len(batch.calls):
                self.fault = f"the blocks of {self.name} do not run once each and in order"
                return
            by_name = None if args else next(iter(kwargs), None)
            hidden = args[0] if args else kwargs.get(by_name)
            if not isinstance(hidden, Tensor) or (index > 0 and hidden is not batch.returned):
                self.fault = f"block {index} of {self.name} is not given what the block before it returned"
                return
            if index == 0:
                batch.hidden = hidden.detach()
            rest = {key: _without_cache(value) for key, value in kwargs.items() if key != by_name}
            batch.calls.append(_Call(tuple(map(_without_cache, args[1:])), rest, by_name))

        return see

    def _after(self, block: nn.Module, args: tuple, output: Any) -> None:
        if self.fault is None:
            self._batches[-1].returned = hidden_states(output)

    def run_block(self, index: int, batch: int) -> Tensor:
        """What a block returns now for a batch that has come as far as it."""
        state = self._batches[batch]
        return state.calls[index].run(self.blocks[index], state.hidden)

    def advance(self, index: int) -> None:
        """Bring every batch past a block."""
        for number, batch in enumerate(self._batches):
            batch.hidden = self.run_block(index, number)


def chains_of(model: nn.Module, layers: list[str]) -> list[Chain]:
    """The outermost lists of blocks that layers are in."""
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
