"""Changing a model's layers from data, block by block: later blocks are measured behind the changed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from .activations import FeatureSums
from .block_chain import Chain, chains_of
from .model_pass import ModelPass, token_mask

Measure = Callable[[Mapping[str, nn.Module]], FeatureSums]


def change_blockwise(
    data: ModelPass,
    targets: Mapping[str, nn.Module],
    measure: Measure,
    change: Callable[[FeatureSums], None],
    changed: Callable[[Iterable[str]], AbstractContextManager[None]] = lambda names: nullcontext(),
    *,
    sequential: bool | None = None,
) -> None:
    """Measure the layers' activations and change the layers, one block at a time where the model's blocks allow it.

    Memory then holds the measures of one block and the hidden states of all data. Layers outside of such blocks are
    measured together, in the unchanged model. Call it without gradients.

    Args:
        data: the model and its batches, iterated up to twice.
        targets: ``{layer name: module}``.
        measure: ``measure({layer name: module})``: the sums to collect.
        change: ``change(sums)`` changes the layers of ``sums.targets``, all of which a token has reached. It may
            drop sums that it has used.
        changed: ``changed(layer names)``: inside this context the layers compute with what they were changed to. By
            default they do so anyway.
        sequential: True runs blocks one by one or raises; False measures the unchanged model; None does the first
            where it can.

    Raises:
        ValueError: no usable batch, a layer that no token reached, inputs that are not finite behind changed blocks,
            or blocks that cannot run one by one though ``sequential=True``.
    """
    chains = [] if sequential is False else chains_of(data.model, list(targets))
    if sequential and not chains:
        raise ValueError(
            f"sequential=True: no layer of {type(data.model).__name__} that is a target is in an nn.ModuleList of "
            "blocks; use sequential=False"
        )
    masks = _record(chains, data) if chains else []
    faults = [chain.fault for chain in chains if chain.fault is not None]
    if sequential and faults:
        raise ValueError(f"sequential=True: {faults[0]}; use sequential=False")
    chains = [chain for chain in chains if chain.fault is None]
    in_chains = {name for chain in chains for name in chain.places}
    alone = {name: module for name, module in targets.items() if name not in in_chains}
    if alone:
        sums = measure(alone)
        sums.run(data)
        change(sums)
    for chain in chains:
        _follow(chain, masks, targets, measure, change, changed)


def _record(chains: list[Chain], data: ModelPass) -> list[Tensor | None]:
    """Run the unchanged model; returns the masks of the batches that are usable."""
    masks = []

    def use(batch: Any, is_last: bool) -> str | None:
        for chain in chains:
            chain.begin()
        data.forward(batch)
        faults = [fault for chain in chains if (fault := chain.end()) is not None]
        if faults:
            for chain in chains:
                chain.drop()
            return faults[0]
        masks.append(token_mask(batch))
        return None

    with ExitStack() as stack:
        for chain in chains:
            stack.enter_context(chain.recording())
        data.each_batch(use)
    return masks


def _follow(
    chain: Chain,
    masks: list[Tensor | None],
    targets: Mapping[str, nn.Module],
    measure: Measure,
    change: Callable[[FeatureSums], None],
    changed: Callable[[Iterable[str]], AbstractContextManager[None]],
) -> None:
    """Change the blocks of a chain in order, each on the outputs of the changed ones before it."""
    last = max(chain.places.values())
    for index in range(last + 1):
        inside = {name: targets[name] for name, place in chain.places.items() if place == index}
        if inside:
            sums = measure(inside)
            _measure(chain, index, masks, sums)
            change(sums)
        if index < last:
            with changed(inside):
                chain.advance(index)


def _measure(chain: Chain, index: int, masks: list[Tensor | None], sums: FeatureSums) -> None:
    with sums.watching():
        for number, mask in enumerate(masks):
            fault = sums.add(partial(chain.run_block, index, number), mask)
            if fault is not None:
                raise ValueError(
                    f"behind changed blocks, {fault}; change less (more bits, more weights), or use float32 or "
                    "bfloat16 where the model runs in float16"
                )
    sums.check_reached()
