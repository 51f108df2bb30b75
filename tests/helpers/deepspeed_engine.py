"""DeepSpeed on two CPU processes, without its compiled operators."""

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing import Manager

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import PartialState
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

    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=_settings(stage, **fields))
    return engine, optimizer


def partitioned(make, zero_optimization):
    """A model that is made in the partitions of stage 3, as ``from_pretrained`` does it."""
    import deepspeed  # noqa: PLC0415

    with deepspeed.zero.Init(config_dict_or_path=_settings(3, zero_optimization=zero_optimization)):
        return make()


def _settings(stage, zero_optimization=None, **fields):
    return {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage, **(zero_optimization or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **fields,
    }


def begin(rank: int, address) -> None:
    """Start the process group, as DeepSpeed's launcher would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    import deepspeed  # noqa: PLC0415

    # its own all-reduce in shared memory would be compiled at the start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    gc.freeze()  # each engine of stage 3 collects garbage several times
    # accelerate keeps DeepSpeed for devices; what it does once it is chosen runs on CPUs too
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def _process(rank, function, address, arguments, results):
    try:
        begin(rank, address)
        results[rank] = function(rank, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        results[rank] = traceback.format_exc()
        raise
