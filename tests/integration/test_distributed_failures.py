"""What goes wrong with several processes ends with an error: other positions, a process that dies, uneven batches."""

import os
import time
from datetime import timedelta
from multiprocessing import Manager

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.algorithms.join import Join
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.tuners.traversal import tuner_layers
from tests.helpers.processes import join_group, process_group, run_on_two
from tests.helpers.two_layers import TwoLayers

pytestmark = pytest.mark.distributed
TIMEOUT = timedelta(seconds=20)
REGROWTH = {"selection": "rigl", "reselect_every": 2, "accumulate": 1}


def adapted(seed=0, **fields):
    torch.manual_seed(0)
    config = SparseConfig(density=0.2, seed=seed, scale=1.0, target_modules=["first", "second"], **fields)
    return get_peft_model(TwoLayers(), config)


def controlled(model, called):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return optimizer, SparsityController(called, optimizer, total_steps=8)


def batch(step, rank=0, rows=4):
    return torch.randn(rows, 17, generator=torch.Generator().manual_seed(2 * step + rank))


def values(model):
    return [layer.deltas["default"].values.detach().clone() for layer in tuner_layers(model)]


def other_positions_at_the_start(rank):
    for fields in ({}, REGROWTH):
        model = adapted(seed=rank, **fields)
        with pytest.raises(RuntimeError, match=r"the processes have different positions of adapter 'default'"):
            controlled(model, model)
        # DDP sends those of the first process
        model = adapted(seed=rank, **fields)
        controlled(model, DistributedDataParallel(model))


def other_positions_after_an_event(rank):
    model = adapted(**REGROWTH)
    optimizer, controller = controlled(model, called := DistributedDataParallel(model))
    dynamics = controller.parts["adapters"]["default"]
    reselect = dynamics.after_step

    def differently(step):
        record = reselect(step)
        delta = next(tuner_layers(model)).deltas["default"]
        if record is not None and rank == 1:
            delta.support = delta.support.free(delta.support.nnz)
        return record

    dynamics.after_step = differently
    with pytest.raises(RuntimeError, match=r"the processes have different positions of adapter 'default'"):
        for step in range(2):
            called(batch(step, rank)).square().mean().backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()


def accumulation_without_exchange(rank):
    """``no_sync`` in all but the last part of a step."""
    found = []
    for parts in (1, 2):
        model = adapted(**REGROWTH)
        optimizer, controller = controlled(model, called := DistributedDataParallel(model))
        for step in range(4):
            whole = batch(step, rank)
            for number, part in enumerate(whole.chunk(parts)):
                loss = called(part) if number == parts - 1 else None
                if loss is None:
                    with called.no_sync():
                        (called(part).square().mean() / parts).backward()
                else:
                    (loss.square().mean() / parts).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        found.append(values(model))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def uneven_batches(rank):
    """One process has a batch more; static positions."""
    model = adapted()
    optimizer, controller = controlled(model, called := DistributedDataParallel(model))
    with Join([called]):
        for step in range(2 + rank):
            called(batch(step, rank)).square().mean().backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    # DDP sends the parameters of the last process that trained, which stay equal
    sent = [torch.empty_like(torch.cat(values(model))) for _ in range(2)]
    distributed.all_gather(sent, torch.cat(values(model)))
    assert torch.equal(*sent)


CHECKS = (
    other_positions_at_the_start,
    other_positions_after_an_event,
    accumulation_without_exchange,
    uneven_batches,
)


def process(rank, address, results):
    with process_group(rank, address, TIMEOUT):
        for check in CHECKS:
            check(rank)
            results[rank] = check.__name__


def test_processes_that_disagree_or_differ(tmp_path):
    with Manager() as manager:
        results = manager.dict()
        run_on_two(process, tmp_path / "rendezvous", results)
        assert dict(results) == {0: CHECKS[-1].__name__, 1: CHECKS[-1].__name__}


def dying(rank, address, results):
    join_group(rank, address, TIMEOUT)
    model = adapted(**REGROWTH)
    optimizer, controller = controlled(model, called := nn.parallel.DistributedDataParallel(model))
    began = time.monotonic()
    try:
        for step in range(4):
            if rank == 1 and step == 2:
                os._exit(0)
            called(batch(step, rank)).square().mean().backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        results[rank] = time.monotonic() - began, str(error)
    os._exit(0)


def test_a_process_that_dies_ends_the_others(tmp_path):
    with Manager() as manager:
        results = manager.dict()
        run_on_two(dying, tmp_path / "rendezvous", results)
        assert set(results) == {0}, "the other process got an error"
        seconds, _ = results[0]
        assert seconds < TIMEOUT.total_seconds() + 10


def waiting(rank):
    while rank == 1:
        time.sleep(1)


def test_a_test_whose_processes_wait_for_ever_ends():
    with pytest.raises(ProcessExitedException, match="process 1 terminated with exit code 1"):
        run_on_two(waiting, limit=2)
