"""DeepSpeed on two CPU processes, without its compiled operators."""

import gc
import os
from collections.abc import Callable

from accelerate import DistributedType
from accelerate.state import PartialState

from tests.helpers.processes import process_group, results_on_two


def on_two(function: Callable[..., object], tmp_path, *arguments) -> tuple[object, object]:
    """What ``function(rank, *arguments)`` returned in both processes, which can call ``initialize``."""
    return results_on_two(_process, function, tmp_path / "rendezvous", arguments)


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


def _begin() -> None:
    """Let DeepSpeed use the process group, as its launcher would."""
    import deepspeed  # noqa: PLC0415

    # its own all-reduce in shared memory would be compiled at the start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    gc.freeze()  # each engine of stage 3 collects garbage several times
    # accelerate keeps DeepSpeed for devices; what it does once it is chosen runs on CPUs too
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def _process(rank, function, address, arguments):
    os.environ["DS_ACCELERATOR"] = "cpu"
    with process_group(rank, address):
        _begin()
        return function(rank, *arguments)
