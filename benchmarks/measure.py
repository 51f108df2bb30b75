"""How time and memory are measured. Nothing here knows a method or a model."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

_MARK = "benchmarks.measure.mark"


@contextmanager
def without_garbage_collection():
    """Collect now and not inside: a collection would fall on whichever method happens to run."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Sample:
    """One run of one action, in seconds. ``cpu`` is the time of all of this process's threads."""

    wall: float
    cpu: float

    def on(self, clock: str) -> float:
        """The time on one of ``CLOCKS``."""
        return getattr(self, clock)


CLOCKS = ("cpu", "wall")


def main_clock(device: torch.device) -> str:
    """Process CPU time where the CPU computes: other programs on the machine hardly touch it. Else wall time."""
    return "cpu" if device.type == "cpu" else "wall"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(action: Callable[[], object], device: torch.device) -> Sample:
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    _synchronize(device)
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    warm_caches: bool = False,
) -> dict[str, list[Sample]]:
    """Time every action once a round, so that a slow spell of the machine falls on all of them.

    Every round has an order of its own: what an action finds in the caches depends on the one before it.

    Args:
        actions: what to time, by name.
        rounds: samples of each.
        device: what to wait for before the clock is read.
        warmup: untimed rounds at the start.
        warm_caches: run each action once untimed right before it is timed, as one runs that follows itself.

    Returns:
        For each action its samples, one a round; equal positions belong to one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    names = list(actions)
    for _ in range(warmup):
        for name in names:
            actions[name]()
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    order = random.Random(0)
    with without_garbage_collection():
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                if warm_caches:
                    actions[name]()
                samples[name].append(time_once(actions[name], device))
    return samples


@dataclass(frozen=True)
class Ratio:
    """Paired ratios of one action to another over the rounds: median, extremes, and the median's uncertainty.

    ``error`` is half the width of the median's 95 % interval, estimated from the interquartile range as for normal
    noise: ``1.96 * 1.253 * (iqr / 1.349) / sqrt(rounds)``.
    """

    median: float
    low: float
    high: float
    error: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """Divide round by round, then summarise.

        Raises:
            ValueError: the rounds differ in number, or there are none.
        """
        if not numerators or len(numerators) != len(denominators):
            raise ValueError(
                f"paired ratios need as many rounds of both, got {len(numerators)} and {len(denominators)}"
            )
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        error = 0.0
        if len(ratios) > 1:
            first, _, third = quantiles(ratios, n=4, method="inclusive")
            error = 1.96 * 1.253 * (third - first) / 1.349 / sqrt(len(ratios))
        return cls(median(ratios), min(ratios), max(ratios), error)


def paired(numerators: Iterable[Sample], denominators: Iterable[Sample], clock: str) -> Ratio:
    return Ratio.of([s.on(clock) for s in numerators], [s.on(clock) for s in denominators])


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Phase:
    """Bytes alive around one phase, counted from the start of the measurement: at its start, its peak, its end."""

    start: int
    peak: int
    end: int


def levels(changes: Sequence[tuple[int, int | None]], phases: int) -> list[Phase]:
    """The phases of a timeline of ``(time, bytes)``; ``bytes`` is None at the ``phases + 1`` borders of the phases.

    Raises:
        RuntimeError: the borders found are not those that were set.
    """
    level, found, open_phase = 0, [], None
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        if change is not None:
            level += change
            if open_phase is not None:
                open_phase[1] = max(open_phase[1], level)
            continue
        if open_phase is not None:
            found.append(Phase(open_phase[0], open_phase[1], level))
        open_phase = [level, level]
    if len(found) != phases:
        raise RuntimeError(f"the profile shows {len(found)} phases where {phases} were run")
    return found


def _cpu_phases(actions: Sequence[Callable[[], object]]) -> list[Phase]:
    # The allocator's own record: it also has the buffers that kernels allocate inside, which no dispatch mode sees.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        for action in actions:
            with record_function(_MARK):
                pass
            action()
        with record_function(_MARK):
            pass
    changes: list[tuple[int, int | None]] = []
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name() == _MARK:
            changes.append((event.start_ns(), None))
    return levels(changes, len(actions))


def _cuda_phases(actions: Sequence[Callable[[], object]], device: torch.device) -> list[Phase]:
    _synchronize(device)
    origin = torch.cuda.memory_allocated(device)
    phases = []
    for action in actions:
        start = torch.cuda.memory_allocated(device) - origin
        torch.cuda.reset_peak_memory_stats(device)
        action()
        _synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - origin
        phases.append(Phase(start, peak, torch.cuda.memory_allocated(device) - origin))
    return phases


def measure_phases(actions: Sequence[Callable[[], object]], device: torch.device) -> list[Phase]:
    """Run the actions one after the other and record the bytes that tensors take.

    Exact for whatever goes through PyTorch's allocator of the device, buffers inside kernels included. On the CPU the
    release of a block that was allocated before the call is not seen: run a warm-up as the first action, so that
    what it leaves and the next one frees is known.
    """
    with without_garbage_collection():
        return _cpu_phases(actions) if device.type == "cpu" else _cuda_phases(actions, device)


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """``{address: bytes}`` of the distinct storages behind the tensors, sparse layouts included."""
    found = {}
    for tensor in tensors:
        for part in _dense_parts(tensor.detach()):
            storage = part.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    return sum(storages(tensors).values())


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward, each storage once, without the storages of ``exclude``.

    The tensors are those of the graph's nodes. Nothing may pack them, as gradient checkpointing does. What a function
    keeps by other means shows in ``measure_phases`` as bytes alive after the forward pass.
    """
    output = forward()
    excluded = storages(exclude)
    return sum(size for address, size in storages(saved_tensors(output)).items() if address not in excluded)


def saved_tensors(output: Tensor) -> Iterator[Tensor]:
    """The tensors that the nodes of an output's graph keep; Python's numbers, kept as tensors too, are left out."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        yield from (t for t in getattr(node, "saved_tensors", ()) if t is not None)  # of Python's functions
        for name in dir(node):
            if name.startswith("_saved_"):
                found = getattr(node, name)
                kept = (t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor))
                yield from (t for t in kept if t.dim())


class LargestTensor(TorchDispatchMode):
    """The largest storage, in bytes, that any operation inside the block made; meta tensors have none."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {t.untyped_storage().data_ptr() for t in _strided((args, kwargs))}
        out = func(*args, **kwargs)
        for t in _strided(out):
            if t.untyped_storage().data_ptr() not in inputs:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


def _strided(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.layout == torch.strided]
    return [t for t in tensors if t.device.type != "meta"]
