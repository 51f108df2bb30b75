"""Runs all measurements of one workload and puts them into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from statistics import median

import torch

from .measure import Ratio, Sample, bytes_of, interleave, main_clock, measure_phases, paired, saved_bytes, time_once
from .methods import FIRST, FROZEN, SECOND, Method, Subject
from .workloads import Workload

SHORTEST_SAMPLE = 0.005  # seconds; a shorter action is repeated within one sample
MOST_REPEATS = 50
# In rounds of training: these actions are short, and what they are asked for is small.
DECODE_ROUNDS = 8
SWITCH_ROUNDS = 3


def bare(name: str) -> str:
    """How samples of the base model on a method's own weights are called."""
    return f"{name}: base"


@dataclass
class Row:
    """What is known of one method. Bytes are bytes; ratios are None where the method has none.

    ``peak_extra`` is the highest level of a step above what lived before it. ``alive_after_forward`` and ``saved`` are
    what the backward pass holds on to: the first counts all tensors, outputs included, the second what autograd saved.
    ``state`` is what the adapter and its optimizer keep between steps; ``trained`` and ``optimizer`` are parts of it.
    """

    method: str
    density: float | None
    is_sparse: bool
    entries: int
    peak_extra: int
    alive_after_forward: int
    saved: int
    state: int
    trained: int
    optimizer: int
    file: int | None = None
    bytes_per_entry: float | None = None
    peak_extra_vs_lora: float | None = None
    step_seconds: float | None = None
    step_vs_lora: Ratio | None = None
    step_vs_frozen: Ratio | None = None
    step_vs_full: Ratio | float | None = None
    step_vs_dropout: Ratio | float | None = None
    step_vs_shira: Ratio | float | None = None
    peak_vs_frozen: float | None = None
    decode_vs_base: Ratio | None = None
    switch_seconds: float | None = None
    switch_vs_lora: Ratio | None = None


@dataclass
class Result:
    """The rows of one workload, the raw samples behind them, and the measured noise of a decode step."""

    workload: str
    sizes: dict[str, int | str]
    clock: str
    rows: list[Row]
    decode_noise: Ratio | None
    samples: list[dict[str, dict[str, list[Sample]]]] = field(default_factory=list)

    def row(self, method: str) -> Row:
        return next(row for row in self.rows if row.method == method)

    def to_dict(self) -> dict:
        return asdict(self)


def build(method: Method, workload: Workload, device: torch.device) -> tuple[Subject, Row]:
    """Make a method's model and measure the memory of its making and of one step."""
    base = workload.copy_of_base()
    made: list[Subject] = []
    making, forward, backward, update = measure_phases(
        [
            lambda: made.append(Subject(method, workload, base)),
            lambda: made[0].forward(),
            lambda: made[0].backward(),
            lambda: made[0].update(),
        ],
        device,
    )
    subject = made[0]
    constant = [*subject.model.parameters(), *subject.model.buffers()]

    def forward_alone():
        subject.forward()
        output, subject._output = subject._output, None
        return output

    trained = subject.trained
    states = subject.optimizer.state.values() if subject.optimizer else ()
    optimizer = bytes_of(v for state in states for v in state.values() if isinstance(v, torch.Tensor))
    row = Row(
        method=method.name,
        density=method.density,
        is_sparse=method.is_sparse,
        entries=sum(parameter.numel() for parameter in trained),
        peak_extra=max(phase.peak for phase in (forward, backward, update)) - forward.start,
        alive_after_forward=forward.end - forward.start,
        saved=saved_bytes(forward_alone, constant),
        state=making.end,
        trained=bytes_of(trained),
        optimizer=optimizer,
    )
    if method.config is not None:
        row.file = subject.file_bytes()
        row.bytes_per_entry = row.file / row.entries
    return subject, row


def repeated(action: Callable[[], object], times: int) -> Callable[[], None]:
    """The action, so many times over."""

    def run() -> None:
        for _ in range(times):
            action()

    return run


def _switching(subject: Subject) -> Callable[[], None]:
    names: Iterator[str] = cycle((SECOND, FIRST))
    return lambda: subject.switch(next(names))


def time_serving(
    subjects: dict[str, Subject], rounds: int, device: torch.device
) -> dict[str, dict[str, list[Sample]]]:
    """Decode steps of every method, then switches between two adapters of every method that has adapters."""
    base = subjects[FROZEN].decode
    base()
    repeats = round(SHORTEST_SAMPLE / max(time_once(base, device).wall, SHORTEST_SAMPLE / MOST_REPEATS))
    decoding = {}
    for name, subject in subjects.items():
        decoding |= {name: subject.decode, bare(name): subject.decode_bare}
    decoding = {name: repeated(action, max(1, repeats)) for name, action in decoding.items()}
    decode = interleave(decoding, rounds * DECODE_ROUNDS, device, warm_caches=True)

    adapted = {name: subject for name, subject in subjects.items() if subject.method.config is not None}
    actions: dict[str, Callable[[], object]] = {}
    for name, subject in adapted.items():
        subject.begin_switching()
        actions[name] = _switching(subject)
    switch = interleave(actions, rounds * SWITCH_ROUNDS, device, warm_caches=True)
    return {"decode": decode, "switch": switch}


