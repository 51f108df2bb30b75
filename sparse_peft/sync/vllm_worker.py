"""A worker extension for vLLM: ``vllm serve MODEL --worker-extension-cls sparse_peft.sync.vllm_worker.PatchWorker``.

vLLM mixes the class into its workers and calls its methods by ``collective_rpc``. It was tested against stand-ins of
that interface, and not with vLLM itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .folder import PatchFolder
from .layouts import FusedLayout
from .messages import from_bytes
from .receive import Receiver


class PatchWorker:
    """Methods that vLLM's workers get: each applies publications to its own shard.

    The names begin with ``sparse_peft_``, since vLLM refuses an extension whose names a worker has. Pause generation,
    and reset the prefix cache afterwards.

    Example:
        >>> shapes = {name: list(shape) for name, shape in checkpoint_shapes(model).items()}
        >>> llm.collective_rpc("sparse_peft_init", args=(shapes, publisher.base))
        >>> llm.collective_rpc("sparse_peft_apply", args=(to_bytes(publisher.publish()),))
        >>> llm.reset_prefix_cache()
    """

    model_runner: Any  # vLLM's
    parallel_config: Any  # vLLM's

    def sparse_peft_init(self, shapes: Mapping[str, Sequence[int]], base: str | None = None) -> None:
        """Prepare for publications.

        Args:
            shapes: ``{name: shape}`` of the checkpoint's weights.
            base: the publisher's fingerprint. Needed with several ranks, which cannot compute it from their shards.
        """
        size = self.parallel_config.tensor_parallel_size
        rank = self.parallel_config.rank % size
        layout = FusedLayout(self.model_runner.model, shapes, rank=rank, size=size)
        self._sparse_peft_receiver = Receiver(self.model_runner.model, layout, base)

    def sparse_peft_apply(self, message: bytes) -> int:
        """Apply a publication; its number."""
        publication = from_bytes(message)
        self._sparse_peft_receiver.apply_(publication)
        return publication.sequence

    def sparse_peft_apply_file(self, folder: str, sequence: int) -> int:
        """Apply a publication from a ``PatchFolder`` that this host can read; its number."""
        self._sparse_peft_receiver.apply_(PatchFolder(folder).read(sequence))
        return sequence

    def sparse_peft_restore(self) -> None:
        """Go back to the base model's weights."""
        self._sparse_peft_receiver.restore_()
