"""Prune and regrow on two processes: DDP through accelerate, and FSDP2, against one process with the whole batch."""

import copy
import os
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

from sparse_peft import (
    S2FTConfig,
    SaRAConfig,
    SketchConfig,
    SLTrainConfig,
    SnellaConfig,
    SoRAConfig,
    SparseAdamW,
    SparseConfig,
    SparsityController,
)
from sparse_peft.dynamics.full_tensor import full_tensor
from sparse_peft.tuners.base_state import TrainedState
from sparse_peft.tuners.delta import Delta
from tests.helpers.blocks import Net
from tests.helpers.processes import process_group, results_on_two

pytestmark = pytest.mark.distributed
STEPS, TOTAL = 11, 12
OPTIMIZERS = {"adamw": torch.optim.AdamW, "by age": SparseAdamW}
OTHERS = {
    "s2ft": S2FTConfig,
    "sara": SaRAConfig,
    "sora": SoRAConfig,
    "sltrain": SLTrainConfig,
    "snella": SnellaConfig,
    "sketch": SketchConfig,
    "sketch in place": partial(SketchConfig, mode="replace"),
}
# nothing of them changes in training but the values
STATIC = ("nonzero", "s2ft", "sltrain", "sketch", "sketch in place")


def adapted(selection, seed=0, net=None, **fields):
    net = Net() if net is None else net
    if selection in OTHERS:
        own = {"seed": seed} if selection in ("s2ft", "sara", "sltrain") else {}
        return get_peft_model(net, OTHERS[selection](target_modules=["up", "down"], **own, **fields))
    window = {"set": 0, "principal": 0, "rigl": 1}.get(selection, 3)
    # every position is a candidate
    fields = {"density": 0.1, "reselect_every": 4, "accumulate": window, "candidates": 1 / 0.1, **fields}
    config = SparseConfig(selection=selection, target_modules=["up", "down"], seed=seed, **fields)
    return get_peft_model(net, config)