def run_workload(
    workload: Workload,
    methods: Sequence[Method],
    lora: str,
    rounds: int,
    device: torch.device,
    together: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    serving: bool = True,
    others: dict[str, str] | None = None,
) -> Result:
    """Measure all methods on one workload.

    Args:
        workload: the model and batch.
        methods: the rows; the frozen model and ``lora`` must be among them.
        lora: name of the row that ratios refer to.
        rounds: samples taken of a training step; of decoding and switching ``DECODE_ROUNDS`` and
            ``SWITCH_ROUNDS`` times as many.
        device: where the workload lives.
        together: how many methods' models may live at once beside the references'; None for all. Each group is timed
            in rounds of its own, which the references take part in.
        progress: told what is being done.
        serving: whether decoding and switching are measured too.
        others: further rows to compare steps with: ``{"full", "dropout" or "shira": row}``.

    Raises:
        ValueError: a reference is missing from ``methods``.
    """
    by_name = {method.name: method for method in methods}
    for name in (FROZEN, lora):
        if name not in by_name:
            raise ValueError(f"methods={list(by_name)} must contain {name!r}, which the ratios refer to")
    clock = main_clock(device)
    rows: dict[str, Row] = {}
    references: dict[str, Subject] = {}
    serving_references: dict[str, Subject] = {}
    for name in (FROZEN, lora):
        progress(f"{workload.name}: building {name}")
        references[name], rows[name] = build(by_name[name], workload, device)
        if serving:
            serving_references[name] = Subject(by_name[name], workload, workload.copy_of_base())
            serving_references[name].prepare_serving()

    rest = [method for method in methods if method.name not in references]
    size = together or max(1, len(rest))
    groups = [rest[i : i + size] for i in range(0, len(rest), size)] or [[]]
    samples = []
    for group in groups:
        subjects = dict(references)
        for method in group:
            progress(f"{workload.name}: building {method.name}")
            subjects[method.name], rows[method.name] = build(method, workload, device)
        progress(f"{workload.name}: timing {', '.join(subjects)}")
        train = interleave({name: subject.step for name, subject in subjects.items()}, rounds, device)
        samples.append({"train": train})
        if serving:
            served = dict(serving_references)
            for method in group:
                if not method.trains_base:
                    subjects[method.name].prepare_serving()
                    served[method.name] = subjects[method.name]
            samples[-1] |= time_serving(served, rounds, device)
            del served
        del subjects
        for reference in serving_references.values():
            reference.end_switching()

    noise = _fill_ratios(rows, samples, lora, clock, others or {})
    ordered = [rows[method.name] for method in methods]
    return Result(workload.name, workload.sizes, clock, ordered, noise, samples)


def _fill_ratios(
    rows: dict[str, Row], samples: list[dict], lora: str, clock: str, others: dict[str, str]
) -> Ratio | None:
    for group in samples:
        train, decode, switch = group["train"], group.get("decode", {}), group.get("switch", {})
        for name in train:
            row = rows[name]
            if row.step_vs_lora is not None:  # a reference, already filled from the first group
                continue
            row.step_seconds = median(sample.on(clock) for sample in train[name])
            row.step_vs_lora = paired(train[name], train[lora], clock)
            row.step_vs_frozen = paired(train[name], train[FROZEN], clock)
            for field_name, other in others.items():
                if other in train:
                    setattr(row, f"step_vs_{field_name}", paired(train[name], train[other], clock))
            if name in decode:
                row.decode_vs_base = paired(decode[name], decode[bare(name)], clock)
            if name in switch:
                row.switch_seconds = median(sample.on(clock) for sample in switch[name])
                row.switch_vs_lora = paired(switch[name], switch[lora], clock)
    lora_extra = rows[lora].peak_extra - rows[FROZEN].peak_extra
    for row in rows.values():
        for field_name, other in others.items():
            if getattr(row, f"step_vs_{field_name}") is None and other in rows:
                # never alive together: by way of LoRA, which both were timed with
                setattr(row, f"step_vs_{field_name}", row.step_vs_lora.median / rows[other].step_vs_lora.median)
        row.peak_vs_frozen = row.peak_extra / rows[FROZEN].peak_extra
        if lora_extra > 0:
            row.peak_extra_vs_lora = (row.peak_extra - rows[FROZEN].peak_extra) / lora_extra
    if any("decode" not in group for group in samples):
        return None
    again = [sample for group in samples for sample in group["decode"][bare(FROZEN)]]
    first = [sample for group in samples for sample in group["decode"][FROZEN]]
    return paired(again, first, clock)
