"""Every procedure on two processes with DDP, against one process with the whole batch; one spawn for all."""

import pytest
import torch
from torch import nn

from sparse_peft import SparsityController
from sparse_peft.procedures import FisherAnchor, GradientMask, ImportanceLearningRate, LayerSampling, SplitMerge
from tests.helpers.procedures import adapted, batches, loss_of, optimizer_of, train, trained
from tests.helpers.processes import process_group, results_on_two

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:adapter.*what suits its config")]
STEPS = 6
OTHER = batches([70, 71])
PROCEDURES = {
    "ist": lambda data: [LayerSampling("ist", share=0.5, batches=data, loss_fn=loss_of, every=2)],
    "lisa": lambda data: [LayerSampling("lisa", hold_steps=2)],
    "split": lambda data: [SplitMerge(3)],
    "rates": lambda data: [ImportanceLearningRate(data, loss_of, every=2)],
    "anchor": lambda data: [FisherAnchor(OTHER, loss_of, weight=20.0, restore=0.1)],
    "mask": lambda data: [GradientMask(every=2)],
    "two": lambda data: [LayerSampling("random", share=0.5), SplitMerge(2)],
}
CASES = [(kind, name) for kind in ("lora", "sparse") for name in PROCEDURES]


def run(kind, name, rank=None):
    """The trained values; with a rank, on its half of every batch."""
    part = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
    model = adapted(kind, torch.float64)
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.05, momentum=0.9)
    # what is measured is the mean over the processes, too
    data = [tuple(tensor[part] for tensor in batch) for batch in OTHER]
    controller = SparsityController(wrapped, optimizer, STEPS, procedures=PROCEDURES[name](data))
    train(model, optimizer, controller, range(STEPS), called=wrapped, part=part)
    controller.close()
    return {name: parameter.tolist() for name, parameter in trained(model).items()}


def process(rank, address):
    with process_group(rank, address):
        return [run(*case, rank) for case in CASES]


def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path):
    first, second = results_on_two(process, tmp_path / "rendezvous")
    assert first == second, "the processes agree to the bit"
    for case, found in zip(CASES, first, strict=True):
        for name, expected in run(*case).items():
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(expected), rtol=1e-6, atol=1e-9, msg=f"{case}: {name}"
            )