def batch_at(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 12, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def leaves(model):
    # layers keep their names inside whatever wraps the model
    return {
        name.split("base_model.model.")[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, TrainedState)
    }


def look_at(model):
    return {
        name: (
            leaf.support.indices.tolist() if isinstance(leaf, Delta) else None,
            [number for parameter in leaf.parameters() for number in full_tensor(parameter).flatten().tolist()],
            None
            if leaf.watched.grad is None
            else [
                number for parameter in leaf.parameters() for number in full_tensor(parameter.grad).flatten().tolist()
            ],
        )
        for name, leaf in leaves(model).items()
    }


def train(
    model, called, optimizer, controller, steps, part=slice(None), accumulation=1, backward=torch.Tensor.backward
):
    seen = []
    for step in steps:
        x, y = (t[part] for t in batch_at(step))
        for a, b in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            backward(F.cross_entropy(called(a), b) / accumulation)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        seen.append(look_at(model))  # gradients, before the step
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    seen.append(look_at(model))
    return seen


def on_one_process(selection, kind="adamw", **fields):
    model = adapted(selection, **fields)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return train(model, model, optimizer, SparsityController(model, optimizer, TOTAL), range(STEPS))


def half(rank):
    return slice(8 * rank, 8 * rank + 8)


def with_ddp(rank, selection, kind, fields, folder):
    accelerator = Accelerator(cpu=True)
    # this process draws positions of its own; those of the first count, as its parameters do in DDP
    model = adapted(selection, seed=rank, **fields)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    return with_accelerate(accelerator, model, wrapped, prepared, rank, folder)


def with_accelerate(accelerator, model, wrapped, prepared, rank, folder):
    controller = SparsityController(wrapped, prepared, TOTAL)
    seen = train(model, wrapped, prepared, controller, range(STEPS), half(rank), backward=accelerator.backward)
    state = accelerator.get_state_dict(wrapped)
    if rank == 0:
        accelerator.unwrap_model(wrapped).save_pretrained(folder, state_dict=state)
    distributed.barrier()
    return seen


def with_fsdp2(rank, selection, kind, fields, folder):
    def make():
        model = adapted(selection, **fields)
        mesh = init_device_mesh("cpu", (2,))
        for block in model.get_base_model().blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return model, optimizer

    model, optimizer = make()
    controller = SparsityController(model, optimizer, TOTAL)
    first = train(model, model, optimizer, controller, range(6), half(rank))
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)))
    distributed.barrier()

    resumed, other = make()
    for name, leaf in leaves(model).items():
        twin = leaves(resumed)[name]
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), leaf.parameters(), strict=True):
                mine.to_local().copy_(theirs.to_local())
            twin.load_state_dict(dict(leaf.named_buffers()), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        set_optimizer_state_dict(resumed, other, saved if rank == 0 else {}, options=whole)
    going_on = SparsityController(resumed, other, TOTAL)
    assert going_on.completed_steps == (0 if selection in STATIC else 6)
    rest = train(model, model, optimizer, controller, range(6, STEPS), half(rank))
    again = train(resumed, resumed, other, going_on, range(6, STEPS), half(rank))
    assert rest == again, "a resumed run is the uninterrupted one"
    return first[:-1] + rest


@contextmanager
def accelerates(fsdp2):
    """An accelerator of DDP or FSDP2, which accelerate keeps for devices; what it does then runs on CPUs, too."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    kept = accelerator.state.distributed_type
    if fsdp2:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        # of both, since each part of accelerate that asks takes the second one's again
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    try:
        yield accelerator
    finally:
        PartialState().distributed_type = kept
        AcceleratorState._reset_state()


def with_accelerates_fsdp2(rank, selection, kind, fields, folder):
    with accelerates(fsdp2=True) as accelerator:
        model = adapted(selection, **fields)
        optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        wrapped, prepared = accelerator.prepare(model, optimizer)
        assert all(isinstance(module, FSDPModule) for module in (wrapped, *wrapped.get_base_model().blocks))
        return with_accelerate(accelerator, wrapped, wrapped, prepared, rank, folder)


def refused(rank, selection, kind, fields, folder):
    model = adapted("accumulated_gradient", redistribute=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
    with pytest.raises(NotImplementedError, match="redistribute=True of adapter default in a run of 2 processes"):
        SparsityController(model, optimizer, TOTAL)
    wrapped = FullyShardedDataParallel(adapted("rigl"), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1)
    with pytest.raises(NotImplementedError, match=r"FSDP1's flat parameters.*FSDP2"):
        SparsityController(wrapped, optimizer, TOTAL)
    return "refused"


def process(rank, run, address, cases):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with process_group(rank, address):
        return [run(rank, *case) for case in cases]


def on_two_processes(run, tmp_path, cases):
    """What the two processes returned, for each case."""
    cases = [(selection, kind, fields, tmp_path / selection) for selection, kind, fields in cases]
    return list(zip(*results_on_two(process, run, tmp_path / "rendezvous", cases), strict=True))


def assert_close(found, expected):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name, (indices, values, gradient) in b.items():
            assert a[name][0] == indices, f"positions of {name} after {step} steps"
            assert a[name][1] == pytest.approx(values, rel=1e-3, abs=2e-5), f"values of {name} after {step} steps"
            if gradient is not None:
                assert a[name][2] == pytest.approx(gradient, rel=1e-3, abs=1e-6), f"gradient of {name} in step {step}"


CASES = [
    ("accumulated_gradient", "adamw", {}),
    ("momentum", "adamw", {}),
    ("rigl", "by age", {}),
    ("set", "by age", {}),
    # chosen anew from the whole weight, which FSDP2 shards
    ("principal", "adamw", {"principal_rank": 6, "reselect_every": 3}),
    ("nonzero", "adamw", {}),
    ("s2ft", "adamw", {"k": 4}),
    ("sara", "adamw", {"density": 0.2, "progressive": 3, "nuclear_weight": 0.01, "nuclear_min_size": 4, "scale": 1.0}),
    (
        "sora",
        "adamw",
        {"r": 4, "alpha": 8, "penalty": 2.0, "prox_start": 2, "target_rank": 7, "target_step": 9, "l1_weight": 5.0},
    ),
    ("sltrain", "adamw", {"r": 2, "density": 0.2}),
    (
        "snella",
        "adamw",
        {"r": 4, "target_sparsity": 0.6, "allocate_start": 0, "allocate_stop": 9, "allocate_every": 3},
    ),
    ("sketch", "adamw", {"bits": 2}),
    ("sketch in place", "adamw", {"bits": 3}),
]


# accelerate has FSDP2 since 1.6
ACCELERATES = pytest.param(
    with_accelerates_fsdp2,
    id="accelerate",
    marks=pytest.mark.skipif(not hasattr(AcceleratorState, "is_fsdp2"), reason="this accelerate has no FSDP2"),
)


@pytest.mark.parametrize("run", [pytest.param(with_ddp, id="ddp"), pytest.param(with_fsdp2, id="fsdp2"), ACCELERATES])
def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path, run):
    for (selection, kind, fields), (first, second) in zip(CASES, on_two_processes(run, tmp_path, CASES), strict=True):
        assert first == second, f"{selection}: the processes agree to the bit"
        assert_close(first, on_one_process(selection, kind, **fields))
        assert first[0] != first[-1]
        loaded = PeftModel.from_pretrained(Net(), tmp_path / selection)
        saved = first[6 if run is with_fsdp2 else -1]
        for name, (indices, values, _) in look_at(loaded).items():
            assert (indices, values) == saved[name][:2]


def with_accelerates_checkpoints(rank, selection, kind, fields, folder):
    """``save_state`` in the middle, and ``load_state`` into a new model, in DDP and in FSDP2."""
    for name in ("ddp", "fsdp2"):
        with accelerates(fsdp2=name == "fsdp2") as accelerator:

            def make(accelerator=accelerator):
                model = adapted(selection, **fields)
                optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=1e-2)
                wrapped, prepared = accelerator.prepare(model, optimizer)
                return wrapped, wrapped, prepared, SparsityController(wrapped, prepared, TOTAL)

            run = make()
            train(*run, range(6), half(rank), backward=accelerator.backward)
            accelerator.save_state(folder / name)
            rest = train(*run, range(6, STEPS), half(rank), backward=accelerator.backward)
            accelerator.free_memory()
            run = make()
            accelerator.load_state(folder / name)
            assert run[-1].completed_steps == 6
            again = train(*run, range(6, STEPS), half(rank), backward=accelerator.backward)
            assert again == rest, f"{name}: a resumed run is the uninterrupted one"


def test_accelerate_saves_and_loads_what_a_run_needs(tmp_path):
    on_two_processes(with_accelerates_checkpoints, tmp_path, [CASES[0], CASES[2]])


def test_processes_that_propose_different_candidates_agree(tmp_path):
    ((first, second),) = on_two_processes(with_ddp, tmp_path, [("accumulated_gradient", "adamw", {"candidates": 0.7})])
    assert first == second
    supports = [{name: state[0] for name, state in seen.items()} for seen in first]
    assert supports[0] != supports[3] != supports[7]


def test_what_cannot_work_is_refused(tmp_path):
    assert on_two_processes(refused, tmp_path, [("rigl", "adamw", {})]) == [("refused", "refused")]
