"""Weight sync in training loops: after each step, or where TRL's asynchronous GRPO asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import TrainerCallback

from .patches import PatchError, Publication
from .publish import Publisher


class Engine(Protocol):
    """An engine that takes publications, such as ``HttpEngine``."""

    def send(self, publication: Publication) -> None:
        """Have the engine apply a publication.

        Raises:
            PatchError: the engine refused it.
        """
        ...


def sync(publisher: Publisher, engine: Engine) -> Publication:
    """Bring an engine to the adapter's present state; a refused publication is answered with a full one.

    Returns:
        The publication that the engine took.

    Raises:
        PatchError: the engine refused the full publication as well.
    """
    publication = publisher.publish()
    try:
        engine.send(publication)
    except PatchError:
        if publication.is_full:
            raise
        publication = publisher.publish(full=True)
        engine.send(publication)
    publisher.acknowledge(publication.sequence)
    return publication


def _nothing() -> None:
    pass


class SparseWeightTransfer:
    """Sparse weight sync for the ``weight_transfer=`` argument of TRL's ``AsyncGRPOTrainer``.

    Where TRL streams every weight, this sends the adapter's changed entries. The trainer makes the model, so give it
    to ``model`` before training begins.

    Args:
        engine: takes the publications.
        pause: called before weights are sent; the engine must not compute afterwards.
        resume: called after they were sent.

    Attributes:
        model: the trainer's.
        bytes_sent: of all publications.

    Example:
        >>> transfer = SparseWeightTransfer(HttpEngine("http://127.0.0.1:8001"))
        >>> trainer = AsyncGRPOTrainer(..., peft_config=SparseConfig(), weight_transfer=transfer)
        >>> transfer.model = trainer.model
        >>> trainer.train()
    """

    def __init__(self, engine: Engine, pause: Callable[[], None] = _nothing, resume: Callable[[], None] = _nothing):
        self.engine, self.pause, self.resume = engine, pause, resume
        self.model: nn.Module | None = None
        self.bytes_sent = 0
        self._publisher: Publisher | None = None

    def init_weight_transfer(self) -> None:
        """Make the publisher, before TRL merges the adapter for the first time.

        Raises:
            RuntimeError: ``model`` is not set.
        """
        if self.model is None:
            raise RuntimeError("SparseWeightTransfer.model is not set; set it to trainer.model before trainer.train()")
        self._publisher = Publisher(self.model)

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Send what changed; TRL's iterator over all weights is not used."""
        if self._publisher is None:
            self.init_weight_transfer()
        assert self._publisher is not None
        self.bytes_sent += sync(self._publisher, self.engine).nbytes

    def destroy(self) -> None:
        """Forget the publisher; the engine keeps its weights."""
        self._publisher = None


class WeightSyncCallback(TrainerCallback):
    """Sparse weight sync for transformers' and TRL's trainers, after every ``every`` optimizer steps.

    Args:
        engine: takes the publications.
        every: optimizer steps between two.

    Attributes:
        bytes_sent: of all publications.

    Example:
        >>> trainer.add_callback(WeightSyncCallback(HttpEngine("http://127.0.0.1:8001")))
    """

    def __init__(self, engine: Engine, every: int = 1):
        if every < 1:
            raise ValueError(f"every={every}: at least one optimizer step is expected")
        self.engine, self.every, self.bytes_sent = engine, every, 0
        self._publisher: Publisher | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Send the adapter as it is."""
        if state.is_world_process_zero:
            self._publisher = Publisher(model)
            self._send()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send what the step changed, where it is due."""
        if self._publisher is not None and state.global_step % self.every == 0:
            self._send()

    def _send(self) -> None:
        assert self._publisher is not None
        self.bytes_sent += sync(self._publisher, self.engine).nbytes
