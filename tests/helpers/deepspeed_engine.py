"""DeepSpeed on two CPU processes, without its compiled operators."""

import os
import traceback
from collections.abc import Callable
from multiprocessing import Manager

import pytest
import torch
from torch import distributed

from tests.helpers.processes import run_on_two


def on_two(function: Callable[..., object], tmp_path, *arguments) -> tuple[object, object]:
    """What ``function(rank, *arguments)`` returned in both processes, which can call ``initialize``."""
    with Manager() as manager:
        results = manager.dict()
        try:
            run_on_two(_process, function, tmp_path / "rendezvous", arguments, results)
        except Exception:
            pytest.fail("\n".join(str(value) for value in results.values()))
        return results[0], results[1]


def initialize(model, optimizer, stage, **fields):
    """DeepSpeed's engine and optimizer of a model."""
    import deepspeed  # noqa: PLC0415  (after the environment is set)

    zero = {"stage": stage, **fields.pop("zero_optimization", {})}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **fields,
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def begin(rank: int, address) -> None:
    """Start the process group, as DeepSpeed's launcher would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    import deepspeed  # noqa: PLC0415

    # its own all-reduce in shared memory would be compiled at the start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def _process(rank, function, address, arguments, results):
    try:
        begin(rank, address)
        results[rank] = function(rank, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        results[rank] = traceback.format_exc()
        raise
