"""Memory of one of several processes, from the memory of one that is alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .step import Need

LIVE_BLOCKS = 3  # of FSDP2: the block in use, the next one, and the buffer that it is gathered into


@dataclass(frozen=True)
class Division:
    """How a model is divided.

    Attributes:
        strategy: one of ``STRATEGIES``.
        processes: their number.
        block: the largest block's share of the frozen weights; 1 of a model without blocks.
        blocks: all blocks' share.
    """

    strategy: str
    processes: int
    block: float
    blocks: float

    @classmethod
    def of(cls, model: nn.Module, strategy: str, processes: int) -> Division:
        """Of a model, whose blocks are the children of its longest ``nn.ModuleList``."""
        sizes = {module: sum(p.numel() for p in module.parameters()) for module in model.modules()}
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        parts = [sizes[child] for child in max(lists, key=len)] if lists else [sizes[model]]
        return cls(strategy, processes, max(parts) / sizes[model], sum(parts) / sizes[model])

    def need(self, alone: Need, kept_bytes: int = 0) -> Need:
        """What one of the processes needs, with its own batch.

        Args:
            alone: what a process without others needs.
            kept_bytes: the base's own entries beside the values, a part of ``alone.position_bytes``.
        """
        if self.processes == 1:
            return alone
        if self.strategy == "ddp":
            return replace(alone, gradient_bytes=2 * alone.gradient_bytes)  # and the buckets that are summed
        if self.strategy == "tp":
            return self._of_tensors(alone, kept_bytes)
        return self._of_rows(alone, kept_bytes)

    def _part(self, size: int) -> int:
        return -(-size // self.processes)

    def _position_bytes(self, alone: Need, kept_bytes: int) -> int:
        """All positions, which every process knows, and those and the base's own entries of its part of the weight."""
        return alone.position_bytes - kept_bytes + self._part(alone.position_bytes)

    def _of_rows(self, alone: Need, kept_bytes: int) -> Need:
        """Weights, values, gradients and the optimizer's state are divided; a few blocks are whole at a time."""
        whole = alone.base_bytes + alone.trained_bytes
        live = round(whole * (LIVE_BLOCKS * self.block + 1 - self.blocks))
        return replace(
            alone,
            base_bytes=self._part(alone.base_bytes),
            trained_bytes=self._part(alone.trained_bytes),
            gradient_bytes=self._part(alone.gradient_bytes) + round(alone.gradient_bytes * 2 * self.block),
            optimizer_bytes=self._part(alone.optimizer_bytes),
            position_bytes=self._position_bytes(alone, kept_bytes),
            temporary_bytes=alone.temporary_bytes + live,
        )

    def _of_tensors(self, alone: Need, kept_bytes: int) -> Need:
        """The weights of blocks are divided; values, their gradients and the optimizer's state are whole."""
        in_blocks = round(alone.base_bytes * self.blocks)
        return replace(
            alone,
            base_bytes=alone.base_bytes - in_blocks + self._part(in_blocks),
            position_bytes=self._position_bytes(alone, kept_bytes),
        )
